"""Every text architecture of transformers against its own classes: what a SharedBase makes of it, and what it refuses.

Each is a tiny random model with two adapters that change what it says: one for the policy, one with a head.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from support.architectures import ARCHITECTURES, save_architecture, save_vision_model, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from rlhf_recipes.model import decode
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.model.check import Caching
from rlhf_recipes.model.decode import RoomyLayer, draw_tokens, roomy_cache
from rlhf_recipes.model.sampler import Sampler
from rlhf_recipes.model.shared import SharedBase, lora_config
from rlhf_recipes.recipe.values import Base, Lora

# One of each kind that differs in a way that matters here; all others run in `make test-long`.
A_DOZEN = {
    "bloom": "positions come from the mask",
    "cohere": "the head's output is multiplied",
    "deepseek_v3": "latent attention, experts",
    "falcon": "linear layers of a class of its own",
    "falcon_h1": "attention and a state space model in one layer",
    "gemma2": "capped logits, sliding windows",
    "granitemoe": "the head's output is divided, experts",
    "jamba": "a state space model, which reads a prompt in one piece only",
    "llama4_text": "the backbone is not where its name says",
    "mamba": "padding at the left changes what it says",
    "mistral": "a sliding window shorter than the rows",
    "opt": "a decoder within the backbone",
    "qwen3_next": "linear attention, experts",
}
PROMPTS = [[5, 9, 17, 33, 41, 6, 11], [8, 30, 12], [20, 7, 50, 13, 29]]
RESPONSES = [[44, 21, 60], [10, 52, 31, 27, 2], [2]]
ROWS = [torch.tensor(prompt + response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
UPSTREAM = torch.tensor([0.7, -1.1, 0.4])  # what a loss hands back to each row
LENGTH = 12  # sampled tokens
STOPS = torch.arange(4, 12)  # so many that rows end early, and at different times


def classifier(base: Base) -> PreTrainedModel:
    try:
        return load_base(base, AutoModelForSequenceClassification, num_labels=1)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        pytest.skip("this version of transformers has no classifier of this architecture")


@dataclass
class Setup:
    """A base on disk, and adapters that PEFT makes and saves: one of the causal model, one of the classifier."""

    architecture: str
    folder: Path

    def __post_init__(self) -> None:
        self.base = Base(str(self.folder / "base"))

    @functools.cached_property
    def sft(self) -> Path:
        return save_adapter(load_base(self.base), self.folder / "sft", TaskType.CAUSAL_LM)

    @functools.cached_property
    def reward(self) -> Path:
        if self.architecture in NO_REWARD:
            pytest.skip("there is no reward model of this architecture")
        return save_adapter(self.classifier_base(), self.folder / "reward", TaskType.SEQ_CLS)

    def classifier_base(self) -> PreTrainedModel:
        return classifier(self.base)

    def causal(self, folder: Path | None = None) -> PeftModel:
        return PeftModel.from_pretrained(load_base(self.base), str(folder or self.sft), is_trainable=True).eval()

    def classifier(self, folder: Path | None = None) -> PeftModel:
        adapter = str(folder or self.reward)  # which skips where there is none
        return PeftModel.from_pretrained(self.classifier_base(), adapter, is_trainable=True).eval()

    def shared(self) -> SharedBase:
        return SharedBase(load_base(self.base), Lora(r=4, alpha=8)).eval()


# What is refused, when, and what the message says of it.
NOT_LOADED = {
    "dory": "its KV cache cannot be used here",
    "minimax": "MiniMax uses cache of its own",
    "openai-gpt": "takes no KV cache",
    "rwkv": "takes no KV cache",
}
NOT_ADAPTED = {"laguna": "PEFT cannot load adapters of this architecture back"}
# Not decoded in static steps: caches of other kinds, caps and sinks in attention, attention that is not transformers'.
EAGER = """
    axk2 bamba biogpt bloom deepseek_v32 deepseek_v4 doge dots3_note_text falcon falcon_h1 falcon_mamba flint gemma2
    glm_moe_dsa gpt_neo gpt_neox_japanese gpt_oss granite_swa granitemoe_swa granitemoehybrid hy_v4 inkling_text
    jamba kimi_linear lara_mini lfm2_moe lfm3 longcat_flash mamba mamba2 mimo_v2_flash mistral mpt nemotron_h
    olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma stablelm vaultgemma zaya
