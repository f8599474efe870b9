"""`rlhf-recipes check`: it says what `prepare` does, and what is in a file, in memory that does not grow with it."""

import gzip
import json
import math
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support.command_line import error_of
from support.paths import ROOT, SHARED
from support.repository import write_repository
from support.rows import assistant, make_tokenizer, user, write
from support.tiny_models import save_model
from transformers import AutoTokenizer

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.check import examine, stages_for, survey_source
from rlhf_recipes.data.check_page import escape, show_check
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.read import read
from rlhf_recipes.data.tokens import set_chat_template, tokenize_pair
from rlhf_recipes.recipe.values import Source, Stage

SAME = ("rows", "used", "dropped", "examples", "train", "heldout", "heldout_prompts")


def report_of(stage: Any, path: str, tokenizer: Any = None, max_length: int | None = None, **options: Any) -> Any:
    others = {key: options.pop(key) for key in ("other", "show", "refused", "seed") if key in options}
    return examine(survey_source(Source(path, **options)), stage, tokenizer, max_length, **others)


# --- The same as prepare ----------------------------------------------------------------------------------------------


def some_row(draw: random.Random, weights: list[Any], ranked: float) -> Any:
    """A row of any format, often broken in some way."""
    prompt = draw.choice(["Why?", "How?", " Why? ", f"What is {draw.randrange(40)}?", "long " * 30])
    texts = [draw.choice(["", "yes", "yes ", "no", "maybe", "long " * 20, "</s>"]) for _ in range(3)]
    row: dict[str, Any] = {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], "tranche": draw.random()}
    kind = draw.randrange(13)
    if kind < 4:
        row = {**row, "prompt": [user(prompt)], "chosen": [assistant(texts[0])], "rejected": [assistant(texts[1])]}
    elif kind == 4:
        row = {"chosen": f"\n\nHuman: {prompt}\n\nAssistant: {texts[0]}", "rejected": "x"}
    elif kind == 5:
        row["chosen"] = draw.choice([None, 3, ["x"], {"a": 1}])
    elif kind == 6:
        return draw.choice(["row", [1], 5, {"other": 1}])
    if draw.random() < ranked:
        ranking = draw.choice([[1, 2, 3], [2, 1, 1], [1, 1, 1], [0, 1, 2], [3, 1, 2]])
        row |= {"responses": [[assistant(text)] if kind < 4 else text for text in texts], "ranking": ranking}
    if kind != 12 and draw.random() < 0.9:
        row["weight"] = draw.choice(weights)
    return row


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo"])
@pytest.mark.parametrize("seed", range(8))
def test_the_report_is_that_of_prepare(stage: Any, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.data.check.CHUNK", 7)
    draw, tokenizer = random.Random(seed), make_tokenizer()
    weights = draw.choice([[1, 2.5, 0], [1, 2], [1, "much", 0]])
    ranked = draw.choice([0.0, 0.4, 0.9])
    rows = [some_row(draw, weights, ranked) for _ in range(draw.choice([30, 120]))]
    path = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])
    options: dict[str, Any] = {"heldout": draw.choice([0.0, 0.01, 0.3]), "heldout_limit": draw.choice([2, 9, 256])}
    options["limit"] = draw.choice([None, 25])
    found = report_of(stage, path, tokenizer, 60, seed=seed, **options)
    assert json.loads(json.dumps(found)) == found
    try:
        wanted = prepare(stage, Stage(path, **options), tokenizer, 60, seed)
    except ValueError as error:
        wanted = re.search(r"No usable row is left|column '\w+'", str(error))
        assert wanted and any(wanted[0] in problem for problem in found["problems"])
        return
    assert not any("column" in problem for problem in found["problems"])
    assert {key: found[key] for key in SAME} == {key: wanted.report[key] for key in SAME}
    assert found["conversational"] == wanted.conversational
    lengths = found["lengths"]["prompt" if stage == "ppo" else "whole"]
    column = {"sft": "input_ids", "reward": "responses_ids", "ppo": "prompt_ids", "dpo": "chosen_ids"}[stage]
    cells = wanted.train[column]
    rows = [ids for responses in cells for ids in responses] if stage == "reward" else cells
    assert max(map(len, rows), default=0) <= min(60, lengths["longest"])


