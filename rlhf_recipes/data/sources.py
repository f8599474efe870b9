"""Named sources: public comparisons and rankings by people (or models), each with the format it has and its licence.

`reward.data=helpsteer3` in a recipe and `rlhf-recipes check helpsteer3` load one from where it is published. A
downloaded copy is known by its columns, and read with the same conversion. Standard library only.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..recipe.lookup import function, is_function
from ..recipe.overrides import suggestion
from ..recipe.values import Source
from .kept import kept

Row = dict[str, Any]

Conversion = Callable[[Iterable[Any]], Iterable[Any]]

MOST_RESPONSES = 9  # InstructGPT ranked 4 to 9


@dataclass(frozen=True)
class Named:
    """A source with a name."""

    data: str  # the Hub dataset, or the URL of a file
    stages: tuple[str, ...]  # what it is for
    licence: str  # as its card says
    citation: str
    about: str
    subset: str | None = None
    split: str = "train"
    convert: Conversion | None = None
    columns: tuple[str, ...] = ()  # by which a copy's rows are known as those that `convert` takes


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
    known |= {name: convert for name, (_, convert) in FILES.items()}
    if name not in known:
        raise ValueError(
            f"{key}: {name!r} is neither module:function nor a named source with a conversion.{suggestion(name, known)}"
        )
    return known[name]


def recognized(row: Any) -> str | None:
    """The conversion that a row of a file is for, a named source's or of FILES, by its columns; None: there is none."""
    if not isinstance(row, dict):
        return None
    columns = {name: named.columns for name, named in SOURCES.items() if named.columns}
    if not {"prompt", "messages"} & row.keys():  # which are read as they are
        columns |= {name: columns for name, (columns, _) in FILES.items()}
    return next((name for name, needed in columns.items() if set(needed) <= row.keys()), None)


def _each(convert: Callable[[Row], Row]) -> Conversion:
    """Convert row by row. One that is not as its source has them stays as it is, to be refused by its number."""

    def rows(given: Iterable[Any]) -> Iterator[Any]:
        for row in given:
            try:
                yield convert(row)
            except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError):
                yield row

    return rows


def _helpsteer3(row: Row) -> Row:
    """`overall_preference` from -3 (response 1 is much better) to 3 becomes two ranks, and its strength the weight.

    The weight makes the reward model's loss Scaled Bradley-Terry, -m log sigmoid(r_chosen - r_rejected), which the
    authors found better than a margin (arXiv:2410.01257) and trained their reward models of these data with
    (arXiv:2505.11475). Ties have no `chosen`; the stages drop them.
    """
    strength = int(row["overall_preference"])
    pair = _pair(row["context"], (row["response1"], row["response2"]), -strength)
    return pair | {
        "weight": max(1, abs(strength)),
        "source": row.get("domain"),
        "language": row.get("language"),
    }


def _pair(prompt: Any, texts: tuple[Any, Any], lead: float) -> Row:
    """Two responses as a ranking, and as chosen and rejected, which a tie has not.

    Args:
        lead: above 0 where the first is better, below where the second is, 0 for a tie.
    """
    first, second = ([{"role": "assistant", "content": text}] for text in texts)
    pair: Row = {"prompt": prompt, "responses": [first, second], "ranking": [1 + (lead < 0), 1 + (lead > 0)]}
    if lead:
        chosen, rejected = (first, second) if lead > 0 else (second, first)
        pair |= {"chosen": chosen, "rejected": rejected}
    return pair


def _voted(prompt: Any, texts: tuple[Any, Any], votes: Sequence[float]) -> Row:
    """Two responses ranked by the vote that most have given, a tie where none leads, with the votes as soft label.

    Args:
        votes: each from 0, the second is better, to 1; 0.5 is a tie.
    """
    counts = Counter((vote > 0.5) - (vote < 0.5) for vote in votes).most_common()
    lead = counts[0][0] if len(counts) == 1 or counts[0][1] > counts[1][1] else 0
    soft = {"preferences": [sum(votes) / len(votes)]} if lead else {}
    return _pair(prompt, texts, lead) | soft


def _pandalm(row: Row) -> Row:
    """A comparison of PandaLM's test set, by the majority of three people, or of its training set, by GPT-3.5.

    1 and 2 name the better response; 0, or in the training set "Tie", says that they are alike.
    """
    task = row.get("inputs", row)
    if "outputs" in row:
        labels = [row["outputs"]["evaluation_result"]]
    else:
        labels = [row[key] for key in sorted(row) if key.startswith("annotator")]
    votes = [{"1": 1.0, "2": 0.0, "0": 0.5, "tie": 0.5}[str(label).strip().lower()] for label in labels]
    # Some responses of the test set, "True", have become JSON's true.
    texts = [str(task[key]) if isinstance(task[key], bool) else task[key] for key in ("response1", "response2")]
    prompt = "\n\n".join(part for part in (task["instruction"], task.get("input")) if part)
    return _voted([{"role": "user", "content": prompt}], (texts[0], texts[1]), votes) | {
        "source": row.get("motivation_app")
    }


