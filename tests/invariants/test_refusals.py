"""Whatever is given to what reads: it has a result, or a ValueError of ours with something to say. Nothing else.

`EXAMPLES` inputs of each kind, the same ones each time; more of them (`make fuzz`) are drawn anew, by a seed that it
prints, and counted.
"""

import copy
import csv
import gzip
import io
import json
import os
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.paths import ROOT
from support.report_run import write_run
from support.rows import make_tokenizer

from rlhf_recipes import load, replace
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.read import read
from rlhf_recipes.data.rows import FORMATS
from rlhf_recipes.data.sources import FILES, SOURCES
from rlhf_recipes.data.tokens import render, set_chat_template
from rlhf_recipes.evaluate.models import Cache
from rlhf_recipes.evaluate.rewardbench import read_rewardbench
from rlhf_recipes.feedback.constitution import read_constitution
from rlhf_recipes.feedback.endpoint import _read_completion, _reported_probabilities, read_option
from rlhf_recipes.feedback.rows import read_judgements, read_samples
from rlhf_recipes.model.adapters import read_adapter_config
from rlhf_recipes.model.shared import read_bias
from rlhf_recipes.recipe.overrides import check_args, from_dict, parse_overrides, to_dict
from rlhf_recipes.recipe.overrides import settings as lines_of
from rlhf_recipes.recipe.values import Recipe, Source, Stage
from rlhf_recipes.records.manifest import Manifest
from rlhf_recipes.records.trust import foreign_code
from rlhf_recipes.report.write import write_report
from rlhf_recipes.stages.configure import CONFIGS
from rlhf_recipes.stages.reward.adapters import read_probes

DEFAULT = 25
EXAMPLES = int(os.environ.get("EXAMPLES", DEFAULT))
SECONDS = 20  # that one input may take, on a machine that has other things to do: more is a hang
PACKAGE = str(ROOT / "rlhf_recipes")

many = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == DEFAULT,
    database=None,
    deadline=timedelta(seconds=SECONDS),
    suppress_health_check=list(HealthCheck),
)
tried: Counter[str] = Counter()  # inputs of each kind, and of these those that had a result


def result_or_refusal(kind: str, read_it: Callable[[], Any]) -> Any:
    """What reading gives; None where it was refused as it should be."""
    tried[kind] += 1
    try:
        result = read_it()
    except ValueError as error:
        assert str(error).strip() and len(str(error)) < 5_000, str(error)[:5_000]
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert raised_in.startswith(PACKAGE), (
            f"a library's error, which the command line does not take for a user's: {error!r}"
        )
        return None
    tried[f"{kind}, with a result"] += 1
    return result


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    """Say how many inputs were tried, where they are many."""
    yield
    if EXAMPLES != DEFAULT:
        print("", *(f"{count:9,} {kind}" for kind, count in sorted(tried.items())), sep="\n")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)


# --- Values -----------------------------------------------------------------------------------------------------------

# Half of a surrogate pair, the end of a text in C, marks that turn the text around, the escape of a terminal.
letters = st.one_of(
    st.characters(exclude_categories=()), st.sampled_from("\ud800\0\u202e\ufeff\x1b\u2028\x85\r\n,\"'[{}=.:")
)
texts = st.text(letters, max_size=12)
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([2**63, 2**70, -1, 0, 1, 10**400, 1e308, True]), st.integers(-3, 10)
)
draws = st.randoms(use_true_random=False)
simple = st.one_of(st.none(), st.booleans(), numbers, texts)


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


values = st.one_of(
    st.recursive(
        simple, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
    ),
    st.builds(_nested, simple, st.integers(1, 900)),
)
talks = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": texts}),
    max_size=4,
)
words = st.sampled_from(["a", "b c", "question", "\n\nHuman: a\n\nAssistant:", " ", "</s>"])
said = st.one_of(words, words, talks, values)


