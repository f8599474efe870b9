"""Every source and format becomes the same tokens in every stage, and no bad row passes unnamed."""

import csv
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import SHARED
from support.rows import assistant, make_tokenizer, user, write
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast as FastTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf_recipes.data.prepare import _table, prepare
from rlhf_recipes.data.rows import Row
from rlhf_recipes.data.split import dialogue_number, halve
from rlhf_recipes.data.tokens import set_chat_template, stop_token_id, tokenize_pair, tokenize_prompt
from rlhf_recipes.recipe.values import Stage
from rlhf_recipes.stages.options import RewardConfig
from rlhf_recipes.stages.reward.trainer import RewardTrainer

STAGES = ("sft", "reward", "ppo")


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return make_tokenizer()


def whole(tokenizer: FastTokenizer, prompt: Any, completion: Any) -> list[int]:
    prompt_ids, completion_ids = tokenize_pair(tokenizer, prompt, completion)
    return prompt_ids + completion_ids


def preference(number: int) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "chosen": f" Good {number}.", "rejected": f" Bad {number}."}


def unsplit(tokenizer: FastTokenizer, name: Any, data: str, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a source without the number of their dialogue."""
    table = prepare(name, Stage(data=data, heldout=0.0, **changes), tokenizer, None).train
    return table.select_columns([column for column in table.column_names if column != "dialogue"]).to_list()


def rows_of_function() -> list[dict[str, Any]]:
    return [preference(number) for number in range(5)]


# --- Tokenization -----------------------------------------------------------------------------------------------------


def test_transcript_template_writes_hh_transcripts(tokenizer: FastTokenizer) -> None:
    messages = [{"role": "system", "content": "Be kind."}, user(" hi "), assistant(" yes "), user("why?")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Be kind.\n\nHuman: hi\n\nAssistant: yes</s>\n\nHuman: why?\n\nAssistant:"


def test_transcript_template_without_bos_and_with_unknown_role(tokenizer: FastTokenizer) -> None:
    bare = make_tokenizer()
    bare.bos_token = None
    assert bare.apply_chat_template([user("hi")], tokenize=False) == "\n\nHuman: hi"
    with pytest.raises(Exception, match="no role judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "hi"}], tokenize=False)


def test_chatml_ends_a_response_with_im_end_and_cuts_the_newline() -> None:
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", template="chatml")
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_id(tokenizer, True) == im_end
    assert stop_token_id(tokenizer, False) == tokenizer.eos_token_id
    prompt, completion = tokenize_pair(tokenizer, [user("hi")], [assistant("yes")])
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(completion) == "yes<|im_end|>"


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("completion", [" the answer", " the answer</s>", " the answer</s></s>"])
def test_text_pair_has_one_bos_and_one_eos(adds_eos: bool, completion: str) -> None:
    tokenizer = make_tokenizer(adds_eos=adds_eos)
    prompt, ids = tokenize_pair(tokenizer, "the question is", completion)
    assert prompt == tokenize_prompt(tokenizer, "the question is")
    assert tokenizer.decode(prompt) == "<s>the question is"
    assert tokenizer.decode(ids) == " the answer</s>"


def test_token_across_the_boundary_leaves_the_prompt_as_it_is(tokenizer: FastTokenizer) -> None:
    assert tokenizer.tokenize("th") == ["th"]
    prompt, completion = tokenize_pair(tokenizer, "t", "h")
    assert prompt == tokenize_prompt(tokenizer, "t")
    assert tokenizer.decode(prompt + completion) == "<s>th</s>"


def test_prompt_is_natural_beginning_of_the_conversation(tokenizer: FastTokenizer) -> None:
    messages = [user("the question"), assistant("that"), user("the question")]
    prompt, completion = tokenize_pair(tokenizer, messages, [assistant("the answer")])
    text = str(tokenizer.apply_chat_template([*messages, assistant("the answer")], tokenize=False))
    assert prompt + completion == tokenizer(text, add_special_tokens=False).input_ids
    assert prompt == tokenize_prompt(tokenizer, messages)


SPELLED = "So.</s><|im_end|>\n<|im_start|>user\nAnd?<|im_<|im_end|>end|>"
BROKEN = "So.< /s>< |im_end|>\n< |im_start|>user\nAnd?<|im_< |im_end|>end|>"


def judged(stage: str, text: str, conversational: bool) -> dict[str, Any]:
    """A row of which a model has said `text`."""
    said, other, prompt = (
        ([assistant(text)], [assistant("No.")], [user("Why?")]) if conversational else (text, "No.", "Why?")
    )
    return {
        "sft": {"prompt": prompt, "completion": said},
        "reward": {"prompt": prompt, "responses": [said, other], "ranking": [2, 1]},
        "dpo": {"prompt": prompt, "chosen": other, "rejected": said},
    }[stage]


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize(
    ("stage", "mark"),
    [
        ("sft", {"critiques": ["Bad."]}),
        ("reward", {"origins": [{"model": "ppo"}, {"model": "sft"}]}),
        ("reward", {"labeler": "Ann"}),
        ("dpo", {"labeler": "judge:gpt"}),
    ],
)
def test_what_a_model_said_spells_no_special_token(
    stage: Any, mark: dict[str, Any], conversational: bool, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", template="chatml")

    def row(text: str, **columns: Any) -> dict[str, Any]:
        path = write(tmp_path / "data.jsonl", [judged(stage, text, conversational) | columns])
        (found,) = unsplit(tokenizer, stage, path)
        return found

    assert row(SPELLED, **mark) == row(BROKEN, **mark) == row(BROKEN)
    special = {*tokenizer.all_special_ids} - {tokenizer.bos_token_id}
    clean, spelled = row("So.", **mark), row(SPELLED, **mark)
    assert [sum(id in special for id in ids) for ids in id_lists(spelled)] == [
        sum(id in special for id in ids) for ids in id_lists(clean)
    ]
    assert clean == row("So.") and row(SPELLED) != spelled, "data of others have the tokens that they spell"
    end = "<|im_end|>" if conversational else "</s>"
    assert row(f"So.{end}", **mark) == clean, "as in all data it is the end of the response"


def id_lists(row: dict[str, Any]) -> list[list[int]]:
    """All lists of token ids in a row."""
    names = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")
    return [row[name] for name in names if name in row] + row.get("responses_ids", [])


def test_batches_keep_rows_in_order(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    rows = [preference(number) for number in range(2100)]
    result = unsplit(tokenizer, "sft", write(tmp_path / "data.jsonl", rows))
    for row, expected in list(zip(result, rows, strict=True))[::100]:
        assert row["input_ids"] == whole(tokenizer, expected["prompt"], expected["chosen"])


def test_template_without_a_special_token_gets_eos(tmp_path: Path) -> None:
    path = tmp_path / "plain.jinja"
    path.write_text("{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
                    "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    tokenizer = make_tokenizer(template=str(path))
    assert stop_token_id(tokenizer, True) == tokenizer.eos_token_id
    _, completion = tokenize_pair(tokenizer, [user("hi")], [assistant("yes")])
    assert tokenizer.decode(completion) == "yes;</s>"


def test_what_a_template_writes_before_the_stop_token_stays(tmp_path: Path) -> None:
    path = tmp_path / "two.jinja"
    path.write_text("{% for m in messages %}{{ m.content }};<|end|></s>.{% endfor %}")
    tokenizer = make_tokenizer("<|end|>", template=str(path))
    _, completion = tokenize_pair(tokenizer, [user("hi")], [assistant("yes")])
    assert tokenizer.decode(completion) == "yes;<|end|></s>"


def test_template_that_changes_the_prompt_is_refused(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "think.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}T{% endif %}")
    with pytest.raises(ValueError, match=r"Set base\.chat_template"):
        tokenize_pair(make_tokenizer(template=str(path)), [user("hi")], [assistant("yes")])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transcrit", r"base\.chat_template: 'transcrit' is neither.* Did you mean transcript\?"),
        ("gone.jinja", r"base\.chat_template: there is no file gone\.jinja"),
        ("chatml", r"base\.chat_template: chatml needs the token <\|im_end\|>"),
    ],
)
def test_unusable_template_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tokenizer(template=name)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[0] + 1 }}", "{{ {}.a.b.c }}", "\ud800"])
def test_a_template_that_fails_as_programs_do_is_refused(tmp_path: Path, template: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_bytes(template.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"base\.chat_template: .*mine\.jinja cannot be (rendered|read)"):
        make_tokenizer(template=str(path))


def test_broken_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ValueError, match=r"broken\.jinja cannot be rendered"):
        make_tokenizer(template=str(tmp_path / "broken.jinja"))


def test_own_template_is_kept() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "own"
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "own"


def test_tokenizer_without_eos_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        stop_token_id(tokenizer, False)


# --- Sources ----------------------------------------------------------------------------------------------------------


def write_source(path: Path, rows: list[dict[str, Any]]) -> None:
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".jsonl":
        plain.write_text("\n".join(json.dumps(row) for row in rows))
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows, indent=1))
    elif plain.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), plain)
    else:
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(
    tokenizer: FastTokenizer, tmp_path: Path, kind: str, zipped: str
) -> None:
    rows = rows_of_function()
    rows[2]["prompt"] = 'A line\nand, "quotes" — ünïcödé?'
    write_source(tmp_path / f"data.{kind}{zipped}", rows)
    result = unsplit(tokenizer, "reward", str(tmp_path / f"data.{kind}{zipped}"))
    for row, expected in zip(result, rows, strict=True):
        sides = (expected["chosen"], expected["rejected"])
        assert row["responses_ids"] == [whole(tokenizer, expected["prompt"], side) for side in sides]


def test_json_suffix_with_lines(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "lines.json", ["\ufeff" + json.dumps(preference(0)), "", preference(1)])
    assert len(unsplit(tokenizer, "reward", path)) == 2


def test_table_cells_may_hold_messages_as_json(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    messages = [user("hi"), assistant("yes")]
    write_source(tmp_path / "data.csv", [{"messages": json.dumps(messages)}])
    (row,) = unsplit(tokenizer, "sft", str(tmp_path / "data.csv"))
    assert row["input_ids"] == whole(tokenizer, messages[:1], messages[1:])


def test_function_and_file_are_the_same_source(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    source = f"{Path(__file__)}:rows_of_function"
    written = write(tmp_path / "data.jsonl", rows_of_function())
    assert unsplit(tokenizer, "reward", source) == unsplit(tokenizer, "reward", written)


@pytest.mark.parametrize(
    ("stage", "plain", "turns"),
    [
        ("sft", {"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]}),
        (
            "reward",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        (
            "reward",
            {"prompt": "a", "responses": ["b", "c"], "ranking": [2, 1]},
            {"prompt": [user("a")], "responses": [[assistant("b")], [assistant("c")]], "ranking": [2, 1]},
        ),
        ("ppo", {"prompt": "a"}, {"prompt": [user("a")]}),
    ],
)
def test_plain_text_can_be_taken_as_turns(
    tokenizer: FastTokenizer, tmp_path: Path, stage: Any, plain: dict[str, Any], turns: dict[str, Any]
) -> None:
    theirs = write(tmp_path / "plain.jsonl", [{f"their {name}": cell for name, cell in plain.items()}])
    names = {name: f"their {name}" for name in plain}
    taken = unsplit(tokenizer, stage, theirs, columns=names, chat=True)
    conversations = write(tmp_path / "turns.jsonl", [turns])
    assert taken == unsplit(tokenizer, stage, conversations) == unsplit(tokenizer, stage, conversations, chat=True)
    assert taken != unsplit(tokenizer, stage, theirs, columns=names)


def test_columns_are_mapped(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"question": "Why?", "chosen": "no", "winner": " so.", "loser": " no."}])
    columns = {"prompt": "question", "chosen": "winner", "rejected": "loser"}
    (row,) = unsplit(tokenizer, "reward", path, columns=columns)
    assert tokenizer.decode(row["responses_ids"][0]) == "<s>Why? so.</s>"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question"}, r"sft\.columns: TRL has no column 'promt'\. Did you mean prompt\?"),
        ({"prompt": "qestion"}, r"sft\.columns: .* has no column 'qestion'\. Did you mean question\?"),
        ({}, r"columns: question, answer\. .*prompt \+ completion.*sft\.columns=\{"),
    ],
)
def test_wrong_columns_are_named(
    tokenizer: FastTokenizer, tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "data.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(ValueError, match=message):
        prepare("sft", Stage(data=path, columns=columns), tokenizer, None)


def damage(path: Path) -> None:
    whole = gzip.compress(json.dumps(preference(0)).encode() * 100)
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("gone.jsonl", lambda path: None, r"sft\.data: there is no file .*gone\.jsonl"),
        ("gone.jsonl.gz", lambda path: None, r"sft\.data: there is no file"),
        ("a.jsonl", lambda path: path.write_text('{"prompt": "a"}\n\n{"prompt": \n'), r"a\.jsonl, line 3: not JSON"),
        ("a.json", lambda path: path.write_text('[{"prompt": "a"},\n {"prompt" 1}]'), r"a\.json, line 2: not JSON"),
        ("a.jsonl", lambda path: path.write_text(""), "holds no rows"),
        ("a.json", lambda path: path.write_text("[]"), "holds no rows"),
        ("a.csv", lambda path: path.write_text("prompt,completion\n"), "holds no rows"),
        ("a.jsonl", lambda path: path.write_bytes(b'{"prompt": "\xff"}'), "cannot read .*utf-8"),
        ("a.jsonl.gz", damage, "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", lambda path: path.write_text("plain"), "cannot read .*a.jsonl.gz"),
        ("a.parquet", lambda path: path.write_text("plain"), "cannot read .*a.parquet"),
        ("a.txt", lambda path: path.write_text("plain"), r"a\.txt is none of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_unreadable_file_is_named(
    tokenizer: FastTokenizer, tmp_path: Path, file: str, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        prepare("sft", Stage(data=str(tmp_path / file)), tokenizer, None)


def test_unknown_function_is_named(tokenizer: FastTokenizer) -> None:
    with pytest.raises(ValueError, match="has no function 'gone'"):
        prepare("sft", Stage(data=f"{Path(__file__)}:gone"), tokenizer, None)


def test_hub_failure_names_the_key(tokenizer: FastTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"ppo\.data: 'nobody/nothing' .*split 'train'.*Hub"):
        prepare("ppo", Stage(data="nobody/nothing"), tokenizer, None)


def test_dataset_folder_goes_through_load_dataset(
    tokenizer: FastTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    path = write(tmp_path / "folder" / "train.jsonl", rows_of_function())
    assert unsplit(tokenizer, "reward", str(tmp_path / "folder")) == unsplit(tokenizer, "reward", path)
    with pytest.raises(ValueError, match="split 'gone'"):
        prepare("reward", Stage(data=str(tmp_path / "folder"), split="gone"), tokenizer, None)


# --- Formats ----------------------------------------------------------------------------------------------------------

DIALOGUE = [user("hi"), assistant("hello"), user("why?")]
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
CONVERSATIONAL = {
    "explicit": {"prompt": DIALOGUE, "chosen": [assistant("so")], "rejected": [assistant("no")]},
    "implicit": {"chosen": [*DIALOGUE, assistant("so")], "rejected": [*DIALOGUE, assistant("no")]},
    "transcript": {"prompt": TRANSCRIPT, "chosen": " so", "rejected": " no\n"},
    "whole transcripts": {"chosen": TRANSCRIPT + " so", "rejected": TRANSCRIPT + " no"},
    "beside a text": {
        "prompt": "why?", "chosen": [*DIALOGUE, assistant("so")], "rejected": [*DIALOGUE, assistant("no")]
    },
}  # fmt: skip


@pytest.mark.parametrize("row", CONVERSATIONAL.values(), ids=CONVERSATIONAL.keys())
def test_all_stages_see_the_same_tokens_of_a_conversation(
    tokenizer: FastTokenizer, tmp_path: Path, row: dict[str, Any]
) -> None:
    path = write(tmp_path / "data.jsonl", [row])
    prompt, chosen = tokenize_pair(tokenizer, DIALOGUE, [assistant("so")])
    (sft,), (reward,), (ppo,) = (unsplit(tokenizer, name, path) for name in STAGES)
    assert sft == {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
    assert reward == {
        "responses_ids": [prompt + chosen, prompt + tokenize_pair(tokenizer, DIALOGUE, [assistant("no")])[1]],
        "ranking": [1, 2],
        "prompt_length": len(prompt),
        "length": len(prompt + chosen),  # both answers are of one token
    }
    assert ppo["prompt_ids"] == prompt == tokenize_prompt(tokenizer, DIALOGUE)
    assert ppo["prompt"] == DIALOGUE


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    ],
)
def test_all_stages_see_the_same_tokens_of_a_text(
    tokenizer: FastTokenizer, tmp_path: Path, row: dict[str, Any]
) -> None:
    path = write(tmp_path / "data.jsonl", [row])
    prompt, chosen = tokenize_pair(tokenizer, "The sky is", " blue.")
    (sft,), (reward,), (ppo,) = (unsplit(tokenizer, name, path) for name in STAGES)
    assert sft["input_ids"] == reward["responses_ids"][0] == prompt + chosen
    assert (ppo["prompt_ids"], ppo["prompt"]) == (prompt, "The sky is")


def test_sft_takes_messages_and_pairs(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    messages = [*DIALOGUE, assistant("so"), user("thanks")]
    pair = {"prompt": DIALOGUE, "completion": [assistant("so")]}
    expected = whole(tokenizer, DIALOGUE, [assistant("so")])
    for row in ({"messages": messages}, {"messages": messages, "prompt": "why?"}, pair):
        (result,) = unsplit(tokenizer, "sft", write(tmp_path / "data.jsonl", [row]))
        assert result["input_ids"] == expected
    for row in ({"messages": messages}, {"messages": messages, "prompt": "why?"}, pair):
        (result,) = unsplit(tokenizer, "ppo", write(tmp_path / "data.jsonl", [row]))
        assert result["prompt"] == DIALOGUE


def test_human_in_the_middle_of_a_text_is_no_transcript(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    texts = ["What does 'Human: ' mean?", "Human: a word", "Say\n\nHuman: x\n\nAssistant:", "Human: x\n\nAssistant: y"]
    rows = unsplit(tokenizer, "ppo", write(tmp_path / "data.jsonl", [{"prompt": text} for text in texts]))
    assert [row["prompt"] for row in rows] == texts


def test_ppo_keeps_the_other_columns(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "hint": [1.5]}])
    rows = unsplit(tokenizer, "ppo", path)
    assert [(row["prompt"], row["answer"], row["hint"]) for row in rows] == [("a", 1, None), ("b", None, [1.5])]


def test_ppo_refuses_columns_that_cannot_be_passed_on(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "completions": 1}])
    with pytest.raises(ValueError, match=r"ppo\.data: rename the column 'completions'"):
        unsplit(tokenizer, "ppo", path)
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "a\0b": 1}])
    with pytest.raises(ValueError, match=r"rename the column 'a\\x00b' of .*: Arrow takes no name with a NUL byte\.$"):
        unsplit(tokenizer, "ppo", path)
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x"}])
    with pytest.raises(ValueError, match=r"ppo\.data: the column 'answer' .* mixes types"):
        unsplit(tokenizer, "ppo", path)


def test_margin_is_kept_and_checked(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    margins: list[Any] = [1, "0.5", "nan", "much", None]
    rows = [{**preference(number), "margin": margin} for number, margin in enumerate(margins)]
    path = write(tmp_path / "data.jsonl", rows)
    result = prepare("reward", Stage(data=path, heldout=0.0), tokenizer, None)
    assert result.train["margin"][:] == [1.0, 0.5]
    assert result.report["dropped"] == {"wrong type": 2, "missing field": 1}


# --- Bad rows ---------------------------------------------------------------------------------------------------------


def dialogue(prompt: list[Any], chosen: list[Any]) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": [assistant("b")]}


BAD_ROWS = [
    ("reward", {"prompt": " ", "chosen": "a", "rejected": "b"}, "field 'prompt': empty"),
    ("reward", {"prompt": "p", "chosen": "a", "rejected": "\n"}, "field 'rejected': empty"),
    ("reward", {"prompt": "p", "chosen": "a", "rejected": "a"}, "field 'chosen': chosen equals rejected"),
    ("reward", {"prompt": "p", "chosen": 3, "rejected": "a"}, "field 'chosen': wrong type: int, not text"),
    ("reward", {"prompt": "p", "chosen": "a"}, "field 'rejected': missing field"),
    ("reward", {"prompt": None, "chosen": "a", "rejected": "b"}, "field 'prompt': missing field"),
    ("reward", {"prompt": "p" * 99, "chosen": "a", "rejected": "b"}, "too long: 102 tokens, limit 40"),
    ("reward", {"prompt": "p", "chosen": [assistant("a")], "rejected": "b"}, "wrong type: messages after a prompt"),
    ("reward", {"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "field 'chosen': not Unicode"),
    ("reward", dialogue([user("p")], [assistant("a")]), "mixed formats: this row is messages"),
    ("reward", dialogue([user("p")], [{"role": "user"}]), "field 'chosen': wrong type: a message's role"),
    ("reward", dialogue([user("p"), assistant("x")], [assistant("a")]), "no answer can follow"),
    ("reward", dialogue([user("p")], [assistant("a"), user("b")]), "not one assistant message"),
    ("reward", dialogue([], []), "field 'prompt': empty"),
    ("reward", ["p", "a"], "field 'row': wrong type: list, not an object"),
    ("sft", {"prompt": "p", "chosen": "", "rejected": "b"}, "field 'chosen': empty"),
    ("ppo", {"prompt": "p" * 99, "chosen": "a", "rejected": "b"}, "field 'prompt': too long: 100 tokens, limit 40"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "message"), BAD_ROWS)
def test_bad_row_is_named(tokenizer: FastTokenizer, tmp_path: Path, name: Any, row: Any, message: str) -> None:
    path = write(tmp_path / "data.jsonl", [preference(0), "", preference(1), row, preference(2)])
    result = prepare(name, Stage(data=path, heldout=0.0), tokenizer, 40)
    assert len(result.train) == result.report["used"] == 3
    assert sum(result.report["dropped"].values()) == 1
    (example,) = result.report["examples"]
    assert f"{path}, row 4, field" in example and message in example
    with pytest.raises(ValueError, match=f"{name}.data: 1 of 4 rows cannot be used") as error:
        prepare(name, Stage(data=path, bad_rows="refuse"), tokenizer, 40)
    assert example in str(error.value)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sft", {"messages": [user("hi")]}, "field 'messages': missing field: there is no assistant message"),
        ("sft", {"messages": [assistant("hi")]}, "field 'prompt': empty"),
        ("sft", {"messages": [{"role": "judge", "content": "x"}, assistant("hi")]}, "refused by the chat template"),
        ("ppo", {"messages": []}, "field 'prompt': empty"),
    ],
)
def test_bad_messages_are_named(
    tokenizer: FastTokenizer, tmp_path: Path, name: Any, row: dict[str, Any], message: str
) -> None:
    good = {"messages": [user("a"), assistant("b")]}
    result = prepare(name, Stage(data=write(tmp_path / "a.jsonl", [good, row])), tokenizer, None)
    (example,) = result.report["examples"]
    assert "row 2" in example and message in example


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("same", "same ", "chosen equals rejected"),
        ("x ", "y ", "field 'prompt': empty"),
        (TRANSCRIPT + " a", "b", "wrong type: one of chosen and rejected is text"),
        (TRANSCRIPT + " a", TRANSCRIPT, "field 'rejected': empty"),
    ],
)
def test_bad_implicit_prompts_are_named(
    tokenizer: FastTokenizer, tmp_path: Path, chosen: str, rejected: str, message: str
) -> None:
    good = {"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b"}
    path = write(tmp_path / "a.jsonl", [good, {"chosen": chosen, "rejected": rejected}])
    (example,) = prepare("reward", Stage(data=path), tokenizer, None).report["examples"]
    assert "row 2" in example and message in example


def test_csv_counts_data_rows(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd\ne,f,g\nh,\n')
    report = prepare("sft", Stage(data=str(path)), tokenizer, None).report
    assert report["examples"] == [
        f"{path}, data row 2, field 'completion': missing field",
        f"{path}, data row 3, field 'row': wrong type: it has more cells than the header",
        f"{path}, data row 4, field 'completion': empty",
    ]
    assert (report["rows"], report["used"], report["train"]) == (4, 1, 1)


def test_refusal_counts_by_reason_and_shows_five(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    bad = [{**preference(number), "chosen": ""} for number in range(30)] + [{**preference(0), "rejected": 1}]
    path = write(tmp_path / "data.jsonl", [*(preference(number) for number in range(40)), *bad])
    with pytest.raises(ValueError, match=r"31 of 71 rows .*\(empty 30, wrong type 1\)") as error:
        prepare("reward", Stage(data=path, bad_rows="refuse"), tokenizer, None)
    assert str(error.value).count("field 'chosen': empty") == 5
    report = prepare("reward", Stage(data=path), tokenizer, None).report
    assert report["dropped"] == {"empty": 30, "wrong type": 1}
    assert len(report["examples"]) == 20


@pytest.mark.parametrize("name", STAGES)
def test_no_usable_row(tokenizer: FastTokenizer, tmp_path: Path, name: Any) -> None:
    path = write(tmp_path / "data.jsonl", [{**preference(0), "prompt": ""}])
    with pytest.raises(ValueError, match="No usable row is left"):
        prepare(name, Stage(data=path), tokenizer, None)


def test_a_row_without_prompt_is_not_taken_for_an_implicit_one(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    rows = [preference(0), preference(1), {"chosen": "The sky", "rejected": "The sea"}]
    report = prepare("reward", Stage(data=write(tmp_path / "a.jsonl", rows)), tokenizer, None).report
    assert report["dropped"] == {"missing field": 1}


# --- Held-out split ---------------------------------------------------------------------------------------------------


def prompts(rows: list[dict[str, Any]], key: str, tokenizer: FastTokenizer) -> set[str]:
    """The questions that the rows hold, each `Question N?`."""
    ids = [row[key][0] if key == "responses_ids" else row[key] for row in rows]
    return {str(tokenizer.decode(one)).removeprefix("<s>").partition("?")[0] for one in ids}


def test_the_same_prompts_are_held_out_in_every_stage(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    rows = [preference(number) for number in range(200)]
    stage = Stage(data=write(tmp_path / "data.jsonl", rows), heldout=0.2)
    shuffled = Stage(data=write(tmp_path / "shuffled.jsonl", rows[::-1] + rows[:50]), heldout=0.2)
    sides = []
    for name, key in (("sft", "input_ids"), ("reward", "responses_ids"), ("ppo", "prompt_ids")):
        for source in (stage, shuffled):
            result = prepare(name, source, tokenizer, None)  # type: ignore[arg-type]
            train = prompts(result.train.to_list(), key, tokenizer)
            heldout = prompts(result.heldout.to_list(), key, tokenizer)
            assert not train & heldout and len(train | heldout) == 200
            assert result.report["heldout_prompts"] == len(heldout)
            assert result.report["train"] == len(result.train) and result.report["heldout"] == len(result.heldout)
            sides.append(heldout)
    assert all(heldout == sides[0] for heldout in sides)
    assert 20 <= len(sides[0]) <= 60
    other = prepare("ppo", stage, tokenizer, None, seed=1).heldout.to_list()
    assert prompts(other, "prompt_ids", tokenizer) != sides[0]


def test_surplus_held_out_rows_are_not_trained_on(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [preference(number) for number in range(100)])
    whole = prepare("sft", Stage(data=path, heldout=0.3), tokenizer, None)
    cut = prepare("sft", Stage(data=path, heldout=0.3, heldout_limit=4), tokenizer, None)
    assert cut.train.to_list() == whole.train.to_list()
    assert cut.heldout.to_list() == whole.heldout.to_list()[:4]
    assert cut.heldout.column_names == cut.train.column_names == ["input_ids", "labels", "dialogue"]


@pytest.mark.parametrize(("share", "count", "expected"), [(0.001, 5, 1), (0.9, 2, 1), (0.5, 1, 0), (0.0, 3, 0)])
def test_no_side_is_left_empty(
    tokenizer: FastTokenizer, tmp_path: Path, share: float, count: int, expected: int
) -> None:
    stage = Stage(data=write(tmp_path / "data.jsonl", [preference(number) for number in range(count)]), heldout=share)
    for seed in range(5):
        result = prepare("sft", stage, tokenizer, None, seed)
        assert (len(result.train), len(result.heldout)) == (count - expected, expected)


def test_ppo_holds_out_one_row_a_prompt(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number % 10}", "row": number} for number in range(40)]
    stage = Stage(data=write(tmp_path / "data.jsonl", rows), heldout=0.5)
    heldout = prepare("ppo", stage, tokenizer, None).heldout
    assert 1 <= len(heldout) == len(set(heldout["prompt"]))
    assert all(row < 10 for row in heldout["row"])
    assert heldout["prompt_row"] == [row + 1 for row in heldout["row"]], "in their file, from 1"


@pytest.mark.parametrize(("key", "value"), [("heldout", 0.95), ("heldout", -0.1), ("limit", -1), ("heldout_limit", -1)])
def test_shares_and_limits_are_checked(tokenizer: FastTokenizer, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"sft.{key} must"):
        prepare("sft", Stage(data="unused.jsonl", **{key: value}), tokenizer, None)  # type: ignore[arg-type]


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "ptx"])
def test_token_ids_are_never_python_numbers(stage: str) -> None:
    ids = np.arange(300, 1300, dtype=np.int32)
    rows = [Row(number, {}, "p", prompt_ids=ids) for number in range(1000)]
    completions = ("chosen", "rejected") if stage in ("reward", "dpo") else ("completion",)
    for row in rows:
        row.ids = {name: ids for name in completions}
    tracemalloc.start()
    table = _table(stage, Stage("rows"), rows, 0, "completion")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * table.data.nbytes / 4, "bytes for each token; its id has 4"
    column = table[{"sft": "labels", "reward": "responses_ids", "ptx": "input_ids"}.get(stage, "prompt_ids")][0]
    start = {"sft": [-100] * 1000 + ids.tolist(), "reward": [[*ids.tolist(), *ids.tolist()]] * 2}
    assert column == start.get(stage, ids.tolist())


# --- TRL and real data ------------------------------------------------------------------------------------------------


def test_sft_trainer_takes_the_columns_as_they_are(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [preference(number) for number in range(8)])
    result = prepare("sft", Stage(data=path, heldout=0.3), tokenizer, 64)
    args = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=64)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    trainer = SFTTrainer(
        model, args, train_dataset=result.train, eval_dataset=result.heldout, processing_class=tokenizer
    )
    assert trainer.train_dataset.to_list() == result.train.to_list()  # type: ignore[union-attr]
    rows = result.train.to_list()[:2]
    batch = trainer.data_collator(rows)
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert [label for label in labels if label != -100] == [label for label in row["labels"] if label != -100]
    assert trainer.evaluate()["eval_loss"] > 0


def test_reward_trainer_takes_the_columns_as_they_are(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{**preference(number), "margin": 1} for number in range(8)])
    result = prepare("reward", Stage(data=path, heldout=0.3), tokenizer, 64)
    args = RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=64)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape)  # type: ignore[arg-type]
    model = LlamaForSequenceClassification(config)
    trainer = RewardTrainer(
        model, args, train_dataset=result.train, eval_dataset=result.heldout, processing_class=tokenizer
    )
    assert trainer.train_dataset.to_list() == result.train.to_list()  # type: ignore[union-attr]
    rows = result.train.to_list()[:2]
    batch = trainer.data_collator(rows)
    assert batch["margin"].tolist() == [1.0, 1.0]
    assert batch["ranking"].tolist() == [[1, 2], [1, 2]]
    first = rows[0]["responses_ids"][0]
    assert batch["input_ids"][0].tolist()[: len(first)] == first
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data and model in ../shared are absent")
@pytest.mark.parametrize("name", STAGES)
def test_real_hh_rows(name: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    set_chat_template(tokenizer, None)
    source = SHARED / "data" / "hh_base_eval10.jsonl.gz"
    result = prepare(name, Stage(data=str(source)), tokenizer, None)
    assert result.conversational and result.stop_token_id == tokenizer.eos_token_id
    assert result.report["used"] == 439 and not result.report["dropped"]
    row = json.loads(gzip.decompress(source.read_bytes()).splitlines()[0])
    text = row["prompt"] + ("" if name == "ppo" else row["chosen"].rstrip() + "</s>")
    key = {"sft": "input_ids", "reward": "responses_ids", "ppo": "prompt_ids"}[name]
    rows = [cell[0] if name == "reward" else cell for cell in result.train[key]]
    assert any("".join(tokenizer.decode(ids).split()) == "<s>" + "".join(text.split()) for ids in rows)
    assert all(ids[0] == tokenizer.bos_token_id for ids in rows)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample data and model in ../shared are absent")
def test_real_hh_rows_over_the_limit_are_counted() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    set_chat_template(tokenizer, None)
    stage = Stage(data=str(SHARED / "data" / "hh_base_eval10.jsonl.gz"))
    result = prepare("reward", stage, tokenizer, 512)
    assert result.report["rows"] == 439 == result.report["used"] + result.report["dropped"]["too long"]
    assert max(len(ids) for responses in result.train["responses_ids"] for ids in responses) <= 512


def test_held_out_prompts_choose_or_judge_and_the_same_ones_in_every_stage() -> None:
    prompts = [f"Question {number}" for number in range(40)] * 2  # each twice
    rows = datasets.Dataset.from_dict({"prompt": prompts, "row": [*range(80)]})
    choosing, judging = halve(rows, seed=0)
    assert sorted([*choosing["row"], *judging["row"]]) == [*range(80)] and 20 < len(choosing) < 60
    assert not set(choosing["prompt"]) & set(judging["prompt"])
    dialogues = [dialogue_number(prompt, 0) for prompt in prompts]
    other = halve(datasets.Dataset.from_dict({"dialogue": dialogues, "row": [*range(80)]}), seed=0)
    assert [[*side["row"]] for side in other] == [[*choosing["row"]], [*judging["row"]]]
    assert [len(side) for side in halve(rows.select([0, 40]), seed=0)] == [2, 2], "of one prompt both are all"
