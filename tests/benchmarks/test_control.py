"""The control: that both sides begin with the same numbers, what its table counts, and all of it in a small form."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ROOT
from support.small import small_base
from support.tiny_models import save_model

from rlhf_recipes import Base, Lora, SharedBase
from rlhf_recipes.model.base import load_base

sys.path.insert(0, str(Path(__file__).parent))
control: Any = importlib.import_module("control")
control_trl112: Any = importlib.import_module("control_trl112")

PYTHON = ROOT / ".venv-parity" / "bin" / "python"


def test_the_four_models_say_what_our_roles_say(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    shared = SharedBase(load_base(Base(str(base))), Lora(r=4))
    shared.add_role("sft", trainable=True)
    shared.add_role("reward", trainable=True, head=True)
    shared.biases["reward"] = 0.7
    torch.manual_seed(1)
    for role in ("sft", "reward"):
        for parameter in shared.parameters_of(role):
            torch.nn.init.normal_(parameter, std=0.1)
        shared.save_role(role, tmp_path / role)
    job = {"base": str(base), "sft": str(tmp_path / "sft"), "reward": str(tmp_path / "reward"), "bias": 0.7}
    models = control_trl112.four_models(job)

    ids = torch.randint(4, 64, (2, 9))  # (B, L)
    ones = torch.ones_like(ids)
    with torch.no_grad(), shared.role("sft"):
        log_probs, _ = shared.log_probs(ids, ones, ones[:, 1:].bool())  # (B, L - 1)
    for name in ("model", "ref_model"):
        theirs = models[name](ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        assert torch.allclose(theirs, log_probs, atol=1e-5), name
    with torch.no_grad(), shared.role("reward"):
        values = shared.head_outputs(ids, ones)  # (B, L)
    for name in ("reward_model", "value_model"):
        theirs = models[name].score(models[name].model(ids).last_hidden_state)[..., 0]  # as TRL takes it apart
        assert torch.allclose(theirs, values, atol=1e-5), name

    trained = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    for name, role in (("model", "sft"), ("value_model", "reward")):
        assert sorted(p.shape for p in trained[name]) == sorted(p.shape for p in shared.parameters_of(role)), name
    assert not trained["ref_model"] and not trained["reward_model"]
    weights = [set(map(torch.Tensor.data_ptr, model.parameters())) for model in models.values()]
    assert len(set.union(*weights)) == sum(map(len, weights)), "no two models share a weight"


def test_the_table_counts_all_seeds_together(tmp_path: Path) -> None:
    gold = {  # seed -> model -> of two answers to each of two prompts
        "seed-0": {"sft": [1, 1, 0, 0], "ppo": [2, 2, 1, 1], "trl": [2, 2, 1, 0]},
        "seed-1": {"sft": [1, 1, 0, 0], "ppo": [2, 0, 1, 0], "trl": [2, 2, 1, 1]},
    }
    runs = [tmp_path / name for name in gold]
    for number, folder in enumerate(runs, 1):
        (folder / "evaluation").mkdir(parents=True)
        (folder / "trl").mkdir()
        rows = [
            {"model": model, "id": f"p{i // 2}", "kl": 0.5, "tokens": 4, "scores": {"gold": score, "reward": -1.0}}
            for model, scores in gold[folder.name].items()
            for i, score in enumerate(scores)
        ]
        (folder / "evaluation/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for place, factor in ((folder, 1), (folder / "trl", 2)):
            names = ("seconds", "processor_seconds", "memory_mib", "parameters", "trained")
            (place / "costs.json").write_text(json.dumps(dict.fromkeys(names, 1000 * factor * number)))
    lines = control.table(runs)
    assert "| SFT | 0.50 | -1.00 | 0.50 | 4.00 |  |  |" in lines
    ours = next(line for line in lines if line.startswith("| four adapters on one base (ours) | 1.12 |"))
    assert "| 100.0%, 62.5% | 81.2% (" in ours
    against = next(line for line in lines if line.startswith("| gold |"))
    assert against.startswith("| gold | 62.5%, 25.0% | 43.8% ("), "a tie is half a win"
    assert against.endswith("| +0.25, -0.75 | -0.250 ± 0.500 |"), "differences of 6 / 4 - 5 / 4 and 3 / 4 - 6 / 4"
    assert "| four models (TRL 1.12) | 3,000 | 3,000 |" in "\n".join(lines), "the median of 2,000 and 4,000"


@pytest.mark.long
@pytest.mark.skipif(not PYTHON.is_file(), reason="needs TRL 1.12.0: run `make parity`")
def test_all_of_it_in_a_small_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--small", "--seeds", "0,1", "--model", small_base(), "--out", str(tmp_path)]
    control.main(words)
    printed = capsys.readouterr().out
    assert all(title in printed for title in control.SIDES.values())
    for seed in (0, 1):
        run_dir = tmp_path / f"seed-{seed}"
        log = json.loads((run_dir / "trl/log.json").read_text())
        assert [row["episode"] for row in log] == [128, 256]
        assert abs(log[0]["objective/kl"]) < 1e-5, "the policy begins as the reference"
        ours, theirs = (json.loads((run_dir / name).read_text()) for name in ("costs.json", "trl/costs.json"))
        assert ours["trained"] == theirs["trained"] and ours["parameters"] < theirs["parameters"] / 2
    written = {path: path.stat().st_mtime for path in tmp_path.rglob("*.safetensors")}
    control.main(words)
    assert written == {path: path.stat().st_mtime for path in tmp_path.rglob("*.safetensors")}, "nothing is done again"
