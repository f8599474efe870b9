"""Sweeps: what a variant is, what variants share, and whole runs on a tiny random model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from support.worded import make_recipe, read, same

from rlhf_recipes import Recipe, replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.model.processes import visible_gpus
from rlhf_recipes.pipeline.stage import run_stage
from rlhf_recipes.pipeline.variants import checked_variants, expand
from rlhf_recipes.pipeline.workers import Here
from rlhf_recipes.recipe.lookup import load, recipe_names
from rlhf_recipes.recipe.overrides import from_dict, parse_overrides, settings, to_dict
from rlhf_recipes.records.folder import read_recipe
from rlhf_recipes.records.lock import held
from rlhf_recipes.stages.job import Job
from rlhf_recipes.stages.stop import Stopped

VARIANTS: dict[str, dict[str, Any]] = {
    "free": {"ppo": {"kl_coef": 0.0}},
    "bound": {"ppo": {"kl_coef": 0.5}},
    "few": {"reward": {"limit": 20}},
}


def shorter(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    """True quality: short answers."""
    return [-float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe without variants, on a tiny random model, with held-out evaluations of reward and gold."""
    ppo = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "learning_rate": 0.02}
    made = make_recipe(tmp_path_factory.mktemp("sweep"))
    return replace(made, name="one", rounds=None, gold=f"{__file__}:shorter", ppo=ppo)


@pytest.fixture(scope="module")
def recipe(one: Recipe) -> Recipe:
    return replace(one, name="several", variants=VARIANTS)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole sweep."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, folder)
    return folder


