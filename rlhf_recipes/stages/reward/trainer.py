"""TRL's RewardTrainer for comparisons that may be rankings of K responses, with ties, soft labels and weights.

B prompts, K responses to each, R responses in all, L tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer.utils import pad

from .loss import fold, preferences_of, ranking_loss, ranking_of, responses_of, untied


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
    """TRL's RewardTrainer for rows that `prepare` made, which may hold rankings, ties and weights."""

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
