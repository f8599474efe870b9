"""Never run at its own size: DPO on the demonstrations and comparisons of `smollm2-sentiment`.

    rlhf-recipes run smollm2-sentiment-dpo

It takes them where the first four commands of that recipe have left them. To compare it with PPO on the same prompts:

    rlhf-recipes evaluate runs/smollm2-sentiment --models base,sft,ppo,runs/smollm2-sentiment-dpo:dpo

Hardware: as `smollm2-sentiment`. Its time was not measured.

Sources: [D] DPO, arXiv:2305.18290. [L] LoRA Without Regret, Thinking Machines Lab, 2025. [M] speed; no result.
"""

from rlhf_recipes import DPOStage, load, main, replace

parent = load("smollm2-sentiment")
assert parent.reward is not None

recipe = replace(
    parent,
    name="smollm2-sentiment-dpo",
    reward=None,
    ppo=None,
    dpo=DPOStage(
        data=parent.reward.data,
        convert="rlhf_recipes.worlds.sentiment:comparisons",
        prompts=parent.reward.data,  # those of them that are held out
        heldout=0.1,
        args=dict(
            beta=0.1,  # [D]
            learning_rate=1e-4,  # [L]
            lr_scheduler_type="linear",  # [D], without its warm-up
            num_train_epochs=1,
            per_device_train_batch_size=32,
            max_length=104,
            response_length=32,
            temperature=0.7,
            gradient_checkpointing=False,  # [M]
        ),
    ),
)

if __name__ == "__main__":
    main(recipe)
