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
    loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(str(job.folder))
    job.tokenizer.save_pretrained(job.folder)
    write_fingerprint(job.folder, job.fingerprint)
    write_probes(trainer, job)
    del trainer, model
    gc.collect()
    shared = SharedBase(load_base(job.recipe.base), job.recipe.lora, job.fingerprint)
    shared.add_role("reward", job.folder, head=True)
    check_probes(shared, job.folder)
    # Not TRL's figure, which is a mean over batches of unequal size.
    chosen, rejected = (score(shared, job.data.heldout[f"{side}_ids"]) for side in ("chosen", "rejected"))
    return {"heldout_accuracy": (chosen > rejected).float().mean().item(), "heldout_loss": loss}


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
    rows = job.data.heldout["chosen_ids"][:PROBE_ROWS]
    model: Any = trainer.model
    ids, kept = pad_right(rows, model.config.pad_token_id, trainer.args.device)
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        scores = model(input_ids=ids, attention_mask=kept).logits[:, 0].float().tolist()
    (job.folder / PROBES).write_text(json.dumps({"input_ids": rows, "scores": scores}) + "\n")


def check_probes(shared: SharedBase, folder: Path) -> None:
    """Score the probe rows with the `reward` role. Raises RuntimeError where they differ from what training wrote."""
    probes = json.loads((folder / PROBES).read_text())
    scores = score(shared, probes["input_ids"])
    trained = torch.tensor(probes["scores"])
    error, scale = (scores - trained).abs().max().item(), 1 + trained.abs().max().item()
    # bfloat16 keeps 8 bits, and the classifier rounds its score to them.
    if not error < (0.05 if shared.causal.dtype == torch.bfloat16 else 1e-3) * scale:
        raise RuntimeError(
            f"The reward model in {folder} scores its probe rows differently after loading: {scores.tolist()}, "
            f"in training {trained.tolist()}. Its adapter, its head or its base is not the one that was trained."
        )


@torch.no_grad()
def score(shared: SharedBase, rows: list[list[int]], batch_size: int = 8) -> torch.Tensor:
    """The `reward` role's scores (N,), on the CPU, of N rows of token ids, each prompt + response + stop token."""
    half = shared.causal.dtype == torch.bfloat16
    scores = []
    with shared.role("reward"), torch.autocast(shared.device.type, torch.bfloat16, enabled=half):
        for start in range(0, len(rows), batch_size):
            scores.append(shared.scores(*pad_right(rows[start : start + batch_size], 0, shared.device)).cpu())
    return torch.cat(scores)


def pad_right(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) padded at the right, and their attention mask from the rows' lengths."""
    ids = pad([torch.tensor(row) for row in rows], padding_value=pad_token_id, padding_side="right")
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
