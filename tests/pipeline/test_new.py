"""A recipe made from three files of somebody's own: what is chosen, why, and that it runs."""

import ast
import csv
import errno
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page
from support.command_line import error_of
from support.label_page import done, press, serving, shown
from support.tiny_models import save_model
from support.worded import WORDS

from rlhf_recipes import Base, Recipe, Stage, load
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.pipeline.new import Wanted, choose_base, choose_length, choose_ppo, choose_training, render, warnings
from rlhf_recipes.plan.cards import Card


def write(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path.name


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Three CSV files with column names of their own, and a tiny random model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    asked = [f"{one} {WORDS[-1 - index]}" for index, one in enumerate(WORDS[:50])]
    return {
        "--sft": write(tmp_path / "answers.csv", [{"question": a, "reply": "w5 w6 w7"} for a in asked]),
        "--reward": write(
            tmp_path / "choices.csv",
            [
                {"question": a, "better": "w5 w6 w7", "worse": "w8 w9 w10"[: 2 + 3 * (n % 3)]}
                for n, a in enumerate(asked)
            ],
        ),
        "--prompts": write(tmp_path / "questions.csv", [{"question": a} for a in asked]),
    }


def words_of(files: dict[str, str], *more: str) -> list[str]:
    return ["new", "mine", "--base", "base", *(word for pair in files.items() for word in pair), *more]


def failing(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def commands_in(printed: str) -> list[list[str]]:
    """The commands that are printed to be typed next."""
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  rlhf-recipes")]


@pytest.mark.long  # a notebook goes the same way
def test_from_three_files_to_what_people_say_by_the_commands_that_are_printed(
    files: dict[str, str],
    opened: Callable[[str, str], Page],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main_cli(words_of(files, "--yes", "--gpu", "8GiB"))
    printed = capsys.readouterr().out
    assert "choices.csv: 'question' is the prompt, 'better' is the chosen, 'worse' is the rejected." in printed
    assert "warning: choices.csv: 50 comparisons are few" in printed
    assert "the better response is the longer one in 68%" in printed
    assert re.search(r"warning: questions.csv: 4\d prompts are few", printed)
    text = Path("mine.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= 40
    assert all("  # " in line for line in lines if line.startswith("        ")), "each choice has its reason"
    recipe = load("./mine.py")
    assert recipe.reward is not None and recipe.ppo is not None and recipe.sft is not None
    assert recipe.base.quantization is None and recipe.base.chat_template == "transcript", "it has none of its own"
    assert recipe.ppo.args["mini_batch_size"] * recipe.ppo.args["num_mini_batches"] == 32, "of 44 prompts"
    assert recipe.reward.columns == {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert recipe.sft.chat and recipe.reward.chat and recipe.ppo.chat, "questions and answers are turns"
    assert "questions.csv: plain text, taken as turns of a conversation (chat=True)." in printed
    assert recipe.reward.args["per_device_train_batch_size"] * recipe.reward.args["gradient_accumulation_steps"] == 8
    commands = commands_in(printed)
    assert [words[0] for words in commands] == ["check", "check", "check", "run"]
    main_cli(commands[0])
    capsys.readouterr()
    main_cli([*commands[-1], "ppo.total_episodes=64", "ppo.save_steps=1", "ppo.eval_strategy=no"])
    assert Path("runs/mine/summary.json").is_file()

    commands = commands_in(capsys.readouterr().out)
    assert [words[0] for words in commands] == ["evaluate", "arena"]
    judged = []

    def likes_the_first(samples: Path, labels: Path, **options: Any) -> None:
        with serving(samples, labels) as link:
            page = opened(link, "Ann")
            for count in range(1, 1 + len(samples.read_text().splitlines())):
                judged.append(shown(page))
                press(page, "1 Enter")
                done(page, count)

    monkeypatch.setattr("rlhf_recipes.evaluate.arena.serve_label_page", likes_the_first)
    main_cli(commands[1])
    printed = capsys.readouterr().out
    assert judged and re.search(r"people +\d", printed), "a win rate by people"
    (report,) = commands_in(printed)
    main_cli(report)
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "judged by people" in page
    assert "is there already, and is not written over" in error_of(capsys, words_of(files))


def test_no_name_of_a_file_or_folder_becomes_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ['x""";open("mark","w");""".jsonl', 'base\\";open("mark","w")\n"']
    recipe = Recipe("mine", Base(names[1]), sft=Stage(names[0]))
    text = render(Wanted("mine", names[1], {"sft": names[0]}), recipe, "small", {"sft": []})
    Path("mine.py").write_text(text)
    assert load("mine.py") == recipe
    assert ast.get_docstring(ast.parse(text), clean=False).startswith(
        f"Never run at its own size: {names[0]} on {names[1]}, for this machine."
    )
    assert not Path("mark").exists()


def test_what_was_guessed_is_asked_about(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    words = ["new", "mine", "--base", "base", "--sft", files["--sft"]]
    with pytest.raises(SystemExit):
        main_cli(words)
    assert "--columns reward.prompt=... and so on" in capsys.readouterr().err and not Path("mine.py").exists()
    words += ["--columns", "sft.prompt=reply", "sft.completion=question"]  # nothing is left to ask
    with monkeypatch.context() as full:
        full.setattr("os.fsync", failing)
        with pytest.raises(SystemExit):
            main_cli(words)
    assert "the disk is full: make room" in capsys.readouterr().err and not Path("mine.py").exists()
    main_cli(words)
    assert 'columns={"prompt": "reply", "completion": "question"}' in Path("mine.py").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new", "1st", "--base", "base", "--sft", "answers.csv"], "is no name for a recipe"),
        (["new", "mine", "--base", "base"], "--sft DATA, --reward DATA or both"),
        (["new", "mine", "--base", "base", "--prompts", "questions.csv"], "add --reward DATA"),
        (["new", "mine", "--base", "base", "--sft", "answers.csv", "--columns", "prompt=x"], "write reward.chosen="),
        (["new", "mine", "--base", "base", "--sft", "answers.csv", "--columns", "stf.prompt=x"], "Did you mean sft?"),
        (["new", "mine", "--base", "nowhere/at-all", "--sft", "answers.csv"], "base.model=nowhere/at-all"),
        (["new", "mine", "--base", "base", "--sft", "numbers.csv"], "This stage takes"),
    ],
)
def test_what_cannot_be_is_said(
    files: dict[str, str], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("numbers.csv"), [{"one": "1", "two": "2"}])
    with pytest.raises(SystemExit) as exit:
        main_cli(words)
    assert exit.value.code == 2 and said in capsys.readouterr().err and not Path("mine.py").exists()


# --- The rules --------------------------------------------------------------------------------------------------------


def report(rows: int, **lengths: int) -> dict[str, Any]:
    """What `examine` says of rows whose lengths are all alike."""
    return {"train": rows, "lengths": {name: {"95 %": length} for name, length in lengths.items()}}


@pytest.mark.parametrize(
    ("stage", "rows", "epochs"),
    [("sft", 500, 3), ("sft", 5_000, 2), ("sft", 50_000, 1), ("reward", 500, 3), ("reward", 5_000, 1)],
)
def test_few_rows_are_seen_more_often(stage: str, rows: int, epochs: int) -> None:
    choices = choose_training(stage, report(rows, whole=100), 4096)
    settings = {key: value for choice in choices for key, value in choice.settings.items()}
    assert settings["num_train_epochs"] == epochs and settings["max_length"] == 128


def test_the_base_is_quantized_where_it_must_be_and_has_a_template(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    wanted = Wanted("mine", str(tmp_path / "base"), {}, card=Card("tiny", 1e-6))
    base, why = choose_base(wanted)
    assert (base.quantization, base.chat_template) == ("nf4", "transcript") and "no chat template of its own" in why
    base, _ = choose_base(replace(wanted, card=Card("rtx4090", 23.5)))
    assert base.quantization is None


def test_lengths_hold_95_in_100_rows_and_fit_the_context() -> None:
    assert choose_length([{"95 %": 97}], 32, 4096) == (128, "95 % have at most 97 tokens")
    assert choose_length([{"95 %": 5000}], 32, 2048) == (
        2048,
        "95 % have at most 5,000 tokens, the model at most 2,048",
    )
    reports = {"reward": report(5_000, chosen=300, whole=700), "ppo": report(4_000, prompt=900)}
    settings = {key: value for choice in choose_ppo(reports, 1024) for key, value in choice.settings.items()}
    assert (settings["response_length"], settings["max_prompt_length"]) == (304, 720)
    assert settings["total_episodes"] == 6_400, "100 updates of 64 at most"
    assert settings["mini_batch_size"] * settings["num_mini_batches"] == 64


def test_thin_and_wrong_data_are_named() -> None:
    whole: dict[str, Any] = {
        "source": "pairs.csv", "rows": 900, "used": 800, "train": 700, "problems": ["No row is held out."],
        "dropped": {"empty": 70, "too long": 30}, "duplicates": {"rows": 200}, "pairs": {"longer": 70, "shorter": 30},
        "opposed": [{"source": "helpful", "rate": 0.7}, {"source": "harmless", "rate": 0.2}],
    }  # fmt: skip
    said = list(warnings("reward", whole))
    assert [line.removeprefix("pairs.csv: ")[:24] for line in said] == [
        "No row is held out.",
        "100 of 900 rows cannot b",
        "200 of 800 rows are ther",
        "in helpful (in 70%) the ",
        "800 comparisons are few;",
        "the better response is t",
    ]
    fine = {
        **whole,
        "opposed": [],
        "used": 6_000,
        "problems": [],
        "dropped": {},
        "pairs": {"longer": 60, "shorter": 40},
    }
    assert not list(warnings("reward", fine))
