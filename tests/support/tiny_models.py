"""Tiny random models of every supported architecture, written to a folder with a word-level tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SHAPE, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "gemma": GATED,
    "gpt_neox": {**SHAPE, "intermediate_size": 128},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}


def make_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """Words w4, w5, ... behind pad, bos, eos and unk; `pad="<eos>"` gives the case where padding is EOS."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def save_model(folder: Path, architecture: str = "llama", seed: int = 0, **shape: int) -> Path:
    """Write a random model and its tokenizer. Its weights are large enough that adapters change what it says."""
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        architecture, **(ARCHITECTURES[architecture] | shape), **tokens, initializer_range=0.1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
