"""Runs in several processes: what they come to, who writes, and what is said where one of them fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.worded import make_recipe, weights

from rlhf_recipes import Recipe, main, replace, run
from rlhf_recipes.cli.launch import end_after_failure
from rlhf_recipes.cli.ray_workers import ProcessFailed, work
from rlhf_recipes.model.processes import rank
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.recipe.values import DPOStage


def deadly(prompts: list[Any], completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """A reward for short answers. In the process and at the update that the environment names, this is its end.

    With ENDS_ONCE, a folder to be made, only once.
    """
    if os.environ.get("ENDS_AT") == f"{rank()} {getattr(trainer_state, 'global_step', None)}" and is_first():
        if os.environ["ENDS_BY"] == "worker":
            os.kill(os.getppid(), signal.SIGKILL)  # Ray's, whose process this is
            time.sleep(60)
        if os.environ["ENDS_BY"] == "signal":
            os.kill(os.getppid(), signal.SIGTERM)  # the launcher
            time.sleep(2)
            return [-float(len(text)) for text in completions]
        if os.environ["ENDS_BY"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"memory": torch.OutOfMemoryError("CUDA out of memory."), "error": KeyError("no such key")}[
            os.environ["ENDS_BY"]
        ]
    return [-float(len(text)) for text in completions]


def is_first() -> bool:
    folder = os.environ.get("ENDS_ONCE")
    if folder is not None and Path(folder).is_dir():
        return False
    if folder is not None:
        Path(folder).mkdir()
    return True


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """All four stages; batches that two and three processes can share, of which the last of an epoch is a part."""
    folder = tmp_path_factory.mktemp("data")
    made = make_recipe(folder)
    sgd = {"per_device_train_batch_size": 6, "learning_rate": 0.1, "optim": "sgd"}
    stage = {**sgd, "max_steps": -1, "num_train_epochs": 1, "logging_steps": 1}
    ppo = {**sgd, "total_episodes": 60, "save_total_limit": 3}
    dpo = DPOStage(f"{folder}/pairs.jsonl", heldout=0.1, args={**stage, "response_length": 8})
    made = replace(made, sft=stage, reward={**stage, "judge_share": 0.2}, ppo=ppo, rounds=None, dpo=dpo)
    return replace(made, ppo={"reward_funcs": ("reward", f"{__file__}:deadly")})


def start(
    recipe: Recipe, folder: Path, processes: int, how: str = "--processes", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python recipe.py --processes N`, a run of the recipe into a folder."""
    file = folder.with_suffix(".py")
    file.write_text(
        "import json\nfrom rlhf_recipes import main\nfrom rlhf_recipes.recipe.overrides import from_dict\n"
        f"recipe = from_dict(json.loads({json.dumps(to_dict(recipe))!r}))\n"
        "if __name__ == '__main__':\n    main(recipe)\n"
    )
    command = [sys.executable, str(file), "--run-dir", str(folder), *how.split(), str(processes)]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=400)


