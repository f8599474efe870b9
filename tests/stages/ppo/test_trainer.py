"""PPO's update, number by number: the rollout, what is trained, the critic's forms, KL control, texts."""

import dataclasses
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.ppo import (
    PROMPTS,
    ROLES,
    TEXT_IDS,
    TEXTS,
    Make,
    Small,
    after_one_update,
    rows_of,
    share_of_w7,
    shared_base,
    weights,
)
from torch import Tensor

from rlhf_recipes.model import sampler as sampling
from rlhf_recipes.model.base import device, load_base
from rlhf_recipes.model.sampler import Samples, state_values
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base
from rlhf_recipes.stages.nonfinite import MOST, NonFinite
from rlhf_recipes.stages.ppo.rollout import Rollout
from rlhf_recipes.stages.reward.adapters import check_probes

# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_auto_sizes_are_halved_where_memory_runs_out_and_change_nothing(folder: Path, make: Make) -> None:
    sizes = {"per_device_train_batch_size": "auto", "mini_batch_size": 12, "rollout_micro_batch_size": "auto"}
    found, given = [], {"total_episodes": 24, "ptx": TEXTS, "ptx_coef": 0.5, "optim": "sgd", "learning_rate": 0.1}
    for kind, options in (
        (SharedBase, {"per_device_train_batch_size": 12}),
        (SharedBase, sizes),
        (Small, sizes),
    ):
        trainer = make(shared_base(folder, kind), **given, **options)
        trainer.train()
        found.append({role: weights(trainer, role) for role in ("policy", "critic")})
    log = trainer.state.log_history[0]
    assert (log["auto/per_device_train_batch_size"], log["auto/rollout_micro_batch_size"]) == (1, 1)
    for other in found[1:]:
        for role, expected in found[0].items():
            torch.testing.assert_close(other[role], expected, rtol=0, atol=2e-5)


def test_memory_that_runs_out_among_the_texts_draws_no_others(
    folder: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"per_device_train_batch_size": "auto", "mini_batch_size": 4}
    given = {"ptx": TEXTS, "ptx_coef": 0.5, "optim": "sgd", "learning_rate": 0.1}
    real, found = sampling.text_loss, []
    for fails in (False, True):
        failures = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")] if fails else []

        def text_loss(*args: Any, failures: list[Exception] = failures) -> Any:
            if failures:
                raise failures.pop()
            return real(*args)

        monkeypatch.setattr("rlhf_recipes.stages.ppo.trainer.text_loss", text_loss)
        trainer = make(shared_base(folder), **given, **sizes)
        trainer.train()
        assert trainer.micro_batch_size == (2 if fails else 4)
        found.append(weights(trainer, "policy"))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)


def test_where_not_even_one_row_fits_memory_runs_out(folder: Path, make: Make) -> None:
    sizes = {"per_device_train_batch_size": "auto", "mini_batch_size": 4, "rollout_micro_batch_size": "auto"}
    model = shared_base(folder, Small)
    model.room = 0
    with pytest.raises(torch.OutOfMemoryError, match="Not even rollout_micro_batch_size=1 fits"):
        make(model, **sizes).train()
    model.room = 2
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as found:  # not where it was not asked for
        make(model, per_device_train_batch_size=4, rollout_micro_batch_size=2).train()
    doing = "scoring responses, up to 2 rows at a time by reward models and 4 by the other roles"
    assert found.value.__notes__ == [doing]


