"""Prompts and responses as text and as tokens: chat templates, and the one tokenization that all stages share.

PPO sees prompts and scores responses exactly as the SFT and the reward model were trained on them, because a prompt's
ids never depend on what follows it, and every response ends in exactly one stop token.
"""

import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import takewhile
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..recipe.overrides import suggestion

Messages = list[dict[str, Any]]  # each with role and content, as TRL's

Text = str | Messages  # a prompt or a completion

Ids = np.ndarray  # int32, (tokens,): a list takes eight times the memory

CHAT_TEMPLATES: dict[str, str] = {
    # Anthropic's HH transcripts, each answer ended by EOS so that the policy learns to stop. The space after
    # "Assistant:" belongs to the answer, as in HH.
    "transcript": """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content | trim }}
    {%- elif message.role == 'user' %}{{ '\\n\\nHuman: ' + message.content | trim }}
    {%- elif message.role == 'assistant' %}{{ '\\n\\nAssistant: ' + message.content | trim }}{{ eos_token }}
    {%- else %}{{ raise_exception('A transcript has no role ' + message.role + '.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}""",
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None, today: str | None = None) -> None:
    """Give the tokenizer the chat template that all stages use.

    Args:
        tokenizer: changed in place.
        name: a name of `CHAT_TEMPLATES`, the path of a .jinja file, or None for the tokenizer's own ("transcript" if it
            has none).
        today: the day (YYYY-MM-DD) that the template takes for today's, if it writes one; None: the day that it is.
    Raises:
        ValueError: there is no such template, file or day, it cannot be rendered, or it uses a token like `<|im_end|>`
            that the vocabulary lacks (it would be split into pieces that the model never saw in this role).
    """
    set_today(tokenizer, today)
    if name is None:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = CHAT_TEMPLATES["transcript"]
        return
    if name.endswith(".jinja"):
        try:
            template = Path(name).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ValueError(f"base.chat_template: there is no file {name}.") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"base.chat_template: {name} cannot be read: {error}") from error
    elif name in CHAT_TEMPLATES:
        template = CHAT_TEMPLATES[name]
    else:
        hint = suggestion(name, CHAT_TEMPLATES)
        raise ValueError(f"base.chat_template: {name!r} is neither a named template nor a .jinja file.{hint}")
    for token in sorted(set(re.findall(r"<\|\w+\|>", template))):
        if tokenizer.tokenize(token) != [token]:
            raise ValueError(
                f"base.chat_template: {name} needs the token {token}, which this tokenizer lacks. Use 'transcript', or "
                "a base model with that token."
            )
    tokenizer.chat_template = template
    try:
        answer_frame(tokenizer)
    except RefusedByTemplate as error:
        raise ValueError(f"base.chat_template: {name} cannot be rendered: {error.__cause__}") from error


def set_today(tokenizer: PreTrainedTokenizerBase, today: str | None) -> None:
    """Fix the day that the tokenizer's chat template takes for today's. The template itself stays as it is.

    Raises ValueError where it is none.
    """
    try:
        day = None if today is None else date.fromisoformat(today)
    except ValueError as error:
        raise ValueError(f"base.chat_template_date must be a day like 2026-03-31, not {today!r}.") from error
    tokenizer.date_macro = "" if day is None else _date_macro(day)