def check_same(one: Path, other: Path) -> None:
    """The same files; adapters to 1e-5 of their scale, and results and logs to rounding."""
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (one, other)]
    assert files[0] == files[1]
    for path in files[0]:
        if path.name == "adapter_model.safetensors":
            first, second = weights((one / path).parent), weights((other / path).parent)
            for name, expected in first.items():
                assert (second[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), (path, name)
    manifests = [json.loads((folder / "manifest.json").read_text())["stages"] for folder in (one, other)]
    for stage, record in manifests[0].items():
        numbers, same = (flat(found["results"]) for found in (record, manifests[1][stage]))
        assert same == pytest.approx(numbers, rel=1e-3, abs=1e-3), stage
    for row, expected in zip(*([*map(json.loads, (f / "metrics.jsonl").open())] for f in (other, one)), strict=True):
        assert row.keys() - {"processes/summed_mib"} == expected.keys() and row["stage"] == expected["stage"]
        shown = {key: value for key, value in flat(expected).items() if not key.startswith(OTHERS)}
        assert {key: flat(row)[key] for key in shown} == pytest.approx(shown, rel=1e-3, abs=1e-4)


OTHERS = ("time/", "tokens_per_second", "memory/", "train_", "eval_runtime", "eval_s", "total_flos", "val/clipfrac")


def flat(values: Any) -> dict[str, float]:
    if isinstance(values, dict):
        return {f"{key}{name}": x for key, value in values.items() for name, x in flat(value).items()}
    return {"": values} if isinstance(values, int | float) else {}


@pytest.mark.long
@pytest.mark.parametrize(("processes", "split"), [(2, None), (3, None), (2, "shards"), (3, "shards")])
def test_all_stages_come_to_the_same_in_several_processes(
    recipe: Recipe, tmp_path: Path, processes: int, split: str | None
) -> None:
    done = start(replace(recipe, base={"split": split}), tmp_path / "several", processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder:") == 1 and done.stderr.count("ppo:   0%") == 1
    run(recipe, tmp_path / "one")
    check_same(tmp_path / "one", tmp_path / "several")


@pytest.mark.long
def test_a_run_that_lost_a_process_goes_on_with_another_number_of_them(recipe: Recipe, tmp_path: Path) -> None:
    recipe, folder = replace(recipe, dpo=None), tmp_path / "several"
    for processes, ends_at, how, says in (
        (2, "1 1", "kill", "error: process 1 of 2: Signal 9 (SIGKILL) received"),
        (3, "2 2", "error", "error: process 2 of 3: KeyError: 'no such key'"),
        (2, "1 3", "memory", "error: process 1 of 2: ppo ran out of memory"),
    ):
        begun = time.monotonic()
        done = start(recipe, folder, processes, ENDS_AT=ends_at, ENDS_BY=how)
        assert done.returncode == (2 if how == "memory" else 1), done.stderr
        assert says in done.stderr and done.stderr.count("error: ") == 1, done.stderr
        checkpoints = [path.stat().st_mtime for path in (folder / "ppo").glob("checkpoint-*")]
        assert len(checkpoints) == int(ends_at[-1])
        assert time.time() - max(checkpoints) < 30 < 400 - (time.monotonic() - begun)
    done = start(recipe, folder, 2, ENDS_AT="0 3", ENDS_BY="signal")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.count("stopped; run the same command again to resume") == 1 and "error" not in done.stderr
    assert (folder / "ppo" / "checkpoint-4").is_dir() and not (folder / "ppo" / "checkpoint-5").is_dir()
    run(recipe, folder)
    run(recipe, tmp_path / "one")
    check_same(tmp_path / "one", folder)


@pytest.mark.long
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'rlhf_recipes[ray]'")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="Ray gives each worker a core of its own")
def test_ray_workers_come_to_the_same_and_go_on_without_what_they_lose(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(recipe, dpo=None, ppo={"total_episodes": 36})
    run(recipe, tmp_path / "one")
    for lost in ("kill", "worker"):
        once, folder = tmp_path / f"{lost} once", tmp_path / lost
        done = start(recipe, folder, 2, "--ray local --workers", ENDS_AT="1 1", ENDS_BY=lost, ENDS_ONCE=str(once))
        assert done.returncode == 0, done.stderr
        assert once.is_dir() and done.stderr.count("of 2 was lost; the run goes on from its last checkpoint") == 1
        check_same(tmp_path / "one", folder)
    failed = start(recipe, tmp_path / "failed", 2, "--ray local --workers", ENDS_AT="1 1", ENDS_BY="error")
    assert failed.returncode == 1 and "was lost" not in failed.stderr, failed.stderr
    assert "error: process 1 of 2: KeyError: 'no such key'" in failed.stderr


def test_a_worker_that_does_not_see_the_run_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessFailed) as failed:
        work({"mark": str(tmp_path / "elsewhere" / "mark")})
    _, written = failed.value.args
    with pytest.raises(SystemExit, match="2"):
        end_after_failure(1, 2, written, "", failed.value)
    said = capsys.readouterr().err
    assert re.search("error: process 1 of 2: .* does not see .*elsewhere: --run-dir must be on storage that all", said)


def test_what_a_failed_process_says_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("ValueError", "KeyError"):
        written = {"message": f"{kind}: no file \x1b[2J", "extraInfo": {"py_callstack": "in \x1b[2J\n"}}
        with pytest.raises(SystemExit):
            end_after_failure(0, 2, written, "", ValueError())
        assert "\x1b" not in capsys.readouterr().err


def test_what_is_told_wrong_about_workers_is_refused(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [(["--ray", "local"], "--ray needs --workers"), (["--ray", "x", "--processes", "2"], "allowed")]
    for words, said in (*wrong, (["--workers", "2"], "--workers is of --ray")):
        with pytest.raises(SystemExit):
            main(recipe, words)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_engines_that_would_share_nothing_are_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{engine} is set.* no memory.*--processes"):
        check_recipe(recipe)


def test_a_batch_that_cannot_be_shared_is_refused_with_sizes_that_can(recipe: Recipe, tmp_path: Path) -> None:
    from rlhf_recipes.stages.configure import check_shares, configure

    config = configure(recipe, tmp_path)["sft"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="4 processes share it: set 4 or 8"):
        patch.setattr("rlhf_recipes.stages.configure.count", lambda: 4)
        check_shares("sft", config)
