"""What a `limit` takes of a source is like the whole, whatever the order of its rows."""

import json
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.rows import assistant, make_tokenizer, user, write

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.check import examine, survey_source
from rlhf_recipes.data.check_page import show_check
from rlhf_recipes.data.draw import draw
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.read import read
from rlhf_recipes.recipe.values import Source, Stage

PARTS = {"harmless": 300, "helpful": 900}  # one after the other, as in Anthropic's HH


def ordered(with_source: bool = True) -> list[dict[str, Any]]:
    """Comparisons of two parts, the second after the first."""
    parts = [part for part, rows in PARTS.items() for _ in range(rows)]
    return [
        {"prompt": [user(f"{part} {number}?")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
        | ({"source": part} if with_source else {})
        for number, part in enumerate(parts)
    ]


def numbers(stage: Any, path: str, limit: int, seed: int = 0) -> list[int]:
    """The row numbers, from 0, that a stage has under a limit."""
    tokenizer = make_tokenizer()
    rows = prepare(stage, Stage(path, limit=limit, heldout=0.0), tokenizer, None, seed).train
    ids = rows["prompt_ids"] if stage == "ppo" else [cell[0] for cell in rows["responses_ids"]]
    return [int(str(tokenizer.decode(one)).partition("?")[0].split()[-1]) for one in ids]


def test_a_limit_draws_rows_like_the_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ordered())
    drawn = numbers("ppo", path, 200)
    assert len(drawn) == 200 and drawn == sorted(drawn), "in the order of the source"
    # A quarter of the whole is harmless: 50 of 200 are expected, with a standard deviation of 5.6.
    assert 33 < sum(number < PARTS["harmless"] for number in drawn) < 67
    assert drawn == numbers("ppo", path, 200) == numbers("reward", path, 200), "the same each time and in each stage"
    assert set(drawn) < set(numbers("ppo", path, 400)) and drawn != numbers("ppo", path, 200, seed=1)
    assert numbers("ppo", path, 5000) == list(range(1200)), "a limit above the rows changes nothing"
    shuffled = write(tmp_path / "shuffled.jsonl", ordered()[::-1])
    assert numbers("ppo", shuffled, 200) == drawn[::-1]


def test_what_is_drawn_says_nothing_of_what_is_held_out(tmp_path: Path) -> None:
    source = Stage(write(tmp_path / "rows.jsonl", ordered()), limit=300, heldout=0.2)
    report = prepare("reward", source, make_tokenizer(), None).report
    assert report["rows"] == 300 and 35 < report["heldout"] < 85
    assert 190 < examine(survey_source(Source(source.data, heldout=0.2)), "reward")["heldout"] < 290


def test_rows_of_a_prompt_come_together_and_bad_rows_in_proportion_by_their_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n // 4}", "completion": f"c{n}"} if n % 4 else {"prompt": None, "n": n} for n in range(400)]
    source = Stage(write(tmp_path / "rows.jsonl", rows), limit=100, heldout=0.0)
    tokenizer = make_tokenizer()
    prepared = prepare("sft", source, tokenizer, None)
    texts = [str(tokenizer.decode(ids)).removeprefix("<s>").partition("c")[0] for ids in prepared.train["input_ids"]]
    incomplete = [prompt for prompt in set(texts) if texts.count(prompt) < 3]
    assert len(incomplete) <= 1, "the last prompt alone may have lost some of its rows"
    bad = prepared.report["dropped"]["missing field"]
    assert prepared.report["rows"] == 100 and 10 < bad < 40
    named = [int(line.split("row ")[1].partition(",")[0]) for line in prepared.report["examples"]]
    assert all(number % 4 == 1 for number in named) and max(named) > 100


def endless() -> Iterator[dict[str, Any]]:
    """A function's rows, which never end."""
    return ({"prompt": f"q{number}?"} for number in count())


def test_of_a_function_a_limit_takes_the_first_rows() -> None:
    prepared = prepare("ppo", Stage(f"{__file__}:endless", limit=7, heldout=0.0), make_tokenizer(), None)
    assert prepared.train["prompt"][:] == [f"q{number}?" for number in range(7)]
    assert examine(survey_source(Source(f"{__file__}:endless", limit=7)), "ppo").get("drawn") is None


def test_check_compares_what_is_drawn_with_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", ordered())
    report = examine(survey_source(Source(path, limit=200)), "reward")
    drawn = report["drawn"]
    assert (report["rows"], drawn["of"], drawn["by"]) == (200, 1200, "source")
    harmless = sum(number < PARTS["harmless"] for number in numbers("reward", path, 200)) / 200
    assert drawn["parts"] == {
        "harmless": {"drawn": harmless, "whole": 0.25},
        "helpful": {"drawn": 1 - harmless, "whole": 0.75},
    }
    assert json.loads(json.dumps(report)) == report
    plain = write(tmp_path / "plain.jsonl", ordered(with_source=False))
    drawn = examine(survey_source(Source(plain, limit=200)), "reward")["drawn"]
    assert drawn["by"] == "quarter" and sum(part["drawn"] for part in drawn["parts"].values()) == pytest.approx(1)
    assert all(0.15 < part["drawn"] < 0.35 and part["whole"] == 0.25 for part in drawn["parts"].values())
    for limit in (None, 1200):
        assert examine(survey_source(Source(path, limit=limit)), "reward")["drawn"] is None
    main_cli(["check", path, "--limit", "200"])
    assert "200 of 1,200 rows, drawn by a hash of the prompt" in " ".join(capsys.readouterr().out.split())


def test_many_sources_are_named_as_far_as_they_are_large(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "source": None if n % 2 else f"s{n % 60}"} for n in range(600)]
    source = Source(write(tmp_path / "rows.jsonl", rows), limit=300)
    report = examine(survey_source(source), "ppo")
    parts = report["drawn"]["parts"]
    assert len(parts) == 11 and parts["none"]["whole"] == 0.5 and "others" in parts
    assert sum(part["whole"] for part in parts.values()) == pytest.approx(1)
    console = Console(record=True, width=300)
    show_check(report, console)
    assert "none 5" in console.export_text()


def test_no_more_rows_are_held_than_are_drawn(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"{n} " + "long " * 200} for n in range(5000)])
    source = Source(path, limit=50)
    tracemalloc.start()
    drawn = list(draw(read("ppo", source), source, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(drawn) == 50 and peak < 1_000_000 < Path(path).stat().st_size / 4
