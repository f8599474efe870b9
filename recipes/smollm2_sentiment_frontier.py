"""Never run at its own size: `smollm2-sentiment` with four KL coefficients, and with RLOO beside PPO.

    rlhf-recipes run smollm2-sentiment-frontier

How far may a policy go for its reward? It takes the demonstrations and comparisons of `smollm2-sentiment` where the
first four of its commands have left them, trains SFT and the reward model once, and each variant's policy from there.
Gold and reward over sqrt(KL) are drawn in RUN/overoptimization.png, and the report compares all variants.

Hardware: as `smollm2-sentiment`; on two CPU cores an estimated hour for each variant. `--jobs` on a larger machine.

Sources: [Z] Ziegler et al. 2019, arXiv:1909.08593. [R] RLOO, arXiv:2402.14740.
"""

from typing import Any

from rlhf_recipes import load, main, replace

RLOO: dict[str, Any] = {"advantage_estimator": "rloo", "num_generations": 4}  # [R]: k = 4, its better one

recipe = replace(
    load("smollm2-sentiment"),
    name="smollm2-sentiment-frontier",
    variants={
        **{f"kl-{kl_coef}": {"ppo": {"kl_coef": kl_coef}} for kl_coef in (0.0, 0.02, 0.05, 0.2)},  # [Z] from 0 to 0.2
        "rloo": {"ppo": RLOO},
    },
)

if __name__ == "__main__":
    main(recipe)
