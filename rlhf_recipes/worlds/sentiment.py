"""Answers in a good mood: real questions, and a gold score that anyone can read, the sentiment of the answer.

Fine-Tuning Language Models from Human Preferences (Ziegler et al. 2019, arXiv:1909.08593) with a real language model,
and a mock labeler whose truth is known. Gold is VADER's compound score (Hutto and Gilbert, ICWSM 2014): a lexicon with
rules for negation, degree and emphasis, from -1 to 1. It knows nothing of what was asked, so a policy may please it and
lose all else. That is what to look at: `rlhf-recipes evaluate --under-base` measures it.

Needs the package vaderSentiment: `pip install 'rlhf_recipes[sentiment]'`.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations, pairwise
from random import Random
from typing import Any

from .labelers import draw_ranking, labeler_scale

# A small chat model fills any room that it is given: without this request nearly every answer would be cut off.
IN_SHORT = "Answer in one short sentence."
REVIEW = 'Go on with this review of a film, in one short sentence: "{opening} ..."'
OPENING = 24  # words of a review that are shown
LONGEST = 160  # characters of what is asked; longer questions tell stories, and cost as they are long

CUT_OFF = 0.3  # the price of an answer that does not end with a sentence
REPETITION = 1.0  # the price of an answer all of whose pairs of words are repeated; of others by their share
EMPTY = -1.0  # gold of an answer that says nothing

END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*$")  # of a sentence


def prompts(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A conversion for `ppo.convert`: rows of a source become requests for one short sentence, each only once.

    Args:
        rows: with `prompt` (messages, text, or a transcript of Anthropic's kind, whose first human turn is taken) or,
            as those of `stanfordnlp/imdb`, `text`, whose first words are to be continued. Questions of more than
            `LONGEST` characters are left out.
    Yields:
        `{"prompt": [user]}`.
    """
    seen = set()
    for row in rows:
        if "prompt" in row:
            question = _first_turn(row["prompt"])
            request = f"{question}\n\n{IN_SHORT}"
        else:
            question = " ".join(row["text"].replace("<br />", " ").split()[:OPENING])
            request = REVIEW.format(opening=question)
        if question and len(question) <= LONGEST and question not in seen:
            seen.add(question)
            yield {"prompt": [{"role": "user", "content": request}]}


def _first_turn(prompt: str | list[dict[str, str]]) -> str:
    """What a person asks first."""
    if not isinstance(prompt, str):
        return next((turn["content"] for turn in prompt if turn["role"] == "user"), "").strip()
    return re.split(r"\n\n(?:Human|Assistant):", prompt.strip().removeprefix("Human:"))[0].strip()


def gold(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """How good a mood each answer is in, less a small price, in the signature of TRL's reward functions.

    | what the answer is | score |
    |---|---|
    | VADER's compound score | -1 to 1 |
    | it does not end with a sentence | -0.3 |
    | the share of its pairs of words that it has said before | up to -1 |
    | it is empty | -1, and nothing else |

    Args:
        prompts: not looked at.
        completions: N messages lists, or N texts.
        columns: other columns of the batch, ignored.
    Returns:
        N scores; the best answers earn nearly 1.
    """
    return [score(text_of(completion)) for completion in completions]


def score(answer: str) -> float:
    """`gold` of one answer."""
    answer = answer.strip()
    if not answer:
        return EMPTY
    price = CUT_OFF * (not is_whole(answer)) + REPETITION * repeated(answer)
    return _analyzer().polarity_scores(answer)["compound"] - price


def is_whole(answer: str) -> bool:
    """Whether an answer ends where a sentence ends, and not in the middle of one."""
    return bool(END.search(answer.strip()))


def repeated(answer: str) -> float:
    """The share of an answer's pairs of neighbouring words that it has said before, from 0 to nearly 1."""
    words = re.findall(r"[\w']+", answer.lower())
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def text_of(completion: str | list[dict[str, str]]) -> str:
    """What a completion says."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


@cache
def _analyzer() -> Any:
    """VADER, with its lexicon read once. Raises ValueError where it is not installed."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError("The world of sentiment needs a package: pip install 'rlhf_recipes[sentiment]'.") from error
    return SentimentIntensityAnalyzer()


def demonstrations(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A conversion for `sft.convert`: of several samples of the base to each prompt the best by gold.

    This is how the SFT model learns to end its sentences. A prompt whose best answer is cut off has no demonstration.

    Args:
        rows: as `rlhf-recipes sample` writes them.
    Yields:
        `{"prompt": [user], "completion": [assistant]}`.
    """
    for row in rows:
        best = max(row["responses"], key=lambda response: score(text_of(response)))
        if is_whole(text_of(best)):
            yield {"prompt": row["prompt"], "completion": best}


def labeler(prompts: list[Any], responses: list[list[Any]], seed: int = 0) -> list[list[int]]:
    """Simulated labelers, for `rlhf-recipes label --by` and for rounds: ranks of each prompt's responses, 1 the best.

    They agree with gold in 73 % of the pairs of responses to the same prompt that differ in gold, of all that they are
    given here.

    Args:
        prompts: not looked at.
        responses: the K responses of each of N prompts.
        seed: of the draw; the same seed ranks the same responses alike.
    Returns:
        N lists of K ranks.
    Raises:
        ValueError: all responses are equally good.
    """
    rng = Random(seed)
    scores = [[score(text_of(response)) for response in several] for several in responses]
    scale = labeler_scale([abs(a - b) for several in scores for a, b in combinations(several, 2)])
    return [draw_ranking(rng, several, scale) for several in scores]


def comparisons(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A conversion for `dpo.convert`: each two responses of a ranking that differ in rank, as a pair.

    Args:
        rows: labels, as `rlhf-recipes label` writes them.
    Yields:
        `{"prompt": [user], "chosen": [assistant], "rejected": [assistant]}`.
    """
    for row in rows:
        best_first = sorted(zip(row["ranking"], row["responses"], strict=True), key=lambda ranked: ranked[0])
        for (better, chosen), (worse, rejected) in combinations(best_first, 2):
            if better < worse:
                yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
