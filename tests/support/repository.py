"""Copies of public data sets in their own formats, as a Hub repository lays them out."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from support.rows import assistant, user

from rlhf_recipes.data.sources import SOURCES

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def hh(number: int) -> dict[str, Any]:
    """A row of Anthropic/hh-rlhf: two whole transcripts."""
    before = f"{HUMAN}Hi, number {number}.{ASSISTANT}Hello!{HUMAN}What is {number} + 1?{ASSISTANT}"
    return {"chosen": f"{before}It is {number + 1}.", "rejected": f"{before}I do not know."}


def ultrafeedback(number: int) -> dict[str, Any]:
    """A row of HuggingFaceH4/ultrafeedback_binarized: the prompt, and two whole conversations."""
    prompt = f"What is {number} + 1?"
    chosen = [user(prompt), assistant(f"It is {number + 1}.")]
    return {
        "prompt": prompt,
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": [user(prompt), assistant("I do not know.")],
        "messages": chosen,
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }


def helpsteer3(number: int, preference: int = -2) -> dict[str, Any]:
    """A row of nvidia/HelpSteer3, preference."""
    return {
        "domain": "code" if number % 2 else "general",
        "language": "english",
        "context": [user("Hi."), assistant("Hello!"), user(f"What is {number} + 1?")],
        "response1": f"It is {number + 1}.",
        "response2": "I do not know.",
        "overall_preference": preference,
        "individual_preference": [
            {"score": preference, "reasoning": "R", "feedback1": "F", "feedback2": "G"},
        ],
    }


def tldr(number: int, choice: int = 1) -> dict[str, Any]:
    """A comparison as OpenAI publishes it."""
    return {
        "info": {
            "id": f"t3_{number}",
            "post": f"My cat ate {number} fish.",
            "title": "Cat",
            "subreddit": "pets",
            "site": None,
            "article": None,
        },
        "summaries": [
            {"text": " Cats.", "policy": "sup2", "note": "short"},
            {"text": f" The cat ate {number} fish.", "policy": "ref", "note": None},
        ],
        "choice": choice,
        "worker": "W1",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": 8},
    }


def alpacaeval(number: int, preference: float | None = 1, annotator: int = 0) -> dict[str, Any]:
    """A row of AlpacaEval's human cross-annotations; those of its results have an `annotator` with a name."""
    return {
        "instruction": f"What is {number} + 1?",
        "output_1": f"It is {number + 1}.",
        "output_2": "I do not know.",
        "preference": preference,
        "annotator_index": annotator,
        "dataset": "selfinstruct",
        "datasplit": "eval",
    }


def pandalm(number: int, *votes: int) -> dict[str, Any]:
    """A row of PandaLM's testset-v1.json."""
    return {
        "idx": number,
        "motivation_app": "Grammarly",
        "cmp_key": "bloom-7b_llama-7b",
        "instruction": "Add.",
        "input": f"{number} + 1",
        "response1": f"It is {number + 1}.",
        "response2": "I do not know.",
        **{f"annotator{place}": vote for place, vote in enumerate(votes or (1, 1, 2), 1)},
    }


def tulu3(number: int) -> dict[str, Any]:
    """A row of allenai/llama-3.1-tulu-3-8b-preference-mixture."""
    prompt = f"What is {number} + 1?"
    return {
        "id": f"id-{number}",
        "prompt": prompt,
        "chosen": [user(prompt), assistant(f"It is {number + 1}.")],
        "rejected": [user(prompt), assistant("I do not know.")],
        "source": "ai2-adapt-dev/x",
    }


def message(name: str, parent: str | None, text: str, rank: int | None = None, **changes: Any) -> dict[str, Any]:
    """A row of OpenAssistant/oasst1."""
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text,
        "role": "assistant" if name.startswith("a") else "prompter",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "message_tree_id": name,
        "tree_state": "ready_for_export",
        **changes,
    }


TREE = [
    message("a2", "p1", "Rather bad.", 1),  # before its parent
    message("p1", None, "What is love?"),
    message("a1", "p1", "Good.", 0),
    message("a3", "p1", "Worst.", 2),
    message("a4", "p1", "Not ranked."),
    message("a5", "p1", "Deleted.", 3, deleted=True),
    message("p2", "a1", "And war?"),
    message("a6", "p2", "Bad.", 5),
    message("a7", "p2", "Better.", 2),
    message("p3", "a3", "Why?"),
    message("a8", "p3", "Alone.", 0),
    message("p4", "a5", "After what is deleted."),
    message("a9", "p4", "One.", 0),
    message("a10", "p4", "Two.", 1),
    message("p5", None, "Many?"),
    *(message(f"a{20 + rank}", "p5", f"Number {rank}.", rank) for rank in range(11)),
]


def write_repository(folder: Path, name: str) -> None:
    """A local copy of a Hub dataset, with its own files, formats and configurations, or of a file, as NAME.json."""
    files = {"alpacaeval": [alpacaeval(n, p, p) for n in range(20) for p in (1, 2, 1)]}
    files["pandalm"] = [pandalm(number) for number in range(20)]
    if name in files:
        (folder / f"{name}.json").write_text(json.dumps(files[name], indent=2))
        return
    repository = folder / SOURCES[name].data
    repository.mkdir(parents=True)

    def lines(path: str, rows: Iterable[Any]) -> None:
        (repository / path).parent.mkdir(exist_ok=True)
        (repository / path).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    def table(path: str, rows: Iterable[Any]) -> None:
        (repository / path).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), repository / path)

    def card(*configs: tuple[str, str, str]) -> None:
        text = "".join(
            f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n"
            for config, split, path in configs
        )
        (repository / "README.md").write_text(f"---\nconfigs:\n{text}---\n")

    numbers = range(20)
    if name == "hh-rlhf":
        lines("helpful-base/train.jsonl.gz", map(hh, range(10, 20)))
        lines("harmless-base/train.jsonl.gz", map(hh, range(10)))
        lines("harmless-base/test.jsonl.gz", map(hh, range(20, 30)))
    elif name == "ultrafeedback":
        table("data/train_prefs-00000-of-00001.parquet", map(ultrafeedback, numbers))
        card(("default", "train_prefs", "data/train_prefs-*"))
    elif name == "helpsteer3":
        lines("preference/train.jsonl.gz", map(helpsteer3, numbers))
        lines("edit/train.jsonl.gz", [{"context": [], "edited_response": "x"}])
        card(("preference", "train", "preference/train.jsonl.gz"), ("edit", "train", "edit/train.jsonl.gz"))
    elif name == "tldr":
        rows = [{"prompt": f"POST: {n}\n\nTL;DR:", "chosen": f" The cat {n}.", "rejected": " A."} for n in numbers]
        table("data/train-00000-of-00001.parquet", rows)
    elif name == "oasst1":
        table("data/train-00000-of-00001.parquet", TREE)
    else:
        table("data/train-00000-of-00001.parquet", map(tulu3, numbers))
