"""An adapter of a run as a PEFT folder with a base that others can load."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from ..model.adapters import load_adapter, read_adapter_config
from ..model.base import load_base
from ..model.memory import release
from ..recipe.lookup import is_function
from ..stages.inputs import prepare_comparison
from .folder import new_folder
from .measure import check_close, compare, table, take_reference
from .merged import open_trained
from .reward import compare_scores, score_table
from .trained import WEIGHTS, ExportSettings, Trained, find_trained, unquantized


def export_adapter(run_dir: Path, to: Path, settings: ExportSettings) -> dict[str, Any]:
    """Write an adapter, a policy's or a reward model's, as PEFT's `from_pretrained` and vLLM take it.

    Returns how close it is by plain PEFT on the base that it was trained on (`trained_base`) and, where that is
    quantized, on the one without (`original`), on which vLLM and most others would put it.

    Raises ValueError where the folder is there, or others could not load the base by its name.
    """
    trained = find_trained(run_dir, settings.model)
    base_id = check_base_id(trained, settings.base_id)
    with new_folder(to) as folder:
        config = read_adapter_config(trained.folder)
        config.base_model_name_or_path = base_id
        config.revision = trained.fingerprint["revision"] if settings.base_id is None else None
        config.save_pretrained(str(folder))
        shutil.copy(trained.folder / WEIGHTS, folder / WEIGHTS)
        trained.save_tokenizer(folder)
        measured = _measure_scores(trained, folder) if trained.scores else _measure(run_dir, trained, folder)
        if not settings.force and not trained.scores:
            check_close(measured["trained_base"], trained, "dequantized", trained.dtype)
        trained.write_record(folder, format="adapter", base_id=base_id, measured=measured)
    return measured


def public_base(trained: Trained, base_id: str | None) -> str | None:
    """What others load the base by: `base_id`, or the recipe's name of it; None where that is of this machine alone."""
    name = trained.base.model
    return base_id or (None if is_function(name) or Path(name).exists() else name)


def check_base_id(trained: Trained, base_id: str | None) -> str:
    """The same. Raises ValueError where others could not load the base by its name."""
    public = public_base(trained, base_id)
    if public is None:
        raise ValueError(
            f"Nobody else can load the base by its name {trained.base.model}: set --base-id to the Hub id of that very "
            "model."
        )
    return public


def _bases(trained: Trained) -> dict[str, Any]:
    """The bases on which the adapter is measured, by name."""
    plain = {"original": unquantized(trained.base, trained.dtype)} if trained.base.quantization else {}
    return {"trained_base": trained.base, **plain}


def _measure(run_dir: Path, trained: Trained, folder: Path) -> dict[str, Any]:
    """How close the written policy is. Its sampling settings are written beside it."""
    inputs = prepare_comparison(trained.recipe, run_dir, trained.tokenizer)
    shared = open_trained(trained, trained.base)
    reference, sampling = take_reference(shared, trained, *inputs)
    del shared
    release()
    sampling.save_pretrained(folder)
    measured = {}
    for name, base in _bases(trained).items():
        measured[name] = compare(reference, load_adapter(load_base(base), folder))
        release()
    return measured


def _measure_scores(trained: Trained, folder: Path) -> dict[str, Any]:
    """How close the written reward model is."""
    measured = {}
    for name, base in _bases(trained).items():
        model: Any = load_base(base, AutoModelForSequenceClassification, num_labels=1)
        model.config.pad_token_id = trained.tokenizer.pad_token_id
        measured[name] = compare_scores(trained, load_adapter(model, folder))
        release()
    return measured


def exported_words(measured: dict[str, Any]) -> str:
    """What `export` says of an adapter: what was measured, and a warning where the base matters."""
    warning = "\nSay to others which quantization it was trained on: export.json does." * ("original" in measured)
    return adapter_table(measured) + warning


def adapter_table(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    words = {name: (table if "kl" in found else score_table)(found) for name, found in measured.items()}
    if "original" not in words:
        return words["trained_base"]
    return (
        f"by PEFT on the quantized base that it was trained on, {words['trained_base']}\n"
        f"on the base without quantization, as vLLM and others load it, {words['original']}"
    )
