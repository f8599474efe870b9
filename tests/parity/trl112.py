"""Run TRL 1.12.0's PPOTrainer on every scenario and write down every number it finds on the way.

    .venv-parity/bin/python tests/parity/trl112.py FOLDER

`FOLDER/base` is the model that both sides load; `FOLDER/<scenario>.safetensors` holds the numbers, keyed by update
(`0/returns`), by optimizer call (`0/step1/pg_loss`) and by parameter (`0/after/policy/<name>`).
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "TRANSFORMERS_VERBOSITY": "error",
}
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import trl.experimental.ppo.ppo_trainer as ppo_trainer
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from scenarios import EOS, LENGTH, LORA, OPTIONS, ROWS, SCENARIOS, TARGETS, Scenario, cpu, fill, prompts, short
from support.tiny_models import make_tokenizer, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl.experimental.ppo import PPOConfig, PPOTrainer

# Local variables of TRL's `train` that are worth comparing: of a rollout, and of a micro-batch.
OF_ROLLOUT = ["queries", "responses", "logprobs", "ref_logprobs", "scores", "values", "padding_mask", "padding_mask_p1"]
OF_ROLLOUT += ["kl", "rewards", "advantages", "returns"]
OF_STEP = ["pg_loss", "vf_loss", "ratio"]


def script(kind: str, update: int) -> Tensor:
    """The responses (ROWS, LENGTH) of an update, as generation would return them: padding (token 0) after the end.

    full: EOS is the last token, or there is none. early: EOS also comes early. pad: as early, with token 0 sampled on
    the way. after_eos: as early, but generation went on. stop_id: ended by token 50, or by nothing.
    """
    generator = torch.Generator().manual_seed(100 + update)
    tokens = torch.randint(4, 50, (ROWS, LENGTH), generator=generator)
    if kind == "full":
        tokens[::2, -1] = EOS
        return tokens
    for row, length in enumerate([1, 3, LENGTH, 5, LENGTH, 2, 7, 4]):
        ended = row != 4  # rows 2 and 4 are as long as allowed, and only row 2 ends there
        if ended:
            tokens[row, length - 1] = 50 if kind == "stop_id" else EOS
        if kind != "after_eos":
            tokens[row, length:] = 0
    if kind == "pad":
        tokens[1, 1], tokens[3, 0], tokens[4, 6] = 0, 0, 0
    return tokens


def scripted_generation(kind: str, temperature: float, pad: int) -> Any:
    """In place of `batch_generation`: the script, with the scores that the training forward gives it."""
    update = iter(range(1000))

    @torch.no_grad()
    def generation(model: nn.Module, queries: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        responses = script(kind, next(update))
        if pad == EOS:
            responses[responses == 0] = pad
        ids = torch.cat([queries, responses], 1)
        return ids, ppo_trainer.forward(model, ids, pad).logits[:, queries.shape[1] - 1 : -1] / temperature

    return generation


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {short(name): p for name, p in model.named_parameters() if p.requires_grad}


def classifier(folder: Path, role: str, dtype: str) -> nn.Module:
    """A sequence classifier on the base with a LoRA adapter and a head: the reward model, or the value model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype)
    model.requires_grad_(False)
    model = inject_adapter_in_model(LoraConfig(**LORA, target_modules=TARGETS), model)
    model.score.requires_grad_(True)
    fill(role, trained(model))
    return model


class Recorder(TrainerCallback):
    """Reads TRL's numbers from the local variables of its `train`, where it calls out."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.update = self.step = 0
        self.stepped = False

    def watch(self, trainer: PPOTrainer) -> None:
        self.roles = {"policy": trained(trainer.model.policy), "critic": trained(trainer.model.value_model)}
        step, permutation = trainer.optimizer.step, np.random.permutation

        def recorded_permutation(size: int) -> Any:
            if f"{self.update}/returns" not in self.found:
                self.read(sys._getframe(1).f_locals, OF_ROLLOUT, f"{self.update}")
                if self.update == 0:
                    self.found["numpy_state"] = torch.from_numpy(np.random.get_state()[1].astype("int64"))
                    self.found["checkpointing"] = torch.tensor(trainer.model.policy.is_gradient_checkpointing)
            return permutation(size)

        def recorded_step() -> None:
            frame, key = sys._getframe(1).f_locals, f"{self.update}/step{self.step}"
            self.read(frame, OF_STEP, key)
            self.found[f"{key}/rows"] = torch.tensor(frame["micro_batch_inds"])
            self.found[f"{key}/steps"] = torch.tensor(trainer.accelerator.sync_gradients)
            if trainer.accelerator.sync_gradients and not self.stepped:
                self.stepped = True
                self.parameters("gradient", lambda parameter: parameter.grad)
            step()
            self.step += 1

        np.random.permutation, trainer.optimizer.step = recorded_permutation, recorded_step

    def read(self, frame: dict[str, Any], names: list[str], key: str) -> None:
        self.found |= {f"{key}/{name}": cpu(frame[name]) for name in names}

    def parameters(self, key: str, value: Any = lambda parameter: parameter) -> None:
        for role, parameters in self.roles.items():
            self.found |= {f"{self.update}/{key}/{role}/{name}": cpu(value(p)) for name, p in parameters.items()}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.parameters("after")
        self.update, self.step = self.update + 1, 0


def run(name: str, scenario: Scenario, folder: Path) -> None:
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    torch.manual_seed(0)
    np.random.seed(0)
    tokenizer = make_tokenizer(scenario.pad)
    tokenizer.padding_side = "left"
    policy = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=scenario.dtype)
    policy.generation_config.update(**scenario.generation)
    options = OPTIONS | {"per_device_train_batch_size": ROWS, "stop_token": "eos"} | scenario.options | scenario.trl
    recorder = Recorder()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=scenario.dtype == "bfloat16",
            total_episodes=ROWS * scenario.updates,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **options,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=classifier(folder / "base", "reward", scenario.dtype),
        value_model=classifier(folder / "base", "critic", scenario.dtype),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts(scenario.prompts)]),
        peft_config=LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[recorder],
    )
    fill("policy", trained(trainer.model.policy))
    with contextlib.ExitStack() as restore:
        restore.callback(setattr, np.random, "permutation", np.random.permutation)
        restore.callback(setattr, ppo_trainer, "batch_generation", ppo_trainer.batch_generation)
        recorder.watch(trainer)
        if scenario.responses != "sampled":
            temperature = options["temperature"] + 1e-7
            ppo_trainer.batch_generation = scripted_generation(scenario.responses, temperature, tokenizer.pad_token_id)
        trainer.train()
    logged = [row for row in trainer.state.log_history if "objective/kl" in row]
    save_file(recorder.found, folder / f"{name}.safetensors", metadata={"logged": json.dumps(logged)})


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)
    disable_progress_bar()
    save_model(folder / "base")
    for name, scenario in SCENARIOS.items():
        with contextlib.redirect_stdout(None):
            run(name, scenario, folder)
        print(f"TRL 1.12.0: {name}", flush=True)
    shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
