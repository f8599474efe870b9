"""Running one stage: its job, its training, and its record in the manifest."""

import copy
import dataclasses
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..data.prepare import Prepared
from ..model.base import device_name
from ..model.memory import peak_memory_mib, release, reset_peak_memory, resident_mib
from ..model.processes import all_gather, count, is_main, on_main
from ..plan.fit import out_of_memory, plan_for_rows
from ..plan.stage_memory import StagePlan
from ..recipe.values import PEOPLE, Recipe
from ..records.checkpoints import last_checkpoint
from ..records.contents import Fingerprint, StageRecord, StageResults
from ..records.files import sync_all
from ..records.folder import round_folder
from ..records.manifest import Manifest
from ..records.progress import Later, Seconds, stage_words
from ..records.recorder import METRICS, SAMPLES
from ..stages.configure import Configs, training_steps
from ..stages.dpo import train_dpo
from ..stages.inputs import rows_line
from ..stages.job import Job
from ..stages.ppo.stage import train_ppo
from ..stages.reward.stage import train_reward
from ..stages.sft import train_sft
from ..stages.stop import StopInOrder

logger = logging.getLogger(__name__)

# A stage -> what trains it and returns its results.
TRAIN: dict[str, Callable[[Job], StageResults]] = {
    "sft": train_sft,
    "reward": train_reward,
    "ppo": train_ppo,
    "dpo": train_dpo,
}

EVALUATING = {"evaluation_loop", "compare"}  # the functions, transformers' and ours, that take rows to evaluate on


@dataclass(frozen=True)
class ActiveRun:
    """A run that has something left to train: what its stages and rounds share."""

    recipe: Recipe
    run_dir: Path
    configs: Configs  # the trainer configuration of each stage
    tokenizer: PreTrainedTokenizerBase
    base: Fingerprint
    is_planned: bool  # whether the memory of its stages can be planned
    callbacks: tuple[TrainerCallback, ...]
    console: Console
    agenda: tuple[tuple[str, int], ...] = ()  # what is to be trained: stages with their rounds
    planned_seconds: Mapping[str, Seconds] = field(default_factory=dict)  # of the stages of which that is known

    def later(self, stage: str, round_number: int) -> tuple[Later, ...]:
        """What the run trains after a stage of a round: of a round that people rank nothing before they have."""
        here = self.agenda.index((stage, round_number)) if (stage, round_number) in self.agenda else len(self.agenda)
        people = self.recipe.rounds is not None and self.recipe.rounds.labeler == PEOPLE
        return tuple(
            Later(stage_words(*part), self.seconds_before(*part) or self.planned_seconds.get(part[0]))
            for part in self.agenda[here + 1 :]
            if part[1] == round_number or not people
        )

    def seconds_before(self, stage: str, round_number: int) -> Seconds | None:
        """What a stage took in the last of the rounds before one; None where it was in none."""
        for earlier in range(round_number - 1, 0, -1):
            manifest = Manifest.read(round_folder(self.run_dir, earlier))
            if manifest.is_done(stage):
                return manifest.stages[stage]["seconds"], manifest.stages[stage]["seconds"]
        return None

    def job(
        self, stage: str, data: Prepared, extras: dict[str, Prepared], config: Any = None, round_number: int = 1
    ) -> Job:
        """A stage's job in the folder of its round, from the last checkpoint there.

        Args:
            extras: what the stage takes beside its data; see `inputs.prepare_extras`.
            config: of the trainer, where it is not the run's own.
        """
        folder = round_folder(self.run_dir, round_number)
        return Job(
            recipe=self.recipe,
            stage=stage,
            run_dir=folder,
            config=config or self.configs[stage],
            extras=extras,
            data=data,
            tokenizer=self.tokenizer,
            fingerprint=self.base,
            resume=on_main(lambda: last_checkpoint(folder / stage)),
            round=round_number,
            later=self.later(stage, round_number),
            callbacks=self.callbacks,
        )

    def stop_in_order(self) -> None:
        """Raises Stopped between two parts of the run if its time is over."""
        for callback in self.callbacks:
            if isinstance(callback, StopInOrder):
                callback.between_parts()

    def train(self, job: Job, manifest: Manifest) -> None:
        """Run a stage, and say before how many rows it has and after what is doubtful about its results."""
        self.stop_in_order()
        said = f"{job.stage}: {rows_line(job.data.report)}"
        steps = training_steps(job.stage, job.config, job.data.report["train"])
        if steps is not None and not getattr(job.config, "judge_share", 0):  # the judge has some of the rows
            said += f"; {steps:,} {'update' if job.stage == 'ppo' else 'step'}{'s' * (steps != 1)}"
        self.console.print(Text(said, style="bold"))
        manifest.base = self.base
        run_stage(job, manifest, plan_for_rows(job) if self.is_planned else None)
        card = manifest.results(job.stage).get("card")
        for warning in card["warnings"] if card is not None else ():
            self.console.print(Text(f"warning: {warning}", style="yellow"))


