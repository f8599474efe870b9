"""The command line: what it prints, its exit codes, and that an installed wheel has it all."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from support.command_line import error_of
from support.paths import ROOT
from support.tiny_models import save_model

from rlhf_recipes import __version__, load, replace
from rlhf_recipes.cli.command import exit_codes
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.cli.notify import notifying
from rlhf_recipes.cli.run import main
from rlhf_recipes.recipe.arguments import objection
from rlhf_recipes.recipe.lookup import recipe_names
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.records.progress import PROGRESS
from rlhf_recipes.stages.configure import CONFIGS


def command(*words: str, cwd: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run Python on `words` in a process of its own, which imports the package from `path`."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_page_of_options_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["options"])
    printed = capsys.readouterr().out
    assert printed == (ROOT / "recipes" / "OPTIONS.md").read_text(), "rlhf-recipes options > recipes/OPTIONS.md"
    listed, section = {}, ""
    for line in printed.splitlines():
        section = line.split("`")[1] if line.startswith("## `") else section
        if line.startswith("| `"):
            listed.setdefault(section, set()).add(line.split("`")[1])
    for stage, config in CONFIGS.items():
        mine = {name for name in config.__annotations__ if objection(stage, name) is None}
        assert mine and mine <= listed[stage]
        assert not [name for name in listed[stage] if objection(stage, name)], "a refused option is not listed"
    main_cli(["options", "reward", "lora"])
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("## ")][1] == "## `lora`"
    assert "Did you mean reward?" in error_of(capsys, ["options", "rewards"])


def test_list_has_a_line_for_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    line = next(line for line in lines if line.startswith("mistral-7b-hh"))
    assert "mistralai/Mistral-7B-v0.3" in line and "sft,reward,ppo" in line and "one consumer GPU" in line


def test_an_error_does_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "\x1b[2J\x9b31m\u202e"
    said = error_of(capsys, ["chat", str(folder)])
    assert r"\x1b[2J\x9b31m\u202e is no run folder" in said and said.rstrip("\n").isprintable()


def test_a_run_folder_that_is_shown_does_nothing_to_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**to_dict(load("tiny")), "name": "\x1b[2J"}))
    for words in (["show", str(tmp_path)], ["show", "tiny", "--diff", str(tmp_path)]):
        main_cli(words)
        said = capsys.readouterr().out
        assert r"\x1b[2J" in said and said.replace("\n", "").isprintable()


def test_show_prints_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["show", "mistral-7b-hh"])
    lines = capsys.readouterr().out.splitlines()
    assert {"base.quantization=nf4", "ppo.kl_coef=0.05", "lora.r=16", "gold=None"} <= set(lines)


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["show", "mistral_7b_hh", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(to_dict(load("mistral-7b-hh"))))


def test_show_tells_where_two_recipes_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["show", "smollm2-hh", "--diff", "smollm2-sentiment"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["smollm2-hh", "smollm2-sentiment"]
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["reward.max_length"] == ["256", "104"] and rows["sft"] == ["None", "set"]
    assert "ppo.kl_coef" not in rows and "sft.data" not in rows, "one has no such section"
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(replace(load("tiny"), seed=7, gold="os:abort"))))
    main_cli(["show", str(tmp_path), "--diff", "tiny"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["gold", "os:abort"], ["seed", "7"]], "a run folder's, whoever made it"
    main_cli(["show", "tiny", "--diff", "tiny"])
    assert capsys.readouterr().out == "They are the same.\n"
    assert "leave out --json" in error_of(capsys, ["show", "tiny", "--diff", "tiny", "--json"])


def test_show_applies_and_checks_settings(capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["show", "mistral-7b-hh", "ppo.kl_coef=0.1", "--json", "seed=4"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["ppo"]["args"]["kl_coef"], shown["seed"]) == (0.1, 4)
    assert "ppo.kl_coeff" in (line := error_of(capsys, ["show", "mistral-7b-hh", "ppo.kl_coeff=0.1"]))
    assert "Did you mean kl_coef?" in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run", "tinny"], "no recipe 'tinny'"),
        (["run", "absent.py"], "no file absent.py"),
        (["run", "mistral-7b-hh", "ppo"], "'ppo' is not a setting"),
        (["run", "mistral-7b-hh", "--stages", "foo"], "has no stage 'foo'"),
        (["run", "mistral-7b-hh", "--stages=sft,rewards"], "has no stage 'rewards'. Did you mean reward?"),
        (["run", "mistral-7b-hh", "--run-dir", "somewhere", "seed=x"], "seed must be int"),
        (["run", "mistral-7b-hh", "ppo.kl_coeff=0.1"], "Did you mean kl_coef?"),
        (["show", "mistral-7b-hh", "ppo.output_dir=x"], "--run-dir"),
    ],
)
def test_a_users_error_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    assert part in error_of(capsys, words)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["lst"], "invalid choice: 'lst'"),
        ([], "usage: rlhf-recipes"),
        (["list", "more"], "unrecognized arguments: more"),
        (["run", "mistral-7b-hh", "--rundir", "x"], "unrecognized arguments: --rundir"),
    ],
)
def test_unknown_words_get_the_usage(capsys: pytest.CaptureFixture[str], words: list[str], part: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main_cli(words)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert part in error and "usage: rlhf-recipes" in error


def test_an_interrupted_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(SystemExit) as exit:
        main_cli(["run", str(tmp_path / "mine.py")])
    assert exit.value.code == 130
    assert capsys.readouterr().err == "stopped; run the same command again to resume\n"


def test_other_exceptions_keep_their_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        main_cli(["run", str(tmp_path / "mine.py")])


def test_a_recipe_file_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(load("mistral-7b-hh"), ["ppo.kl_coef=0.1", "--stages", "foo", "seed=1"])
    assert exit.value.code == 2 and "no stage 'foo'" in capsys.readouterr().err
    ran = command("recipes/mistral_7b_hh.py", "ppo.kl_coeff=0.1")
    assert (ran.returncode, ran.stderr) == (2, "error: There is no key ppo.kl_coeff. Did you mean kl_coef?\n")
    assert "key=value" in command("recipes/mistral_7b_hh.py", "--help").stdout


@pytest.mark.parametrize("words", [["list"], ["show", "mistral-7b-hh"], ["--help"]])
def test_what_needs_no_torch_imports_none(words: list[str]) -> None:
    start = time.perf_counter()
    ran = command("-X", "importtime", "-m", "rlhf_recipes.cli", *words)
    seconds = time.perf_counter() - start
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert ran.returncode == 0 and "rlhf_recipes.recipe" in imported
    assert not imported & {"torch", "trl", "transformers", "numpy"}
    assert seconds < 2  # measured 0.05 s; the margin is for a busy machine


def test_a_whole_run_prints_nothing_on_standard_error_but_its_bars(tmp_path: Path) -> None:
    # All four stages, with the settings of tiny-rloo and tiny-dpo, on a random model, which knows not a word of their
    # world: what it learns is not looked at.
    (tmp_path / "whole.py").write_text(
        "from rlhf_recipes import load, replace\n"
        "small = {'limit': 200, 'response_length': 8, 'heldout_limit': 8}\n"
        "ppo = {**small, 'total_episodes': 128, 'eval_on_start': False}\n"
        "recipe = replace(load('tiny-rloo'), name='whole', tracker='none', reward={'limit': 128}, ppo=ppo,\n"
        "    sft={'limit': 64, 'num_train_epochs': 1}, dpo=replace(load('tiny-dpo'), dpo=small).dpo)\n"
    )
    base, folder = save_model(tmp_path / "base"), tmp_path / "run"
    words = ["run", str(tmp_path / "whole.py"), f"base.model={base}", "--run-dir", str(folder)]
    ran = command("-m", "rlhf_recipes.cli", *words)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in re.split(r"[\r\n]+", ran.stderr) if line.strip()]
    assert [line for line in lines if not re.match(r"[\w, ]+: +\d+%\|", line)] == []
    assert {line.partition(":")[0].partition(",")[0] for line in lines} >= {"sft", "reward", "ppo", "dpo"}
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["gold_score"]) == {"base", "sft", "ppo", "dpo"} and summary["win_rate_vs_sft"]["prompts"] == 8


def test_an_installed_wheel_has_the_command_and_the_recipes(tmp_path: Path) -> None:
    clone, site = tmp_path / "clone", tmp_path / "site"
    for part in ("rlhf_recipes", "recipes"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, clone)
    built = command("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), cwd=clone)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"rlhf_recipes-{__version__}-py3-none-any.whl"

    sources = {str(path.relative_to(clone)) for path in (clone / "rlhf_recipes").rglob("*") if path.is_file()}
    sources |= {f"rlhf_recipes/{path.relative_to(clone)}" for path in (clone / "recipes").rglob("*") if path.is_file()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == sources

    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    assert command(*pip, cwd=tmp_path).returncode == 0
    script = str(site / "bin" / "rlhf-recipes")
    listed = command(script, "list", cwd=tmp_path, path=site)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == recipe_names(), listed.stderr
    for name in recipe_names():
        assert f"name={name}" in command(script, "show", name, cwd=tmp_path, path=site).stdout
    where = command(
        "-c",
        "from rlhf_recipes.recipe.lookup import recipe_file; print(recipe_file('mistral-7b-hh'))",
        cwd=tmp_path,
        path=site,
    )
    assert Path(where.stdout.strip()) == site / "rlhf_recipes" / "recipes" / "mistral_7b_hh.py"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--stop-at", "noon"], "argument --stop-at: 'noon' is neither like 07:30 nor like 2026-03-31T07:30"),
        (["--max-hours", "inf"], "argument --max-hours: 'inf' is no number of hours above 0"),
        (["--max-hours", "-1"], "argument --max-hours: '-1' is no number of hours above 0"),
        (["--max-hours", "many"], "argument --max-hours: 'many' is no number of hours above 0"),
        (["--max-hours", "1", "--stop-at", "07:30"], "not allowed with argument"),
        (["--processes", "0"], "argument --processes"),
    ],
)
def test_a_wrong_end_of_a_run_is_named(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_cli(["run", "tiny", *words])
    assert ended.value.code == 2 and part in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["label", ""], "argument SAMPLES: an empty path"),
        (["label", "samples.jsonl", "--labels", ""], "argument --labels: an empty path"),
        (["report", "a\0b"], "argument RUN: a path with a NUL in it"),
        (["run", "tiny", "--run-dir="], "argument --run-dir: an empty path"),
        (["sample", "tiny", "--out", "x.jsonl", "--limit", "-1"], "argument --limit"),
        (["sample", "tiny", "--out", "x.jsonl", "--response-length", "0"], "argument --response-length"),
        (["sample", "tiny", "--out", "x.jsonl", "--batch-size", "0"], "argument --batch-size"),
    ],
)
def test_a_path_or_number_that_is_none_is_named(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main_cli(words)
    assert ended.value.code == 2 and part in capsys.readouterr().err.splitlines()[-1]
    if words[0] == "run":
        with pytest.raises(SystemExit):
            main(load("tiny"), words[2:])
        assert part in capsys.readouterr().err.splitlines()[-1], "as a recipe's own file, too"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["check", ""], "data is empty: name a file"),
        (["check", "/"], "'/' is no local file or function"),
        (["check", "x.jsonl", "--rows", "-1"], "--rows (-1) and --refused (20) must not be negative"),
        (["agreement", "x.jsonl", "--fast", "nan"], "--fast must be a number of seconds that is not negative, not nan"),
        (["chat", "x", "--temperature", "nan"], "--temperature must not be below 0 (nan), nor be infinite"),
        (["evaluate", "x", "--temperature", "inf"], "--temperature must be above 0, not inf"),
        (["critique", "x", "--model", "y", "--temperature", "-1"], "--temperature must be a number that is not neg"),
        (["critique", "x", "--model", "y", "--price-in", "nan"], "--max-cost (in rounds as rounds.price_in) must be"),
        (
            ["critique", "x", "--model", "y", "--price-in", "1", "--max-cost", "inf"],
            "must not be negative: 1.0, 0.0, inf",
        ),
        (["serve", "x", "--port", "99999999"], "--port must be at most 65535"),
        (["serve", "x", "--engine-options", "'"], "are no words of a shell: No closing quotation"),
    ],
)
def test_what_no_command_can_work_with_is_named(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in error_of(capsys, words)


def test_the_end_of_a_run_is_a_time_of_the_day_a_day_or_so_many_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[datetime] = []
    monkeypatch.setattr("rlhf_recipes.pipeline.run.run", lambda *args, stop_at, **options: asked.append(stop_at))
    for words in (["--stop-at", "07:30"], ["--stop-at", "2126-03-31T07:30"], ["--max-hours", "0.5"]):
        main_cli(["run", "tiny", *words])
    now = datetime.now().astimezone()
    assert now < asked[0] <= now + timedelta(days=1) and (asked[0].hour, asked[0].minute) == (7, 30)
    assert (asked[1].year, asked[1].month, asked[1].day, asked[1].hour) == (2126, 3, 31, 7)
    assert timedelta(minutes=29) < asked[2] - now <= timedelta(minutes=30)


def test_a_command_is_told_how_and_where_a_run_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = tmp_path / "said"
    command = f'echo "$RUN_STATE $RUN_DIR $RUN_ERROR" >> {said}'
    with notifying(command, Path("runs/a")):
        pass
    with pytest.raises(KeyboardInterrupt), notifying(command, Path("runs/b")):
        raise KeyboardInterrupt
    with notifying(None, Path("runs/c")):
        pass
    with pytest.raises(ValueError, match="absent"), notifying(command, tmp_path / "run"):
        raise ValueError("sft.data: there is no file\n  absent.jsonl.")
    assert "no stage 'foo'" in error_of(capsys, ["run", "tiny", "--stages", "foo", "--notify", command])
    lines = said.read_text().splitlines()
    assert lines[:2] == ["done runs/a ", "stopped runs/b "] and len(lines) == 4
    assert lines[2] == f"failed {tmp_path / 'run'} sft.data: there is no file absent.jsonl."
    assert lines[3].startswith("failed runs/tiny Recipe 'tiny' has no stage"), lines


@pytest.mark.parametrize("message", ["a\0b", "\ud800", "ü" * 300_000])
def test_an_error_that_no_variable_can_hold_is_the_runs_own(message: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError) as failed,
        notifying('test -n "$RUN_ERROR" && touch ' + shlex.quote(str(tmp_path / "told")), tmp_path),
    ):
        raise ValueError(message)
    assert str(failed.value) == message and (tmp_path / "told").exists()


def test_a_command_is_told_once_when_a_run_is_silent_for_longer_than_ever(tmp_path: Path) -> None:
    said, step = tmp_path / "said", tmp_path / "low-kl" / PROGRESS  # of a sweep's variant

    def lines() -> list[str]:
        return said.read_text().split() if said.is_file() else []

    def log() -> None:
        step.write_text("{}")
        os.utime(step, ns=(next(times), next(times)))

    times = itertools.count(time.time_ns())
    step.parent.mkdir()
    log()
    with notifying(f'echo "$RUN_STATE" >> {said}', tmp_path, look=0.005, silent=0.05):
        time.sleep(0.2)
        assert not lines(), "it has not begun"
        for silences in (1, 2):
            log()
            while len(lines()) < silences:
                time.sleep(0.005)
            time.sleep(0.03)
    assert lines() == ["stuck", "stuck", "done"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlhf-recipes are", ["arena"]),
        ("rlhf-recipes run smollm2-h", ["smollm2-hh"]),
        ("rlhf-recipes run tiny ppo.kl_h", ["ppo.kl_horizon="]),
        ("rlhf-recipes plan tiny base.quant", ["base.quantization="]),
        ("rlhf-recipes show tiny ppo.total_", ["ppo.total_episodes="]),
    ],
)
def test_a_shell_is_offered_commands_recipes_and_settings(line: str, offered: list[str], tmp_path: Path) -> None:
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked["_ARGCOMPLETE_STDOUT_FILENAME"] = str(tmp_path / "offered")
    subprocess.run([sys.executable, "-m", "rlhf_recipes"], env=os.environ | asked, check=True)
    assert (tmp_path / "offered").read_text().split() == offered


def test_what_no_bound_stops_says_that_memory_ran_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_codes():
        raise MemoryError
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: memory ran out. Take less at once, or a machine with more of it.\n"
