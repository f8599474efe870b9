"""Rows that no sane writer writes: each is refused, or taken, with the file and the row in one sentence."""

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import make_tokenizer

from rlhf_recipes.data.prepare import Prepared, load_rows, prepare, read_judged
from rlhf_recipes.data.sources import conversion
from rlhf_recipes.data.tokens import render
from rlhf_recipes.recipe.lookup import holds_secret
from rlhf_recipes.recipe.values import Source, Stage
from rlhf_recipes.records.files import Journal, read_json, read_rows

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * 5_000


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def prepared(stage: Any, data: str) -> Prepared:
    return prepare(stage, Stage(data, heldout=0.0), make_tokenizer(), None)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize(("cell", "said"), [(DEEP, "nested too deep"), (LONG, "4300")])
def test_json_that_python_cannot_read_is_named_with_its_line(tmp_path: Path, name: str, cell: str, said: str) -> None:
    path, lines = tmp_path / name, [json.dumps(PAIR), f'{{"prompt": {cell}}}']
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        written(path, *lines)
    with pytest.raises(ValueError, match=rf"reward\.data: cannot read .*{name}: line 2.*{said}"):
        load_rows("reward", Source(str(path)))
    written(tmp_path / "list.json", f"[{cell}]")
    with pytest.raises(ValueError, match=rf"cannot read .*list\.json: .*{said}"):
        load_rows("reward", Source(str(tmp_path / "list.json")))


@pytest.mark.parametrize("cell", [DEEP, f"[{LONG}]"])
def test_a_cell_of_a_table_that_is_no_list_is_a_bad_row(tmp_path: Path, cell: str) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "ranking": "[1, 2]"}
    data = written(tmp_path / "rows.jsonl", *(json.dumps(row) for row in (good, {**good, "ranking": cell})))
    _, bad, _ = load_rows("reward", Source(data))
    assert [number for number, _ in bad] == [2] and len(str(bad[0][1])) < 400


@pytest.mark.parametrize("margin", ["1" + "0" * 400, "NaN", "Infinity", '"' + "1" * 1000 + '"', "[]", "true"])
def test_a_margin_that_is_no_number_is_a_bad_row(tmp_path: Path, margin: str) -> None:
    row = f'{json.dumps(PAIR)[:-1]}, "margin": {margin}}}'
    rows = prepared("reward", written(tmp_path / "rows.jsonl", json.dumps({**PAIR, "margin": 1}), row))
    assert rows.report["dropped"] == ({} if margin == "true" else {"wrong type": 1})
    assert all(len(line) < 400 for line in rows.report["examples"])


NESTED = json.loads("[" * 400 + "]" * 400)  # which Arrow takes, and `datasets` does not


@pytest.mark.parametrize("cell", ["\ud800", {"\ud800": 1}, 2**70, NESTED])
def test_a_cell_that_no_table_can_hold_is_named_with_its_row(tmp_path: Path, cell: Any) -> None:
    rows = [{"prompt": "a", "id": None}, {"prompt": "b", "id": cell}]
    data = written(tmp_path / "rows.jsonl", *map(json.dumps, rows))
    with pytest.raises(ValueError, match=r"the column 'id' of .*rows\.jsonl, row 2 mixes types"):
        prepared("ppo", data)


def test_a_table_of_dates_and_bytes_becomes_json(tmp_path: Path) -> None:
    """Samples and labels, which carry the source's columns, are JSON."""
    when = datetime.datetime(2026, 3, 31, 12)
    odd = {"day": when.date(), "at": when, "cost": decimal.Decimal("1.5"), "raw": b"\xff", "in": [{"day": when.date()}]}
    rows = [{"id": "s", "prompt": "p", "responses": ["a", "b"], **odd}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (row,) = read_judged("rank", tmp_path / "rows.parquet")
    Journal(tmp_path / "labels.jsonl").append(row)
    assert row["day"] == "2026-03-31" and row["cost"] == "1.5" and row["in"] == [{"day": "2026-03-31"}]
    assert row["at"] == "2026-03-31 12:00:00" and row["responses"] == ["a", "b"]


@pytest.mark.parametrize("column", [pa.array([10**7], pa.date32()), pa.array([1], pa.timestamp("s", "Mars/Olympus"))])
def test_days_and_zones_that_there_are_not_are_refused(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"prompt": pa.array(["p"]), "day": column}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"ppo\.data: cannot read .*rows\.parquet: it holds a day or a time zone"):
        load_rows("ppo", Source(str(tmp_path / "rows.parquet")))


def message(id: str, parent: str | None, role: str = "prompter", rank: int | None = None) -> dict[str, Any]:
    return {"message_id": id, "parent_id": parent, "role": role, "text": id, "rank": rank}


def test_messages_that_answer_themselves_end() -> None:
    circle = [message("a", "b"), message("b", "a")]
    answers = [message(f"r{rank}", "a", "assistant", rank) for rank in (0, 1)]
    strange = [
        {"message_id": 1},
        {},
        "text",
        {**message("c", None), "role": "tool"},
        {**message("d", None), "rank": []},
    ]
    assert list(conversion("x", "oasst1")([*circle, *answers, *strange])) == strange


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("alpacaeval", {"instruction": "i", "output_1": "a", "output_2": "b", "preference": 10**400}),
        ("helpsteer3", {"context": [], "response1": "a", "response2": "b", "overall_preference": "much"}),
        ("helpsteer3", {"context": [], "response1": "a", "response2": "b", "overall_preference": float("inf")}),
    ],
)
def test_a_row_that_no_conversion_takes_stays_as_it_is(name: str, row: dict[str, Any]) -> None:
    assert list(conversion("x", name)([row])) == [row]


