"""What the bare base makes of a model's answers: whether they are still language, and still answers to their prompts.

No stage has touched the base, and none was rewarded by it, so it cannot have been pleased. Both figures are of its
log-likelihoods.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..data.tokens import tokenize_prompt
from ..feedback.rows import Row
from .models import Answer, Bench

WHICH = "Which request does this text answer?"


def panel_under_base(bench: Bench, rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, float]:
    """What the base says of a model's answers.

    Args:
        bench: of the base.
        rows: the prompts.
        answers: to each of them as many, in the order of the prompts.
    Returns:
        base_perplexity: of the answers after their prompts, a token. It rises where answers are no longer what anyone
            would write, and also falls below the base's own where they become trite or repeat themselves.
        about_prompt: see `about_prompts`; only where there are two prompts or more.
    """
    prompts = [rows[answer.row]["prompt_ids"] for answer in answers]
    likelihoods = bench.log_likelihoods(prompts, [answer.ids for answer in answers])
    panel = {"base_perplexity": math.exp(-sum(likelihoods) / sum(len(answer.ids) for answer in answers))}
    if len(rows) > 1:
        panel["about_prompt"] = fmean(about_prompts(bench, rows, answers))
    return panel


def about_prompts(bench: Bench, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
    """For each answer whether it is about its prompt: 1 or 0, or 0.5 where the same was said to both prompts.

    It is 1 where its prompt is likelier after it than after the model's answer to the next prompt, by the base. The
    prompt is the same on both sides, so how likely it is by itself cancels, and so does what all answers of a model
    share, such as a mood; what is left is the information that the answer has about its prompt, the idea of the mutual
    information of Li et al. 2016 (arXiv:1510.03055). A policy that has found one sentence for everything is at 50 %,
    however fluent or liked it is.
    """
    conversational = not isinstance(rows[0]["prompt"], str)
    asked = [_last_words(rows[answer.row]["prompt"]) for answer in answers]
    following = [answers[(index + len(answers) // len(rows)) % len(answers)] for index in range(len(answers))]
    contexts = [_question(bench.tokenizer, said.text, conversational) for said in [*answers, *following]]
    prompts: list[list[int]] = [bench.tokenizer(words, add_special_tokens=False)["input_ids"] for words in asked]
    likelihoods = bench.log_likelihoods(contexts, prompts * 2)
    own, other = likelihoods[: len(answers)], likelihoods[len(answers) :]
    return [0.5 + 0.5 * ((mine > theirs) - (mine < theirs)) for mine, theirs in zip(own, other, strict=True)]


def _last_words(prompt: Any) -> str:
    """What was said last before the answer."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _question(tokenizer: Any, answer: str, conversational: bool) -> list[int]:
    """Token ids after which the base is to say what an answer was given to."""
    words = f"{answer.strip()}\n\n{WHICH}"
    return tokenize_prompt(tokenizer, [{"role": "user", "content": words}] if conversational else f"{words}\n\n")