def _date_macro(day: date) -> str:
    """What before a template takes the place of transformers' `strftime_now`, by which it asks for the day."""
    written = {"%-d": str(day.day), "%-m": str(day.month)}
    written |= {f"%{letter}": day.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSUwWxXyY"}
    filters = "".join(f" | replace({directive!r}, {word!r})" for directive, word in written.items())
    # The line break after a block is no output.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes the date of the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def stop_token_id(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> int:
    """The id of the token that ends a response: what generation stops at, and the last of a tokenized completion.

    Conversational rows end with the special token that the chat template writes after an answer (`<|im_end|>`,
    `<|eot_id|>`, ...: see `answer_frame`); text rows, and templates that write none, end with EOS.
    Raises ValueError if that is EOS and the tokenizer has none, or the template cannot be rendered.
    """
    if conversational:
        return answer_frame(tokenizer).stop
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no eos_token: a response could never end.")
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """The ids of a prompt: messages with the template's generation prompt, or text with the usual special tokens.

    A trailing EOS, which some tokenizers add to every text, is left out: a response follows.
    """
    return prompt_token_ids(tokenizer, [render_prompt(tokenizer, prompt)], not isinstance(prompt, str))[0].tolist()


def tokenize_pair(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
    """The ids of a prompt, as `tokenize_prompt` gives them, and of its completion, which end in exactly one stop token.

    The completion's ids are those that it has in the tokenization of the whole text, unless a token spans the boundary:
    then it is tokenized by itself. Raises ValueError if the chat template renders the prompt differently once an answer
    follows it.
    """
    conversational = not isinstance(prompt, str)
    end, stop = response_end(tokenizer, conversational)
    prompt_text = render_prompt(tokenizer, prompt)
    text = render_completion(tokenizer, prompt, prompt_text, completion, end)
    prompt_ids = prompt_token_ids(tokenizer, [prompt_text], conversational)
    completion_ids = completion_token_ids(tokenizer, [prompt_text], prompt_ids, [text], conversational, stop)
    return prompt_ids[0].tolist(), completion_ids[0].tolist()


def earlier_answers(tokenizer: PreTrainedTokenizerBase, prompt: Messages, prompt_ids: Ids) -> list[slice]:
    """Where in a prompt's ids the assistant's messages stand, each with its stop token, as it is as a completion.

    Raises ValueError where the template writes an earlier answer differently from the last.
    """
    answers = []
    for place, message in enumerate(prompt):
        if place and message["role"] == "assistant":
            before, answer = tokenize_pair(tokenizer, prompt[:place], [message])
            answers.append(slice(len(before), len(before) + len(answer)))
            if not np.array_equal(prompt_ids[: answers[-1].stop], [*before, *answer]):
                raise ValueError(
                    f"the chat template writes an answer differently once a message follows it (of the row with "
                    f"{message['content'][:40]!r}), and a model cannot learn both. Set base.chat_template."
                )
    return answers


def response_end(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> tuple[str, int]:
    """What is written after a response, from the stop token on ("" where nothing is), and the stop token's id."""
    if not conversational:
        return "", stop_token_id(tokenizer, False)
    frame = answer_frame(tokenizer)
    return frame.end, frame.stop


@dataclass(frozen=True)
class AnswerFrame:
    """What a chat template writes around an answer's text. None of it is the answer, but a model is trained to say it.

    Qwen3's puts an empty thought before every last answer, Llama-2's a space before and after.
    """

    before: str  # between the generation prompt and the text
    after: str  # between the text and the stop token
    end: str  # from the stop token on; "" where the template writes none
    stop: int  # the stop token's id
    special: tuple[str, ...]  # the tokenizer's special tokens

    def without_special(self, text: str) -> str:
        """A text as it is decoded without special tokens."""
        for token in self.special:
            text = text.replace(token, "")
        return text


QUESTION_AND_ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}


def answer_frame(tokenizer: PreTrainedTokenizerBase) -> AnswerFrame:
    """What the tokenizer's chat template writes around an answer, found out by rendering one.

    The stop token is the last special token that follows an answer wherever it stands. What ends the whole conversation
    besides, as Phi-3's EOS, comes too late: the model has begun the next turn. Where the template has no such token, as
    GPT-OSS's, it is the last that follows the last answer, and where that has none, EOS.

    Raises ValueError where the template refuses a question and an answer.
    """
    question, answer = QUESTION_AND_ANSWER
    prompt = render(tokenizer, [question], add_generation_prompt=True)
    whole, going_on = render(tokenizer, [question, answer]), render(tokenizer, [question, answer, question])
    before, _, after = whole.removeprefix(prompt).rpartition("answer")
    before = before if whole.startswith(prompt) else ""  # `render_completion` refuses such a template
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(after, going_on.rpartition("answer")[2], strict=False))
    for place in ("".join(letter for letter, _ in alike), after):
        if written := [token for token in special if token in place]:
            stop = max(written, key=lambda token: (place.rfind(token) + len(token), len(token)))
            start = place.rfind(stop)
            return AnswerFrame(before, after[:start], after[start:], special[stop], tuple(special))
    return AnswerFrame(before, after, "", stop_token_id(tokenizer, False), tuple(special))


def response_texts(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]], conversational: bool) -> list[str]:
    """The texts of responses (token ids), without special tokens and what a chat template writes around an answer.

    One that a response spells letter by letter is broken, as `spelled_out` does it: the text may be rendered again.

    Args:
        conversational: whether the prompts were messages. Other responses are their text.
    """
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    if conversational and tokenizer.chat_template is not None:
        frame = answer_frame(tokenizer)
        texts = [_answer_text(tokenizer, frame, ids, text) for ids, text in zip(responses, texts, strict=True)]
    return spelled_out(tokenizer, texts)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the tokenizer's special tokens in a text; None where it has none.

    Among them are those that it does not call special, but with which its chat template begins turns, as DeepSeek's.
    Marks of thoughts are not: a model may think.
    """
    added = tokenizer.added_tokens_decoder.values()
    plain = [str(token) for token in added if not token.special and re.fullmatch(r"<.+>|\[.+\]", str(token))]
    talk = _short_talk(tokenizer) if plain else ""
    tokens = [str(token) for token in added if token.special]
    tokens += [token for token in plain if token in talk and "think" not in token]
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def _short_talk(tokenizer: PreTrainedTokenizerBase) -> str:
    """Three turns as the chat template writes them; "" where there is none, or it refuses them."""
    question, answer = QUESTION_AND_ANSWER
    try:
        return "" if tokenizer.chat_template is None else render(tokenizer, [question, answer, question])
    except RefusedByTemplate:
        return ""


def spelled_out(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """Texts that spell no special token any more: a space follows the first letter of each (`< |im_end|>`).

    For what a model or a stranger has written: by `<|im_end|>` it would end its turn and begin another's.
    """
    special = special_tokens(tokenizer)

    def broken(text: str) -> str:
        while special is not None and special.search(text):  # what is left of one may be another
            text = special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    return [broken(text) for text in texts]


def quoted(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Text]) -> list[Any]:
    """Texts, or messages of which none can leave its turn: as `spelled_out` has what they say."""
    contents = [[part] if isinstance(part, str) else [message["content"] for message in part] for part in parts]
    said = iter(spelled_out(tokenizer, [content for of_part in contents for content in of_part]))
    return [
        next(said) if isinstance(part, str) else [{**message, "content": next(said)} for message in part]
        for part in parts
    ]


def _answer_text(tokenizer: PreTrainedTokenizerBase, frame: AnswerFrame, ids: list[int], text: str) -> str:
    """The text of a response of which `text` is all, as far as it is the answer's own."""
    # By tokens, because special ones may be among what comes before, as GPT-OSS's; the last may end inside a token.
    start, written = 0, ""
    while start < len(ids) and frame.before.startswith(longer := _decode(tokenizer, ids[: start + 1])) and longer:
        start, written = start + 1, longer
    own, rest = _decode(tokenizer, ids[start:], skip_special_tokens=True), frame.before[len(written) :]
    text = own.removeprefix(rest) if own.startswith(rest) else text
    return text.removesuffix(frame.without_special(frame.after)) if ids[-1:] == [frame.stop] else text


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip_special_tokens: bool = False) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)
    return text


