"""The files of a run without weights, as the report reads them."""

import json
from pathlib import Path
from typing import Any

from rlhf_recipes import Recipe, load, replace
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.records.rates import mean_rate
from rlhf_recipes.stages.reward.card import measure

UPDATES = 40
PROMPTS = [f"Question {index}" for index in range(30)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    folder: Path, recipe: Recipe | None = None, gain: float = 1.0, said: dict[int, str] | None = None
) -> Path:
    """The files of a run of `tiny`, without weights: PPO's score rises by `gain` over its updates, gold by half of it.

    Prompt n gets the answers `base n`, `sft n` and `ppo n`, or what `said` has for it. PPO's score is `gain` above the
    SFT model's in two of three prompts and below it in the third.
    """
    folder.mkdir(parents=True)
    recipe = recipe or replace(load("tiny"), tracker="none")
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    pairs = [
        {
            "chosen_score": 1.0,
            "rejected_score": n % 4 - 1.5,
            "chosen_length": 5 + n % 3,
            "rejected_length": 5,
            "token_difference": 0.0,
        }
        for n in range(40)
    ]
    card = measure(
        [{**row, "prompt": n, "source": "people", "swapped_difference": 0.0} for n, row in enumerate(pairs)], [], 36
    )
    metrics: list[dict[str, Any]] = [{"stage": "sft", "step": step, "loss": 1 / step} for step in (10, 20)]
    metrics += [{"stage": "reward", "step": step, "loss": 0.6, "accuracy": 0.7} for step in (10, 20)]
    samples = []
    for step in range(UPDATES + 1):
        far = gain * step / UPDATES
        if step % 10 == 0:
            held_out = {"eval_score": far, "eval_gold": far / 2, "eval_kl": far**2}
            metrics.append({"stage": "ppo", "step": step, **held_out})
        if step:
            metrics.append({"stage": "ppo", "step": step, **measured(far)})
    for model in ("base", "sft", "ppo"):
        for n, prompt in enumerate(PROMPTS):
            better = (gain if n % 3 else -gain) * (model == "ppo")
            text = (said or {}).get(n, f"{model} {n}")
            row = {"prompt": prompt, "completion": text, "response_length": n, "ended": n % 2 == 0, "kl": n / 10}
            samples.append(
                {"stage": "ppo", "step": UPDATES, "model": model, **row, "score": better, "gold": better / 2}
            )
    compared = {
        "models": {
            model: {"score": 0.0, "gold": 0.0, "kl": 0.0, "response_length": 14.5, "without_eos": 0.5}
            for model in ("base", "sft", "ppo")
        },
        "win_rate_vs_sft": mean_rate([1.0, 1.0, 0.0] * 10),
        "reward_win_rate_vs_sft": mean_rate([1.0, 1.0, 0.0] * 10),
    }
    results = {
        "sft": {"heldout_loss": 0.5, "heldout_token_accuracy": 0.8},
        "reward": {"heldout_accuracy": 0.75, "members_accuracy": [0.75], "heldout_loss": 0.6, "card": card},
        "ppo": compared,
    }
    data = {"source": "a file", "rows": 9, "train": 6, "heldout": 2, "dropped": {"too long": 1}}
    stages = {
        stage: {"state": "done", "seconds": 60.0, "peak_memory_mib": 2048.0, "data": data, "results": result}
        for stage, result in results.items()
    }
    manifest = {"stages": stages, "versions": {"torch": "2.13"}, "base": {"model": "m", "revision": None}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write(folder / "metrics.jsonl", metrics)
    write(folder / "samples.jsonl", samples)
    return folder


def measured(far: float) -> dict[str, float]:
    """What PPO logs of an update."""
    losses = {"loss/policy_avg": 0.1, "loss/value_avg": 0.2, "val/ratio": 1.0, "policy/clipfrac_avg": 0.1}
    losses |= {"val/first_pass_log_ratio_max": 0.0, "val/batching_noise": 0.05}
    state = {"policy/entropy_avg": 1.0, "val/explained_variance": 0.5, "response_length": 9.0, "without_eos": 0.0}
    return {"objective/scores": far, "objective/kl": 1.0, **losses, **state, "time/generate": 1.0, "time/score": 0.5}


def write_evaluation(folder: Path, judge: str = "judge") -> None:
    """`evaluation/evaluation.json` and its answers, as `rlhf-recipes evaluate` writes them."""
    rates = {"rate": 0.7, "low": 0.6, "high": 0.8}
    win = {"model": "ppo", "against": "sft", "ties": 0.1, "prompts": 99, **rates}
    behaviour = {"tokens": 12.5, "without_eos": 0.25, "distinct_1": 0.5, "refusals": 0.125, "kl": 3.25}
    of_model = {
        "means": {judge: 1.25, "reward": 2.5},
        "behaviour": behaviour,
        "perplexity": 14.2,
        "tasks": {"hellaswag": {"acc_norm": {"value": 0.413, "error": 0.012}}},
    }
    wins = [
        {**win, "judge": "reward", "rate": 0.9},
        {**win, "judge": judge, "length_controlled": {**rates, "rate": 0.55}},
    ]
    best = {"model": "ppo", "judge": judge, "words": "Best of all that was compared: PPO."}
    evaluation = {"models": {"sft": of_model, "ppo": of_model}, "wins": wins, "best": best, "warnings": ["Mind this."]}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    row = {"id": "p0", "prompt": [{"role": "user", "content": "Hello?"}], "tokens": 3, "ended": True, "kl": 0.5}
    answers = [{**row, "model": name, "completion": f"of {name}", "scores": {judge: 1.0}} for name in ("sft", "ppo")]
    write(folder / "evaluation" / "answers.jsonl", answers)
