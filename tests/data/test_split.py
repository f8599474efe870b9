"""A dialogue is on one side of every split: all its prompts begin with the same turn of the user."""

from pathlib import Path
from typing import Any

import pytest
from support.paths import SHARED
from support.rows import assistant, make_tokenizer, user, write

from rlhf_recipes.data.check import examine, survey_source
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.split import dialogue_hash, halve, set_aside
from rlhf_recipes.recipe.values import Source, Stage


def dialogues(count: int) -> list[dict[str, Any]]:
    """Comparisons at each of three turns of so many dialogues, their first one without a word before it."""
    rows = []
    for number in range(count):
        system = [{"role": "system", "content": f"Be {number}."}] if number % 2 else []
        turns = [user(f"Hi {number}"), assistant("Hello."), user("Go on."), assistant("So."), user("And then?")]
        for length in (1, 3, 5):
            prompt = [*system, *turns[:length]]
            rows.append({"prompt": prompt, "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]})
    return rows


def firsts(prompts: list[Any]) -> set[str]:
    """What the user says first in each of some prompts."""
    return {next(message["content"] for message in prompt if message["role"] == "user") for prompt in prompts}


@pytest.mark.parametrize("form", ["messages", "transcripts"])
def test_a_dialogue_does_not_straddle_the_split(form: str, tmp_path: Path) -> None:
    rows = dialogues(60)
    if form == "transcripts":
        names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
        turns = [[message for message in row["prompt"] if message["role"] in names] for row in rows]
        texts = ["".join(names[message["role"]] + message["content"] for message in said) for said in turns]
        rows = [{key: f"{text}\n\nAssistant: {key}" for key in ("chosen", "rejected")} for text in texts]
    path = write(tmp_path / "rows.jsonl", rows)
    prepared = prepare("ppo", Stage(path, heldout=0.3), make_tokenizer(), None)
    train, heldout = (firsts(part["prompt"][:]) for part in (prepared.train, prepared.heldout))
    assert not train & heldout and len(train | heldout) == 60
    assert len(prepared.heldout) == 3 * len(heldout), "each of a held-out dialogue's prompts is held out"
    reward = prepare("reward", Stage(path, heldout=0.3), make_tokenizer(), None)
    assert (len(reward.train), len(reward.heldout)) == (len(prepared.train), len(prepared.heldout))


def test_a_dialogue_does_not_straddle_the_judges_share(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    train = prepare("reward", Stage(write(tmp_path / "rows.jsonl", dialogues(60)), heldout=0.0), tokenizer, None).train
    sides = []
    for side in set_aside(train, 0.3, seed=0):
        starts = [row["responses_ids"][0][: row["prompt_length"]] for row in side.to_list()]
        sides.append({tokenizer.decode(ids).rpartition("Hi ")[2].partition("\n")[0] for ids in starts})
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60 and len(sides[1]) > 5


def test_a_dialogue_does_not_straddle_the_half_that_chooses(tmp_path: Path) -> None:
    source, tokenizer = Stage(write(tmp_path / "rows.jsonl", dialogues(60)), heldout=0.5), make_tokenizer()
    stages: tuple[Any, ...] = ("sft", "reward", "dpo", "ppo")
    found = []
    for stage in stages:
        sides = []
        for side in halve(prepare(stage, source, tokenizer, None, loss_on="all").heldout, seed=0):
            ids = [row.get("input_ids") or row.get("prompt_ids") or row["responses_ids"][0] for row in side.to_list()]
            sides.append({str(tokenizer.decode(one)).partition("Hi ")[2].partition("\n")[0] for one in ids})
        assert not sides[0] & sides[1] and all(sides)
        found.append(sides)
    assert all(sides == found[0] for sides in found), "the same ones in each stage, whatever has a loss"


def test_the_hash_of_one_turn_is_the_one_that_it_always_was() -> None:
    assert dialogue_hash([user(" Hi ")], 0) == dialogue_hash([user("Hi")], 0) == 0xA166_18AF_396C_54B9
    assert dialogue_hash("Hi\nthere", 3) == dialogue_hash(" Hi\nthere ", 3) == 0x55BB_6414_3FA4_68F8


def test_check_counts_prompts_that_straddle(tmp_path: Path) -> None:
    texts = ["User: a\nBot:", "User: a\nBot: b\nUser: c\nBot:", "User: d", "User: d\nBot: e\nUser: f", "User: ab", "x"]
    source = Source(write(tmp_path / "rows.jsonl", [{"prompt": text, "completion": "y"} for text in texts]))
    counted = []
    for seed in range(40):
        prepared = prepare("ppo", Stage(source.data, heldout=0.4), make_tokenizer(), None, seed)
        train, heldout = ({text.strip() for text in part["prompt"]} for part in (prepared.train, prepared.heldout))
        related = ({*texts[:2]}, {*texts[2:4]})
        wanted = sum(len(pair & heldout) for pair in related if pair & heldout and pair & train)
        counted.append(wanted)
        report = examine(survey_source(Source(source.data, heldout=0.4)), "ppo", seed=seed)
        assert report["straddling"] == wanted
    assert {0, 1, 2} == set(counted), "the seeds split both pairs, one and none"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data and model in ../shared are absent")
def test_no_prompt_of_real_hh_rows_straddles() -> None:
    path = str(SHARED / "data" / "hh_base_train90.jsonl.gz")
    report = examine(survey_source(Source(path)), "reward")
    assert report["heldout_prompts"] > 100 and report["straddling"] == 0