# A template is a small program, and fails as programs do.
RAISED_BY_TEMPLATES = (
    TemplateError,
    ArithmeticError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    RecursionError,
    MemoryError,
)

PATIENCE = 10.0  # seconds that a template has for a conversation, on a machine that has other things to do


class RefusedByTemplate(ValueError):
    """The chat template refuses a conversation: it has no system role, say, or wants turns in turn."""


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> str:
    """Messages as the chat template writes them on the day of `set_today`.

    Raises RefusedByTemplate, or another ValueError where the template does not end: the next row would not either.
    """
    macro = getattr(tokenizer, "date_macro", "")
    try:
        with _ending_after(PATIENCE):
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=macro + tokenizer.get_chat_template() if macro else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
    except RAISED_BY_TEMPLATES as error:
        raise RefusedByTemplate(f"The chat template refuses these messages: {error}") from error
    except TimeoutError as error:
        raise ValueError(
            f"The chat template has not written {len(messages)} messages after {PATIENCE:g} seconds, which should take "
            "less than one: it may have no end. Set base.chat_template to one that you know."
        ) from error
    assert isinstance(text, str)
    return text


@contextmanager
def _ending_after(seconds: float) -> Iterator[None]:
    """A block that raises TimeoutError when the time is over: in the main thread, where alone signals come, on Unix."""
    if current_thread() is not main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError

    handler, timer = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> str:
    """A prompt as text: messages with the template's generation prompt."""
    return prompt if isinstance(prompt, str) else render(tokenizer, prompt, add_generation_prompt=True)


