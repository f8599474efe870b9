"""The `reward` stage: reward models from comparisons with TRL's RewardTrainer, starting from the SFT adapter.

A prompt's K responses are one element of a batch: each goes through the model once, and their C(K, 2) comparisons weigh
1 / C(K, 2) each (InstructGPT, arXiv:2203.02155, equation 1). A chosen and a rejected response are the case K = 2.

N held-out rows; K responses to each, or to the row that has most; R responses in all; M pairs that are no ties.
"""

import dataclasses
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForSequenceClassification, set_seed

from ...data.split import set_aside
from ...model.adapters import read_adapter_weights
from ...model.base import check_fingerprint, load_base
from ...model.memory import release
from ...model.processes import on_main
from ...model.shared import HEAD, SharedBase, lora_config, set_adapter
from ...records.contents import Fingerprint, StageResults
from ...records.files import Row, read_json
from ...records.folder import adapter_fault
from ...records.progress import Later
from ..job import Job
from .adapters import (
    HELDOUT,
    JUDGE,
    PROBES,
    add_reward_roles,
    judge_folder,
    member_folders,
    score_rows,
    set_bias,
    write_scores,
)
from .baseline import token_scores
from .card import ScoredPair, write_card
from .loss import fold, ranking_loss, stack_rankings, untied
from .trainer import RewardTrainer

SWAPPED = 16  # held-out rows that are scored once more, in another order

JUDGE_SEED = 10_000  # beyond the recipe's; the members have the numbers from 0 on


def train_reward(job: Job) -> StageResults:
    """Train the reward adapter, or an ensemble of them, and the judge, each with its score head, into their folders.

    An adapter that is finished is not trained again. Returns what `evaluate_adapters` measures.
    Raises ValueError if a saved adapter, loaded as PPO will load it, scores the probe rows differently.
    """
    jobs = adapter_jobs(job)
    for index, member in enumerate(jobs):
        if adapter_fault(member.folder, PROBES, HELDOUT) is not None:
            with nullcontext(member) if index == 0 else member.tracked(beside=True) as tracked:
                train_member(tracked)
            release()
    return evaluate_adapters(jobs[0])


def adapter_jobs(job: Job) -> list[Job]:
    """The job of each adapter that the stage trains: the main one, an ensemble's others, and the judge, if any.

    The judge has training prompts of its own, `judge_share` of all.
    """
    rest, aside = set_aside(job.data.train, job.config.judge_share, job.recipe.seed)
    main = dataclasses.replace(job, data=dataclasses.replace(job.data, train=rest))
    judge = dataclasses.replace(job, data=dataclasses.replace(job.data, train=aside))
    others = [main.adapter(f"member-{index}", str(index), index) for index in range(1, job.config.ensemble_size)]
    jobs = [main, *others, *([judge.adapter(JUDGE, JUDGE, JUDGE_SEED)] if len(aside) else [])]
    later = [Later(following.stage, None) for following in jobs]
    return [dataclasses.replace(one, later=(*later[place + 1 :], *job.later)) for place, one in enumerate(jobs)]


def train_member(job: Job) -> None:
    """Train one adapter and its head and save them to the job's folder."""
    set_seed(job.config.seed)  # the head begins at random
    model = load_base(job.recipe.base, AutoModelForSequenceClassification, num_labels=1)
    model = get_peft_model(model, lora_config(job.recipe.lora, TaskType.SEQ_CLS, model))
    if job.sft is not None:
        start_from_sft(model, job.sft, job.fingerprint)
    trainer = RewardTrainer(
        model=model,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.evaluated,
        processing_class=job.tokenizer,
    )
    job.watch(trainer)
    job.train(trainer)
    trainer.evaluate(job.reported)
    job.save(model)
    on_main(lambda: write_scores(trainer, job))


def start_from_sft(model: PeftModel, folder: Path, fingerprint: Fingerprint) -> None:
    """Copy the SFT adapter into the reward model's, keeping the score head as it was initialised.

    Raises ValueError if the SFT adapter is of another base.
    """
    check_fingerprint(folder, fingerprint)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    sft = read_adapter_weights(folder)
    assert own.keys() == {*sft, HEAD}, "the two adapters have the same shape, because a recipe has one `lora`"
    set_adapter(model, {**sft, HEAD: own[HEAD]})


