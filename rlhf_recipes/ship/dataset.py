"""What people and models judged for a run, as a dataset that others can train on, without the names of people."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from ..data.read import READERS, file_kind, read
from ..feedback.rows import Row, read_labels
from ..recipe.overrides import to_dict
from ..recipe.values import Recipe, Source
from ..records.files import write_text
from ..records.trust import is_own
from .markdown import fenced, plain, table, without_folders

FILE = "labels.jsonl"
# What goes along; other columns may hold anything. The names say what `rlhf_recipes.feedback` and TRL call so.
COLUMNS = {
    "id": "of the sample: several judgements of one share it",
    "prompt": "text or messages",
    "responses": "text or messages each",
    "ranking": "a rank for each response, 1 for the best; equal ranks are a tie",
    "preferences": "of pairs in their order, the probability that the first is better, where a model gave it",
    "weight": "how much the judgement counts in training",
    "labeler": "a number for each person, the name of a model or function",
    "order": "the responses' numbers in the order in which they were shown",
    "seconds": "that the judgement took",
    "flag": "whether something was wrong with the sample",
    "origins": "which model of the run gave each response, at which temperature",
    "source": "where the prompt is from",
    "part": "the file of the run: round-2, samples, ...",
}
NAMED = {"note": "what the labeler wrote", "time": "of the judgement"}  # only with the labelers' names


def find_labels(run_dir: Path, recipe: Recipe) -> dict[str, Path]:
    """The files of labels of a run, by the names of its parts: its own, its rounds', and those that it trained on.

    Of a run that is not the user's own only files in its folder are taken.

    Raises ValueError where it has none.
    """
    rounds = [(path.parents[1].name, path) for path in sorted(run_dir.glob("round-*/feedback/labels.jsonl"))]
    own = [(path.name.split(".")[0], path) for path in sorted(run_dir.glob("feedback/*labels.jsonl"))]
    given = [Path(source.data) for source in (recipe.reward, recipe.dpo) if source is not None]
    if not is_own(run_dir, to_dict(recipe)):  # a stranger's recipe may name any file of this machine
        given = [path for path in given if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(run_dir))]
    trained = [(path.name.split(".")[0], path) for path in given if _holds_labels(path)]
    found: dict[str, Path] = {}
    for name, path in [*own, *rounds, *trained]:
        if path.resolve() not in map(Path.resolve, found.values()):
            found[name if name not in found else f"{name}-{len(found)}"] = path
    if not found:
        raise ValueError(
            f"{run_dir}: nobody has judged anything for this run, and its recipe trains on no file of labels (of a run "
            "that you did not make here, none in its folder), so that there is no `data` to push."
        )
    return found


def _holds_labels(path: Path) -> bool:
    """Whether a file's first row is a ranking by somebody with a name."""
    if not path.is_file() or file_kind(path) not in READERS:
        return False
    _, row = next(read("push", Source(str(path))), (0, None))
    return isinstance(row, dict) and {"ranking", "labeler"} <= row.keys()


def public_labels(files: dict[str, Path], labelers: bool) -> list[Row]:
    """The labels of some files as they go along: with `COLUMNS` alone, all rows with the same.

    Args:
        files: of `find_labels`.
        labelers: with the names of people, when they judged and what they noted.
    """
    rows = [{**row, "part": part} for part, path in files.items() for row in read_labels([path])]
    names = {} if labelers else _numbered([row["labeler"] for row in rows])
    wanted = COLUMNS | NAMED if labelers else COLUMNS
    columns = [name for name in wanted if any(row.get(name) is not None for row in rows)]
    return [
        {name: row.get(name) for name in columns}
        | {"labeler": names.get(row["labeler"]) or without_folders(row["labeler"])}
        for row in rows
    ]


def write_dataset(rows: Sequence[Row], card: DatasetCard, folder: Path) -> None:
    """Write labels and their card into a folder."""
    write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
    card.save(folder / "README.md")


def is_person(labeler: str) -> bool:
    """Whether a labeler is a person: models and functions have a colon in their names, which people's cannot."""
    return ":" not in labeler


def _numbered(labelers: Sequence[str]) -> dict[str, str]:
    """A number for each person, in the order in which they first stand."""
    people = dict.fromkeys(filter(is_person, labelers))
    return {name: f"person-{number}" for number, name in enumerate(people, 1)}


def dataset_card(repo_id: str, run: str, rows: Sequence[Row], labelers: bool) -> DatasetCard:
    """The card of labels, from the labels alone.

    Args:
        run: its name.
        rows: as they are in the file.
    """
    people = {row["labeler"] for row in rows if is_person(row["labeler"])}
    machines = {row["labeler"] for row in rows} - people
    data = DatasetCardData(
        annotations_creators=None if people else ["machine-generated"],
        pretty_name=repo_id.rpartition("/")[2],
        tags=["rlhf", "preference", "rlhf_recipes"],
    )
    counts = Counter((row["part"], row["labeler"]) for row in rows)
    prompts = len({json.dumps(row["prompt"]) for row in rows})
    shown = [[name, what] for name, what in (COLUMNS | NAMED).items() if name in rows[0]]
    by = [f"{len(people)} {'people' if len(people) > 1 else 'person'}"] * bool(people)
    by += [f"{len(machines)} {'models or functions' if len(machines) > 1 else 'model or function'}"] * bool(machines)
    hidden = "" if labelers or not people else " Their names, notes and times are left out."
    paragraphs = [
        f"# {plain(repo_id.rpartition('/')[2])}",
        f"{len(rows):,} rankings of responses to {prompts:,} prompts, given by {' and '.join(by)} for the run "
        f"{plain(run)} of rlhf_recipes.{hidden}",
        table(["part", "labeler", "rankings"], [[*key, f"{n:,}"] for key, n in counts.items()], {2}),
        "## Columns",
        table(["column", ""], shown),
        "## Use it",
        fenced(f"rlhf-recipes run RECIPE reward.data={repo_id}", "bash"),
        fenced(f'from datasets import load_dataset\n\nlabels = load_dataset("{repo_id}", split="train")', "python"),
        "## Limits",
        "How far labelers agree is not measured here, nor whether they are right. Responses are what models answered, "
        "and may be false or offensive. No licence is stated here: that of the prompts' source holds.",
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(paragraphs) + "\n")