def test_auto_needs_a_mini_batch_size_and_that_is_a_whole(make: Make) -> None:
    with pytest.raises(ValueError, match=r"leave ppo\.gradient_accumulation_steps out"):
        make(mini_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=auto needs ppo\.mini_batch_size"):
        make(per_device_train_batch_size="auto")


# --- Scoring ----------------------------------------------------------------------------------------------------------


def test_rows_cut_only_padding_and_change_no_log_prob(make: Make) -> None:
    trainer = make(per_device_train_batch_size=12)
    rollout = trainer.advantages(trainer.rollout(rows_of(PROMPTS)))
    short = rollout.lengths.argsort()[:4]
    for index in (short, torch.tensor([4]), torch.arange(12), slice(2, 5)):
        part = rollout.rows(index)
        width = int(part.lengths.max())
        prompt = int(rollout.attention_mask[index].sum(1).sub(rollout.lengths[index]).max())
        assert part.input_ids.shape[1] == prompt + width == part.attention_mask.shape[1]
        assert part.response_mask.shape[1] == width == part.advantages.shape[1] == part.values.shape[1]
        for name in ("log_probs", "ref_log_probs", "entropy", "values", "advantages", "returns"):
            whole = getattr(rollout, name)[index]
            assert torch.equal(getattr(part, name), whole[:, :width]) and not whole[:, width:].any()
        assert torch.equal(part.scores, rollout.scores[index]) and part.responses() == Samples.responses(
            Samples(
                rollout.input_ids[index],
                rollout.attention_mask[index],
                rollout.response_mask[index],
                rollout.ended[index],
            )
        )
        with torch.no_grad(), trainer.model.role("policy"):
            again, _ = trainer.model.log_probs(part.input_ids, part.attention_mask, part.response_mask)
        with torch.no_grad(), trainer.model.role("critic"):
            values = state_values(trainer.model, part)
        torch.testing.assert_close(again, part.log_probs, rtol=0, atol=2e-6)
        torch.testing.assert_close(values, part.values, rtol=0, atol=2e-6)


# --- The rollout's numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_a_rollout_holds_what_the_formulas_say(
    folder: Path, make: Make, kl_estimator: str, whiten_rewards: bool
) -> None:
    config = {"missing_eos_penalty": 2.0, "kl_coef": 0.3, "gamma": 0.9, "lam": 0.8, "per_device_train_batch_size": 12}
    trainer = make(
        shared_base(folder, policy_seed=2), kl_estimator=kl_estimator, whiten_rewards=whiten_rewards, **config
    )
    rollout = trainer.advantages(trainer.rollout(rows_of(PROMPTS)))
    assert 0 < rollout.ended.sum() < 12
    lengths = rollout.lengths.tolist()
    reward_model = trainer.sampler.reward_scores(rollout)
    torch.testing.assert_close(rollout.scores, reward_model - 2.0 * (~rollout.ended).float())
    rewards = []
    for i, length in enumerate(lengths):
        ratio = [float(rollout.ref_log_probs[i, t] - rollout.log_probs[i, t]) for t in range(length)]
        kl = [-r if kl_estimator == "k1" else math.exp(r) - 1 - r for r in ratio]
        rewards.append([-0.3 * k for k in kl])
        rewards[i][-1] += float(rollout.scores[i])
    if whiten_rewards:
        flat = [r for row in rewards for r in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in flat) / len(flat))
        rewards = [[(r - mean) / deviation + mean for r in row] for row in rewards]
    advantages = []
    for i, length in enumerate(lengths):
        values = [*rollout.values[i, :length].tolist(), 0.0]
        deltas = [rewards[i][t] + 0.9 * values[t + 1] - values[t] for t in range(length)]
        advantages.append([sum((0.9 * 0.8) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)])
        returns = torch.tensor(advantages[i]) + rollout.values[i, :length]
        torch.testing.assert_close(rollout.returns[i, :length], returns, rtol=1e-4, atol=1e-4)
    flat = torch.tensor([a for row in advantages for a in row])
    whitened = (flat - flat.mean()) / flat.std(correction=0)
    torch.testing.assert_close(rollout.advantages[rollout.response_mask], whitened, rtol=1e-3, atol=1e-4)
    assert not rollout.advantages[~rollout.response_mask].any() and not rollout.returns[~rollout.response_mask].any()


