"""What a training costs: seconds, the processor's seconds, memory above the imports, parameters.

Imports neither trl nor rlhf_recipes: `control_trl112.py` reads it in a virtual environment of its own.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback


def memory_mib(field: str) -> float:
    """A size that Linux tells of this process, in MiB: VmRSS, resident now, or VmHWM, the highest that was."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


class Costs(TrainerCallback):
    """Writes what a training cost to a JSON file when it ends. To be made before any weight is loaded."""

    def __init__(self, file: Path) -> None:
        self.file, self.imports = file, memory_mib("VmRSS")
        self.models: Sequence[nn.Module] = ()  # all that are held; none: the trainer's

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        parameters = {p for held in self.models or [model] for p in held.parameters()}
        self.counts = {
            "parameters": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        }
        self.start = time.perf_counter(), time.process_time()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        costs = {
            "seconds": time.perf_counter() - self.start[0],
            "processor_seconds": time.process_time() - self.start[1],
            "memory_mib": memory_mib("VmHWM") - self.imports,
            **self.counts,
        }
        self.file.write_text(json.dumps(costs, indent=2) + "\n")
