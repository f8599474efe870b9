"""Never run at its own size: Gemma 3 4B on Anthropic's HH, its base in 16 bits, for one GPU with 24 GB.

    hf auth login
    rlhf-recipes run gemma-3-4b-hh
    rlhf-recipes run gemma-3-4b-hh base.quantization=nf4

It was run whole with a random model of its architecture in the base's place. The model is behind Google's licence:
accept it on the model's page of the Hugging Face Hub first.

Hardware: one GPU with 24 GB, by `rlhf-recipes plan gemma-3-4b-hh --gpu 24GiB`; with the last line one with 16 GB. A
GPU without bfloat16 (T4, RTX 20) will not do: Gemma's hidden states are too large for float16, and the run says so
before it starts. Time: not measured.

The model sees as well, with a tower in front that gets no adapters and no pictures here. The expected curves are those
of `qwen3_0_6b_hh.py`, from which this recipe derives by `smollm3_3b_hh.py`.
"""

from rlhf_recipes import load, main, replace

recipe = replace(load("smollm3-3b-hh"), name="gemma-3-4b-hh", base={"model": "google/gemma-3-4b-pt"})

if __name__ == "__main__":
    main(recipe)
