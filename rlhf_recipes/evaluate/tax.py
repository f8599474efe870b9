"""The alignment tax: what a model can still do on the tasks of EleutherAI's lm-evaluation-harness (extra `eval`).

InstructGPT (arXiv:2203.02155, section 4.2) found that PPO costs some of it. Tasks are asked as the harness asks every
model, without a chat template, so that the numbers of the base are those that are published.
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..model.sampler import autocast_of
from ..recipe.overrides import suggestion
from ..records.digest import digest
from .models import Bench, NamedModel

TAX = ("truthfulqa_mc2", "hellaswag", "toxigen")  # what `tax` stands for: truth, common sense, toxicity
SEED = 1234  # the harness's own, of examples that are shown and of bootstraps


class Tasks:
    """Tasks of the harness by name, its own or those of a folder."""

    def __init__(self, names: Sequence[str], folder: Path | None = None, limit: int | None = None) -> None:
        """
        Args:
            names: tasks, groups or tags; `tax` stands for `TAX`.
            folder: of YAML files of tasks beside the harness's own.
            limit: take the first so many questions of each task.
        Raises:
            ValueError: the extra is not installed, no such folder, or no such task.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("--tasks needs EleutherAI's lm-evaluation-harness: pip install 'rlhf_recipes[eval]'.")
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--task-dir: there is no folder {folder}.")
        from lm_eval.tasks import TaskManager

        self.names = list(dict.fromkeys(task for name in names for task in (TAX if name == "tax" else (name,))))
        self.limit = limit
        self.manager: Any = TaskManager(include_path=None if folder is None else str(folder))
        for name in self.names:
            if name not in self.manager.all_tasks:
                raise ValueError(
                    f"--tasks: the harness has no task {name!r}.{suggestion(name, self.manager.all_tasks)}"
                )
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder is not None else []
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        self.identity = [limit, importlib.metadata.version("lm_eval"), hashes]

    def measure(self, model: NamedModel, bench: Bench) -> dict[str, dict[str, dict[str, float | None]]]:
        """A model's results: task -> metric -> value and error (the standard error; None where there is none)."""
        keys = [digest("task", bench.fingerprint, model.weights, self.identity, name) for name in self.names]

        def run(places: list[int]) -> list[dict[str, Any]]:
            return [self._evaluate(model, bench, self.names[place]) for place in places]

        results = bench.cache.fill(keys, run, f"{model.name}: tasks")
        return {task: metrics for result in results for task, metrics in result.items()}

    def _evaluate(self, model: NamedModel, bench: Bench, name: str) -> dict[str, Any]:
        """A model's results in one task, or in each task of a group."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wrap: Any = HFLM  # whose decorator hides its arguments
        evaluate: Any = simple_evaluate
        role, shared = bench.hold(model.folder), bench.shared
        wrapped = wrap(pretrained=shared.causal, tokenizer=bench.tokenizer, batch_size=bench.batch_size)
        with shared.role(role), autocast_of(shared):
            harness = evaluate(
                wrapped,
                tasks=[name],
                limit=self.limit,
                task_manager=self.manager,
                log_samples=False,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        return {task: _metrics(values) for task, values in harness["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's `metric,filter` and `metric_stderr,filter` as metrics with value and error."""
    result = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else key
            result[name] = {"value": float(value), "error": float(error) if isinstance(error, int | float) else None}
    return result