"""
NO_REWARD = {
    "ctrl": "its files lack 1 weights of a CTRLForSequenceClassification",
    "longcat_flash": "PEFT would take its .* for the head",
    "modernbert-decoder": "its files lack 3 weights of a ModernBertDecoderForSequenceClassification",
}
CASES = [
    pytest.param(architecture, marks=() if architecture in A_DOZEN else pytest.mark.long)
    for architecture in ARCHITECTURES
    if architecture not in NOT_LOADED | NOT_ADAPTED
]


@pytest.fixture(scope="module", params=CASES)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp(request.param)
    save_architecture(folder / "base", request.param)
    return Setup(request.param, folder)


def save_adapter(model: PreTrainedModel, folder: Path, task: TaskType) -> Path:
    """A PEFT folder whose adapter (and score head) is random and large enough to change what the base says."""
    torch.manual_seed(1)
    peft = get_peft_model(model, lora_config(Lora(r=4, alpha=8), task, model))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or (parameter.requires_grad and "score" in name):
            nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(str(folder))
    return folder


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and attention_mask (3, 7 + 5): prompts padded left, responses right; response_mask (3, 5)."""
    ids, kept = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(PROMPTS, ROWS, strict=True)):
        columns = slice(7 - len(prompt), 7 - len(prompt) + len(row))
        ids[i, columns], kept[i, columns] = row, True
    return ids, kept, kept[:, 7:]


def expected_log_probs(model: nn.Module) -> list[Tensor]:
    """The log-probs of each row's response from a model's own logits, row by row without padding."""
    logits = [model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1) for row in ROWS]
    return [
        each.gather(1, row[1:, None])[-len(response) :, 0]
        for each, row, response in zip(logits, ROWS, RESPONSES, strict=True)
    ]


