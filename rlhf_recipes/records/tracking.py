"""Where curves go beside the run folder: Weights & Biases, trackio or TensorBoard, by one setting.

Each stage is a tracker's run of its own, in the group of the run folder, and so is each further adapter of an ensemble.
Metrics have their names of `metrics.jsonl`, except that each has a group before its first slash, by which all three
trackers make their panels: `eval_gold` is `eval/gold`, `loss` is `train/loss`, `objective/kl` stays.

A tracker may fail or be slow at any time: training goes on, and it is said once where the rows are (`Patient`).
"""

import contextvars
import functools
import importlib.util
import json
import netrc
import os
import queue
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..recipe.overrides import to_dict
from ..recipe.values import Recipe
from .files import write_json
from .terminal import printable

STEP = "train/global_step"  # the x axis in W&B, under the name that transformers gives it
PEAKS = ("eval/gold", "eval/judge", "eval/quality", "eval/score")  # over-optimised where the last is below the highest
CLOCKS = ("eval/runtime", "eval/samples_per_second", "eval/steps_per_second", "eval/model_preparation_time")
FILES = ("report.html", "recipe.json", "summary.json", "evaluation/evaluation.json")  # of the report, where there
TEXT_ROWS = 8  # of a table in TensorBoard, which shows it as text
MARK = "tracker.json"  # in a stage's folder: what its run is called in the tracker
WAITING = 1_000  # calls that wait for a tracker, before it is left alone
PATIENCE = 20.0  # seconds for a tracker to catch up at a stage's end; W&B has as many to begin
UPLOADS = 600.0  # the same where adapters are uploaded; W&B tries no longer at the end of the process


@dataclass(frozen=True)
class Session:
    """What a tracker is told of one of its runs."""

    run_dir: Path  # the tracker's own files are kept inside
    group: str
    job: str  # the stage, or `report`
    name: str
    config: dict[str, Any]  # recipe, base, args (of the trainer) and round
    id: str  # of the run in the tracker
    step: int | None = None  # of the checkpoint from which an earlier attempt goes on; None: it begins anew
    beside: bool = False  # another run of the tracker is open meanwhile, and stays open


