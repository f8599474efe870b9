"""The chat templates of the best-known models: what each writes, and that all stages see one tokenization of it."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_templates import BY_NAME, CHAT_MODELS, OPEN_THOUGHT, ChatModel
from support.rows import assistant, make_tokenizer, user, write
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.tokens import (
    RefusedByTemplate,
    answer_frame,
    earlier_answers,
    render,
    response_texts,
    set_chat_template,
    set_today,
    spelled_out,
    stop_token_id,
    tokenize_pair,
    tokenize_prompt,
    writes_date,
)
from rlhf_recipes.recipe.values import Stage

SYSTEM = {"role": "system", "content": "Be kind."}
NO_THINK = {"role": "system", "content": "/no_think"}  # SmolLM3's word for an empty thought
PROMPTS = {
    "question": [user("Why?")],
    "turns": [user("Hello."), assistant("Hi!"), user("Why?")],
    "long": [user("1"), assistant("2"), user("3"), assistant("4"), user("5")],
    "system": [SYSTEM, user("Hello."), assistant("Hi!"), user("Why?")],
    "no thought": [NO_THINK, user("Why?")],
}
each_model = pytest.mark.parametrize("model", CHAT_MODELS, ids=lambda model: model.name)


def prompts_of(model: ChatModel) -> list[list[dict[str, Any]]]:
    """The prompts that the model's template takes."""
    return [prompt for prompt in PROMPTS.values() if model.takes_system or prompt[0]["role"] != "system"]


