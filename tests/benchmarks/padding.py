"""Rows of HH's lengths with and without an attention mask: seconds of scoring and of a forward with its backward.

    python tests/benchmarks/padding.py [--device cuda] [--rows 8] [--batches 6] [--repeats 5]

The same batches, prompts padded at the left and responses at the right, go through a random Mistral with an adapter:
once with the mask and positions that such rows need, once as `SharedBase.hidden` takes them, moved to the left, where
they need neither. Both in turn, medians of the repeats.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from workload import HH_PROMPTS, HH_RESPONSES, lengths_by

from rlhf_recipes import Lora, SharedBase

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 1408, "vocab_size": 16384, "sliding_window": None}


def batches(rows: int, count: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Ids and masks (B, P + T) of so many rows each, in random order as training has them."""
    torch.manual_seed(0)
    lengths = zip(lengths_by(HH_PROMPTS, rows * count, 512), lengths_by(HH_RESPONSES, rows * count, 512), strict=True)
    pairs = list(lengths)
    made = []
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        prompt, response = (max(pair[side] for pair in part) for side in (0, 1))
        mask = torch.zeros(rows, prompt + response, dtype=torch.bool, device=device)
        for row, (before, after) in enumerate(part):
            mask[row, prompt - before : prompt + after] = True
        made.append((torch.randint(4, SHAPE["vocab_size"], mask.shape, device=device), mask))
    return made


def with_a_mask(shared: SharedBase, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (B, L, H), by the mask."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    decoder = shared.backbone
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def seconds(call: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **SHAPE), dtype=dtype).to(given.device)
    shared = SharedBase(model.requires_grad_(False), Lora(r=16, alpha=32))
    shared.add_role("policy", trainable=True)
    work = batches(given.rows, given.batches, given.device)
    padding = 1 - sum(int(mask.sum()) for _, mask in work) / sum(mask.numel() for _, mask in work)

    def score(hidden: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            for ids, mask in work:
                hidden(shared, ids, mask)

    def train(hidden: Callable[..., Tensor]) -> None:
        for ids, mask in work:
            hidden(shared, ids, mask)[mask].float().sum().backward()

    with shared.role("policy"), torch.autocast(given.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        print(f"{len(work)} batches of {given.rows} rows, {padding:.0%} of the positions padding")
        for name, step in (("scoring", score), ("forward and backward", train)):
            pairs = [
                [seconds(lambda s=step, h=hidden: s(h), given.device) for hidden in (with_a_mask, SharedBase.hidden)]
                for _ in range(given.repeats + 1)
            ][1:]  # the first warms up
            ratios = [masked / moved for masked, moved in pairs]
            masked, moved = (statistics.median(side) for side in zip(*pairs, strict=True))
            print(
                f"{name:22} with a mask {masked:7.3f} s, moved left {moved:7.3f} s, "
                f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
