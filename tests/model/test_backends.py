"""Backends of generation: each samples from the role's own distribution, and leaves the model as it was."""

import importlib.metadata
import importlib.util
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from support.paths import ROOT
from support.tiny_models import make_tokenizer, save_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.generation import CompileConfig

from rlhf_recipes import load, replace
from rlhf_recipes.model.backends import (
    QUANTIZER_SINCE,
    VLLM_QUANTIZER,
    VLLM_VERSIONS,
    Generate,
    Static,
    check_backend,
    make_backend,
)
from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.sampler import Backend, Sampler
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.recipe.values import Base, Lora

HERE = ("native", "generate", "static", "continuous")  # those that run on a CPU
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15]]
EOS = 2
STOPS = [*range(4, 16)]
TEMPERATURE = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> SharedBase:
    """The roles `policy`, which is trained, and `other`, with adapters so strong that they and the base differ."""
    model = SharedBase(load_base(Base(str(folder), dtype="float32")), Lora(r=4, alpha=8)).to("cpu")
    add_adapters(model)
    return model


def add_adapters(model: SharedBase) -> None:
    for seed, role in enumerate(("policy", "other")):
        model.add_role(role, trainable=role == "policy")
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters_of(role):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def sampler(model: SharedBase, **changes: Any) -> Sampler:
    settings = {"response_length": 6, "temperature": TEMPERATURE, "batch_size": 64, "stop_token_ids": STOPS} | changes
    return Sampler(model, make_tokenizer(), autocast=nullcontext, **settings)


@torch.no_grad()
def next_token_probabilities(model: SharedBase, role: str, ids: list[list[int]], temperature: float) -> Tensor:
    """The softmax (B, V) of a role after rows of equal length, from a plain forward of the model."""
    with model.role(role):
        logits = model.causal(input_ids=torch.tensor(ids, device=model.device)).logits[:, -1]
    return (logits.double().cpu() / temperature).softmax(-1)


def check_distribution(model: SharedBase, backend: Backend, role: str, rows: int) -> None:
    """First and second tokens have the frequencies of the role's softmax, by Pearson's chi-square."""
    torch.manual_seed(0)
    responses = [response.tolist() for response in backend(role, [PROMPTS[0]] * rows)]
    for place in range(2):
        going_on = [row for row in responses if EOS not in row[:place]]
        counts = torch.bincount(torch.tensor([row[place] for row in going_on]), minlength=64)
        starts = [PROMPTS[0] + row[:place] for row in going_on]
        expected = next_token_probabilities(model, role, starts, TEMPERATURE).sum(0)
        common = expected >= 10
        counts, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
        statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1
        # The mean is at most `freedom` and the variance twice that: 4 standard deviations, with a fixed seed.
        assert freedom >= 10 and statistic < freedom + 4 * (2 * freedom) ** 0.5


def check_stops(sample: Sampler) -> list[list[int]]:
    """Responses go up to the first stop token or, of those without any, to 6 tokens; there are some of either kind."""
    torch.manual_seed(0)
    samples = sample.sample("policy", PROMPTS * 5)
    stops = {*STOPS, EOS}
    for tokens, ended in zip(samples.responses(), samples.ended, strict=True):
        assert not stops & set(tokens[:-1])
        assert len(tokens) <= 6 if ended else len(tokens) == 6
        assert ended == (tokens[-1] in stops)
    assert len(samples.ended.unique()) == 2 and 6 > samples.lengths.min() > 0
    return samples.responses()


def check_rows(model: SharedBase, backend: Backend) -> None:
    """Each prompt gets its own response, whatever shares a batch with it: without noise, the likeliest tokens."""
    for role in ("policy", "base"):
        wanted = []
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(6):
                ids.append(int(next_token_probabilities(model, role, [ids], 1.0).argmax()))
            wanted.append(ids[len(prompt) :])
        assert [response.tolist() for response in backend(role, PROMPTS)] == wanted


@pytest.mark.parametrize("name", HERE)
def test_a_backend_samples_from_the_softmax_of_the_role(model: SharedBase, name: str) -> None:
    backend = make_backend(name, sampler(model, response_length=2, stop_token_ids=[], batch_size=100))
    for role in ("policy", "other", "base"):
        check_distribution(model, backend, role, 1500)


@pytest.mark.parametrize("wrong", [{}, {"temperature": 1.0}, {"top_k": 20}, {"top_p": 0.95}])
def test_the_check_finds_a_wrong_role_and_a_warped_distribution(model: SharedBase, wrong: dict[str, Any]) -> None:
    backend = Generate(sampler(model, response_length=2, stop_token_ids=[]))
    backend.config.update(**wrong)
    with pytest.raises(AssertionError):
        check_distribution(model, lambda role, prompts: backend(role if wrong else "other", prompts), "policy", 1500)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_each_prompt_gets_its_own_response(model: SharedBase, name: str, batch_size: int) -> None:
    check_rows(model, make_backend(name, sampler(model, temperature=1e-5, stop_token_ids=[], batch_size=batch_size)))


@pytest.mark.parametrize("name", HERE)
def test_responses_end_at_stop_tokens_and_at_their_length(model: SharedBase, name: str) -> None:
    sample = sampler(model, batch_size=7)
    sample.backend = make_backend(name, sample)
    assert check_stops(sample) == check_stops(sample)


@pytest.mark.parametrize("name", HERE)
def test_a_seed_repeats_the_responses_and_what_is_drawn_after_them(model: SharedBase, name: str) -> None:
    backend = make_backend(name, sampler(model))

    def draws(seed: int | None) -> list[list[float]]:
        if seed is not None:
            torch.manual_seed(seed)
        return [response.tolist() for response in backend("policy", PROMPTS)] + [torch.rand(3).tolist()]

    first = draws(1)
    assert draws(None) != first
    assert draws(1) == first


