"""What the reward of PPO is made of: its sources, their normalisation and their weighted sum. B rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_callable_name

from ..data.hub import ask_hub
from ..data.tokens import quoted, render, set_today
from ..model.base import device, precision
from ..model.batches import TOKENS_AT_ONCE, Batches
from ..model.processes import all_sum_, on_main, share
from ..model.sampler import Sampler, Samples
from ..recipe.lookup import function, is_function
from ..recipe.values import Base
from ..records.files import Row
from .options import PPOConfig
from .reward_functions import RewardFunc, call_reward_funcs

ROLE = "reward"  # in `reward_funcs`: the shared reward role, or the ensemble of reward, reward_1, reward_2, ...


@dataclass
class Moments:
    """Mean and variance of all numbers added so far (Chan et al. 1983, the parallel form of Welford's)."""

    count: int = 0
    mean: float = 0.0
    square: float = 0.0  # sum of the squared deviations from the mean

    def add(self, values: Tensor) -> None:
        count, mean = self.count + len(values), values.double().mean().item()
        square = ((values.double() - mean) ** 2).sum().item()
        self.square += square + (mean - self.mean) ** 2 * self.count * len(values) / count
        self.mean += (mean - self.mean) * len(values) / count
        self.count = count

    def normalize(self, values: Tensor) -> Tensor:
        return (values - self.mean) / (self.square / self.count + 1e-8) ** 0.5


class Rewards:
    """The score of samples: a weighted sum of sources, each of which is normalised and logged by itself."""

    def __init__(
        self,
        sampler: Sampler,
        config: PPOConfig,
        reward_funcs: Sequence[RewardFunc | str] = (ROLE,),
        state: Callable[[], Any] = lambda: None,
    ) -> None:
        """
        Args:
            reward_funcs: functions of TRL's signature, and "reward" for the shared reward role.
            state: gives the TrainerState, which functions get as `trainer_state`.
        Raises:
            ValueError: two sources of one name, not as many weights as sources, or no reward role where it is one.
        """
        self.sampler, self.config, self.state = sampler, config, state
        names = ["reward_model" if isinstance(f, str) else get_callable_name(f) for f in reward_funcs]
        if len(set(names)) < len(names):
            raise ValueError(f"Two reward functions have one name: {', '.join(names)}.")
        check_reward_weights(config.reward_weights, names)
        self.sources = dict(zip(names, reward_funcs, strict=True))
        self.weights = dict(zip(names, config.reward_weights or [1.0] * len(names), strict=True))
        self.moments = {name: Moments() for name in names}
        self.members = [role for role in sampler.model.heads if role == ROLE or role.startswith(f"{ROLE}_")]
        if ROLE in reward_funcs and not self.members:
            raise ValueError(
                "There is no reward: give the shared base a `reward` role with a head, or set reward_funcs."
            )

    def raw(self, rows: list[Row], samples: Samples) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What each source says (B,), as it says it, and statistics to log."""
        scores, spreads = self._ask(rows, samples)
        logs = {f"rewards/{name}/ensemble_std": spread.mean().item() for name, spread in spreads.items()}
        for name, of_source in scores.items():
            logs[f"rewards/{name}/mean"] = of_source.mean().item()
            logs[f"rewards/{name}/std"] = of_source.std(correction=0).item()
        return scores, logs

    def _ask(self, rows: list[Row], samples: Samples) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What each source says (B,) and, of an ensemble, the standard deviation of its members (B,)."""
        functions = {name: source for name, source in self.sources.items() if not isinstance(source, str)}
        scores, spreads = self.function_scores(functions, rows, samples) if functions else {}, {}
        for name, source in self.sources.items():
            if isinstance(source, str):
                members = torch.stack([self.sampler.reward_scores(samples, role) for role in self.members])  # (M, B)
                scores[name] = aggregate_ensemble(
                    members, self.config.ensemble_aggregation, self.config.uncertainty_coef
                )
                if len(members) > 1:
                    spreads[name] = members.std(0, correction=0)
        return {name: scores[name] for name in self.sources}, spreads

    def plain(self, rows: list[Row], samples: Samples) -> dict[str, Tensor]:
        """What evaluation reports, alike at every step: `score` (B,), the weighted sum of the sources as they are.

        Of an ensemble also `ensemble_std` (B,), how far its members differ.
        """
        scores, spreads = self._ask(rows, samples)
        found = {"score": self._sum(scores)}
        if spreads:
            (found["ensemble_std"],) = spreads.values()  # the shared reward role is one source at most
        return found

    def training_scores(self, raw: dict[str, Tensor], samples: Samples) -> Tensor:
        """The score (B,) to train on, of a rollout's `raw`: normalised, weighted, summed, clipped, less penalties."""
        config, scores = self.config, dict(raw)
        if config.reward_normalization != "none":
            for name, of_source in raw.items():
                if config.reward_normalization == "running" or not self.moments[name].count:
                    self.moments[name].add(of_source)
                scores[name] = self.moments[name].normalize(of_source)
        score = self._sum(scores)
        if config.reward_clip is not None:
            score = score.clamp(-config.reward_clip, config.reward_clip)
        if config.missing_eos_penalty is not None:
            score = score - config.missing_eos_penalty * ~samples.ended
        return score - config.length_penalty * samples.lengths

    def _sum(self, scores: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * of_source for name, of_source in scores.items()]).sum(0)

    def function_scores(
        self, functions: Mapping[str, RewardFunc], rows: list[Row], samples: Samples
    ) -> dict[str, Tensor]:
        """The scores (B,) that reward functions give the samples. See `whole_rollout_rewards`."""
        texts = self.sampler.texts(samples, is_conversational({"prompt": rows[0]["prompt"]}))
        ids, device = samples.responses(), samples.input_ids.device

        def ask(rows: list[Row], ids: list[list[int]], texts: list[str]) -> dict[str, Tensor]:
            folder = Path(str(self.config.output_dir))
            return call_reward_funcs(functions, rows, ids, texts, self.state(), self.config.reward_timeout, folder)

        if self.config.whole_rollout_rewards:
            found = on_main(lambda: ask(rows, ids, texts))
            return {name: scores.to(device) for name, scores in found.items()}
        own, scores = share(len(rows)), {name: torch.zeros(len(rows), device=device) for name in functions}
        if rows[own]:
            for name, of_own in ask(rows[own], ids[own], texts[own]).items():
                scores[name][own] = of_own.to(device)
        all_sum_(list(scores.values()))
        return scores

    def state_dict(self) -> dict[str, Any]:
        """What normalisation has seen, as plain JSON values."""
        return {name: asdict(moments) for name, moments in self.moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = {name: Moments(**moments) for name, moments in state.items()}


def aggregate_ensemble(members: Tensor, how: str, uncertainty_coef: float) -> Tensor:
    """One score (B,) of an ensemble's (M, B): `mean`, `worst_case` or `uncertainty`.

    Coste et al. 2023 (arXiv:2310.02743), equations 2 to 4: the mean, the minimum, and the mean less a multiple of the
    variance within the ensemble.
    """
    if how == "worst_case":
        return members.amin(0)
    penalty = uncertainty_coef * members.var(0, correction=0) if how == "uncertainty" else 0.0
    return members.mean(0) - penalty


def check_reward_weights(weights: Sequence[float] | None, names: Sequence[str]) -> None:
    """Raises ValueError unless there is one weight for each source."""
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"ppo.reward_weights has {len(weights)} weights for {len(names)} rewards: {', '.join(names)}.")


