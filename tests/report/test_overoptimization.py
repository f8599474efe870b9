"""Curves of reward and quality over KL: what is read of a run, the fit, the panels, and the shipped experiment."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small import small
from support.worded import write

from rlhf_recipes import Recipe, load, replace, run
from rlhf_recipes.pipeline.variants import expand
from rlhf_recipes.report.overoptimization import Fit, RunCurve, fit_curve, panels, read_curve, write_for_sweep


def curve(alpha: float, beta: float) -> RunCurve:
    """A curve whose quality is exactly of Gao's form, and whose proxy is a straight line."""
    kl = [0.0, 0.25, 1.0, 4.0, 9.0, 16.0]
    distance = [math.sqrt(value) for value in kl]
    quality = [d * (alpha - beta * math.log(d)) if d else 0.0 for d in distance]
    return RunCurve("gold", list(range(6)), kl, [2 * d for d in distance], quality)


# --- The fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.3, 0.0), (-0.2, 0.7)])
def test_points_of_known_alpha_and_beta_give_them_back(alpha: float, beta: float) -> None:
    made = curve(alpha, beta)
    found = fit_curve(made.distance, made.quality)
    assert found is not None
    assert (found.alpha, found.beta, found.r2) == pytest.approx((alpha, beta, 1.0), abs=1e-9)


def test_a_fit_by_hand() -> None:
    # At d = 1 the logarithm is 0, so alpha = 1; at d = e it is 1, so e (alpha - beta) = 0 and beta = 1. The peak is at
    # e^(1/1 - 1) = 1, where R is 1.
    found = fit_curve([0.0, 1.0, 1.0, math.e], [0.0, 1.0, 1.0, 0.0])
    assert found is not None and (found.alpha, found.beta, found.peak) == pytest.approx((1.0, 1.0, 1.0))
    # Two points at d = 1 that are 1 from their mean: alpha is the mean, and the form explains nothing of them.
    flat = fit_curve([1.0, 1.0, math.e], [1.0, 3.0, 2 * math.e])
    assert flat is not None and (flat.alpha, flat.beta) == pytest.approx((2.0, 0.0), abs=1e-12)
    assert flat.r2 == pytest.approx(1 - 2 / np.var([1, 3, 2 * math.e]) / 3)


def test_the_peak_is_where_the_fit_is_flat_and_highest() -> None:
    found = Fit(0.9, 0.4, 1.0)
    assert found.peak is not None
    below, at, above = found(found.peak + np.array([-1e-4, 0.0, 1e-4]))
    assert at > max(below, above) and abs(above - below) < 1e-8
    assert at == pytest.approx(0.4 * found.peak), "R(d*) = beta d*"
    assert all(Fit(0.9, beta, 1.0).peak is None for beta in (0.0, -0.1, 1e-9)), "it only rises"


def test_two_points_are_no_curve() -> None:
    assert fit_curve([0.0, 0.5, 1.0], [0.0, 1.0, 1.0]) is None


# --- A run's curve ----------------------------------------------------------------------------------------------------


def write_run(folder: Path, first: int = 0, judge: str = "gold") -> Path:
    """Two held-out evaluations, of two answers each."""
    rows, samples = [{"stage": "reward", "step": 10, "eval_loss": 1.0}], []
    for step, kl, score, quality in ((first, -0.01, 1.0, 4.0), (first + 5, 4.0, 2.0, 3.0)):
        rows.append({"stage": "ppo", "step": step, "objective/kl": kl})
        rows.append({"stage": "ppo", "step": step, "eval_kl": kl, "eval_score": score, f"eval_{judge}": quality})
        for sign in (-1, 1):
            sample = {"stage": "ppo", "step": step, "model": "ppo", "score": score + sign * 0.5}
            samples.append({**sample, judge: quality + sign * 2})
    write(folder / "metrics.jsonl", rows)
    write(folder / "samples.jsonl", samples)
    return folder


@pytest.mark.parametrize("judge", ["gold", "judge"])
def test_scores_are_relative_to_the_sft_models_in_its_standard_deviations(tmp_path: Path, judge: str) -> None:
    found = read_curve(write_run(tmp_path, judge=judge))
    assert found == RunCurve(judge, [0, 5], [-0.01, 4.0], [0.0, 1.0 / 0.5], [0.0, -1.0 / 2])
    assert found.distance == [0.0, 2.0]


