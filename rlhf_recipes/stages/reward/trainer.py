"""TRL's RewardTrainer for rankings of K responses (a pair is K = 2), with ties, soft labels and weights.

B prompts; K responses to each, or to the prompt that has most; R responses in all; L tokens of the longest one, with
its prompt; M pairs that are no ties.
"""

from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from torch.utils.data import SequentialSampler
from trl.trainer.utils import pad

from ..shares import SHARE, SharesBatches
from .loss import fold, ranking_loss, stack_preferences, stack_rankings, untied


@dataclass
class RankingCollator:
    """Makes a batch of rows of the `reward` stage.

    `input_ids` and `attention_mask` (R, L) hold all their R responses, one after another and padded at the right;
    `ranking` is (B, K), see `ranking_loss`; where the rows have them, `margin` and `weight` are (B,) and `preferences`
    (B, K, K).

    Attributes:
        pad_token_id: what `input_ids` are padded with.
        pad_to_multiple_of: L is rounded up to a multiple of this, if it is given.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(response) for row in rows for response in row["responses_ids"]]  # R of (<= L,)
        masks = [torch.ones_like(response) for response in ids]
        given = {key: torch.tensor([row[key] for row in rows]) for key in ("margin", "weight") if key in rows[0]}
        if "preferences" in rows[0]:
            given["preferences"] = stack_preferences(rows)
        # The ranking comes first: the Trainer takes the number of rows from the first tensor.
        return {
            "ranking": stack_rankings(rows),
            **given,
            "input_ids": pad(ids, self.pad_token_id, "right", self.pad_to_multiple_of),
            "attention_mask": pad(masks, 0, "right", self.pad_to_multiple_of),
        }


class RewardTrainer(SharesBatches, trl.RewardTrainer):
    """TRL's RewardTrainer for rows that `prepare` made: `responses_ids` and `ranking`, perhaps ties and weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        theirs: Any = self.data_collator
        self.data_collator = RankingCollator(theirs.pad_token_id, theirs.pad_to_multiple_of)
        self.evaluated: list[Tensor] = []  # the scores of the last evaluation's responses, in their order, a batch each

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing: the rows are tokenized already, and none is too long."""
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Name the columns that the Trainer leaves in the rows: what `RankingCollator` reads, and their length."""
        self._signature_columns = ["responses_ids", "ranking", "margin", "weight", "preferences"]
        self._signature_columns.append(self.args.length_column_name)  # which group_by_length reads

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        """The rows in their order, however those of training are grouped: `evaluated` is told apart by it."""
        return SequentialSampler(eval_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's, and the scores that it saw are kept in `evaluated`."""
        self.evaluated = []
        return super().evaluate(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the B rows of weight * `ranking_loss`; with `return_outputs` the outputs of the model as well.

        It is not divided by the sum of the weights, so that micro-batches of equal size change nothing.
        """
        ranking, mask = inputs["ranking"], inputs["attention_mask"]  # (B, K), (R, L)
        # Padding at the right needs no mask: no token sees it, and the classifier reads the last token before it.
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        scores = fold(outputs.logits[:, 0].float(), ranking)  # (B, K)
        if not self.model.training:
            self.evaluated.append(outputs.logits[:, 0].float().cpu())  # (R,)
        center = self.args.center_rewards_coefficient or 0.0
        soft = inputs.get("preferences")
        losses = ranking_loss(scores, ranking, inputs.get("margin"), self.args.label_smoothing, center, soft)  # (B,)
        loss = (losses * inputs.get("weight", 1.0)).mean() * inputs.get(SHARE, 1.0)
        self._record(outputs.logits.detach(), scores.detach(), ranking, mask.sum())
        return (loss, outputs) if return_outputs else loss

    def _record(self, logits: Tensor, scores: Tensor, ranking: Tensor, tokens: Tensor) -> None:
        """TRL's metrics, with accuracy and margin over the untied pairs. `logits` (R, 1), the others (B, K)."""
        mode = "train" if self.model.training else "eval"
        gather: Any = self.accelerator.gather
        self._total_train_tokens += int(gather(tokens).sum()) if mode == "train" else 0
        row, better, worse = untied(ranking)
        differences, logits = gather(scores[row, better] - scores[row, worse]), gather(logits)  # (M,), (R, 1)
        values = {"min_reward": logits.min(), "mean_reward": logits.mean(), "max_reward": logits.max()}
        values |= {"accuracy": (differences > 0).float().mean(), "margin": differences.mean()}
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in values.items():
            self._metrics[mode][name].append(value.item())
