"""What lives in memory during a PPO update, and when: counted through one whole update, on a full and a 4-bit base."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from support.tiny_models import make_tokenizer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base, Lora
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.ppo.rollout import Rollout
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

VOCABULARY, HIDDEN, LAYERS, KV_HEADS, HEAD_DIM = 4096, 64, 2, 2, 16
ROWS, PROMPT, RESPONSE, MICRO, EPOCHS = 8, 5, 20, 2, 2
AT_ONCE = 4  # rows of logits that may exist at one time
ROLES = {"reference": False, "policy": True, "reward": False, "critic": True}  # name -> whether it is trained
HEADS = ("reward", "critic")
STOP = VOCABULARY  # no token of the model ends a response, so that every one is of full length


@dataclass
class Storage:
    """Memory behind one or several tensors."""

    reference: StorageWeakRef
    elements: int
    logits: bool = False  # a tensor on it has rows as long as the vocabulary
    weight: bool = False  # a tensor on it has the shape of a weight of the base


class Watch(TorchDispatchMode):
    """Knows which floating-point storages made under it are alive, and their peaks in each phase of an update."""

    def __init__(self, model: SharedBase) -> None:
        super().__init__()
        self.known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        linears = [m for name, m in model.named_modules() if name.endswith("base_layer") and isinstance(m, nn.Linear)]
        shapes = [(linear.out_features, linear.in_features) for linear in linears]
        self.weights = {*shapes, *(shape[::-1] for shape in shapes)}
        self.alive: dict[int, Storage] = {}
        self.phase = "other"
        self.largest, self.logits, self.copies, self.peak = Counter(), Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if any([self.note(tensor) for tensor in tensors]):  # else nothing is higher than before
            self.count()
        return result

    def note(self, tensor: Tensor) -> bool:
        """Whether it tells anything new."""
        memory = tensor.untyped_storage()
        if memory.data_ptr() in self.known:
            return False
        reference = StorageWeakRef(memory)  # as long as it is there no other storage has its address
        fresh = Storage(reference, memory.nbytes() // tensor.element_size())
        storage = self.alive.setdefault(reference.cdata, fresh)
        before = storage is not fresh and (storage.logits, storage.weight)
        storage.logits |= tensor.shape[-1:] == (VOCABULARY,)
        storage.weight |= tuple(tensor.shape) in self.weights
        return before != (storage.logits, storage.weight)

    def count(self) -> None:
        self.alive = {key: storage for key, storage in self.alive.items() if not storage.reference.expired()}
        for peak, value in (
            (self.largest, max((storage.elements for storage in self.alive.values()), default=0)),
            (self.logits, self.logits_alive()),
            (self.copies, sum(storage.weight for storage in self.alive.values())),
            (self.peak, self.elements_alive()),
        ):
            peak[self.phase] = max(peak[self.phase], value)

    def logits_alive(self) -> int:
        return sum(storage.elements for storage in self.alive.values() if storage.logits)

    def elements_alive(self) -> int:
        return sum(storage.elements for storage in self.alive.values())


class Watched(PPOTrainer):
    """Notes at the boundaries of an update's phases, and between a forward and its backward, what is alive."""

    watch: Watch
    after: dict[str, int]  # phase -> elements alive at its end beyond those at its start
    between: list[int]  # elements of logits alive after each forward of the policy that has a gradient

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self.watch.phase
        self.watch.count()
        before, self.watch.phase = self.watch.elements_alive(), name if outer == "other" else outer
        with super().phase(name):
            yield
        self.watch.phase = outer
        self.watch.count()
        self.after[name] = self.watch.elements_alive() - before

    def policy_loss(self, rollout: Rollout, rows: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = super().policy_loss(rollout, rows, tokens)
        self.watch.count()
        self.between.append(self.watch.logits_alive())
        return found


@dataclass
class Update:
    """One update and what was seen of it."""

    trainer: Watched
    quantization: str | None
    saved: list[tuple[int, ...]]  # shapes of all tensors that autograd kept for a backward
    tokens: dict[str, list[int]]  # phase -> tokens that went through the first layer, a number for each call
    modes: dict[str, set[tuple[bool, bool]]]  # phase -> (training, gradient_checkpointing) of the layer in those calls
    addresses: dict[str, int]  # name of each parameter -> its address before the update

    @property
    def model(self) -> SharedBase:
        return self.trainer.model

    @property
    def watch(self) -> Watch:
        return self.trainer.watch


@pytest.fixture(scope="module", params=[None, "nf4"], ids=["full", "nf4"])
def update(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Update:
    """One PPO update of responses of full length, with gradient checkpointing, in micro-batches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("structure")
    trainer = build(folder, request.param)
    model, layer = trainer.model, trainer.model.causal.model.layers[0]
    assert model.caching.left_padding  # looked up now, so that its forwards are not counted
    tokens, modes = defaultdict(list), defaultdict(set)

    def on_call(mlp: Any, inputs: tuple[Tensor]) -> None:
        tokens[trainer.watch.phase].append(inputs[0].shape[:-1].numel())
        modes[trainer.watch.phase].add((layer.training, layer.gradient_checkpointing))

    layer.mlp.register_forward_pre_hook(on_call)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_recipes.model.log_probs.LOGITS_AT_ONCE", AT_ONCE * VOCABULARY)
        patch.setattr("rlhf_recipes.model.log_probs.CPU_WEIGHTS", AT_ONCE * VOCABULARY)
        with trainer.watch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.train()
    return Update(trainer, request.param, saved, tokens, modes, addresses)


def build(folder: Path, quantization: Any) -> Watched:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    base = Base(str(folder), quantization=quantization, dtype="bfloat16" if quantization else "float32")
    model = SharedBase(load_base(base), Lora(r=4, alpha=8))
    for role, trainable in ROLES.items():
        model.add_role(role, trainable=trainable, head=role in HEADS)
    nn.init.normal_(model.head_weight("reward"))
    assert model.packs_rows  # found out by forwards of its own, before any is counted
    arguments = PPOConfig(
        str(folder),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ROWS // MICRO,
        rollout_micro_batch_size=MICRO,
        num_ppo_epochs=EPOCHS,
        total_episodes=ROWS,
        response_length=RESPONSE,
        gradient_checkpointing=True,
        bf16=quantization is not None,
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(STOP - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    assert tokenizer.eos_token_id == STOP
    rows = Dataset.from_list([{"prompt_ids": [4 + i + n for i in range(PROMPT)], "prompt": ""} for n in range(ROWS)])
    trainer = Watched(model, arguments, rows, tokenizer)
    trainer.watch, trainer.after, trainer.between = Watch(model), {}, []
    return trainer


# Logits


def test_logits_live_only_in_chunks_and_none_waits_for_a_backward(update: Update) -> None:
    whole = ROWS * RESPONSE * VOCABULARY  # (B, T, V)
    for phase in ("score", "update"):
        assert update.watch.largest[phase] == AT_ONCE * VOCABULARY
        # Beside the logits: scaled, normalized, the entropy's terms, the gradient, in both precisions.
        assert AT_ONCE * VOCABULARY < update.watch.logits[phase] <= 8 * AT_ONCE * VOCABULARY < whole / 4
    assert update.watch.logits["generate"] <= 8 * MICRO * VOCABULARY
    assert update.trainer.between == [0] * (ROWS // MICRO * EPOCHS)


def test_nothing_of_the_vocabularys_size_but_the_head_is_saved_for_a_backward(update: Update) -> None:
    assert update.saved
    assert {shape for shape in update.saved if VOCABULARY in shape} <= {(VOCABULARY, HIDDEN), (HIDDEN, VOCABULARY)}


def test_the_watch_sees_tensors_come_and_go(update: Update) -> None:
    watch = Watch(update.model)
    with watch:
        logits = torch.zeros(3, VOCABULARY)
        view = logits[1]
        assert watch.logits_alive() == watch.elements_alive() == 3 * VOCABULARY
        del logits
        watch.count()
        assert watch.logits_alive() == 3 * VOCABULARY, "the view holds all of it"
        del view
        torch.zeros(1, requires_grad=True).exp().sum().backward()
    watch.count()
    assert watch.logits_alive() == 0 and watch.logits["other"] == 3 * VOCABULARY


# One base


def test_there_is_one_base_and_it_stays_where_it_is(update: Update) -> None:
    assert {name: parameter.data_ptr() for name, parameter in update.model.named_parameters()} == update.addresses
    # A 4-bit weight is dequantized for its product and dropped; a full one is never made again.
    assert all(copies <= 1 for copies in update.watch.copies.values()), update.watch.copies


def test_the_weights_in_memory_are_one_base_and_an_adapter_for_each_role(update: Update) -> None:
    model = update.model
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    half = model.causal.dtype.itemsize
    linears = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 3 * HIDDEN * 128)
    others = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN  # embedding, head, norms
    assert len(quantized) == (7 * LAYERS if update.quantization else 0)
    base = [p for name, p in model.named_parameters() if "lora_" not in name and not name.startswith("heads.")]
    size = linears // 2 if update.quantization else linears * half
    assert sum(p.numel() * p.element_size() for p in base) == size + others * half
    for module in quantized:
        assert module.weight.quant_state.nested and module.weight.quant_state.quant_type == "nf4"
    adapter = 4 * LAYERS * (2 * 2 * HIDDEN + 2 * (HIDDEN + KV_HEADS * HEAD_DIM) + 3 * (HIDDEN + 128))  # r = 4
    for role in ROLES:
        assert sum(p.numel() for p in model.parameters_of(role)) == adapter + (HIDDEN if role in HEADS else 0)
    everything = sum(p.numel() for p in model.parameters())
    assert everything == sum(p.numel() for p in base) + len(ROLES) * adapter + len(HEADS) * HIDDEN


def test_weights_that_are_trained_are_float32_and_frozen_ones_as_the_base(update: Update) -> None:
    model = update.model
    assert model.causal.dtype == (torch.bfloat16 if update.quantization else torch.float32)
    for role, trained in ROLES.items():
        found = {parameter.dtype for name, parameter in model.peft.named_parameters() if f".{role}." in name}
        assert found == {torch.float32 if trained else model.causal.dtype}, role
    assert all(model.head_weight(role).dtype == torch.float32 for role in HEADS)


# What is trained


def test_the_optimizer_holds_the_policy_and_the_critic_and_nothing_else(update: Update) -> None:
    optimizer = getattr(update.trainer.optimizer, "optimizer", update.trainer.optimizer)
    trained = [p for role, wanted in ROLES.items() if wanted for p in update.model.parameters_of(role)]
    assert {id(parameter) for parameter in optimizer.state} == {id(parameter) for parameter in trained}
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert held == 2 * sum(parameter.numel() for parameter in trained)  # Adam's two moments
    assert {id(p) for p in update.model.parameters() if p.requires_grad} == {id(p) for p in trained}


def test_an_update_leaves_the_optimizers_state_and_nothing_else(update: Update) -> None:
    assert all(parameter.grad is None for parameter in update.model.parameters())
    trained = [p for role, wanted in ROLES.items() if wanted for p in update.model.parameters_of(role)]
    assert update.trainer.after["update"] == 2 * sum(p.numel() for p in trained) + len(trained)  # and a count of steps


# Generation


def test_no_cache_is_left_when_generation_is_over(update: Update) -> None:
    cache = 2 * LAYERS * MICRO * KV_HEADS * HEAD_DIM * (PROMPT + RESPONSE - 1)  # keys and values of one batch
    assert update.watch.peak["generate"] > cache
    assert update.trainer.after["generate"] < ROWS * RESPONSE < cache
    assert update.trainer.after["score"] <= 8 * ROWS * RESPONSE  # log-probs, entropies, values


def test_each_token_goes_through_the_model_once_and_in_training_twice(update: Update) -> None:
    row = PROMPT + RESPONSE
    assert sum(update.tokens["generate"]) == ROWS * (row - 1), "there is a cache, and the last token is never read"
    assert sum(update.tokens["score"]) == ROWS * row * 4  # policy, reference, reward, critic
    # policy and critic; forward, and again in the backward
    assert sum(update.tokens["update"]) == ROWS * row * EPOCHS * 2 * 2
    assert max(update.tokens["update"]) == MICRO * row


def test_gradient_checkpointing_is_of_training_alone_and_not_reentrant(update: Update) -> None:
    assert not any(training for training, _ in update.modes["generate"])
    assert update.modes["update"] == {(True, True)}
    layers = update.model.causal.model.layers
    assert all(layer._gradient_checkpointing_func.keywords["use_reentrant"] is False for layer in layers)