def stages(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["stages"]


# --- What a variant is ------------------------------------------------------------------------------------------------


def test_a_variant_is_the_recipe_with_its_changes(one: Recipe, recipe: Recipe) -> None:
    found = expand(recipe)
    assert list(found) == list(VARIANTS) and expand(one) == {}
    for name, variant in found.items():
        assert variant == replace(one, **VARIANTS[name], name=f"several-{name}")


def test_variants_come_back_from_a_file_and_from_the_command_line(one: Recipe) -> None:
    changes = {"long": {"lora": {"target_modules": ("q_proj", "v_proj")}, "ppo": {"reward_funcs": ("reward",)}}}
    recipe = replace(one, variants=changes)
    for again in (
        from_dict(json.loads(json.dumps(to_dict(recipe)))),
        replace(one, **parse_overrides([line for line in settings(recipe) if line.startswith("variants=")])),
    ):
        assert expand(again) == expand(recipe)


@pytest.mark.parametrize(
    ("variants", "part"),
    [
        ({"../up": {}}, "'../up' names no variant"),
        ({"ppo": {}}, "'ppo' names no variant"),
        ({"a": 1}, "variants: a must be a dict of changes"),
        ({"a": {"name": "b"}}, "a cannot change 'name'"),
        ({"a": {"variants": {}}}, "a cannot change 'variants'"),
        ({"a": {}, "b": {"reward": {"limt": 2}}}, r"variants: b: There is no key reward.limt. Did you mean limit\?"),
        ({"a": {}, "b": {"ppo": {"kl_coef": -1.0}}}, "variants: b: ppo.kl_coef must be"),
        ({"a": {"pop": {}}}, r"variants: a: There is no key pop. Did you mean ppo\?"),
    ],
)
def test_a_wrong_variant_is_named_before_anything_runs(
    one: Recipe, tmp_path: Path, variants: dict[str, Any], part: str
) -> None:
    with pytest.raises(ValueError, match=part):
        run(replace(one, variants=variants), tmp_path / "run")
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_secret_that_every_variant_replaces_is_refused_too(one: Recipe) -> None:
    public = {"sft": {"data": "rlhf_recipes.worlds.tiny:demonstrations"}}
    for url in ("https://u:secret@example.com/x.jsonl", "zip://x.jsonl::https://u:secret@example.com/x.zip"):
        secret = replace(one, sft={"data": url}, variants={"a": public, "b": public})
        with pytest.raises(ValueError, match=r"sft\.data: .*is given with a name or password") as refused:
            checked_variants(secret)
        assert "u:secret" not in str(refused.value)


def test_jobs_are_of_variants(one: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no variants to run 2 of at once"):
        run(one, tmp_path / "run", jobs=2)
    with pytest.raises(ValueError, match="has no variants: `rlhf-recipes run --ray --workers` shares its work"):
        run(one, tmp_path / "run", ray="local")
    with pytest.raises(ValueError, match="--jobs must be above 0, not 0"):
        run(recipe, tmp_path / "run", jobs=0)


def test_each_of_the_variants_that_run_at_once_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("rlhf_recipes.pipeline.workers.visible_gpus", visible_gpus.__wrapped__)
    here = Here(3)
    assert [here.places.get()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["4", "6", "4"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus.__wrapped__() == []


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_what_variants_share_is_trained_once(finished: Path) -> None:
    copied = {
        name: {stage: record.get("copied_from") for stage, record in stages(finished / name).items()}
        for name in VARIANTS
    }
    assert copied == {
        "free": {"sft": None, "reward": None, "ppo": None},
        "bound": {"sft": "free", "reward": "free", "ppo": None},
        "few": {"sft": "free", "reward": None, "ppo": None},
    }
    for name, variant in expand(read_recipe(finished)).items():
        assert read_recipe(finished / name) == variant
        assert {row["stage"] for row in read(finished / name / "metrics.jsonl")} == {"sft", "reward", "ppo"}
    assert not same(finished / "free" / "ppo" / "policy", finished / "bound" / "ppo" / "policy")


def test_a_variant_comes_to_what_its_recipe_alone_comes_to(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    run(expand(recipe)["bound"], tmp_path / "run")
    for part in ("sft", "reward", "ppo/policy"):
        assert same(tmp_path / "run" / part, finished / "bound" / part)
    summary, ours = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "run", finished))
    assert ours["variants"]["bound"]["models"] == summary["models"]


def test_a_killed_sweep_goes_on_to_the_same_end(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_stage
    trained = []

    def killed(job: Job, *rest: Any) -> None:
        real(job, *rest)
        trained.append((job.run_dir.name, job.stage))
        if trained == [("free", "sft"), ("free", "reward"), ("free", "ppo"), ("bound", "ppo")]:
            raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_recipes.pipeline.stage.run_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    assert trained[4:] == [("few", "reward"), ("few", "ppo")]
    for name in VARIANTS:
        assert same(tmp_path / "run" / name / "ppo" / "policy", finished / name / "ppo" / "policy")
        rows = [(row["stage"], row["step"]) for row in read(tmp_path / "run" / name / "metrics.jsonl")]
        assert rows == [(row["stage"], row["step"]) for row in read(finished / name / "metrics.jsonl")]


def test_a_finished_sweep_takes_more_variants_and_trains_nothing_again(
    recipe: Recipe, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_stage
    trained = []
    monkeypatch.setattr(
        "rlhf_recipes.pipeline.stage.run_stage",
        lambda job, *rest: (trained.append((job.run_dir.name, job.stage)), real(job, *rest)),
    )
    before = (finished / "free" / "summary.json").stat().st_mtime_ns
    more = replace(recipe, variants={**VARIANTS, "freer": {"ppo": {"kl_coef": 0.01}}})
    assert list(run(more, finished)["variants"]) == [*VARIANTS, "freer"]
    assert trained == [("freer", "ppo")]
    assert (finished / "free" / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"variants: free: .* holds a run of another recipe"):
        run(replace(recipe, seed=1), finished)


def test_what_a_variant_shares_is_not_copied_into_a_folder_in_use(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "free", tmp_path / "free")
    under_way = tmp_path / "few" / "sft" / "checkpoint-1"
    under_way.mkdir(parents=True)
    two = replace(recipe, variants={name: VARIANTS[name] for name in ("free", "few")})
    with held(tmp_path / "few"), pytest.raises(ValueError, match=rf"{tmp_path / 'few'} is in use by process"):
        run(two, tmp_path, stages=["sft"])
    assert under_way.is_dir()


@pytest.fixture(params=["jobs", "ray"])
def at_once(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """How two variants run at once: in processes of this machine, or of a Ray cluster on it."""
    if request.param == "jobs":
        yield {"jobs": 2}
        return
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rlhf_recipes[ray]'")
    yield {"ray": "local", "jobs": 2}
    ray.shutdown()


@pytest.mark.long
def test_variants_run_at_once_in_processes_of_their_own(
    recipe: Recipe, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at_once: dict[str, Any]
) -> None:
    two = replace(recipe, variants={name: VARIANTS[name] for name in ("free", "bound")})
    run(two, tmp_path / "run", **at_once)
    printed = capsys.readouterr().out
    assert "free: sft done" in printed or "bound: sft done" in printed
    assert re.search(r"2 variants, .* minutes in all; reward and quality over KL", " ".join(printed.split()))
    assert "2 runs compared" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for name in two.variants:
        assert same(tmp_path / "run" / name / "ppo" / "policy", finished / name / "ppo" / "policy")
        assert "Run folder" in (tmp_path / "run" / name / "log.txt").read_text()
    records = [record for name in two.variants for record in stages(tmp_path / "run" / name).values()]
    assert len(records) == 6 and sum("copied_from" in record for record in records) == 2


def test_a_variant_that_fails_in_its_process_says_where_to_look(recipe: Recipe, tmp_path: Path) -> None:
    bad = replace(recipe, variants={"bad": {"sft": {"data": str(tmp_path / "absent.jsonl")}}})
    with pytest.raises(ValueError, match=r"variants: bad: sft failed, see .*log.txt: error: sft\.data: .*absent"):
        run(bad, tmp_path / "run", stages=["sft"], jobs=2)


@pytest.mark.long
def test_a_signal_stops_all_variants_behind_their_checkpoints(
    recipe: Recipe, tmp_path: Path, at_once: dict[str, Any]
) -> None:
    endless = {
        name: {"sft": {"max_steps": 10_000, "save_steps": 2, "limit": 30 + place}}
        for place, name in enumerate(("one", "other", "third"))
    }

    def signal_when_two_train() -> None:
        while len({path.parts[-3] for path in tmp_path.glob("*/sft/checkpoint-*")}) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=signal_when_two_train, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        run(replace(recipe, variants=endless), tmp_path, stages=["sft"], **at_once)
    assert stopped.value.code == 143
    logs = sorted(path.read_text() for path in tmp_path.glob("*/log.txt"))
    assert len(logs) == 2 and all("run the same command again to resume" in text for text in logs)


def test_the_process_of_a_variant_ends_with_its_parent() -> None:
    code = "from rlhf_recipes.cli.variant import end_with_parent; print('there', flush=True); end_with_parent()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"there\n" and process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=20) == 1


def test_a_folder_of_one_run_is_no_sweep(one: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    run(one, tmp_path / "run", stages=["sft"])
    with pytest.raises(ValueError, match="holds a run of a recipe without variants"):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", [name for name in recipe_names() if load(name).variants])
def test_every_sweep_has_curves_from_the_sft_model_on(name: str) -> None:
    for variant in expand(load(name)).values():
        assert variant.ppo is not None and variant.ppo.args["eval_on_start"] and variant.ppo.args["eval_steps"]


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_a_sweep_is_shown_planned_and_checked_like_any_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = next(name for name in recipe_names() if load(name).variants)
    main_cli(["show", name, "ppo.gamma=0.9"])
    assert "ppo.gamma=0.9" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main_cli(["show", name, "variants={'a': {'ppo': {'gama': 1}}}"])
    assert "error: variants: a: There is no key ppo.gama. Did you mean gamma?" in capsys.readouterr().err