def test_what_is_shown_is_what_the_trainer_gets(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", template="chatml")
    rows = [{"prompt": [user(f"Why {n}?")], "chosen": [assistant("So.")], "rejected": [assistant("Oh")]} for n in "ab"]
    path = write(tmp_path / "rows.jsonl", rows)
    row = report_of("reward", path, tokenizer)["first"][1]
    assert row["row"] == 2
    texts = {name: part["text"] for name, part in row["parts"].items()}
    assert texts == {
        "prompt": "<|im_start|>user\nWhy b?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "So.<|im_end|>",
        "rejected": "Oh<|im_end|>",
    }
    prepared = prepare("reward", Stage(path, heldout=0.0), tokenizer, None)
    for side, ids in zip(("chosen", "rejected"), prepared.train[1]["responses_ids"], strict=True):
        assert tokenizer.decode(ids) == texts["prompt"] + texts[side]
        assert len(ids) == row["parts"]["prompt"]["length"] + row["parts"][side]["length"]


# --- Findings ---------------------------------------------------------------------------------------------------------

FINDINGS: list[Any] = [
    {"prompt": "p1", "chosen": "longer", "rejected": "short"},
    {"prompt": "p1 ", "chosen": " longer", "rejected": "short"},  # repeats row 1, save for spaces
    {"prompt": "p1", "chosen": "short", "rejected": "longer"},  # contradicts rows 1 and 2
    {"prompt": "p2", "chosen": "longer", "rejected": "short"},  # another prompt
    {"prompt": "p2", "chosen": "longer", "rejected": "other one"},
    {"prompt": "p3", "chosen": "abc", "rejected": "xyz"},
    {"prompt": "p3", "chosen": "abc", "rejected": "xyz"},  # repeats row 6
    {"prompt": "p3", "chosen": "abc", "rejected": "xyz"},  # and again
    {"prompt": "p4", "chosen": "same", "rejected": "same"},
    {"prompt": "p5", "chosen": "x", "rejected": None},
    "not a row",
]


def test_findings_in_a_file_made_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [json.dumps(row) for row in FINDINGS])
    report = report_of("reward", path, heldout=0.4)
    assert (report["rows"], report["used"], report["prompts"]) == (11, 8, 3)
    assert report["dropped"] == {"chosen equals rejected": 1, "missing field": 1, "wrong type": 1}
    assert [line.removeprefix(f"{path}, ") for line in report["examples"]] == [
        "row 9, field 'chosen': chosen equals rejected",
        "row 10, field 'rejected': missing field",
        "row 11, field 'row': wrong type: str, not an object",
    ]
    assert report["duplicates"] == {"rows": 3, "examples": [[1, 2], [6, 8]]}
    assert report["contradictions"] == {"repeated_pairs": 2, "pairs": 1, "judgements": 3, "examples": [[1, 3]]}
    assert report["pairs"] == {"longer": 3, "shorter": 2, "same": 3}
    assert report["lengths"]["chosen"] == {
        "shortest": 3, "10 %": 3, "median": 5, "90 %": 6, "95 %": 6, "99 %": 6, "longest": 6, "mean": 4.8,
    }  # fmt: skip
    assert report["unit"] == "characters" and report["max_length"] is None
    assert report["stages"] == ["reward", "dpo", "sft", "ppo"] and report["problems"] == []