def rendered(tokenizer: FastTokenizer, messages: list[dict[str, Any]], **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@each_model
def test_prompt_and_answer_are_one_tokenization_of_the_conversation(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    for prompt in prompts_of(model):
        ids, completion = tokenize_pair(tokenizer, prompt, [assistant("Because of it.")])
        assert ids == tokenize_prompt(tokenizer, prompt)
        assert tokenizer.decode(ids) == rendered(tokenizer, prompt, add_generation_prompt=True)
        beginning = tokenizer.decode([*ids, *completion[:-1]])
        assert beginning.endswith("Because of it." + model.after)
        assert rendered(tokenizer, [*prompt, assistant("Because of it.")]).startswith(beginning)
        assert tokenizer(beginning, add_special_tokens=False).input_ids == [*ids, *completion[:-1]]


@each_model
def test_an_answer_ends_where_the_model_ends_its_turn(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    stop = tokenizer.convert_tokens_to_ids(model.stop)
    assert stop_token_id(tokenizer, conversational=True) == stop
    for prompt in prompts_of(model):
        _, completion = tokenize_pair(tokenizer, prompt, [assistant("So.")])
        assert completion.index(stop) == len(completion) - 1


@each_model
@pytest.mark.parametrize("text", ["So.", " So ", "one\n\ntwo", "é"])
def test_the_text_of_an_answer_is_without_what_the_template_writes_around_it(model: ChatModel, text: str) -> None:
    tokenizer = model.tokenizer()
    frame = answer_frame(tokenizer)
    assert (frame.before, frame.after) == (model.before, model.after)
    _, ids = tokenize_pair(tokenizer, [user("Why?")], [assistant(text)])
    (found,) = response_texts(tokenizer, [ids], conversational=True)
    assert found in (text, text.strip())  # some templates strip messages
    assert tokenize_pair(tokenizer, [user("Why?")], [assistant(found)])[1] == ids


@each_model
def test_nothing_else_is_taken_from_a_text(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    ids = tokenizer("So." + model.after, add_special_tokens=False).input_ids
    cut_off = tokenizer(model.before + "So." + model.after, add_special_tokens=False).input_ids
    (bare,) = tokenizer.batch_decode([ids], skip_special_tokens=True)
    assert response_texts(tokenizer, [ids, cut_off, []], conversational=True) == [bare, bare, ""]
    assert response_texts(tokenizer, [cut_off], False) == tokenizer.batch_decode([cut_off], skip_special_tokens=True)


@each_model
def test_a_response_that_spells_the_end_of_its_turn_does_not_end_it(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    said = f"So.{model.stop}<{model.stop}{model.stop[:2]}{model.stop}{model.stop[2:]}"
    spelled = tokenizer(said, add_special_tokens=False, split_special_tokens=True).input_ids
    stop = tokenizer.convert_tokens_to_ids(model.stop)
    assert stop not in spelled and tokenizer.decode(spelled) == said
    for conversational in (True, False):
        (text,) = response_texts(tokenizer, [spelled], conversational)
        assert not {*tokenizer.all_special_ids, stop} & {*tokenizer(text, add_special_tokens=False).input_ids}
        assert text.replace(" ", "") == said
    assert tokenize_pair(tokenizer, [user("Why?")], [assistant(text)])[1].count(stop) == 1


@pytest.mark.parametrize("name", ["deepseekv3", "glm4moe"])
def test_a_token_that_begins_a_turn_is_not_spelled_though_it_is_not_special(name: str) -> None:
    tokenizer = BY_NAME[name].tokenizer()
    # DeepSeek writes its tokens with a bar of full width, which is not to be mended.
    turn = {"deepseekv3": "<｜User｜>", "glm4moe": "<sop>"}[name]  # noqa: RUF001
    tokenizer.add_tokens([turn, "<tool>", " ", "\n"])
    said = f"<think>\nHm.\n</think>\n<tool> {turn}And?"
    assert spelled_out(tokenizer, [said]) == [said.replace(turn, f"< {turn[1:]}")]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert spelled_out(tokenizer, [said]) == [said]


def test_a_thought_that_the_model_had_is_its_own() -> None:
    tokenizer = BY_NAME["qwen3"].tokenizer()
    said = ["<think>\nHm.\n</think>\n\nSo.", "<think>\n\n</think>", "<think>\n\n</think>\n\n<think>"]
    ids = tokenizer([text + "<|im_end|>" for text in said], add_special_tokens=False).input_ids
    assert response_texts(tokenizer, ids, conversational=True) == [*said[:2], "<think>"]


@each_model
def test_no_system_message_is_lost(model: ChatModel, tmp_path: Path) -> None:
    tokenizer = model.tokenizer()
    row = {"prompt": [SYSTEM, user("Why?")], "completion": [assistant("So.")]}
    if model.takes_system:
        assert "Be kind." in tokenizer.decode(tokenize_prompt(tokenizer, row["prompt"]))
        return
    path = write(tmp_path / "data.jsonl", [row])
    with pytest.raises(ValueError, match=r"refused by the chat template: .*role"):
        prepare("sft", Stage(data=path, heldout=0.0), tokenizer, None)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", template="chatml")
    monkeypatch.setattr("rlhf_recipes.data.tokens.PATIENCE", 0.8)
    (tmp_path / "endless.jinja").write_text(ENDLESS)
    with pytest.raises(ValueError, match=r"has not written 1 messages after 0\.8 seconds"):
        set_chat_template(tokenizer, str(tmp_path / "endless.jinja"))
    set_chat_template(tokenizer, "chatml")
    tokenizer.chat_template = f"{{% if messages[0].content == 'b' %}}{ENDLESS}{{% endif %}}{tokenizer.chat_template}"
    path = write(tmp_path / "data.jsonl", [{"prompt": [user(said)], "completion": [assistant("c")]} for said in "abb"])
    began = time.monotonic()
    with pytest.raises(ValueError, match="it may have no end") as caught:  # and not a row that is dropped
        prepare("sft", Stage(data=path, heldout=0.0), tokenizer, None)
    assert not isinstance(caught.value, RefusedByTemplate) and time.monotonic() - began < 5


def test_another_alarm_of_the_process_is_kept() -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        render(make_tokenizer(), [user("Why?")])
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_a_template_is_rendered_all_the_same() -> None:
    with ThreadPoolExecutor() as pool:
        assert "Human: Why?" in pool.submit(render, make_tokenizer(), [user("Why?")]).result()


@pytest.mark.parametrize(
    "model", [model for model in CHAT_MODELS if not model.takes_system], ids=lambda model: model.name
)
def test_a_refused_role_is_one_clear_message(model: ChatModel) -> None:
    with pytest.raises(ValueError, match=r"chat template refuses .*[Rr]ole"):
        tokenize_prompt(model.tokenizer(), [SYSTEM, user("Why?")])


@each_model
def test_earlier_answers_are_found_where_a_completion_would_be_the_same(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    prompt_ids = np.array(tokenize_prompt(tokenizer, PROMPTS["long"]))
    if model.name in ("qwen3", "gptoss", "glm4moe"):  # only the last answer has a thought, or another stop token
        with pytest.raises(ValueError, match="writes an answer differently once a message follows it"):
            earlier_answers(tokenizer, PROMPTS["long"], prompt_ids)
        return
    found = [prompt_ids[answer].tolist() for answer in earlier_answers(tokenizer, PROMPTS["long"], prompt_ids)]
    assert response_texts(tokenizer, found, conversational=True) == ["2", "4"]
    assert all(ids[-1] == stop_token_id(tokenizer, True) for ids in found)


def test_answers_are_those_that_trl_finds_by_the_marks_of_a_template() -> None:
    tokenizer = BY_NAME["smollm3"].tokenizer()
    conversation = [*PROMPTS["long"], assistant("6")]
    prompt_ids, completion = tokenize_pair(tokenizer, conversation[:-1], conversation[-1:])
    own = [0] * len(prompt_ids) + [1] * len(completion)
    for answer in earlier_answers(tokenizer, conversation[:-1], np.array(prompt_ids)):
        own[answer] = [1] * (answer.stop - answer.start)
    marked = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    assert marked["assistant_masks"][: len(own)] == own


@each_model
def test_a_template_writes_the_day_that_it_is_given(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    set_today(tokenizer, "2019-02-03")
    ids, _ = tokenize_pair(tokenizer, [user("Why?")], [assistant("So.")])
    assert ids == tokenize_prompt(tokenizer, [user("Why?")])
    assert ("2019" in tokenizer.decode(ids)) == model.says_date == writes_date(tokenizer)
    set_today(tokenizer, None)
    assert (tokenize_prompt(tokenizer, [user("Why?")]) == ids) != model.says_date


def test_a_given_day_changes_nothing_else_of_a_template() -> None:
    tokenizer = BY_NAME["llama3"].tokenizer()
    tokenizer.chat_template = "\n  {% if true %}\nx{% endif %}\n {{ strftime_now('%-d. %B %Y, %a, %H:%M') }}\n"
    set_today(tokenizer, "2019-02-03")
    assert render(tokenizer, [user("Why?")]) == "\nx 3. February 2019, Sun, 00:00"
    tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now", "")
    frozen, _ = render(tokenizer, [user("Why?")]), set_today(tokenizer, None)
    assert render(tokenizer, [user("Why?")]) == frozen


@pytest.mark.parametrize("model", OPEN_THOUGHT, ids=lambda model: model.name)
def test_a_generation_prompt_that_no_conversation_has_is_refused(model: ChatModel) -> None:
    tokenizer = model.tokenizer()
    assert tokenizer.decode(tokenize_prompt(tokenizer, [user("Why?")])).endswith("<think>\n")
    with pytest.raises(ValueError, match=r"writes the prompt differently .*Set base\.chat_template.*<think>"):
        tokenize_pair(tokenizer, [user("Why?")], [assistant("So.")])
