"""Merged exports: what plain transformers says of them in a process without this package, and what is refused."""

import json
from math import isnan, log
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.command_line import error_of, failed
from support.shipped import in_a_fresh_process, make_run, save_lettered
from support.small import small_base
from support.worded import make_recipe
from transformers import AutoTokenizer, GenerationConfig

from rlhf_recipes import replace
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.model.base import fingerprint, load_base, load_tokenizer
from rlhf_recipes.model.open import open_models
from rlhf_recipes.model.sampler import autocast_of
from rlhf_recipes.records.folder import read_recipe
from rlhf_recipes.ship import folder as shipped_folder
from rlhf_recipes.ship import measure
from rlhf_recipes.ship.merge import merged_layers
from rlhf_recipes.ship.trained import find_trained

ROWS = [[4, 5, 6, 7, 8], [9, 4, 30]]
# A name, what its base is, and how far a token's log-probability may be from the adapter on that base, on average.
QUANTIZED = {
    "float32": ({}, 1e-5),
    "nf4": ({"quantization": "nf4"}, 0.02),
    "int8": ({"quantization": "int8"}, 0.02),
}
ARCHITECTURES = ("gemma", "gpt2", "mistral", "qwen2")


def make(folder: Path, name: str) -> Path:
    """The run of a name, on the tiny world's base or on an architecture's."""
    recipe = make_recipe(folder)
    if name in ARCHITECTURES:
        return make_run(folder, recipe, model=str(save_lettered(folder / name, name)))
    return make_run(folder, recipe, model=small_base(), **QUANTIZED[name][0])