def test_rankings_are_compared_by_their_pairs(tmp_path: Path) -> None:
    def row(ranking: list[int], *responses: str) -> dict[str, Any]:
        return {"prompt": "p", "responses": list(responses), "ranking": ranking}

    rows = [row([1, 2, 2], "a", "bb", "cc"), row([1, 2], "bb", "a"), row([2, 1], "cc", "a"), row([1, 1], "a", "bb")]
    path = write(tmp_path / "rows.jsonl", rows)
    report = report_of("reward", path)
    # a > bb and a > cc (row 1), bb > a (row 2), a > cc (row 3); row 4 prefers nothing.
    assert report["pairs"] == {"longer": 1, "shorter": 3}
    assert report["contradictions"] == {"repeated_pairs": 2, "pairs": 1, "judgements": 2, "examples": [[1, 2]]}
    assert report["dropped"] == {"all tied": 1} and report["duplicates"]["rows"] == 0
    assert list(report["first"][0]["parts"]) == ["prompt", *(f"responses[{i}], rank {1 + (i > 0)}" for i in range(3))]
    labels = report_of("label", path)
    assert (labels["used"], labels["dropped"], labels["problems"]) == (4, {}, [])
    samples = report_of("rank", path)
    assert samples["pairs"] == {} and samples["lengths"]["response"]["longest"] == 2


def test_sources_that_ask_for_opposite_things_are_told(tmp_path: Path) -> None:
    def pair(number: int, longer: bool, source: str) -> dict[str, str]:
        chosen, rejected = ("a long answer", "short")[:: 1 if longer else -1]
        return {"prompt": f"{source} {number}", "chosen": chosen, "rejected": rejected, "source": source}

    rows = [pair(n, n % 10 < 7, "helpful") for n in range(60)] + [pair(n, n % 10 < 2, "harmless") for n in range(60)]
    report = report_of("reward", write(tmp_path / "rows.jsonl", rows))
    assert report["pairs"] == {"longer": 54, "shorter": 66}
    assert [(part["source"], part["rate"]) for part in report["opposed"]] == [("helpful", 0.7), ("harmless", 0.2)]
    console = Console(width=200, record=True)
    show_check(report, console)
    assert "in helpful the longer response is better in 70%, in harmless in 20%" in console.export_text()
    for few in (rows[:60], rows[:8] + rows[60:68]):
        assert report_of("reward", write(tmp_path / "few.jsonl", few))["opposed"] == []


def test_prompts_in_both_files(tmp_path: Path) -> None:
    here = write(tmp_path / "a.jsonl", [{"prompt": p, "completion": "x"} for p in ("one", "two", "two", "three")])
    there = write(tmp_path / "b.jsonl", [{"prompt": p, "completion": "y"} for p in ("nil", " two", "three", "three")])
    found = report_of("sft", here, other=Source(there))["other"]
    assert found == {
        "source": there, "rows": 4, "prompts_in_both": 2, "rows_here": 3, "examples": [[2, 2], [4, 3]],
    }  # fmt: skip


def test_tokens_lengths_and_what_is_too_long(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "p" * n, "completion": "c" * (n % 7 + 1)} for n in range(1, 41)]
    rows[3]["completion"] = "spelled </s> out"
    path = write(tmp_path / "rows.jsonl", rows)
    report = report_of("sft", path, tokenizer, 30)
    whole = sorted(sum(map(len, tokenize_pair(tokenizer, row["prompt"], row["completion"]))) for row in rows)
    assert report["lengths"]["whole"] == {
        "shortest": whole[0], "10 %": whole[3], "median": whole[19], "90 %": whole[35],
        "95 %": whole[37], "99 %": whole[39], "longest": whole[39], "mean": sum(whole) / 40,
    }  # fmt: skip
    assert report["dropped"] == {"too long": sum(length > 30 for length in whole)} and report["max_length"] == 30
    assert report["special_tokens"] == {"rows": 1, "examples": [4], "shown": ["</s>", "<s>"]}


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "reward"),
        ({"chosen": "a b", "rejected": "a c"}, "reward"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 2]}, "reward"),
        ({"prompt": "p", "responses": ["a", "b"]}, "rank"),
        ({"prompt": "p", "completion": "c"}, "sft"),
        ({"messages": [user("a"), assistant("b")]}, "sft"),
        ({"prompt": "p", "answer": 1}, "ppo"),
        ({"text": "t"}, "ptx"),
    ],
)
def test_the_stage_that_says_most_comes_first(row: dict[str, Any], stage: str, tmp_path: Path) -> None:
    survey = survey_source(Source(write(tmp_path / "rows.jsonl", [row, row, {**row, "extra": None}])))
    assert stages_for(survey)[0] == stage
    assert examine(survey, stage)["format"] == [name for name in row if name != "answer"]


