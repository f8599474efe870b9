"""A chat template that writes today's date: the run stays on the day on which it was begun."""

from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from support.rows import assistant, user
from support.worded import WORDS, make_recipe, write
from transformers import TrainerCallback
from transformers.utils import chat_template_utils

from rlhf_recipes import Recipe, replace, run
from rlhf_recipes.data.tokens import tokenize_prompt
from rlhf_recipes.model.base import fingerprint, load_tokenizer
from rlhf_recipes.pipeline.one_run import dated
from rlhf_recipes.records.files import read_json, write_json
from rlhf_recipes.records.folder import read_recipe

# The day of the month as a word of the tiny vocabulary: w30, w31.
TEMPLATE = """\
{{- bos_token ~ ' w' ~ strftime_now('%d') }}
{%- for message in messages %}
    {{- ' w60 ' ~ message.content ~ (' ' ~ eos_token if message.role == 'assistant' else '') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' w60' }}{% endif %}"""


class Clock:
    """What transformers and a run that is begun take for the day."""

    def __init__(self) -> None:
        self.day = 30

    def now(self) -> datetime:
        return datetime(2026, 3, self.day)

    def today(self) -> date:
        return self.now().date()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(chat_template_utils, "datetime", clock)
    monkeypatch.setattr("rlhf_recipes.pipeline.one_run.date", clock)
    return clock


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """SFT and a reward model on messages, in a template that writes the date."""
    recipe = make_recipe(tmp_path)
    (tmp_path / "dated.jinja").write_text(TEMPLATE)
    prompts = [[user(word)] for word in WORDS[:20]]
    demonstrations = [{"prompt": prompt, "completion": [assistant("w5 w6")]} for prompt in prompts]
    pairs = [{"prompt": prompt, "chosen": [assistant("w5")], "rejected": [assistant("w7 w8")]} for prompt in prompts]
    return replace(
        recipe,
        base={"chat_template": str(tmp_path / "dated.jinja")},
        sft={"data": str(write(tmp_path / "sft.jsonl", demonstrations))},
        reward={"data": str(write(tmp_path / "pairs.jsonl", pairs)), "max_steps": 1},
        ppo=None,
        rounds=None,
    )


def prompt(recipe: Recipe) -> str:
    """How a prompt begins in a run of this recipe."""
    tokenizer = load_tokenizer(recipe.base)
    return str(tokenizer.decode(tokenize_prompt(tokenizer, [user("w5")])))


def test_a_run_that_goes_on_on_another_day_sees_the_same_prompts(tmp_path: Path, recipe: Recipe, clock: Clock) -> None:
    run(recipe, tmp_path / "run", stages=["sft"])
    assert prompt(recipe).startswith("<bos> w30 w60 w5")
    clock.day = 31
    run(recipe, tmp_path / "run")
    assert prompt(read_recipe(tmp_path / "run")).startswith("<bos> w30 w60 w5")
    assert prompt(recipe).startswith("<bos> w31 w60 w5"), "a run that is begun now"
    assert (tmp_path / "run" / "reward" / "chat_template.jinja").read_text() == TEMPLATE, "which others use on any day"
    with pytest.raises(ValueError, match=r"base\.chat_template_date: '2026-03-30' there, '2026-03-31' here"):
        run(replace(recipe, base={"chat_template_date": "2026-03-31"}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"base\.chat_template_date must be a day like 2026-03-31, not 'today'"):
        run(replace(recipe, base={"chat_template_date": "today"}), tmp_path / "other")


class NextDay(TrainerCallback):
    """A day passes in each stage."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_end(self, *arguments: Any, **others: Any) -> None:
        self.clock.day -= 1


def test_the_variants_of_a_sweep_have_one_date(tmp_path: Path, recipe: Recipe, clock: Clock) -> None:
    variants = {"one": {"reward": {"learning_rate": 1e-4}}, "two": {"reward": {"learning_rate": 1e-3}}}
    run(replace(recipe, variants=variants), tmp_path / "sweep", callbacks=[NextDay(clock)])
    assert clock.day == 30 - 3, "sft was trained once"
    prompts = [prompt(read_recipe(tmp_path / "sweep" / name)) for name in variants]
    assert prompts[0] == prompts[1] and prompts[0].startswith("<bos> w30")


def test_a_run_of_0_2_goes_on_without_a_date(tmp_path: Path, recipe: Recipe, clock: Clock) -> None:
    run(recipe, tmp_path / "run", stages=["sft"])
    values = read_json(tmp_path / "run" / "recipe.json")
    assert values["base"].pop("chat_template_date") == "2026-03-30"
    write_json(tmp_path / "run" / "recipe.json", values)
    old = fingerprint(recipe.base, load_tokenizer(recipe.base))
    assert old != read_json(tmp_path / "run" / "sft" / "base.json")
    write_json(tmp_path / "run" / "sft" / "base.json", old)
    clock.day = 31
    run(recipe, tmp_path / "run")
    assert prompt(read_recipe(tmp_path / "run")).startswith("<bos> w31")


def test_a_recipe_records_no_date_that_nothing_asks_for(tmp_path: Path, recipe: Recipe, clock: Clock) -> None:
    undated = replace(recipe, base={"chat_template": "transcript"})
    assert dated(undated, tmp_path / "run") == undated
    given = replace(undated, base={"chat_template_date": "2024-07-26"})
    assert fingerprint(given.base, load_tokenizer(given.base)) == fingerprint(
        undated.base, load_tokenizer(undated.base)
    )