@pytest.mark.parametrize("text", [DEEP, LONG])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        read_json(tmp_path / "manifest.json")
    (tmp_path / "rows.jsonl").write_text(f"{{}}\n{text}\n{{}}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: "):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@example.com/rows.jsonl",
        "ftp://secret@example.com/rows.jsonl?a=b",
        *(f"https://example.com/rows.jsonl?a=b&{key}=secret" for key in ("api_key", "Token", "X-Amz-Signature", "sig")),
    ],
)
def test_a_url_with_a_secret_is_refused_without_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"example\.com/rows\.jsonl.* is given with a name or password") as refused:
        load_rows("sft", Source(url))
    assert "secret" not in str(refused.value)
    assert not holds_secret("https://example.com/rows.jsonl?keyword=x&author=y&token=") and not holds_secret("?key=x")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.csv.gz"])
def test_a_line_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("rlhf_recipes.data.read.LONGEST_LINE", 10_000)
    bomb = b"prompt" + b" " * 10_000_000  # packed, ten thousand bytes
    (tmp_path / name).write_bytes(gzip.compress(bomb) if name.endswith(".gz") else bomb)
    with pytest.raises(ValueError, match=rf"ppo\.data: cannot read .*{name}: a line is longer than 10,000 characters"):
        load_rows("ppo", Source(str(tmp_path / name)))


def test_a_list_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.data.read.LONGEST_LIST", 10_000)
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(b"[" + b"0, " * 10_000_000 + b"0]"))
    with pytest.raises(ValueError, match=r"ppo\.data: cannot read .*rows\.json\.gz: a list of more than 10,000 char"):
        load_rows("ppo", Source(str(tmp_path / "rows.json.gz")))


def test_a_list_of_more_values_than_fit_is_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_recipes.data.read.most_bytes", lambda: 1_000_000)
    (tmp_path / "rows.json").write_text("[" + "[]," * 50_000 + "[]]")  # 150 kB, and of Python's objects 4 MB
    with pytest.raises(
        ValueError, match=r"rows\.json: a list that would fill half of the memory: write it as JSON lin"
    ):
        load_rows("ppo", Source(str(tmp_path / "rows.json")))
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a" * 500_000}]))
    assert len(load_rows("ppo", Source(str(tmp_path / "rows.json")))[0]) == 1


def test_a_row_of_endless_lines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.data.read.LONGEST_LINE", 10_000)
    short = "prompt\n" + '"a\nb"\n' * 10_000  # of which each row is short
    written(tmp_path / "rows.csv", short)
    assert len(load_rows("ppo", Source(str(tmp_path / "rows.csv")))[0]) == 10_000
    (tmp_path / "rows.csv").write_text('prompt\n"' + 'x\n","' * 10_000)
    with pytest.raises(ValueError, match=r"ppo\.data: cannot read .*rows\.csv: a row is longer than 10,000 characters"):
        load_rows("ppo", Source(str(tmp_path / "rows.csv")))


@pytest.mark.parametrize("limit", [None, 900])
def test_rows_that_would_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """However short they are: a file of 250 kB may hold a hundred million."""
    data = written(tmp_path / "rows.jsonl", *(json.dumps({"prompt": f"p{n}"}) for n in range(1000)))
    monkeypatch.setattr("rlhf_recipes.data.kept.most_bytes", lambda: 1_000_000)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: its rows take more than half of this machine's memory \(0\.0 GB\)"
    ):
        load_rows("ppo", Source(data, limit=limit))
    assert len(load_rows("ppo", Source(data, limit=500))[0]) == 500


def test_messages_that_are_held_for_their_trees_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.data.kept.most_bytes", lambda: 100_000)
    for name, row in {"oasst1": message("a", None), "alpacaeval": {"instruction": "i"}}.items():
        with pytest.raises(ValueError, match=f"{name}: its rows take more than half"):
            list(conversion("x", name)(dict(row) for _ in range(1_000)))


@pytest.mark.long
def test_ten_thousand_columns_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", **{f"column {m}": m for m in range(10_000)}} for n in range(2)]
    data = prepared("ppo", written(tmp_path / "rows.jsonl", *map(json.dumps, rows)))
    assert len(data.train) == 2 and len(data.train.column_names) == 10_002


def test_letters_that_are_no_words_stay_as_they_are(tmp_path: Path) -> None:
    texts = [
        "nul \0 nul",
        "\u202ehidden",
        "\x1b[31mred",
        "\ufeffmark",
        "a\r\nb\rc\u2028d",
        "👩\u200d👩\u200d👧",
        "e\u0301",
    ]
    data = written(tmp_path / "rows.jsonl", *(json.dumps({"prompt": text}) for text in texts))
    assert prepared("ppo", data).train["prompt"][:] == texts


def test_texts_where_messages_belong_are_bad_rows(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = written(tmp_path / "rows.jsonl", *(json.dumps({"messages": cell}) for cell in (talk, "Human: a", [], 1)))
    assert prepared("sft", data).report["dropped"] == {"wrong type": 2, "missing field": 1}
    strange = {**message("a", None), "role": []}
    assert list(conversion("x", "oasst1")([strange])) == [strange]


def test_a_row_of_a_run_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "samples.jsonl").open("wb") as file:
        file.truncate(6 * 2**30)  # without a block on the disk
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1: longer than 67,108,864 bytes"):
        read_rows(tmp_path / "samples.jsonl")


def test_a_template_that_would_fill_the_memory_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 'a' * (10 ** 18) }}"
    with pytest.raises(ValueError, match="The chat template refuses these messages"):
        render(tokenizer, [{"role": "user", "content": "a"}])
