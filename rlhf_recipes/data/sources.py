"""Named sources: public comparisons and rankings by people (or models), each with the format it has and its licence.

`reward.data=helpsteer3` in a recipe and `rlhf-recipes check helpsteer3` load one from the Hub. A downloaded copy is
read with the same conversion: `reward.data=my_copy.jsonl reward.convert=helpsteer3`. Standard library only.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..recipe.lookup import function, is_function
from ..recipe.overrides import suggestion
from ..recipe.values import Source

Row = dict[str, Any]

Conversion = Callable[[Iterable[Any]], Iterable[Any]]

MOST_RESPONSES = 9  # InstructGPT ranked 4 to 9


@dataclass(frozen=True)
class Named:
    """A source with a name."""

    data: str  # the Hub dataset
    stages: tuple[str, ...]  # what it is for
    licence: str  # as its card says
    citation: str
    about: str
    subset: str | None = None
    split: str = "train"
    convert: Conversion | None = None


def resolve_source(source: Source) -> Source:
    """A source whose `data` is a name, as the Hub dataset that it stands for; any other as it is.

    A file of that name comes first, and what the user has set (subset, split, convert) stays.
    """
    named = SOURCES.get(source.data)
    if named is None or Path(source.data).exists():
        return source
    split = named.split if source.split == Source.split else source.split
    convert = source.convert or (source.data if named.convert else None)
    return replace(source, data=named.data, subset=source.subset or named.subset, split=split, convert=convert)


def conversion(key: str, name: str) -> Conversion:
    """The conversion of a named source, or `module:function`: it takes a source's rows, and gives those of a format.

    Raises ValueError, naming the setting `key`, where there is none.
    """
    if is_function(name):
        return function(name)
    known = {name: named.convert for name, named in SOURCES.items() if named.convert}
    if name not in known:
        raise ValueError(
            f"{key}: {name!r} is neither module:function nor a named source with a conversion.{suggestion(name, known)}"
        )
    return known[name]


def _each(convert: Callable[[Row], Row]) -> Conversion:
    """Convert row by row. One that is not as its source has them stays as it is, to be refused by its number."""

    def rows(given: Iterable[Any]) -> Iterator[Any]:
        for row in given:
            try:
                yield convert(row)
            except (KeyError, TypeError, IndexError, AttributeError):
                yield row

    return rows


def _helpsteer3(row: Row) -> Row:
    """`overall_preference` from -3 (response 1 is much better) to 3 becomes two ranks, and its strength the weight.

    The weight makes the reward model's loss Scaled Bradley-Terry, -m log sigmoid(r_chosen - r_rejected), which the
    authors found better than a margin (arXiv:2410.01257) and trained their reward models of these data with
    (arXiv:2505.11475). Ties have no `chosen`; the stages drop them.
    """
    strength = int(row["overall_preference"])
    better = [[{"role": "assistant", "content": row[name]}] for name in ("response1", "response2")]
    converted: Row = {
        "prompt": row["context"],
        "responses": better,
        "ranking": [1 + (strength > 0), 1 + (strength < 0)],
        "weight": max(1, abs(strength)),
        "source": row.get("domain"),
        "language": row.get("language"),
    }
    if strength:
        first = int(strength > 0)
        converted |= {"chosen": better[first], "rejected": better[1 - first]}
    return converted


def _tldr(row: Row) -> Row:
    """A comparison of two summaries of a Reddit post or, in the evaluation's batches, of a news article."""
    info, summaries = row["info"], [" " + summary["text"].strip() for summary in row["summaries"]]
    if info.get("post"):
        prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    else:
        prompt = f"Article:\n{info['article']}\n\nTL;DR:"
    better = row["choice"]
    return {
        "prompt": prompt,
        "chosen": summaries[better],
        "rejected": summaries[1 - better],
        "labeler": row.get("worker"),
    }


