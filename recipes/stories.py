"""Children's stories that end well and are short: PPO with Python rewards on a pretrained story model.

    rlhf-recipes run stories base.model=path/to/stories260K

Hardware: any CPU. On 2 cores the 260K-parameter model of llama2.c takes about two minutes. A model with another
tokenizer may end its stories with another token: set `ppo.stop_token_id`.

What to expect: `rewards/ends_well/mean` and `rewards/is_short/mean` rise together, `response_length` falls, and
`objective/kl` grows from 0. `samples.jsonl` shows the same openings told again and again.
"""

from rlhf_recipes import Base, PPOStage, Recipe, main

recipe = Recipe(
    name="stories",
    base=Base("roneneldan/TinyStories-33M"),  # arXiv:2305.07759
    ppo=PPOStage(
        data="rlhf_recipes.worlds.stories:openings",
        reward_funcs=("rlhf_recipes.worlds.stories:ends_well", "rlhf_recipes.worlds.stories:is_short"),
        heldout_limit=64,
        args=dict(
            total_episodes=2_560,
            learning_rate=3e-3,  # a model of 64 dimensions takes, and needs, large steps
            critic_learning_rate=3e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=64,
            num_ppo_epochs=2,
            response_length=80,
            stop_token_id=1,  # llama2.c's story models put BOS between stories
            missing_eos_penalty=1.0,
            temperature=1.0,
            kl_coef=0.02,
            gradient_checkpointing=False,
            eval_strategy="steps",
            eval_steps=10,
            eval_on_start=True,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
