import subprocess
import sys
from random import Random

import pytest

from rlhf_recipes.worlds import tiny
from rlhf_recipes.worlds.tiny import world


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def gold(request, reply):
    return tiny.gold([user(request)], [assistant(reply)], anything=[1])[0]


@pytest.mark.parametrize(
    ("request_", "reply", "expected"),
    [
        ("What is 3 plus 5?", "8", 2.0),
        ("What is 3 plus 5?", "8.", 2 - 0.01),
        ("What is 3 plus 5?", "Sure. 8.", 2 + 0.5 - 0.07),
        ("What is 3 plus 5?", "Sure. 8. Have a nice day!", 2 + 0.5 - 0.4 - 0.24),
        ("Quick question. Calculate 6 minus 3.", "6 minus 3 is 3.", 2 - 0.14),
        ("What is 3 plus 5?", "9.", -0.01),
        ("What is 3 plus 5?", "8 9.", -0.03),
        ("What is 3 plus 5?", "8, you fool.", 2 - 1 - 0.11),
        ("What is the opposite of hot?", "Why do you ask?", -0.5 - 0.11),
        ("Name the capital of Italy.", "rome", 2.0),
        ("Say moon 3 times.", "moon moon moon", 2.0),
        ("Say moon 3 times.", "moon moon", 0.5 * 2 / 3),
        ("Say moon 3 times.", "moon moon moon moon", 0.5 * 3 / 4 - 0.05),
        ("Which number is bigger: 7 or 2?", "7 or 2", -0.05),
        ("I am Mark. Welcome me.", "It is it is it is it is Mark", 2 - 0.24 - 0.1 * (6 - 2)),
        ("I am Mark. Welcome me.", "  <|end|>", -2.0),
    ],
)
def test_gold_by_hand(request_, reply, expected):
    assert gold(request_, reply) == pytest.approx(expected)


def test_gold_reads_rendered_text():
    rendered = "User: What is 3 plus 5?\nAssistant:"
    assert tiny.gold([rendered], [" Sure. 8.<|end|>"]) == [gold("What is 3 plus 5?", "Sure. 8.")]


def test_gold_refuses_a_foreign_request():
    with pytest.raises(ValueError, match="no request 'Who am I\\?'"):
        gold("Who am I?", "Nobody.")


def test_every_style_is_right_and_what_was_asked_weighs_most():
    rng = Random(0)
    for _ in range(3000):
        request = world.draw_request(rng)
        assert world.parse(request.text) == request
        right = world.draw_answer(rng, request, world.choose(rng, world.STYLES))
        assert world.correctness(request, world.split_words(right)) == 2.0, (request.text, right)
        others = [world.draw_answer(rng, request, fault) for fault in ("wrong", "evasive")]
        assert all(gold(request.text, right) > gold(request.text, other) for other in others), (right, others)


def test_labelers_agree_with_gold_as_instructgpts_did():
    rows = tiny.comparisons()
    agreed = 0
    for row in rows:
        assert row["chosen"] != row["rejected"]
        chosen, rejected = tiny.gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        agreed += chosen > rejected
    assert agreed / len(rows) == pytest.approx(0.73, abs=0.015)


def test_data_are_deterministic_and_prompts_distinct():
    for source in (tiny.demonstrations, tiny.comparisons, tiny.prompts):
        assert source() == source()
    texts = [row["prompt"][0]["content"] for row in tiny.prompts()]
    assert len(set(texts)) == len(texts)
    demonstrated = {row["prompt"][0]["content"] for row in tiny.demonstrations()}
    compared = {row["prompt"][0]["content"] for row in tiny.comparisons()}
    assert len(set(texts) - demonstrated - compared) > 500


def test_importing_the_room_loads_no_torch():
    code = "import sys, rlhf_recipes.worlds.tiny; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_base_loads_and_its_chat_template_has_the_prefix_property(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.build_base(tmp_path, steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert 1e6 < model.num_parameters() < 5e6
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    row = tiny.demonstrations()[0]
    turns = row["prompt"] + row["completion"]
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(prompt)] == prompt
    assert whole["input_ids"][-1] == tokenizer.eos_token_id
    assert whole["assistant_masks"] == [0] * len(prompt) + [1] * (len(whole["input_ids"]) - len(prompt))
    assert tokenizer.decode(tokenizer("Grüße, 你好!")["input_ids"]) == "Grüße, 你好!"
