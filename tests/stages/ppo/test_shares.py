"""PPO in several processes comes to what it comes to in one."""

from pathlib import Path

import pytest
import torch
from support import processes
from support.processes import CASES, launch, train_case
from support.tiny_models import save_model

OTHERS = ("time/", "tokens_per_second", "memory/", "auto/", "train_", "eval_runtime", "total_flos", "epoch")
OTHERS += ("val/clipfrac_avg",)  # on the first pass the clipped error is the error, but for rounding


def check_equal(folder: Path, names: list[str], count: int) -> None:
    """Train cases in one process and in several: weights to 1e-6 of their scale, and what is logged."""
    for run in ("one", "several"):
        (folder / run).mkdir(exist_ok=True)
        save_model(folder / run / "model")
    done = launch(count, [processes.__file__, folder / "several", *names])
    assert done.returncode == 0, done.stderr
    for name in names:
        train_case(name, folder / "one")
        one, several = (torch.load(folder / run / f"{name}.pt", weights_only=False) for run in ("one", "several"))
        for role, expected in one["weights"].items():
            error = (several["weights"][role] - expected).abs().max() / expected.abs().max()
            assert error < 1e-6, (name, role, error)
        for row, expected in zip(several["logs"], one["logs"], strict=True):
            assert row.keys() - {"processes/summed_mib"} == expected.keys()
            shown = {key: value for key, value in expected.items() if not key.startswith(OTHERS)}
            assert {key: row[key] for key in shown} == pytest.approx(shown, rel=1e-4, abs=1e-5), name


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    check_equal(tmp_path, ["rloo"], 2)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_every_estimator_and_critic_is_the_same_in_several_processes(tmp_path: Path, count: int) -> None:
    check_equal(tmp_path, list(CASES), count)
