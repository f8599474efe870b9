"""A real language model learns to answer in a good mood (Ziegler et al.), with InstructGPT's stages, on a laptop.

    python tests/benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data stanfordnlp/imdb

does all of it, which by hand is

    R=runs/smollm2-sentiment
    rlhf-recipes sample smollm2-sentiment --temperatures 0.7 --limit 640 --out $R/feedback/base.jsonl
    rlhf-recipes run smollm2-sentiment --stages sft
    rlhf-recipes sample $R --models sft --temperatures 0.7 --limit 834
    rlhf-recipes label $R/feedback/samples.jsonl --by rlhf_recipes.worlds.sentiment:labeler
    rlhf-recipes run smollm2-sentiment
    rlhf-recipes evaluate $R --under-base

Without `--by` the fourth command opens the page on which people rank, and they take the labelers' place. Other
questions are asked with `ppo.data=FILE` in the first, second and fifth command: a file of prompts or of comparisons,
whose first human turns are the questions.

Demonstrations are the best by gold of four samples of the base to each prompt. The 5,000 comparisons are rankings of
four samples of the SFT model to each of 834 prompts (six pairs each), by simulated labelers who agree with VADER in
73 % of the pairs. Nothing is ever trained on gold itself.

What to expect (recipes/README.md has the run): a reward model that is right on 60 % of held-out pairs, gold from 0.19
(SFT) to 0.76 and 88 % wins within 30 updates, at a KL of 7; and a policy that offers its help with joy whatever was
asked: the share of its answers that are about the question falls from 93 to 53 %, of bigrams that are distinct from
0.81 to 0.17. With half as many updates a second run won 70 % and kept 77 % and 0.76 (`smollm2-sentiment-frontier`).

Hardware: any GPU, or 2 CPU cores, an estimated 77 minutes, of which PPO's part was 57 with other work beside it. The
estimate: one core of an AMD EPYC, in bfloat16 and with questions of HH, took 0.2 s for a sample, 0.5 s for a row of
SFT, 1.2 s for a ranking of the reward model, and 72 s for an update of PPO, 64 episodes (13 to sample, 25 to score, 33
to train). Two cores are reckoned as 1.8, which was not measured. So the base's 2,560 samples take 5 minutes, SFT 5, the
SFT model's 3,336 samples 6, the reward model 9, PPO's 60 updates 40 and its evaluations 7, and `evaluate` 5. A CPU that
does not multiply in bfloat16 (`avx512_bf16` in /proc/cpuinfo) runs in float32, where sampling took half as long again
and scoring 1.5 to 1.8 times as long.

Sources: [T] chosen for this model, and not tuned. [L] LoRA Without Regret, Thinking Machines Lab, 2025. [N] The N+
implementation details of RLHF with PPO, arXiv:2403.17031. [I] InstructGPT, arXiv:2203.02155. [M] speed and memory.
"""

from rlhf_recipes import Base, PPOStage, Recipe, Stage, main

FEEDBACK = "runs/smollm2-sentiment/feedback"

recipe = Recipe(
    name="smollm2-sentiment",
    # arXiv:2502.02737; Apache-2.0. Its own chat template is ChatML with a system prompt: two dozen tokens in each row.
    base=Base("HuggingFaceTB/SmolLM2-135M-Instruct", chat_template="chatml"),
    gold="rlhf_recipes.worlds.sentiment:gold",
    sft=Stage(
        data=f"{FEEDBACK}/base.jsonl",
        convert="rlhf_recipes.worlds.sentiment:demonstrations",
        heldout=0.1,
        args=dict(
            learning_rate=2e-4,  # [L]: about ten times that of full fine-tuning
            lr_scheduler_type="cosine",  # [I]
            num_train_epochs=2,  # [T]
            per_device_train_batch_size=32,  # [I]
            max_length=104,
            gradient_checkpointing=False,  # [M]
        ),
    ),
    reward=Stage(
        data=f"{FEEDBACK}/samples.labels.jsonl",
        heldout=0.1,
        args=dict(
            learning_rate=2e-4,  # [L]
            lr_scheduler_type="cosine",  # [I]
            num_train_epochs=1,  # [I], [N]
            per_device_train_batch_size=8,  # rankings, of six pairs each: 48 comparisons, [I], [N] 64
            max_length=104,
            gradient_checkpointing=False,  # [M]
        ),
    ),
    ppo=PPOStage(
        data="stanfordnlp/imdb",
        convert="rlhf_recipes.worlds.sentiment:prompts",
        heldout=0.1,
        heldout_limit=192,
        args=dict(
            total_episodes=3_840,  # 60 updates [T]
            learning_rate=2e-4,  # [T]
            lr_scheduler_type="linear",  # [N]
            per_device_train_batch_size=16,  # [M]
            gradient_accumulation_steps=2,  # [M]
            num_mini_batches=2,  # 2 x 32 = 64 episodes a rollout [T]
            num_ppo_epochs=1,  # [I]
            rollout_micro_batch_size=64,  # [M]
            max_prompt_length=72,
            response_length=32,
            temperature=0.7,  # [T]: at 1 the smallest model of its family often says what is no language
            missing_eos_penalty=1.0,  # TRL's examples
            kl_coef=0.05,  # [N]
            gradient_checkpointing=False,  # [M]
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=15,
            save_steps=5,
            save_total_limit=1,
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
