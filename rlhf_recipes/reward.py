"""The `reward` stage: reward models from comparisons with TRL's RewardTrainer, starting from the SFT adapter.

A prompt's K responses are one element of a batch: each goes through the model once, and their C(K, 2) comparisons weigh
1 / C(K, 2) each (InstructGPT, arXiv:2203.02155, equation 1). A chosen and a rejected response are the case K = 2.
"""

import dataclasses
import gc
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, set_seed
from trl.trainer.utils import pad

from . import card, data
from .model import BIAS, HEAD, SharedBase, check_fingerprint, load_base, lora_config, write_fingerprint
from .rollout import autocast_of, pad_right

if TYPE_CHECKING:
    from .data import Prepared
    from .runner import Job

PROBES = "probe.json"  # rows and their scores at the end of training; written last, so that it marks a finished adapter
PROBE_ROWS = 8
JUDGE = "judge"  # the folder in the stage's and the role of an adapter that measures, and that no policy is trained on
JUDGE_SEED = 10_000  # beyond the recipe's; the members have the numbers from 0 on


# --- The loss ---------------------------------------------------------------------------------------------------------


def ranking_loss(
    scores: Tensor,
    ranking: Tensor,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_coefficient: float = 0.0,
    preferences: Tensor | None = None,
) -> Tensor:
    """Each row's mean loss over the C(K, 2) pairs of its K responses (InstructGPT, arXiv:2203.02155, equation 1).

    A pair's loss is -[p log sigma(d) + (1 - p) log sigma(-d)] + center_coefficient * (r_better + r_worse)^2 with
    d = r_better - r_worse - margin and p = 1 - label_smoothing (arXiv:2401.06080); of a tie, p is 0.5 and there is no
    margin; where the pair has a soft label, p is that. The square is TRL's `center_rewards_coefficient`
    (arXiv:2312.09244, equation 2), taken pair by pair: a ranking costs what its pairs cost on average, and at K = 2
    all is as in TRL.

    Args:
        scores: (B, K).
        ranking: (B, K), 1 for the best, equal for ties, 0 where a row has no such response.
        margin: (B,).
        preferences: (B, K, K), the probability that the first response is better than the second; NaN: as ranked.
    Returns:
        (B,).
    """
    first, second = torch.triu_indices(*2 * ranking.shape[1:], offset=1, device=ranking.device)  # (C,), (C,)
    there = (ranking[:, first] > 0) & (ranking[:, second] > 0)  # (B, C)
    order = (ranking[:, second] - ranking[:, first]).sign()  # 1 where the first of the pair is the better, 0 in a tie
    difference = (scores[:, first] - scores[:, second]) * torch.where(order < 0, -1, 1)
    if margin is not None:
        difference = difference - margin[:, None] * order.abs()
    right = torch.where(order == 0, 0.5, 1 - label_smoothing)
    if preferences is not None:
        soft = preferences[:, first, second]  # (B, C)
        right = torch.where(soft.isnan(), right, torch.where(order < 0, 1 - soft, soft))
    losses = -(right * logsigmoid(difference) + (1 - right) * logsigmoid(-difference))
    losses = losses + center_coefficient * (scores[:, first] + scores[:, second]) ** 2
    return (losses * there).sum(1) / there.sum(1)


