"""The `sft` stage: supervised fine-tuning on demonstrations with TRL's SFTTrainer."""

import copy
from typing import Any

import trl
from datasets import Dataset
from peft import PeftModel, TaskType, get_peft_model_state_dict

from ..model.base import load_base
from ..model.shared import lora_config, set_adapter
from ..records.contents import StageResults
from .job import Job
from .options import SFTConfig
from .shares import SharesBatches


class SFTTrainer(SharesBatches, trl.SFTTrainer):
    """TRL's trainer on rows that are tokenized already (columns input_ids, labels).

    With `packing` a row holds several of them, which do not attend to each other: their positions begin anew.
    """

    def __init__(self, *, args: SFTConfig, **kwargs: Any) -> None:
        args = copy.copy(args)
        args.assistant_only_loss = False  # the labels say it, and TRL would look for messages
        super().__init__(args=args, **kwargs)

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: Any, args: trl.SFTConfig, packing: bool, *rest: Any
    ) -> Dataset:
        if not packing:
            return dataset
        assert args.max_length is not None, "the settings were checked"
        return trl.pack_dataset(dataset.select_columns(["input_ids", "labels"]), args.max_length)


def train_sft(job: Job) -> StageResults:
    """Train a fresh adapter and save it to the stage's folder. Returns the held-out metrics."""
    base = load_base(job.recipe.base)
    trainer = SFTTrainer(
        model=base,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.evaluated,
        processing_class=job.tokenizer,
        peft_config=lora_config(job.recipe.lora, TaskType.CAUSAL_LM, base),
    )
    assert isinstance(trainer.model, PeftModel)
    set_adapter(trainer.model, get_peft_model_state_dict(trainer.model))  # raises before the training, not after it
    job.watch(trainer)
    job.train(trainer)
    metrics = trainer.evaluate(job.reported)
    job.save(trainer.model)
    return {"heldout_loss": metrics["eval_loss"], "heldout_token_accuracy": metrics["eval_mean_token_accuracy"]}
