"""Named sources: small files in exactly the formats of the public ones, through the conversions and the stages."""

import json
from ast import literal_eval
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.repository import TREE, alpacaeval, helpsteer3, hh, pandalm, tldr, ultrafeedback, write_repository
from support.rows import assistant, make_tokenizer, user, write

from rlhf_recipes.data.check import examine, survey_source
from rlhf_recipes.data.guess import guess_columns
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.read import conversion_of, read
from rlhf_recipes.data.rows import FORMATS
from rlhf_recipes.data.sources import SOURCES, conversion, recognized, resolve_source
from rlhf_recipes.recipe.values import Stage

CASES = [(name, stage) for name, named in SOURCES.items() for stage in named.stages if stage != "dpo"]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_name_is_enough(name: str, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(tmp_path, name)
    if "://" in SOURCES[name].data:
        monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], data=f"file://{tmp_path}/{name}.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = make_tokenizer()
    result = prepare(stage, Stage(data=name, heldout=0.0), tokenizer, None)
    assert result.report["dropped"] == {} and result.report["source"] == name
    assert len(result.train) == (3 if name == "oasst1" else 20)
    assert result.conversational == (name != "tldr")
    row = result.train[0]
    if stage == "sft":
        text = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert text in (" It is 1.</s>", " The cat 0.</s>", " Good.</s>")
    elif stage == "ppo":
        assert tokenizer.decode(row["prompt_ids"]).endswith(("Assistant:", "TL;DR:"))
    else:
        first, second = (tokenizer.decode(ids) for ids in row["responses_ids"][:2])
        assert row["ranking"][:2] == [1, 2] and first != second
        assert first.endswith((" It is 1.</s>", " The cat 0.</s>", " Good.</s>"))
        assert name == "oasst1" or second.endswith((" I do not know.</s>", " A.</s>"))