def test_the_first_mini_batch_has_kl_zero_and_ratio_one(folder: Path, tmp_path: Path, make: Make) -> None:
    # As a run does it: the policy and the reference are two loads of one saved adapter.
    model = shared_base(folder)
    model.save_role("reference", tmp_path / "sft")
    model = SharedBase(load_base(Base(str(folder), dtype="float32")).to("cpu"))
    model.add_role("reference", tmp_path / "sft")
    model.add_role("policy", tmp_path / "sft", trainable=True)
    model.add_role("critic", trainable=True, head=True)
    trainer = make(
        model,
        reward_funcs=share_of_w7,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
        total_episodes=12,
        num_ppo_epochs=1,
        temperature=0.7,
        rollout_micro_batch_size=5,
    )
    rollout = trainer.advantages(trainer.rollout(rows_of(PROMPTS)))
    assert torch.equal(rollout.log_probs, rollout.ref_log_probs) and rollout.log_probs.any()
    assert trainer.sampler.batch_size == 5
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["objective/kl"] == 0 and first["objective/non_score_reward"] == 0
    assert abs(first["val/ratio"] - 1) < 1e-6 and first["policy/clipfrac_avg"] == 0
    assert first["policy/approxkl_avg"] < 1e-11


@pytest.mark.parametrize("split", [((8, 1, 1), (2, 4, 1)), ((4, 1, 2), (1, 4, 2))])
def test_micro_batches_and_accumulation_change_nothing(folder: Path, make: Make, split: Any) -> None:
    prompts = [PROMPTS[i % 12] for i in range(8)]
    rollout, found = None, []
    for per_device, accumulation, mini_batches in split:
        trainer = make(
            shared_base(folder, policy_seed=2),
            prompts,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            num_mini_batches=mini_batches,
            optim="sgd",  # Adam would hide a wrong scale, and make much of rounding where the gradient is almost zero
            learning_rate=0.1,
        )
        rollout = rollout or trainer.advantages(trainer.rollout(rows_of(prompts)))
        assert rollout.lengths.max() > 3 * rollout.lengths.min()
        before = {role: weights(trainer, role) for role in ("policy", "critic")}
        trainer.create_optimizer()
        for rows in torch.arange(8).split(trainer.config.mini_batch_size):
            trainer.optimizer_step(rollout, rows)
        assert all((weights(trainer, role) - before[role]).abs().max() > 1e-4 for role in before)
        found.append(([weights(trainer, role) for role in before], trainer.metrics.values))
    (one, logged), (other, other_logged) = found
    torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    assert {"loss/policy_avg", "loss/value_avg", "policy/grad_norm", "critic/grad_norm"} <= other_logged.keys()
    for name, values in other_logged.items():
        assert values == pytest.approx(logged[name], rel=1e-4, abs=1e-5) and len(values) == split[0][2]


