"""Never run at its own size: Mistral-7B on Anthropic's HH comparisons by DPO: no reward model, no sampling in training.

    rlhf-recipes run mistral-7b-hh-dpo
    python recipes/mistral_7b_hh_dpo.py dpo.beta=0.3

SFT is that of `mistral_7b_hh.py`, from which this recipe derives, and so are the comparisons. The models are compared
on the comparisons' held-out prompts.

Hardware: one GPU with 24 GB. Time on an RTX 4090, estimated, not measured: sft 12 h, dpo 36 h.

What to expect, from the papers and not from a run of this file: `rewards/accuracies` starts at 0, where all pairs are
ties, and goes above 0.6; `rewards/margins` rises, and `logps/chosen` falls a little, `logps/rejected` more.

Sources beside those of the parent and of `qwen3_0_6b_hh.py`: [D] DPO, arXiv:2305.18290, its appendix B, whose optimizer
is RMSprop and not AdamW. [M] what fits in memory.
"""

from rlhf_recipes import DPOStage, load, main, replace

parent = load("mistral-7b-hh")

recipe = replace(
    parent,
    name="mistral-7b-hh-dpo",
    reward=None,
    ppo=None,
    dpo=DPOStage(
        data=parent.reward.data,
        args=dict(
            beta=0.1,  # [D]
            learning_rate=1e-5,  # [D] 1e-6 for full fine-tuning, times ten [L]
            lr_scheduler_type="constant_with_warmup",  # [D]
            warmup_steps=150,  # [D]
            num_train_epochs=1,  # as the parent's reward model
            per_device_train_batch_size=2,  # [M]
            gradient_accumulation_steps=32,  # 2 x 32 = 64 [D]
            max_length=384,  # as the parent's reward model
            response_length=128,  # as the parent's PPO
            temperature=1.0,  # as the parent's PPO
            per_device_eval_batch_size=32,  # as the parent's PPO samples
            gradient_checkpointing=True,  # [M]
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=250,
            save_steps=250,
            save_total_limit=1,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
