"""The `dpo` stage: a policy straight from comparisons with TRL's DPOTrainer, starting from the SFT adapter.

Its loss is -log sigma(beta * (log pi/pi_ref of the chosen response - the same of the rejected)) (Rafailov et al.,
arXiv:2305.18290, equation 7). The reference is the SFT adapter or, without an SFT stage, the bare base.
"""

import copy
import dataclasses
from typing import Any

import trl
from datasets import Dataset
from peft import PeftModel, TaskType

from ..model.adapters import load_adapter
from ..model.base import check_fingerprint, load_base
from ..model.memory import release
from ..model.sampler import Sampler
from ..model.shared import SharedBase, lora_config
from ..recipe.lookup import function
from ..records.contents import StageResults
from .compare import Evaluator, compare, held_out_texts
from .configure import stage_config
from .job import Job
from .options import DPOConfig, PPOConfig
from .reward.adapters import PROBES, add_reward_roles, judge_folder, member_folders
from .scores import ROLE, Rewards, resolve_rewards
from .shares import SharesBatches

MODELS = {"base": "base", "reference": "sft", "policy": "dpo"}


class DPOTrainer(SharesBatches, trl.DPOTrainer):
    """TRL's trainer on rows that are tokenized already (columns prompt_ids, chosen_ids, rejected_ids)."""

    def __init__(self, *, args: DPOConfig, **kwargs: Any) -> None:
        args = copy.copy(args)
        args.max_length = None  # no row is longer: see `truncation_mode`
        super().__init__(args=args, **kwargs)
        weights = dict(self.model.named_parameters())
        for name, weight in weights.items():
            if ".ref." in name:
                # TRL has rounded the policy's copy of the adapter to bfloat16 where the base is quantized.
                weights[name.replace(".ref.", ".default.")].data = weight.detach().float().clone()

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Older versions of transformers (5.17 does) load the reference alone, whose folder lies in the checkpoint's.
        policy: Any = model or self.model
        policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(model, inputs, *args, **kwargs)
        # TRL takes the means of its metrics over batches; so they are over rows, where the last batch is smaller too.
        rows = len(inputs["input_ids"]) // 2
        for values in self._metrics["eval"].values():
            values += values[-1:] * (rows - 1)
        return result


def train_dpo(job: Job) -> StageResults:
    """Train the policy from the SFT adapter, save it to the stage's folder, and compare the models.

    Returns the held-out loss and accuracy (of beta * log pi/pi_ref as a reward), and the comparison.
    """
    trainer = make_trainer(job)
    recorder = job.watch(trainer)
    job.train(trainer)
    metrics = trainer.evaluate(job.reported)
    model = trainer.model
    assert isinstance(model, PeftModel)
    job.save(model, selected_adapters=["default"])
    step = trainer.state.global_step
    # Whoever holds the trainer holds its base, beside the one that is loaded now.
    del trainer, model
    release()
    _, prompts = job.halves(job.extras["prompts"].heldout)
    results, samples = compare(make_evaluator(job), prompts.to_list(), MODELS)
    recorder.samples(step, samples)
    return {"heldout_loss": metrics["eval_loss"], "heldout_accuracy": metrics["eval_rewards/accuracies"], **results}


def make_trainer(job: Job) -> DPOTrainer:
    """The trainer of a policy that begins as the SFT adapter, of which TRL keeps a copy for the reference."""
    model, peft_config = load_base(job.recipe.base), None
    if job.sft is None:
        peft_config = lora_config(job.recipe.lora, TaskType.CAUSAL_LM, model)
    else:
        check_fingerprint(job.sft, job.fingerprint)
        model = load_adapter(model, job.sft, is_trainable=True)
    return DPOTrainer(
        model=model,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.evaluated,
        processing_class=job.tokenizer,
        peft_config=peft_config,
    )


def make_evaluator(job: Job) -> Evaluator:
    """The roles on one base, ready to be compared. Their samples are scored by PPO's reward, as far as there is one."""
    recipe = job.recipe
    shared = SharedBase(load_base(recipe.base), recipe.lora, job.fingerprint)
    shared.add_role("reference", job.sft)
    shared.add_role("policy", job.folder)
    sampler = Sampler(
        shared,
        job.tokenizer,
        job.config.response_length,
        job.config.temperature,
        job.config.per_device_eval_batch_size,
        [job.data.stop_token_id],
    )
    sources = recipe.ppo.reward_sources if recipe.ppo is not None else (ROLE,)
    if ROLE in sources and not (job.run_dir / "reward" / PROBES).is_file():
        # This stage does not wait for the reward stage: nothing is scored, and PPO's settings of it mean nothing.
        recipe, sources = dataclasses.replace(recipe, ppo=None), ()
    if ROLE in sources:
        add_reward_roles(shared, member_folders(job.run_dir))
    add_reward_roles(shared, judge_folder(job.run_dir))
    config = stage_config(recipe, "ppo", job.run_dir)
    assert isinstance(config, PPOConfig)
    gold = function(recipe.gold) if recipe.gold is not None else None
    texts = held_out_texts(job.extras.get("ptx"), config.ptx_max_length)
    return Evaluator(
        sampler,
        Rewards(sampler, config, resolve_rewards(sources, recipe.base.chat_template_date)),
        gold,
        recipe.seed,
        texts,
    )
