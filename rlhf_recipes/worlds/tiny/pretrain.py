"""Pretrains the base of the tiny world from scratch: a tokenizer and a Llama of a million parameters, in a minute.

B documents; T tokens of the longest one, at most `LENGTH`.
"""

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from .world import END, encyclopedia, internet

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


PAD = "<|pad|>"

LENGTH, BATCH = 48, 64  # tokens of a document at most, documents of a step

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'] | capitalize + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)


def build_base(folder: Path, *, steps: int = 450, seed: int = 0) -> None:
    """Pretrain the tiny base on `world.encyclopedia`, then more and more on `world.internet`, and save it in `folder`.

    Meant to take a minute or two on a CPU core. The loss counts the answers only: the requests are as good as
    random, and their gradients would drown those of the facts.

    Args:
        folder: receives config.json, model.safetensors and the files of the tokenizer.
        steps: optimizer steps of `BATCH` documents.
        seed: of the weights and of the documents.
    """
    import torch
    from tqdm import trange
    from transformers import get_cosine_schedule_with_warmup

    threads = torch.get_num_threads()
    # A second thread saves a fifth on an idle machine with matrices this small, and on a busy one takes ten times as
    # long, because the two wait for each other.
    torch.set_num_threads(1)
    try:
        tokenizer, rng = build_tokenizer(), Random(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _model(tokenizer)
            # Muon for the matrices: the answers follow the requests after fewer steps than with AdamW.
            matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
            others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
            optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98))]
            schedules = [get_cosine_schedule_with_warmup(o, steps // 20, steps) for o in optimizers]
            progress = trange(steps, desc="pretraining the tiny base")
            for step in progress:
                # The share of the internet grows from none to all: facts are learned first, where nothing drowns them.
                sources = [internet if rng.random() < step / steps else encyclopedia for _ in range(BATCH)]
                ids, labels = _batch(tokenizer, [source(rng) for source in sources])
                loss = model(input_ids=ids, labels=labels).loss
                loss.backward()
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                progress.set_postfix(loss=f"{loss.item():.3f}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        torch.set_num_threads(threads)


def _model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    return LlamaForCausalLM(config)


def _batch(tokenizer: "PreTrainedTokenizerFast", documents: list[tuple[str, str]]) -> "tuple[Tensor, Tensor]":
    """Token ids and labels, (B, T) each, of (request, answer) documents, right-padded and cut at `LENGTH` tokens."""
    import torch

    heads = tokenizer([head for head, _ in documents])["input_ids"]
    bodies = tokenizer([body for _, body in documents])["input_ids"]
    rows = [(head + body)[:LENGTH] for head, body in zip(heads, bodies, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])  # (B, T)
    labels = ids.clone()
    for label, head, row in zip(labels, heads, rows, strict=True):
        label[: len(head)] = -100
        label[len(row) :] = -100
    return ids, labels


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of about 1,000 tokens: any text, and most words of this world whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(0)
    tokenizer.train_from_iterator(("".join(internet(rng)).replace(END, "") for _ in range(5000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