# --- Problems and broken files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes", "problem"),
    [
        ([{"prompt": "", "completion": "x"}], {}, "No usable row is left"),
        ([{"prompt": "p", "completion": "x"}] * 3, {}, "No row is held out"),
        ([{"prompt": p, "completion": "x"} for p in "abc"], {"heldout": 0.0}, "No row is held out"),
        ([{"prompt": p, "completion": "x"} for p in ("a", "b", "")], {"bad_rows": "refuse"}, "bad_rows=refuse"),
    ],
)
def test_problems_of_training(rows: list[Any], changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    (found,) = report_of("sft", path, **changes)["problems"]
    assert problem in found


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"completions": 1}, "Rename the column 'completions': reward functions have an argument of that name."),
        ({"trainer_state": 1}, "Rename the column 'trainer_state'"),
        ({"a\0b": 1}, "Rename the column 'a\\x00b': Arrow takes no name with a NUL byte."),
        ({"answer": [1, "x"]}, "The column 'answer', which is passed on to reward functions, mixes types"),
        ({"answer": [1] * 40 + ["x"] * 40}, "The column 'answer'"),
        ({"answer": [1] * 40 + [None] * 40 + [0.5]}, None),
    ],
)
def test_problems_of_what_ppo_passes_on(
    values: dict[str, Any], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_recipes.data.check.CHUNK", 40)
    ((column, cells),) = values.items()
    cells = cells if isinstance(cells, list) else [cells] * 3
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"p{n}", column: cell} for n, cell in enumerate(cells)])
    found = report_of("ppo", path)["problems"]
    if problem is None:
        assert found == []
        prepare("ppo", Stage(path), make_tokenizer(), None)
    else:
        assert len(found) == 1 and found[0].startswith(problem)
        with pytest.raises(ValueError, match=re.escape(f"column {column!r}")):
            prepare("ppo", Stage(path), make_tokenizer(), None)


GOOD = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode() + b"\n"
BROKEN = [
    ("rows.jsonl", GOOD * 3 + b"{oops\n", "line 4: not JSON"),
    ("rows.jsonl", b"", "holds no rows"),
    ("rows.jsonl", b"\n\n", "holds no rows"),
    ("rows.jsonl", GOOD + b'{"prompt": "\xff"}\n', "cannot read"),
    ("rows.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], "cannot read"),
    ("rows.jsonl.gz", GOOD, "cannot read"),
    ("rows.parquet", b"PAR1 nothing", "cannot read"),
    ("rows.parquet.gz", gzip.compress(b"nothing", mtime=0), "cannot read"),
    ("rows.json", b'[{"prompt": "p"}', "not JSON"),
    ("rows.txt", GOOD, "is none of .jsonl"),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n', "has the columns: question, answer. Map them with --columns"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), BROKEN, ids=[f"{name}: {message}" for name, _, message in BROKEN]
)
def test_broken_files(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        main_cli(["check", str(path)])
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and str(path) in printed.err and message in printed.err
    assert "check." not in printed.err


# --- The command ------------------------------------------------------------------------------------------------------


def test_command_and_its_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"q{n}\x1b[31m", "better": "yes", "worse": "no [bold]"} for n in range(30)]
    path = write(tmp_path / "rows.jsonl", [*rows, {**rows[0], "better": "no [bold]"}])
    words = ["check", path, "--columns", "prompt=question", "chosen=better", "rejected=worse"]
    main_cli(words)
    printed = capsys.readouterr().out
    assert "prompt from question, chosen from better" in printed and "\x1b" not in printed
    assert r"q0\x1b[31m" in printed and "no [bold]" in printed
    assert "31; usable: 30, of 30 prompts" in printed and "chosen equals rejected 1" in printed
    assert "row 31, field 'chosen'" in printed and "lengths are in characters" in printed
    main_cli([*words, "--json", "--stage", "dpo", "--limit", "10", "--rows", "1"])
    report = json.loads(capsys.readouterr().out)
    assert (report["stage"], report["rows"], len(report["first"])) == ("dpo", 10, 1)
    with pytest.raises(SystemExit) as exit:
        main_cli([*words, "--heldout", "0"])
    assert exit.value.code == 1 and "No row is held out" in capsys.readouterr().out
    assert "'quest'. Did you mean question?" in error_of(capsys, ["check", path, "--columns", "prompt=quest"])
    assert "write chosen=its_name" in error_of(capsys, ["check", path, "--columns", "prompt"])
    assert "sft takes" not in error_of(capsys, ["check", path, "--stage", "sft"])
    assert "Say what to check" in error_of(capsys, ["check"])
    assert "need --model" in error_of(capsys, ["check", path, "--max-length", "9"])
    assert "error: limit must be 0 or more, not -1" in error_of(capsys, ["check", path, "--limit", "-1"])
    assert "error: heldout must be between" in error_of(capsys, ["check", path, "--heldout", "2"])


