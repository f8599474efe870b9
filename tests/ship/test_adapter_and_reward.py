"""Adapters and reward models as others load them: by PEFT, by a pipeline, in a process without this package."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.architectures import save_architecture
from support.command_line import error_of
from support.shipped import in_a_fresh_process, make_run
from support.worded import make_recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.model.open import open_models
from rlhf_recipes.records.folder import read_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("ship"))


@pytest.fixture
def probes(run: Path) -> dict[str, Any]:
    return json.loads((run / "reward" / "probe.json").read_text())


ROWS = [[4, 5, 6, 7]]


@dataclass
class Shipped:
    """A reward model and an adapter beside its base, as `export` writes them, and what a fresh process says of them."""

    reward: Path
    printed: str  # of the reward model's export
    scores: list[torch.Tensor]  # of its probes
    log_probs: list[torch.Tensor]  # of the adapter, on ROWS


@pytest.fixture(scope="module")
def shipped(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    (run / "reward" / "score_bias.json").write_text('{"bias": 0.25, "demonstrations": 3}')
    folder, base = tmp_path_factory.mktemp("shipped"), read_recipe(run).base.model
    reward, adapter = folder / "reward", folder / "adapter"
    with redirect_stdout(io.StringIO()) as printed:
        main_cli(["export", str(run), "--format", "reward", "--to", str(reward)])
    main_cli(["export", str(run), "--format", "adapter", "--base-id", base, "--to", str(adapter)])
    probes = json.loads((run / "reward" / "probe.json").read_text())
    answers = in_a_fresh_process({reward: probes["input_ids"], adapter: ROWS})
    return Shipped(reward, printed.getvalue(), answers[reward], answers[adapter])


def test_a_reward_model_scores_as_in_training(probes: dict[str, Any], shipped: Shipped) -> None:
    assert "adds 0.250 to every score" in shipped.printed
    torch.testing.assert_close(torch.cat(shipped.scores), torch.tensor(probes["scores"]), atol=1e-4, rtol=0)
    config = json.loads((shipped.reward / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["pad_token_id"] not in (None, config["eos_token_id"])
    # In a batch, whose shorter rows are padded, and without a sigmoid.
    classify: Any = pipeline("text-classification", str(shipped.reward), batch_size=3)
    assert classify.tokenizer.padding_side == "right"
    texts = classify.tokenizer.batch_decode(probes["input_ids"])
    found = classify(texts, add_special_tokens=False)
    assert [row["label"] for row in found] == ["reward"] * 3
    assert [row["score"] for row in found] == pytest.approx(probes["scores"], abs=1e-4)
    assert json.loads((shipped.reward / "export.json").read_text())["measured"]["bias"] == 0.25


def test_an_adapter_is_loaded_by_peft_on_the_base_that_it_names(
    run: Path, probes: dict[str, Any], shipped: Shipped, tmp_path: Path
) -> None:
    base = read_recipe(run).base.model
    for model in ("ppo", "reward"):
        words = ["export", str(run), "--format", "adapter", "--base-id", "org/base", "--model", model]
        main_cli([*words, "--to", str(tmp_path / model)])
        config = json.loads((tmp_path / model / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/base" and config["revision"] is None
        assert not any(str(run.parent) in path.read_text() for path in (tmp_path / model).glob("*.json"))
        AutoTokenizer.from_pretrained(tmp_path / model)
    rows = torch.tensor(ROWS)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "ppo"))
    shared = open_models(read_recipe(run), {"ppo": run / "ppo" / "policy"})
    with torch.no_grad(), shared.role("ppo"):
        trained = shared.causal(rows).logits
        torch.testing.assert_close(plain(rows).logits, trained, atol=1e-5, rtol=0)
    (alone,) = shipped.log_probs
    torch.testing.assert_close(alone, trained[0].log_softmax(-1), atol=1e-5, rtol=0)
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier = PeftModel.from_pretrained(classifier, str(tmp_path / "reward"))
    scores = [classifier(torch.tensor([row])).logits.item() for row in probes["input_ids"]]
    assert scores == pytest.approx(probes["scores"], abs=1e-4)


def test_an_adapter_of_a_quantized_base_is_measured_on_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, quantization="nf4")
    main_cli(["export", str(run), "--format", "adapter", "--base-id", "org/base", "--to", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "quantized base that it was trained on" in printed and "without quantization" in printed
    assert printed.rstrip().endswith("Say to others which quantization it was trained on: export.json does.")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["base"]["quantization"] == "nf4"
    assert record["measured"]["trained_base"]["kl"] < record["measured"]["original"]["kl"] / 5


def test_what_cannot_be_exported_so_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(run), "--to", str(tmp_path / "out")]
    capsys.readouterr()
    assert "set --base-id" in error_of(capsys, [*words, "--format", "adapter"])
    assert "ppo is a policy: take --format merged" in error_of(capsys, [*words, "--format", "reward", "--model", "ppo"])
    assert "reward is a reward model: take --format reward" in error_of(capsys, [*words, "--model", "reward"])
    other = make_run(tmp_path, make_recipe(tmp_path), model=str(save_architecture(tmp_path / "granite", "granite")))
    capsys.readouterr()
    error = error_of(capsys, ["export", str(other), "--to", str(tmp_path / "out"), "--format", "reward"])
    assert "no sequence classifier of the architecture granite" in error