def objects(columns: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that have some of these columns, and perhaps another, with cells that are often right."""
    cells = st.one_of(said, st.lists(said, max_size=4), st.lists(st.integers(1, 3), max_size=4), values)
    return st.dictionaries(st.sampled_from(columns) | texts, cells, max_size=7)


# --- Recipes ----------------------------------------------------------------------------------------------------------


def check_arguments(recipe: Recipe) -> Recipe:
    for stage, config in CONFIGS.items():
        if getattr(recipe, stage) is not None:
            check_args(stage, getattr(recipe, stage), config)
    return recipe


RECIPE = load("tiny")
KEYS = [line.partition("=")[0] for line in lines_of(RECIPE)]
literals = st.one_of(
    values.map(repr),
    texts,
    st.sampled_from(["none", "true", "1e400", "(1,)", "[[", "{1: 2}", "0x" + "f" * 5_000, "9" * 5_000]),
)
settings_words = st.lists(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(KEYS), literals),
        st.builds(
            "{}.{}={}".format, st.sampled_from(["base", "ppo", "rounds", "variants", "ptx", "dpo"]), texts, literals
        ),
        texts,
    ),
    max_size=3,
)


@many
@given(settings_words)
def test_settings(given_words: list[str]) -> None:
    changed = result_or_refusal("settings", lambda: check_arguments(replace(RECIPE, **parse_overrides(given_words))))
    if changed is not None:
        foreign_code(to_dict(changed))


def spoil(value: Any, rng: random.Random, other: Any) -> Any:
    """A JSON value with one part of it, somewhere, taken away or replaced by another value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {name: part for name, part in value.items() if name != key}
        kind = rng.random()
        return (
            rest
            if kind < 0.15
            else {**rest, str(other): value[key]}
            if kind < 0.25
            else {**rest, key: spoil(value[key], rng, other)}
        )
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], spoil(value[place], rng, other), *value[place + 1 :]]
    return other


@many
@given(draws, values, st.sampled_from(["tiny", "tiny-rounds", "overoptimization", "tiny-dpo"]))
def test_recipe_files(rng: random.Random, other: Any, name: str) -> None:
    given_values = spoil(json.loads(json.dumps(to_dict(load(name)))), rng, other)
    recipe = result_or_refusal("recipe.json", lambda: from_dict(given_values))
    if recipe is not None:
        foreign_code(to_dict(recipe))
        result_or_refusal("recipe.json, checked", lambda: check_arguments(recipe))


# --- Data -------------------------------------------------------------------------------------------------------------

TOKENIZER = make_tokenizer()
THEIRS = sorted(
    {column for named in SOURCES.values() for column in named.columns}
    | {c for columns, _ in FILES.values() for c in columns}
)
OURS = sorted(
    {column for formats in FORMATS.values() for columns in formats for column in columns}
    | {"margin", "weight", "source"}
)


def rows_file(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@many
@given(
    st.sampled_from(["sft", "reward", "ppo", "dpo", "ptx"]), st.lists(objects(OURS) | values, max_size=4), st.booleans()
)
def test_rows_of_stages(folder: Path, stage: Any, rows: list[Any], chat: bool) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b", "text": "t"}
    source = Stage(rows_file(folder, [good, *rows]), heldout=0.2, chat=chat)
    result_or_refusal("rows of stages", lambda: prepare(stage, source, TOKENIZER, 64))


@many
@given(
    st.sampled_from(["sft", "reward", "ppo"]),
    st.lists(objects(THEIRS), min_size=1, max_size=4),
    st.integers(0, len(THEIRS)),
)
def test_rows_of_named_sources(folder: Path, stage: Any, rows: list[Any], which: int) -> None:
    columns = [
        *(named.columns for named in SOURCES.values() if named.columns),
        *(columns for columns, _ in FILES.values()),
    ]
    needed = columns[which % len(columns)]
    rows = [dict.fromkeys(needed) | row for row in rows]
    result_or_refusal("rows of named sources", lambda: prepare(stage, Stage(rows_file(folder, rows)), TOKENIZER, 64))


PAIRS = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}]


def whole_file(kind: str) -> bytes:
    """A file of two rows."""
    if kind == "parquet":
        stream = io.BytesIO()
        days = pa.array([0, 1], pa.date32())
        pq.write_table(pa.table({**pa.Table.from_pylist(PAIRS).to_pydict(), "day": days}), stream)
        return stream.getvalue()
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(PAIRS[0]))
        writer.writeheader()
        writer.writerows(PAIRS)
        return text.getvalue().encode()
    return json.dumps(PAIRS).encode() if kind == "json" else "".join(json.dumps(row) + "\n" for row in PAIRS).encode()


