"""Never run at its own size: Qwen3-4B on UltraFeedback, its base in 16 bits, for one GPU with 24 GB.

    rlhf-recipes run qwen3-4b-ultrafeedback
    rlhf-recipes run qwen3-4b-ultrafeedback base.quantization=nf4

It was run whole with a random model of its architecture in the base's place.

Hardware: one GPU with 24 GB, by `rlhf-recipes plan qwen3-4b-ultrafeedback --gpu 24GiB`; with the second line one with
16 GB. Time: not measured.

UltraFeedback's comparisons are by GPT-4 and not by people: 61,000 instructions with the best of four models' answers
against another of them. What it prefers is often the longer one. The reward card says how often; where a policy only
gets longer, `ppo.length_penalty` is against it.

Sources beside those of `qwen3_0_6b_hh.py`, from which this recipe derives: [Z] Zephyr, arXiv:2310.16944, which was
trained on these comparisons. [M] what fits in memory; it changes no result.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("qwen3-0-6b-hh"),
    name="qwen3-4b-ultrafeedback",
    # The template of this family's chat models would open and close an empty thought before each answer.
    base={"model": "Qwen/Qwen3-4B-Base", "chat_template": "chatml"},
    sft={
        "data": "ultrafeedback",
        "max_length": 1_024,  # [Z]: 512 of the prompt at most, 1,024 in all
        "per_device_train_batch_size": 2,  # [M]
        "gradient_accumulation_steps": 16,  # 2 x 16 = 32, as the parent
        "gradient_checkpointing": True,  # [M]
    },
    reward={
        "data": "ultrafeedback",
        "max_length": 1_024,  # [Z]
        "per_device_train_batch_size": 2,  # [M]
        "gradient_accumulation_steps": 32,  # 2 x 32 = 64, as the parent
        "gradient_checkpointing": True,  # [M]
    },
    ppo={
        "data": "ultrafeedback",
        "limit": 25_600,  # half of the parent's, for the sake of time: about 40 updates
        "max_prompt_length": 512,  # [Z]
        "response_length": 512,  # [Z]
        "per_device_train_batch_size": "auto",  # [M]
        "rollout_micro_batch_size": "auto",  # [M]
        "gradient_checkpointing": True,  # [M]
    },
)

if __name__ == "__main__":
    main(recipe)
