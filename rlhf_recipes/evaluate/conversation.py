"""`rlhf-recipes chat`: talk to the models of a run, and to exports, with the run's reward of each answer beside it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text as Line
from transformers import TextStreamer

from ..data.tokens import Messages, answer_frame, response_texts, stop_token_id, tokenize_prompt
from ..model.backends import generation_config, sampling
from ..model.base import load_tokenizer, longest_row
from ..model.open import open_models
from ..model.sampler import Sampler, autocast_of
from ..model.shared import SharedBase
from ..recipe.values import Recipe
from ..records.folder import adapter_folder, last_model, newest_round_first, read_export, read_recipe
from ..records.terminal import printable
from ..stages.reward.adapters import PROBES, add_reward_roles, check_whole, member_folders, score_rows
from .exports import open_export

HELP = """\
/compare NAME  another model of the run, or an export, answers beside the first; /compare alone: no longer
/retry         another answer to the last message
/reset         forget the conversation
/quit          end, as Ctrl-D does"""


@dataclass(frozen=True)
class Reply:
    """What a model said in a conversation."""

    model: str
    text: str
    tokens: int
    ended: bool  # by itself, and not by the limit of tokens
    reward: float | None  # None: the run has no reward model


class Streamer(TextStreamer):
    """Prints an answer while it comes, control characters escaped."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        frame = answer_frame(tokenizer)
        self.before, self.held, self.begun = frame.without_special(frame.before), "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next part of the answer, from the first letter of its own text on."""
        if not self.begun:
            self.held += text
            if self.before.startswith(self.held) and not stream_end:
                return
            text = self.held.removeprefix(self.before).lstrip()
            self.begun = bool(text)
        print(printable(text, keep="\n\t"), end="\n" if stream_end else "", flush=True)


class Voice(NamedTuple):
    """A model that answers: a role on a base."""

    shared: SharedBase
    role: str


class Conversation:
    """A conversation with the models of a run, adapters on the one base among which it switches, and with exports.

    An answer's reward is that of the run's newest reward model. In a conversation with exports alone there is none.
    """

    def __init__(
        self,
        folder: Path,
        models: Sequence[str | None],
        temperature: float | None,
        response_length: int,
        system: str | None = None,
    ) -> None:
        """
        Args:
            folder: a run's, or an export's, which then answers first.
            models: who answers, the first of them first; others can, by `answer`. Of a run base, sft, ppo, dpo, or a
                folder inside it, None for the last that it has; folders of exports.
            temperature: 0 takes the likeliest token. None: as the run's ppo stage or the export, else 0.7.
            response_length: tokens of an answer at most.
            system: a system message.
        Raises:
            ValueError: neither a run nor an export, or no such model in it.
        """
        if not 0 <= (temperature or 0) < math.inf or response_length < 1:
            raise ValueError(
                f"--temperature must not be below 0 ({temperature}), nor be infinite, --max-tokens not below 1."
            )
        self.folder, self.voices = folder, dict[str, Voice]()
        self.recipe: Recipe | None = None
        if read_export(folder) is None:
            names, sampled = self._open_run(models, response_length)
        else:
            names, sampled = self._open_export(models, response_length)
        for name in names:
            self.add_model(name)
        temperature = sampled if temperature is None else temperature
        stops = [stop_token_id(self.tokenizer, conversational=True)]
        self.sampler = Sampler(self.shared, self.tokenizer, response_length, temperature or 1.0, 1, stops)
        self.config = generation_config(self.sampler)
        if temperature == 0:
            self.config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
        self.start: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages: Messages = list(self.start)

    def _open_run(self, models: Sequence[str | None], response_length: int) -> tuple[list[str], float]:
        """Open the run's base and its newest reward model. Returns who is to answer, and PPO's temperature."""
        self.recipe = read_recipe(self.folder)
        names = [name or last_model(self.folder, self.recipe) for name in models]
        for name in names:
            if not _is_export(name):
                adapter_folder(self.folder, self.recipe, name)  # raises before the base is loaded
        self.tokenizer = load_tokenizer(self.recipe.base)
        self.longest = longest_row(self.recipe.base, None, response_length, "--max-tokens")
        self.shared = open_models(self.recipe, {})
        assert self.shared.fingerprint is not None
        self.fingerprint = self.shared.fingerprint
        rewarded = next((f for f in newest_round_first(self.folder) if (f / "reward" / PROBES).is_file()), None)
        if rewarded is not None:
            folders = member_folders(rewarded)
            for folder in folders.values():
                check_whole(folder)
            add_reward_roles(self.shared, folders)
        return names, 0.7 if self.recipe.ppo is None else self.recipe.ppo.args.get("temperature", 0.7)

    def _open_export(self, models: Sequence[str | None], response_length: int) -> tuple[list[str], float]:
        """Open the export, which answers first. Returns who is to answer beside it, and its temperature."""
        self.shared, role, base, self.tokenizer, self.fingerprint, sampled = open_export(self.folder)
        self.longest = longest_row(base, None, response_length, "--max-tokens")
        self.voices = {str(self.folder): Voice(self.shared, role)}
        return list(filter(None, models)), sampled

    @property
    def names(self) -> list[str]:
        """Who can answer, the first of them first."""
        return list(self.voices)

    def add_model(self, name: str) -> None:
        """Let a model answer too. Raises ValueError where there is none by that name, or it reads other tokens."""
        if not name or name in self.voices:
            return
        record = read_export(Path(name))
        if record is not None:
            if any(record["base"][key] != self.fingerprint[key] for key in ("tokenizer", "chat_template")):
                raise ValueError(f"{name} has another tokenizer or chat template than {self.names[0]}.")
            added = open_export(Path(name))
            self.voices[name] = Voice(added.shared, added.role)
        elif self.recipe is None:
            raise ValueError(f"{name} is no export. What is compared with {self.folder} is the folder of another.")
        else:
            folder = adapter_folder(self.folder, self.recipe, name)
            if name != "base":
                self.shared.add_role(name, folder)
            self.voices[name] = Voice(self.shared, name)

    def answer(self, name: str, streamer: TextStreamer | None = None) -> Reply:
        """What a model says next. The conversation stays as it is. Raises ValueError where it has grown too long."""
        prompt = tokenize_prompt(self.tokenizer, self.messages)
        if self.longest is not None and len(prompt) > self.longest:
            raise ValueError(f"The conversation has {len(prompt)} tokens, and room for {self.longest}: /reset it.")
        shared, role = self.voices[name]
        ids = torch.tensor([prompt], device=shared.device)
        with sampling(shared, role), autocast_of(shared):
            output: Any = shared.causal.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.config,
                streamer=streamer,
            )
        response = output[0, len(prompt) :].tolist()
        ended = response[-1] in self.sampler.stop_token_ids
        (text,) = response_texts(self.tokenizer, [response], conversational=True)
        return Reply(name, text.strip(), len(response), ended, self.score(prompt + response))

    def score(self, row: list[int]) -> float | None:
        """The run's reward (an ensemble's mean) of prompt and response."""
        roles = [role for role in self.shared.heads if role.startswith("reward")]
        scores = [score_rows(self.shared, [row], role).item() for role in roles]
        return sum(scores) / len(scores) if scores else None


