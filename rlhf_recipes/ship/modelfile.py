"""Ollama's Modelfile: the chat template in its language, the tokens that end a response, the sampling of training."""

import re
from itertools import takewhile
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.tokens import RefusedByTemplate, render

# Stand for what is said; no template has them.
SYSTEM, USER, ANSWER, AGAIN = "Ssystemm1", "Uuserr2", "Aanswerr3", "Gagainn4"


def modelfile(tokenizer: PreTrainedTokenizerBase, sampling: GenerationConfig, conversational: bool) -> str:
    """The Modelfile of a GGUF file beside it.

    Args:
        sampling: temperature and end tokens.
        conversational: whether the model was trained on messages; else a prompt goes to it as it is.
    Raises:
        ValueError: the chat template cannot be written in Ollama's language.
    """
    template = ollama_template(tokenizer) if conversational else "{{ .Prompt }}"
    ends: Any = sampling.eos_token_id
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    # What Ollama does of its own beside the temperature: none of it was there in training.
    lines += [f"PARAMETER temperature {sampling.temperature}", "PARAMETER top_k 0", "PARAMETER top_p 1.0"]
    lines += ["PARAMETER min_p 0.0", "PARAMETER repeat_penalty 1.0"]
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template of Jinja's in Go's language, found out by rendering a conversation, with a system message or not.

    It writes something before a user's message, something from there to the answer, and something behind that; and
    first what begins a text, with a system message in it or without. The token that begins every text is left out:
    llama.cpp writes it.

    Raises ValueError for templates that do otherwise.
    """
    first, to_answer, between, last = _pieces(tokenizer)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(first), reversed(between), strict=False))
    user = "".join(letter for letter, _ in alike)[::-1]
    start, end = first.removesuffix(user), between.removesuffix(user)
    fits, opening = last == to_answer, start
    pieces = [start, user, to_answer, end]
    try:
        before, behind, *others = _pieces(tokenizer, system=True)
    except RefusedByTemplate:
        pass  # then Ollama leaves system messages out
    else:
        fits &= others == [to_answer, between, last] and behind.endswith(user)
        pieces += [before, behind]
        within = before + "{{ .System }}" + behind.removesuffix(user)
        opening = f"{{{{ if .System }}}}{within}{{{{ else }}}}{start}{{{{ end }}}}"
    if not fits or any("{{" in piece or '"""' in piece for piece in pieces):
        raise ValueError(
            "The chat template writes a message differently by what is around it, which Ollama's language does not "
            "say. Take --format gguf, and a server that reads the template in the file, as `llama-server --jinja`."
        )
    messages = (
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}{to_answer}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{end}{{{{ end }}}}'
    )
    return f"{opening}{{{{ range .Messages }}}}{messages}{{{{ end }}}}"


def _pieces(tokenizer: PreTrainedTokenizerBase, system: bool = False) -> list[str]:
    """What the template writes before, between and behind what is said, up to where the next answer begins.

    The token that begins every text is left out."""
    said = [("system", SYSTEM)] * system + [("user", USER), ("assistant", ANSWER), ("user", AGAIN)]
    messages = [{"role": role, "content": text} for role, text in said]
    text = render(tokenizer, messages, add_generation_prompt=True)
    if isinstance(tokenizer.bos_token, str):
        text = text.removeprefix(tokenizer.bos_token)
    return re.split("|".join(text for _, text in said), text)
