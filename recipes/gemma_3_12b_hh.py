"""Never run at its own size: Gemma 3 12B on Anthropic's HH, 4-bit, for one GPU with 24 GB.

    hf auth login
    rlhf-recipes run gemma-3-12b-hh
    python recipes/gemma_3_12b_hh.py ppo.kl_coef=0.1

Hardware: one GPU with 24 GB, by `rlhf-recipes plan gemma-3-12b-hh --gpu 24GiB`. Time: not measured. What else is to be
known of the model stands in `gemma_3_4b_hh.py`, and the expected curves in `mistral_7b_hh.py`, from which this recipe
derives.
"""

from rlhf_recipes import load, main, replace

recipe = replace(load("mistral-7b-hh"), name="gemma-3-12b-hh", base={"model": "google/gemma-3-12b-pt"})

if __name__ == "__main__":
    main(recipe)
