"""`rlhf-recipes chat`: talk to the models of a run in a terminal, with the reward of each answer beside it."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ..records.folder import adapter_folder, newest_round_first, read_recipe
from ..records.terminal import printable
from ..stages.reward.adapters import PROBES, add_reward_roles, member_folders, score_rows

HELP = """\
/compare NAME  another model of the run answers beside the first; /compare alone: no longer
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


class Conversation:
    """A conversation with the models of a run: adapters on the one base, among which it switches.

    An answer's reward is that of the run's newest reward model.
    """

    def __init__(
        self, run_dir: Path, models: Iterable[str], temperature: float, response_length: int, system: str | None = None
    ) -> None:
        """
        Args:
            models: the first answers; others can, by `answer`. base, sft, ppo, dpo, or a folder inside the run.
            temperature: 0 takes the likeliest token.
            response_length: tokens of an answer at most.
            system: a system message.
        Raises:
            ValueError: no run folder, or no such model in it.
        """
        self.recipe, self.run_dir = read_recipe(run_dir), run_dir
        if temperature < 0 or response_length < 1:
            raise ValueError(f"--temperature must not be below 0 ({temperature}), --max-tokens not below 1.")
        folders = {name: adapter_folder(run_dir, self.recipe, name) for name in models}
        self.tokenizer = load_tokenizer(self.recipe.base)
        self.longest = longest_row(self.recipe.base, None, response_length, "--max-tokens")
        self.shared = open_models(self.recipe, folders)
        self.names = list(folders)
        rewarded = next(
            (folder for folder in newest_round_first(run_dir) if (folder / "reward" / PROBES).is_file()), None
        )
        if rewarded is not None:
            add_reward_roles(self.shared, member_folders(rewarded))
        stops = [stop_token_id(self.tokenizer, conversational=True)]
        self.sampler = Sampler(self.shared, self.tokenizer, response_length, temperature or 1.0, 1, stops)
        self.config = generation_config(self.sampler)
        if temperature == 0:
            self.config.update(do_sample=False, temperature=None, top_k=None, top_p=None)
        self.start: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages: Messages = list(self.start)

    def add_model(self, name: str) -> None:
        """Give a model a role on the base, if it has none. Raises ValueError where the run has no such model."""
        if name and name not in self.names:
            folder = adapter_folder(self.run_dir, self.recipe, name)
            if name != "base":
                self.shared.add_role(name, folder)
            self.names.append(name)

    def answer(self, name: str, streamer: TextStreamer | None = None) -> Reply:
        """What a model says next. The conversation stays as it is. Raises ValueError where it has grown too long."""
        prompt = tokenize_prompt(self.tokenizer, self.messages)
        if self.longest is not None and len(prompt) > self.longest:
            raise ValueError(f"The conversation has {len(prompt)} tokens, and room for {self.longest}: /reset it.")
        ids = torch.tensor([prompt], device=self.shared.device)
        with sampling(self.shared, name), autocast_of(self.shared):
            output: Any = self.shared.causal.generate(
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


def converse(talk: Conversation, compare: str | None = None) -> None:
    """Read messages from standard input and print answers, until it ends. A ValueError is printed, and it goes on."""
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
        except ValueError as error:
            console.print(Line(printable(str(error), keep="\n\t"), style="red"))
            if talk.messages and talk.messages[-1]["role"] == "user":
                talk.messages.pop()


def _next_line() -> str | None:
    """What is typed next; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


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
