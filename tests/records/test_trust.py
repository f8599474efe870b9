"""What of a run folder may be obeyed: nothing that a stranger's recipe names but this package's own worlds."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.command_line import error_of, failed
from support.tiny_models import save_model

from rlhf_recipes import load, replace
from rlhf_recipes.cli.main import COMMANDS, main_cli
from rlhf_recipes.evaluate.judges import Asking, find_judge
from rlhf_recipes.feedback.judge import JudgeSettings
from rlhf_recipes.feedback.ledger import Prices
from rlhf_recipes.pipeline.check import check_rounds
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.recipe.values import Recipe
from rlhf_recipes.records.files import Journal
from rlhf_recipes.records.folder import read_recipe, recipe_to_show, write_recipe
from rlhf_recipes.records.trust import foreign_code, trusting
from rlhf_recipes.report.gather import gather
from rlhf_recipes.stages.scores import check_reward_source, external_base, reward_tokenizer


def stranger(folder: Path, recipe: Recipe) -> Path:
    """A run folder that somebody else has made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"gold": "their.py:gold"}, "gold=their.py:gold"),
        ({"gold": "os:system"}, "gold=os:system"),
        ({"gold": "rlhf_recipes.worlds_of_mine:gold"}, "gold=rlhf_recipes.worlds_of_mine:gold"),
        ({"base": {"model": "their.py:build"}}, "base.model=their.py:build"),
        # Files in folders, and beside them, that are called like what ships with this package.
        ({"gold": "rlhf_recipes.worlds.gift/my.py:gold"}, "gold=rlhf_recipes.worlds.gift/my.py:gold"),
        ({"gold": "rlhf_recipes.worlds.py:gold"}, "gold=rlhf_recipes.worlds.py:gold"),
        ({"base": {"model": "rlhf_recipes.worlds./my:build"}}, "base.model=rlhf_recipes.worlds./my:build"),
        ({"base": {"trust_remote_code": True}}, "base.trust_remote_code=True"),
        ({"base": {"attn_implementation": "their/kernel"}}, "base.attn_implementation=their/kernel"),
        ({"sft": {"data": "http://10.0.0.1/rows.jsonl"}}, "sft.data=http://10.0.0.1/rows.jsonl"),
        # A folder's README.md may name URLs, and files anywhere, which `datasets` would read.
        ({"ppo": {"data": "rows"}}, "ppo.data=rows"),
        ({"rounds": {"prompts": "rows"}}, "rounds.prompts=rows"),
        # The rows of a file, which may be any JSON, as a command: this one needs no file of code.
        ({"sft": {"data": "rows.jsonl", "convert": "subprocess:check_output"}}, "sft.convert=subprocess:check_output"),
        ({"ppo": {"reward_funcs": ("reward", "their.py:kind")}}, "ppo.reward_funcs=their.py:kind"),
        ({"rounds": {"labeler": "https://example.com/v1"}}, "rounds.labeler=https://example.com/v1"),
        ({"variants": {"a": {"gold": "their.py:gold"}}}, "variants.a.gold=their.py:gold"),
    ],
)
def test_a_strangers_recipe_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    recipe = replace(load("tiny-rounds"), **changes)
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = stranger(tmp_path / "theirs", recipe)
    assert foreign_code(to_dict(recipe)) == [named]
    with pytest.raises(ValueError, match="names code or servers") as refused:
        read_recipe(folder)
    assert named in str(refused.value) and "--trust-functions" in str(refused.value)
    assert recipe_to_show(folder) == recipe


@pytest.mark.parametrize("name", ["tiny", "tiny-rounds", "stories", "qwen3-0-6b-hh", "smollm2-sentiment"])
def test_what_ships_with_the_package_is_obeyed_from_any_folder(tmp_path: Path, name: str) -> None:
    recipe = load(name)
    assert read_recipe(stranger(tmp_path, recipe)) == recipe


