"""How many steps a rollout takes where finished rows make room for waiting prompts: simulated, on lengths as HH's.

    python tests/benchmarks/refill.py [--prompts 512] [--rows 32]

A step takes about as long for 4 rows as for 32, since it reads all weights. A prompt pass takes that of several steps,
because Python issues its kernels one by one.
"""

import argparse
from collections import deque

from workload import HH_RESPONSES, lengths_by

from rlhf_recipes.model import graph
from rlhf_recipes.model.graph import LOOK, Schedule


def simulated(lengths: list[int], rows: int) -> tuple[int, int, int]:
    """The schedule of `graph.decode_static` for responses of these lengths.

    Returns:
        steps, the rows of all steps together, and prompt passes.
    """
    schedule = Schedule(deque(range(len(lengths))), [None] * min(rows, len(lengths)))
    left = list(lengths)
    steps = row_steps = passes = 0
    while schedule.waiting or schedule.taken:
        passes += bool(schedule.fill())
        schedule.close_up()
        steps, row_steps = steps + LOOK, row_steps + LOOK * schedule.rows
        for slot in schedule.taken:
            prompt = schedule.slots[slot]
            assert prompt is not None
            left[prompt] -= LOOK
            if left[prompt] <= 0:
                schedule.slots[slot] = None
    return steps, row_steps, passes


def one_after_the_other(lengths: list[int], rows: int) -> tuple[int, int, int]:
    """The same without refills: a batch begins when the one before has ended."""
    batches = [simulated(lengths[start : start + rows], rows) for start in range(0, len(lengths), rows)]
    steps, row_steps, passes = (sum(column) for column in zip(*batches, strict=True))
    return steps, row_steps, passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rows", type=int, default=32)
    given = parser.parse_args()
    lengths = lengths_by(HH_RESPONSES, given.prompts, 512)
    print(f"{given.prompts} prompts, {given.rows} rows, {sum(lengths)} tokens")
    print("| | steps | rows of a step | prompt passes | in steps, a pass at 2, 4 and 8 |")
    print("|---|---|---|---|---|")
    runs = {"one batch after the other": one_after_the_other(lengths, given.rows)}
    default = graph.REFILL
    for share in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4):
        graph.REFILL = share
        runs[f"refilled at {share:.3g} free" + " (the default)" * (share == default)] = simulated(lengths, given.rows)
    for name, (steps, row_steps, passes) in runs.items():
        costs = ", ".join(f"{steps + cost * passes:,}" for cost in (2, 4, 8))
        print(f"| {name} | {steps:,} | {row_steps / steps:.1f} | {passes} | {costs} |")


if __name__ == "__main__":
    main()
