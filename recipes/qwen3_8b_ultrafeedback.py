"""Never run at its own size: Qwen3-8B on UltraFeedback, 4-bit, for one GPU with 16 or 24 GB.

    rlhf-recipes run qwen3-8b-ultrafeedback
    python recipes/qwen3_8b_ultrafeedback.py ppo.kl_coef=0.1

It was run whole with a random model of its architecture in the base's place.

Hardware: one GPU with 16 GB, by `rlhf-recipes plan qwen3-8b-ultrafeedback --gpu 16GiB`, or more. Time: not measured.

The data, and what to beware of in them, are those of `qwen3_4b_ultrafeedback.py`, from which this recipe derives.

Sources beside those of the parent: [Q] QLoRA, arXiv:2305.14314, its 7B model.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("qwen3-4b-ultrafeedback"),
    name="qwen3-8b-ultrafeedback",
    base={"model": "Qwen/Qwen3-8B-Base", "quantization": "nf4"},  # [Q]: NF4 with double quantization
    sft={"learning_rate": 2e-4, "max_grad_norm": 0.3},  # [Q]
)

if __name__ == "__main__":
    main(recipe)
