"""A reward model of a run as a sequence classifier of transformers, which gives the scores of its probes."""

from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ..model.adapters import load_adapter
from ..model.base import base_config, load_base
from ..model.memory import release
from ..model.shared import read_bias
from ..stages.reward.adapters import check_whole, read_probes, rounding
from .folder import check_room, new_folder, write_config
from .merge import merged_layers, write_shards
from .trained import ExportSettings, Trained, find_trained, unquantized


class MeasuredScores(TypedDict):
    """How close an exported reward model is to what training wrote of its probe rows."""

    probes: int  # rows of prompt and response
    mean_difference: float  # the mean |difference| of a score
    largest_difference: float
    spread: float  # of the probes' scores, their largest less their smallest
    bias: float  # what the run adds to every score, and no classifier can hold


def export_reward(run_dir: Path, to: Path, settings: ExportSettings) -> MeasuredScores:
    """Write a reward model as a sequence classifier with one label, its adapter added to the base's weights.

    Raises ValueError where the folder is there, the disk too small, the architecture has no classifier in transformers,
    or the scores are too far from those of training.
    """
    trained = find_trained(run_dir, settings.model, scores=True)
    check_classifier_exists(trained)
    check_whole(trained.folder)
    read_probes(trained.folder)
    dtype = trained.dtype if settings.dtype is None else getattr(torch, settings.dtype)
    with new_folder(to) as folder:
        check_room(folder, trained.base, dtype)
        base = trained.base if settings.onto == "dequantized" else unquantized(trained.base, dtype)
        model: Any = load_base(base, AutoModelForSequenceClassification, num_labels=1)
        model = load_adapter(model, trained.folder).base_model.model
        model.score = model.score.modules_to_save["default"]
        write_shards(merged_layers(model, "default", dtype), folder, settings.shard_size)
        # Without `problem_type` a pipeline would put the score through a sigmoid.
        model.config.update({"problem_type": "regression", "id2label": {0: "reward"}, "label2id": {"reward": 0}})
        tokenizer = trained.tokenizer
        write_config(model, folder, dtype, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        del model
        release()
        trained.save_tokenizer(folder)
        written = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", device_map="auto", trust_remote_code=trained.base.trust_remote_code
        )
        measured = compare_scores(trained, written)
        if not settings.force:
            _check_close(measured, trained, settings, dtype)
        name = str(dtype).removeprefix("torch.")
        trained.write_record(folder, format="reward", onto=settings.onto, dtype=name, measured=measured)
    return measured


def check_classifier_exists(trained: Trained) -> None:
    """Raises ValueError where others could not load a classifier, because transformers has none of the architecture."""
    architecture = base_config(trained.base).model_type
    if architecture not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"{trained.name}: transformers has no sequence classifier of the architecture {architecture}, so that only "
            "this package can use its reward models."
        )


@torch.no_grad()
def compare_scores(trained: Trained, model: Any) -> MeasuredScores:
    """What a sequence classifier says of the probe rows, beside what training wrote of them."""
    probes, wanted = read_probes(trained.folder)
    model.eval()
    rows = [torch.tensor([row], device=model.device) for row in probes]
    scores = torch.tensor([model(input_ids=ids).logits.item() for ids in rows])  # (N,)
    differences = (scores - wanted).abs()
    return MeasuredScores(
        probes=len(rows),
        mean_difference=differences.mean().item(),
        largest_difference=differences.max().item(),
        spread=(wanted.max() - wanted.min()).item(),
        bias=read_bias(trained.folder) or 0.0,
    )


def _check_close(measured: MeasuredScores, trained: Trained, settings: ExportSettings, dtype: torch.dtype) -> None:
    """Raises ValueError where scores differ by more than rounding explains, with what would help."""
    _, wanted = read_probes(trained.folder)
    limit = max(rounding(wanted, kind) for kind in (trained.dtype, dtype))
    if measured["largest_difference"] <= limit:
        return
    quantized = settings.onto == "original" and trained.base.quantization is not None
    remedies = ["--onto dequantized"] * quantized + ["--dtype float32"] * (dtype != torch.float32)
    raise ValueError(
        f"What was written scores probe rows up to {measured['largest_difference']:.2g} away from training, and "
        f"{limit:.2g} are let through. What may help: {'; '.join(remedies) or 'nothing that is known'}. With --force "
        "it is kept all the same."
    )


def score_table(measured: MeasuredScores) -> str:
    """What was measured, in words."""
    lines = (
        f"against the scores of {measured['probes']} probe rows in training, which spread over "
        f"{measured['spread']:.2f}:\n  mean |difference| {measured['mean_difference']:.2g}, largest "
        f"{measured['largest_difference']:.2g}"
    )
    if measured["bias"]:
        lines += (
            f"\n  the run adds {measured['bias']:.3f} to every score, which no classifier can hold; differences of "
            "scores are the same"
        )
    return lines
