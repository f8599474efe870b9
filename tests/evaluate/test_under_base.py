"""What the bare base says of answers: log-likelihoods against transformers' own, and what they make by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_tokenizer, save_model
from transformers import AutoModelForCausalLM

from rlhf_recipes import Base, Lora, Recipe
from rlhf_recipes.evaluate.models import Answer, Bench, Cache
from rlhf_recipes.evaluate.under_base import about_prompts, panel_under_base


def test_log_likelihoods_are_the_bases_own(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    bench = Bench(Recipe("bench", Base(str(folder)), lora=Lora(r=4)), Cache(tmp_path / "cache.jsonl"), batch_size=2)
    contexts, continuations = [[5, 6, 7], [8], [9, 10, 11, 12]], [[20, 21], [22, 23, 24], [25]]
    found = bench.log_likelihoods(contexts, continuations)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for context, continuation, value in zip(contexts, continuations, found, strict=True):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            log_probs = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        expected = sum(log_probs[place, token].item() for place, token in enumerate(continuation))
        assert value == pytest.approx(expected, abs=1e-4)
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 3
    assert bench.log_likelihoods(contexts, continuations) == found, "it is kept"


class Counting:
    """A bench to which a text is the likelier the more of its words stood before it: half a nat a word."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()

    def log_likelihoods(self, contexts: list[list[int]], continuations: list[list[int]]) -> list[float]:
        pairs = zip(contexts, continuations, strict=True)
        return [-0.5 * sum(token not in context for token in continuation) for context, continuation in pairs]


def answers(*texts: str) -> list[Answer]:
    tokenizer = make_tokenizer()
    return [
        Answer(str(row), "ppo", row, 0, tokenizer(text)["input_ids"], True, 0.0, text) for row, text in enumerate(texts)
    ]


def test_an_answer_is_about_its_prompt_where_it_tells_more_of_it_than_the_next_answer() -> None:
    bench: Any = Counting()
    rows = [{"prompt": f"w{n} w{n + 1}", "prompt_ids": [n, n + 1]} for n in (10, 20, 30)]
    assert about_prompts(bench, rows, answers("w10 w50", "w20 w51", "w31")) == [1, 1, 1]
    assert about_prompts(bench, rows, answers("w50", "w50", "w50")) == [0.5] * 3, "one sentence for everything"
    assert about_prompts(bench, rows, answers("w20", "w10", "w40")) == [0, 0.5, 0.5]
    panel = panel_under_base(bench, rows, answers("w10 w50", "w20 w51", "w31"))
    assert panel == {"base_perplexity": pytest.approx(math.exp(0.5 * 2 / 5)), "about_prompt": 1.0}
    assert "about_prompt" not in panel_under_base(bench, rows[:1], answers("w10"))
