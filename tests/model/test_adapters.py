"""Saved adapters: plain LoRA in safetensors is read as PEFT reads it, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, TaskType
from safetensors.torch import save_file

from rlhf_recipes.model.adapters import WEIGHTS, read_adapter_config, read_adapter_weights


def saved(folder: Path, **changes: Any) -> Path:
    """A folder as PEFT leaves it, with a configuration that somebody has changed."""
    config = LoraConfig(
        r=4, lora_alpha=3, lora_dropout=0.1, target_modules=["q_proj"], task_type=TaskType.SEQ_CLS, use_rslora=True
    )
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    save_file({"a": torch.ones(2)}, folder / WEIGHTS)
    return folder


def test_a_plain_adapter_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    folder = saved(tmp_path, base_model_name_or_path="org/base", a_setting_to_come=None, peft_version="0.15.0")
    assert read_adapter_config(folder).to_dict() == {
        **PeftConfig.from_pretrained(str(folder)).to_dict(),
        "peft_version": LoraConfig().peft_version,
    }
    assert read_adapter_weights(folder)["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"megatron_core": "their.module"},  # PEFT would import it
        {"peft_type": "PROMPT_TUNING"},  # it would load the tokenizer that is named, and ask whether its code may run
        {"init_lora_weights": "pissa"},  # it would change the base
        {"use_dora": True},
        {"a_setting_to_come": 1},
    ],
)
def test_no_other_kind_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key}={value!r} is none of a plain LoRA adapter"):
        read_adapter_config(saved(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": value} for value in (0, "16", None, True, [16], 2**40)),
        *({"lora_alpha": value} for value in (None, "x", float("nan"), float("inf"), 10**4000)),
        *({"alpha_pattern": value} for value in (["q"], 3, [{}], {"q": "x"})),
        *({"rank_pattern": value} for value in (True, {"q": 0})),
        *({"target_modules": value} for value in (3, [[]], [{}], {"a": 1})),
        *({"task_type": value} for value in ([], "x", 3)),
        *({"bias": value} for value in ([], "some")),
        *({"layers_to_transform": value} for value in ("1", [-1], [1.5])),
        {"target_parameters": "x"},
        {"use_rslora": "false"},
        {"revision": 1},
    ],
)
def test_what_peft_does_not_write_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    (key,) = changes
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key}=.* is not what PEFT writes\. Delete it"):
        read_adapter_config(saved(tmp_path, **changes))


def test_settings_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json: When `layers_pattern` is specified"):
        read_adapter_config(saved(tmp_path, layers_pattern="h"))


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    torch.save({"a": torch.ones(2)}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    for read in (read_adapter_config, read_adapter_weights):
        with pytest.raises(ValueError, match=rf"has no {WEIGHTS}, and an adapter is loaded from no other file"):
            read(folder)
