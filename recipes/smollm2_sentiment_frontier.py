"""`smollm2-sentiment` with four KL coefficients, and with RLOO beside PPO: how far may a policy go for its reward?

    rlhf-recipes run smollm2-sentiment-frontier --jobs 2

It takes the demonstrations and comparisons of `smollm2-sentiment` where the first four of its commands have left them,
trains SFT and the reward model once, and each variant's policy from there, in 30 updates, after which the longer run of
`smollm2-sentiment` gained nothing more. Gold and reward over sqrt(KL) are drawn in RUN/overoptimization.png, and the
report compares all variants. What is lost on the way says

    F=runs/smollm2-sentiment-frontier
    rlhf-recipes evaluate $F/kl-0.05 --models base,sft,ppo,$F/kl-0.0:ppo,$F/kl-0.2:ppo --against sft --under-base

What to expect: recipes/README.md has the run.

Hardware: 2 CPU cores, 40 minutes for each two variants.

Sources: [Z] Ziegler et al. 2019, arXiv:1909.08593. [R] RLOO, arXiv:2402.14740. [T] chosen for this model.
"""

from typing import Any

from rlhf_recipes import load, main, replace

RLOO: dict[str, Any] = {"advantage_estimator": "rloo", "num_generations": 4}  # [R]: k = 4, its better one

recipe = replace(
    load("smollm2-sentiment"),
    name="smollm2-sentiment-frontier",
    ppo={
        "total_episodes": 1_920,  # 30 updates [T]
        "eval_on_start": True,  # the curves begin at the SFT model
        "eval_steps": 10,
    },
    variants={
        **{f"kl-{kl_coef}": {"ppo": {"kl_coef": kl_coef}} for kl_coef in (0.0, 0.02, 0.05, 0.2)},  # [Z] from 0 to 0.2
        "rloo": {"ppo": RLOO},
    },
)

if __name__ == "__main__":
    main(recipe)
