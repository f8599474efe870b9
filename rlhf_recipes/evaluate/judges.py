"""Who says which answer is better: scores of single answers, or a model that is asked about two at a time."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from transformers import AutoConfig

from ..data.hub import ask_hub
from ..data.tokens import spelled_out, tokenize_pair
from ..feedback.client import ModelSettings
from ..feedback.connect import connect, local_base
from ..feedback.judge import JudgeSettings, judge_samples
from ..feedback.ledger import Prices
from ..feedback.rows import Row
from ..model.base import known_content, load_tokenizer, longest_row
from ..model.open import adapter_digest, model_identity
from ..recipe.lookup import code_file, code_hash, function, is_function
from ..recipe.values import PEOPLE, Base, Recipe
from ..records.digest import digest
from ..records.files import read_rows
from ..records.folder import adapter_folder, last_model, newest_round_first, read_recipe
from ..stages.reward.adapters import JUDGE, PROBES, judge_folder, member_folders
from ..stages.reward_functions import RewardFunc, call_reward_func
from ..stages.scores import ExternalRewardModel, aggregate_ensemble
from .models import Answer, Bench

PROXY = "reward"  # what PPO was trained against, so that it says nothing of quality


@dataclass(frozen=True)
class Asking:
    """How a model that is asked is reached, what it is asked, and what that may cost."""

    reach: Mapping[str, Any]  # arguments of `ModelSettings` beside the model
    question: JudgeSettings
    prices: Prices
    parallel: int = 8


@dataclass(frozen=True)
class Judge:
    """A judge by its name.

    `kind` says how it is asked. A score for each answer is what reward `adapters` of the run's base, a `function` of
    TRL's signature and a `classifier` (a reward model of transformers) give; `pairs`: a model is asked which of two
    answers is better; `people` were asked, in the arena.
    """

    name: str
    kind: Literal["adapters", "function", "classifier", "pairs", "people"]
    identity: str  # what its verdicts depend on, beside the answers, as far as that is known
    folders: tuple[Path, ...] = ()  # of its adapters, an ensemble if there are several
    source: str = ""  # the function, the classifier, the model that is asked, or a file of what people said elsewhere

    def score_func(self, today: str | None = None) -> RewardFunc:
        """What scores texts, of a judge that is a function or a classifier. A classifier is loaded.

        Args:
            today: of a classifier's chat template, as in `set_chat_template`.
        """
        return ExternalRewardModel(self.source, today=today) if self.kind == "classifier" else function(self.source)


def find_judge(name: str, run_dir: Path, recipe: Recipe, asking: Asking) -> Judge:
    """The judge of a name. Raises ValueError, before anything is loaded, where there is none."""
    if name == "gold":
        if recipe.gold is None:
            raise ValueError(f"--judge gold: the recipe of {run_dir} knows no true quality (it has no `gold`).")
        return _function_judge(name, recipe.gold)
    people, _, given = name.partition(":")
    if people == PEOPLE:  # whose labels are kept by that name, whoever they are
        if given and not Path(given).is_file():
            raise ValueError(f"--judge {name}: there is no file {given}.")
        return Judge(PEOPLE, "people", PEOPLE, source=given)
    if name in (PROXY, JUDGE):
        folders = reward_folders(run_dir, name)
        if not folders:
            needs = " (set reward.judge_share)" if name == JUDGE else ""
            raise ValueError(f"--judge {name}: {run_dir} has no finished reward model of that name{needs}.")
        return _adapter_judge(name, folders)
    if is_function(name):
        return _function_judge(name, name)
    path = Path(name)
    if (path / "adapter_config.json").is_file():
        if not (path / PROBES).is_file():
            raise ValueError(f"--judge {name}: it is an adapter, but no finished reward model of this package.")
        return _adapter_judge(name, [path])
    if ModelSettings(name).is_endpoint:
        connect(ModelSettings(name, **asking.reach))  # it answers, and there is a key
    if ModelSettings(name).is_endpoint or (path / "recipe.json").is_file() or not _is_classifier(name):
        question = asking.question
        settings = [question.principles, question.template, question.max_tokens, question.seed]
        model = _asked_identity(ModelSettings(name, **asking.reach))
        return Judge(name, "pairs", digest(name, dict(asking.reach), repr(settings), model), source=name)
    return Judge(name, "classifier", digest(name, known_content(name)), source=name)


def known_identity(name: str, run_dir: Path, recipe: Recipe) -> str | None:
    """The `identity` of a judge of single answers, from files alone; None where there is none of that name.

    The name may come from an evaluation.json that anybody has written: no code is run, and nobody is asked.
    """
    if name == "gold":
        return None if recipe.gold is None else _function_identity(recipe.gold)
    if name in (PROXY, JUDGE):
        folders = reward_folders(run_dir, name)
        return _adapters_identity(folders) if folders else None
    if is_function(name):
        return _function_identity(name)
    if os.path.isfile(Path(name, "adapter_config.json")):  # False of a name that is too long, too
        return _adapters_identity([Path(name)])
    return digest(name, known_content(name))


def _function_judge(name: str, source: str) -> Judge:
    function(source)
    return Judge(name, "function", _function_identity(source), source=source)


def _function_identity(source: str) -> str:
    """What a function says is for its code to say: that of its file, or of the package where that stands."""
    file = code_file(source)
    return digest(source, None if file is None else code_hash(file))


def _adapters_identity(folders: Sequence[Path]) -> str:
    return digest([adapter_digest(folder) for folder in folders])


def _asked_identity(settings: ModelSettings) -> list[Any]:
    """What tells a model that is asked from others of its name; nothing is known of an endpoint's."""
    base, run, folder = local_base(settings), Path(settings.model), None
    if base is None:
        return []
    if (run / "recipe.json").is_file():
        recipe = read_recipe(run)
        folder = adapter_folder(run, recipe, settings.role or last_model(run, recipe))
    return [model_identity(base, load_tokenizer(base), folder)]


