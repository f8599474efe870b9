"""Decoding in static steps: the eager loop's tokens, at fixed addresses, and nothing that makes the host wait."""

import logging
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import save_architecture
from support.ppo import EOS, PROMPTS, sampler, shared_base
from support.tiny_models import make_tokenizer, save_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlhf_recipes.model import graph
from rlhf_recipes.model.attention import STATIC, attends_by, static_attention, static_mask
from rlhf_recipes.model.backends import make_backend
from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.check import static_refusal
from rlhf_recipes.model.graph import (
    NoLook,
    Schedule,
    StaticDecoder,
    bucket,
    layers_refusal,
    room,
    static_bytes,
)
from rlhf_recipes.model.sampler import Sampler
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base

LENGTH = 20
SHAPES = ((4, 8, 1, 64), (2, 4, 128, 2, 64))  # queries (B, Hq, 1, D); keys and values (2, B, C, Hkv, D)
UNIFORMS = torch.rand(len(PROMPTS), LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder: Path) -> SharedBase:
    return shared_base(folder, policy_seed=2)


def responses(sample: Sampler, static: bool | None, role: str = "policy") -> list[list[int]]:
    sample._static = static
    return sample.sample(role, PROMPTS, UNIFORMS).responses()


def decoder(model: SharedBase, rows: int = 4) -> StaticDecoder:
    """With the first prompts in its slots."""
    made = StaticDecoder(model, rows, 32, LENGTH, 1.0, torch.tensor([EOS], device=model.device))
    made.enter(list(range(rows)), PROMPTS[:rows], UNIFORMS[:rows].to(model.device))
    return made


# --- The eager loop's tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_static_steps_draw_the_tokens_of_the_eager_loop(
    model: SharedBase, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "TOKENS_AT_ONCE", 6)  # prompts enter in parts
    sample = sampler(model, rows, response_length=LENGTH)
    for role in ("policy", "reference", "base"):
        expected = responses(sample, False, role)
        assert responses(sample, True, role) == expected
        assert sample.decoding == "static steps"
    lengths = {len(response) for response in expected}
    assert len(lengths) > 3, "rows end at different times"


def test_a_response_of_full_length_and_one_of_one_token(model: SharedBase) -> None:
    sample = sampler(model, 3, response_length=LENGTH, stop_token_ids=[])
    assert {len(response) for response in responses(sample, True)} >= {LENGTH}
    assert responses(sample, True) == responses(sample, False)
    short = sampler(model, 3, response_length=1)
    short._static = True
    assert {len(response) for response in short.generate("policy", PROMPTS)} == {1}


def test_on_a_quantized_base(folder: Path) -> None:
    model = shared_base(folder, policy_seed=2, quantization="nf4", dtype="float32")
    sample = sampler(model, 5, response_length=LENGTH)
    expected = responses(sample, False)
    assert responses(sample, True) == expected
    assert sample.decoding.startswith("static steps")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_the_adapter_is_copied_and_states_are_the_eager_ones_to_rounding(folder: Path, dtype: str) -> None:
    model = shared_base(folder, policy_seed=2, dtype=dtype).eval()
    with model.role("policy"), torch.autocast(model.device.type, getattr(torch, dtype)):
        assert static_refusal(model) is None
        assert {weight.dtype for _, *pair in decoder(model).adapters.weights for weight in pair} == {
            getattr(torch, dtype)
        }


def test_memory_that_runs_out_halves_the_rows_and_keeps_what_is_done(model: SharedBase) -> None:
    sizes, entered, start = [], [], model.generate_static

    def small(prompts: list[list[int]], *args: Any) -> None:
        *rest, rows, keep = args
        sizes.append(rows)
        entered.append(len(prompts))
        if rows > 3:  # after some have finished
            start(prompts[:2], rest[0][:2], *rest[1:], rows, keep)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        start(prompts, *rest, rows, keep)

    sample = sampler(model, 12, response_length=LENGTH, auto=True)
    expected = responses(sample, False)
    model.generate_static = small  # type: ignore[method-assign]
    assert responses(sample, True) == expected
    assert sizes == [12, 6, 3] and entered == [12, 10, 8] and sample.batch_size == 3


# --- Which way, and why -----------------------------------------------------------------------------------------------


def test_which_way_it_goes_is_logged_once_with_the_reason(model: SharedBase, caplog: pytest.LogCaptureFixture) -> None:
    sample = sampler(model)
    with caplog.at_level(logging.INFO, "rlhf_recipes.model.sampler"):
        for name in ("native", "native", "eager"):
            sample.backend = make_backend(name, sample)
            sample.sample("policy", PROMPTS)
    assert [record.message for record in caplog.records] == [
        "Responses are sampled by the eager loop (no CUDA device).",
        "Responses are sampled by the eager loop (ppo.generation_backend=eager).",
    ]


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("gemma2", "its attention has softcap"),
        ("gpt_neo", "its attention is not transformers' AttentionInterface"),
        ("longcat_flash", "_local_scalar_dense.default makes the host wait"),
        ("mamba", "has a LinearAttentionLayer"),
        ("mistral", "has a DynamicSlidingWindowLayer"),
    ],
)
def test_what_cannot_be_captured_takes_the_eager_loop(architecture: str, reason: str, tmp_path: Path) -> None:
    model = SharedBase(load_base(Base(str(save_architecture(tmp_path, architecture))))).eval()
    sample = Sampler(model, make_tokenizer(), 4, 1.0, 3, [])
    sample._static = True
    assert len(sample.generate("base", PROMPTS[:4])) == 4
    assert sample.decoding.startswith("the eager loop (") and reason in sample.decoding


