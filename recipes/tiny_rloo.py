"""PPO without a critic on the tiny world: RLOO, where the other responses to a prompt are the baseline.

    rlhf-recipes run tiny-rloo
    rlhf-recipes run tiny-rloo ppo.advantage_estimator=grpo

Everything but the estimator is as in `tiny`, so that the two final tables can be laid side by side. A rollout has as
many responses, to a quarter of the prompts.

Hardware: 2 idle CPU cores, less than the three minutes of `tiny`: there is no critic to train.

Sources: [R] RLOO, arXiv:2402.14740.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("tiny"),
    name="tiny-rloo",
    ppo={
        "advantage_estimator": "rloo",
        "num_generations": 4,  # [R]: k = 4, its better one
    },
)

if __name__ == "__main__":
    main(recipe)
