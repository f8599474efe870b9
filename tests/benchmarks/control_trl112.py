"""The other side of `control.py`: TRL 1.12.0's `PPOTrainer` with four models, as its user would run it.

It runs in a virtual environment with trl==1.12.0 and peft, and imports nothing of rlhf_recipes:

    .venv-parity/bin/python tests/benchmarks/control_trl112.py FOLDER

`FOLDER/job.json` says what is trained (`control.train_theirs` writes it). The policy's adapter, what it cost and what
TRL logged come to stand beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from costs import Costs
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

Job = dict[str, Any]


def four_models(job: Job) -> dict[str, Any]:
    """Policy, reference, reward and value model by `PPOTrainer`'s names for them, each with a base of its own.

    The policy is the base with the SFT adapter, which goes on training, and the reference has it merged into its
    weights; the value model and the reward model likewise with the reward adapter and its head. Our reward model adds a
    constant with which demonstrations score 0; here it is the bias of the scores, which is not trained.
    """
    causal, classifier = AutoModelForCausalLM, AutoModelForSequenceClassification
    return {
        "model": _adapted(causal, job, "sft", trained=True),
        "ref_model": _adapted(causal, job, "sft"),
        "reward_model": _with_bias(_adapted(classifier, job, "reward", num_labels=1), job["bias"]),
        # TRL takes a classifier apart, so that it must be one with an adapter inside and no PeftModel.
        "value_model": _with_bias(
            _adapted(classifier, job, "reward", trained=True, num_labels=1).get_base_model(), job["bias"]
        ),
    }


def _adapted(auto_class: Any, job: Job, adapter: str, trained: bool = False, **options: Any) -> Any:
    """The base with an adapter: on it, to be trained, or merged into it."""
    base = auto_class.from_pretrained(job["base"], dtype=torch.float32, **options)
    model = PeftModel.from_pretrained(base, job[adapter], is_trainable=trained)
    return model if trained else model.merge_and_unload()


def _with_bias(model: Any, bias: float) -> Any:
    """A classifier whose score is a linear layer, without PEFT's wrapper, with a bias that is not trained."""
    model.score = getattr(model.score, "modules_to_save", {"default": model.score})["default"]
    model.score.bias = nn.Parameter(torch.tensor([bias]), requires_grad=False)
    return model


def main() -> None:
    # Here, so that the tests can make the models where there is another TRL.
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    costs = Costs(folder / "costs.json")
    config = PPOConfig(
        output_dir=str(folder / "out"),
        stop_token="eos",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **job["options"],
    )
    set_seed(config.seed)
    models = four_models(job)
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(job["base"], padding_side="left"),
        train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
        callbacks=[costs],
        **models,
    )
    costs.models = list(models.values())
    # In place of TRL's own, which shuffles: the prompts in the order in which they stand, as ours takes them.
    rows = DataLoader(
        trainer.train_dataset, trainer.local_dataloader_batch_size, collate_fn=trainer.data_collator, drop_last=True
    )
    trainer.dataloader = trainer.accelerator.prepare(rows)
    trainer.train()
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    models["model"].save_pretrained(str(folder))


if __name__ == "__main__":
    main()
