"""Never run at its own size: Qwen3-4B on TL;DR, summaries of Reddit posts, its base in 16 bits, for one GPU with 24 GB.

    rlhf-recipes run qwen3-4b-tldr
    python recipes/qwen3_4b_tldr.py base.quantization=nf4

It was run whole with a random model of its architecture in the base's place.

Hardware: one GPU with 24 GB, by `rlhf-recipes plan qwen3-4b-tldr --gpu 24GiB`; with the second line one with 16 GB.
Time: not measured.

What to expect, from the papers and not from a run of this file: it is the task of Stiennon et al. (arXiv:2009.01325),
with 93,000 comparisons by people, which [N] has repeated: with Pythia its reward models are right on 0.63, 0.67 and
0.69 of the held-out pairs at 1, 2.8 and 6.9 billion parameters. Posts and summaries are plain text: a summary goes on
where the post ends, with "TL;DR:".

Sources beside those of `qwen3_0_6b_hh.py`, from which this recipe derives: [N] there. [M] what fits in memory.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("qwen3-0-6b-hh"),
    name="qwen3-4b-tldr",
    base={"model": "Qwen/Qwen3-4B-Base"},
    sft={
        "data": "tldr",
        "learning_rate": 3e-5,  # [N] 3e-6, times ten
        "max_length": 576,  # PPO's prompt and response together
        "gradient_checkpointing": True,  # [M]
    },
    reward={
        "data": "tldr",
        "learning_rate": 3e-5,  # [N] 3e-6, times ten
        "max_length": 576,
        "gradient_checkpointing": True,  # [M]
    },
    ppo={
        "data": "tldr",
        "max_prompt_length": 512,  # [N]
        "response_length": 64,  # [N] 53 of GPT-2's tokens
        "temperature": 0.7,  # [N]
        "per_device_train_batch_size": "auto",  # [M]
        "rollout_micro_batch_size": "auto",  # [M]
        "gradient_checkpointing": True,  # [M]
    },
)

if __name__ == "__main__":
    main(recipe)
