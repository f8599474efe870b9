"""Never run at its own size: SmolLM3-3B on Anthropic's HH, its base in 16 bits, for one GPU with 16 or 24 GB.

    rlhf-recipes run smollm3-3b-hh
    python recipes/smollm3_3b_hh.py ppo.kl_coef=0.1

It was run whole with a random model of its architecture in the base's place.

Hardware: one GPU with 16 GB, by `rlhf-recipes plan smollm3-3b-hh --gpu 16GiB`, or more. Time: not measured.

The expected curves are those of `qwen3_0_6b_hh.py`, from which this recipe derives. The base has no chat format of its
own to keep: it learns the transcript's.

Sources beside those of the parent: [M] what fits in memory; it changes no result.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("qwen3-0-6b-hh"),
    name="smollm3-3b-hh",
    base={"model": "HuggingFaceTB/SmolLM3-3B-Base"},
    sft={"gradient_checkpointing": True},  # [M]
    reward={"gradient_checkpointing": True},  # [M]
    ppo={
        "limit": 25_600,  # half of the parent's, for the sake of time: about 40 updates
        "per_device_train_batch_size": "auto",  # [M]
        "rollout_micro_batch_size": "auto",  # [M]
        "gradient_checkpointing": True,  # [M]
    },
)

if __name__ == "__main__":
    main(recipe)
