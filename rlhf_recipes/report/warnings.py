"""What a run's curves warn of, in words: each sentence has its number, and what to do.

The functions take plain lists, in the order of the updates, and return None where there is nothing to say.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..records.rates import clear_fall
from .gather import TITLES, RunContents, best_win

SHORT = 10  # updates; of fewer, nothing is said of a trend
MIXED = 0.8  # correlation of reward and length from which the one may be the other
RATIO = 0.1  # mean distance of the ratio from 1
CLIPPED = 0.3  # share of tokens
ENDLESS = 0.2  # share of answers
COLLAPSED = 0.3  # of the entropy at the start
EXPLAINED = 0.2  # of the returns' variance
WIDE = 0.1  # half of an interval
ROUNDING = 0.5  # of the approximate KL of an update


class RunWarning(NamedTuple):
    """What deserves a word in a run."""

    about: str  # the part of the page that it is about
    text: str  # with its number, and what to do


def warnings_of_run(run: RunContents, grows: bool = False) -> Iterator[RunWarning]:
    """All warnings of a run: what its stages found, then what its curves say, then what its results cannot carry.

    Args:
        grows: who reads them sees that it is not finished.
    """
    for part in run.parts:
        later = f", round {part.number}" if part.number > 1 else ""
        for name, record in part.manifest.stages.items():
            if record["state"] != "done" and not grows:
                text = "This stage is not finished: shown is what it has logged so far. Run it again to go on."
                yield RunWarning(f"{TITLES[name]}{later}", text)
        for text in (run.card(part) or {"warnings": ()})["warnings"]:
            yield RunWarning(f"{TITLES['reward']}{later}", text)
    if run.recipe.ppo is not None:
        texts = [
            kl_rising(run.ppo("objective/kl")[1], run.ppo("objective/scores")[1]),
            reward_is_length(run.ppo("objective/scores")[1], run.ppo("response_length")[1]),
            over_optimised(*_evaluations(run), run.checkpoints()) if len(run.parts) == 1 else None,
            ratio_far(*run.ppo("val/ratio")),
            clipped(run.ppo("policy/clipfrac_avg")[1]),
            inexact(run.ppo("val/first_pass_log_ratio_max")[1]),
            noisy(run.ppo("val/batching_noise")[1], run.ppo("policy/approxkl_avg")[1]),
            unexplained(run.ppo("val/explained_variance")[1]),
            endless(run.ppo("without_eos")[1]),
            entropy_collapsed(run.ppo("policy/entropy_avg")[1]),
        ]
        yield from (RunWarning(TITLES["ppo"], text) for text in texts if text is not None)
    win = best_win(run)
    if win is not None and (text := uncertain(win)) is not None:
        yield RunWarning("Results", text)
    yield from (RunWarning("Evaluation", text) for text in (run.evaluation or {}).get("warnings", ()))


def _evaluations(run: RunContents) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """PPO's held-out evaluations: the steps, and each one's scores and measures of quality, an answer each."""
    rows = [row for row in run.parts[0].samples if row["stage"] == "ppo"]
    groups = itertools.groupby(rows, key=lambda row: (row["step"], row["model"]))
    groups = [(step, list(group)) for (step, model), group in groups if model == "ppo"]
    # Of the last step the comparison at the end has the same answers as the evaluation, and takes its place; or, where
    # evaluations chose the policy, it is on other prompts.
    prompts = [[row["prompt"] for row in group] for _, group in groups]
    evaluations = {step: group for (step, group), asked in zip(groups, prompts, strict=True) if asked == prompts[0]}
    judge = next((key for key in ("gold", "judge") if all(key in row for row in rows)), None)
    if judge is None or not all("score" in row for row in rows):
        return [], [], []
    scores, quality = ([[row[key] for row in rows] for rows in evaluations.values()] for key in ("score", judge))
    return list(evaluations), scores, quality


def _fifths(values: Sequence[float]) -> list[list[float]]:
    """Five parts of the finite values, in their order; none where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < SHORT:
        return []
    edges = [round(len(finite) * part / 5) for part in range(6)]
    return [finite[start:end] for start, end in itertools.pairwise(edges)]


