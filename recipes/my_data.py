"""Never run at its own size; an example to copy: your demonstrations, comparisons, prompts and a Python reward.

    rlhf-recipes run my-data
    rlhf-recipes check recipes/my_data/comparisons.jsonl

The files in `my_data/` are 30 answers of a bicycle workshop, 30 choices between two, and 40 questions: enough to see
the format, and far too few to learn from (a reward model wants thousands of comparisons). `check` shows what else is
wrong with them: the longer answer wins 26 times of 30. Copy this file, and replace the four lines that are marked.
Any of TRL's formats will do, as JSONL, JSON, CSV, Parquet or a dataset of the Hub.

Hardware: one GPU; `rlhf-recipes plan my-data` says how much of its memory. It was run whole with a model of a million
parameters in the base's place. What to expect of data of your own is in `qwen3_0_6b_hh.py`; of these rows, that the SFT
loss falls, and nothing else: an accuracy on a few held-out pairs, and eight updates of PPO, say nothing.

Sources: [Q] as `qwen3_0_6b_hh.py`. [D] for so few rows. [M] what fits in memory; it changes no result.
"""

from pathlib import Path

from rlhf_recipes import Base, PPOStage, Recipe, Stage, main

HERE = Path(__file__).parent / "my_data"

recipe = Recipe(
    name="my-data",
    base=Base("Qwen/Qwen3-0.6B-Base", chat_template="chatml"),  # this model knows the template's tokens
    sft=Stage(
        data=str(HERE / "demonstrations.jsonl"),  # replace: {"prompt": ..., "completion": ...}
        heldout=0.1,
        args=dict(
            learning_rate=1e-4,  # [Q]
            num_train_epochs=3,  # [D]
            per_device_train_batch_size=4,  # [M]
            max_length=384,  # [Q]
            gradient_checkpointing=False,  # [M]
            logging_steps=1,  # [D]
        ),
    ),
    reward=Stage(
        data=str(HERE / "comparisons.jsonl"),  # replace: {"prompt": ..., "chosen": ..., "rejected": ...}
        heldout=0.1,
        args=dict(
            learning_rate=9e-5,  # [Q]
            num_train_epochs=3,  # [D]; 1 with enough of them [Q]
            per_device_train_batch_size=4,  # [M]
            max_length=384,  # [Q]
            gradient_checkpointing=False,  # [M]
            logging_steps=1,  # [D]
        ),
    ),
    ppo=PPOStage(
        data=str(HERE / "prompts.jsonl"),  # replace: {"prompt": ...}
        reward_funcs=("reward", f"{HERE / 'rewards.py'}:is_short"),  # replace: the reward model, and a function
        heldout=0.1,
        args=dict(
            reward_weights=[1.0, 0.5],  # of the two, in their order
            total_episodes=256,  # [D]: 8 updates
            learning_rate=3e-5,  # [Q]
            critic_learning_rate=9e-5,  # [Q]
            per_device_train_batch_size=8,  # [M]
            mini_batch_size=16,  # [D]
            num_mini_batches=2,  # [D]: 32 episodes a rollout
            num_ppo_epochs=1,  # [Q]
            rollout_micro_batch_size=32,  # [M]
            max_prompt_length=256,  # [Q]
            response_length=128,  # [Q]
            temperature=1.0,  # [Q]
            kl_coef=0.05,  # [Q]
            missing_eos_penalty=1.0,  # [Q]
            gradient_checkpointing=False,  # [M]
            eval_strategy="steps",
            eval_steps=4,
            save_steps=4,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