def evaluate_adapters(job: Job) -> StageResults:
    """Check each finished adapter, set its bias, and measure it by what its training's last evaluation said.

    Writes the main adapter's reward card (see `card`). Returns its accuracy over the untied held-out pairs
    (heldout_accuracy), its loss on them without smoothing, weights or centering (heldout_loss), each member's accuracy
    (members_accuracy), the judge's (judge_accuracy), if there is one, and the card.
    """
    shared = SharedBase(load_base(job.recipe.base), job.recipe.lora, job.fingerprint)
    heldout = job.reported.to_list()
    ranking = stack_rankings(heldout)  # (N, K)
    row_index, better, worse = untied(ranking)  # (M,) each
    sample = [ids for row in heldout[:SWAPPED] for ids in row["responses_ids"]]
    results: StageResults = {}
    accuracies: dict[str, float] = {}  # by role
    for role, folder in (member_folders(job.run_dir) | judge_folder(job.run_dir)).items():
        add_reward_roles(shared, {role: folder})
        demonstrations = set_bias(shared, folder, role, job.extras.get("demonstrations"))
        # The scores (R,) of the held-out responses, and with the bias that has been set since then.
        trained = torch.tensor(read_json(folder / HELDOUT, kind=list)) + shared.biases.get(role, 0.0)
        scores = fold(trained, ranking)  # (N, K)
        # Not TRL's figure, which is a mean over batches of unequal size.
        accuracies[role] = (scores[row_index, better] > scores[row_index, worse]).float().mean().item()
        if role == "reward":
            margin = torch.tensor([row["margin"] for row in heldout]) if "margin" in heldout[0] else None
            results["heldout_loss"] = ranking_loss(scores, ranking, margin).mean().item()
            # A score must not depend on what it is computed beside: in training its row's other responses, here others.
            swapped = fold(score_rows(shared, sample[::-1], role).flip(0), ranking[:SWAPPED])
            pairs = comparisons(heldout, ranking, scores, swapped, token_scores(job.data.train, heldout))
            train_pairs = count_pairs(job.data.train)
            results["card"] = on_main(partial(write_card, folder, pairs, demonstrations, train_pairs))
    if JUDGE in accuracies:
        results["judge_accuracy"] = accuracies.pop(JUDGE)
    return {"heldout_accuracy": accuracies["reward"], "members_accuracy": list(accuracies.values()), **results}


def comparisons(
    rows: list[Row], ranking: Tensor, scores: Tensor, swapped: Tensor, by_tokens: list[list[float]]
) -> list[ScoredPair]:
    """The M untied pairs of N rows as the reward card wants them (see `write_card`), from scores in two orders.

    Args:
        rows: prepared rows of the stage.
        ranking, scores: (N, K) each.
        swapped: (SWAPPED, K) or fewer, the scores of the first rows in another order.
        by_tokens: the rows' `token_scores`.
    """
    lengths = [[len(ids) - row["prompt_length"] for ids in row["responses_ids"]] for row in rows]
    numbers: dict[tuple[int, ...], int] = {}  # of the prompts, which several rows may share
    prompts = [tuple(row["responses_ids"][0][: row["prompt_length"]]) for row in rows]
    return [
        {
            "prompt": numbers.setdefault(prompts[row], len(numbers)),
            "chosen_score": scores[row, better].item(),
            "rejected_score": scores[row, worse].item(),
            "chosen_length": lengths[row][better],
            "rejected_length": lengths[row][worse],
            "token_difference": by_tokens[row][better] - by_tokens[row][worse],
            "source": rows[row].get("source"),
            "swapped_difference": (swapped[row, worse] - swapped[row, better]).item() if row < len(swapped) else None,
        }
        for row, better, worse in zip(*(indices.tolist() for indices in untied(ranking)), strict=True)
    ]


def count_pairs(rows: Dataset) -> int:
    """The number of untied pairs in a dataset of the stage."""
    return sum(rank != other for ranking in rows["ranking"] for rank, other in combinations(ranking, 2))
