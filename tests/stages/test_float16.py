"""float16 in every stage: near float32, steps that overflow are skipped and counted, bases that do are refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from peft import TaskType
from support.ppo import PROMPTS, ppo_config, rows_of, share_of_w7, shared_base
from support.tiny_models import make_tokenizer, save_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainerCallback

from rlhf_recipes.model.base import device, load_base, load_tokenizer, precision
from rlhf_recipes.model.shared import lora_config
from rlhf_recipes.recipe.values import Base, Lora
from rlhf_recipes.stages.dpo import DPOTrainer
from rlhf_recipes.stages.float16 import SKIPPED, CountSkippedSteps, scale_losses
from rlhf_recipes.stages.options import DPOConfig, RewardConfig, SFTConfig
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from rlhf_recipes.stages.reward.trainer import RewardTrainer
from rlhf_recipes.stages.sft import SFTTrainer

IDS = [[5 + i, 9, 17 + i, 33, 41 - i, 2] for i in range(8)]
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"input_ids": IDS, "labels": IDS},
    "reward": {"responses_ids": [[ids, ids[::-1]] for ids in IDS], "ranking": [[1, 2]] * 8},
    "dpo": {"prompt_ids": [ids[:3] for ids in IDS], "chosen_ids": [ids[3:] for ids in IDS]}
    | {"rejected_ids": [ids[:3] for ids in IDS]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose weights float16 holds: rounded first, 0.3 % of its 4-bit weights would be other ones."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    return folder


def trl_trainer(stage: str, base: Base, output_dir: Path, **arguments: Any) -> Trainer:
    """A trainer of four steps along the same eight rows, as a job sets it up."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"output_dir": str(output_dir), "report_to": "none", "disable_tqdm": True}
    given |= {
        "use_cpu": device().type == "cpu",
        "fp16": precision(base) == torch.float16,
        "bf16": False,
        "per_device_train_batch_size": 8,
    }
    given |= {"max_steps": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_length": 16}
    given |= {"gradient_checkpointing": False, "save_strategy": "no", **arguments}
    rows, tokenizer = Dataset.from_dict(ROWS[stage]), load_tokenizer(base)
    if stage == "reward":
        model = load_base(base, AutoModelForSequenceClassification, num_labels=1)
        # torch draws other random numbers in float16, before 2.12 or so.
        model.score.weight.data.copy_(torch.linspace(-0.02, 0.02, model.score.in_features))
        kind, config, task = RewardTrainer, RewardConfig(**given), TaskType.SEQ_CLS
    else:
        model, task = load_base(base), TaskType.CAUSAL_LM
        kind, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[stage]
        config = config(**given)
    trainer: Trainer = kind(  # type: ignore[call-arg]
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(Lora(r=4, alpha=8), task, model),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    scale_losses(trainer.accelerator)
    if trainer.args.fp16:
        trainer.add_callback(CountSkippedSteps(trainer.accelerator))
    trainer.add_callback(Logs())
    return trainer


def ppo_trainer(base: Base, output_dir: Path, **arguments: Any) -> PPOTrainer:
    torch.manual_seed(0)
    given: dict[str, Any] = {"fp16": base.dtype == "float16", "use_cpu": device().type == "cpu", "optim": "sgd"}
    given |= {"learning_rate": 0.1, "total_episodes": 8, **arguments}
    model = shared_base(
        Path(base.model), roles=("reference", "policy", "critic"), dtype=base.dtype, quantization=base.quantization
    )
    rows = Dataset.from_list(rows_of(PROMPTS))
    settings = {"train_dataset": rows, "reward_funcs": share_of_w7, "stop_token_ids": range(4, 20)}
    config = ppo_config(output_dir, **given)
    return PPOTrainer(model, config, processing_class=make_tokenizer(), callbacks=[Logs()], **settings)


def any_trainer(stage: str, base: Base, output_dir: Path, **arguments: Any) -> Trainer:
    if stage == "ppo":
        return ppo_trainer(base, output_dir, **arguments)
    return trl_trainer(stage, base, output_dir, **arguments)


def trained(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]).clone()


class Logs(TrainerCallback):
    """What comes after in the list of callbacks, as the recorder of a run does."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows += [dict(logs)] if "loss" in logs else []


def logs(trainer: Trainer) -> list[dict[str, float]]:
    return next(callback.rows for callback in trainer.callback_handler.callbacks if isinstance(callback, Logs))


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_stage_moves_as_in_float32(folder: Path, tmp_path: Path, stage: str, quantization: Any) -> None:
    moved = []
    for dtype in ("float32", "float16"):
        trainer = any_trainer(stage, Base(str(folder), dtype=dtype, quantization=quantization), tmp_path)
        if trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler._init_scale = 2.0**10  # at first it is so high that some steps are skipped
        before = trained(trainer)
        trainer.train()
        assert trained(trainer).dtype == torch.float32
        moved.append(trained(trainer) - before)
    assert [row[SKIPPED] for row in logs(trainer)] == [0] * len(logs(trainer))
    assert moved[0].norm() > 1e-3
    assert (moved[1] - moved[0]).norm() < 0.02 * moved[0].norm()
    assert trainer.accelerator.scaler is not None and trainer.accelerator.scaler.get_scale() == 2**10


# A fused optimizer, transformers' choice on a CPU, looks for overflow itself; the other is ours on a GPU.
@pytest.mark.parametrize("optim", ["adamw_torch_fused", pytest.param("paged_adamw_8bit", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_step_that_overflows_changes_nothing_and_is_counted(
    folder: Path, tmp_path: Path, stage: str, optim: str
) -> None:
    given: dict[str, Any] = {"num_ppo_epochs": 1, "total_episodes": 4} if stage == "ppo" else {"max_steps": 1}
    trainer = any_trainer(stage, Base(str(folder), dtype="float16"), tmp_path, optim=optim, **given)
    assert trainer.accelerator.scaler is not None
    trainer.accelerator.scaler._init_scale = 2.0**100
    before = trained(trainer)
    trainer.train()
    assert torch.equal(trained(trainer), before)
    assert [row[SKIPPED] for row in logs(trainer)] == [1]
    assert trainer.accelerator.scaler.get_scale() == 2.0**99
    if stage == "ppo":  # what its forward said is logged all the same
        (row,) = logs(trainer)
        assert row["val/first_pass_log_ratio_max"] == 0 and row["val/ratio"] == 1 and "policy/grad_norm" not in row
    assert trainer.lr_scheduler is not None and trainer.lr_scheduler.state_dict()["last_epoch"] == 0


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_that_only_overflows_says_so(folder: Path, tmp_path: Path, stage: str) -> None:
    trainer = any_trainer(stage, Base(str(folder), dtype="float16"), tmp_path)
    assert trainer.accelerator.scaler is not None
    trainer.accelerator.scaler._init_scale = 1.0
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"overflows at every scale of the loss: set base.dtype=bfloat16"):
        trainer.train()


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_resumed_run_goes_on_with_the_scale(folder: Path, tmp_path: Path, stage: str) -> None:
    base, found = Base(str(folder), dtype="float16"), []
    run = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch_fused", "learning_rate": 0.01}
    run |= {"total_episodes": 16} if stage == "ppo" else {"max_steps": 5, "lr_scheduler_type": "linear"}
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = any_trainer(stage, base, tmp_path, **run)
        assert trainer.accelerator.scaler is not None
        if resume is None:  # so high, and doubled so soon, that steps overflow before and after the checkpoint
            trainer.accelerator.scaler._init_scale, trainer.accelerator.scaler._growth_interval = 2.0**20, 2
        before = trained(trainer)
        trainer.train(resume_from_checkpoint=resume)
        scaler = trainer.accelerator.scaler
        left_out = ("time/", "memory/", "tok", "num_tok")
        kept = [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in logs(trainer)]
        found.append((trained(trainer), scaler.state_dict(), kept))
    assert torch.equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    assert repr(found[1][2]) == repr(found[0][2][2:])  # norms may be NaN, which equals none
    skipped = [row[SKIPPED] for row in found[0][2]]
    assert skipped[0] > 0 and sum(skipped[2:]) > 0 and not torch.equal(found[0][0], before), "it skips, moves and skips"


def test_a_base_that_overflows_is_refused_at_load(folder: Path, tmp_path: Path) -> None:
    base = Base(str(save_model(tmp_path / "model")), dtype="float16")
    file = tmp_path / "model" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    classifier = {"auto_class": AutoModelForSequenceClassification, "num_labels": 1}
    for weight, loads in (("model.layers.0.mlp.down_proj", ({}, classifier)), ("lm_head", ({},))):
        weight = f"{weight}.weight"
        safetensors.torch.save_file(state | {weight: state[weight] * 1e6}, file, metadata={"format": "pt"})
        for arguments in loads:
            with pytest.raises(ValueError, match=r"overflow torch.float16. Set base.dtype=bfloat16"):
                load_base(base, **arguments)
        load_base(Base(base.model, dtype="bfloat16"))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_gpu_without_bfloat16_has_float16(monkeypatch: pytest.MonkeyPatch, quantization: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert precision(Base("model", quantization=quantization)) == dtype
