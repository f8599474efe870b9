"""What an evaluation comes to: the checkpoint to ship, what to distrust, and the tables for the terminal."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..data.text import printable
from .judges import PROXY

Result = Mapping[str, Any]  # what evaluation.json holds

FEW_PROMPTS = 100  # of which a rate of 60 % has an interval of 19 points
APART = 0.1  # between the intervals of two win rates
FAR = 0.5  # nats a token to the reference, at which an answer's tokens are 1.6 times as likely as they were


def percent(rate: Mapping[str, float]) -> str:
    """A rate with its interval."""
    return f"{rate['rate']:.0%} ({rate['low']:.0%} to {rate['high']:.0%})"


def quality_judges(result: Result, asked: Sequence[str] = ()) -> list[str]:
    """The judges of quality, the most trusted first: gold, judge, models that were `asked`, functions and others.

    The reward that the policy was trained against is none of them, whatever its name.
    """
    names = [
        name for name in result["judges"] if name != PROXY and result["judges"][name] != result["judges"].get(PROXY)
    ]
    trust = {"gold": 0, "judge": 1, **dict.fromkeys(asked, 2)}
    return sorted(names, key=lambda name: trust.get(name, 3))


def policies(result: Result) -> list[str]:
    """The models that PPO made in this run, in the order of training."""
    return [name for name in result["models"] if ":" not in name and "ppo" in name.split("/")]


def best(result: Result, asked: Sequence[str] = ()) -> dict[str, str] | None:
    """Which of the policies to ship, if any: the one that wins most by the most trusted judge. None without one."""
    candidates = policies(result)
    for judge in quality_judges(result, asked):
        against = result["against"][0]
        rates = {w["model"]: w for w in result["wins"] if (w["judge"], w["against"]) == (judge, against)}
        rates = {name: rates[name] for name in candidates if name in rates}
        if not rates:
            continue
        last = list(rates)[-1]
        name = max(reversed(rates), key=lambda model: rates[model]["rate"])  # the later of two that win alike
        found = f"by {judge} it wins {percent(rates[name])} of the prompts against {against}"
        beats = rates[name]["rate"] > 0.5
        words = f"{name} is the one to ship" if beats else f"None beats {against}. {name} comes nearest"
        words += f": {found}"
        if name != last:
            apart = rates[name]["low"] > rates[last]["high"]
            words += f", and {last}, the last, {percent(rates[last])}. The two intervals "
            words += "are apart." if apart else "overlap, so the difference may be chance."
        else:
            words += ", and no checkpoint before it wins more." if len(rates) > 1 else "."
        return {"model": name, "judge": judge, "words": words}
    return None


def warnings(result: Result, scores: Mapping[str, Mapping[str, list[float]]], asked: Sequence[str] = ()) -> list[str]:
    """What to distrust, a sentence each.

    Args:
        scores: of each judge of single answers, for each model, a score an answer.
    """
    found = []
    if result["prompts"] < FEW_PROMPTS:
        found.append(f"There are only {result['prompts']} prompts, so that intervals are wide; --prompts takes more.")
    for judge in quality_judges(result, asked):
        if judge in scores and PROXY in scores:
            found += _overoptimised(result, scores, judge)
    for name in policies(result)[-1:]:
        for against in result["against"]:
            found += _changed(result, name, against)
            found += _gamed(result, name, against, quality_judges(result, asked)[:1])
    for win in result["wins"]:
        if win["ties"] > 0.5:
            found.append(
                f"By {win['judge']}, {win['model']} and {win['against']} tie on {win['ties']:.0%} of the pairs."
            )
    return found


def _overoptimised(result: Result, scores: Mapping[str, Mapping[str, list[float]]], judge: str) -> list[str]:
    """Whether the reward rose while the judge's score fell, from the judge's best model to the last policy."""
    names = [*result["against"], *policies(result)]
    names = [name for name in names if name in scores[judge] and name in scores[PROXY]]
    if len(names) < 2:
        return []
    last, top = names[-1], max(names, key=lambda name: fmean(scores[judge][name]))
    fell = [a - b for a, b in zip(scores[judge][top], scores[judge][last], strict=True)]
    before, after = (fmean(scores[PROXY][name]) for name in (top, last))
    # Clear of chance: the mean difference on the same prompts is above two of its standard errors.
    if after > before and len(fell) > 1 and fmean(fell) > 2 * stdev(fell) / len(fell) ** 0.5:
        return [
            f"From {top} to {last} the reward rose from {before:.2f} to {after:.2f} while {judge} fell from "
            f"{fmean(scores[judge][top]):.2f} to {fmean(scores[judge][last]):.2f}: the reward model is over-optimised. "
            "Ship the earlier model, or train again with a larger ppo.kl_coef."
        ]
    return []


def _gamed(result: Result, name: str, against: str, trusted: Sequence[str]) -> list[str]:
    """Whether a policy wins far more by the reward that it was trained against than by the most trusted judge."""
    rates = {w["judge"]: w for w in result["wins"] if (w["model"], w["against"]) == (name, against)}
    return [
        f"By the reward {name} wins {percent(rates[PROXY])} against {against}, by {judge} {percent(rates[judge])}: "
        "part of what it learned pleases the reward model alone."
        for judge in trusted
        if PROXY in rates and judge in rates and rates[PROXY]["low"] > rates[judge]["high"] + APART
    ]


def _changed(result: Result, name: str, against: str) -> list[str]:
    """What a policy's behaviour has come to, compared with another model's."""
    ours, theirs = (result["models"][model]["behaviour"] for model in (name, against))
    means = [result["models"][model]["means"].get(PROXY) for model in (name, against)]
    found = []
    if ours["tokens"] > 1.25 * theirs["tokens"] and None not in means and means[0] > means[1]:
        found.append(
            f"{name}'s answers have {ours['tokens']:.0f} tokens and {against}'s {theirs['tokens']:.0f}: length grew "
            "with the reward. Look at the length-controlled win rate."
        )
    if ours.get("kl_per_token", 0) > FAR:
        found.append(
            f"{name} is far from the reference: {ours['kl']:.1f} nats an answer, {ours['kl_per_token']:.2f} a token."
        )
    for key, what in (("refusals", "refuses"), ("repetition", "repeats itself in"), ("without_eos", "does not end")):
        if ours[key] > theirs[key] + 0.1:
            found.append(f"{name} {what} {ours[key]:.0%} of its answers, {against} {theirs[key]:.0%}.")
    if ours["distinct_2"] < 0.5 * theirs["distinct_2"]:
        found.append(
            f"{name} says little that differs: {ours['distinct_2']:.0%} of its word pairs are distinct, of {against}'s "
            f"{theirs['distinct_2']:.0%}."
        )
    return found


BEHAVIOUR = {  # of the panel: heading and format
    "tokens": ("tokens", "{:.1f}"),
    "without_eos": ("no\nEOS", "{:.0%}"),
    "distinct_1": ("dist-1", "{:.2f}"),
    "distinct_2": ("dist-2", "{:.2f}"),
    "repetition": ("rep-4", "{:.1%}"),
    "refusals": ("refu-\nsals", "{:.0%}"),
    "sycophancy": ("syco-\nphancy", "{:.0%}"),
    "self_similarity": ("alike", "{:.2f}"),
    "kl": ("KL", "{:.2f}"),
    "kl_per_token": ("KL a\ntoken", "{:.3f}"),
}


def tables(result: Result) -> list[Table]:
    """The tables of an evaluation: wins, behaviour and, where any of it was measured, the alignment tax."""
    panels = {name: of["behaviour"] for name, of in result["models"].items()}
    behaviour = {
        name: {heading: form.format(panel[key]) for key, (heading, form) in BEHAVIOUR.items() if key in panel}
        for name, panel in panels.items()
    }
    costs = {name: _tax(of) for name, of in result["models"].items()}
    found = [_wins(result), _by_model("Behaviour", behaviour)]
    return [*found, _by_model("Alignment tax", costs)] if any(costs.values()) else found


def _table(*names: str, title: str) -> Table:
    """An empty table, as narrow as can be, whose first columns are names. None of its cells is ever cut."""
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _wins(result: Result) -> Table:
    sole = result["against"][0] if len(result["against"]) == 1 else None
    title = f"Wins {'' if sole is None else f'against {printable(sole)} '}on {result['prompts']:,} prompts"
    names = ("model", "judge") if sole else ("model", "against", "judge")
    table = _table(*names, title=title)
    for heading in ("wins (95 %)", "at equal\nlengths (95 %)", "ties", "mean\nscore", "its"):
        table.add_column(heading, justify="right", overflow="fold")
    judge = None
    for win in sorted(result["wins"], key=lambda win: list(result["judges"]).index(win["judge"])):
        if win["judge"] != judge and judge is not None:
            table.add_section()
        judge = win["judge"]
        means = [result["models"][win[side]]["means"].get(judge) for side in ("model", "against")]
        cells = [percent(win), percent(win["length_controlled"]), f"{win['ties']:.0%}"]
        cells += ["" if mean is None else f"{mean:.2f}" for mean in means]
        table.add_row(*(Text(printable(win[key])) for key in names), *cells)
    return table


def _tax(of_model: Mapping[str, Any]) -> dict[str, str]:
    cells = {"perplexity": f"{of_model['perplexity']:.2f}"} if "perplexity" in of_model else {}
    for task, metrics in of_model.get("tasks", {}).items():
        for metric, found in metrics.items():
            error = "" if found["error"] is None else f" ± {found['error']:.3f}"
            cells[f"{task}\n{metric}"] = f"{found['value']:.3f}{error}"
    return cells


def _by_model(title: str, cells: Mapping[str, Mapping[str, str]]) -> Table:
    """A row a model. A column that no model has a value for is left out."""
    headings = list(dict.fromkeys(heading for of_model in cells.values() for heading in of_model))
    table = _table("model", title=title)
    for heading in headings:
        table.add_column(Text(printable(heading, keep="\n")), justify="right", overflow="fold")
    for name, of_model in cells.items():
        table.add_row(Text(printable(name)), *(of_model.get(heading, "") for heading in headings))
    return table
