"""Rows of HH's lengths by an attention mask, moved to the left, and packed: seconds of scoring and of training.

    python tests/benchmarks/padding.py [--device cuda] [--rows 8] [--batches 8] [--repeats 5]

The same rows, prompts padded at the left and responses at the right, go through a random Mistral with an adapter in
batches: as they come, and sorted by length as an update's are. Once with the mask and positions that padding needs,
once moved to the left, where they need neither, and once packed, without padding. In turn, medians of the repeats and
of their ratios, with the least and the most; on a CPU it is the process's time, which other work hardly changes.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from workload import HH_PROMPTS, HH_RESPONSES, lengths_by

from rlhf_recipes import Lora, SharedBase
from rlhf_recipes.model.architecture import token_states

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 1408, "vocab_size": 16384, "sliding_window": None}


def batches(rows: int, count: int, device: str, by_length: bool) -> list[tuple[Tensor, Tensor]]:
    """Ids and masks (B, P + T) of so many rows each."""
    torch.manual_seed(0)
    lengths = zip(lengths_by(HH_PROMPTS, rows * count, 512), lengths_by(HH_RESPONSES, rows * count, 512), strict=True)
    pairs = sorted(lengths, key=sum) if by_length else list(lengths)
    made = []
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        prompt, response = (max(pair[side] for pair in part) for side in (0, 1))
        mask = torch.zeros(rows, prompt + response, dtype=torch.bool, device=device)
        for row, (before, after) in enumerate(part):
            mask[row, prompt - before : prompt + after] = True
        made.append((torch.randint(4, SHAPE["vocab_size"], mask.shape, device=device), mask))
    return made


def with_a_mask(decoder: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (N, H), by the mask."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    output = decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[mask]


WAYS: dict[str, Callable[..., Tensor]] = {
    "a mask": with_a_mask,
    "moved left": functools.partial(token_states, packed=False),
    "packed": functools.partial(token_states, packed=True),
}


def seconds(call: Callable[[], None], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **SHAPE), dtype=dtype).to(given.device)
    shared = SharedBase(model.requires_grad_(False), Lora(r=16, alpha=32))
    shared.add_role("policy", trainable=True)
    assert shared.packs_rows
    for by_length in (False, True):
        work = batches(given.rows, given.batches, given.device, by_length)
        padding = 1 - sum(int(m.sum()) for _, m in work) / sum(len(m) * int(m.sum(1).max()) for _, m in work)
        order = "by length" if by_length else "as they come"
        print(f"{len(work)} batches of {given.rows} rows {order}, moved left {padding:.0%} of them are padding")

        def score(states: Callable[..., Tensor], work: list[tuple[Tensor, Tensor]] = work) -> None:
            with torch.no_grad():
                for ids, mask in work:
                    states(shared.backbone, ids, mask)

        def train(states: Callable[..., Tensor], work: list[tuple[Tensor, Tensor]] = work) -> None:
            for ids, mask in work:
                states(shared.backbone, ids, mask).float().sum().backward()

        for name, step in (("scoring", score), ("forward and backward", train)):
            with shared.role("policy"), torch.autocast(given.device, dtype, enabled=dtype == torch.bfloat16):
                found = [
                    {way: seconds(lambda s=step, h=states: s(h), given.device) for way, states in WAYS.items()}
                    for _ in range(given.repeats + 1)
                ][1:]  # the first warms up
            for way in WAYS:
                ratios = [times[way] / times["packed"] for times in found]
                print(
                    f"  {name:22}{way:12}{statistics.median(times[way] for times in found):8.3f} s, over packed "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
