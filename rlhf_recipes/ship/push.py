"""What of a run goes to which repository of the Hub: folders that `export` makes, and labels, each with its card.

They are made before anything is sent, in RUN/push, and stay there until all of it is up.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from huggingface_hub import RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..recipe.overrides import suggestion
from ..records.cache import cache_folder
from ..records.digest import digest
from ..records.files import check_links, writing_in
from ..records.folder import read_export, read_recipe
from ..report.gather import RunContents, gather
from .adapter import check_base_id, export_adapter, public_base
from .card import Shipped, draw_overoptimization, model_card
from .dataset import dataset_card, find_labels, public_labels, write_dataset
from .merged import export_merged
from .reward import check_classifier_exists, export_reward
from .trained import ExportSettings, find_trained

What = Literal["adapter", "merged", "reward", "data"]
WHAT: tuple[What, ...] = get_args(What)
EXPORTS = {"adapter": export_adapter, "merged": export_merged, "reward": export_reward}
STAGED = "push"  # in the run folder: exports that a push has made


@dataclass(frozen=True)
class PushSettings:
    """What of a run is pushed, and to whom."""

    what: Sequence[str] = ()  # of `What`; none: what `exported` holds, or else the adapter
    model: str | None = None  # the policy; None: the last that the run has
    base_id: str | None = None  # what others load the base by; None: as the recipe has it
    exported: Sequence[Path] = ()  # folders that `export` has made, which take the place of new ones
    public: bool = False
    labelers: bool = False  # the labelers' names go along
    samples: int = 3  # in a card


@dataclass(frozen=True)
class Push:
    """What goes into one repository."""

    what: What
    repo_id: str
    model: Shipped | None = None  # None: labels

    @property
    def repo_type(self) -> str:
        """As the Hub calls it."""
        return "model" if self.model is not None else "dataset"


def plan_pushes(run_dir: Path, repo_id: str, settings: PushSettings) -> list[Push]:
    """What goes where, found before anything is written or sent.

    The policy goes to `repo_id`, as adapter where one is asked for, else merged; all else to ORG/NAME-merged, -reward,
    -data, whatever is pushed along with it.

    Raises ValueError where something is not there, an export of it would be refused, or a name is none of the Hub's.
    """
    if settings.base_id is not None:
        _check_repo_id("--base-id", settings.base_id)
    exported = [_exported(run_dir, folder, settings) for folder in settings.exported]
    what, given = settings.what or [kind for kind, _ in exported] or ["adapter"], dict(exported)
    for name in what:
        if name not in WHAT:
            raise ValueError(f"--what: there is no {name!r}, but {', '.join(WHAT)}.{suggestion(name, WHAT)}")
    if len(set(what)) < len(what):
        raise ValueError(f"--what names the same twice: {', '.join(what)}.")
    if len(given) < len(exported) or not given.keys() <= set(what):
        kinds = ", ".join(kind for kind, _ in exported)
        raise ValueError(
            f"--exported: the folders hold {kinds}, and of each in --what ({', '.join(what)}) it takes one."
        )
    policy = "adapter" if "adapter" in what else "merged"
    pushes = []
    for name in filter(what.__contains__, WHAT):
        place = repo_id if name == policy else f"{repo_id}-{name}"
        _check_repo_id("ORG/NAME", place)
        if name == "data":
            find_labels(run_dir, read_recipe(run_dir))
            pushes.append(Push(name, place))
        else:
            model = given.get(name) or _to_export(run_dir, name, settings)
            pushes.append(Push(name, place, replace(model, repo_id=place)))
    return pushes


def _check_repo_id(option: str, repo_id: str) -> None:
    """Raises ValueError, naming the option, for what is no repository's name with its owner."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{option}: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{option}: {repo_id!r} names no owner, who stands in front of a slash.")


def _exported(run_dir: Path, folder: Path, settings: PushSettings) -> tuple[What, Shipped]:
    """A folder that `export` has made. Raises ValueError where it has not, or has of another model."""
    record = read_export(folder)
    if record is None or record["format"] not in EXPORTS:
        made = "holds no export.json" if record is None else f"is of --format {record['format']}"
        raise ValueError(f"--exported {folder} {made}: name a folder that `export` made as {', '.join(EXPORTS)}.")
    trained = find_trained(run_dir, record["model"])
    if trained.digest != record["adapter"]:
        raise ValueError(f"--exported {folder} was made of other weights than {record['model']} has in {run_dir}.")
    base_id = record.get("base_id") or public_base(trained, settings.base_id)
    what: What = "reward" if trained.scores else record["format"]
    return what, Shipped(record["format"], "", trained, base_id, folder)


def _to_export(run_dir: Path, what: Literal["adapter", "merged", "reward"], settings: PushSettings) -> Shipped:
    """A model that has to be exported first. Raises ValueError where that would be refused."""
    scores = what == "reward"
    trained = find_trained(run_dir, None if scores else settings.model, scores)
    base_id = check_base_id(trained, settings.base_id) if what == "adapter" else public_base(trained, settings.base_id)
    if scores:
        check_classifier_exists(trained)
    return Shipped(what, "", trained, base_id)


def cards(run_dir: Path, pushes: Sequence[Push], settings: PushSettings) -> Iterator[RepoCard]:
    """The cards, as far as they are known before the export."""
    run = gather([run_dir])[0]
    for push in pushes:
        if push.model is not None:
            yield model_card(run, push.model, settings.samples)
        else:
            rows = public_labels(find_labels(run_dir, run.recipe), settings.labelers)
            yield dataset_card(push.repo_id, run.name, rows, settings.labelers)


def stage_pushes(run_dir: Path, pushes: Sequence[Push], settings: PushSettings) -> list[tuple[Push, Path]]:
    """Make the folder of each repository, by `export` where that is not done, with its card.

    Raises ValueError as `export` does.
    """
    run, staged = gather([run_dir])[0], []
    with writing_in(run_dir):
        for push in pushes:
            folder = upload_folder(run_dir) / push.what
            if folder.exists():
                shutil.rmtree(folder)
            if push.model is not None:
                shipped = replace(push.model, folder=push.model.folder or _export(run_dir, push.model, settings))
                _stage_model(run, shipped, folder, settings.samples)
            else:
                folder.mkdir(parents=True)
                rows = public_labels(find_labels(run_dir, run.recipe), settings.labelers)
                write_dataset(rows, dataset_card(push.repo_id, run.name, rows, settings.labelers), folder)
            staged.append((push, folder))
    return staged


def upload_folder(run_dir: Path) -> Path:
    """Where links to what is uploaded are put: not in the run folder, which may have none that lead out of it."""
    return cache_folder() / "push" / digest(str(run_dir.resolve()))


def _export(run_dir: Path, model: Shipped, settings: PushSettings) -> Path:
    """The export of a model, which an earlier push may have made of the same weights."""
    name = model.trained.name
    folder = run_dir / STAGED / f"{model.format}-{digest(name, model.trained.digest, model.base_id)[:8]}"
    if not folder.exists():
        EXPORTS[model.format](run_dir, folder, ExportSettings(model=name, base_id=settings.base_id))
    return folder


def _stage_model(run: RunContents, shipped: Shipped, folder: Path, samples: int) -> None:
    """A folder of links to an export's files, so that it stays as it is, with the card and its picture."""
    assert shipped.folder is not None
    check_links(shipped.folder)  # what it leads to would be sent
    shutil.copytree(shipped.folder.absolute(), folder, copy_function=os.symlink)
    if shipped.stage == "ppo":
        draw_overoptimization(run, folder)
    model_card(run, shipped, samples).save(folder / "README.md")