def test_dpo_takes_what_the_sources_say(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for convert, row in ((None, hh(1)), (None, ultrafeedback(1)), ("helpsteer3", helpsteer3(1)), ("tldr", tldr(1))):
        path = write(tmp_path / "copy.jsonl", [row])
        result = prepare("dpo", Stage(data=path, convert=convert, heldout=0.0), tokenizer, None)
        chosen, rejected = (tokenizer.decode(result.train[0][f"{side}_ids"]) for side in ("chosen", "rejected"))
        assert chosen.endswith((" It is 2.</s>", " The cat ate 1 fish.</s>"))
        assert rejected.endswith((" I do not know.</s>", " Cats.</s>"))


def test_what_the_user_sets_stays() -> None:
    source = resolve_source(Stage(data="ultrafeedback"))
    assert (source.data, source.split, source.convert) == (SOURCES["ultrafeedback"].data, "train_prefs", None)
    assert resolve_source(Stage(data="ultrafeedback", split="test_prefs")).split == "test_prefs"
    source = resolve_source(Stage(data="helpsteer3", convert="my:own", limit=5))
    assert (source.subset, source.convert, source.limit) == ("preference", "my:own", 5)
    assert resolve_source(Stage(data="other.jsonl")) == Stage(data="other.jsonl")


def test_a_file_of_that_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tulu3").write_text("")
    assert resolve_source(Stage(data="tulu3")).data == "tulu3"


@pytest.mark.parametrize(
    ("preference", "ranking", "chosen", "weight"),
    [(-3, [1, 2], 0, 3), (-1, [1, 2], 0, 1), (0, [1, 1], None, 1), (1, [2, 1], 1, 1), (3, [2, 1], 1, 3)],
)
def test_strength_of_preference(preference: int, ranking: list[int], chosen: int | None, weight: int) -> None:
    (row,) = conversion("x", "helpsteer3")([helpsteer3(1, preference)])
    assert (row["ranking"], row["weight"]) == (ranking, weight)
    assert row.get("chosen") == (None if chosen is None else row["responses"][chosen])
    assert row.get("rejected") == (None if chosen is None else row["responses"][1 - chosen])


def test_strengths_become_weights_of_mean_1_and_ties_are_dropped(tmp_path: Path) -> None:
    rows = [helpsteer3(number, preference) for number, preference in enumerate((-3, 1, 0, 2))]
    stage = Stage(data=write(tmp_path / "copy.jsonl", rows), convert="helpsteer3", heldout=0.0)
    result = prepare("reward", stage, make_tokenizer(), None)
    assert result.train["weight"][:] == [1.5, 0.5, 1.0]
    assert result.train["ranking"][:] == [[1, 2], [2, 1], [2, 1]]
    assert result.train["source"][:] == ["general", "code", "code"]
    assert result.report["dropped"] == {"all tied": 1}
    assert "row 3, field 'ranking'" in result.report["examples"][0]


def test_tldr_prompts_are_openais() -> None:
    article = tldr(2, 0)
    article["info"] |= {"post": None, "subreddit": None, "site": "cnn", "article": "News."}
    post, news, other = conversion("x", "tldr")([tldr(1), article, {"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert post["prompt"] == "SUBREDDIT: r/pets\n\nTITLE: Cat\n\nPOST: My cat ate 1 fish.\n\nTL;DR:"
    assert (post["chosen"], post["rejected"]) == (" The cat ate 1 fish.", " Cats.")
    assert news["prompt"] == "Article:\nNews.\n\nTL;DR:" and news["chosen"] == " Cats."
    assert other == {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_trees_become_rankings_of_replies() -> None:
    first, second, many = conversion("x", "oasst1")(TREE)
    assert first["prompt"] == [user("What is love?")]
    assert [text[0]["content"] for text in first["responses"]] == ["Good.", "Rather bad.", "Worst."]
    assert first["ranking"] == [1, 2, 3] and first["completion"] == [assistant("Good.")]
    assert second["prompt"] == [user("What is love?"), assistant("Good."), user("And war?")]
    assert [text[0]["content"] for text in second["responses"]] == ["Better.", "Bad."]
    assert second["ranking"] == [1, 2] and second["source"] == "en"
    assert [text[0]["content"] for text in many["responses"]] == [f"Number {rank}." for rank in range(9)]


@pytest.mark.parametrize(
    ("votes", "ranking", "soft"),
    [
        ((1, 1, 1), [1, 2], 1.0),
        ((1, 2, 2), [2, 1], 1 / 3),
        ((0, 1, 1), [1, 2], 5 / 6),
        ((0, 0, 2), [1, 1], None),  # most say that they are alike
        ((0, 1, 2), [1, 1], None),  # nobody agrees
    ],
)
def test_pandalms_people_vote(votes: tuple[int, ...], ranking: list[int], soft: float | None) -> None:
    (row,) = conversion("x", "pandalm")([pandalm(1, *votes)])
    assert row["prompt"] == [user("Add.\n\n1 + 1")] and row["ranking"] == ranking
    assert row["responses"] == [[assistant("It is 2.")], [assistant("I do not know.")]]
    assert row.get("preferences") == (None if soft is None else pytest.approx([soft]))
    assert row.get("chosen") == (None if soft is None else row["responses"][ranking.index(1)])


def test_pandalms_training_rows_and_what_json_made_of_true() -> None:
    task = {"instruction": "Say a number.", "input": "", "response1": "2", "response2": "3"}
    rows = [{"inputs": task, "outputs": {"evaluation_result": result}} for result in ("2", "Tie")]
    second, tie, true = conversion("x", "pandalm")([*rows, {**pandalm(1), "response1": True}])
    assert second["prompt"] == [user("Say a number.")] and (second["ranking"], tie["ranking"]) == ([2, 1], [1, 1])
    assert true["responses"][0] == [assistant("True")]


def test_alpacaevals_preferences_and_votes() -> None:
    rows = [alpacaeval(0, 1.25), alpacaeval(1, 1.5), alpacaeval(2, 0), alpacaeval(3, None), alpacaeval(4, 2)]
    leaning, half, older, unread, second = conversion("x", "alpacaeval")(rows)
    assert leaning["prompt"] == [user("What is 0 + 1?")] and leaning["source"] == "selfinstruct"
    assert (leaning["ranking"], leaning["preferences"]) == ([1, 2], [0.75])
    assert half["ranking"] == older["ranking"] == [1, 1] and "preferences" not in half
    assert unread == rows[3] and (second["ranking"], second["preferences"]) == ([2, 1], [0.0])
    bad = [{**alpacaeval(5), "output_1": ["a"]}, alpacaeval(6, 3), "text"]
    assert list(conversion("x", "alpacaeval")(bad)) == bad
    # Four people on each of two pairs: three to one, and two to two.
    votes = [alpacaeval(n, p, who) for n, four in enumerate(((1, 1, 2, 1), (1, 2, 2, 1))) for who, p in enumerate(four)]
    majority, split = conversion("x", "alpacaeval")(votes)
    assert (majority["ranking"], majority["preferences"], split["ranking"]) == ([1, 2], [0.75], [1, 1])


@pytest.mark.parametrize("name", ["alpacaeval", "pandalm", "helpsteer3", "tldr", "oasst1"])
def test_a_copy_of_a_named_source_is_known_by_its_columns(name: str, tmp_path: Path) -> None:
    rows = {"alpacaeval": [alpacaeval(1)], "pandalm": [pandalm(1)], "helpsteer3": [helpsteer3(1)]}
    rows |= {"tldr": [tldr(1)], "oasst1": TREE}
    path = write(tmp_path / "copy.jsonl.gz", rows[name])
    source = Stage(data=path)
    assert conversion_of("reward", source) == name
    assert list(read("reward", source)) == list(read("reward", Stage(data=path, convert=name)))
    assert list(read("reward", Stage(data=f"file://{path}"))) == list(read("reward", source))
    mapped = Stage(data=path, columns={"prompt": next(iter(rows[name][0]))})  # the user's own come first
    assert conversion_of("reward", mapped) is None
    survey = survey_source(source)
    assert examine(survey, "rank" if name != "tldr" else "reward", None, None)["convert"] == name


def test_a_file_by_its_url_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"reward\.data: cannot read file://{tmp_path}/none\.json"):
        prepare("reward", Stage(data=f"file://{tmp_path}/none.json"), make_tokenizer(), None)
    with pytest.raises(ValueError, match=r"reward\.data: https://example\.org/rows\.txt is none of \.jsonl"):
        prepare("reward", Stage(data="https://example.org/rows.txt"), make_tokenizer(), None)
    for url in ("s3://bucket/rows.json", "github://rows.json", "nothing://rows.json"):  # without their packages
        with pytest.raises(ValueError, match=rf"reward\.data: cannot read {url}: "):
            prepare("reward", Stage(data=url), make_tokenizer(), None)


def test_rows_of_another_format_are_refused_by_number(tmp_path: Path) -> None:
    rows = [helpsteer3(0), {"context": "no responses"}, "text", helpsteer3(3, 1), {**helpsteer3(4), "context": 5}]
    stage = Stage(data=write(tmp_path / "copy.jsonl", [json.dumps(row) for row in rows]), convert="helpsteer3")
    report = prepare("reward", stage, make_tokenizer(), None).report
    assert (report["rows"], report["used"]) == (5, 2)
    assert report["dropped"] == {"wrong type": 2, "missing field": 1}
    assert [line.split(", ")[1] for line in report["examples"]] == ["row 2", "row 3", "row 5"]


def halves(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A user's own conversion, of one row into two."""
    for row in rows:
        yield {"prompt": row["question"], "completion": row["first"]}
        yield {"prompt": row["question"], "completion": row["second"]}


def test_own_conversion(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": f"q{n}", "first": "a", "second": "b"} for n in range(4)])
    stage = Stage(data=path, convert=f"{__file__}:halves", heldout=0.0, limit=5)
    result = prepare("sft", stage, make_tokenizer(), None)
    assert result.report["rows"] == len(result.train) == 5
    with pytest.raises(ValueError, match=r"sft\.convert: 'helpster3' is neither .* Did you mean helpsteer3\?"):
        prepare("sft", Stage(data=path, convert="helpster3"), make_tokenizer(), None)


@pytest.mark.parametrize(
    ("name", "row", "converted"),
    [
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief."},
            {
                "prompt": [{"role": "system", "content": "Be brief."}, user("Add.\n\n1 + 1")],
                "completion": [assistant("2")],
            },
        ),
        (
            "alpaca",
            {"instruction": "Hi", "input": "", "output": "Ho"},
            {"prompt": [user("Hi")], "completion": [assistant("Ho")]},
        ),
        (
            "alpaca-pairs",
            {"instruction": "Hi", "chosen": "Ho", "rejected": "No"},
            {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No")]},
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {"messages": [user("Hi"), assistant("Ho")]},
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Ho"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            {"prompt": [user("Hi")], "chosen": [assistant("Ho")], "rejected": [assistant("No")]},
        ),
    ],
)
def test_formats_without_a_name_are_known_by_their_columns(
    name: str, row: dict[str, Any], converted: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [row])
    assert conversion_of("sft", Stage(data=path)) == name
    assert list(read("sft", Stage(data=path))) == [(1, converted)]
    assert recognized({**row, "prompt": "What TRL calls so is read as it is."}) is None


def test_a_row_that_is_not_as_its_format_has_it_is_refused_by_its_number(tmp_path: Path) -> None:
    rows = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}] * 3
    rows[1] = {"conversations": [{"from": "tool", "value": "Hi"}]}
    path = write(tmp_path / "rows.jsonl", rows)
    report = prepare("sft", Stage(data=path, heldout=0.0), make_tokenizer(), None).report
    assert report["used"] == 2 and " 2, field" in report["examples"][0]


@pytest.mark.parametrize(
    ("columns", "stage", "found"),
    [
        (["id", "question", "reply"], "sft", {"prompt": "question", "completion": "reply"}),
        (
            ["Question", "goodAnswer", "bad_answer"],
            "reward",
            {"prompt": "Question", "chosen": "goodAnswer", "rejected": "bad_answer"},
        ),
        (
            ["user_prompt", "response_chosen", "response_rejected"],
            "reward",
            {"prompt": "user_prompt", "chosen": "response_chosen", "rejected": "response_rejected"},
        ),
        (["dialogue"], "ppo", {"messages": "dialogue"}),
        (["request", "n"], "ppo", {"prompt": "request"}),
        (["answer", "score"], "sft", None),
        (["prompt", "prompt_text"], "sft", None),
    ],
)
def test_columns_are_guessed_from_their_names(columns: list[str], stage: str, found: dict[str, str] | None) -> None:
    assert guess_columns(columns, FORMATS[stage]) == found


def test_an_unknown_format_is_refused_with_the_mapping_that_would_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "Hi", "reply": "Ho"}])
    with pytest.raises(ValueError) as refused:
        prepare("sft", Stage(data=path), make_tokenizer(), None)
    mapping = str(refused.value).rpartition("sft.columns=")[2].rstrip(".")
    mapped = Stage(data=path, columns=literal_eval(mapping), heldout=0.0)
    assert prepare("sft", mapped, make_tokenizer(), None).report["used"] == 1
