"""Two processes against one, of one thread each: a PPO update on a CPU, and what plan/several.py makes of it.

    python tests/benchmarks/processes.py [--shape large] [--repeats 3] [--processes 2]

The work is that of ppo_step.py in float32, and the two take turns; medians with the least and the most. Seconds of the
clock need free cores. Beside other work the processor's seconds of the busiest process say how the work is divided, in
which waiting for the others does not count. The model's figure is one process's seconds, divided by the processes, and
what an update sends (as logged) over the rate of gloo's sum here, measured in the same processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def measure(shape: str, updates: int) -> dict[str, Any]:
    """What a process of so many finds: episodes a second, what an update sums, and GB/s through a link of the ring."""
    import torch
    import torch.distributed as dist
    from ppo_step import BATCH, SHAPES, ours

    from rlhf_recipes.model.processes import all_gather, count, join

    join()
    torch.manual_seed(0)
    found = ours(SHAPES[shape], "float32", updates)
    message, seconds = torch.zeros(2**22), []
    for _ in range(10 * (count() > 1)):
        start = time.perf_counter()
        dist.all_reduce(message)
        seconds.append(time.perf_counter() - start)
    part = 2 * (count() - 1) / count()
    rate = part * message.nbytes / statistics.median(seconds) / 1e9 if seconds else None
    busiest = max(all_gather(found["processor_s"]))
    return {
        "seconds": BATCH / found["episodes_per_s"],
        "processor_s": busiest,
        "summed_mib": found["summed_mib"],
        "gb_per_s": rate,
    }


def run(processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """A measurement in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, "--measure", "--shape", options.shape, "--updates", str(options.updates)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="large")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="of each measurement, the first of which is not timed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        from rlhf_recipes.model.processes import reported

        with reported():
            print(json.dumps(measure(options.shape, options.updates)))
        return
    runs: dict[int, list[dict[str, Any]]] = {1: [], options.processes: []}
    for _ in range(options.repeats):
        for processes, found in runs.items():
            found.append(run(processes, options))
            print(processes, found[-1], "load", os.getloadavg()[0], flush=True)
    part, last = 2 * (options.processes - 1) / options.processes, runs[options.processes][-1]
    sending = part * last["summed_mib"] * 2**20 / (last["gb_per_s"] * 1e9)
    print(f"an update sums {last['summed_mib']:.1f} MiB, in {sending:.3f} s at {last['gb_per_s']:.2f} GB/s")
    for key, of in (("seconds", "the clock"), ("processor_s", "the busiest process's processor")):
        middle = {}
        for processes, found in runs.items():
            seconds = [one[key] for one in found]
            middle[processes] = statistics.median(seconds)
            spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
            print(f"{processes} processes: {middle[processes]:.2f} s an update ({spread}), by {of}")
        one, several = middle.values()
        print(f"times as fast: {one / several:.2f}; by the model {one / (one / options.processes + sending):.2f}")


if __name__ == "__main__":
    main()
