"""People's comparisons (Anthropic's HH) and a real language model, on a laptop.

    rlhf-recipes run smollm2-hh
    rlhf-recipes evaluate runs/smollm2-hh --comparisons hf://datasets/Anthropic/hh-rlhf/helpful-base/test.jsonl.gz

There is no gold here. A second reward model, which has three in ten of the comparisons for itself and on which nothing
is trained, judges what PPO did. Two CPU cores take as much as this of HH:

    rlhf-recipes run smollm2-hh reward.limit=2100 ppo.limit=2100 reward.heldout=0.1 ppo.heldout=0.1

HH has comparisons of two kinds, and this takes the helpful ones alone. In these people prefer the longer answer, in the
harmless ones the shorter, and a model of this size learns nothing from both at once: recipes/README.md has the figures.

Run so, on 1,463 comparisons, both reward models are right on 63 % of those of dialogues that they have not seen, and
PPO is not shown to be better than SFT: its 20 updates are few, and the judge prefers it on 55.9 % (48.6 to 63.0) of 178
prompts. On all of helpful-base it was never run.

Hardware: any GPU, or 2 CPU cores for so much of it. On two cores of an AMD EPYC in bfloat16, with other work beside it,
the reward stage took 35 minutes and PPO 77; alone an update takes about two.

There is no SFT stage: the base is an instruct model, the policy starts there, and the KL is measured to it.

Sources: [T] chosen for this model, and not tuned. [N] The N+ implementation details of RLHF with PPO, arXiv:2403.17031.
[I] InstructGPT, arXiv:2203.02155. [M] speed and memory.
"""

from rlhf_recipes import Base, PPOStage, Recipe, Stage, main

# Of HH (arXiv:2204.05862) the 43,835 comparisons of its part helpful-base.
HELPFUL = "hf://datasets/Anthropic/hh-rlhf/helpful-base/train.jsonl.gz"

recipe = Recipe(
    name="smollm2-hh",
    base=Base("HuggingFaceTB/SmolLM2-135M-Instruct", chat_template="chatml"),  # as `smollm2-sentiment`
    reward=Stage(
        data=HELPFUL,
        args=dict(
            learning_rate=4e-4,  # [T]
            lr_scheduler_type="cosine",  # [I]
            warmup_steps=5,  # [T]
            num_train_epochs=1,  # [I], [N]
            per_device_train_batch_size=4,  # [M]
            gradient_accumulation_steps=4,  # 4 x 4 = 16 [T]; [I] and [N] have 64, and more comparisons
            max_length=256,  # PPO's prompt and response together; 69 % of the rows are no longer
            center_rewards_coefficient=0.01,  # arXiv:2312.09244; the value that TRL recommends
            judge_share=0.3,
            gradient_checkpointing=False,  # [M]
            save_steps=20,
            save_total_limit=1,
        ),
    ),
    ppo=PPOStage(
        data=HELPFUL,  # only the prompts
        heldout_limit=192,
        args=dict(
            total_episodes=1_280,  # 20 updates [T]
            learning_rate=2e-4,  # [T]
            lr_scheduler_type="linear",  # [N]
            per_device_train_batch_size=16,  # [M]
            gradient_accumulation_steps=2,  # [M]
            num_mini_batches=2,  # 2 x 32 = 64 episodes a rollout [T]
            num_ppo_epochs=1,  # [I]
            rollout_micro_batch_size=64,  # [M]
            max_prompt_length=192,  # three quarters of HH's prompts are shorter
            response_length=64,  # three quarters of HH's preferred replies are shorter
            temperature=0.7,  # [T]: at 1 the smallest model of its family often says what is no language
            missing_eos_penalty=1.0,  # TRL's examples
            kl_coef=0.05,  # [N]
            gradient_checkpointing=False,  # [M]
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=10,
            save_steps=5,
            save_total_limit=1,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