def test_a_run_is_the_users_own_as_he_left_it_where_he_left_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(load("tiny"), gold="mine.py:gold")
    folder = tmp_path / "mine"
    folder.mkdir()
    write_recipe(folder, recipe)
    assert read_recipe(folder) == recipe
    with pytest.raises(ValueError, match="names code"):  # the copy may be a stranger's, with another mine.py
        read_recipe(shutil.copytree(folder, tmp_path / "copy"))
    stranger(folder, replace(recipe, gold="theirs\x1b[2J.py:gold"))
    with pytest.raises(ValueError, match=r"gold=theirs\\x1b\[2J\.py:gold"):
        read_recipe(folder)
    with trusting():
        assert read_recipe(folder).gold == "theirs\x1b[2J.py:gold"
    assert capsys.readouterr().err == f"Trusted in {folder}: gold=theirs\\x1b[2J.py:gold\n"
    with pytest.raises(ValueError, match="names code"):  # the word was for once
        read_recipe(folder)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("feedback/samples.jsonl", "../../home/.profile"),  # there is no such file: it would be made
        ("evaluation", "../home"),
        ("push/adapter-1a2b3c4d/notes.txt", "/etc/hostname"),
        (".lock", "../home/letter"),
    ],
)
def test_a_link_out_of_a_strangers_folder_is_refused(tmp_path: Path, link: str, target: str) -> None:
    folder = stranger(tmp_path / "theirs", load("tiny"))
    (folder / link).parent.mkdir(parents=True, exist_ok=True)
    (folder / "within").symlink_to("recipe.json")
    wandbs = folder / "wandb" / "offline-run-20261129_120930-8dtd5m48" / "logs"
    wandbs.mkdir(parents=True)
    (wandbs / "debug-core.log").symlink_to("/root/.cache/wandb/logs/core-debug-20261129_120930.log")
    whole = tmp_path / "linked"
    whole.symlink_to(folder)
    assert recipe_to_show(whole) == load("tiny")
    (folder / link).symlink_to(target)
    for path in (folder, whole):
        with pytest.raises(ValueError, match=f"{path / link} is a link that leads out of {path}: delete it"):
            recipe_to_show(path)
    write_recipe(folder, load("tiny"))  # by who runs it here: his links are his word
    assert read_recipe(folder) == load("tiny")


def test_no_row_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl is a link"):
        Journal(tmp_path / "rows.jsonl")


def test_every_command_that_refuses_takes_the_word_that_it_asks_for() -> None:
    for name in ("arena", "chat", "critique", "evaluate", "export", "judge", "push", "sample", "serve"):
        parser = argparse.ArgumentParser()
        COMMANDS[name].arguments(parser)
        assert "--trust-functions" in parser.format_help(), name


def test_nobody_is_asked_whether_a_models_code_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mark = tmp_path / "model", tmp_path / "mark"
    model.mkdir()
    theirs = {"AutoConfig": "code.Theirs", "AutoTokenizer": ["code.Theirs", None]}
    (model / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": theirs}))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Theirs", "auto_map": theirs}))
    (model / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Theirs: ...\n")
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    recipe = replace(load("tiny-rounds"), rounds={"labeler": str(model)})
    for read in (
        lambda: find_judge(str(model), tmp_path, recipe, Asking({}, JudgeSettings(), Prices())),
        lambda: check_reward_source(str(model), True),
        lambda: check_rounds(recipe),
        lambda: external_base(str(model)),
        lambda: reward_tokenizer(str(model)),
    ):
        with pytest.raises(ValueError, match="custom code"):
            read()
    assert not mark.exists()


def test_no_command_runs_the_code_of_a_folder_that_it_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, mark = tmp_path / "theirs" / "my.py", tmp_path / "mark"
    name = f"{code}:gold"
    folder = stranger(code.parent, replace(load("tiny"), gold=name, base={"model": f"{code}:build"}))
    code.write_text(f"open({str(mark)!r}, 'w')\ndef gold(**columns): ...\ndef build(folder): ...\n")
    mine = tmp_path / "mine"
    mine.mkdir()
    save_model(tmp_path / "base")
    write_recipe(mine, replace(load("tiny"), base={"model": str(tmp_path / "base")}))
    capsys.readouterr()
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}) + "\n")
    for words in (
        ["chat", str(folder)],
        ["evaluate", str(folder)],
        ["evaluate", str(mine), "--models", f"{folder}:ppo"],
        ["arena", str(folder)],
        ["arena", str(folder), "--live"],
        ["export", str(folder), "--to", str(tmp_path / "exported")],
        ["push", str(folder), "org/name", "--yes"],
        ["push", str(folder), "org/name", "--what", "data", "--yes"],
        ["serve", str(folder), "--engine", "transformers"],
        ["sample", str(folder)],
        ["judge", str(samples), "--judge", str(folder)],
        ["critique", str(samples), "--model", str(folder), "--out", str(tmp_path / "out.jsonl")],
    ):
        assert f"gold={name}" in error_of(capsys, words), words
    main_cli(["report", str(folder)])
    gather([folder])  # as `watch` does
    assert not mark.exists()
    failed(capsys, ["chat", str(folder), "--trust-functions"])  # it has no finished model
    main_cli(["list"])
    capsys.readouterr()  # the word is not for the rest of the process
    assert "names code" in error_of(capsys, ["chat", str(folder)])