def untied(ranking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of responses with different ranks: row, better and worse response of each, three (M,) of indices."""
    better = (ranking[:, :, None] < ranking[:, None, :]) & (ranking[:, :, None] > 0)  # (B, K, K)
    return better.nonzero(as_tuple=True)  # type: ignore[return-value]


def fold(scores: Tensor, ranking: Tensor) -> Tensor:
    """Scores (R,) of the responses of all rows, one after another, to (B, K), 0 where `ranking` is."""
    return scores.new_zeros(ranking.shape).masked_scatter(ranking > 0, scores)


def responses_of(row: dict[str, Any]) -> list[list[int]]:
    """The token ids of a row's responses, each with the prompt."""
    return row["responses_ids"] if "responses_ids" in row else [row["chosen_ids"], row["rejected_ids"]]


def ranking_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The rows' ranks (B, K), 0 where a row has fewer responses than another."""
    ranks = [torch.tensor(row.get("ranking", [1, 2])) for row in rows]
    return pad(ranks, padding_value=0, padding_side="right")


def preferences_of(rows: Sequence[dict[str, Any]]) -> Tensor:
    """The rows' soft labels as (B, K, K), NaN where there is none."""
    most = max(len(row["ranking"]) for row in rows)
    result = torch.full((len(rows), most, most), float("nan"))
    for index, row in enumerate(rows):
        if row["preferences"] is not None:
            first, second = torch.triu_indices(len(row["ranking"]), len(row["ranking"]), offset=1)
            result[index, first, second] = torch.tensor(row["preferences"])
    return result


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass
class RankingCollator:
    """Makes a batch of rows of the `reward` stage.

    `input_ids` and `attention_mask` (R, L) hold all their R responses, one after another and padded at the right;
    `ranking` is (B, K), see `ranking_loss`; where given, `margin` and `weight` are (B,), `preferences` (B, K, K).
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(response) for row in rows for response in responses_of(row)]
        masks = [torch.ones_like(response) for response in ids]
        given = {key: torch.tensor([row[key] for row in rows]) for key in ("margin", "weight") if key in rows[0]}
        if "preferences" in rows[0]:
            given["preferences"] = preferences_of(rows)
        # The ranking comes first: the Trainer takes the number of rows from the first tensor.
        return {
            "ranking": ranking_of(rows),
            **given,
            "input_ids": pad(ids, self.pad_token_id, "right", self.pad_to_multiple_of),
            "attention_mask": pad(masks, 0, "right", self.pad_to_multiple_of),
        }


class RewardTrainer(trl.RewardTrainer):
    """TRL's RewardTrainer for rows that `data.prepare` made, which may hold rankings, ties and weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        theirs: Any = self.data_collator
        self.data_collator = RankingCollator(theirs.pad_token_id, theirs.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # it is tokenized, and no row is too long

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "responses_ids", "ranking", "weight", "preferences"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over rows of weight * loss, so that micro-batches of equal size change nothing."""
        ranking, mask = inputs["ranking"], inputs["attention_mask"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False)
        scores = fold(outputs.logits[:, 0].float(), ranking)
        center = self.args.center_rewards_coefficient or 0.0
        soft = inputs.get("preferences")
        losses = ranking_loss(scores, ranking, inputs.get("margin"), self.args.label_smoothing, center, soft)
        loss = (losses * inputs.get("weight", 1.0)).mean()
        self._record(outputs.logits.detach(), scores.detach(), ranking, int(mask.sum()))
        return (loss, outputs) if return_outputs else loss

    def _record(self, logits: Tensor, scores: Tensor, ranking: Tensor, tokens: int) -> None:
        """TRL's metrics, with accuracy and margin over the untied pairs."""
        mode = "train" if self.model.training else "eval"
        self._total_train_tokens += tokens if mode == "train" else 0
        row, better, worse = untied(ranking)
        differences = scores[row, better] - scores[row, worse]
        values = {"min_reward": logits.min(), "mean_reward": logits.mean(), "max_reward": logits.max()}
        values |= {"accuracy": (differences > 0).float().mean(), "margin": differences.mean()}
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in values.items():
            self._metrics[mode][name].append(value.item())


def train(job: "Job") -> dict[str, Any]:
    """Train the reward adapter, or an ensemble of them, and the judge, each with its score head, into their folders.

    An adapter that is finished is not trained again. Returns what `evaluate` measures.
    Raises RuntimeError if a saved adapter, loaded as PPO will load it, scores the probe rows differently.
    """
    jobs = adapters(job)
    for index, member in enumerate(jobs):
        if not (member.folder / PROBES).is_file():
            with nullcontext(job) if index == 0 else member.tracked(beside=True) as tracked:
                train_member(tracked)
            gc.collect()
    return evaluate(jobs[0])


def adapters(job: "Job") -> list["Job"]:
    """The job of each adapter that the stage trains: the main one, an ensemble's others, and the judge, if any.

    The judge has training prompts of its own, `judge_share` of all.
    """
    rest, aside = data.set_aside(job.data.train, job.config.judge_share, job.recipe.seed)
    main = dataclasses.replace(job, data=dataclasses.replace(job.data, train=rest))
    judge = dataclasses.replace(job, data=dataclasses.replace(job.data, train=aside))
    others = [main.adapter(f"member-{index}", str(index), index) for index in range(1, job.config.ensemble_size)]
    return [main, *others, *([judge.adapter(JUDGE, JUDGE, JUDGE_SEED)] if len(aside) else [])]


def train_member(job: "Job") -> None:
    """Train one adapter and its head and save them to the job's folder."""
    set_seed(job.config.seed)  # the head begins at random
    model = load_base(job.recipe.base, AutoModelForSequenceClassification, num_labels=1)
    model = get_peft_model(model, lora_config(job.recipe.lora, TaskType.SEQ_CLS))
    if job.sft is not None:
        start_from(model, job.sft, job.fingerprint)
    trainer = RewardTrainer(
        model=model,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.data.heldout,
        processing_class=job.tokenizer,
    )
    job.watch(trainer)
    job.train(trainer)
    trainer.evaluate()
    model.save_pretrained(str(job.folder))
    job.tokenizer.save_pretrained(job.folder)
    write_fingerprint(job.folder, job.fingerprint)
    write_probes(trainer, job)


def start_from(model: PeftModel, folder: Path, fingerprint: dict) -> None:
    """Copy the SFT adapter into the reward model's, keeping the score head as it was initialised.

    Raises ValueError if the SFT adapter is of another base.
    """
    check_fingerprint(folder, fingerprint)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    sft = load_peft_weights(str(folder), device="cpu")
    assert own.keys() == {*sft, HEAD}, "the two adapters have the same shape, because a recipe has one `lora`"
    set_peft_model_state_dict(model, {**sft, HEAD: own[HEAD]})


def members(run_dir: Path) -> dict[str, Path]:
    """The folders of a run's reward adapters by role: `reward`, and those that an ensemble has more."""
    others = sorted((run_dir / "reward").glob("member-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return {"reward": run_dir / "reward"} | {f"reward_{number}": folder for number, folder in enumerate(others, 1)}


def judge(run_dir: Path) -> dict[str, Path]:
    """The folder of a run's judge by its role; nothing where the run has none."""
    folder = run_dir / "reward" / JUDGE
    return {JUDGE: folder} if (folder / PROBES).is_file() else {}


def add_roles(shared: SharedBase, folders: dict[str, Path]) -> None:
    """Attach reward adapters by role, each with its head, and check that they score as in training."""
    for role, folder in folders.items():
        shared.add_role(role, folder, head=True)
        check_probes(shared, folder, role)


# --- After training ---------------------------------------------------------------------------------------------------


def evaluate(job: "Job") -> dict[str, Any]:
    """Check each finished adapter, set its bias, and measure it on the held-out rows.

    Writes the main adapter's reward card (see `card`). Returns its accuracy over the untied held-out pairs
    (heldout_accuracy), its loss on them without smoothing, weights or centering (heldout_loss), each member's accuracy
    (members_accuracy), the judge's (judge_accuracy), if there is one, and the card.
    """
    shared = SharedBase(load_base(job.recipe.base), job.recipe.lora, job.fingerprint)
    heldout = job.data.heldout.to_list()
    ranking = ranking_of(heldout)
    row, better, worse = untied(ranking)
    rows, results, accuracies = [ids for one in heldout for ids in responses_of(one)], {}, {}
    for role, folder in (members(job.run_dir) | judge(job.run_dir)).items():
        add_roles(shared, {role: folder})
        demonstrations = set_bias(shared, folder, role, job.others.get("demonstrations"))
        scores = fold(score(shared, rows, role), ranking)  # (N, K)
        # Not TRL's figure, which is a mean over batches of unequal size.
        accuracies[role] = (scores[row, better] > scores[row, worse]).float().mean().item()
        if role == "reward":
            margin = torch.tensor(job.data.heldout["margin"]) if "margin" in heldout[0] else None
            results["heldout_loss"] = ranking_loss(scores, ranking, margin).mean().item()
            # The other way round in every batch: a score must not depend on what it is computed beside.
            swapped = fold(score(shared, rows[::-1], role).flip(0), ranking)
            found = comparisons(heldout, ranking, scores, swapped)
            results["card"] = card.write(folder, found, demonstrations, count_pairs(job.data.train))
    if JUDGE in accuracies:
        results["judge_accuracy"] = accuracies.pop(JUDGE)
    return {"heldout_accuracy": accuracies["reward"], "members_accuracy": list(accuracies.values()), **results}


def comparisons(rows: list[dict[str, Any]], ranking: Tensor, scores: Tensor, swapped: Tensor) -> list[dict[str, Any]]:
    """The untied pairs of rows as the reward card wants them, from the scores (N, K) in two orders."""
    lengths = [[len(ids) - row["prompt_length"] for ids in responses_of(row)] for row in rows]
    return [
        {
            "chosen_score": scores[row, better].item(),
            "rejected_score": scores[row, worse].item(),
            "chosen_length": lengths[row][better],
            "rejected_length": lengths[row][worse],
            "source": rows[row].get("source"),
            "swapped_difference": (swapped[row, worse] - swapped[row, better]).item(),
        }
        for row, better, worse in zip(*(indices.tolist() for indices in untied(ranking)), strict=True)
    ]


def count_pairs(rows: Dataset) -> int:
    """The number of untied pairs in a dataset of the stage."""
    if "ranking" not in rows.column_names:
        return len(rows)
    return len(untied(ranking_of([{"ranking": ranks} for ranks in rows["ranking"]]))[0])


def set_bias(shared: SharedBase, folder: Path, role: str, demonstrations: "Prepared | None") -> list[float]:
    """Write the bias with which demonstrations score 0 on average, as InstructGPT's, and give it to the role.

    Returns the demonstrations' scores without it; none, and no bias, where there are no demonstrations.
    """
    if demonstrations is None:
        return []
    shared.biases[role] = 0.0  # a stage that was killed here has written one, and must find the same again
    scores = score(shared, demonstrations.heldout["input_ids"], role).tolist()
    shared.biases[role] = -sum(scores) / len(scores)
    (folder / BIAS).write_text(json.dumps({"bias": shared.biases[role], "demonstrations": len(scores)}) + "\n")
    return scores


def write_probes(trainer: RewardTrainer, job: "Job") -> None:
    """Score a few held-out rows with the trained model and keep rows and scores beside the adapter."""
    rows = [responses_of(row)[0] for row in job.data.heldout.to_list()[:PROBE_ROWS]]
    model: Any = trainer.model
    ids, kept = pad_right(rows, model.config.pad_token_id, trainer.args.device)
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        scores = model(input_ids=ids, attention_mask=kept).logits[:, 0].float().tolist()
    scratch = job.folder / f"{PROBES}.tmp"
    scratch.write_text(json.dumps({"input_ids": rows, "scores": scores}) + "\n")
    scratch.replace(job.folder / PROBES)


def check_probes(shared: SharedBase, folder: Path, role: str = "reward") -> None:
    """Score the probe rows with a role. Raises RuntimeError where they differ from what training wrote."""
    probes = json.loads((folder / PROBES).read_text())
    scores = score(shared, probes["input_ids"], role) - shared.biases.get(role, 0.0)
    trained = torch.tensor(probes["scores"])
    error, scale = (scores - trained).abs().max().item(), 1 + trained.abs().max().item()
    # bfloat16 keeps 8 bits, and the classifier rounds its score to them.
    if not error < (0.05 if shared.causal.dtype == torch.bfloat16 else 1e-3) * scale:
        raise RuntimeError(
            f"The reward model in {folder} scores its probe rows differently after loading: {scores.tolist()}, "
            f"in training {trained.tolist()}. Its adapter, its head or its base is not the one that was trained."
        )


@torch.no_grad()
def score(shared: SharedBase, rows: Sequence[list[int]], role: str = "reward", batch_size: int = 8) -> Tensor:
    """A role's scores (N,), on the CPU, of N rows of token ids, each prompt + response + stop token."""
    scores = []
    with shared.role(role), autocast_of(shared):
        for start in range(0, len(rows), batch_size):
            scores.append(shared.scores(*pad_right(rows[start : start + batch_size], 0, shared.device)).cpu())
    return torch.cat(scores)
