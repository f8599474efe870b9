"""AlpacaEval's and Arena-Hard's files: rows as those have them, as prompts and as an opponent's answers."""

from typing import Any

import pytest
from support.rows import assistant, make_tokenizer, user

from rlhf_recipes.evaluate.opponents import (
    Opponent,
    as_text,
    conversion_of_benchmark,
    opponent_answers,
    take_opponent,
)
from rlhf_recipes.recipe.lookup import function

ALPACA = {"instruction": "Hi?", "output": "Hello.", "generator": "gpt4_1106_preview", "dataset": "koala"}
QUESTION = {"uid": "328c", "category": "arena-hard-v0.1", "cluster": "Greetings", "prompt": "Hi?"}
OLD_QUESTION = {"question_id": "328c", "category": "arena-hard-v0.1", "turns": [{"content": "Hi?"}]}
ANSWERED = {"uid": "328c", "ans_id": "x", "model": "gpt-4-0314", "tstamp": 1.0}
ANSWERED |= {"messages": [user("Hi?"), {"role": "assistant", "content": {"answer": "Hello."}}]}

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "name", "answer"),
    [
        (ALPACA, "gpt4_1106_preview", "Hello."),
        ({"instruction": "Hi?"}, None, None),
        (QUESTION, None, None),
        (OLD_QUESTION, None, None),
        (ANSWERED, "gpt-4-0314", "Hello."),
        ({**ANSWERED, "messages": [SYSTEM, user("Hi?"), assistant("Hello.")]}, "gpt-4-0314", "Hello."),
    ],
)
def test_each_file_gives_prompts_and_what_it_has_of_answers(row: Any, name: str | None, answer: str | None) -> None:
    said = {"opponent": name, "opponent_answer": answer}
    convert = conversion_of_benchmark(row)
    assert convert is not None
    (converted,) = function(convert)([row])
    assert converted == {"prompt": "Hi?", **said}
    opponent = take_opponent([converted])
    assert converted == {"prompt": "Hi?"}, "what judges see says nothing of the opponent"
    assert opponent == (None if name is None else Opponent(name, ["Hello."]))


def test_other_rows_are_left_alone() -> None:
    alpaca_sft = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    for row in ({"prompt": "Hi?"}, {"messages": [user("Hi?")]}, alpaca_sft, {**QUESTION, "chosen": "a"}, "text", None):
        assert conversion_of_benchmark(row) is None
    bad: list[Any] = [{**ALPACA, "output": 5}, {**OLD_QUESTION, "turns": [{"content": "a"}, {"content": "b"}]}, "text"]
    assert list(as_text(bad)) == bad


def test_the_answers_are_of_one_model() -> None:
    with pytest.raises(ValueError, match=r"--prompts: the answers are of several models \(gpt4_1106_preview, none\)"):
        take_opponent(list(as_text([ALPACA, {"instruction": "And?"}])))


def test_an_opponents_answers_are_tokenized_as_the_runs_own() -> None:
    tokenizer, rows = make_tokenizer(), [{"prompt": [user("Hi?")]}, {"prompt": [user("Who?")]}]
    answers = opponent_answers(Opponent("gpt", ["Hello.", "Me."]), tokenizer, rows, 2)
    assert [(answer.row, answer.sample, answer.text) for answer in answers] == [
        (0, 0, "Hello."),
        (0, 1, "Hello."),
        (1, 0, "Me."),
        (1, 1, "Me."),
    ]
    assert tokenizer.decode(answers[2].ids) == " Me.</s>" and answers[2].kl is None
    (spelled, _) = opponent_answers(Opponent("gpt", ["Hello.</s>", "Me."]), tokenizer, rows, 1)
    assert tokenizer.decode(spelled.ids) == " Hello.< /s></s>" and spelled.ids.count(tokenizer.eos_token_id) == 1
