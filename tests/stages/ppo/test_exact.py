"""The first forward of an update is the one that scored, to the bit and in every dtype, or is the only one."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import SHARED
from support.ppo import PROMPTS, Make, Small, rows_of, share_of_w7, shared_base, weights

from rlhf_recipes.model.base import load_tokenizer
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.ppo.trainer import EXACT

STORIES = SHARED / "models" / "stories260K"

# Two mini-batches of six episodes, in micro-batches of four and two.
SPLIT = {"mini_batch_size": 6, "per_device_train_batch_size": 4, "num_mini_batches": 2, "total_episodes": 12}
FIRST = ("policy/approxkl_avg", "policy/clipfrac_avg", EXACT)
ESTIMATORS: list[dict[str, Any]] = [
    {"advantage_estimator": "gae"},
    {"advantage_estimator": "rloo", "num_generations": 2},
    {"advantage_estimator": "grpo", "num_generations": 2},
    {"advantage_estimator": "reinforce++"},
]


def first_log(folder: Path, make: Make, kind: type[SharedBase] = SharedBase, **given: Any) -> dict[str, float]:
    base = {"dtype": "bfloat16", "quantization": given.pop("quantization", None)}
    roles = ("policy", "reference", *(["critic"] if given.get("advantage_estimator", "gae") == "gae" else []))
    model = shared_base(folder, kind, roles=roles, **base)
    prompts = [PROMPTS[row % 12] for row in range(24)]
    trainer = make(model, prompts, reward_funcs=share_of_w7, bf16=True, stop_token_ids=range(4, 8), **given)
    trainer.train()
    return trainer.state.log_history[0]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda given: given["advantage_estimator"])
def test_in_16_bits_the_first_pass_has_ratio_one_to_the_bit(folder: Path, make: Make, estimator: Any) -> None:
    log = first_log(folder, make, num_ppo_epochs=1, learning_rate=0.0, response_length=20, **SPLIT, **estimator)
    assert [log[name] for name in FIRST] == [0, 0, 0] and log["objective/kl"] == 0
    assert abs(log["val/ratio"] - 1) < 1e-15


def test_on_a_4bit_base_under_checkpointing_too(folder: Path, make: Make) -> None:
    given = SPLIT | {"num_ppo_epochs": 1, "learning_rate": 0.0, "response_length": 20, "gradient_checkpointing": True}
    log = first_log(folder, make, quantization="nf4", **given)
    assert [log[name] for name in FIRST] == [0, 0, 0]


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not beside this checkout")
def test_on_a_real_model_too_whose_later_passes_have_noise(make: Make) -> None:
    base = Base(str(STORIES), dtype="bfloat16")
    model = shared_base(STORIES, dtype="bfloat16")
    model.packs_rows = False  # packed, a row on a CPU rounds alike whatever is beside it
    given = SPLIT | {"num_ppo_epochs": 2, "learning_rate": 0.0, "response_length": 40, "bf16": True}
    trainer = make(model, PROMPTS, load_tokenizer(base), stop_token_ids=(), **given)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log[EXACT] == 0 and log["objective/kl"] == 0
    assert 0.005 < log["val/batching_noise"] < 0.1


def test_later_passes_have_a_noise_that_is_measured_unless_they_are_the_same(folder: Path, make: Make) -> None:
    class Padded(SharedBase):
        packs_rows = False

    given = {"num_ppo_epochs": 2, "learning_rate": 0.0, "response_length": 20}
    log = first_log(folder, make, Padded, **given, **SPLIT)
    assert log[EXACT] == 0 < log["policy/approxkl_avg"]
    # approxkl is half the squared log-ratio: over both passes, one of which has none, a quarter of the variance.
    assert log["policy/approxkl_avg"] == pytest.approx(log["val/batching_noise"] ** 2 / 4, rel=1)
    one = first_log(folder, make, Padded, **given, **SPLIT | {"mini_batch_size": 12, "num_mini_batches": 1})
    assert [one[name] for name in FIRST] == [0, 0, 0] and "val/batching_noise" not in one


@pytest.mark.parametrize("warmup", [0, 1])
def test_where_memory_runs_out_in_the_update_it_is_scored_anew(folder: Path, make: Make, warmup: int) -> None:
    """The update needs more than scoring: here it has room for two rows, and scoring for as many as there are."""

    class Update(Small):
        def generate(self, *args: Any) -> Any:
            return SharedBase.generate(self, *args)

        def states(self, *args: Any) -> Any:
            return super().states(*args) if torch.is_grad_enabled() else SharedBase.states(self, *args)

    sizes = {"mini_batch_size": 6, "per_device_train_batch_size": "auto", "num_mini_batches": 2, "total_episodes": 24}
    given = {"num_ppo_epochs": 1, "learning_rate": 0.0, "response_length": 20, "critic_warmup_steps": warmup}
    log = first_log(folder, make, Update, rollout_micro_batch_size=12, **given, **sizes)
    assert log["auto/per_device_train_batch_size"] == 1
    if not warmup:
        assert [log[name] for name in FIRST] == [0, 0, 0]


def test_a_forward_that_differs_is_warned_of_once(folder: Path, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Differing(SharedBase):
        def log_probs(self, *args: Any, **kwargs: Any) -> Any:
            found, entropy = super().log_probs(*args, **kwargs)
            return found + 1e-3 * torch.is_grad_enabled(), entropy

    log = first_log(folder, make, Differing, **SPLIT | {"total_episodes": 24})
    assert log[EXACT] == pytest.approx(1e-3, rel=1e-2)
    assert caplog.text.count("a token's log-ratio was 0.001") == 1


class Counting(SharedBase):
    """Counts the forwards of the language model's head, by role and whether they have a graph."""

    def log_probs(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("forwards", Counter())[self.active, torch.is_grad_enabled()] += 1
        return super().log_probs(*args, **kwargs)


ONE_STEP = {"num_ppo_epochs": 1, "mini_batch_size": 12, "total_episodes": 12, "max_grad_norm": 0.0, "optim": "sgd"}
GRPO = {"advantage_estimator": "grpo", "num_generations": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1}


WHOLE = {"per_device_train_batch_size": 12}


@pytest.mark.parametrize("given, forwards, apart", [(WHOLE, 1, 1), (WHOLE | {"num_ppo_epochs": 2}, 2, 1), (GRPO, 3, 3)])
def test_an_update_of_one_mini_batch_scores_no_policy_and_is_the_same(
    folder: Path, make: Make, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], forwards: int, apart: int
) -> None:
    found = []
    for scored in (False, True):
        if scored:
            monkeypatch.setattr(PPOConfig, "keeps_forward", False)
            monkeypatch.setattr(PPOConfig, "scores_policy", True)
        trainer = make(shared_base(folder, Counting, policy_seed=2), **ONE_STEP | given)
        trainer.train()
        counts = trainer.model.__dict__["forwards"]
        assert counts["policy", True] == forwards and counts["policy", False] == (apart if scored else 0)
        found.append((weights(trainer, "policy"), trainer.state.log_history[0]))
    assert torch.equal(found[0][0], found[1][0])
    for name in ("objective/kl", "objective/entropy", "policy/entropy_avg", "loss/policy_avg", *FIRST):
        assert found[0][1][name] == found[1][1][name], name
    assert found[0][1]["objective/kl"] != 0


def test_what_asks_for_log_probs_before_the_step_has_them_scored(make: Make) -> None:
    for given in ({"kl_coef": 0.1}, {"kl_coef": 0.0, "max_kl": 5.0}, {"kl_coef": 0.0, "num_ppo_epochs": 2}):
        assert make(**ONE_STEP | given).config.scores_policy
    assert not make(**ONE_STEP, kl_coef=0.0).config.scores_policy
    trainer = make(**ONE_STEP | GRPO, kl_coef=0.3)
    rollout = trainer.rollout([row for row in rows_of(PROMPTS[:6]) for _ in range(2)])
    assert not rollout.log_probs.any() and rollout.ref_log_probs.any()
