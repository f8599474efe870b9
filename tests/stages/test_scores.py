"""The sources of PPO's reward: their weights, ensembles, normalisation and penalties, and external models."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import BY_NAME
from support.narrow import Narrow
from support.rows import assistant, user
from support.tiny_models import make_tokenizer, save_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_recipes.data.tokens import tokenize_pair
from rlhf_recipes.model.sampler import Sampler, Samples
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.scores import (
    ExternalRewardModel,
    Moments,
    Rewards,
    aggregate_ensemble,
    check_reward_source,
    resolve_rewards,
)


class Spoken:
    """Samples of three responses, the second of which has not ended, and a sampler that knows their texts."""

    def __init__(self, roles: dict[str, list[float]] | None = None) -> None:
        mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
        ids = torch.ones(3, 4).long()
        self.samples = Samples(ids, torch.ones(3, 4).bool(), mask, torch.tensor([True, False, True]))
        self.roles = roles or {}
        self.model = type("Heads", (), {"heads": list(self.roles)})()

    def texts(self, samples: Samples, conversational: bool) -> list[str]:
        return ["one two", "one two three", "one"]

    def reward_scores(self, samples: Samples, role: str = "reward") -> Tensor:
        return torch.tensor(self.roles[role])


ROWS = [{"prompt": f"p{i}", "prompt_ids": [i], "solution": str(i)} for i in range(3)]


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def solved(solution: list[str], **columns: Any) -> list[float]:
    return [10.0 * int(number) for number in solution]


def rewards(tmp_path: Path, sources: Any, roles: Any = None, **options: Any) -> tuple[Rewards, Spoken]:
    spoken = Spoken(roles)
    config = PPOConfig(str(tmp_path), use_cpu=True, **options)
    return Rewards(spoken, config, sources), spoken  # type: ignore[arg-type]


def trained(found: Rewards, spoken: Spoken) -> list[float]:
    return found.training_scores(found.raw(ROWS, spoken.samples)[0], spoken.samples).tolist()


def test_sources_are_weighted_summed_and_logged_apart(tmp_path: Path) -> None:
    roles = {"reward": [1.0, 2.0, 6.0]}
    found, spoken = rewards(tmp_path, ["reward", length, solved], roles, reward_weights=[1.0, -0.5, 0.1])
    wanted = [1.0 - 1.0 + 0.0, 2.0 - 1.5 + 1.0, 6.0 - 0.5 + 2.0]
    assert found.plain(ROWS, spoken.samples)["score"].tolist() == pytest.approx(wanted)
    assert trained(found, spoken) == pytest.approx(wanted)
    logs = found.raw(ROWS, spoken.samples)[1]
    assert logs["rewards/reward_model/mean"] == 3 and logs["rewards/length/mean"] == 2
    assert logs["rewards/solved/std"] == pytest.approx(math.sqrt(200 / 3))


def test_the_role_is_a_source_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no reward: give the shared base a `reward` role"):
        rewards(tmp_path, ["reward"], {"critic": [0.0, 0.0, 0.0]})


def test_as_many_weights_as_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ppo.reward_weights has 1 weights for 2 rewards: length, solved"):
        rewards(tmp_path, [length, solved], reward_weights=[1.0])


def test_penalties_follow_the_clipping(tmp_path: Path) -> None:
    options = {"reward_clip": 2.5, "missing_eos_penalty": 1.0, "length_penalty": 0.1}
    found, spoken = rewards(tmp_path, [length], **options)
    assert trained(found, spoken) == pytest.approx([2.0 - 0.2, 2.5 - 1.0 - 0.3, 1.0 - 0.1])
    assert found.plain(ROWS, spoken.samples)["score"].tolist() == [2.0, 3.0, 1.0], (
        "evaluation reports the source as it is"
    )


def test_an_ensemble_by_hand() -> None:
    members = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]])
    assert aggregate_ensemble(members, "mean", 0.5).tolist() == [3.0, 0.0]
    assert aggregate_ensemble(members, "worst_case", 0.5).tolist() == [1.0, 0.0]
    assert aggregate_ensemble(members, "uncertainty", 0.5)[0].item() == pytest.approx(3 - 0.5 * (4 + 1 + 9) / 3)


@pytest.mark.parametrize("how, wanted", [("mean", [2.0, 2.0, 2.0]), ("worst_case", [1.0, 2.0, 0.0])])
def test_an_ensemble_of_roles_is_one_source(tmp_path: Path, how: str, wanted: list[float]) -> None:
    roles = {"reward": [1.0, 2.0, 0.0], "critic": [9.0, 9.0, 9.0], "reward_1": [3.0, 2.0, 4.0]}
    found, spoken = rewards(tmp_path, ["reward"], roles, ensemble_aggregation=how)
    scores, logs = found.raw(ROWS, spoken.samples)
    assert scores["reward_model"].tolist() == wanted and logs["rewards/reward_model/ensemble_std"] == pytest.approx(1)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    generator = random.Random(0)
    numbers = torch.tensor([generator.gauss(3, 2) for _ in range(50)])
    found = Moments()
    for part in numbers.split([1, 7, 30, 12]):
        found.add(part)
    assert found.count == 50 and found.mean == pytest.approx(numbers.mean().item())
    assert found.square / 50 == pytest.approx(numbers.var(correction=0).item())
    normal = found.normalize(numbers)
    assert normal.mean().item() == pytest.approx(0, abs=1e-6) and normal.var(correction=0).item() == pytest.approx(1)


def test_running_and_fixed_normalisation(tmp_path: Path) -> None:
    for kind in ("running", "sft"):
        found, spoken = rewards(tmp_path, ["reward"], {"reward": [1.0, 2.0, 3.0]}, reward_normalization=kind)
        deviation = math.sqrt(2 / 3)
        assert trained(found, spoken) == pytest.approx([-1 / deviation, 0, 1 / deviation])
        spoken.roles["reward"] = [4.0, 5.0, 6.0]
        seen = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] if kind == "running" else [1.0, 2.0, 3.0]
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        wanted = [(x - mean) / deviation for x in (4.0, 5.0, 6.0)]
        again, _ = rewards(tmp_path, ["reward"], spoken.roles, reward_normalization=kind)
        again.load_state_dict(json.loads(json.dumps(found.state_dict())))
        assert trained(found, spoken) == pytest.approx(wanted)
        assert trained(again, spoken) == pytest.approx(wanted)


def test_each_source_is_normalised_by_itself(tmp_path: Path) -> None:
    found, spoken = rewards(tmp_path, [length, solved], reward_normalization="running", reward_weights=[1.0, 2.0])
    deviation = math.sqrt(2 / 3)
    wanted = [0.0 - 2 / deviation, 1 / deviation + 0.0, -1 / deviation + 2 / deviation]
    assert trained(found, spoken) == pytest.approx(wanted, abs=1e-5)


def test_trls_own_reward_functions_work(tmp_path: Path) -> None:
    (own,) = resolve_rewards(["trl.rewards:think_format_reward"])
    found, spoken = rewards(tmp_path, [own])
    spoken.texts = lambda *arguments: ["<think>so</think> 4", "4", "<think>so 4"]  # type: ignore[method-assign]
    rows = [{"prompt": [{"role": "user", "content": "2 + 2"}], "prompt_ids": [1]}] * 3
    assert found.plain(rows, spoken.samples)["score"].tolist() == [1.0, 0.0, 0.0]


def test_what_a_chat_template_writes_around_an_answer_reaches_no_reward_function(tmp_path: Path) -> None:
    tokenizer = BY_NAME["qwen3"].tokenizer()
    prompt, ids = tokenize_pair(tokenizer, [user("2 + 2?")], [assistant("four")])
    mask = torch.ones(1, len(ids)).bool()
    samples = Samples(torch.tensor([prompt + ids]), torch.ones(1, len(prompt + ids)).bool(), mask, torch.tensor([True]))
    seen = {}

    def judge(completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(completions=completions, completion_ids=completion_ids)
        return [0.0]

    model = Spoken().model
    scores = Rewards(Sampler(model, tokenizer, 8, 1.0, 1, []), PPOConfig(str(tmp_path), use_cpu=True), [judge])
    scores.function_scores({"judge": judge}, [{"prompt": [user("2 + 2?")], "prompt_ids": prompt}], samples)
    assert seen == {"completions": [[assistant("four")]], "completion_ids": [ids]}


# External models


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_external_model_scores_texts_with_its_own_tokenizer(classifier: Path) -> None:
    model = ExternalRewardModel(str(classifier), batch_size=2)
    prompts, completions = ["w5 w6", "w7", "w8 w9 w10 "], [" w11", " w12 w13 w14", "w15"]
    scores = model(prompts, completions, solution=["a", "b", "c"])
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier)
    for score, prompt, completion in zip(scores, prompts, completions, strict=True):
        with torch.no_grad():
            alone = plain(**tokenizer(prompt + completion, return_tensors="pt")).logits[0, 0].item()
        assert score == pytest.approx(alone, abs=1e-5)
    assert len(set(scores)) == 3


def test_long_texts_go_through_an_external_model_few_at_a_time(classifier: Path) -> None:
    model, texts = ExternalRewardModel(str(classifier)), ["w5 " * 1800, *["w6 " * n for n in (1700, 9, 1600, 3, 1500)]]
    with Narrow(model.model, rows=3) as narrow:
        scores = model([""] * 6, texts)
    assert scores == pytest.approx([model([""], [text])[0] for text in texts], abs=1e-5)
    assert max(narrow.tokens) <= 2**13 and narrow.refused == 1 and max(narrow.rows) == 2


def test_an_external_model_scores_messages_in_its_own_template(classifier: Path) -> None:
    model = ExternalRewardModel(str(classifier))
    prompts, completions = [[{"role": "user", "content": "w5 w6"}]], [[{"role": "assistant", "content": "w7"}]]
    with pytest.raises(ValueError, match="has no chat template, and the prompts are messages"):
        model(prompts, completions)
    model.tokenizer.chat_template = "{% for m in messages %}w20 {{ m.content }} {% endfor %}w21"
    assert model(prompts, completions) == pytest.approx(model(["w20 w5 w6 "], ["w20 w7 w21"]))
    dated = ExternalRewardModel(str(classifier), today="2026-03-30")
    dated.tokenizer.chat_template = "w{{ strftime_now('%d') }}{% for m in messages %} {{ m.content }}{% endfor %}"
    assert dated(prompts, completions) == pytest.approx(model(["w30 w5 w6"], [" w7"]))


def test_no_response_spells_a_special_token_of_an_external_model(classifier: Path) -> None:
    model = ExternalRewardModel(str(classifier))
    read: list[list[int]] = []
    tokenizer, pad = model.tokenizer, model.tokenizer.pad
    tokenizer.pad = lambda rows, **options: read.extend(rows["input_ids"]) or pad(rows, **options)
    spelled, broken = "w7 <eos> w8 <<bos>bos>", "w7 < eos> w8 << bos>bos>"
    plain = model(["w5 <eos>"], [spelled])  # whose author may have meant it
    assert plain == model(["w5 <eos>"], [broken]) and read[0] == read[1] and read[0].count(2) == 1 and 1 not in read[0]
    tokenizer.chat_template = "{% for m in messages %}w20 {{ m.content }} <eos> {% endfor %}"
    read.clear()
    for said in (spelled, broken):
        model([[{"role": "user", "content": said}]], [[{"role": "assistant", "content": said}]])
    assert read[0] == read[1] and read[0].count(2) == 2 and 1 not in read[0]


def test_sources_are_checked_before_anything_is_loaded(classifier: Path, tmp_path: Path) -> None:
    check_reward_source(str(classifier), has_reward_stage=False)
    check_reward_source("reward", has_reward_stage=True)
    with pytest.raises(ValueError, match="the recipe has no reward stage"):
        check_reward_source("reward", has_reward_stage=False)
    with pytest.raises(ValueError, match="has no function 'nothing'"):
        check_reward_source(f"{write(tmp_path)}:nothing", has_reward_stage=True)
    with pytest.raises(ValueError, match=r"'nowhere/to-be-found' is not 'reward', no function .* and no model"):
        check_reward_source("nowhere/to-be-found", has_reward_stage=True)
    with pytest.raises(ValueError, match="has 2 labels, and a reward model has one"):
        check_reward_source(str(save_model(tmp_path / "language")), has_reward_stage=True)


def write(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text("def score(completions, **columns):\n    return [1.0 for _ in completions]\n")
    return tmp_path / "mine.py"


def test_functions_are_sources_as_they_are() -> None:
    assert resolve_rewards([length, "reward", solved]) == [length, "reward", solved]


def test_names_resolve_to_sources(classifier: Path, tmp_path: Path) -> None:
    role, own, external = resolve_rewards(["reward", f"{write(tmp_path)}:score", str(classifier)])
    assert role == "reward" and own.__name__ == "score" and own(["a", "b"]) == [1.0, 1.0]  # type: ignore[union-attr]
    assert isinstance(external, ExternalRewardModel) and external.__name__ == classifier.name
