"""The `ppo` stage: the roles on one base, trained by PPO, and the models compared."""

from typing import Any, cast

from transformers import TrainerCallback

from ...model.base import load_base
from ...model.processes import on_main
from ...model.shared import SharedBase
from ...recipe.lookup import function
from ...records.contents import Sample, StageResults
from ...records.recorder import Recorder
from ..compare import compare
from ..job import Job
from ..scores import resolve_rewards
from .roles import add_roles, ppo_roles
from .trainer import PPOTrainer


class RecordSamples(TrainerCallback):
    """Hands the samples of each evaluation to the recorder."""

    def __init__(self, trainer: PPOTrainer, recorder: Recorder) -> None:
        self.trainer, self.recorder = trainer, recorder

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        samples: list[Sample] = [{"model": "ppo", **sample} for sample in self.trainer.samples]
        self.recorder.samples(state.global_step, samples)


def train_ppo(job: Job) -> StageResults:
    """Put the roles on one base, train, save policy and critic, compare the models.

    Returns the comparison on the held-out prompts: those of `Job.reported`.
    """
    recipe = job.recipe
    assert recipe.ppo is not None
    shared = SharedBase(load_base(recipe.base), recipe.lora, job.fingerprint)
    add_roles(shared, job, ppo_roles(recipe, job.config))
    trainer = PPOTrainer(
        model=shared,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.evaluated,
        processing_class=job.tokenizer,
        reward_funcs=resolve_rewards(recipe.ppo.reward_sources, recipe.base.chat_template_date),
        gold=function(recipe.gold) if recipe.gold else None,
        stop_token_ids=[job.data.stop_token_id],
        ptx=job.extras.get("ptx"),
    )
    recorder = job.watch(trainer)
    trainer.add_callback(RecordSamples(trainer, recorder))
    job.train(trainer)

    def save() -> None:
        for role in trainer.trained:
            folder = job.folder / role
            shared.save_role(trainer.result if role == "policy" else role, folder)
            job.tokenizer.save_pretrained(folder)

    on_main(save)
    models = {"base": "base", "reference": "sft", trainer.result: "ppo"}
    if trainer.choice():
        trainer.evaluator.seed += 1  # neither the prompts nor the random numbers by which the policy was chosen
    results, samples = compare(trainer.evaluator, job.reported.to_list(), models)
    recorder.samples(trainer.state.global_step, samples)
    return cast(StageResults, results | trainer.choice())
