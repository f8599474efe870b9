"""Which numbers and words a recipe's settings may be, where their types say too little.

A key is `section.option`, or `option` alone where it means the same in every section. A number that is not named here
may be any finite one. None and `auto` are no numbers: the types say where they may stand.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

LARGEST, LARGEST_WHOLE = 1e30, 2**31 - 1  # float32 and C's int hold more of neither by much


class Range(NamedTuple):
    """The numbers from `low` to `high`, both included."""

    words: str
    low: float
    high: float = LARGEST


LEAST, BELOW_1 = 5e-324, 1 - 1e-9  # the numbers next to 0 and, as far as float32 tells, to 1

ANY = Range("a number", -LARGEST)
ABOVE_0 = Range("above 0", LEAST)
NOT_NEGATIVE = Range("0 or more", 0)
SHARE = Range("from 0 to 1", 0, 1)
ROWS = Range("above 0, at most 1,000,000", 1, 1_000_000)  # at once: the plan looks through the sizes that divide it
PART = Range("at least 0 and below 1", 0, BELOW_1)

RANGES = {
    # NumPy takes seeds below 2^32, to which rounds and reward adapters add up to 10,000 and their number.
    **dict.fromkeys(("seed", "data_seed"), Range("from 0 to 4,000,000,000", 0, 4_000_000_000)),
    "lora.r": ABOVE_0,
    "lora.alpha": ABOVE_0,
    "lora.dropout": PART,
    "limit": NOT_NEGATIVE,
    "heldout": Range("between 0 and 0.9", 0, 0.9),
    "heldout_limit": NOT_NEGATIVE,
    "rounds.count": ABOVE_0,
    "rounds.size": ABOVE_0,
    "rounds.responses": Range("from 2 to 9", 2, 9),
    "rounds.enough": Range("above 0 and at most 1", LEAST, 1),
    **dict.fromkeys(("rounds.price_in", "rounds.price_out"), NOT_NEGATIVE),
    "rounds.max_cost": ABOVE_0,
    # Below, a logit divided by it is more than float32 holds.
    **dict.fromkeys(("temperature", "rounds.temperatures"), Range("above 0, from 0.001 to 1,000", 1e-3, 1e3)),
    # Of transformers' Trainer
    "max_steps": Range("above 0, or -1 for num_train_epochs", -1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), ROWS),
    **dict.fromkeys(("num_train_epochs", "torch_empty_cache_steps", "save_total_limit"), ABOVE_0),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), ABOVE_0),
    **dict.fromkeys(("learning_rate", "ppo.critic_learning_rate", "weight_decay"), Range("from 0 to 1,000", 0, 1_000)),
    **dict.fromkeys(("warmup_steps", "max_grad_norm", "eval_delay"), NOT_NEGATIVE),
    "gradient_accumulation_steps": ROWS,
    **dict.fromkeys(("adam_epsilon", "neftune_noise_alpha", "gradient_checkpointing"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), PART),
    "dataloader_num_workers": Range("from 0 to 1,000", 0, 1_000),
    "dataloader_prefetch_factor": Range("from 1 to 1,000", 1, 1_000),
    # Of TRL's trainers
    **dict.fromkeys(("max_length", "precompute_ref_batch_size"), ABOVE_0),
    "pad_to_multiple_of": Range("from 1 to 8,192", 1, 8_192),
    **dict.fromkeys(("dpo.beta", "discopop_tau"), ABOVE_0),
    **dict.fromkeys(("center_rewards_coefficient", "router_aux_loss_coef"), NOT_NEGATIVE),
    "label_smoothing": Range("at least 0 and below 0.5", 0, 0.5 - 1e-9),
    "dpo.ld_alpha": SHARE,
    # Ours
    "reward.ensemble_size": Range("above 0, at most 1,000", 1, 1_000),
    "reward.judge_share": PART,
    "ppo.ema_decay": PART,
    **dict.fromkeys(("ppo.gamma", "ppo.lam", "ppo.vllm_gpu_memory_utilization"), SHARE),
    **dict.fromkeys(("response_length", "ppo.max_prompt_length", "ppo.ptx_batch_size"), ABOVE_0),
    "ppo.ptx_max_length": Range("2 or more", 2),
    **dict.fromkeys(("ppo.mini_batch_size", "ppo.rollout_micro_batch_size", "ppo.num_mini_batches"), ROWS),
    # The orders of all of a rollout's passes are drawn at once.
    "ppo.num_ppo_epochs": Range("from 1 to 1,000", 1, 1_000),
    **dict.fromkeys(("ppo.num_generations", "ppo.total_episodes"), ABOVE_0),
    **dict.fromkeys(("ppo.cliprange", "ppo.cliprange_value", "ppo.reward_clip", "ppo.reward_timeout"), ABOVE_0),
    **dict.fromkeys(("ppo.target_kl", "ppo.kl_horizon", "ppo.max_kl", "ppo.early_stopping_patience"), ABOVE_0),
    **dict.fromkeys(("ppo.kl_coef", "ppo.vf_coef", "ppo.ptx_coef", "ppo.uncertainty_coef"), NOT_NEGATIVE),
    **dict.fromkeys(("ppo.critic_warmup_steps", "ppo.stop_token_id"), NOT_NEGATIVE),
    **dict.fromkeys(("ppo.missing_eos_penalty", "ppo.length_penalty"), NOT_NEGATIVE),
}

# What a text may be, beside what its own class says of it.
WORDS = {
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "dpo.f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    "dpo.loss_type": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
}


def check_range(key: str, value: Any, words: Collection[str] | None = None) -> None:
    """Raises ValueError, naming `key`, for a number, also in a list, that is not finite or out of the key's range.

    So is what is no number where there must be one, and a text that is none of the words that are known.

    Args:
        words: those that the key's own class knows.
    """
    name = key.rpartition(".")[2]
    needed, words = RANGES.get(key, RANGES.get(name)), words or WORDS.get(key, WORDS.get(name))
    if words is not None and value == []:
        raise ValueError(f"{key} must have one of {', '.join(words)} or more, not [].")
    several = isinstance(value, tuple) or (isinstance(value, list) and needed is None)
    for one in value if several else [value]:
        if isinstance(one, int | float) and not isinstance(one, bool):
            numbers, size = needed or ANY, LARGEST_WHOLE if isinstance(one, int) else LARGEST
            low = numbers.low if numbers.low > -LARGEST else -size
            high = numbers.high if numbers.high < LARGEST else size
            if not low <= one <= high:
                limit = f" and at most {high:,}" if one > high == size else ""
                raise ValueError(f"{key} must be {numbers.words}{limit}, not {one}.")
        elif needed is not None and not (one is None or isinstance(one, bool) or one == "auto"):
            raise ValueError(f"{key} must be {needed.words}, not {one!r:.300}.")
        elif words is not None and isinstance(one, str) and one not in words:
            raise ValueError(f"{key} must be one of {', '.join(words)}, not {one!r:.300}.")


def check_ranges(section: str, values: Mapping[str, Any]) -> None:
    """`check_range` of each of a section's settings; "" is the recipe itself."""
    for name, value in values.items():
        check_range(f"{section}.{name}".lstrip("."), value)