def find_scorers(names: Sequence[str], run_dir: Path, recipe: Recipe, asking: Asking, option: str) -> list[Judge]:
    """The judges that are named, or the run's reward models, for an option that needs a score of each response.

    Raises ValueError, before anything is loaded, where there is none, or one that scores no single response.
    """
    names = names or [name for name in (PROXY, JUDGE) if reward_folders(run_dir, name)]
    if not names:
        raise ValueError(f"--{option}: {run_dir} has no finished reward model: name a --judge.")
    judges = [find_judge(name, run_dir, recipe, asking) for name in names]
    for judge in judges:
        if judge.kind in ("pairs", "people"):
            raise ValueError(
                f"--judge {judge.name}: it is asked about pairs of answers, and --{option} needs a score of each. "
                "Name reward, judge, a reward adapter, a classifier or a function."
            )
    return judges


def reward_folders(run_dir: Path, name: str) -> list[Path]:
    """The finished adapters of a run's `reward` or `judge`, of its newest round that has them; none, if none has."""
    folders_in = member_folders if name == PROXY else judge_folder
    for round_dir in newest_round_first(run_dir):
        folders = [*folders_in(round_dir).values()]
        if folders and all((folder / PROBES).is_file() for folder in folders):
            return folders
    return []


def _adapter_judge(name: str, folders: Sequence[Path]) -> Judge:
    return Judge(name, "adapters", _adapters_identity(folders), tuple(folders))