def render_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, prompt_text: str, completion: Text, end: str
) -> str:
    """The completion as the template renders it after the prompt, without the end of the turn.

    Args:
        prompt_text: the prompt, by `render_prompt`.
        end: what the template writes after an answer, by `response_end`.
    Raises:
        ValueError: the template writes the prompt differently once an answer follows it.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        assert isinstance(prompt, str) and isinstance(completion, str), "prompt and completion have different formats"
        return completion
    whole = render(tokenizer, prompt + completion)
    if not whole.startswith(prompt_text):
        raise ValueError(
            "The chat template writes the prompt differently once an answer follows it, so a model trained with it "
            f"would be sampled on prompts that it never saw. Set base.chat_template. The prompt ends in "
            f"{prompt_text[-40:]!r}, the conversation in {whole[-40:]!r}."
        )
    return whole[len(prompt_text) :].removesuffix(end)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special_tokens: bool) -> list[Ids]:
    """The ids of each text, with the special tokens that the tokenizer puts around a text or without."""
    result = []
    # In pieces, because a fast tokenizer holds some hundred bytes a token until a batch is done.
    for start in range(0, len(texts), 1000):
        piece = texts[start : start + 1000]
        # verbose=False: rows longer than the model's limit are ours to report.
        encoded = tokenizer(piece, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        result += [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]  # type: ignore[union-attr]
    return result


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], conversational: bool) -> list[Ids]:
    """`tokenize_prompt` of many rendered prompts, N arrays of their own lengths."""
    # A template writes its special tokens itself.
    batch = _ids(tokenizer, texts, special_tokens=not conversational)
    ends_in_eos = [not conversational and ids[-1:].tolist() == [tokenizer.eos_token_id] for ids in batch]
    return [ids[:-1] if cut else ids for ids, cut in zip(batch, ends_in_eos, strict=True)]


def completion_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt_texts: list[str],
    prompt_ids: list[Ids],
    texts: list[str],
    conversational: bool,
    stop: int,
) -> list[Ids]:
    """The ids of many rendered responses, each ending in exactly one stop token (see `tokenize_pair`).

    Args:
        prompt_texts, prompt_ids: the prompt of each, by `render_prompt` and `prompt_token_ids`.
        texts: the responses, by `render_completion`.
        stop: the id of the stop token, by `response_end`.
    Returns:
        N arrays of their own lengths.
    """
    wholes = [prompt + text for prompt, text in zip(prompt_texts, texts, strict=True)]
    batch = _ids(tokenizer, wholes, special_tokens=not conversational)
    spans = [not np.array_equal(ids[: len(prompt)], prompt) for ids, prompt in zip(batch, prompt_ids, strict=True)]
    alone = iter(_ids(tokenizer, [text for text, span in zip(texts, spans, strict=True) if span], special_tokens=False))
    result = []
    for ids, prompt, span in zip(batch, prompt_ids, spans, strict=True):
        ids = next(alone) if span else ids[len(prompt) :]
        while ids[-1:].tolist() == [stop]:
            ids = ids[:-1]
        result.append(np.append(ids, np.int32(stop)))
    return result