def test_a_run_without_quality_or_without_its_start_has_no_curve(tmp_path: Path) -> None:
    assert read_curve(write_run(tmp_path / "late", first=5)) is None
    assert read_curve(write_run(tmp_path / "unknown", judge="taste")) is None
    assert read_curve(tmp_path / "absent") is None


# --- Panels -----------------------------------------------------------------------------------------------------------


def test_a_panel_has_the_runs_that_differ_in_one_setting() -> None:
    changes = {
        "middle": {},
        "again": {"seed": 1},
        "more": {"reward": {"limit": 2400}},
        "bound": {"ppo": {"kl_coef": 0.1}},
        "two": {"reward": {"ensemble_size": 2}, "ppo": {"gamma": 0.9}},
    }
    trunk = {"reward": {"limit": 600}, "ppo": {"kl_coef": 0.0}}
    recipes = expand(replace(load("tiny"), **trunk, variants=changes))
    curves = {name: curve(1.0, 0.5) for name in recipes}
    found = panels(recipes, curves)
    lines = [{line.label: line.runs for line in panel.lines} for panel in found]
    assert lines == [
        {"reward.limit=600": ["middle", "again"], "reward.limit=2400": ["more"]},
        {"ppo.kl_coef=0.0": ["middle", "again"], "ppo.kl_coef=0.1": ["bound"]},
        {"two": ["two"]},
    ]
    assert "ppo.kl_coef=0.0" in found[0].title and "reward.limit=600" in found[1].title
    assert found[0].lines[0].quality == fit_curve(2 * curves["middle"].distance, 2 * curves["middle"].quality)


# --- The shipped experiment -------------------------------------------------------------------------------------------


def test_the_shipped_experiment_varies_three_things_with_two_seeds() -> None:
    recipes = expand(load("overoptimization"))
    found = panels(recipes, {name: curve(1.0, 0.5) for name in recipes})
    assert [panel.lines[0].label.partition("=")[0] for panel in found] == [
        "reward.limit",
        "reward.ensemble_size",
        "ppo.kl_coef",
    ]
    assert all(len(panel.lines) == 3 and all(len(line.runs) == 2 for line in panel.lines) for panel in found)


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({"ppo": {"kl_coef": 0.1}}, ["ppo.kl_coef=0.0", "ppo.kl_coef=0.1"]),
        ({"reward": {"ensemble_size": 2}}, ["reward.ensemble_size=1", "reward.ensemble_size=2"]),
    ],
    ids=["kl_coef", "ensemble_size"],
)
def test_the_experiment_runs_whole_and_draws_its_curves(
    tmp_path: Path, change: dict[str, Any], labels: list[str]
) -> None:
    quick = {"num_mini_batches": 1, "per_device_train_batch_size": 32, "eval_on_start": True, "eval_steps": 1}
    recipe: Recipe = replace(
        small("overoptimization", reward=64, episodes=128),
        variants={"free": {}, "other": change},
        reward={"max_steps": 2},
        ppo=quick,
    )
    folder = tmp_path / "run"
    summary = run(recipe, folder)
    assert set(summary["variants"]) == set(recipe.variants)
    written = json.loads((folder / "overoptimization.json").read_text())
    assert written["quality"] == ["gold"] and set(written["curves"]) == set(recipe.variants)
    for name, found in written["curves"].items():
        assert found["steps"] == [0, 1, 2, 3, 4] and found["kl"][0] == pytest.approx(0, abs=1e-3)
        assert found["proxy"][0] == found["quality"][0] == 0
        at_end = summary["variants"][name]["models"]["ppo"]
        assert found["kl"][-1] == pytest.approx(at_end["kl"], rel=1e-4), "the last evaluation is of the final policy"
    (panel,) = written["panels"]
    assert [line["label"] for line in panel["lines"]] == labels
    assert all(math.isfinite(line["quality"]["alpha"]) and line["quality"]["r2"] <= 1 for line in panel["lines"])
    assert (folder / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    drawn = (folder / "overoptimization.svg").read_bytes()
    write_for_sweep(expand(recipe), folder)
    assert (folder / "overoptimization.svg").read_bytes() == drawn, "the same curves give the same file"
