"""Never run at its own size: Llama-3.1-8B on HelpSteer3, 4-bit, for one GPU with 16 or 24 GB.

    hf auth login
    rlhf-recipes run llama-3-1-8b-helpsteer3

It was run whole with a random model of its architecture in the base's place. The model is behind Meta's licence: accept
it on the model's page of the Hugging Face Hub first.

Hardware: one GPU with 16 GB, by `rlhf-recipes plan llama-3-1-8b-helpsteer3 --gpu 16GiB`, or more. Time: not measured.

HelpSteer3's 38,000 comparisons are by people, with their strength, which becomes the pair's weight: conversations about
general matters, STEM and code, and in 13 languages other than English.

The base has neither a chat format nor a token to pad with; the first is the transcript's, and for the second a token is
taken that its tokenizer reserves. Other sources are those of `mistral_7b_hh.py`, from which this recipe derives.
"""

from rlhf_recipes import load, main, replace

recipe = replace(
    load("mistral-7b-hh"),
    name="llama-3-1-8b-helpsteer3",
    base={"model": "meta-llama/Llama-3.1-8B"},
    sft={
        "data": "helpsteer3",
        "max_length": 1_024,  # PPO's prompt and response together
    },
    reward={"data": "helpsteer3", "max_length": 1_024},
    ppo={
        "data": "helpsteer3",
        "max_prompt_length": 640,  # conversations of several turns
        "response_length": 384,
    },
)

if __name__ == "__main__":
    main(recipe)
