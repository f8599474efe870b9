"""A stage's job: all that training it needs, and what is the same for every stage's trainer."""

import copy
import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from ..data.prepare import Prepared
from ..data.split import halve
from ..model.adapters import read_adapter_config
from ..model.base import write_fingerprint
from ..model.processes import is_main, on_main
from ..recipe.overrides import to_dict
from ..recipe.values import Recipe
from ..records import tracking
from ..records.checkpoints import last_checkpoint, seal
from ..records.contents import Fingerprint
from ..records.folder import round_folder
from ..records.progress import Later
from ..records.recorder import Recorder
from ..records.tracking import Session, Tracker
from .callbacks import LogWithCheckpoints, RecordLogs, ShowProgress, StartOnce
from .float16 import CountSkippedSteps, scale_losses
from .nonfinite import LeaveOutNonFinite
from .shares import SharesBatches, StopTogether


@dataclass(frozen=True)
class Job:
    """All that one stage needs, as the pipeline gives it."""

    recipe: Recipe
    stage: str
    run_dir: Path
    config: Any  # the trainer's: SFTConfig, RewardConfig, PPOConfig or DPOConfig
    extras: dict[str, Prepared]  # what it takes beside its data: see `inputs.prepare_extras`
    data: Prepared
    tokenizer: PreTrainedTokenizerBase
    fingerprint: Fingerprint  # of the base
    resume: str | None  # the checkpoint to go on from
    round: int = 1  # from the second on `run_dir` is the round's folder, inside the run's
    later: tuple[Later, ...] = ()  # what the run does after it
    callbacks: tuple[TrainerCallback, ...] = ()  # the user's, of every stage's trainer
    tracker: Tracker | None = None  # while the stage runs

    @property
    def folder(self) -> Path:
        """Where the stage keeps its checkpoints and its adapter."""
        return Path(self.config.output_dir)

    def halves(self, heldout: Dataset) -> tuple[Dataset, Dataset]:
        """Of held-out rows those that training evaluates on, and those that results are measured on.

        Both are all rows, but where evaluations choose a checkpoint, end training or steer its learning rate: the best
        of several is the best by luck as well, so that it is then measured on prompts that did not choose it.
        """
        chooses = self.config.metric_for_best_model is not None
        return halve(heldout, self.recipe.seed) if chooses else (heldout, heldout)

    @property
    def evaluated(self) -> Dataset:
        """The stage's held-out rows that training evaluates on."""
        return self.halves(self.data.heldout)[0]

    @property
    def reported(self) -> Dataset:
        """The stage's held-out rows that results are measured on."""
        return self.halves(self.data.heldout)[1]

    @property
    def step(self) -> int | None:
        """The step of the checkpoint to go on from."""
        return None if self.resume is None else trainer_state(self.resume).global_step

    @property
    def owes_evaluation(self) -> bool:
        """Whether the evaluation behind that step is still to come: the run was stopped in the middle of it."""
        return self.resume is not None and _control(trainer_state(self.resume))["should_evaluate"]

    @property
    def root(self) -> Path:
        """The run's own folder."""
        return self.run_dir if self.round == 1 else self.run_dir.parent

    @property
    def sft(self) -> Path | None:
        """The SFT adapter; None, the bare base, in a recipe without that stage."""
        return None if self.recipe.sft is None else self.root / "sft"

    @property
    def start(self) -> Path | None:
        """The adapter that the policy starts from: the SFT one, or the policy of the round before."""
        return self.sft if self.round == 1 else round_folder(self.root, self.round - 1) / "ppo" / "policy"

    def adapter(self, folder: str, name: str, seed: int) -> "Job":
        """The job of a further reward adapter, which has a folder, a name and a tracked run of its own.

        Args:
            folder: inside the stage's.
            name: follows the stage's in names of runs and of rows.
            seed: is added to the stage's.
        """
        config = copy.copy(self.config)
        config.output_dir = str(self.folder / folder)
        config.run_name += f"-{name}"
        config.seed += seed
        config.data_seed = None if config.data_seed is None else config.data_seed + seed
        resume = on_main(lambda: last_checkpoint(Path(config.output_dir)))
        return dataclasses.replace(self, stage=f"{self.stage}-{name}", config=config, resume=resume)

    @contextmanager
    def tracked(self, beside: bool = False) -> Iterator["Job"]:
        """The job with its run in the tracker, which ends with the block.

        Args:
            beside: the stage's own run stays open, as it does while a further reward adapter is trained.
        """
        recipe, tracker = self.recipe, self.recipe.tracker if is_main() else "none"
        run_id, goes_on = tracking.session_id(self.folder, tracker, resumed=self.step is not None)
        session = Session(
            run_dir=self.run_dir,
            group=self.root.name,
            job=self.stage,
            name=self.config.run_name,
            config={
                "recipe": to_dict(recipe),
                "base": self.fingerprint,
                "args": self.config.to_dict(),
                "round": self.round,
            },
            id=run_id,
            step=self.step if goes_on else None,
            beside=beside,
        )
        with tracking.tracked_run(tracker, session) as run:
            yield dataclasses.replace(self, tracker=run)

    def conclude(self, results: Mapping[str, Any]) -> None:
        """Give the tracker the stage's results and, where the recipe asks for it, its adapters."""
        assert self.tracker is not None
        numbers = tracking.result_numbers(results)
        self.tracker.summarize(numbers)
        if self.recipe.artifacts:
            metadata = {"stage": self.stage, "round": self.round, "base": self.fingerprint, **numbers}
            tracking.upload_adapters(self.tracker, self.folder, self.root, metadata)

    def watch(self, trainer: Trainer) -> Recorder:
        """Log the trainer to the run folder and the terminal, in place of transformers' own printing.

        Rows that an earlier attempt wrote after the checkpoint are dropped: they come again.
        """
        assert self.tracker is not None
        recorder = Recorder(
            self.run_dir, self.stage, self.tracker, self.step or 0, self.owes_evaluation, writes=is_main()
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.args.fp16:
            trainer.add_callback(CountSkippedSteps(trainer.accelerator))
        elif self.stage != "ppo":  # whose steps are several in one of the Trainer's
            trainer.add_callback(LeaveOutNonFinite(self.stage.partition("-")[0], self.config.on_nonfinite))
        trainer.add_callback(LogWithCheckpoints())
        trainer.add_callback(StartOnce())
        trainer.add_callback(RecordLogs(recorder))
        trainer.add_callback(ShowProgress(self.stage, self.round, self.later, self.root, writes=is_main()))
        for callback in (*self.callbacks, StopTogether()):
            trainer.add_callback(callback)
        return recorder

    def save(self, model: PeftModel, **options: Any) -> None:
        """Write a trained adapter into the stage's folder, with its tokenizer and its base's fingerprint.

        `options` are of PEFT's `save_pretrained`.
        """

        def write() -> None:
            model.save_pretrained(str(self.folder), **options)
            self.tokenizer.save_pretrained(self.folder)
            write_fingerprint(self.folder, self.fingerprint)

        on_main(write)

    def train(self, trainer: Trainer) -> None:
        """Train from the stage's last checkpoint, if there is one, to the end.

        Raises ValueError where that holds more than tensors, or adapters of another kind.
        """
        scale_losses(trainer.accelerator)
        if isinstance(trainer, SharesBatches):
            trainer.owes_evaluation = self.owes_evaluation
        if not is_main():
            trainer.args.save_total_limit = None  # the main process deletes old checkpoints
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                # TRL makes the adapters of a quantized base bfloat16, where a step of 1e-5 on a weight is lost.
                parameter.data = parameter.data.float()
        if self.resume is not None:
            state: Any = trainer_state(self.resume)
            # The path of the best one in its state may be that of a folder that has been moved since.
            best = self.folder / f"checkpoint-{state.best_global_step}"
            # A kill may have come while the Trainer deleted a checkpoint: the rest would be taken for a whole one.
            kept = str(best) if best.is_dir() else None
            rotate_checkpoints(str(self.folder), trainer.args.save_total_limit, kept)
            for checkpoint in filter(None, (self.resume, kept)):
                for path in Path(checkpoint).rglob("adapter_config.json"):  # the Trainer loads whatever is there
                    read_adapter_config(path.parent)
            if is_main():
                seal(Path(self.resume))
            # True of the last step, and where training stopped early or beyond max_kl.
            if _control(state)["should_training_stop"]:
                # From such a checkpoint the Trainer would take one more step, so it is only loaded.
                trainer.state = state
                trainer._load_from_checkpoint(self.resume)
                if isinstance(trainer, SharesBatches):
                    trainer.evaluate_what_is_owed()  # which may choose another
                best = self.folder / f"checkpoint-{state.best_global_step}"
                if trainer.args.load_best_model_at_end and best.is_dir():
                    trainer._load_from_checkpoint(str(best))
                trainer.log({"train_runtime": 0.0, "total_flos": state.total_flos})  # as the Trainer ends a training
                return
        try:
            trainer.train(resume_from_checkpoint=self.resume)
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise ValueError(f"{self.stage}.metric_for_best_model: {error.args[0]}") from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.resume}: a file of it is damaged, or wants to run code, which was not run. Delete this "
                "checkpoint, and the run goes on from the one before."
            ) from error


def trainer_state(checkpoint: str) -> TrainerState:
    """The state that the Trainer wrote into a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))


def _control(state: TrainerState) -> dict[str, bool]:
    """What was still to be done when the Trainer wrote a checkpoint with that state."""
    control: Any = state.stateful_callbacks
    return control["TrainerControl"]["args"]
