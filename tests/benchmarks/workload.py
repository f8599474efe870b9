"""What the benchmarks of PPO have in common: roles on a base, random prompts, endless responses, metered phases."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedTokenizerFast

from rlhf_recipes import PPOTrainer, SharedBase


def endless_tokenizer(vocabulary: int, named: int = 3) -> PreTrainedTokenizerFast:
    """A tokenizer whose EOS is behind a model's last token, so that every response has its full length.

    It has words for the first `named` tokens alone: nobody reads what a random model says.
    """
    words = {"<pad>": 0, "<unk>": 1, **{f"w{token}": token for token in range(2, named)}, "<eos>": vocabulary}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
    )


def add_roles(shared: SharedBase, rewards: int = 1) -> None:
    """A policy and a critic to train, a frozen reference, and so many frozen reward adapters with random heads."""
    shared.add_role("reference")
    for name in ("reward", *(f"reward_{number}" for number in range(1, rewards))):
        shared.add_role(name, head=True)
        torch.nn.init.normal_(shared.head_weight(name))
    shared.add_role("policy", trainable=True)
    shared.add_role("critic", trainable=True, head=True)


# Deciles of the lengths in Anthropic's HH (harmless base, 8,000 training rows), in tokens of SmolLM2's tokenizer, of
# the 98.6 % of rows with prompt and chosen response of at most 512 each.
HH_PROMPTS = (12, 19, 24, 47, 72, 99, 127, 160, 205, 277, 508)
HH_RESPONSES = (2, 10, 16, 21, 27, 34, 44, 56, 74, 106, 446)


def lengths_by(deciles: Sequence[int], count: int, limit: int) -> list[int]:
    """So many lengths of a distribution, evenly over it and in random order, none above the limit."""
    lengths = np.interp((np.arange(count) + 0.5) / count, np.linspace(0, 1, len(deciles)), deciles)
    return np.random.default_rng(0).permutation(lengths.clip(2, limit).astype(int)).tolist()


def random_prompts(lengths: Sequence[int], vocabulary: int) -> Dataset:
    """A prompt of each length."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = [
        {"prompt_ids": [rng.randrange(4, vocabulary) for _ in range(length)], "prompt": ""} for length in lengths
    ]
    return Dataset.from_list(rows)


class Flops(TorchDispatchMode):
    """Counts floating-point operations by torch's formulas.

    Its own counter knows no product that adds in place, and cannot follow an `autograd.grad` inside a forward.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
        if formula := flop_registry.get(kind):
            self.count += formula(*args, **(kwargs or {}), out_val=result)
        return result


class PhasedTrainer(PPOTrainer):
    """Runs each phase of an update, but no phase within another, inside `around`."""

    outer: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.outer
        with ExitStack() as stack:
            if before is None:
                self.outer = name
                stack.enter_context(self.around(name))
            stack.enter_context(super().phase(name))
            yield
        self.outer = before

    def around(self, name: str) -> AbstractContextManager[Any]:
        """What a phase runs in."""
        return nullcontext()