def _alpacaeval(rows: Iterable[Any]) -> Iterator[Any]:
    """AlpacaEval's annotations, by models or by people; several of one pair are its votes.

    `preference` goes from 1, the first output is better, to 2; 1.5 is a tie and, in older files, 0. A row without one,
    of which the annotator's answer could not be read, stays as it is, to be refused. All rows are held in memory.
    """
    votes: dict[Any, list[float]] = defaultdict(list)
    firsts: dict[Any, Row] = {}
    for number, row in enumerate(kept(rows, "alpacaeval")):
        try:
            pair = (row["instruction"], row["output_1"], row["output_2"])
            vote = 2 - (float(row["preference"]) or 1.5)
            if not (0 <= vote <= 1 and all(isinstance(text, str) for text in pair)):
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            pair, vote = number, 0.5
        firsts.setdefault(pair, row)
        votes[pair].append(vote)
    for pair, row in firsts.items():
        if isinstance(pair, int):
            yield row
        else:
            instruction, *outputs = pair
            converted = _voted([{"role": "user", "content": instruction}], (outputs[0], outputs[1]), votes[pair])
            yield converted | {"source": row.get("dataset")}


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


OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _is_message(row: Any) -> bool:
    """Whether a row is one of oasst1's, as far as `_oasst1` reads it."""
    if not isinstance(row, dict) or row.get("role") not in tuple(OASST_ROLES):
        return False
    texts = row.get("message_id"), row.get("text"), row.get("parent_id") or ""
    return all(isinstance(text, str) for text in texts) and isinstance(row.get("rank"), int | float | None)


def _oasst1(rows: Iterable[Row]) -> Iterator[Row]:
    """Message trees become rankings: the ranked replies of the assistant to one message, after all before it.

    At most the 9 best of them. The best is the `completion`, for SFT. A message may come before its parent, so all
    messages are held in memory. A row that is no message stays as it is, to be refused.
    """
    messages: dict[str, Row] = {}
    for row in kept(rows, "oasst1"):
        if not _is_message(row):
            yield row
        elif not row.get("deleted"):
            messages[row["message_id"]] = row
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
    """The messages from the root to that one; None where one of them is missing, deleted, or an answer to itself."""
    upwards: dict[str, dict[str, str]] = {}
    id: str | None = last
    while id is not None:
        if id not in messages or id in upwards:
            return None
        upwards[id] = {"role": OASST_ROLES[messages[id]["role"]], "content": messages[id]["text"]}
        id = messages[id].get("parent_id")
    return [*upwards.values()][::-1]


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
        columns=("context", "response1", "response2", "overall_preference"),
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
        columns=("info", "summaries", "choice"),
    ),
    "oasst1": Named(
        "OpenAssistant/oasst1",
        stages=("sft", "reward", "ppo"),
        licence="Apache-2.0",
        citation="Köpf et al. 2023, arXiv:2304.07327",
        about="84k messages by volunteers in 35 languages: rankings of the replies to each",
        convert=_oasst1,
        columns=("message_id", "parent_id", "role", "rank"),
    ),
    # A repository of a script too, so that its file is read by its address. `convert` takes the files of AlpacaEval's
    # results (annotations.json) as well.
    "alpacaeval": Named(
        "hf://datasets/tatsu-lab/alpaca_eval/alpaca_farm_human_crossannotations.json",
        stages=("reward", "ppo", "dpo"),
        licence="CC-BY-NC-4.0",
        citation="Dubois et al. 2023, arXiv:2305.14387; Li et al. 2023, github.com/tatsu-lab/alpaca_eval",
        about="650 comparisons, each by four crowdworkers: answers to instructions",
        convert=_alpacaeval,
        columns=("instruction", "output_1", "output_2", "preference"),
    ),
    "pandalm": Named(
        "https://raw.githubusercontent.com/WeOpenML/PandaLM/main/data/testset-v1.json",
        stages=("reward", "ppo", "dpo"),
        licence="Apache-2.0",
        citation="Wang et al. 2024, arXiv:2306.05087",
        about="999 comparisons, each by three people: answers of tuned 7B models to self-instruct's tasks",
        convert=_each(_pandalm),
        columns=("instruction", "response1", "response2", "annotator1"),
    ),
    "tulu3": Named(
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        stages=("sft", "reward", "ppo", "dpo"),
        licence="ODC-BY-1.0; parts of it are non-commercial",
        citation="Lambert et al. 2024, arXiv:2411.15124",
        about="271k comparisons by GPT-4o of answers by many models, mixed for DPO",
    ),
}


def _alpaca(row: Row) -> Row:
    """An instruction, perhaps with an input, and an output; in files of comparisons a chosen and a rejected one."""
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    before = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    converted: Row = {"prompt": [*before, {"role": "user", "content": asked}]}
    for theirs, ours in (("output", "completion"), ("chosen", "chosen"), ("rejected", "rejected")):
        if row.get(theirs) is not None:
            converted[ours] = [{"role": "assistant", "content": row[theirs]}]
    return converted


SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _sharegpt(row: Row) -> Row:
    """Turns of `from` and `value`; in files of comparisons they are the prompt of a chosen and a rejected turn."""

    def message(turn: Row) -> dict[str, str]:
        return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}

    messages = [message(turn) for turn in row["conversations"]]
    if "chosen" not in row:
        return {"messages": messages}
    return {"prompt": messages, **{name: [message(row[name])] for name in ("chosen", "rejected")}}


# Formats in which many files are that have no name: the columns by which each is known, and what converts it.
FILES: dict[str, tuple[tuple[str, ...], Conversion]] = {
    "alpaca": (("instruction", "output"), _each(_alpaca)),
    "alpaca-pairs": (("instruction", "chosen", "rejected"), _each(_alpaca)),
    "sharegpt": (("conversations",), _each(_sharegpt)),
}
