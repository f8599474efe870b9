"""Rows, and a byte-level tokenizer for them."""

import gzip
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rlhf_recipes.data.tokens import set_chat_template


def make_tokenizer(*special: str, adds_eos: bool = False, template: str | None = None) -> FastTokenizer:
    """A byte-level BPE tokenizer with some merges, which starts a text with <s>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["Human: the answer is that\n\nAssistant: question"] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>" if adds_eos else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = FastTokenizer(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", extra_special_tokens=list(special)
    )
    set_chat_template(tokenizer, template)
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)