def test_sources_are_listed_with_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    main_cli(["check", "--sources"])
    printed = capsys.readouterr().out
    assert "helpsteer3 for sft, reward, ppo, dpo; licence: CC-BY-4.0" in printed
    assert all(name in printed for name in ("hh-rlhf", "ultrafeedback", "tldr", "oasst1", "tulu3"))


def test_prompts_in_two_splits_of_a_named_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_repository(tmp_path, "hh-rlhf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    main_cli(["check", "hh-rlhf", "--other-split", "test", "--limit", "5"])
    printed = capsys.readouterr().out
    assert "Anthropic/hh-rlhf; licence: MIT; Bai et al. 2022" in printed
    assert "prompts that the 10 rows of hh-rlhf, test have as well: 0, in 0 rows here" in printed
    main_cli(["check", "hh-rlhf", "--other", "hh-rlhf", "--limit", "5", "--json"])
    other = json.loads(capsys.readouterr().out)["other"]
    assert (other["rows"], other["prompts_in_both"], other["rows_here"]) == (20, 5, 5)


def test_a_recipes_stage_with_its_data_columns_and_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", max_position_embeddings=48)
    texts = ["w4 " * n for n in range(1, 61)]
    path = write(tmp_path / "rows.jsonl", [{"question": f"w5 w{4 + n}", "completion": texts[n]} for n in range(60)])
    (tmp_path / "mine.py").write_text(
        "from rlhf_recipes import Base, PPOStage, Recipe, Stage\n"
        f"base = Base({str(tmp_path / 'model')!r})\n"
        f"sft = Stage({path!r}, columns={{'prompt': 'question'}}, heldout=0.2, args={{'max_length': 20}})\n"
        f"ppo = PPOStage({path!r}, columns={{'prompt': 'question'}}, reward_funcs=('os:getcwd',),\n"
        "               args={'response_length': 46})\n"
        "recipe = Recipe('mine', base, sft=sft, ppo=ppo, tracker='none')\n"
    )

    def report(*words: str) -> Any:
        main_cli(["check", "--recipe", str(tmp_path / "mine.py"), "--json", *words])
        return json.loads(capsys.readouterr().out)

    sft = report()
    assert (sft["stage"], sft["max_length"], sft["columns"]) == ("sft", 20, {"prompt": "question"})
    # A prompt of 2 tokens, n + 1 words and the stop token fit into 20 for n = 0 to 16.
    assert (sft["rows"], sft["used"], sft["dropped"]) == (60, 17, {"too long": 43})
    assert sft["steps"] == math.ceil(3 * math.ceil(sft["train"] / 8)), "three epochs of batches of eight"
    assert report("--stage", "ppo")["max_length"] == 2  # what 46 tokens of response leave of the model's 48
    assert report("--max-length", "63")["used"] == 60
    main_cli(["check", path, "--columns", "prompt=question", "--model", str(tmp_path / "model"), "--json"])
    assert json.loads(capsys.readouterr().out)["max_length"] == 48  # below the 1,024 that is TRL's default
    error = error_of(capsys, ["check", "--recipe", str(tmp_path / "mine.py"), "--stage", "dpo"])
    assert "'mine' has no stage 'dpo'" in error


def test_long_texts_are_cut_in_the_middle_and_escaped() -> None:
    cut = escape("a" * 1000 + "\x07" + "b" * 1000, longest=100)
    assert cut == "a" * 50 + " [... 1,901 characters ...] " + "b" * 50
    assert escape("tab\t, bell\x07, \u202eleft, \U000e0001 tag, é, 漢") == (
        r"tab\t, bell\x07, \u202eleft, \U000e0001 tag, é, 漢"
    )


def test_large_json_is_said_to_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": str(n), "completion": "x"} for n in range(9)]))
    assert report_of("sft", str(path))["read_whole"] is None
    monkeypatch.setattr("rlhf_recipes.data.check.LARGE_JSON", 10)
    report = report_of("sft", str(path))
    console = Console(record=True, width=200)
    show_check(report, console)
    assert f"memory         {path} is read whole" in console.export_text()


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_memory_does_not_grow_with_the_rows() -> None:
    """A process of its own checks 10,100 rows and then ten times as many. Held, these would take over 75 MiB."""
    folder = ROOT / "tests" / "benchmarks"
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from check_rows import measure; import json; "
    code += "print(json.dumps([measure(10_000, None), measure(100_000, None)]))"
    environment = os.environ | {"PYTHONPATH": str(folder.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    few, many = json.loads(done.stdout.splitlines()[-1])
    assert (few["rows"], many["rows"]) == (10_100, 101_000) and many["duplicates"] == 1_000
    assert many["mib_peak"] - few["mib_peak"] < 25


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".jsonl", ".csv"])
def test_files_are_read_in_pieces(suffix: str, tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / f"rows{suffix}"
    prompts = [draw.randbytes(200).hex() for _ in range(20_000)]
    if suffix == ".parquet":
        pq.write_table(pa.table({"prompt": prompts}), path, row_group_size=len(prompts))
    elif suffix == ".csv":
        path.write_text("prompt\n" + "\n".join(prompts))
    else:
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    tracemalloc.start()
    arrow = [pa.total_allocated_bytes() for _ in read("ppo", Source(str(path)))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(arrow) == 20_000
    assert peak + max(arrow) - arrow[-1] < path.stat().st_size / 2


# --- Real data --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data and model in ../shared are absent")
def test_real_hh_rows() -> None:
    train, heldout = (str(SHARED / "data" / f"hh_base_{name}.jsonl.gz") for name in ("train90", "eval10"))
    report = report_of("reward", train, other=Source(heldout))
    assert (report["rows"], report["used"], report["prompts"]) == (4203, 4203, 4201)
    rows = [json.loads(line) for line in gzip.decompress(Path(train).read_bytes()).splitlines()]
    sizes = [tuple(len(row[side].strip()) for side in ("chosen", "rejected")) for row in rows]
    assert report["pairs"] == {
        "longer": sum(a > b for a, b in sizes),
        "shorter": sum(a < b for a, b in sizes),
        "same": sum(a == b for a, b in sizes),
    }
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in rows}) == 4203
    assert report["duplicates"]["rows"] == report["contradictions"]["pairs"] == 0
    assert (report["other"]["rows"], report["other"]["prompts_in_both"]) == (439, 0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data and model in ../shared are absent")
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_real_hh_rows_in_tokens(stage: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    set_chat_template(tokenizer, None)
    path = str(SHARED / "data" / "hh_base_eval10.jsonl.gz")
    wanted = prepare(stage, Stage(path), tokenizer, 512).report
    found = report_of(stage, path, tokenizer, 512)
    assert {key: found[key] for key in SAME} == {key: wanted[key] for key in SAME}
    assert found["first"][0]["parts"]["prompt"]["text"].startswith("<s>")