class Tracker:
    """A tracker's run. This one, of `tracker=none`, keeps nothing."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.step = 0  # of what was logged last

    def point(self, logs: Mapping[str, float], step: int) -> None:
        """Add a point to the curve of each metric that a trainer logs."""
        self.step = step
        self.log({grouped(name): value for name, value in logs.items()}, step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Add values under their names."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show rows of the same columns."""

    def summarize(self, values: Mapping[str, float]) -> None:
        """Keep numbers that hold for the whole stage."""

    def upload(self, name: str, kind: str, files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        """Keep a version of files under a name, as an artifact."""

    def finish(self, failed: bool = False) -> None:
        """End the run."""


class _Library(Tracker):
    """What wandb and trackio share, because trackio has wandb's interface."""

    library: Any  # the module
    run: Any  # what its `init` returned

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = list(rows[0])
        cells = [[json.dumps(x) if isinstance(x, list) else x for x in row.values()] for row in rows]
        self.log({name: self.library.Table(columns=columns, data=cells)}, step)

    def upload(self, name: str, kind: str, files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        # Both allow letters, digits, dots, dashes and underscores in a name.
        artifact = self.library.Artifact(re.sub(r"[^A-Za-z0-9._-]", "-", name), type=kind, metadata=dict(metadata))
        for file in files:
            artifact.add_file(str(file), name=file.name)
        self.run.log_artifact(artifact)


class WandbTracker(_Library):
    """Weights & Biases; its project is the environment's WANDB_PROJECT."""

    def __init__(self, session: Session) -> None:
        import wandb

        super().__init__(session)
        os.environ.setdefault("WANDB_SILENT", "true")
        self.library = wandb
        start = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", "rlhf-recipes"),
            group=session.group,
            job_type=session.job,
            name=session.name,
            id=session.id,
            dir=session.run_dir,
            config=session.config,
            resume="allow",  # offline each attempt has files of its own, which `wandb sync` joins by their id
            reinit="create_new" if session.beside else "finish_previous",
            settings={
                "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", PATIENCE)),
                "finish_timeout": float(os.environ.get("WANDB_FINISH_TIMEOUT", UPLOADS)),
            },
        )
        try:
            self.run = start(mode=wandb_mode())
        except wandb.errors.UsageError as error:
            raise Misconfigured(f"tracker=wandb: {error}") from error
        except Exception as error:
            os.environ["WANDB_MODE"] = "offline"  # of what follows in this process, too: it would wait as long again
            self.run = start(mode="offline", id=f"{session.id}-{secrets.token_hex(2)}")  # wandb holds the first
            later = f"`wandb sync {session.run_dir}/wandb/offline-run-*` sends it later"
            _say(f"W&B cannot be reached ({_line(error)}). The run goes on, and tracks offline: {later}.")
        self.run.define_metric(STEP, hidden=True)
        self.run.define_metric("*", step_metric=STEP)
        for name in PEAKS:
            self.run.define_metric(name, step_metric=STEP, summary="max,last")
        for name in CLOCKS:
            self.run.define_metric(name, step_metric=STEP, hidden=True)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        # Not W&B's own step, which grows with each call of `wandb.log`: what a user logs would displace it.
        self.run.log({**values, STEP: step})

    def summarize(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def finish(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


def wandb_mode() -> Any:
    """`mode` of `wandb.init`: WANDB_MODE where it is set, else offline where no key is found.

    A run must never stop to ask for one.
    """
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        key = os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(host)
    except (OSError, ValueError, netrc.NetrcParseError):  # none, or one that others can read, or a damaged one
        key = None
    return os.environ.get("WANDB_MODE") or ("online" if key else "offline")


def _remarks_to_stderr() -> redirect_stdout:
    """A block in which trackio may say where it keeps a run: standard output is for results."""
    return redirect_stdout(sys.stderr)


class TrackioTracker(_Library):
    """trackio, on this machine or where its TRACKIO_SPACE_ID says; the project is the environment's TRACKIO_PROJECT."""

    def __init__(self, session: Session) -> None:
        import trackio

        super().__init__(session)
        self.library = trackio
        # A context of its own has no current run, so that no other is finished.
        context = contextvars.Context() if session.beside else contextvars.copy_context()
        start = functools.partial(
            trackio.init,
            project=os.environ.get("TRACKIO_PROJECT", "rlhf-recipes"),
            group=session.group,
            name=session.name,
            config=session.config,
            resume="never" if session.step is None else "allow",  # by the name
            embed=False,  # no dashboard in a notebook for each stage
        )
        with _remarks_to_stderr():
            self.run = context.run(start) if session.beside else start()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.run.log(dict(values), step=step)

    def summarize(self, values: Mapping[str, float]) -> None:
        self.log(values, self.step)  # trackio has no summary but a run's last values

    def finish(self, failed: bool = False) -> None:
        with _remarks_to_stderr():
            self.run.finish()


class TensorBoardTracker(Tracker):
    """TensorBoard's event files in `<run folder>/tensorboard/<stage>`."""

    def __init__(self, session: Session) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(session)
        folder = session.run_dir / "tensorboard" / session.job
        # What an earlier attempt wrote after its last checkpoint is not shown: it comes again.
        self.writer = SummaryWriter(str(folder), purge_step=0 if session.step is None else session.step + 1)
        self.writer.add_text("config", _code(json.dumps(session.config, indent=2, default=str)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        shown = [[_cell(value) for value in row.values()] for row in rows[:TEXT_ROWS]]
        lines = [[*rows[0]], ["---"] * len(rows[0]), *shown]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def summarize(self, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = flat_values(self.session.config["recipe"])
        plain = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        # What `add_hparams` writes; it would write it to a second file, and TensorBoard may read that one first.
        for part in hparams(plain, dict(values)):
            self.writer.file_writer.add_summary(part)
        self.log(values, self.step)

    def finish(self, failed: bool = False) -> None:
        self.writer.close()


def _code(text: str) -> str:
    """Text as a block of code in Markdown."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _cell(value: Any) -> str:
    """A value as Markdown that shows it as it is, in one line: nothing that a model says is markup or HTML."""
    if isinstance(value, bool | int | float):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", " ".join(str(value).split()))


class Misconfigured(ValueError):
    """A tracker refuses its settings, which a user can mend."""


class Patient(Tracker):
    """A tracker's run in a thread of its own, so that training neither waits for it nor fails with it.

    Calls keep their order. After the first that fails, which is said, the run is only finished.
    """

    def __init__(self, run: Tracker) -> None:
        super().__init__(run.session)
        self.run, self.lost, self.patience = run, False, PATIENCE
        self.calls: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self.thread.start()

    def point(self, logs: Mapping[str, float], step: int) -> None:
        self._call("point", dict(logs), step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._call("log", dict(values), step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._call("table", name, list(rows), step)

    def summarize(self, values: Mapping[str, float]) -> None:
        self._call("summarize", values)

    def upload(self, name: str, kind: str, files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        self.patience = UPLOADS
        self._call("upload", name, kind, files, metadata)

    def finish(self, failed: bool = False) -> None:
        self._call("finish", failed)
        self.thread.join(self.patience)
        if self.thread.is_alive():
            self._lose(f"is still busy after {self.patience:.0f} seconds")

    def _call(self, name: str, *args: Any) -> None:
        self.calls.put((name, args))
        if self.calls.qsize() > WAITING:
            self._lose(f"is too slow ({WAITING:,} calls wait)")

    def _work(self) -> None:
        """Make the calls, until the one that finishes the run."""
        name = ""
        while name != "finish":
            name, args = self.calls.get()
            if not self.lost or name == "finish":
                try:
                    getattr(self.run, name)(*args)
                except Exception as error:
                    self._lose(f"has failed ({_line(error)})")

    def _lose(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            _say(f"The tracker of {_place(self.session)} {why}. The run goes on without it.")


def _place(session: Session) -> str:
    """What a session tracks, and where its rows are."""
    return f"{session.job}, whose rows are in {session.run_dir / 'metrics.jsonl'},"


def _say(words: str) -> None:
    print(printable(f"warning: {words}"), file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorBoardTracker,
    "none": Tracker,
}


def check_tracker(recipe: Recipe) -> None:
    """Raises ValueError where the tracker is not installed, or cannot keep the artifacts that are asked for."""
    if recipe.tracker != "none" and importlib.util.find_spec(recipe.tracker) is None:
        raise ValueError(f"tracker={recipe.tracker} needs a package: pip install 'rlhf_recipes[trackers]'.")
    if recipe.artifacts and not issubclass(TRACKERS[recipe.tracker], _Library):
        raise ValueError(f"artifacts needs a tracker that keeps files, wandb or trackio, and not {recipe.tracker}.")


def session_id(folder: Path, tracker: str, resumed: bool) -> tuple[str, bool]:
    """The id of a stage's run in the tracker, and whether it is that of an earlier attempt, which goes on.

    Args:
        folder: the stage's, where the id is kept.
        resumed: whether the stage goes on from a checkpoint; one that begins anew has a run of its own.
    """
    mark = folder / MARK
    goes_on = resumed and mark.is_file()
    run_id = json.loads(mark.read_text())["id"] if goes_on else secrets.token_hex(4)
    if tracker != "none":
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"id": run_id})
    return run_id, goes_on


@contextmanager
def tracked_run(tracker: str, session: Session) -> Iterator[Tracker]:
    """A run of a tracker of `TRACKERS`, which ends with the block, as failed where an exception ends it."""
    run = _begin(tracker, session)
    try:
        yield run
    except BaseException:
        run.finish(failed=True)
        raise
    run.finish()


def _begin(tracker: str, session: Session) -> Tracker:
    """A run of a tracker that training does not wait for; one that keeps nothing where the tracker fails to begin.

    Raises ValueError where a user can mend that.
    """
    if tracker == "none":
        return Tracker(session)
    try:
        return Patient(TRACKERS[tracker](session))
    except Misconfigured:
        raise
    except Exception as error:
        _say(f"The tracker of {_place(session)} does not begin ({_line(error)}). The run goes on without it.")
        return Tracker(session)


def grouped(name: str) -> str:
    """A metric's name with its group before the first slash."""
    if name.startswith("eval_"):
        return "eval/" + name.removeprefix("eval_")
    return name if "/" in name else f"train/{name}"


def result_numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers in a stage's results, by names like `results/models/ppo/gold`, without those of the reward card."""
    named = flat_values({"results": {key: value for key, value in results.items() if key != "card"}})
    return {name: value for name, value in named.items() if isinstance(value, int | float)}


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: `{"a": {"b": 1}}` becomes `{"a/b": 1}`. `prefix` goes before each key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flat_values(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def upload_adapters(tracker: Tracker, folder: Path, run_dir: Path, metadata: Mapping[str, Any]) -> None:
    """Keep each adapter in a stage's folder, but for those of checkpoints, as an artifact of type `model`.

    Args:
        run_dir: the run's own folder, from which on an artifact is named.
        metadata: what is known of the adapters: stage, round, base, results.
    """
    for config in sorted(folder.rglob("adapter_config.json")):
        place = config.parent.relative_to(run_dir)
        if not any(part.startswith("checkpoint-") for part in place.parts):
            files = sorted(path for path in config.parent.iterdir() if path.is_file() and path.name != MARK)
            tracker.upload("-".join((run_dir.name, *place.parts)), "model", files, metadata)


def upload_report(recipe: Recipe, run_dir: Path) -> None:
    """Keep the run's report, its recipe and its results as an artifact, in a run `report` of the group."""
    files = [run_dir / name for name in FILES if (run_dir / name).is_file()]
    name = f"{run_dir.name}-report"
    session = Session(run_dir, run_dir.name, "report", name, {"recipe": to_dict(recipe)}, secrets.token_hex(4))
    with tracked_run(recipe.tracker, session) as tracker:
        tracker.upload(name, "report", files, {})