def gradients(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Gradients of an adapter's weights by the layer's path inside the model."""
    prefixes = ("causal.", "base_model.model.")
    return {
        functools.reduce(str.removeprefix, prefixes, name).replace(f".{adapter}.", "."): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name and f".{adapter}." in name and parameter.grad is not None
    }


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * scale, msg=lambda m, name=name: name + m)


def test_log_probs_and_their_gradients_are_the_models_own(each: Setup) -> None:
    own, shared = each.causal(), each.shared()
    expected = expected_log_probs(own)
    bare = expected_log_probs(load_base(each.base))
    assert (torch.cat(expected) - torch.cat(bare)).abs().max() > 0.01, "the adapter changes what the base says"
    sum(up * row.sum() for up, row in zip(UPSTREAM, expected, strict=True)).backward()

    ids, kept, mask = batch()
    shared.add_role("policy", each.sft, trainable=True)
    with shared.eval().role("policy"):
        log_probs, _ = shared.log_probs(ids, kept, mask)  # (3, 5)
        (UPSTREAM[:, None] * log_probs).sum().backward()
    torch.testing.assert_close(log_probs[mask], torch.cat(expected), rtol=0, atol=2e-5)
    assert_equal_gradients(gradients(shared, "policy"), gradients(own, "default"))


def test_scores_and_their_gradients_are_the_classifiers_own(each: Setup) -> None:
    own, shared = each.classifier(), each.shared()
    expected = torch.cat([own(input_ids=row[None]).logits[:, 0] for row in ROWS])
    (UPSTREAM * expected).sum().backward()

    shared.add_role("critic", each.reward, trainable=True, head=True)
    with shared.eval().role("critic"):
        scores = shared.scores(*batch()[:2])
        (UPSTREAM * scores).sum().backward()
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5 * (1 + expected.abs().max().item()))
    assert_equal_gradients(gradients(shared, "critic"), gradients(own, "default"))


def test_samples_are_those_of_full_forwards_row_by_row(each: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TOKENS_AT_ONCE", 6)  # prompts go through the model in pieces of two tokens
    shared, prompts = each.shared(), PROMPTS * 2
    shared.add_role("policy", each.sft)
    uniforms = torch.rand(len(prompts), LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(shared, load_tokenizer(each.base), LENGTH, 1.0, 3, STOPS.tolist())
    samples = sampler.sample("policy", prompts, uniforms)

    own = each.causal()
    for prompt, response, uniform in zip(prompts, samples.responses(), uniforms, strict=True):
        for t, token in enumerate(response):
            with torch.no_grad():
                logits = own(input_ids=torch.tensor([prompt + response[:t]])).logits[:, -1]
            assert token == draw_tokens(logits, uniform[t : t + 1]).item(), t
        assert len(response) == LENGTH or response[-1] in [2, *STOPS]
    assert len(set(samples.lengths.tolist())) > 1, "rows end at different times"

    sampler._static = True  # the steps that a GPU replays
    assert sampler.sample("policy", prompts, uniforms).responses() == samples.responses()
    assert (sampler.decoding == "static steps") == (each.architecture not in EAGER.split())


def test_saved_roles_load_into_the_models_own_classes(each: Setup, tmp_path: Path) -> None:
    shared = each.shared()
    shared.add_role("policy", each.sft)
    shared.add_role("critic", each.reward, head=True)
    for role in ("policy", "critic"):
        shared.save_role(role, tmp_path / role)
    with torch.no_grad():
        again = expected_log_probs(each.causal(tmp_path / "policy"))
        assert all(map(torch.equal, again, expected_log_probs(each.causal())))
        scores = [
            model(input_ids=ROWS[0][None]).logits for model in (each.classifier(tmp_path / "critic"), each.classifier())
        ]
    assert torch.equal(*scores)


def test_only_the_text_model_of_a_vision_language_model_is_adapted(tmp_path: Path) -> None:
    base = Base(str(save_vision_model(tmp_path / "base")))
    for model, task in ((load_base(base), TaskType.CAUSAL_LM), (classifier(base), TaskType.SEQ_CLS)):
        adapted = {
            name
            for name, _ in get_peft_model(model, lora_config(Lora(), task, model)).named_modules()
            if ".lora_A." in name
        }
        assert adapted
        assert all(".language_model." in name for name in adapted)


@pytest.mark.parametrize("packed", [False, True])
def test_padded_rows_are_scored_without_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """With a mask PyTorch's attention gives up its causal kernel, and copies keys and values for each query group."""
    shared = SharedBase(load_base(Base(str(save_architecture(tmp_path, "llama"))))).eval()
    assert shared.packs_rows
    shared.packs_rows = packed
    attention, masks, tokens = nn.functional.scaled_dot_product_attention, [], []

    def watched(*args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any) -> Tensor:
        masks.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    shared.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ids, kept, mask = batch()
    with torch.no_grad(), shared.role("base"):
        log_probs, _ = shared.log_probs(ids, kept, mask)
        assert masks == [(None, True)] * 2 * (3 if packed else 1)  # two layers, and a call for each packed row
        assert tokens == [(1, 24) if packed else (3, 10)]
        for row, response, found in zip(ROWS, RESPONSES, log_probs, strict=True):
            no_padding, _ = shared.log_probs(row[None], torch.ones_like(row)[None], torch.ones(1, len(response)).bool())
            torch.testing.assert_close(found[: len(response)], no_padding[0], rtol=0, atol=1e-6)


def test_a_sliding_window_that_holds_prompt_and_response_is_written_in_place(tmp_path: Path) -> None:
    config = tiny_config("mistral", sliding_window=20)
    assert {type(layer) for layer in roomy_cache(config, 20).layers} == {RoomyLayer}
    assert {type(layer) for layer in roomy_cache(config, 21).layers} == {DynamicSlidingWindowLayer}


def test_what_the_cache_can_do_is_found_in_training_mode_too(tmp_path: Path) -> None:
    """There gradient checkpointing would switch the cache off."""
    shared = SharedBase(load_base(Base(str(save_architecture(tmp_path, "llama")))))
    shared.add_role("policy", trainable=True)
    shared.activation_checkpointing_enable()
    assert shared.train().caching == Caching(left_padding=True, pieces=True) and shared.training


@pytest.mark.parametrize(
    ("architecture", "settings", "packs"),
    [
        ("llama", {}, True),
        ("opt", {}, True),  # its positions are learned
        ("mistral", {"sliding_window": None}, True),
        ("mistral", {"sliding_window": 100}, False),  # longer than the probe
        ("bloom", {}, False),  # its positions come from the mask
        ("mamba", {}, False),  # its state would go on into the next row
        ("falcon_h1", {}, False),
    ],
)
def test_rows_are_packed_where_no_row_sees_another(
    tmp_path: Path, architecture: str, settings: dict[str, Any], packs: bool
) -> None:
    base = Base(str(save_architecture(tmp_path, architecture, **settings)))
    assert SharedBase(load_base(base)).packs_rows == packs
    if architecture == "llama":  # right there by a mask of all tokens, which is slow
        assert not SharedBase(load_base(replace(base, attn_implementation="eager"))).packs_rows


EVERY_TIME = ("ctrl", "laguna", "rwkv")  # one of each table


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(architecture, marks=() if architecture in EVERY_TIME else pytest.mark.long)
        for architecture in ARCHITECTURES
        if architecture in NOT_LOADED | NOT_ADAPTED | NO_REWARD
    ],
)
def test_what_cannot_be_right_is_refused(architecture: str, tmp_path: Path) -> None:
    message = (NOT_LOADED | NOT_ADAPTED | NO_REWARD)[architecture]
    save_architecture(tmp_path / "base", architecture)
    setup = Setup(architecture, tmp_path)
    with pytest.raises(ValueError, match=message):
        setup.classifier_base() if architecture in NO_REWARD else setup.shared().add_role("policy", setup.sft)