def _oasst1(rows: Iterable[Row]) -> Iterator[Row]:
    """Message trees become rankings: the ranked replies of the assistant to one message, after all before it.

    At most the 9 best of them. The best is the `completion`, for SFT. A message may come before its parent, so all
    messages are held in memory.
    """
    messages = {row["message_id"]: row for row in rows if not row.get("deleted")}
    replies: dict[str, list[Row]] = defaultdict(list)
    for row in messages.values():
        if row["role"] == "assistant" and row.get("rank") is not None:
            replies[row["parent_id"]].append(row)
    for parent, siblings in replies.items():
        before = _conversation(messages, parent)
        if before is None or len(siblings) < 2:
            continue
        siblings = sorted(siblings, key=lambda row: row["rank"])[:MOST_RESPONSES]
        ranks = [row["rank"] for row in siblings]
        responses = [[{"role": "assistant", "content": row["text"]}] for row in siblings]
        yield {
            "id": parent,
            "prompt": before,
            "responses": responses,
            "ranking": [1 + sum(other < rank for other in ranks) for rank in ranks],
            "completion": responses[0],
            "source": siblings[0].get("lang"),
        }


def _conversation(messages: dict[str, Row], last: str) -> list[dict[str, str]] | None:
    """The messages from the root to that one; None where one of them is missing or deleted."""
    roles, upwards, id = {"prompter": "user", "assistant": "assistant"}, [], last
    while id is not None:
        if id not in messages:
            return None
        upwards.append({"role": roles[messages[id]["role"]], "content": messages[id]["text"]})
        id = messages[id].get("parent_id")
    return upwards[::-1]


SOURCES: dict[str, Named] = {
    "hh-rlhf": Named(
        "Anthropic/hh-rlhf",
        stages=("sft", "reward", "ppo", "dpo"),
        licence="MIT",
        citation="Bai et al. 2022, arXiv:2204.05862",
        about="161k comparisons by crowdworkers: helpful and harmless dialogues",
    ),
    "ultrafeedback": Named(
        "HuggingFaceH4/ultrafeedback_binarized",
        stages=("sft", "reward", "ppo", "dpo"),
        licence="MIT",
        citation="Cui et al. 2023, arXiv:2310.01377; Tunstall et al. 2023, arXiv:2310.16944",
        about="61k comparisons by GPT-4: the best of four answers against another of them",
        split="train_prefs",
    ),
    "helpsteer3": Named(
        "nvidia/HelpSteer3",
        stages=("sft", "reward", "ppo", "dpo"),
        licence="CC-BY-4.0",
        citation="Wang et al. 2025, arXiv:2505.11475",
        about="38k comparisons by people, with strength: general, STEM, code, 13 languages",
        subset="preference",
        convert=_each(_helpsteer3),
    ),
    # OpenAI's own repository on the Hub, openai/summarize_from_feedback, is a script, which `datasets` no longer runs.
    # TRL's copy is Parquet. The conversion is for rows as OpenAI publishes them; those of the copy stay as they are.
    "tldr": Named(
        "trl-lib/tldr-preference",
        stages=("sft", "reward", "ppo", "dpo"),
        licence="none stated; the posts (Syed et al. 2018) CC-BY-4.0",
        citation="Stiennon et al. 2020, arXiv:2009.01325",
        about="93k comparisons by people: summaries of Reddit posts",
        convert=_each(_tldr),
    ),
    "oasst1": Named(
        "OpenAssistant/oasst1",
        stages=("sft", "reward", "ppo"),
        licence="Apache-2.0",
        citation="Köpf et al. 2023, arXiv:2304.07327",
        about="84k messages by volunteers in 35 languages: rankings of the replies to each",
        convert=_oasst1,
    ),
    "tulu3": Named(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        stages=("sft", "reward", "ppo", "dpo"),
        licence="ODC-BY-1.0; parts of it are non-commercial",
        citation="Lambert et al. 2024, arXiv:2411.15124",
        about="271k comparisons by GPT-4o of answers by many models, mixed for DPO",
    ),
}
