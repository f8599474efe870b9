"""Never run at its own size: Qwen3-0.6B-Base on Anthropic's HH comparisons, 16-bit LoRA: the pipeline in an evening.

    rlhf-recipes run qwen3-0-6b-hh
    python recipes/qwen3_0_6b_hh.py ppo.kl_coef=0.1

It was run whole with a model of 260K parameters in the base's place.

Hardware: one GPU with 24 GB. Time on an RTX 4090, estimated, not measured: sft 1 h, reward 2 h, ppo 3 h.

What to expect, from the papers and not from a run of this file: the SFT loss falls within the first hundred steps and
is nearly flat afterwards. The reward model starts at an accuracy of 0.5 on held-out pairs and ends between 0.60 and
0.70 (N+ reports 0.63 at 1B on TL;DR, InstructGPT 0.72 at 6B on its own data). In PPO `objective/kl` starts at exactly 0
and `objective/scores` rises steadily with it; scores that keep rising while the samples turn long or repeat themselves
mean that the reward is being gamed: raise `ppo.kl_coef` or stop earlier. There is no gold here. To see it coming, let
a second reward model, which nothing is trained on, judge the held-out answers, and keep the policy that it likes best:

    rlhf-recipes run qwen3-0-6b-hh reward.judge_share=0.3 ppo.load_best_model_at_end=true ppo.early_stopping_patience=3

PPO's prompts are drawn from the whole of HH by a hash. It stands there in four parts, one after the other: 42,537
comparisons of red-team dialogues (harmless-base), in which people try to have the model say what it should not, and
43,835, 22,007 and 52,421 of helpful ones (base, online, rejection-sampled). So about a quarter of the prompts of every
stage, and of those that are held out, are red-team prompts.

Sources: [I] InstructGPT, arXiv:2203.02155, its 1.3B model. [N] The N+ implementation details of RLHF with PPO,
arXiv:2403.17031. [L] LoRA Without Regret, Thinking Machines Lab, 2025: LoRA wants about ten times the learning rate of
full fine-tuning. [M] what fits in memory; it changes no result.
"""

from rlhf_recipes import Base, Lora, PPOStage, Recipe, Stage, main

HH = "Anthropic/hh-rlhf"  # arXiv:2204.05862; 160,800 comparisons of whole dialogues

recipe = Recipe(
    name="qwen3-0-6b-hh",
    # The dataset's own format, "Human: ... Assistant: ..."; the base model was not trained to chat in any other.
    base=Base("Qwen/Qwen3-0.6B-Base", chat_template="transcript"),
    # [L]: every linear layer, alpha 32, and ranks 1 to 32 do for RL.
    lora=Lora(r=16, alpha=32, dropout=0.0, target_modules="all-linear"),
    sft=Stage(
        data=HH,  # the preferred dialogue is the demonstration
        args=dict(
            learning_rate=1e-4,  # [I] 9.65e-6 for full fine-tuning, times ten [L]
            lr_scheduler_type="cosine_with_min_lr",  # [I]: cosine down to 10 % of the first value, no warm-up
            lr_scheduler_kwargs={"min_lr_rate": 0.1},  # [I]
            num_train_epochs=1,  # [I]: the validation loss overfits after one epoch
            per_device_train_batch_size=4,  # [M]
            gradient_accumulation_steps=8,  # 4 x 8 = 32 [I]
            max_length=384,  # PPO's prompt and response together: the reward model never scores a longer text
            gradient_checkpointing=False,  # [M]: a small base keeps its activations
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=500,
            save_steps=500,
            save_total_limit=1,
        ),
    ),
    reward=Stage(
        data=HH,
        args=dict(
            learning_rate=9e-5,  # [I] 9e-6 for its reward model, times ten [L]
            lr_scheduler_type="cosine_with_min_lr",  # [I]
            lr_scheduler_kwargs={"min_lr_rate": 0.1},  # [I]
            num_train_epochs=1,  # [I], [N]
            per_device_train_batch_size=4,  # [M]
            gradient_accumulation_steps=16,  # 4 x 16 = 64 [I], [N]
            max_length=384,
            center_rewards_coefficient=0.01,  # arXiv:2312.09244; the value that TRL recommends
            gradient_checkpointing=False,  # [M]: a small base keeps its activations
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=250,
            save_steps=250,
            save_total_limit=1,
        ),
    ),
    ppo=PPOStage(
        data=HH,  # only the prompts
        # Each prompt once, a fifth of [I]'s 256k episodes. Of 4,203 of HH's rows 14 % have too long a prompt; with as
        # many of these, and a twentieth held out, 81 updates. When the stage begins it says how many they are.
        limit=51_200,
        args=dict(
            num_train_epochs=1,
            learning_rate=3e-5,  # [N] 3e-6, times ten [L]
            critic_learning_rate=9e-5,  # [I] 9e-6 for its value function, times ten [L]
            lr_scheduler_type="constant_with_warmup",  # [I]
            warmup_steps=10,  # [I]: the first 10 updates
            per_device_train_batch_size=4,  # [M]
            mini_batch_size=64,  # [I]
            num_mini_batches=8,  # 64 x 8 = 512 episodes a rollout [I], [N]
            num_ppo_epochs=1,  # [I]
            rollout_micro_batch_size=128,  # [M]
            max_prompt_length=256,  # 86 % of HH's prompts are shorter (below 1,024 characters)
            response_length=128,  # 92 % of HH's preferred replies are shorter (below 512 characters)
            temperature=1.0,  # [I]
            kl_coef=0.05,  # [N]
            kl_estimator="k1",  # [I], [N]
            cliprange=0.2,  # [I], [N]
            cliprange_value=0.2,  # [N]
            vf_coef=0.1,  # [N]
            gamma=1.0,  # [I], [N]: no discount
            lam=0.95,  # [N]
            whiten_rewards=False,  # TRL's default; the advantages are whitened anyway
            missing_eos_penalty=1.0,  # [N] scores a response without an end -1; TRL's examples subtract 1
            gradient_checkpointing=False,  # [M]
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=10,
            save_steps=10,
            save_total_limit=1,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
