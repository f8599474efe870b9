"""Finished reward adapters: their folders, their roles on a shared base, the probes that prove them, their scores.

N rows; L tokens of the longest one, prompt and response.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.prepare import Prepared
from ...model.batches import TOKENS_AT_ONCE, Batches
from ...model.processes import on_main
from ...model.sampler import autocast_of, pad_right
from ...model.shared import BIAS, SharedBase, read_bias
from ...records.files import WRITE_AGAIN, read_json, write_json
from ..job import Job
from .card import CARD
from .trainer import RewardTrainer

PROBES = "probe.json"  # rows and their scores at the end of training; written last, so that it marks a finished adapter

PROBE_ROWS = 8

HELDOUT = "heldout.json"  # the scores of all held-out responses at the end of training, row after row

JUDGE = "judge"  # the folder in the stage's and the role of an adapter that measures, and that no policy is trained on


def member_folders(run_dir: Path) -> dict[str, Path]:
    """The folders of a run's reward adapters by role: `reward`, and those that an ensemble has more."""
    others = sorted((run_dir / "reward").glob("member-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return {"reward": run_dir / "reward"} | {f"reward_{number}": folder for number, folder in enumerate(others, 1)}


def judge_folder(run_dir: Path) -> dict[str, Path]:
    """The folder of a run's judge by its role; nothing where the run has none."""
    folder = run_dir / "reward" / JUDGE
    return {JUDGE: folder} if (folder / PROBES).is_file() else {}


def add_reward_roles(shared: SharedBase, folders: dict[str, Path]) -> None:
    """Attach reward adapters by role, each with its head, and check that they score as in training.

    Raises ValueError as `check_probes` does, and where an adapter is of another base.
    """
    for role, folder in folders.items():
        shared.add_role(role, folder, head=True)
        check_probes(shared, folder, role)


def set_bias(shared: SharedBase, folder: Path, role: str, demonstrations: Prepared | None) -> list[float]:
    """Write the bias with which whole demonstrations score 0 on average, as InstructGPT's, and give it to the role.

    Returns the demonstrations' scores without it; none, and no bias, where there are no demonstrations.
    """
    ids = [] if demonstrations is None else demonstrations.heldout["input_ids"]
    whole = [row for row in ids if row[-1] == demonstrations.stop_token_id]  # not those that were cut
    if not whole:
        return []
    shared.biases[role] = 0.0  # a stage that was killed here has written one, and must find the same again
    scores = score_rows(shared, whole, role).tolist()
    shared.biases[role] = -sum(scores) / len(scores)
    found = {"bias": shared.biases[role], "demonstrations": len(scores)}
    on_main(lambda: write_json(folder / BIAS, found))
    return scores


def write_scores(trainer: RewardTrainer, job: Job) -> None:
    """Keep what the last evaluation said of the held-out responses beside the adapter.

    Some of them are its probes, with their ids: one response to each of the first rows.
    """
    rows, scores = job.reported["responses_ids"], torch.cat(trainer.evaluated).tolist()
    assert len(scores) == sum(map(len, rows))
    firsts = itertools.accumulate(map(len, rows), initial=0)  # where each row's scores begin
    probes = [(row[0], scores[first]) for row, first in zip(rows[:PROBE_ROWS], firsts, strict=False)]
    write_json(job.folder / HELDOUT, scores)
    write_json(job.folder / PROBES, {"input_ids": [ids for ids, _ in probes], "scores": [score for _, score in probes]})


def check_whole(folder: Path) -> None:
    """Raises ValueError where a reward adapter of a run lacks the bias of its scores, which training has measured."""
    places = [place for place in (folder, folder.parent) if (place / CARD).is_file()]  # of a member the stage's own
    if places and read_json(places[0] / CARD).get("demonstrations") is not None and read_bias(folder) is None:
        raise ValueError(f"{folder / BIAS} is missing: run the same recipe again, which writes it anew.")


def read_probes(folder: Path, vocabulary: int = 2**31) -> tuple[list[list[int]], Tensor]:
    """The N probe rows of a reward adapter, lists of token ids, and their scores (N,).

    Raises ValueError where the file is missing or damaged.
    """
    found: Any = read_json(folder / PROBES) or {}
    rows: Any = found.get("input_ids")
    scores: Any = found.get("scores")
    lists = isinstance(rows, list) and isinstance(scores, list) and all(isinstance(row, list) and row for row in rows)
    ids = lists and all(type(id) is int and 0 <= id < vocabulary for row in rows for id in row)
    numbers = lists and all(type(score) in (int, float) and abs(score) < 1e30 for score in scores)
    if not (ids and numbers and len(rows) == len(scores) > 0):
        raise ValueError(f"{folder / PROBES} is missing, or holds no rows with their scores. {WRITE_AGAIN}")
    return rows, torch.tensor(scores, dtype=torch.float32)


def check_probes(shared: SharedBase, folder: Path, role: str = "reward") -> None:
    """Score the probe rows with a role.

    Raises ValueError where they differ from what training wrote, and as `read_probes` does.
    """
    rows, trained = read_probes(folder, shared.vocabulary)
    scores = score_rows(shared, rows, role) - shared.biases.get(role, 0.0)  # (N,)
    if not (scores - trained).abs().max().item() < rounding(trained, shared.causal.dtype):
        raise ValueError(
            f"The reward model in {folder} scores its probe rows differently after loading: {scores.tolist()}, "
            f"in training {trained.tolist()}. Its adapter, its head or its base is not the one that was trained: "
            "put that back, or delete the folder and run the recipe again."
        )


def rounding(scores: Tensor, dtype: torch.dtype) -> float:
    """How far scores (N,) may be from those of training because a model in a dtype rounds."""
    # bfloat16 keeps 8 bits, float16 11, and the classifier rounds its score to them.
    share = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-3)
    return share * (1 + scores.abs().max().item())


@torch.no_grad()
def score_rows(
    shared: SharedBase, rows: Sequence[list[int]], role: str = "reward", batches: Batches | None = None
) -> Tensor:
    """A role's scores (N,), on the CPU, of N rows of token ids, each prompt + response + stop token.

    Args:
        batches: of how many rows; None: of 8.
    """
    scores = torch.zeros(len(rows))

    def work(batch: Tensor) -> None:
        ids, kept = pad_right([rows[row] for row in batch.tolist()], 0, shared.device)
        scores[batch] = shared.scores(ids, kept).cpu()

    with shared.role(role), autocast_of(shared):
        (batches or Batches(8)).run(torch.tensor([len(row) for row in rows]), work, TOKENS_AT_ONCE)
    return scores
