"""The configurations of the stages' trainers: TRL's and transformers', with the options that are ours.

Each help text ends with its source in brackets. `rlhf-recipes options` prints them all. What of TRL's and transformers'
arguments a recipe may not set stands in `recipe.arguments`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import trl
from transformers import TrainingArguments

from ..data.prepare import LossOn
from ..recipe.overrides import check_type
from ..recipe.ranges import check_ranges

# Metrics of PPO's evaluations of which less is better. Where `metric_for_best_model` names one of them, the best policy
# is that of its lowest value, and for every other metric that of the highest.
LESS_IS_BETTER = ("kl", "ensemble_std", "perplexity", "response_length", "without_eos")


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


def _check_options(stage: str, config: Any) -> None:
    """Raises ValueError, naming the option, for one of ours of a wrong type and for any that is out of its range.

    It goes before transformers' own checks, which do not know the stage.
    """
    hints = get_type_hints(type(config))
    for name in type(config).__annotations__:
        check_type(f"{stage}.{name}", getattr(config, name), hints[name])
    check_ranges(stage, vars(config))


def _max_length(default: int | None) -> Any:
    meaning = "A row with more tokens, prompt and response together, is a bad row, or cut: see truncation_mode."
    return _option(default, f"{meaning} [TRL cuts]")


def _truncation_mode() -> Any:
    return _option(
        "drop",
        "What becomes of a row with more than max_length tokens. drop: it is a bad row. keep_start: it is cut there, "
        "and has no stop token then; where its prompt alone is as long it is a bad row. [keep_start: TRL]",
    )


def _on_nonfinite() -> Any:
    return _option(
        "stop",
        "What becomes of a step whose loss or gradient is not finite; it changes nothing. stop: the stage ends there, "
        "and can be gone on with. skip: it is left out, up to 10 in a row. In float16 the scaler of the loss decides.",
    )


def _gradient_accumulation_steps() -> Any:
    return _option(
        1,
        "An optimizer step takes so many times per_device_train_batch_size rows. auto: it takes "
        "per_device_train_batch_size rows, of which as many as fit go at once. [transformers]",
    )


class _OfRows:
    """What the stages share whose optimizer steps take rows of data. No dataclass: TRL's own defaults are to stay."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: Any

    def __post_init__(self) -> None:
        self.auto_sizes = {"gradient_accumulation_steps"} if self.gradient_accumulation_steps == "auto" else set()
        if self.auto_sizes:
            self.gradient_accumulation_steps = 1  # unless a plan says more
        super().__post_init__()  # type: ignore[misc]

    @property
    def chosen_sizes(self) -> dict[str, int]:
        """What the sizes that are `auto` have become."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps") if self.auto_sizes else ()
        return {name: getattr(self, name) for name in names}


@dataclass
class SFTConfig(_OfRows, trl.SFTConfig):
    """Arguments of `SFTTrainer`, beside TRL's and transformers' own."""

    on_nonfinite: Literal["stop", "skip"] = _on_nonfinite()
    gradient_accumulation_steps: int | Literal["auto"] = _gradient_accumulation_steps()  # type: ignore[assignment]
    max_length: int | None = _max_length(1024)
    truncation_mode: Literal["drop", "keep_start"] = _truncation_mode()  # type: ignore[assignment]
    completion_only_loss: bool | None = _option(
        None,
        "The loss is that of the completion alone, of `messages` the last answer. false: of the prompt too. "
        "[TRL; its None is false for `messages`]",
    )
    assistant_only_loss: bool = _option(
        False,
        "The loss is that of all messages of the assistant, those in the prompt too unless completion_only_loss=true. "
        "[TRL]",
    )
    packing: bool = _option(
        False,
        "Put several examples into each row of max_length tokens, without padding. They do not attend to each other, "
        "so the loss stays the same, but a step of as many rows has more examples. [TRL's bfd]",
    )
    eval_packing: bool | None = False  # the held-out loss must not depend on how rows are packed

    def __post_init__(self) -> None:
        _check_options("sft", self)
        super().__post_init__()

    @property
    def loss_on(self) -> LossOn:
        """The tokens that have a loss."""
        if self.assistant_only_loss and not self.completion_only_loss:
            return "answers"
        return "all" if self.completion_only_loss is False else "completion"


@dataclass
class RewardConfig(_OfRows, trl.RewardConfig):
    """Arguments of `RewardTrainer`, beside TRL's and transformers' own."""

    on_nonfinite: Literal["stop", "skip"] = _on_nonfinite()
    gradient_accumulation_steps: int | Literal["auto"] = _gradient_accumulation_steps()  # type: ignore[assignment]
    max_length: int | None = _option(
        1024,
        "A row of which a response has more tokens, together with the prompt, is a bad row: the score is read at the "
        "end of the response. [TRL]",
    )
    label_smoothing: float = _option(
        0.0, "Share of the comparisons taken to be labelled the wrong way round. [conservative loss: arXiv:2401.06080]"
    )
    ensemble_size: int = _option(
        1, "Train so many reward adapters, each with its own head, seed and order of rows. [arXiv:2310.02743]"
    )
    judge_share: float = _option(
        0.0,
        "Train one more reward adapter, the judge, on this share of the training prompts, which the others then do not "
        "see. No policy is trained on it: it measures held-out quality where no gold is known. [a reward model that is "
        "not optimized against: arXiv:2210.10760]",
    )

    def __post_init__(self) -> None:
        _check_options("reward", self)
        super().__post_init__()


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`, beside transformers' own. Names and meanings are TRL's where it has the option.

    A rollout holds mini_batch_size * num_mini_batches episodes. An optimizer step takes mini_batch_size of them, in
    micro-batches of per_device_train_batch_size.
    """

    # Size and pace
    on_nonfinite: Literal["stop", "skip"] = _on_nonfinite()
    learning_rate: float = _option(1e-5, "Learning rate of the policy adapter. [N+, times the 3 to 10 that LoRA wants]")
    critic_learning_rate: float | None = _option(
        None, "Learning rate of the critic's adapter and head; None: as the policy. [InstructGPT has two]"
    )
    logging_steps: float = _option(1, "Log every so many PPO updates.")
    gradient_checkpointing: bool | int | Literal["auto"] = _option(  # type: ignore[assignment]
        True,
        "Trade compute for memory: in the backward, decoder layers run their forward again. A number: the first "
        "so many. auto: as few as fit, and more where memory runs out. It changes no result. [TRL, all or none]",
    )
    total_episodes: int | None = _option(
        None, "Responses sampled in all; None: num_train_epochs over the data, num_generations a prompt. [TRL]"
    )
    num_ppo_epochs: int = _option(4, "Passes over each rollout. [TRL, N+; InstructGPT 1]")
    num_mini_batches: int = _option(1, "Optimizer steps in each pass. [TRL, N+; InstructGPT 8]")
    mini_batch_size: int | None = _option(
        None, "Episodes in each optimizer step; None: per_device_train_batch_size * gradient_accumulation_steps. [TRL]"
    )
    per_device_train_batch_size: int | Literal["auto"] = _option(  # type: ignore[assignment]
        8,
        "Episodes that the update takes through the model at once, and what scores them for policy, reference and "
        "critic. It changes memory use and speed, and no result. "
        "auto: as many of the mini_batch_size as fit, halved where memory runs out. [TRL]",
    )

    # Sampling
    max_prompt_length: int | None = _option(512, "Longer prompts, in tokens, are bad rows.")
    response_length: int = _option(53, "Sample at most so many tokens. [TRL, N+]")
    temperature: float = _option(0.7, "The policy is the distribution tempered by this. [TRL, N+; InstructGPT 1]")
    stop_token_id: int | None = _option(
        None, "One more token that ends a response, beside EOS and the chat template's own. [TRL]"
    )
    num_generations: int = _option(1, "Responses to each prompt; rloo and grpo need 2 or more. [TRL]")
    rollout_micro_batch_size: int | Literal["auto"] = _option(
        64,
        "Rows that are sampled, or scored by reward models, at once, and all rows of evaluations. It changes memory "
        "use and speed, and no result. "
        "auto: as many of the rollout as fit, halved where memory runs out. [TRL's local_rollout_forward_batch_size]",
    )
    generation_backend: Literal["native", "eager", "generate", "static", "continuous", "vllm"] = _option(
        "native",
        "What samples the responses. native: our own decoding; on CUDA a step is captured in a CUDA graph and "
        "replayed, where the model can be captured, and the log says which. eager: our own, without a graph. "
        "generate: transformers' generate. static: the same with a KV cache of fixed size, compiled on CUDA unless the "
        "base is quantized. continuous: transformers' continuous batching. vllm: vLLM, on its own copy of the base. "
        "Log-probabilities always come from our forward.",
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3,
        "Share of the GPU for vLLM: its own copy of the base (about 4 GiB for 7B in NF4, 14 GiB in bfloat16) and its "
        "KV cache. [TRL]",
    )
    vllm_enable_sleep_mode: bool = _option(
        True,
        "Put vLLM's weights into the CPU's memory and free its KV cache while nothing is sampled. [TRL: off]",
    )

    # Reward
    reward_weights: list[float] | None = _option(  # noqa: RUF009
        None, "Weights of the sources in `reward_funcs`, in their order; None: all 1. [TRL]"
    )
    whole_rollout_rewards: bool = _option(
        False,
        "Of several processes, let one ask the reward functions about the whole rollout; off: each asks about its own "
        "rows.",
    )
    reward_timeout: float | None = _option(
        None, "Seconds after which a reward function that has not answered ends the run; None: it may take any time."
    )
    ensemble_aggregation: Literal["mean", "worst_case", "uncertainty"] = _option(
        "mean",
        "How the scores of an ensemble of reward adapters become one: their mean; their minimum (worst_case); or their "
        "mean less uncertainty_coef times their variance (uncertainty). [arXiv:2310.02743, equations 2 to 4]",
    )
    uncertainty_coef: float = _option(
        0.1, "Weight of the members' variance in ensemble_aggregation=uncertainty. [arXiv:2310.02743]"
    )
    reward_normalization: Literal["none", "running", "sft"] = _option(
        "none",
        "Shift and scale the scores of each source to mean 0 and variance 1 over all samples so far (running), or over "
        "those of the first rollout, when the policy is still the SFT model (sft). "
        "[running: arXiv:2005.12729; sft: arXiv:1909.08593, section 2.2]",
    )
    reward_clip: float | None = _option(
        None, "Clip the score to plus or minus this, before penalties. [arXiv:2005.12729]"
    )
    missing_eos_penalty: float | None = _option(
        None, "Subtracted from the score of a response without EOS. [TRL; N+ sets its score to -1]"
    )
    length_penalty: float = _option(0.0, "Subtracted from the score for each response token. [arXiv:2310.03716]")
    whiten_rewards: bool = _option(
        False, "Scale the token rewards to unit variance, for gae and reinforce++ alone. [TRL, arXiv:1909.08593's code]"
    )

    # KL penalty
    kl_coef: float = _option(0.05, "Weight of the KL penalty. [N+; InstructGPT 0.02]")
    kl_estimator: Literal["k1", "k3"] | None = _option(
        None,
        "What estimates the KL of a token: k1, unbiased, or k3, which is never negative; None: k1, and k3 for grpo, "
        "whose penalty is in the loss. [InstructGPT; TRL]",
    )
    target_kl: float | None = _option(
        None,
        "Adapt kl_coef so that the KL of a response, in nats, comes near this; None: kl_coef stays. [arXiv:1909.08593]",
    )
    kl_horizon: int = _option(10_000, "Episodes over which target_kl acts. [arXiv:1909.08593's code]")
    max_kl: float | None = _option(
        None,
        "When a rollout's KL, in nats a response, is above this, stop and go back to the policy whose rollout had the "
        "best objective/rlhf_reward. [KL as a budget: arXiv:2210.10760]",
    )

    # Advantages and losses
    advantage_estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = _option(
        "gae",
        "gae learns a critic; the others have none. [gae: arXiv:1506.02438; rloo: arXiv:2402.14740; "
        "grpo: arXiv:2402.03300; reinforce++: arXiv:2501.03262]",
    )
    gamma: float = _option(1.0, "Discount of later rewards, for gae and reinforce++. [InstructGPT, N+]")
    lam: float = _option(0.95, "GAE's lambda: 0 trusts the critic, 1 the sampled rewards. [N+]")
    cliprange: float = _option(0.2, "Clip range of the policy ratio. [InstructGPT, N+]")

    # Critic
    critic: Literal["reward", "sft", "head"] | None = _option(
        None,
        "What the critic starts as: a copy of the reward role, or of the SFT adapter with a zero head; `head` is a "
        "zero head on the policy's features, which it does not train. None: reward, where there is one, else sft. "
        "[reward: InstructGPT; separate adapters: arXiv:2309.00754]",
    )
    critic_warmup_steps: int = _option(0, "In the first so many updates only the critic learns. [arXiv:2503.01491]")
    cliprange_value: float = _option(0.2, "Clip range of the values. [N+]")
    vf_coef: float = _option(0.1, "Weight of the value loss. [N+]")

    # Which policy is kept
    early_stopping_patience: int | None = _option(
        None,
        "Stop after so many evaluations in a row without a new best metric_for_best_model, which is `quality` unless "
        "set: gold where the recipe has it, else the judge's score. load_best_model_at_end then goes back to that "
        "policy. Half of the held-out prompts choose, and results are of the others. "
        "[transformers' EarlyStoppingCallback]",
    )

    # Beside the reward
    ptx_coef: float = _option(
        0.0, "Weight of the language-model loss on the texts of `ptx` (PPO-ptx). [InstructGPT 27.8]"
    )
    ptx_batch_size: int | None = _option(
        None, "Texts in each optimizer step; None: as many as episodes. [InstructGPT: 8 times as many]"
    )
    ptx_max_length: int = _option(512, "Texts are cut to so many tokens.")
    ema_decay: float | None = _option(
        None,
        "Evaluate and save an exponential moving average of the policy adapter, updated after each PPO update. "
        "[InstructGPT 0.992]",
    )

    def __post_init__(self) -> None:
        _check_options("ppo", self)
        self._resolve_sizes()
        self._choose_by_quality()
        super().__post_init__()
        self._check_choices()
        if self.rollout_size % self.num_generations:
            raise ValueError(
                f"ppo.num_generations={self.num_generations} must divide a rollout's {self.rollout_size} episodes."
            )

    def _check_choices(self) -> None:
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError("ppo.total_episodes and ppo.max_steps both say how long PPO trains: set one of them.")
        estimator = self.advantage_estimator
        if estimator in ("rloo", "grpo") and self.num_generations < 2:
            raise ValueError(
                f"ppo.advantage_estimator={estimator} compares responses: set ppo.num_generations to 2 or more."
            )
        if estimator in ("rloo", "grpo") and self.whiten_rewards:
            raise ValueError(f"ppo.whiten_rewards is of token rewards, and {estimator} has none: switch it off.")
        if self.critic_warmup_steps and not self.has_critic:
            raise ValueError(f"ppo.critic_warmup_steps trains the critic alone, and {estimator} has none: set it to 0.")
        if estimator == "grpo" and self.kl_estimator == "k1":
            raise ValueError("ppo.kl_estimator=k1 has no gradient in grpo's loss: set k3.")

    def _choose_by_quality(self) -> None:
        """The best policy is that of the best held-out quality, and never of transformers' choice, the loss."""
        chooses = [key for key in ("load_best_model_at_end", "early_stopping_patience") if getattr(self, key)]
        chooses += ["save_strategy=best"] * (self.save_strategy == "best")
        if not chooses:
            return
        if self.metric_for_best_model is None:
            self.metric_for_best_model = "quality"
        if self.greater_is_better is None:
            self.greater_is_better = self.metric_for_best_model.removeprefix("eval_") not in LESS_IS_BETTER
        if self.eval_strategy == "no":
            raise ValueError(f"ppo.{chooses[0]} needs evaluations: set ppo.eval_strategy=steps and ppo.eval_steps.")
        # transformers also takes a multiple, but then the best evaluation may be of a policy that was not saved.
        saves, evaluates = (self.save_strategy, self.save_steps), (self.eval_strategy, self.eval_steps)
        if self.load_best_model_at_end and self.save_strategy == self.eval_strategy == "steps" and saves != evaluates:
            raise ValueError(
                f"ppo.load_best_model_at_end needs a checkpoint of each evaluation: set ppo.save_steps and "
                f"ppo.eval_steps to one number (they are {self.save_steps} and {self.eval_steps}), or "
                "ppo.save_strategy=best."
            )

    def _resolve_sizes(self) -> None:
        """Settle `mini_batch_size`, and where `auto` starts: with all there is, unless a plan says less."""
        sizes = ("per_device_train_batch_size", "rollout_micro_batch_size", "gradient_checkpointing")
        self.auto_sizes = {name for name in sizes if getattr(self, name) == "auto"}
        self.checkpointed_layers: int | None = None  # the first so many; None: all
        if "gradient_checkpointing" in self.auto_sizes:
            self.gradient_checkpointing = True
        elif not isinstance(self.gradient_checkpointing, bool):
            self.checkpointed_layers = int(self.gradient_checkpointing)
            self.gradient_checkpointing = True
        if self.mini_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "ppo.mini_batch_size is all of an optimizer step's episodes: leave ppo.gradient_accumulation_steps out."
            )
        if "per_device_train_batch_size" in self.auto_sizes:
            if self.mini_batch_size is None:
                raise ValueError("ppo.per_device_train_batch_size=auto needs ppo.mini_batch_size.")
            self.per_device_train_batch_size = self.mini_batch_size
        if self.mini_batch_size is None:
            self.mini_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if "rollout_micro_batch_size" in self.auto_sizes:
            self.rollout_micro_batch_size = self.rollout_size

    @property
    def chosen_sizes(self) -> dict[str, int | None]:
        """What the sizes that are `auto` have become; of layers to checkpoint None where they are all."""
        names = {"gradient_checkpointing": "checkpointed_layers"}
        return {names.get(key, key): getattr(self, names.get(key, key)) for key in sorted(self.auto_sizes)}

    @property
    def rollout_size(self) -> int:
        """Rows of one rollout."""
        assert self.mini_batch_size is not None
        return self.mini_batch_size * self.num_mini_batches

    @property
    def rollout_prompts(self) -> int:
        """Prompts of one rollout."""
        return self.rollout_size // self.num_generations

    @property
    def has_critic(self) -> bool:
        """Whether a critic is learned at all."""
        return self.advantage_estimator == "gae"

    @property
    def is_one_step(self) -> bool:
        """Whether an update is a single optimizer step, so that the policy that it moves is the one that sampled."""
        return self.num_ppo_epochs == self.num_mini_batches == 1

    @property
    def scores_policy(self) -> bool:
        """Whether an update asks for the policy's log-probabilities before the forward that it trains by.

        It does for the KL penalty in the reward, for the KL as a budget, and where a later step is to be told from the
        policy that sampled.
        """
        in_reward = self.advantage_estimator != "grpo" and (self.kl_coef > 0 or self.target_kl is not None)
        return in_reward or not self.is_one_step or self.max_kl is not None or self.critic_warmup_steps > 0

    @property
    def keeps_forward(self) -> bool:
        """Whether the forward that scores the policy is kept for the first step, if a micro-batch holds the rollout.

        Where the rollout is one mini-batch, nothing has moved the policy between the two.
        """
        return self.scores_policy and self.num_mini_batches == 1


@dataclass
class DPOConfig(_OfRows, trl.DPOConfig):
    """Arguments of `DPOTrainer`, beside TRL's and transformers' own.

    `response_length` and `temperature` are for the samples by which the models are compared after training, in batches
    of per_device_eval_batch_size.
    """

    on_nonfinite: Literal["stop", "skip"] = _on_nonfinite()
    gradient_accumulation_steps: int | Literal["auto"] = _gradient_accumulation_steps()  # type: ignore[assignment]
    max_length: int | None = _max_length(1024)
    truncation_mode: Literal["drop", "keep_start"] = _truncation_mode()  # type: ignore[assignment]

    learning_rate: float = _option(1e-5, "Learning rate of the adapter. [TRL's 1e-6, times the 10 that LoRA wants]")
    response_length: int = _option(53, "Sample at most so many tokens to a held-out prompt. [as ppo]")
    temperature: float = _option(0.7, "The models are compared as distributions tempered by this. [as ppo]")

    def __post_init__(self) -> None:
        _check_options("dpo", self)
        super().__post_init__()
