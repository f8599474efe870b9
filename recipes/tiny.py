"""The whole pipeline in minutes on a CPU, with no download, and with the truth known.

    make demo
    rlhf-recipes run tiny ppo.kl_coef=0.1

It pretrains its own base, a Llama of a million parameters, once (about a minute) on a small internet of requests and
answers, good and bad. Demonstrations and comparisons come from simulated people, who agree with a hidden gold score as
often as InstructGPT's labelers agreed with each other. Gold is never trained on, so it measures what was learned.

Hardware: 2 CPU cores. What to expect: the reward model's held-out accuracy nears the labelers' own 73 %; `eval_gold`
and `objective/scores` rise together while `objective/kl` grows from 0.
"""

from rlhf_recipes import Base, PPOStage, Recipe, Stage, main

recipe = Recipe(
    name="tiny",
    base=Base("rlhf_recipes.tiny:build_base"),
    gold="rlhf_recipes.tiny:gold",
    sft=Stage(
        data="rlhf_recipes.tiny:demonstrations",
        args=dict(
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            num_train_epochs=1,
            per_device_train_batch_size=32,
            gradient_checkpointing=False,
        ),
    ),
    reward=Stage(
        data="rlhf_recipes.tiny:comparisons",
        args=dict(
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            num_train_epochs=1,
            per_device_train_batch_size=64,
            gradient_checkpointing=False,
        ),
    ),
    ppo=PPOStage(
        data="rlhf_recipes.tiny:prompts",
        heldout=0.1,
        args=dict(
            total_episodes=5_120,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            per_device_train_batch_size=64,
            num_mini_batches=2,
            num_ppo_epochs=2,
            rollout_micro_batch_size=128,
            response_length=40,
            temperature=1.0,
            missing_eos_penalty=1.0,
            kl_coef=0.05,
            gradient_checkpointing=False,
            save_steps=10,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