@pytest.mark.parametrize("name", HERE)
def test_a_backend_leaves_the_model_as_it_was(model: SharedBase, name: str) -> None:
    def state() -> tuple[Any, ...]:
        modes = [module.training for module in model.modules()]
        trained = [parameter.requires_grad for parameter in model.parameters()]
        adapters = [layer.active_adapters for layer in model._tuner_layers]
        return model.active, modes, trained, adapters, model.causal.config._attn_implementation, torch.is_grad_enabled()

    model.train()
    with model.role("other"):
        before = state()
        make_backend(name, sampler(model))("policy", PROMPTS)
        assert state() == before
    assert before[0] == "other" and all(before[1]) and True in before[2]


def test_out_of_memory_halves_the_batch_of_transformers_backends(model: SharedBase) -> None:
    class Small(Static):
        def batch(self, prompts: list[list[int]]) -> Tensor:
            if len(prompts) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
            return super().batch(prompts)

    sample = sampler(model, temperature=1e-5, stop_token_ids=[], batch_size=4, auto=True)
    check_rows(model, Small(sample))
    assert sample.batch_size == 1


@pytest.mark.long
def test_static_compiles_one_step_for_each_role(model: SharedBase) -> None:
    # On a CPU only where it is told to, here without generating code; on CUDA transformers does so by itself.
    compiled = CompileConfig(backend="eager", mode=None)  # pyright: ignore[reportArgumentType]
    compiled._compile_all_devices = True
    backend = Static(sampler(model, temperature=1e-5, stop_token_ids=[], batch_size=3))
    backend.config.compile_config = compiled
    counters.clear()
    for _ in range(2):
        check_rows(model, backend)  # policy and base, each in two batches, of which one is not full
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert backend.cache is None


# vLLM


def install(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let these versions of packages seem to be installed; their names have `_` for `-`."""

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"))
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("found", [None, "0.25.1", "0.33.0"])
def test_without_vllm_the_message_says_what_to_install(
    model: SharedBase, monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    install(monkeypatch, vllm=found)
    message = re.escape(f"needs vLLM {VLLM_VERSIONS}") + ".*" + re.escape("pip install 'rlhf_recipes[vllm]'")
    with pytest.raises(ValueError, match=message):
        check_backend("vllm", None, torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        make_backend("vllm", sampler(model))
    check_backend("native", "int8", torch.float32)


def test_a_recipe_that_wants_vllm_is_refused_where_there_is_none() -> None:
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ValueError, match=r"ppo\.generation_backend=vllm needs vLLM"):
            check_recipe(replace(load("tiny"), ppo={"generation_backend": "vllm"}, tracker="none"))


@pytest.mark.parametrize(
    ("cuda", "quantization", "dtype", "message"),
    [
        (False, None, torch.bfloat16, "needs a CUDA device"),
        (True, "int8", torch.bfloat16, "set base.quantization to nf4"),
        (True, None, torch.float32, "set base.dtype=bfloat16"),
    ],
)
def test_what_vllm_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, quantization: str | None, dtype: torch.dtype, message: str
) -> None:
    install(monkeypatch, vllm="0.27.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    with pytest.raises(ValueError, match=message):
        check_backend("vllm", quantization, dtype)


@pytest.mark.parametrize(
    ("vllm", "plugin", "message"),
    [
        ("0.26.0", None, None),
        ("0.27.1", None, None),
        ("0.27.1", "0.0.3", "0.27.1 does not run beside vllm-bnb-plugin: pip uninstall vllm-bnb-plugin"),
        ("0.28.0", None, "0.28.0 quantizes .* only beside vllm-bnb-plugin: pip install vllm-bnb-plugin"),
        ("0.28.0", "0.0.3", None),
        ("0.32.0", "0.0.3", None),
    ],
)
def test_from_0_28_on_vllm_quantizes_by_a_plugin(
    monkeypatch: pytest.MonkeyPatch, vllm: str, plugin: str | None, message: str | None
) -> None:
    install(monkeypatch, vllm=vllm, vllm_bnb_plugin=plugin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_backend("vllm", None, torch.bfloat16)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_backend("vllm", "nf4", torch.bfloat16)


def test_the_extra_installs_what_the_check_accepts() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    vllm, plugin = map(Requirement, extras["vllm"])
    assert (vllm.name, plugin.name) == ("vllm", VLLM_QUANTIZER)
    accepted = SpecifierSet(VLLM_VERSIONS)
    for version in ("0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.32.0", "0.33.0"):
        assert (version in vllm.specifier) == (version in accepted and Version(version) >= Version(QUANTIZER_SINCE))


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install -e '.[vllm]'")
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_vllm_samples_as_the_model_does(tmp_path: Path, quantization: Literal["nf4"] | None) -> None:
    save_model(tmp_path, head_dim=64)  # vLLM's attention wants larger heads than the other tests have
    model = SharedBase(load_base(Base(str(tmp_path), dtype="bfloat16", quantization=quantization)), Lora(r=4, alpha=8))
    add_adapters(model)
    sample = sampler(model, response_length=2, stop_token_ids=[])
    backend = make_backend("vllm", sample, gpu_memory_utilization=0.1, enable_sleep_mode=True, max_model_length=128)
    for role in ("policy", "other", "base"):
        check_distribution(model, backend, role, 2000)
    model.copy_role("other", "policy")  # the adapter that is trained now, not the one that was handed over before
    check_distribution(model, backend, "policy", 2000)
    sample.backend, sample.response_length, sample.stop_token_ids = backend, 6, sorted({*STOPS, EOS})
    assert check_stops(sample) == check_stops(sample)
