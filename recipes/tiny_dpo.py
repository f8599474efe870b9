"""DPO in place of the reward model and PPO, on the tiny world: the same base, demonstrations and comparisons.

    rlhf-recipes run tiny-dpo
    rlhf-recipes run tiny-dpo dpo.beta=0.1

Its models are compared on the 256 held-out prompts of the recipe `tiny`, with the same seed, so that the two final
tables can be laid side by side.

Hardware: 2 idle CPU cores, a minute and a half beside the base. What to expect: `rewards/accuracies` on held-out
comparisons ends near 68 %, the KL near 0.4 nats, and gold rises from 1.2 to 1.4, less than with PPO.

Sources: [T] tuned on this world. [D] DPO, arXiv:2305.18290, its appendix B. [M] speed; no result.
"""

from rlhf_recipes import DPOStage, load, main, replace

recipe = replace(
    load("tiny"),
    name="tiny-dpo",
    reward=None,
    ppo=None,
    dpo=DPOStage(
        data="rlhf_recipes.worlds.tiny:comparisons",
        prompts="rlhf_recipes.worlds.tiny:prompts",  # what PPO is compared on
        heldout=0.1,
        args=dict(
            beta=0.5,  # [D] for TL;DR; at its 0.1 the KL is 3.5 nats and gold no higher [T]
            learning_rate=1e-3,  # [T]
            lr_scheduler_type="linear",  # [D], without its warm-up
            num_train_epochs=1,  # [T]
            per_device_train_batch_size=32,  # [T], half of [D]'s
            per_device_eval_batch_size=128,  # [M]
            max_length=128,
            response_length=40,
            temperature=1.0,
            gradient_checkpointing=False,  # [M]
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
