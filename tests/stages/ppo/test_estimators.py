"""The advantage estimators without a critic."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo import PROMPTS, Make, ppo_config, rows_of, share_of_w7, shared_base, weights


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce++"])
def test_advantages_compare_the_responses_to_one_prompt(folder: Path, make: Make, estimator: str) -> None:
    model = shared_base(folder, policy_seed=2, roles=("policy", "reference", "reward"))
    trainer = make(model, advantage_estimator=estimator, num_generations=3, per_device_train_batch_size=6, kl_coef=0.3)
    rows = [row for row in rows_of(PROMPTS[:2]) for _ in range(3)]
    rollout = trainer.advantages(trainer.rollout(rows))
    assert rollout.values is None and rollout.returns is None
    mask, score = rollout.response_mask, rollout.scores.tolist()
    kl = ((rollout.log_probs - rollout.ref_log_probs) * mask).tolist()
    wanted = torch.zeros(mask.shape)
    for i in range(6):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        mean = sum(score[j] for j in group) / 3
        if estimator == "rloo":
            returns = {j: score[j] - 0.3 * sum(kl[j]) for j in group}
            wanted[i] = returns[i] - sum(returns[j] for j in group if j != i) / 2
        elif estimator == "grpo":
            deviation = math.sqrt(sum((score[j] - mean) ** 2 for j in group) / 2)
            wanted[i] = (score[i] - mean) / (deviation + 1e-4)
        else:
            wanted[i] = torch.tensor([score[i] - mean - 0.3 * sum(kl[i][t:]) for t in range(mask.shape[1])])
    if estimator == "reinforce++":
        wanted = (wanted - wanted[mask].mean()) / wanted[mask].std(correction=0)
    torch.testing.assert_close(rollout.advantages, wanted * mask, rtol=1e-4, atol=1e-5)


def test_without_a_critic_none_is_built_or_trained(folder: Path, make: Make) -> None:
    model = shared_base(folder, roles=("policy", "reference", "reward"))
    trainer = make(model, advantage_estimator="rloo", num_generations=2, total_episodes=8)
    before = weights(trainer, "policy")
    trainer.train()
    groups = getattr(trainer.optimizer, "optimizer", trainer.optimizer).param_groups
    assert len(groups) == 1 and {id(p) for p in groups[0]["params"]} == {id(p) for p in model.parameters_of("policy")}
    assert not torch.equal(weights(trainer, "policy"), before)
    logged = trainer.state.log_history[0]
    assert "loss/value_avg" not in logged and "val/explained_variance" not in logged


def test_grpos_penalty_is_in_the_loss(folder: Path, make: Make) -> None:
    model = shared_base(folder, policy_seed=2)
    options = {"advantage_estimator": "grpo", "num_generations": 2, "kl_coef": 0.7, "reward_funcs": share_of_w7}
    trainer = make(model, **options)
    rollout = trainer.advantages(trainer.rollout([row for row in rows_of(PROMPTS[:2]) for _ in range(2)]))
    rollout.advantages.zero_()
    tokens = rollout.response_mask.sum()
    with model.role("policy"):
        trainer.policy_loss(rollout, torch.arange(4), tokens)[0].backward()
        found = [p.grad.clone() for p in model.parameters_of("policy")]
        model.zero_grad()
        log_probs, _ = model.log_probs(rollout.input_ids, rollout.attention_mask, rollout.response_mask)
        ratio = (rollout.ref_log_probs - log_probs)[rollout.response_mask]
        (0.7 * (ratio.exp() - ratio - 1).sum() / tokens).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters_of("policy")], rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in found) > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"advantage_estimator": "rloo"}, "rloo compares responses: set ppo.num_generations to 2 or more"),
        ({"advantage_estimator": "grpo", "num_generations": 2, "kl_estimator": "k1"}, "set k3"),
        ({"advantage_estimator": "rloo", "num_generations": 2, "whiten_rewards": True}, "rloo has none: switch it off"),
        (
            {"advantage_estimator": "reinforce++", "critic_warmup_steps": 2},
            "critic_warmup_steps trains the critic alone, and reinforce++ has none: set it to 0",
        ),
        ({"num_generations": 3}, "ppo.num_generations=3 must divide a rollout's 4 episodes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ppo_config(tmp_path, **options)