def _is_classifier(name: str) -> bool:
    """Whether a model is a reward model of transformers. Raises ValueError where no such model can be loaded."""
    try:
        # Without a word about its code it would ask the user whether to run it.
        config = AutoConfig.from_pretrained(ask_hub(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--judge {name}: it is none of gold, people, reward and judge, no function (module:function or "
            "file.py:function), reward adapter, run or URL, and no model that can be loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    classifies = any("ForSequenceClassification" in kind for kind in config.architectures or ())
    if classifies and config.num_labels != 1:
        raise ValueError(f"--judge {name}: it has {config.num_labels} labels, and a reward model has one.")
    return classifies


def adapter_scores(
    judge: Judge, bench: Bench, rows: Sequence[Row], answers: Sequence[Answer], ensemble: tuple[str, float]
) -> list[float]:
    """What reward adapters say of answers.

    Args:
        rows: the prompts; `prompt_ids` are of the bench's tokenizer.
        ensemble: how the scores of several adapters make one, as `aggregate_ensemble` takes it.
    """
    return row_scores(judge, bench, [_tokens(bench, rows[answer.row], answer) for answer in answers], ensemble)


def score_responses(
    judges: Sequence[Judge],
    bench: Bench,
    rows: Sequence[list[int]],
    score_texts: Callable[[Judge], list[float]],
    ensemble: tuple[str, float],
) -> dict[str, list[float]]:
    """What each judge of single responses says of N of them.

    Args:
        rows: N rows of token ids, each prompt + response, for reward adapters. The bench is closed behind these.
        score_texts: what a judge that reads text says of the N.
        ensemble: as in `adapter_scores`.
    """
    found = {}
    with closing(bench):
        for judge in judges:
            if judge.kind == "adapters":
                found[judge.name] = row_scores(judge, bench, rows, ensemble)
    for judge in judges:  # those with models of their own, now that the base is out of memory
        if judge.kind != "adapters":
            found[judge.name] = score_texts(judge)
    return {judge.name: found[judge.name] for judge in judges}


def cut_rows(rows: Sequence[list[int]], base: Base) -> tuple[list[list[int]], int]:
    """Rows of token ids that fit into the model's context, the end of each, and how many of them were longer."""
    longest = longest_row(base, None)
    if longest is None:
        return list(rows), 0
    return [row[-longest:] for row in rows], sum(len(row) > longest for row in rows)


def row_scores(judge: Judge, bench: Bench, rows: Sequence[list[int]], ensemble: tuple[str, float]) -> list[float]:
    """What reward adapters say of N rows of token ids, each prompt + response; `ensemble` as in `adapter_scores`."""
    members = torch.tensor([bench.scores(folder, rows) for folder in judge.folders])  # (M, N)
    return aggregate_ensemble(members, *ensemble).tolist()


def _tokens(bench: Bench, row: Row, answer: Answer) -> list[int]:
    """Prompt and answer as the reward model saw such rows; those of a model with another base are tokenized anew."""
    if answer.kl is not None:
        return [*row["prompt_ids"], *answer.ids]
    (text,) = spelled_out(bench.tokenizer, [answer.text])
    prompt, completion = tokenize_pair(bench.tokenizer, row["prompt"], in_format_of(row, replace(answer, text=text)))
    return [*prompt, *(completion if answer.ended else completion[:-1])]


def in_format_of(row: Row, answer: Answer) -> Any:
    """An answer in the format of its prompt: text, or messages."""
    return answer.text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": answer.text}]


def function_scores(score_func: RewardFunc, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
    """What a function of TRL's signature says of answers; `rows` are the prompts."""
    answered = [rows[answer.row] for answer in answers]
    ids, texts = [answer.ids for answer in answers], [answer.text for answer in answers]
    return call_reward_func(score_func, answered, ids, texts, None).tolist()


Pair = tuple[Answer, Answer]
Verdict = tuple[float, bool]  # the preference for the first of a pair, 0 to 1, and whether it is a tie


def labels_file(folder: Path, identity: str) -> Path:
    """Where the labels of a judge that is asked are kept; its questions and answers stand beside it."""
    return folder / f"judged-{identity}.jsonl"


def compare_pairs(
    judge: Judge, folder: Path, rows: Sequence[Row], pairs: Sequence[Pair], asking: Asking
) -> dict[str, Any]:
    """Have a model compare pairs of answers, those that it has not compared before. Returns as `judge_samples`."""
    samples = {sample["id"]: sample for sample in (sample_of(rows, pair) for pair in pairs)}
    client = connect(ModelSettings(judge.source, **asking.reach))
    out = labels_file(folder, judge.identity)
    return judge_samples(list(samples.values()), out, client, asking.question, asking.prices, asking.parallel)


def sample_of(rows: Sequence[Row], pair: Pair) -> Row:
    """A pair as a sample to be judged. Which model gave which answer does not show, in the order either."""
    row = rows[pair[0].row]
    first, second = sorted(pair, key=lambda answer: answer.text)
    key = digest(row["prompt"], first.text, second.text)
    return {"id": key, "prompt": row["prompt"], "responses": [in_format_of(row, first), in_format_of(row, second)]}


def labels_of_pairs(path: Path, rows: Sequence[Row], pairs: Sequence[Pair]) -> list[list[tuple[Row, Verdict]]]:
    """What a file of labels holds on each pair: none, one, or those of several people, each with what it says.

    A tie is a pair of which both orders disagree, or which somebody called one. The preference is the judge's
    probability where that is known.
    """
    labels = defaultdict(list)
    for label in read_rows(path):
        labels[label["id"]].append(label)
    by_pair = [labels[sample_of(rows, pair)["id"]] for pair in pairs]
    return [[(label, _verdict(label, pair)) for label in of_pair] for of_pair, pair in zip(by_pair, pairs, strict=True)]


def _verdict(label: Row, pair: Pair) -> Verdict:
    first, second = label["ranking"]
    preferred = label["preferences"][0] if "preferences" in label else 0.5 + 0.5 * ((first < second) - (first > second))
    return (preferred if pair[0].text < pair[1].text else 1 - preferred), first == second


def read_verdicts(path: Path, rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Verdict | None]:
    """The verdict on each pair in a file of labels, of several labels their mean; None where there is no label.

    Equal answers are a tie without any.
    """
    verdicts: list[Verdict | None] = []
    for pair, labels in zip(pairs, labels_of_pairs(path, rows, pairs), strict=True):
        said = [verdict for _, verdict in labels]
        if pair[0].text == pair[1].text:
            verdicts.append((0.5, True))
        elif said:
            preferred = fmean(preferred for preferred, _ in said)
            verdicts.append((preferred, all(tie for _, tie in said) or (len(said) > 1 and preferred == 0.5)))
        else:
            verdicts.append(None)
    return verdicts