def resolve_rewards(sources: Sequence[RewardFunc | str], today: str | None = None) -> list[RewardFunc | str]:
    """Sources as `Rewards` takes them, from functions and names (see `PPOStage`). Loads external reward models.

    Args:
        today: of external reward models, as in `set_chat_template`.
    """
    return [_resolve(source, today) if isinstance(source, str) and source != ROLE else source for source in sources]


def _resolve(name: str, today: str | None) -> RewardFunc:
    return ExternalRewardModel(name, today=today) if is_external(name) else function(name)


def is_external(name: str) -> bool:
    """Whether a source of `ppo.reward_funcs` is a model with a base of its own."""
    return name != ROLE and not is_function(name)


def reward_tokenizer(name: str) -> Any:
    """The tokenizer of an external reward model, which reads the end of what is too long for it."""
    return AutoTokenizer.from_pretrained(name, padding_side="right", truncation_side="left", trust_remote_code=False)


def check_reward_source(name: str, has_reward_stage: bool) -> None:
    """Raises ValueError, before any weight is loaded, for a source of `ppo.reward_funcs` that there is not."""
    if name == ROLE and not has_reward_stage:
        raise ValueError(f"ppo.reward_funcs has {ROLE!r}, but the recipe has no reward stage.")
    if is_function(name):
        function(name)
    elif name != ROLE:
        try:
            labels = AutoConfig.from_pretrained(ask_hub(name), trust_remote_code=False).num_labels
        except (OSError, ValueError) as error:
            raise ValueError(
                f"ppo.reward_funcs: {name!r} is not {ROLE!r}, no function (module:function or file.py:function) and "
                f"no model that can be loaded: {str(error).splitlines()[0]}"
            ) from error
        if labels != 1:
            raise ValueError(f"ppo.reward_funcs: the model {name!r} has {labels} labels, and a reward model has one.")