def trained_log_probs(run: Path) -> list[torch.Tensor]:
    """What the adapter on its own base says of the rows: (L, V) each."""
    shared = open_models(read_recipe(run), {"ppo": run / "ppo" / "policy"})
    with torch.no_grad(), shared.role("ppo"), autocast_of(shared):
        logits = [shared.causal(torch.tensor([row])).logits[0] for row in ROWS]
    return [row.float().log_softmax(-1) for row in logits]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A run of each kind, and its export."""
    made = {}
    for name in (*QUANTIZED, *ARCHITECTURES):
        folder = tmp_path_factory.mktemp(name)
        run = make(folder, name)
        main_cli(["export", str(run), "--to", str(folder / "export"), "--shard-size", "100KB"])
        made[name] = run, folder / "export"
    return made


def test_it_says_what_was_trained_where_this_package_is_not(exports: dict[str, tuple[Path, Path]]) -> None:
    answers = in_a_fresh_process({folder: ROWS for _, folder in exports.values()})
    for name, (run, folder) in exports.items():
        trained = trained_log_probs(run)
        largest = QUANTIZED.get(name, ({}, 1e-5))[1]
        differences = torch.cat([(a - b).abs().flatten() for a, b in zip(answers[folder], trained, strict=True)])
        assert differences.mean() < largest, name
        if largest == 1e-5:
            assert differences.max() < largest, name
        measured = json.loads((folder / "export.json").read_text())["measured"]
        assert measured["mean_difference"] < largest and measured["kl"] < 1e-3 < measured["trained_kl"], name


def test_the_folder_is_what_other_tools_want(exports: dict[str, tuple[Path, Path]]) -> None:
    run, folder = exports["nf4"]
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(read_recipe(run).base)
    assert tokenizer.chat_template == ours.chat_template and tokenizer.get_vocab() == ours.get_vocab()
    sampling = GenerationConfig.from_pretrained(folder)
    assert sampling.do_sample and (sampling.top_k, sampling.top_p, sampling.temperature) == (0, 1.0, 0.7)
    assert config["eos_token_id"] == sampling.eos_token_id == tokenizer.eos_token_id
    assert config["pad_token_id"] == tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) > 1 and index["weight_map"] == {key: name for name, shard in shards.items() for key in shard}
    weights = [tensor for shard in shards.values() for tensor in shard.values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights)
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}
    # Nothing in it leads back to this machine.
    texts = [path.read_text() for path in folder.glob("*.json")]
    assert not any(str(run.parent) in text or small_base() in text for text in texts)


@pytest.mark.parametrize("stop", [7, 2])
def test_every_token_that_ends_a_response_is_in_both_configurations(tmp_path: Path, stop: int) -> None:
    run = make_run(tmp_path, replace(make_recipe(tmp_path), rounds=None, ppo={"stop_token_id": stop}))
    main_cli(["export", str(run), "--to", str(tmp_path / "out")])
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == ([2, 7] if stop == 7 else 2)


def test_a_sum_is_rounded_once(tmp_path: Path) -> None:
    run = make(tmp_path, "nf4")
    shared = open_models(read_recipe(run), {})
    shared.add_role("ppo", run / "ppo" / "policy", exact=True)
    merged: dict[str, torch.Tensor] = {}
    for part in merged_layers(shared.causal, "ppo", torch.float32):
        merged |= part
    layers = {name: layer for name, layer in shared.causal.named_modules() if isinstance(layer, LoraLayer)}
    assert layers
    for name, layer in layers.items():
        columns = torch.eye(layer.in_features, dtype=torch.bfloat16)
        base = layer.get_base_layer()(columns).T  # a product with one is the weight itself
        product = 2.0 * layer.lora_B["ppo"].weight.float() @ layer.lora_A["ppo"].weight.float()  # alpha / r is 2
        torch.testing.assert_close(merged[f"{name}.weight"], base.float() + product, atol=1e-6, rtol=1e-6)


def test_what_is_too_far_is_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to = make(tmp_path, "nf4"), tmp_path / "out"
    monkeypatch.setattr("rlhf_recipes.ship.measure.LARGEST_KL", 1e-9)
    words = ["export", str(run), "--to", str(to), "--onto", "original"]
    error = failed(capsys, words)
    for part in ("nats a token away", "--onto dequantized", "nf4", "float32", "--force"):
        assert part in error
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []
    main_cli([*words, "--force"])
    assert "nats a token" in capsys.readouterr().out and (to / "config.json").is_file()


class Uneven:
    """A model of two tokens, the second three times as likely as the first; or one that has broken."""

    device = torch.device("cpu")

    def __init__(self, first: float = 0.25) -> None:
        self.probabilities = torch.tensor([first, 0.75])

    def eval(self) -> None: ...

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = self.probabilities.log().expand(1, input_ids.shape[1], 2)
        return type("Output", (), {"logits": logits})


def test_what_is_measured_by_hand() -> None:
    even = torch.full((2, 2), 0.5).log()
    reference = measure.Reference([[1]], [[0, 0]], [even], trained_kl=1.0)
    found = measure.compare(reference, Uneven())
    assert found["mean_difference"] == pytest.approx(log(2)) == found["largest_difference"]
    assert found["kl"] == pytest.approx(0.5 * log(2) + 0.5 * log(2 / 3))
    assert found["same_greedy"] == 0 and found["tokens"] == 2, "the first of equals is the likeliest"
    assert isnan(measure.compare(reference, Uneven(float("nan")))["kl"])


def test_what_cannot_be_exported_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to = make_run(tmp_path), tmp_path / "out"
    capsys.readouterr()
    words = ["export", str(run), "--to", str(to)]
    assert "is the bare base" in error_of(capsys, [*words, "--model", "base"])
    assert "Did you mean ppo?" in error_of(capsys, [*words, "--model", "ppp"])
    assert "--base-id is of --format adapter" in error_of(capsys, [*words, "--base-id", "org/name"])
    assert "--shard-size must be a size like 5GB" in error_of(capsys, [*words, "--shard-size", "many"])
    usage: Any = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patched:
        patched.setattr(shipped_folder.shutil, "disk_usage", lambda path: usage)
        assert "0.0 GB free, and 0.0 GB are to be written" in error_of(capsys, words)
    to.mkdir()
    assert "is there already" in error_of(capsys, words)


def test_what_a_killed_export_left_is_taken_away(tmp_path: Path) -> None:
    left = tmp_path / ".out-unfinished" / "here" / "out"
    left.mkdir(parents=True)
    (left / "model.safetensors").touch()
    with shipped_folder.new_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []
        with pytest.raises(ValueError, match="is in use by process"), shipped_folder.new_folder(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stopped_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    before = sorted(tmp_path.iterdir())

    def stop(*_: Any) -> None:
        assert (tmp_path / ".out-unfinished" / "here" / "out" / "model.safetensors").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_recipes.ship.merged.compare", stop)
    with pytest.raises(SystemExit):
        main_cli(["export", str(run), "--to", str(tmp_path / "out")])
    assert sorted(tmp_path.iterdir()) == before


def test_code_that_a_base_names_and_nobody_needs_is_not_shipped(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    base = Path(read_recipe(run).base.model)
    for name in ("config.json", "tokenizer_config.json"):
        written = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(written | {"auto_map": {"AutoConfig": "code.Theirs"}}))
    (run / "ppo" / "policy" / "base.json").write_text(
        json.dumps(fingerprint(read_recipe(run).base, load_tokenizer(read_recipe(run).base)))
    )
    trained = find_trained(run, "ppo")
    model = load_base(trained.base)
    assert model.config.auto_map and trained.tokenizer.init_kwargs["auto_map"], "they come along"
    trained.save_tokenizer(tmp_path)
    shipped_folder.write_config(model, tmp_path, torch.float32)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / name).read_text())