def test_a_mini_batchs_step_knows_nothing_of_the_other_rows(folder: Path, make: Make) -> None:
    rows, rollout, found = torch.tensor([3, 0, 7, 5]), None, []
    for alone in (False, True):
        options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "per_device_train_batch_size": 12}
        trainer = make(shared_base(folder, policy_seed=2), **options)
        rollout = rollout or trainer.advantages(trainer.rollout(rows_of(PROMPTS)))
        trainer.create_optimizer()
        trainer.optimizer_step(*((rollout.rows(rows), torch.arange(4)) if alone else (rollout, rows)))
        found.append([weights(trainer, role) for role in ("policy", "critic")])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def test_every_pass_takes_each_row_once_in_another_order(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(num_mini_batches=3, num_ppo_epochs=3, total_episodes=12)
    step, taken = trainer.optimizer_step, []
    monkeypatch.setattr(trainer, "optimizer_step", lambda *given: taken.append(given[1]) or step(*given))
    trainer.train()
    assert [len(rows) for rows in taken] == [4] * 9
    passes = [torch.cat(taken[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(12)) for order in passes)
    assert len({tuple(order) for order in [*passes, list(range(12))]}) == 4


# --- What is trained --------------------------------------------------------------------------------------------------


def test_only_policy_and_critic_are_trained(folder: Path, make: Make) -> None:
    trainer = make(total_episodes=8, weight_decay=0.1)
    model = trainer.model
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [*model.parameters_of("policy"), *model.parameters_of("critic")]
    before = {role: weights(trainer, role) for role in ("policy", "critic")}
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert (
        {id(p) for p in optimizer.state}
        == {id(p) for p in trained}
        == {id(p) for p in model.parameters() if p.requires_grad}
    )
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)
    assert not any(torch.equal(weights(trainer, role), before[role]) for role in before)
    assert len(frozen) + len(trained) == len(list(model.parameters()))


@pytest.mark.parametrize("still, moving", [("critic", "policy"), ("policy", "critic")])
def test_a_learning_rate_of_zero_keeps_a_role_bit_identical(make: Make, still: str, moving: str) -> None:
    rates = {"policy": "learning_rate", "critic": "critic_learning_rate"}
    trainer = make(total_episodes=8, weight_decay=0.1, **{rates[still]: 0.0, rates[moving]: 1e-2})
    before = {role: weights(trainer, role) for role in rates}
    trainer.train()
    assert torch.equal(weights(trainer, still), before[still])
    assert (weights(trainer, moving) - before[moving]).abs().max() > 1e-3


# --- The critic's forms -----------------------------------------------------------------------------------------------


def test_a_head_on_the_policys_features_trains_alone(folder: Path, make: Make) -> None:
    found = {}
    for vf_coef in (0.1, 5.0):
        model = shared_base(folder, roles=("policy", "reference", "reward"))
        model.add_head("critic", on="policy")
        trainer = make(model, vf_coef=vf_coef, total_episodes=8, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        assert [p.shape for p in model.parameters_of("critic")] == [(1, 64)]
        trainer.train()
        found[vf_coef] = weights(trainer, "policy"), weights(trainer, "critic"), trainer
    # The values shift the advantages from the second update on, so the first alone is compared.
    first = {}
    for vf_coef in (0.1, 5.0):
        model = shared_base(folder, roles=("policy", "reference", "reward"))
        model.add_head("critic", on="policy")
        trainer = make(model, vf_coef=vf_coef, num_ppo_epochs=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
        trainer.train()
        first[vf_coef] = weights(trainer, "policy"), weights(trainer, "critic")
    assert torch.equal(first[0.1][0], first[5.0][0]) and not torch.equal(first[0.1][1], first[5.0][1])
    assert found[5.0][1].abs().max() > 0


def test_in_the_warm_up_only_the_critic_learns(folder: Path, make: Make) -> None:
    trainer, seen = make(critic_warmup_steps=2, total_episodes=12), []
    step = trainer.training_step

    def watched(*inputs: Any) -> Tensor:
        before = [weights(trainer, role) for role in ("policy", "critic")]
        loss = step(*inputs)
        after = [weights(trainer, role) for role in ("policy", "critic")]
        seen.append([not torch.equal(a, b) for a, b in zip(after, before, strict=True)])
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    assert seen == [[False, True], [False, True], [True, True]]
    assert trainer.state.log_history[0]["objective/kl"] == trainer.state.log_history[2]["objective/kl"] == 0


# --- KL control -------------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_the_target(folder: Path, make: Make) -> None:
    trainer = make(
        shared_base(folder, policy_seed=2), target_kl=1e-3, kl_horizon=8, total_episodes=12, learning_rate=0.0
    )
    trainer.train()
    found = [row["objective/kl_coef"] for row in trainer.state.log_history if "objective/kl_coef" in row]
    # The KL is far above its target: 20 % times 4 episodes of 8, after each update.
    assert found == pytest.approx([0.05, 0.05 * 1.1, 0.05 * 1.21])
    assert trainer.state.log_history[0]["objective/kl"] > 0.1


def test_beyond_max_kl_training_stops_and_goes_back_to_the_best_policy(folder: Path, make: Make) -> None:
    trainer = make(total_episodes=80, learning_rate=3e-2, max_kl=0.5, ema_decay=0.5)
    policies: dict[int, Tensor] = {}
    guard = trainer.guard

    def watched(rollout: Any) -> bool:
        policies[trainer.state.global_step] = weights(trainer, "policy")
        return guard(rollout)

    trainer.guard = watched  # type: ignore[method-assign]
    trainer.train()
    logged = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert len(logged) == trainer.state.global_step < 20
    assert [row["objective/kl"] > 0.5 for row in logged] == [False] * (len(logged) - 1) + [True]
    best = max(range(len(logged) - 1), key=lambda i: logged[i]["objective/rlhf_reward"])
    assert torch.equal(weights(trainer, "policy"), policies[best]) and torch.equal(
        weights(trainer, "ema"), policies[best]
    )


# --- PPO-ptx and the moving average -----------------------------------------------------------------------------------


def test_ptx_adds_the_gradient_of_the_mean_loss_of_texts(folder: Path, make: Make) -> None:
    found = []
    for per_device in (6, 2):
        model = shared_base(folder)
        trainer = make(
            model, ptx=TEXTS, ptx_coef=3.0, per_device_train_batch_size=per_device, total_episodes=per_device
        )
        torch.manual_seed(3)
        with model.role("policy"):
            loss = trainer.ptx_backward(trainer.random_texts(6))
        found.append((loss, [p.grad.clone() for p in model.parameters_of("policy")]))
    torch.manual_seed(3)
    texts = [TEXT_IDS[i] for i in torch.randint(6, (6,)).tolist()]
    model = shared_base(folder)
    with model.role("policy"):
        losses = [model.causal(torch.tensor([t]), labels=torch.tensor([t])).loss * (len(t) - 1) for t in texts]
        mean = torch.stack(losses).sum() / sum(len(t) - 1 for t in texts)
        (3.0 * mean).backward()
    wanted = [p.grad for p in model.parameters_of("policy")]
    for loss, gradients in found:
        assert loss == pytest.approx(mean.item(), abs=1e-5)
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_texts_stay_in_their_table_until_they_are_drawn(make: Make) -> None:
    table = Dataset.from_dict({"input_ids": [list(range(300, 2300))] * 500})  # 1M tokens
    tracemalloc.start()
    trainer = make(ptx=dataclasses.replace(TEXTS, train=table), ptx_coef=1.0, ptx_max_length=700)
    drawn = trainer.random_texts(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn == [list(range(300, 1000))] * 3
    assert peak < 4_000_000


def test_held_out_texts_give_a_perplexity(folder: Path, make: Make) -> None:
    held_out = Dataset.from_list(rows_of(PROMPTS[:4]))
    trainer = make(eval_dataset=held_out, ptx=TEXTS)
    metrics = trainer.evaluate()
    losses = []
    with torch.no_grad(), trainer.model.role("policy"):
        for text in TEXT_IDS:
            logits = trainer.model.causal(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
            losses += (-logits.gather(1, torch.tensor(text[1:])[:, None])).flatten().tolist()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_the_moving_average_is_what_is_evaluated(folder: Path, make: Make) -> None:
    held_out = Dataset.from_list(rows_of(PROMPTS))
    trainer = make(ema_decay=0.75, total_episodes=12, eval_dataset=held_out, learning_rate=3e-2)
    average, step = weights(trainer, "policy"), trainer.training_step
    averages = []

    def watched(*inputs: Any) -> Tensor:
        loss = step(*inputs)
        averages.append(weights(trainer, "policy"))
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    for after in averages:
        average = 0.75 * average + 0.25 * after
    torch.testing.assert_close(weights(trainer, "ema"), average)
    assert trainer.result == "ema" and not torch.equal(weights(trainer, "ema"), weights(trainer, "policy"))
    trainer.evaluate()
    assert trainer.samples == trainer.evaluator("ema", held_out.to_list())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_update(folder: Path, make: Make, use_reentrant: bool) -> None:
    without = after_one_update(folder, make, {})
    for layers in (True, 0, 1, 2):  # the model has two
        kwargs = {"gradient_checkpointing": layers, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        checkpointed = after_one_update(folder, make, kwargs)
        for role in without:
            torch.testing.assert_close(checkpointed[role], without[role], rtol=0, atol=1e-6)


def test_only_the_first_layers_run_their_forward_again(folder: Path, make: Make) -> None:
    for layers, runs in ((True, [2, 2]), (2, [2, 2]), (1, [2, 1]), (0, [1, 1]), (False, [1, 1])):
        trainer = make(gradient_checkpointing=layers, num_ppo_epochs=1, advantage_estimator="grpo", num_generations=2)
        calls: list[int] = []
        for number, layer in enumerate(trainer.model.checkpointable):
            attention: Any = layer.self_attn
            attention.register_forward_pre_hook(
                lambda *_, number=number, calls=calls: calls.append(number) if torch.is_grad_enabled() else None
            )
        trainer.train()
        assert [calls.count(number) for number in range(2)] == runs, layers


def test_where_memory_runs_out_layers_are_checkpointed_before_rows_are_halved(folder: Path, make: Make) -> None:
    class Shallow(SharedBase):
        """Has memory for the activations of so many layers of so many rows."""

        room = 0

        def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            kept = sum(not layer.gradient_checkpointing for layer in self.checkpointable)
            if torch.is_grad_enabled() and len(input_ids) * kept > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return super().states(input_ids, attention_mask)

    plain = {"optim": "sgd", "learning_rate": 0.1, "total_episodes": 8, "mini_batch_size": 4}
    found = []
    for room, rows in ((8, 4), (4, 4), (0, 4), (-1, 4)):
        trainer = make(
            shared_base(folder, Shallow),
            **{**plain, "per_device_train_batch_size": rows, "gradient_checkpointing": "auto"},
        )
        assert isinstance(trainer.model, Shallow)
        trainer.model.room, trainer.model.checkpointed = room, 0  # as a plan that was too hopeful chooses
        if room < 0:
            with pytest.raises(torch.OutOfMemoryError, match="with all layers checkpointed"):
                trainer.train()
            continue
        trainer.train()
        log = trainer.state.log_history[0]
        assert (log["auto/checkpointed_layers"], log["auto/per_device_train_batch_size"]) == (
            {8: 0, 4: 1, 0: 2}[room],
            4,
        )
        found.append(weights(trainer, "policy"))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


# --- Odd cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[[5]] * 4, [[5, 6, 7]] * 4])
def test_prompts_of_one_length_train(make: Make, prompts: list[list[int]]) -> None:
    trainer = make(prompts=prompts, total_episodes=8)
    before = weights(trainer, "policy")
    trainer.train()
    assert weights(trainer, "policy").isfinite().all() and not torch.equal(weights(trainer, "policy"), before)
    assert trainer.state.log_history[0]["objective/kl"] == 0


def test_responses_of_one_token_train(make: Make) -> None:
    trainer = make(response_length=1, total_episodes=8)
    trainer.train()
    assert all(weights(trainer, role).isfinite().all() for role in ROLES)


def test_a_loss_that_is_not_finite_changes_nothing_and_stops_training(make: Make) -> None:
    trainer = make()
    before = weights(trainer, "policy").clone()
    trainer.model.head_weight("critic").data.fill_(math.nan)
    where = r"loss/\w+ of mini-batch 1 of 2, whose largest ratio is 1, is not finite"
    with pytest.raises(ValueError, match=rf"^At update 1 of ppo {where}.* ppo\.on_nonfinite=skip"):
        trainer.train()
    assert torch.equal(weights(trainer, "policy"), before)


def test_the_message_says_which_mini_batch_was_not_finite_and_its_largest_ratio(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(num_mini_batches=2, total_episodes=8, num_ppo_epochs=2)
    real, ratios = trainer.policy_loss, []

    def loss(rollout: Rollout, rows: Tensor, tokens: Tensor) -> Any:
        value, shares = real(rollout, rows, tokens)
        batch = rollout.rows(rows)
        now, _ = trainer.policy_forward(batch)
        ratios.append((now - batch.log_probs).exp().max().item())
        return (value * math.nan, shares) if len(ratios) == 4 else (value, shares)

    monkeypatch.setattr(trainer, "policy_loss", loss)
    with pytest.raises(ValueError, match=r"of mini-batch 4 of 4, whose largest ratio is [0-9.]+, is not finite") as e:
        trainer.train()
    assert ratios[-1] > 1 and f"largest ratio is {ratios[-1]:.3g}," in str(e.value)


def test_too_many_steps_in_a_row_that_are_not_finite_are_the_end(caplog: pytest.LogCaptureFixture) -> None:
    answer = NonFinite("ppo", "skip")
    for step in (*range(MOST), None, *range(MOST)):
        answer.passed() if step is None else answer.left_out(step, "it")
    assert len(caplog.messages) == 2 * MOST, "one that passed begins the count anew"
    with pytest.raises(ValueError, match=r"^At update 10 .* 10 times before: lower ppo\.learning_rate"):
        answer.left_out(MOST, "it")


def test_steps_that_are_not_finite_can_be_left_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(on_nonfinite="skip", total_episodes=16, num_mini_batches=1, num_ppo_epochs=1)
    real, seen = trainer.policy_loss, []

    def loss(*args: Any) -> Any:
        seen.append(weights(trainer, "policy").clone())
        value, shares = real(*args)
        return (value * math.nan, shares) if len(seen) == 2 else (value, shares)

    monkeypatch.setattr(trainer, "policy_loss", loss)
    trainer.train()
    assert len(seen) == 4 and torch.equal(seen[2], seen[1]) and not torch.equal(seen[3], seen[2])
    assert [row["skipped_steps"] for row in trainer.state.log_history if "skipped_steps" in row] == [0, 1, 0, 0]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_reward_that_is_no_finite_number_is_refused_before_the_update(make: Make, value: float) -> None:
    def broken(prompts: list[str], **kwargs: Any) -> list[float]:
        return [value] * len(prompts)

    trainer = make(reward_funcs=broken)
    before = [p.clone() for p in trainer.model.parameters_of("policy")]
    with pytest.raises(ValueError, match=r"'broken' returned (inf|nan) for the response"):
        trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters_of("policy"), before, strict=True))


def test_a_four_bit_base_trains_policy_and_critic_only(folder: Path, make: Make) -> None:
    model = shared_base(folder, quantization="nf4", dtype="auto")
    trainer = make(model, use_cpu=device().type == "cpu", bf16=True, stop_token_ids=())
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"]) and trainer.state.log_history[0]["objective/kl"] == 0
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {id(p) for role in ("policy", "critic") for p in model.parameters_of(role)}
    assert moved == trained and all(p.isfinite().all() for p in model.parameters_of("policy"))


# --- The stored probes of a reward model ------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [None, 0, -1])
def test_probes_notice_one_changed_weight(folder: Path, tmp_path: Path, changed: int | None) -> None:
    model = shared_base(folder)
    model.save_role("reward", tmp_path)
    scores = []
    for prompt in PROMPTS[:8]:
        ids = torch.tensor([prompt])
        with torch.no_grad(), model.role("reward"):
            scores.append(model.head_outputs(ids, torch.ones_like(ids))[0, -1].item())
    (tmp_path / "probe.json").write_text(json.dumps({"input_ids": PROMPTS[:8], "scores": scores}))
    loaded = SharedBase(load_base(Base(str(folder), dtype="float32")).to("cpu"))
    loaded.add_role("reward", tmp_path, head=True)
    if changed is None:
        check_probes(loaded, tmp_path)
        return
    loaded.parameters_of("reward")[changed].data[0, 0] += 1.0  # of the first layer's adapter, and of the head
    with pytest.raises(ValueError, match=r"scores its probe rows differently"):
        check_probes(loaded, tmp_path)
