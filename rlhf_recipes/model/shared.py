"""SharedBase: every role an adapter on the one base, some with a scalar head.

B rows, P prompt tokens (left-padded), T response tokens (right-padded), L any tokens, H hidden size, V vocabulary.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import disable_dropout_in_model

from ..recipe.values import Lora
from ..records.contents import Fingerprint
from ..records.files import WRITE_AGAIN, read_json
from .adapters import WEIGHTS, read_adapter_config, read_adapter_weights
from .architecture import excluded_modules, head_logits, text_decoder, token_states
from .base import check_fingerprint, enable_checkpointing, write_fingerprint
from .check import Caching, caching, packs_rows, static_refusal
from .decode import decode
from .graph import decode_static
from .log_probs import token_log_probs
from .static_adapters import sibling_layers

BIAS = "score_bias.json"  # beside a reward adapter: what is added to its score (see `reward`)
HEAD = "base_model.model.score.weight"  # where PEFT keeps the head of a SEQ_CLS adapter


def lora_config(lora: Lora, task_type: TaskType, model: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration of a role's adapter on a model.

    SEQ_CLS trains and saves the score head as well, CAUSAL_LM has none. Raises ValueError as `check_targets` does.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):  # else its first adapter was checked
        check_targets(lora.target_modules, model)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=excluded_modules(model, all_linear=targets == "all-linear"),
        task_type=task_type,
    )


def check_targets(targets: str | Sequence[str], model: PreTrainedModel) -> None:
    """Raises ValueError, naming `lora.target_modules`, for what names no layer, or the head, or what takes no adapter.

    Args:
        targets: all-linear, a pattern of whole names, or ends of names, of which PEFT passes over those that fit none.
    """
    if targets == "all-linear":
        return
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    layers = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and module is not head}
    ends = {name.rpartition(".")[2] for name in layers}
    some = f"The base has {', '.join(sorted(ends))}; a text is a pattern of whole names, as '.*{min(ends)}'."
    if not targets:
        raise ValueError(f"lora.target_modules names nothing. {some}")
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            pattern = re.compile(target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}")
        except re.error as error:
            raise ValueError(f"lora.target_modules={target!r} is no pattern: {error}. {some}") from error
        named = [name for name in modules if pattern.fullmatch(name)]
        if not named:
            raise ValueError(f"lora.target_modules: the base has no module {target!r}. {some}")
        for name in named:
            if modules[name] is head:
                raise ValueError(
                    "lora.target_modules must leave the language-model head out: it would get no gradient."
                )
            if name not in layers and not isinstance(modules[name], nn.Embedding):
                raise ValueError(f"lora.target_modules: {name}, which {target!r} names, is no linear layer. {some}")


def lora_forward(layer: Any, x: Tensor) -> Tensor:
    """What PEFT's LoRA layers compute for one plain adapter without dropout, with fewer passes over the output.

    PEFT scales the adapter's product, adds it, and in 4 bits copies the result, in a pass each. In float32 the scale
    and the sum go into the last product, in bfloat16 they are one pass that rounds as PEFT's do.

    Args:
        layer: PEFT's wrapper of a linear layer.
        x: (..., in).
    Returns:
        (..., out), of the active adapter or, where there is none, of the base alone.
    """
    name = layer._active_adapter[0] if layer._active_adapter else None
    rows = x.flatten(0, -2)  # (n, in)
    result = layer.base_layer(rows)  # (n, out)
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # (r, in), (out, r)
        low = nn.functional.linear(rows if torch.is_autocast_enabled(x.device.type) else rows.to(a.dtype), a)
        if result.dtype == low.dtype == torch.float32:
            result.addmm_(low, b.T, alpha=layer.scaling[name])
        else:
            product = nn.functional.linear(low, b)
            result = torch.add(result, product, alpha=layer.scaling[name]).to(result.dtype)
    return result.unflatten(0, x.shape[:-1])


def set_adapter(model: PeftModel, state: dict[str, Tensor], adapter: str = "default") -> None:
    """Give an adapter its weights, by the names that PEFT saves them by.

    Raises ValueError where PEFT finds no place for some, which it would pass over in silence.
    """
    lost = set_peft_model_state_dict(model, state, adapter_name=adapter).unexpected_keys
    if lost:
        raise ValueError(f"PEFT cannot load adapters of this architecture back: it has no place for {lost[0]}.")


def read_bias(folder: Path) -> float | None:
    """What is added to the score of a reward adapter; None where it has no bias. Raises ValueError of a damaged one."""
    found = read_json(folder / BIAS)
    bias = 0.0 if found is None else found.get("bias")
    if type(bias) not in (int, float) or not abs(bias) < 1e30:
        raise ValueError(f"{folder / BIAS}: {str(bias)[:100]} is no bias. {WRITE_AGAIN}")
    return None if found is None else bias


class SharedBase(nn.Module):
    """Several roles on one copy of a causal language model.

    Each role is a LoRA adapter, some with a scalar head on the last hidden state. Exactly one role is active at a time:

        with shared.role("critic"):
            values = shared.head_outputs(input_ids, attention_mask)

    A backward must run inside the `with` of its forward: gradient checkpointing runs the forward again, and takes the
    adapter that is active then.
    """

    def __init__(
        self, model: PreTrainedModel, lora: Lora | None = None, fingerprint: Fingerprint | None = None
    ) -> None:
        """
        Args:
            model: the base, as `load_base` returns it. It is wrapped, not copied.
            lora: shape of the adapters that `add_role` makes anew.
            fingerprint: the base's fingerprint, against which loaded adapters are checked and which saved ones carry.
        """
        super().__init__()
        self.lora = lora or Lora()
        self.fingerprint = fingerprint
        self.causal: Any = model
        # No setting of the model's own (top-k, repetition penalty, minimum length) may warp the sampled distribution.
        model.generation_config = GenerationConfig()
        self.peft: PeftModel | None = None
        self.heads = nn.ModuleDict()
        self.biases: dict[str, float] = {}  # role -> constant added to its head's output
        self._borrowed: dict[str, str] = {}  # role without an adapter of its own -> role whose features its head reads
        self._active = "base"
        self.checkpointed: int | None = None  # decoder layers, the first ones, that checkpointing is of; None: all
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self._tuner_layers: list[BaseTunerLayer] = []

    @property
    def device(self) -> torch.device:
        """Where the base is; of one that is split, where ids go and what it says of them comes from."""
        return self.causal.get_input_embeddings().weight.device

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """Of a base that is split, where each part lies: by it a Trainer knows that it has nothing to move."""
        return self.causal.hf_device_map

    def add_role(
        self,
        name: str,
        folder: Path | None = None,
        trainable: bool = False,
        head: bool = False,
        exact: bool = False,
    ) -> None:
        """Attach a role, with the adapter (and head) saved in `folder`, or a fresh one that changes nothing yet.

        A fresh adapter has B = 0 and a fresh head is zero. Adapters are held in float32 where they are `trainable` or
        `exact`, else in the base's dtype, to which autocast would bring them anyway. Heads are always float32.

        Raises ValueError if `folder` is of another base, or lacks the head, or if the language-model head is adapted,
        or the name has a dot, which torch has none of in the names of modules.
        """
        if "." in name:
            raise ValueError(f"No model can be called {name!r}, with a dot: name its folder without one.")
        if folder is not None and self.fingerprint is not None:
            check_fingerprint(folder, self.fingerprint)
        config = (
            lora_config(self.lora, TaskType.CAUSAL_LM, self.causal) if folder is None else read_adapter_config(folder)
        )
        # The task only matters to PEFT's own wrappers; here every role runs through the one causal model.
        config.task_type, config.modules_to_save = TaskType.CAUSAL_LM, None
        if self.peft is None:
            self.peft = get_peft_model(self.causal, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        if head:
            self.add_head(name)
            if folder is not None and (bias := read_bias(folder)) is not None:
                self.biases[name] = bias
        if folder is not None:
            self.load_role(name, folder)
        disable_dropout_in_model(self)
        for module in self.modules():
            for key, value in vars(module).items():
                if key.endswith("dropout") and isinstance(value, float):  # a rate that is passed to a function
                    setattr(module, key, 0.0)
        self._tuner_layers = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        self.__dict__.pop("siblings", None)  # the new adapter may be on other layers
        for layer in self._tuner_layers:
            if isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
                layer.forward = functools.partial(lora_forward, layer)
        if isinstance(self.causal.get_output_embeddings(), BaseTunerLayer):
            raise ValueError("lora.target_modules must leave the language-model head out: PPO gives it no gradient.")
        for parameter in self.parameters_of(name):
            parameter.requires_grad_(trainable)
            # A step of 1e-5 on a LoRA weight is below bfloat16's resolution; what is frozen takes no steps.
            parameter.data = parameter.data.to(torch.float32 if trainable or exact else self.causal.dtype)
        self.heads.float()

    def remove_role(self, name: str) -> None:
        """Take a role off the base again, with its head."""
        assert self.peft is not None and name != self._active
        self.peft.delete_adapter(name)
        self.biases.pop(name, None)
        if name in self.heads:
            del self.heads[name]

    def add_head(self, name: str, on: str | None = None) -> None:
        """Give a role a trainable scalar head that is zero at first.

        Args:
            on: make `name` a role of this head alone, on the adapter of that role, which the head does not train.
        """
        if on is not None:
            self._borrowed[name] = on
        self.heads[name] = nn.Linear(self.causal.config.get_text_config().hidden_size, 1, bias=False)
        self.heads.to(self.device)
        nn.init.zeros_(self.head_weight(name))

    @torch.no_grad()
    def copy_role(self, source: str, target: str, weight: float = 1.0) -> None:
        """Move a role's adapter a share `weight` of the way to another's: 1 copies it."""
        for ours, theirs in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
            ours.lerp_(theirs, weight)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The adapter weights of a role, and its head."""
        adapter = [p for key, p in self.named_parameters() if f".{name}." in key and "lora_" in key]
        return adapter + (list(self.heads[name].parameters()) if name in self.heads else [])

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Make one role active. `base` is the bare base, with no adapter.

        It sets each layer's active adapter and nothing else. PEFT's `set_adapter` would also make the role trainable
        and freeze the others, and takes 60 times as long.
        """
        # PEFT's layers pass over an adapter that they do not have, and would compute the bare base.
        adapter = self._borrowed.get(name, name)
        assert name == "base" or (self.peft and adapter in self.peft.peft_config), f"there is no role {name!r}"
        before = self._active, [layer._active_adapter for layer in self._tuner_layers]
        try:
            self._active = name
            for layer in self._tuner_layers:
                layer._active_adapter = [] if name == "base" else [adapter]
            yield
        finally:
            self._active = before[0]
            for layer, adapters in zip(self._tuner_layers, before[1], strict=True):
                layer._active_adapter = adapters

    @property
    def active(self) -> str:
        """Name of the active role."""
        return self._active

    @property
    def backbone(self) -> PreTrainedModel:
        """The base's text decoder, with the adapters in it and without the language-model head."""
        return text_decoder(self.causal)

    @functools.cached_property
    def caching(self) -> Caching:
        """What the base's KV cache can do."""
        with self._evaluating():
            return caching(self.causal)

    @functools.cached_property
    def siblings(self) -> list[list[Any]]:
        """The layers with adapters, those together that are given the same input. See `sibling_layers`."""
        with self._evaluating():
            return sibling_layers(self)

    @functools.cached_property
    def static_refusal(self) -> str | None:
        """Why `generate_static` would be wrong or fail, found out with the active role; None where it is right."""
        with self._evaluating():
            return static_refusal(self)

    @functools.cached_property
    def packs_rows(self) -> bool:
        """Whether rows go through the base packed, without padding."""
        with self._evaluating():
            return packs_rows(self.causal)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The active role's final hidden states (N, H), normalized as the language-model head takes them.

        They are those of the tokens that the mask (B, L) keeps, row by row.
        """
        return token_states(self.backbone, input_ids, attention_mask, self.packs_rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Language-model head: hidden states (n, H) to logits (n, V), as the model's own forward would."""
        return head_logits(self.causal, hidden)

    def log_probs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the response tokens under the active role, and the entropies there if they are wanted.

        Args:
            input_ids, attention_mask: (B, P + T), left-padded prompts followed by right-padded responses.
            response_mask: (B, T).
            temperature: divides the logits.
        Returns:
            log-probabilities and entropies, (B, T) float32, zero outside the mask. Entropies carry no gradient.
        """
        length = response_mask.shape[1]
        place = (attention_mask.flatten().cumsum(0) - 1).view(attention_mask.shape)  # (B, L): of each token's state
        before = place[:, -length - 1 : -1][response_mask]  # (n,): of the state before each response token
        labels = input_ids[:, -length:][response_mask]  # (n,)
        hidden = self.states(input_ids, attention_mask)[before]  # (n, H)
        log_probs, entropy = token_log_probs(hidden, labels, self.logits, self.vocabulary, temperature, with_entropy)
        empty = log_probs.new_zeros(response_mask.shape)
        return empty.masked_scatter(response_mask, log_probs), (
            None if entropy is None else empty.masked_scatter(response_mask, entropy)
        )

    def head_outputs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The active role's head, and its bias, at every token: (B, L) float32, zero where there is padding.

        The product is written out so that autocast leaves it in float32.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.active not in self._borrowed):
            hidden = self.states(input_ids, attention_mask)  # (N, H)
        outputs = (hidden.float() * self.head_weight(self.active)).sum(-1) + self.biases.get(self.active, 0.0)
        return outputs.new_zeros(attention_mask.shape).masked_scatter(attention_mask.bool(), outputs)

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The active role's head (B,) at the last token of each row, whatever side the padding is on."""
        last = attention_mask.shape[1] - 1 - attention_mask.int().flip(1).argmax(1)  # (B,)
        return self.head_outputs(input_ids, attention_mask).gather(1, last[:, None])[:, 0]

    def head_weight(self, name: str) -> Tensor:
        """The weight (1, H) of a role's scalar head."""
        head = self.heads[name]
        assert isinstance(head, nn.Linear)
        return head.weight

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        uniforms: Tensor,
        temperature: float,
        stop_token_ids: Tensor,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Sample from the active role: left-padded prompts (B, P) to responses (B, T). See `decode.decode`."""
        with self._evaluating():
            return decode(self, input_ids, attention_mask, uniforms, temperature, stop_token_ids, watch=watch)

    def generate_static(self, *args: Any) -> None:
        """Sample from the active role in steps that a CUDA graph replays. See `graph.decode_static`."""
        with self._evaluating():
            decode_static(self, *args)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode: gradient checkpointing would switch the KV cache off in training mode."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """What transformers' Trainer calls for `gradient_checkpointing=True`. Non-reentrant unless it is told so.

        Only the first `checkpointed` layers run their forward again: what the others have saved is gone by then.
        """
        if self.checkpointed == 0:
            return
        options = activation_checkpointing_kwargs or {"use_reentrant": False}
        enable_checkpointing(self.causal, options, **kwargs)
        if options.get("use_reentrant"):
            # The embeddings are frozen, and reentrant checkpointing passes gradients only where an input wants one.
            self.causal.enable_input_require_grads()
        for number, layer in enumerate(self.checkpointable):
            layer.gradient_checkpointing = self.checkpointed is None or number < self.checkpointed

    @property
    def checkpointable(self) -> list[GradientCheckpointingLayer]:
        """The decoder layers, in their order."""
        return [layer for layer in self.backbone.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The same for the older versions of transformers that know it by this name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def role_state(self, name: str) -> dict[str, Tensor]:
        """The role's weights under the names PEFT saves them by, with the head under `HEAD`."""
        assert self.peft is not None
        adapter = self._borrowed.get(name, name)
        state = get_peft_model_state_dict(self.peft, adapter_name=adapter, save_embedding_layers=False)
        return {**state, HEAD: self.head_weight(name)} if name in self.heads else state

    def save_role(self, name: str, folder: Path) -> None:
        """Write the role as a standard PEFT folder: a SEQ_CLS adapter if it has a head, a CAUSAL_LM one otherwise.

        A role that borrows its adapter is written with it. A bias has no place in that format and stands beside it.
        """
        assert self.peft is not None
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.peft.peft_config[self._borrowed.get(name, name)])
        config.inference_mode = True
        if name in self.heads:
            config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["classifier", "score"]
        state = {key: value.detach().cpu().contiguous() for key, value in self.role_state(name).items()}
        safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))  # after the weights, as PEFT does: by it a whole adapter is known
        if name in self.biases:
            (folder / BIAS).write_text(json.dumps({"bias": self.biases[name]}) + "\n")
        if self.fingerprint is not None:
            write_fingerprint(folder, self.fingerprint)

    def load_role(self, name: str, folder: Path) -> None:
        """Read a role's weights from a PEFT folder. Raises ValueError where they do not fit the role."""
        assert self.peft is not None
        state: dict[str, Any] = read_adapter_weights(folder)
        score = state.pop(HEAD, None)
        saved = {key: value.shape for key, value in state.items()}
        wanted = {key: value.shape for key, value in self.role_state(name).items() if key != HEAD}
        odd = sorted({key for key, _ in saved.items() ^ wanted.items()})[:3]
        if odd:
            raise ValueError(
                f"The adapter in {folder} does not fit the role {name!r}: {', '.join(odd)} are in only one of the two, "
                "or of another shape."
            )
        if name in self.heads and score is None:
            raise ValueError(f"The adapter in {folder} has no score head: it is not a reward model.")
        set_adapter(self.peft, state, self._borrowed.get(name, name))
        if name in self.heads:
            assert score is not None
            with torch.no_grad():
                self.head_weight(name).copy_(score)