def kl_rising(kl: Sequence[float], reward: Sequence[float] = ()) -> str | None:
    """The KL's mean over the last fifth is above that of the one before, by a tenth and by twice the standard error."""
    parts = _fifths(kl)
    if not parts:
        return None
    before, after, error = _last_two(parts)
    if after - before <= max(0.1 * abs(before), 2 * error, 0.05):
        return None
    flat = ""
    if _fifths(reward):
        earlier, later, error = _last_two(_fifths(reward))
        if later - earlier <= 2 * error:
            flat = f" The reward did not rise with it: {earlier:.2f} and then {later:.2f}."
    return (
        f"KL was still rising at the end: {before:.2f} and then {after:.2f} nats a response over the last two fifths "
        f"of the updates.{flat} The policy has not settled: raise ppo.kl_coef, set ppo.target_kl, or watch a longer "
        "run."
    )


def _last_two(parts: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The means of the last two parts, and the standard error of their difference."""
    before, after = statistics.fmean(parts[-2]), statistics.fmean(parts[-1])
    return before, after, math.hypot(*(statistics.stdev(part) / math.sqrt(len(part)) for part in parts[-2:]))


def reward_is_length(reward: Sequence[float], length: Sequence[float]) -> str | None:
    """The reward rose, the responses grew by a tenth, and over the updates the two go together."""
    if not _fifths(reward) or len(reward) != len(length):
        return None
    (first, *_, last), (short, *_, long) = ([statistics.fmean(p) for p in _fifths(v)] for v in (reward, length))
    pairs = [pair for pair in zip(reward, length, strict=True) if all(map(math.isfinite, pair))]
    rewards, lengths = zip(*pairs, strict=True)
    if last <= first or long < 1.1 * short or len(set(rewards)) < 2 or len(set(lengths)) < 2:
        return None
    correlation = statistics.correlation(rewards, lengths)
    if correlation < MIXED:
        return None
    return (
        f"The reward rose from {first:.2f} to {last:.2f}, and the responses grew from {short:.0f} to {long:.0f} tokens "
        f"with it (correlation {correlation:.2f}): PPO may have learned to write more. Compare win rates at equal "
        "length, and look at the reward card's part on length."
    )


def over_optimised(
    steps: Sequence[float], scores: Sequence[list[float]], quality: Sequence[list[float]], kept: Sequence[int] = ()
) -> str | None:
    """Quality fell from its peak to the end by more than chance (see `rates.clear_fall`), reward not.

    Args:
        steps, scores, quality: the held-out evaluations, the same prompts in each.
        kept: the updates whose checkpoint is there.
    """
    if len(steps) < 3 or len({len(values) for values in quality}) > 1:
        return None
    means = [statistics.fmean(values) for values in quality]
    peak = clear_fall(np.array(quality))
    if peak is None:
        return None
    then, now = statistics.fmean(scores[peak]), statistics.fmean(scores[-1])
    if now < then:
        return None
    near = min(kept, key=lambda step: abs(step - steps[peak]), default=None)
    if steps[peak] == 0:
        advice = "No update was better than the SFT model: raise"
    elif near is None:
        advice = "Stop there (no checkpoint was kept), raise"
    else:
        advice = f"Stop there (the nearest checkpoint that was kept is ppo/checkpoint-{near}), raise"
    return (
        f"Over-optimised: held-out quality fell from {means[peak]:.2f} at update {steps[peak]:.0f} to {means[-1]:.2f} "
        f"while the reward went from {then:.2f} to {now:.2f}. {advice} ppo.kl_coef, or train a reward ensemble."
    )


def ratio_far(steps: Sequence[float], ratios: Sequence[float]) -> str | None:
    """In some update the mean ratio of new to old probability was far from 1."""
    far = [(abs(ratio - 1), step, ratio) for step, ratio in zip(steps, ratios, strict=True) if math.isfinite(ratio)]
    if not far or max(far)[0] <= RATIO:
        return None
    _, step, ratio = max(far)
    return (
        f"The ratio of new to old probabilities was {ratio:.2f} on average in update {step:.0f}, and should stay near "
        "1: an update moves the policy too far. Lower ppo.learning_rate or ppo.num_ppo_epochs."
    )


def clipped(fractions: Sequence[float]) -> str | None:
    """Over the last fifth much of the gradient was clipped away."""
    last = _fifths(fractions)[-1:]
    if not last or statistics.fmean(last[0]) <= CLIPPED:
        return None
    return (
        f"{statistics.fmean(last[0]):.0%} of the tokens were clipped over the last fifth of the updates: much of each "
        "rollout was not learned from. Lower ppo.learning_rate or ppo.num_ppo_epochs."
    )


def inexact(log_ratios: Sequence[float]) -> str | None:
    """Before the first step of an update some token's ratio was not 1."""
    if not any(log_ratios):
        return None
    return (
        f"Before the first step of an update a token's log-ratio was {max(log_ratios):.2g}, and should be 0: the "
        "forward that trains rounds otherwise than the one that scored, and this noise is in every ratio. "
        "base.dtype=float16 or float32 makes it smaller."
    )


def noisy(noise: Sequence[float], approxkl: Sequence[float]) -> str | None:
    """Of how far updates seem to move the policy, much is the rounding of the passes after the first.

    Args:
        noise: of each round, standard deviations of a token's log-ratio. Half their square is their share of approxkl.
        approxkl: of each update.
    """
    moved = statistics.fmean(approxkl) if approxkl else 0.0
    if not noise or not moved or max(noise) ** 2 / 2 <= ROUNDING * moved:
        return None
    return (
        f"A token's log-probability differs by {max(noise):.2g} nats (one standard deviation) from one micro-batch to "
        f"another: an approximate KL of {max(noise) ** 2 / 2:.2g} in each pass after the first. Updates had "
        f"{moved:.2g}, so much of what they seem to move is rounding. Set base.dtype=float16, ppo.num_ppo_epochs=1, or "
        "ppo.num_mini_batches=1, whose passes round alike."
    )


def unexplained(variance: Sequence[float]) -> str | None:
    """Over the last three fifths the critic explained little of the returns' variance."""
    parts = _fifths(variance)
    if not parts:
        return None
    share = statistics.fmean(value for part in parts[2:] for value in part)
    if share >= EXPLAINED:
        return None
    worse = ", less than a constant would" if share < 0 else ""
    return (
        f"The critic explained {share:.0%} of the returns' variance{worse} over the last three fifths of the updates, "
        "so advantages are noisy. Raise ppo.critic_learning_rate or ppo.critic_warmup_steps, or do without a critic "
        "(ppo.advantage_estimator=rloo)."
    )


def endless(shares: Sequence[float]) -> str | None:
    """Over the last fifth many responses did not end."""
    last = _fifths(shares)[-1:]
    if not last or statistics.fmean(last[0]) <= ENDLESS:
        return None
    return (
        f"{statistics.fmean(last[0]):.0%} of the responses were cut off before they ended over the last fifth of the "
        "updates, and the reward scored a torn text. Raise ppo.response_length or ppo.missing_eos_penalty."
    )


def entropy_collapsed(entropy: Sequence[float]) -> str | None:
    """The entropy fell to a small part of what it was."""
    parts = _fifths(entropy)
    if not parts:
        return None
    first, last = statistics.fmean(parts[0]), statistics.fmean(parts[-1])
    if last >= COLLAPSED * first:
        return None
    return (
        f"The entropy fell from {first:.2f} to {last:.2f} nats a token: the policy says nearly the same each time, and "
        "can explore no more. Raise ppo.kl_coef or lower ppo.learning_rate."
    )


def uncertain(win: dict[str, Any]) -> str | None:
    """The interval of a win rate holds one half, or is wide."""
    low, high, prompts = win["low"], win["high"], win["prompts"]
    if (high - low) / 2 <= WIDE and not low <= 0.5 <= high:
        return None
    chance = "; it could be chance" if low <= 0.5 <= high else ""
    return (
        f"The win rate is known only to {low:.0%} to {high:.0%}, from {prompts:,} prompts{chance}. Hold out more: "
        "ppo.heldout, ppo.heldout_limit, or more prompts in `rlhf-recipes evaluate`."
    )