def run_stage(job: Job, manifest: Manifest, plan: StagePlan | None) -> None:
    """Run one stage between two writes of the manifest: `running` before, `done` with its results after.

    Raises ValueError, with what to change, where it runs out of memory.
    """
    record = manifest.begin(job.stage, job.data.report)
    record["device"] = device_name(job.recipe.base)
    on_main(lambda: manifest.write(job.run_dir))  # all processes begin together
    job.folder.mkdir(parents=True, exist_ok=True)
    if sizes := job.config.chosen_sizes:
        record["chosen_sizes"] = sizes
    if plan is not None:
        # On a CPU the measured peak is that of the process, with all that it has loaded before.
        already = 0.0 if torch.cuda.is_available() else resident_mib()
        record["planned_peak_mib"] = round(plan.peak_mib + already, 1)
    set_seed(job.recipe.seed)
    try:
        with _measured(record) as taken, job.tracked() as tracked:
            record["results"] = train_within_memory(tracked, record)
            record["peak_memory_mib"] = max(record["peak_memory_mib"], *all_gather(round(peak_memory_mib(), 1)))
            tracked.conclude({**record["results"], **taken()})
        sync_all(job.folder, job.run_dir / METRICS, job.run_dir / SAMPLES)
        record["state"] = "done"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(out_of_memory(error, job, plan)) from error
    finally:
        if is_main():
            manifest.write(job.run_dir)
        release()


def train_within_memory(job: Job, record: StageRecord) -> StageResults:
    """Train a stage, and where memory runs out, go on from its last checkpoint with fewer rows at once.

    A step still takes as many rows, accumulated, so that the results are the same but for rounding. PPO does so by
    itself, in each of its phases; processes that share a run end together. Raises what the last attempt did.

    Args:
        record: the sizes that were chosen are written into it.
    """
    while True:
        try:
            return TRAIN[job.stage](job)
        except (RuntimeError, MemoryError) as error:
            if job.stage == "ppo" or count() > 1 or not is_out_of_memory(error):
                raise
            called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
            evaluates = not called.isdisjoint(EVALUATING)
            sizes = smaller_sizes(job.config, evaluates)
            if evaluates:
                error.add_note("evaluating")
            if not sizes:
                raise
        # Behind the handler, where the error no longer holds the trainer and its tensors.
        release()
        rows = getattr(job.config, next(iter(sizes)))
        config = copy.copy(job.config)
        vars(config).update(sizes)
        record["chosen_sizes"] = {**record.get("chosen_sizes", {}), **sizes}
        settings = ", ".join(f"{job.stage}.{name}={size}" for name, size in sizes.items())
        what = f"{job.stage}'s evaluation" if evaluates else job.stage
        logger.warning("%s ran out of memory with %d rows at once; it goes on with %s.", what, rows, settings)
        job = dataclasses.replace(job, config=config, resume=last_checkpoint(job.folder))


def smaller_sizes(config: Any, evaluates: bool) -> dict[str, int]:
    """The settings with which a stage of rows takes fewer at once; none where it takes a single one.

    Args:
        evaluates: it is the evaluation that is to take fewer.
    """
    if evaluates:
        rows = config.per_device_eval_batch_size
        return {"per_device_eval_batch_size": rows // 2} if rows > 1 else {}
    rows = config.per_device_train_batch_size
    for size in range(rows - 1, 0, -1):
        if rows % size == 0:
            steps = rows // size * config.gradient_accumulation_steps
            return {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    return {}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in whatever words of torch's or its backends'."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))


@contextmanager
def _measured(record: StageRecord) -> Iterator[Callable[[], Mapping[str, float]]]:
    """A block whose time and memory are added to a stage's record, also where it fails.

    Yields a function that says what the stage has taken so far: `seconds` of all attempts, `peak_memory_mib` of this
    one.
    """
    start, before = time.perf_counter(), record["seconds"]
    reset_peak_memory()

    def taken() -> Mapping[str, float]:
        return {"seconds": before + time.perf_counter() - start, "peak_memory_mib": peak_memory_mib()}

    try:
        yield taken
    finally:
        record["seconds"] = round(taken()["seconds"], 1)
        record["peak_memory_mib"] = max(record["peak_memory_mib"], round(taken()["peak_memory_mib"], 1))
