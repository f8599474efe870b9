"""How much a token's log-probability depends on the rows beside it, in each precision.

    python tests/benchmarks/precision.py --model FOLDER [--dtypes float32,bfloat16,bfloat16+nf4,float16]

32 answers of the model itself, sampled in float32 or, on a GPU, in its first precision, of unequal lengths. The same
tokens are scored 32 rows at a time and 4 at a time, in random order: the standard deviation and the largest difference,
in nats. `+nf4` after a dtype quantizes the base to 4 bits and computes in that dtype.
"""

import argparse
import time
from typing import Any

import torch

from rlhf_recipes import Base, Lora, SharedBase
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.model.sampler import Sampler, Samples

TOPICS = ("rain", "bread", "trains", "whales", "salt", "bees", "iron", "paper", "the moon", "ships", "glass", "tea")
TOPICS += ("coal", "wool", "clocks", "bridges")
QUESTIONS = [form.format(topic) for topic in TOPICS for form in ("What is {}?", "Tell me a short story about {}.")]
LENGTH = 48


def sampler(model: str, precision: str) -> Sampler:
    """The model with an adapter of a policy, in `float32`, `bfloat16`, `float16` or one of them `+nf4`."""
    dtype, _, quantization = precision.partition("+")
    base = Base(model, dtype=dtype, quantization=quantization or None)  # type: ignore[arg-type]
    shared = SharedBase(load_base(base), Lora())
    shared.add_role("policy", trainable=True)
    return Sampler(shared, load_tokenizer(base), LENGTH, 1.0, 32, ())


def samples(source: Sampler) -> Samples:
    """Answers to the questions, each cut at a length of its own."""
    torch.manual_seed(0)
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts: Any = source.tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    drawn = source.sample("policy", [list(ids) for ids in prompts["input_ids"]])
    lengths = torch.linspace(8, LENGTH, len(asked), device=drawn.input_ids.device)[torch.randperm(len(asked)), None]
    mask = drawn.response_mask & (torch.arange(drawn.response_mask.shape[1], device=lengths.device) < lengths)
    attention = torch.cat([drawn.attention_mask[:, : -mask.shape[1]], mask], 1)
    return Samples(drawn.input_ids, attention, mask, drawn.ended)


def main() -> None:
    """Print a line for each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a chat model: Hub id or folder")
    parser.add_argument("--dtypes", default="float32,bfloat16,bfloat16+nf4,float16")
    given = parser.parse_args()
    drawn = None
    for precision in given.dtypes.split(","):
        scorer = sampler(given.model, precision)
        drawn = drawn or samples(scorer)
        mask = drawn.response_mask
        order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(1))
        start = time.perf_counter()
        together, _ = scorer.log_probs("policy", drawn, batches=[torch.arange(len(mask))])
        seconds = time.perf_counter() - start
        apart, _ = scorer.log_probs("policy", drawn, batches=order.split(4))
        difference = (together - apart)[mask]
        print(f"{precision}: {difference.std().item():.2g} nats, at most {difference.abs().max().item():.2g}; ", end="")
        print(f"{int(mask.sum())} tokens, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