def test_a_sliding_window_does_that_holds_the_rows(tmp_path: Path) -> None:
    save_architecture(tmp_path, "mistral", sliding_window=64)
    model = SharedBase(load_base(Base(str(tmp_path)))).eval()
    assert layers_refusal(model.causal.config, 64) is None and model.static_refusal is None
    assert layers_refusal(model.causal.config, 65) == "its KV cache for 65 tokens has a DynamicSlidingWindowLayer"


def test_a_step_that_computes_something_else_is_found(model: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    one_key_more = lambda lengths, *args: static_mask(lengths + 1, *args)  # noqa: E731
    monkeypatch.setattr(graph, "static_mask", one_key_more)
    with model.eval().role("policy"):
        assert "from the eager ones" in str(static_refusal(model))


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: x.to("meta"),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_what_waits_for_a_value_is_refused(look: Any) -> None:
    with NoLook(), pytest.raises(NotImplementedError, match="makes the host wait"):
        look(torch.ones(3))


# --- Fixed addresses --------------------------------------------------------------------------------------------------


class Outside(TorchDispatchMode):
    """Collects the addresses of what operations read and none of them has made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}  # kept alive, so that no address is used again
        self.addresses: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_iter((args, kwargs)):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self.made:
                self.addresses.append(each.data_ptr())
        made = [each for each in tree_iter(result) if isinstance(each, Tensor)]
        outside = {*self.addresses}
        self.made |= {x.untyped_storage().data_ptr(): x for x in made if x.untyped_storage().data_ptr() not in outside}
        return result


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_step_reads_the_same_addresses_again_after_an_update_of_the_policy(
    folder: Path, quantization: str | None
) -> None:
    model = shared_base(folder, quantization=quantization, dtype="float32").eval()
    seen, steps = [], decoder_in(model)
    for update in (False, False, True):
        if update:
            optimizer = torch.optim.AdamW(model.parameters_of("policy"), lr=0.1)
            for parameter in model.parameters_of("policy"):
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            before = [b.clone() for _, _, b in steps.adapters.weights]
            steps.adapters.refresh("policy")
            assert not any(map(torch.equal, before, [b for _, _, b in steps.adapters.weights]))
        with model.role("policy"), torch.no_grad(), steps.stepping(), Outside() as outside:
            steps.step(4)
        seen.append(outside.addresses)
    assert len(seen[0]) > 50 and seen[0] == seen[1] == seen[2]


def decoder_in(model: SharedBase) -> StaticDecoder:
    with model.role("policy"), torch.no_grad():
        made = decoder(model)
        with made.stepping():
            made.step(4)  # the cache takes its room
    return made


def test_copies_follow_the_role(folder: Path) -> None:
    model = shared_base(folder, policy_seed=2).eval()
    steps = decoder_in(model)
    layer, a, b = steps.adapters.weights[0]
    for role in ("reference", "policy"):
        steps.adapters.refresh(role)
        assert torch.equal(a, layer.lora_A[role].weight)
        torch.testing.assert_close(b, 2 * layer.lora_B[role].weight)  # alpha / r is 2
    steps.adapters.refresh("base")
    assert not b.any()


# --- Attention --------------------------------------------------------------------------------------------------------


def test_attention_sees_the_first_keys_of_each_row_and_copies_none() -> None:
    torch.manual_seed(0)
    query, room = torch.randn(3, 4, 1, 8), torch.randn(2, 3, 10, 2, 8)  # B = 3, Hq = 4, Hkv = 2, C = 10, D = 8
    key, value = room.transpose(2, 3)
    lengths = torch.tensor([1, 10, 4], dtype=torch.int32)
    output, _ = static_attention(nn.Module(), query, key, value, static_mask(lengths, 10, torch.float32), scaling=0.5)
    assert output.shape == (3, 1, 4, 8)
    for row, length in enumerate(lengths.tolist()):
        for head in range(4):
            keys, values = (states[row, head // 2, :length] for states in (key, value))
            expected = (0.5 * keys @ query[row, head, 0]).softmax(0) @ values
            torch.testing.assert_close(output[row, 0, head], expected)


def test_what_flash_attention_is_told() -> None:
    mask = static_mask(torch.tensor([5, 2, 9], dtype=torch.int32), 16, None)
    assert mask.shape == (3, 1, 1, 4) and mask.dtype == torch.int32
    assert mask[:, 0, 0].tolist() == [[0, 1, 2, 3], [0, 16, 32, 48], [5, 2, 9, 0]]
    query, room = (torch.randn(*shape, dtype=torch.bfloat16, device="meta") for shape in SHAPES)
    mask = static_mask(torch.ones(4, dtype=torch.int32, device="meta"), 128, None)
    assert static_attention(nn.Module(), query, *room.transpose(2, 3), mask)[0].shape == (4, 1, 8, 64)


def test_the_configuration_names_our_attention_within_a_step_alone(model: SharedBase) -> None:
    config = model.backbone.config
    before = config._attn_implementation
    with pytest.raises(RuntimeError), attends_by(STATIC, model.backbone):
        assert config._attn_implementation == STATIC
        raise RuntimeError
    assert config._attn_implementation == before != STATIC


# --- Who is in which slot ---------------------------------------------------------------------------------------------


def test_buckets_and_room() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 64)] == [1, 2, 4, 8, 8, 16, 16, 32, 64]
    assert [room(*lengths) for lengths in ((1, 1), (32, 32), (33, 32))] == [64, 64, 128]


def test_free_slots_wait_until_there_are_enough_and_then_close_up() -> None:
    schedule = Schedule(deque(range(20)), [None] * 16)
    assert schedule.fill() == {slot: slot for slot in range(16)}
    schedule.slots[3] = schedule.slots[5] = schedule.slots[7] = None
    assert schedule.fill() == {} and schedule.close_up() == {}  # 3 free, 4 waiting
    schedule.slots[9] = None
    assert schedule.fill() == {3: 16, 5: 17, 7: 18, 9: 19}
    for slot in (0, 1, 2, 4, 6, 8):
        schedule.slots[slot] = None
    assert schedule.close_up() == {} and schedule.rows == 16  # 10 rows want a step of 16
    schedule.slots[10] = schedule.slots[11] = None
    assert schedule.close_up() == {9: 0, 12: 1, 13: 2, 14: 4, 15: 6} and schedule.rows == 8
    assert schedule.slots[:8] == [19, 12, 13, 16, 14, 17, 15, 18]


def test_bytes_of_the_cache_and_the_buffers(model: SharedBase) -> None:
    with model.role("policy"):
        made = StaticDecoder(model, 4, room(9, LENGTH), LENGTH, 1.0, torch.tensor([EOS]))
        made.enter([0], [PROMPTS[4]], UNIFORMS[:1])
    states = [states for layer in made.cache.layers for states in layer.room]
    planned = static_bytes(4, 9, LENGTH, token_bytes=2 * 2 * 2 * 16 * 4, vocabulary=64)  # 2 layers of 2 heads of 16
    assert planned["cache"] == sum(each.nbytes for each in states)
    assert planned["buffers"] == sum(each.nbytes for each in made.row_tensors)


# --- On a card --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_captured_step_draws_the_eager_loops_tokens(tmp_path: Path, quantization: str | None) -> None:
    save_model(tmp_path)
    model = shared_base(tmp_path, policy_seed=2, dtype="float32", quantization=quantization)
    sample = sampler(model, 5, response_length=LENGTH)
    for role in ("policy", "reference"):
        assert responses(sample, None, role) == responses(sample, False, role)
    assert responses(sample, None) == responses(sample, True)
    assert sample.decoding == "static steps, captured"
    model.copy_role("reference", "policy")  # an update: the graphs of a rollout are of its own weights
    assert responses(sample, None) == responses(sample, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_attention_over_a_cache_is_attention_over_its_first_keys(dtype: str) -> None:
    torch.manual_seed(0)
    query, room = (torch.randn(*shape, dtype=getattr(torch, dtype), device="cuda") for shape in SHAPES)
    key, value = room.transpose(2, 3)
    lengths = torch.tensor([1, 128, 40, 77], dtype=torch.int32, device="cuda")
    masks = [static_mask(lengths, 128, mask_dtype) for mask_dtype in (None, query.dtype)]
    flash, plain = (static_attention(nn.Module(), query, key, value, mask, scaling=0.1)[0] for mask in masks)
    torch.testing.assert_close(flash, plain, rtol=0.02, atol=0.01)


@pytest.mark.gpu
def test_a_rollout_in_bfloat16_is_captured_and_gives_its_memory_back(tmp_path: Path) -> None:
    save_model(tmp_path)
    model = shared_base(tmp_path, policy_seed=2, dtype="bfloat16")
    sample = sampler(model, 4, response_length=LENGTH, autocast=lambda: torch.autocast("cuda", torch.bfloat16))
    responses(sample, None)  # what libraries take for good
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    responses(sample, None)
    assert sample.decoding == "static steps, captured"
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.gpu
def test_one_graph_for_each_number_of_rows_in_one_pool(tmp_path: Path) -> None:
    save_model(tmp_path)
    model = shared_base(tmp_path, dtype="bfloat16").eval()
    with model.role("policy"), torch.no_grad():
        steps = StaticDecoder(model, 4, 64, LENGTH, 1.0, torch.tensor([EOS], device="cuda"))
        steps.enter(list(range(4)), PROMPTS[:4], UNIFORMS[:4].cuda())
        for rows in (4, 2, 4):
            steps.run(rows, 3)
    assert list(steps.graphs) == [4, 2] and len({graph.pool() for graph in steps.graphs.values()}) == 1
    steps.close()