def _is_export(name: str) -> bool:
    """Whether this is the folder of an export, and no model of a run."""
    return read_export(Path(name)) is not None


def converse(talk: Conversation, compare: str | None = None) -> None:
    """Read messages from standard input and print answers, until it ends. What cannot be done is said, and it goes on.

    Raises ValueError where the input is no UTF-8.
    """
    console = Console(highlight=False)
    main = talk.names[0]
    console.print(Line(f"{main}. /help lists what else there is."))
    while (line := _next_line()) is not None:
        word, _, rest = line.partition(" ")
        try:
            if word == "/help":
                console.print(Line(HELP))
            elif word == "/quit":
                return
            elif word == "/reset":
                talk.messages = list(talk.start)
            elif word == "/compare":
                talk.add_model(rest.strip())
                compare = rest.strip() or None
            elif word == "/retry":
                if len(talk.messages) <= len(talk.start):
                    raise ValueError("There is nothing yet to answer again.")
                talk.messages.pop()
                _print_reply(talk, main, compare, console)
            elif word.startswith("/"):
                raise ValueError(f"There is no {word} here. /help lists what there is.")
            elif line:
                talk.messages.append({"role": "user", "content": line})
                _print_reply(talk, main, compare, console)
        except (ValueError, OSError) as error:  # of the system: a name that is too long, a folder that is closed
            console.print(Line(printable(str(error), keep="\n\t"), style="red"))
            if talk.messages and talk.messages[-1]["role"] == "user":
                talk.messages.pop()


def _next_line() -> str | None:
    """What is typed next; None at the end of the input. Raises ValueError where it is no UTF-8."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        line.encode()  # bytes that are no UTF-8 may stand in it as halves of surrogate pairs
        return line
    except EOFError:
        return None
    except UnicodeError as error:
        raise ValueError(f"What is typed, or comes from a file, must be UTF-8: {error}.") from error


def _print_reply(talk: Conversation, main: str, compare: str | None, console: Console) -> None:
    """Print the next answer as it comes, or two side by side. The conversation goes on from the first model's."""
    if compare is None:
        replies = [talk.answer(main, Streamer(talk.tokenizer))]
        console.print(Line(_about(replies[0]), style="dim"))
    else:
        replies = [talk.answer(name) for name in (main, compare)]
        table = Table(*(Column(Line(reply.model)) for reply in replies), expand=True)
        table.add_row(*(Line(printable(reply.text, keep="\n\t")) for reply in replies))
        table.add_row(*(Line(_about(reply), style="dim") for reply in replies))
        console.print(table)
    talk.messages.append({"role": "assistant", "content": replies[0].text})


def _about(reply: Reply) -> str:
    """The line below a reply."""
    words = f"{reply.tokens} tokens" + ("" if reply.ended else ", cut off")
    return words if reply.reward is None else f"reward {reply.reward:.2f}, {words}"
