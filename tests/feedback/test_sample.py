"""Which prompts are sampled."""

from datasets import Dataset

from rlhf_recipes.feedback.sample import different_prompts, prompt_id


def test_a_limit_draws_prompts_like_the_whole() -> None:
    prompts = [f"{'red' if n < 300 else 'blue'} {n}" for n in range(600)]
    table = Dataset.from_dict({"prompt": prompts + prompts[:50], "number": list(range(650))})
    everything = different_prompts(table)
    assert [row["number"] for _, row in everything] == list(range(600)), "the first row of each, in their order"
    assert all(key == prompt_id(row["prompt"]) for key, row in everything)
    drawn = different_prompts(table, 100)
    assert 33 < sum(row["number"] < 300 for _, row in drawn) < 67
    assert drawn == different_prompts(table, 120)[:100]
