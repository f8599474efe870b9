"""Gao et al.'s experiment on the tiny world: how far a reward model can be trusted, and what makes it last longer.

    rlhf-recipes run overoptimization --jobs 2

Gold is known here, so that the reward model's over-optimisation shows: without a KL penalty PPO first raises gold
with the reward, and then the reward alone. The variants differ in the comparisons that the reward model is trained on,
in PPO's KL coefficient, and, with a small one, in the size of an ensemble of which the lowest score counts; two seeds
each. All are compared at equal sqrt(KL) in RUN/overoptimization.png, with the fits of R(d) = d (alpha - beta log d).

Hardware: 2 idle CPU cores, 23 minutes.

Sources: [G] Gao, Schulman and Hilton, arXiv:2210.10760. [C] Coste et al., arXiv:2310.02743. [T] tuned on this world.
[M] speed; no result.
"""

from typing import Any

from rlhf_recipes import load, main, replace

ONE_CHANGE: dict[str, dict[str, Any]] = {
    "labels-1000": {},
    "labels-150": {"reward": {"limit": 150}},
    "labels-4000": {"reward": {"limit": 4000}},
    "kl-0.02": {"ppo": {"kl_coef": 0.02}},
    "kl-0.1": {"ppo": {"kl_coef": 0.1}},
    "ensemble-2": {"reward": {"ensemble_size": 2}, "ppo": {"kl_coef": 0.02}},  # without a penalty they do nothing here
    "ensemble-4": {"reward": {"ensemble_size": 4}, "ppo": {"kl_coef": 0.02}},
}

recipe = replace(
    load("tiny"),
    name="overoptimization",
    reward={
        "limit": 1000,
        "ensemble_size": 1,
        "max_steps": 100,  # for few labels as for many, or a model of few labels is one of few steps [T]
        "per_device_train_batch_size": 32,  # [M]
    },
    ppo={
        "kl_coef": 0.0,  # [G]
        "ensemble_aggregation": "worst_case",  # [C]
        "learning_rate": 2.5e-4,  # [T]: at 1e-3 the KL passes 10 nats before the second evaluation
        "lr_scheduler_type": "constant",
        "total_episodes": 5120,  # [T]: 40 updates
        "eval_steps": 3,
        "save_steps": 20,
    },
    variants={
        f"{name}-seed-{seed}": {**changes, "seed": seed} for name, changes in ONE_CHANGE.items() for seed in (0, 1)
    },
)

if __name__ == "__main__":
    main(recipe)
