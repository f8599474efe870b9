"""The `reward` stage: a reward model from comparisons with TRL's RewardTrainer, starting from the SFT adapter.

Its loss is Bradley-Terry's, -log sigma(r_chosen - r_rejected) (InstructGPT, arXiv:2203.02155, equation 1).
"""

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification
from trl import RewardTrainer
from trl.trainer.utils import pad

from .model import HEAD, SharedBase, check_fingerprint, load_base, lora_config, write_fingerprint

if TYPE_CHECKING:
    from .runner import Job

PROBES = "probe.json"  # rows and their scores at the end of training, beside the adapter
PROBE_ROWS = 8


def train(job: "Job") -> dict[str, float]:
    """Train the reward adapter and its score head and save them to the stage's folder. Returns the held-out metrics.

    Raises RuntimeError if the saved adapter, loaded as PPO will load it, scores the probe rows differently.
    """
    model = load_base(job.recipe.base, AutoModelForSequenceClassification, num_labels=1)
    model = get_peft_model(model, lora_config(job.recipe.lora, TaskType.SEQ_CLS))
    if job.recipe.sft is not None:
        start_from(model, job.run_dir / "sft", job.fingerprint)
    trainer = RewardTrainer(
        model=model,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.data.heldout,
        processing_class=job.tokenizer,
    )
    job.watch(trainer)
    job.train(trainer)
    metrics = trainer.evaluate()
    model.save_pretrained(str(job.folder))
    job.tokenizer.save_pretrained(job.folder)
    write_fingerprint(job.folder, job.fingerprint)
    write_probes(trainer, job)
    del trainer, model
    gc.collect()
    shared = SharedBase(load_base(job.recipe.base), job.recipe.lora, job.fingerprint)
    shared.add_role("reward", job.folder, head=True)
    check_probes(shared, job.folder)
    return {"heldout_accuracy": metrics["eval_accuracy"], "heldout_loss": metrics["eval_loss"]}


def start_from(model: PeftModel, folder: Path, fingerprint: dict) -> None:
    """Copy the SFT adapter into the reward model's, keeping the score head as it was initialised.

    Raises ValueError if the SFT adapter is of another base.
    """
    check_fingerprint(folder, fingerprint)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    sft = load_peft_weights(str(folder), device="cpu")
    assert own.keys() == {*sft, HEAD}, "the two adapters have the same shape, because a recipe has one `lora`"
    set_peft_model_state_dict(model, {**sft, HEAD: own[HEAD]})


def write_probes(trainer: RewardTrainer, job: "Job") -> None:
    """Score a few held-out rows with the trained model and keep rows and scores beside the adapter."""
    rows = (job.data.heldout or job.data.train).to_list()[:PROBE_ROWS]
    rows = [row["chosen_ids"] for row in rows]
    model: Any = trainer.model
    ids, kept = pad_right(rows, model.config.pad_token_id, trainer.args.device)
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        scores = model(input_ids=ids, attention_mask=kept).logits[:, 0].float().tolist()
    (job.folder / PROBES).write_text(json.dumps({"input_ids": rows, "scores": scores}) + "\n")


def check_probes(shared: SharedBase, folder: Path) -> None:
    """Score the probe rows with the `reward` role. Raises RuntimeError where they differ from what training wrote."""
    probes = json.loads((folder / PROBES).read_text())
    ids, kept = pad_right(probes["input_ids"], 0, shared.device)
    # bfloat16 keeps 8 bits: a score is a sum of hidden_size products, each rounded once.
    half = shared.causal.dtype == torch.bfloat16
    with torch.no_grad(), shared.role("reward"), torch.autocast(shared.device.type, torch.bfloat16, enabled=half):
        outputs = shared.head_outputs(ids, kept)
    scores = outputs.gather(1, kept.sum(1, keepdim=True) - 1)[:, 0].cpu()
    trained = torch.tensor(probes["scores"])
    error, scale = (scores - trained).abs().max().item(), 1 + trained.abs().max().item()
    if not error < (0.05 if half else 1e-3) * scale:
        raise RuntimeError(
            f"The reward model in {folder} scores its probe rows differently after loading: {scores.tolist()}, "
            f"in training {trained.tolist()}. Its adapter, its head or its base is not the one that was trained."
        )


def pad_right(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) padded at the right, and their attention mask from the rows' lengths."""
    ids = pad([torch.tensor(row) for row in rows], padding_value=pad_token_id, padding_side="right")
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