FILES_OF_TWO = {kind: whole_file(kind) for kind in ("jsonl", "json", "csv", "parquet")}
FILES_OF_TWO |= {f"{kind}.gz": gzip.compress(data, mtime=0) for kind, data in FILES_OF_TWO.items()}
damage = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6), st.binary(max_size=6)), max_size=4)


def damaged(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """Bytes with some cut out and others put in, each at a place given as a share of the whole."""
    for share, cut, put in changes:
        place = int(share * len(data))
        data = data[:place] + put + data[place + cut :]
    return data


@many
@given(st.sampled_from(sorted(FILES_OF_TWO)), damage, st.binary(max_size=40) | st.none())
def test_bytes_of_files(folder: Path, kind: str, changes: list[tuple[float, int, bytes]], other: bytes | None) -> None:
    path = folder / f"bytes.{kind}"
    path.write_bytes(damaged(FILES_OF_TWO[kind], changes) if other is None else other)
    result_or_refusal(f"bytes of {kind}", lambda: list(read("reward", Source(str(path)))))


# --- Chat templates ---------------------------------------------------------------------------------------------------

PIECES = """
    {% for message in messages %} | {% endfor %} | {{ message.content }} | {{ message['role'] }} | {{ bos_token }}
    {{ messages[0] + 1 }} | {{ 1 / 0 }} | {{ messages[9].content }} | {{ message.content * 10 }} | {{ undefined() }}
    {% if add_generation_prompt %} | {% endif %} | {{ raise_exception('no') }} | {{ 'a' + 1 }} | {% include 'x' %}
    {{ strftime_now('%Y') }} | {{ strftime_now(1) }} | {{ ''.__class__ }} | {{ range(10**9) }} | {{ 10 ** 10 }}
    <|im_end|> | </s> | {% macro f() %}{{ f() }}{% endmacro %}{{ f() }} | {{ {}.x.y }} | {{ (1, 2)['a'] }}
    {{ 'a' % 1 }} | {{ message.content.index('x') }} | {% set x = messages.append(1) %} | {{ '{}'.format() }}
"""
pieces = st.sampled_from([piece.strip() for line in PIECES.strip().splitlines() for piece in line.split(" | ")])


@many
@given(st.lists(pieces | texts, max_size=6).map("".join), talks)
def test_chat_templates(folder: Path, template: str, messages: list[dict[str, str]]) -> None:
    path = folder / "template.jinja"
    path.write_bytes(template.encode("utf-8", "surrogatepass"))
    tokenizer = copy.copy(TOKENIZER)
    if result_or_refusal("chat templates", lambda: set_chat_template(tokenizer, str(path)) is None):
        result_or_refusal("chat templates, rendered", lambda: render(tokenizer, messages, add_generation_prompt=True))


# --- Judgements -------------------------------------------------------------------------------------------------------

LABEL = {"id": "s", "prompt": "p", "responses": ["a", "b"], "ranking": [1, 2], "labeler": "Ann"}
LABEL |= {"order": [0, 1], "seconds": 1.5}


@many
@given(st.lists(st.tuples(draws, values), max_size=3), st.booleans())
def test_labels(folder: Path, changes: list[tuple[random.Random, Any]], samples: bool) -> None:
    path = Path(rows_file(folder, [LABEL, *(spoil(LABEL, rng, other) for rng, other in changes)]))
    kind, reads = ("samples", read_samples) if samples else ("labels", lambda path: read_judgements([path]))
    result_or_refusal(kind, lambda: reads(path))


answers = st.lists(
    st.sampled_from(
        ["A", "B", "the", "answer", "is", ":", " ", "**", "\n", ".", "better", "<think>", "</think>", "(", "]", "-"]
    )
    | texts,
    max_size=60,
).map("".join)


@many
@given(answers | st.builds(lambda text, times: text * times, answers, st.integers(1, 200)))
def test_answers_of_judges(text: str) -> None:
    tried["answers of judges"] += 1
    option, _ = read_option(text, ("A", "B"))
    assert option in ("A", "B", None)


def as_response(value: Any) -> Any:
    """JSON as the openai package gives it: an object's keys are attributes."""
    if isinstance(value, dict):
        return SimpleNamespace(**{str(key): as_response(part) for key, part in value.items()})
    return [as_response(part) for part in value] if isinstance(value, list) else value


TOKEN = {
    "token": "A",
    "logprob": -0.1,
    "top_logprobs": [{"token": "A", "logprob": -0.1}, {"token": "B", "logprob": -2.0}],
}
RESPONSE = {
    "choices": [{"message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": [TOKEN]}}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


@many
@given(draws, values, values)
def test_responses_of_endpoints(rng: random.Random, other: Any, another: Any) -> None:
    tried["responses of endpoints"] += 1
    response = as_response(spoil(spoil(RESPONSE, rng, other), rng, another))
    completion = _read_completion(response)
    assert completion.text is None or isinstance(completion.text, str)
    _reported_probabilities(response, ("A", "B"), "A", True)


@many
@given(
    st.lists(
        st.sampled_from(["- ", "principle: ", "a", "\n", ":", "{", "&x ", "*x", "!!python/object:os.system "]) | texts,
        max_size=9,
    ).map("".join)
)
def test_constitutions(folder: Path, text: str) -> None:
    for suffix in (".yaml", ".txt"):
        path = (folder / "constitution").with_suffix(suffix)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        result_or_refusal("constitutions", lambda path=path: read_constitution(path))


BENCH = {"id": "ref:1", "subset": "Ties", "prompt": "p", "chosen": ["a"], "rejected": ["b"], "num_correct": 1}


@many
@given(st.lists(st.tuples(draws, values), max_size=3))
def test_rewardbench(folder: Path, changes: list[tuple[random.Random, Any]]) -> None:
    tie = BENCH | {"id": "tied:1", "chosen": ["a", "b"], "num_correct": 2}
    path = Path(
        rows_file(folder, [BENCH, tie, *(spoil(BENCH | {"subset": "Math"}, rng, other) for rng, other in changes)])
    )
    result_or_refusal("RewardBench", lambda: read_rewardbench(path))


# --- Run folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(folder: Path) -> Path:
    return write_run(folder / "run")


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alpha_pattern": {"q": 1}}
STAGE = {"state": "done", "seconds": 1.5, "peak_memory_mib": 2.5, "data": {"rows": 3}, "results": {"card": None}}
# A file beside an adapter or in a run folder, what it holds, and what reads it.
PARTS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "adapter_config.json": (LORA, read_adapter_config),
    "probe.json": ({"input_ids": [[1, 2], [3]], "scores": [0.5, -1.0]}, read_probes),
    "score_bias.json": ({"bias": 0.5, "demonstrations": 3}, read_bias),
    "manifest.json": ({"stages": {"sft": STAGE}, "versions": {}}, Manifest.read),
    "cache.jsonl": ({"key": "a", "value": [1, 2]}, lambda folder: Cache(folder / "cache.jsonl")),
}


@many
@given(draws, values, st.sampled_from(sorted(PARTS)))
def test_parts_of_run_folders(folder: Path, rng: random.Random, other: Any, name: str) -> None:
    written, reads = PARTS[name]
    (folder / name).write_text(json.dumps(spoil(written, rng, other)) + "\n")
    save_file({"a": np.ones(2)}, folder / "adapter_model.safetensors")
    result_or_refusal(name, lambda: reads(folder))


@settings(many, max_examples=max(3, EXAMPLES // 20))  # a report takes a fifth of a second
@given(draws, values, st.sampled_from(["manifest.json", "metrics.jsonl", "samples.jsonl", "recipe.json"]))
def test_reports_of_run_folders(run_folder: Path, rng: random.Random, other: Any, name: str) -> None:
    written = (run_folder / name).read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    place = rng.randrange(len(rows))
    rows[place] = spoil(rows[place], rng, other)
    (run_folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        result_or_refusal(f"reports with a spoiled {name}", lambda: write_report([run_folder], run_folder / "r.html"))
    finally:
        (run_folder / name).write_text(written)