def external_base(name: str) -> Base:
    """How an external reward model is loaded: whole, in the precision of its checkpoint, as its configuration says."""
    dtype = AutoConfig.from_pretrained(name, trust_remote_code=False).dtype or torch.float32
    return Base(name, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]


class ExternalRewardModel:
    """A sequence-classification model with its own tokenizer and chat template, as a function of TRL's signature."""

    def __init__(self, name: str, batch_size: int = 8, today: str | None = None) -> None:
        """
        Args:
            name: Hub id or folder of a model with one label.
            today: of its chat template, as in `set_chat_template`.
        """
        self.__name__ = Path(name).name
        self.tokenizer = reward_tokenizer(name)
        set_today(self.tokenizer, today)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name,
            use_safetensors=True,
            dtype=precision(external_base(name)),
            device_map={"": device()},
            trust_remote_code=False,
        ).eval()
        self.model.config.get_text_config().use_cache = False  # nothing is generated
        # Without a padding token the model reads the last position, which is right for a single row only.
        self.batches = Batches(batch_size if self.tokenizer.pad_token is not None else 1, f"rows of {self.__name__}")

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """Its scores of N prompts with their completions, as texts or messages."""
        conversational = is_conversational({"prompt": prompts[0]})
        # Its special tokens are not those of the model that wrote them. In messages they are its template's alone, and
        # in a prompt of text its author's.
        completions = quoted(self.tokenizer, completions)
        prompts = quoted(self.tokenizer, prompts) if conversational else prompts
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if conversational and self.tokenizer.chat_template is None:
            raise ValueError(f"The reward model {self.__name__!r} has no chat template, and the prompts are messages.")
        texts = [render(self.tokenizer, w) if conversational else w for w in whole]
        rows: Any = self.tokenizer(
            texts,
            truncation=self.tokenizer.model_max_length < 10**6,  # a tokenizer without a limit has a huge one
            add_special_tokens=not conversational,  # a template writes its special tokens itself
        )
        scores = torch.zeros(len(texts))

        def work(batch: Tensor) -> None:
            part = {name: [column[row] for row in batch.tolist()] for name, column in rows.items()}
            inputs = self.tokenizer.pad(part, padding=len(batch) > 1, return_tensors="pt").to(self.model.device)
            scores[batch] = self.model(**inputs).logits[:, 0].float().cpu()

        self.batches.run(torch.tensor([len(ids) for ids in rows["input_ids"]]), work, TOKENS_AT_ONCE)
        return scores.tolist()
