"""Never run at its own size: Mistral-7B on Anthropic's HH, 4-bit: the four roles of a 7B PPO on one consumer GPU.

    rlhf-recipes run mistral-7b-hh
    python recipes/mistral_7b_hh.py ppo.kl_coef=0.1

It was run whole with a model of 260K parameters in the base's place. The shape of the 7B was timed on an H200 capped at
24 GiB, with random weights and longer rows: 51 s for 32 episodes of 512 + 512 tokens (tests/benchmarks/README.md).

Hardware: one GPU with 24 GB. Time on an RTX 4090, estimated, not measured: sft 12 h, reward 24 h, ppo 12 h.

The expected curves are those of `qwen3_0_6b_hh.py`, from which this recipe derives, with a reward model nearer to
InstructGPT's 0.72 than to 0.60. They too are taken from the papers and not from a run of this file.

Sources beside those of the parent: [Q] QLoRA, arXiv:2305.14314, its 7B model. [M] what fits in memory, by
`rlhf-recipes plan mistral-7b-hh --gpu 24GiB`.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("qwen3-0-6b-hh"),
    name="mistral-7b-hh",
    base={"model": "mistralai/Mistral-7B-v0.3", "quantization": "nf4"},  # [Q]: NF4 with double quantization
    sft={
        "learning_rate": 2e-4,  # [Q]
        "max_grad_norm": 0.3,  # [Q]
        "per_device_train_batch_size": 4,  # [M]
        "gradient_accumulation_steps": 4,  # 4 x 4 = 16 [Q]
        "gradient_checkpointing": True,  # [M]
    },
    reward={
        "per_device_train_batch_size": 2,  # [M]
        "gradient_accumulation_steps": 32,  # 2 x 32 = 64, as the parent
        "gradient_checkpointing": True,  # [M]
    },
    ppo={
        "limit": 25_600,  # half of the parent's, drawn as there, for the sake of time: about 40 updates
        "per_device_train_batch_size": "auto",  # [M]
        "rollout_micro_batch_size": "auto",  # [M]
        "gradient_checkpointing": True,  # [M]
    },
)

if __name__ == "__main__":
    main(recipe)
