"""PPO on a tiny random model: what it samples, what it computes from the samples, and how it trains."""

import asyncio
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.paths import ROOT
from support.tiny_models import make_tokenizer, save_model
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from rlhf_recipes.data.prepare import Prepared
from rlhf_recipes.model import sampler as sampling
from rlhf_recipes.model.base import device, load_base, load_tokenizer
from rlhf_recipes.model.sampler import Sampler, Samples, state_values
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base, Lora, PPOStage, Recipe
from rlhf_recipes.stages.inputs import prepare_stage
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.ppo.roles import copies
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from rlhf_recipes.stages.reward.adapters import check_probes

ROLES = ("policy", "reference", "critic", "reward")
EOS = 2
# A random model rarely says EOS. With these stop tokens besides, about every fourth token ends a response.
STOPS = range(4, 20)
random.seed(0)
PROMPTS = [[random.randrange(4, 64) for _ in range(length)] for length in (1, 6, 3, 2, 9, 4, 1, 5, 3, 7, 2, 4)]

Make = Callable[..., PPOTrainer]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def shared_base(
    folder: Path,
    kind: type[SharedBase] = SharedBase,
    policy_seed: int = 1,
    roles: tuple[str, ...] = ("reference", "policy", "reward", "critic"),
    **base: Any,
) -> SharedBase:
    """The roles with random adapters and heads. The policy equals the reference unless it has another seed."""
    loaded = load_base(Base(str(folder), **({"dtype": "float32"} | base)))
    model = kind(loaded if base else loaded.to("cpu"), Lora(r=4, alpha=8))
    seeds = {"reference": 1, "policy": policy_seed, "reward": 3, "critic": 4}
    for role, seed in ((role, seeds[role]) for role in seeds if role in roles):
        model.add_role(role, trainable=role in ("policy", "critic"), head=role in ("reward", "critic"))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters_of(role):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def rows_of(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_ids": p, "prompt": " ".join(f"w{i}" for i in p), "number": n} for n, p in enumerate(prompts)]


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    """Builds a trainer: one update of four prompts unless the arguments say otherwise."""

    def trainer(
        model: SharedBase | None = None, prompts: list[list[int]] = PROMPTS, tokenizer: Any = None, **arguments: Any
    ) -> PPOTrainer:
        names = ("train_dataset", "eval_dataset", "reward_funcs", "gold", "stop_token_ids", "callbacks")
        names += ("ptx",)
        given = {name: arguments.pop(name) for name in names if name in arguments}
        return PPOTrainer(
            model if model is not None else shared_base(folder),
            ppo_config(tmp_path, **arguments),
            processing_class=tokenizer or make_tokenizer(),
            **{"train_dataset": Dataset.from_list(rows_of(prompts)), "stop_token_ids": STOPS, **given},
        )

    return trainer


def ppo_config(output_dir: Path, **arguments: Any) -> PPOConfig:
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "total_episodes": 4,
        "response_length": 6,
        "temperature": 1.0,
        "learning_rate": 1e-2,
        "num_ppo_epochs": 2,
    }
    return PPOConfig(**(defaults | arguments))


def weights(trainer: PPOTrainer, role: str) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters_of(role)]).clone()


def sampler(model: SharedBase, batch_size: int = 64, tokenizer: Any = None, **changes: Any) -> Sampler:
    settings = {"response_length": 6, "temperature": 1.0, "stop_token_ids": STOPS, "autocast": nullcontext} | changes
    return Sampler(model, tokenizer or make_tokenizer(), batch_size=batch_size, **settings)


class Scripted(SharedBase):
    """Generates the given responses in place of sampled ones."""

    script: Tensor

    def generate(self, input_ids: Tensor, *args: Any) -> Tensor:
        return self.script[: len(input_ids)]


def in_sampling_order(responses: list[list[int]], prompts: list[list[int]]) -> Tensor:
    """The sampler takes prompts of like length together, the shortest first."""
    return torch.tensor(responses)[torch.tensor([len(prompt) for prompt in prompts]).argsort(stable=True)]


def scripted(
    folder: Path, responses: list[list[int]], prompts: list[list[int]] | None = None, **changes: Any
) -> Samples:
    """Samples of the given responses, all of one width."""
    model = shared_base(folder, Scripted)
    assert isinstance(model, Scripted)
    prompts = prompts or PROMPTS[: len(responses)]
    model.script = in_sampling_order(responses, prompts)
    return sampler(model, **changes).sample("policy", prompts)


# Sampling


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_response_runs_up_to_and_including_its_first_stop_token(folder: Path, pad: str) -> None:
    tokenizer = make_tokenizer(pad)
    p = tokenizer.pad_token_id
    cases = [  # response, length, ended
        ([5, 6, EOS, p, p], 3, True),
        ([5, 6, 7, 8, EOS], 5, True),  # EOS as the last possible token
        ([EOS, p, p, p, p], 1, True),
        ([5, 6, 7, 8, 9], 5, False),
        ([5, 50, p, p, p], 2, True),  # the second stop token
        ([5, 50, EOS, 7, 7], 2, True),
        ([0, 5, 0, EOS, p], 4, True),  # sampled padding tokens, where padding is token 0
    ]
    samples = scripted(folder, [case[0] for case in cases], tokenizer=tokenizer, stop_token_ids=[50])
    assert samples.lengths.tolist() == [length for _, length, _ in cases]
    assert samples.ended.tolist() == [ended for _, _, ended in cases]
    assert samples.responses() == [response[:length] for response, length, _ in cases]
    for i, prompt in enumerate(PROMPTS[: len(cases)]):
        assert samples.input_ids[i][samples.attention_mask[i]].tolist() == [*prompt, *cases[i][0][: cases[i][1]]]
        assert samples.response_mask[i].tolist() == [t < cases[i][1] for t in range(5)]


def test_a_response_may_end_in_padding_tokens_without_having_ended(folder: Path) -> None:
    samples = scripted(folder, [[5, 0, 0], [EOS, 0, 0]], stop_token_ids=[])
    assert samples.lengths.tolist() == [3, 1]
    assert samples.ended.tolist() == [False, True]


def test_responses_of_batches_of_different_length_are_put_together(folder: Path) -> None:
    samples = sampler(shared_base(folder), batch_size=1).sample("policy", PROMPTS)
    assert len(set(samples.lengths.tolist())) > 2
    for prompt, response, ended, ids, kept in zip(
        PROMPTS, samples.responses(), samples.ended, samples.input_ids, samples.attention_mask, strict=True
    ):
        assert ids[kept].tolist() == prompt + response
        assert ended == (response[-1] in {EOS, *STOPS}) and not {EOS, *STOPS} & set(response[:-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_from_the_tempered_softmax_and_from_nothing_else(tmp_path: Path, temperature: float) -> None:
    warped = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 3, "temperature": 7.0}
    (save_model(tmp_path) / "generation_config.json").write_text(json.dumps(warped))
    model, count = shared_base(tmp_path), 4000
    one_token = sampler(model, count, response_length=1, temperature=temperature)
    seen = one_token.sample("policy", [PROMPTS[1]] * count).input_ids[:, -1].bincount(minlength=64)
    with torch.no_grad(), model.role("policy"):
        logits = model.causal(torch.tensor([PROMPTS[1]])).logits[0, -1]

    def chi_square(tau: float) -> float:
        expected = count * (logits / tau).softmax(0)
        return ((seen - expected) ** 2 / expected).sum().item()

    # Of 64 tokens: mean 63, standard deviation 11.2.
    assert chi_square(temperature) < 63 + 5 * 11.2
    assert chi_square(temperature * 2) > 63 + 5 * 11.2


def test_generation_and_the_training_forward_agree_under_left_padding(folder: Path) -> None:
    greedy = sampler(shared_base(folder), temperature=1e-4)
    samples = greedy.sample("policy", PROMPTS)
    log_probs, entropy = greedy.log_probs("policy", samples, with_entropy=True)
    # Almost no temperature samples the best token, so the training forward must find it certain.
    assert log_probs.abs().max() < 1e-3 and entropy.max() < 1e-2


def test_the_batch_size_changes_no_sample(folder: Path) -> None:
    model, found = shared_base(folder), []
    for batch_size in (64, 5, 1):
        torch.manual_seed(0)
        found.append(sampler(model, batch_size, response_length=20).sample("policy", PROMPTS).responses())
    assert found[0] == found[1] == found[2]
    assert len({len(response) for response in found[0]}) > 4, "rows leave the batch at different times"


def test_finished_rows_leave_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = shared_base(folder), []
    real = model.backbone.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(model.backbone, "forward", forward)
    samples = sampler(model, response_length=20).sample("policy", PROMPTS)
    alive = [int((samples.lengths > t).sum()) for t in range(int(samples.lengths.max()))]
    # A quarter of the batch may have finished before it is made smaller, and it ends with its last row.
    assert len(rows) == len(alive) and all(n <= in_batch <= n / 0.75 for n, in_batch in zip(alive, rows, strict=True))
    assert rows[0] == 12 and rows[-1] < 4


def test_a_long_prompt_goes_through_the_model_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = shared_base(folder), []
    for tokens in (10_000, 24):  # all at once, or two tokens of each of the 12 prompts
        monkeypatch.setattr("rlhf_recipes.model.decode.TOKENS_AT_ONCE", tokens)
        torch.manual_seed(0)
        found.append(sampler(model).sample("policy", PROMPTS).responses())
    assert found[0] == found[1]


class Small(SharedBase):
    """Has memory for so many rows at once."""

    room = 2

    def need(self, rows: int) -> None:
        if rows > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows} rows.")

    def generate(self, input_ids: Tensor, *args: Any) -> Tensor:
        self.need(len(input_ids))
        return super().generate(input_ids, *args)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = super().hidden(input_ids, attention_mask)
        if hidden.requires_grad:  # too late in the backward, when some gradients are already there
            hidden.register_hook(lambda gradient: self.need(len(gradient)))
        else:
            self.need(len(input_ids))
        return hidden


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
    assert found.value.__notes__ == ["training the policy, 4 rows at a time"]


def test_auto_needs_a_mini_batch_size_and_that_is_a_whole(make: Make) -> None:
    with pytest.raises(ValueError, match=r"leave ppo\.gradient_accumulation_steps out"):
        make(mini_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=auto needs ppo\.mini_batch_size"):
        make(per_device_train_batch_size="auto")


# Scoring


def test_the_batch_size_changes_no_log_prob_value_or_score(folder: Path) -> None:
    model = shared_base(folder)
    samples = sampler(model).sample("policy", PROMPTS)
    found = []
    for batch_size in (64, 5, 1):
        scorer = sampler(model, batch_size)
        found.append((*scorer.log_probs("policy", samples), scorer.values(samples), scorer.reward_scores(samples)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=2e-6)


def test_log_probs_are_zero_outside_the_response_and_the_models_own_inside(folder: Path) -> None:
    model = shared_base(folder)
    scorer = sampler(model, 5, temperature=0.7)
    samples = scorer.sample("policy", PROMPTS)
    log_probs, entropy = scorer.log_probs("reference", samples, with_entropy=True)
    assert not log_probs[~samples.response_mask].any() and not entropy[~samples.response_mask].any()
    for i, (prompt, response) in enumerate(zip(PROMPTS, samples.responses(), strict=True)):
        with torch.no_grad(), model.role("reference"):
            logits = model.causal(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(log_probs[i, : len(response)], chosen, rtol=0, atol=5e-6)
        torch.testing.assert_close(entropy[i, : len(response)], -(expected.exp() * expected).sum(-1), rtol=0, atol=5e-6)


@pytest.mark.parametrize("stop_token_ids", [STOPS, ()])
def test_the_reward_is_the_head_at_the_last_response_token(folder: Path, stop_token_ids: Any) -> None:
    model = shared_base(folder)
    scorer = sampler(model, 5, response_length=3, stop_token_ids=stop_token_ids)
    samples = scorer.sample("policy", PROMPTS)
    assert 0 < samples.ended.sum() < 12 if stop_token_ids else not samples.ended.all()
    scores = scorer.reward_scores(samples)
    assert scores.unique().numel() == len(PROMPTS)
    for score, prompt, response in zip(scores, PROMPTS, samples.responses(), strict=True):
        with torch.no_grad(), model.role("reward"):
            hidden = model.causal(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1]
            expected = model.heads["reward"](hidden[0, -1])
        torch.testing.assert_close(score, expected[0], rtol=0, atol=2e-6)


def test_the_reward_where_padding_is_eos_and_where_padding_was_sampled(folder: Path) -> None:
    model = shared_base(folder, Scripted)
    assert isinstance(model, Scripted)
    responses = [[5, EOS, EOS, EOS], [5, 6, 7, EOS], [5, 6, 7, 8], [EOS] * 4, [0, 0, 5, 0]]
    model.script = in_sampling_order(responses, PROMPTS[:5])
    scorer = sampler(model, tokenizer=make_tokenizer("<eos>"), stop_token_ids=[])
    samples = scorer.sample("policy", PROMPTS[:5])
    wanted = [[5, EOS], [5, 6, 7, EOS], [5, 6, 7, 8], [EOS], [0, 0, 5, 0]]
    for score, prompt, response in zip(scorer.reward_scores(samples), PROMPTS, wanted, strict=False):
        ids = torch.tensor([prompt + response])
        with torch.no_grad(), model.role("reward"):
            expected = model.head_outputs(ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(score, expected, rtol=0, atol=2e-6)


def test_a_value_is_of_the_state_before_its_token(folder: Path) -> None:
    responses = [[20, 21, 22, 23, 24, 25]] * 6
    prompts = [PROMPTS[1]] * 6
    changed = [[*row[:t], *(50 + i for i in range(6 - t))] for t, row in enumerate(responses)]
    model = shared_base(folder, Scripted)
    assert isinstance(model, Scripted)
    scorer, values = sampler(model), []
    for model.script in (torch.tensor(responses), torch.tensor(changed)):
        values.append(scorer.values(scorer.sample("policy", prompts)))
    for t in range(6):  # row t has other tokens from token t on
        torch.testing.assert_close(values[1][t, : t + 1], values[0][t, : t + 1], rtol=0, atol=1e-6)
        assert (values[1][t, t + 1 :] - values[0][t, t + 1 :]).abs().gt(1e-4).all()
        with torch.no_grad(), model.role("critic"):
            ids = torch.tensor([prompts[t] + responses[t][:t]])
            expected = model.head_outputs(ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(values[0][t, t], expected, rtol=0, atol=2e-6)


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


# The rollout's numbers


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
    monkeypatch.setattr(trainer, "optimizer_step", lambda rollout, rows: taken.append(rows) or step(rollout, rows))
    trainer.train()
    assert [len(rows) for rows in taken] == [4] * 9
    passes = [torch.cat(taken[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(12)) for order in passes)
    assert len({tuple(order) for order in [*passes, list(range(12))]}) == 4


# What is trained


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


# Options


def after_one_update(folder: Path, make: Make, options: dict[str, Any]) -> dict[str, Tensor]:
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "per_device_train_batch_size": 6}
    trainer = make(shared_base(folder, policy_seed=2), **{**plain, "total_episodes": 6, **options})
    trainer.train()
    return {role: weights(trainer, role) for role in ("policy", "critic")}


BOTH = {"policy", "critic"}
TEXT_IDS = [[5 + i, *range(20, 26 + 2 * i), EOS] for i in range(6)]
TEXTS = Prepared(*(2 * [Dataset.from_dict({"input_ids": TEXT_IDS})]), False, EOS, {})
# option -> a value, what both runs have beside it, and the roles that it changes
EFFECTS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "learning_rate": (0.05, {}, BOTH),
    "critic_learning_rate": (0.01, {}, {"critic"}),
    "num_ppo_epochs": (3, {}, BOTH),
    "num_mini_batches": (2, {}, BOTH),
    "response_length": (3, {}, BOTH),
    "temperature": (0.5, {}, BOTH),
    "stop_token_id": (33, {"stop_token_ids": (), "response_length": 30}, BOTH),
    "num_generations": (2, {}, BOTH),
    "mini_batch_size": (3, {}, BOTH),
    "generation_backend": ("generate", {}, BOTH),
    "reward_weights": ([2.0], {}, BOTH),
    "reward_normalization": ("sft", {}, BOTH),
    "reward_clip": (0.05, {}, BOTH),
    "missing_eos_penalty": (1.0, {"stop_token_ids": ()}, BOTH),
    "length_penalty": (0.1, {}, BOTH),
    "whiten_rewards": (True, {}, BOTH),
    "kl_coef": (0.5, {}, BOTH),
    "kl_estimator": ("k3", {}, BOTH),
    "target_kl": (0.01, {"kl_horizon": 100, "total_episodes": 12}, BOTH),
    "kl_horizon": (100, {"target_kl": 0.01, "total_episodes": 12}, BOTH),
    "max_kl": (1e-3, {}, BOTH),
    "advantage_estimator": ("reinforce++", {}, BOTH),
    "gamma": (0.9, {}, BOTH),
    "lam": (0.5, {}, BOTH),
    "cliprange": (1e-4, {}, {"policy"}),
    "critic_warmup_steps": (1, {}, {"policy"}),
    "cliprange_value": (1e-4, {}, {"critic"}),
    "vf_coef": (0.5, {}, {"critic"}),
    "ptx_coef": (1.0, {"ptx": TEXTS}, {"policy"}),
    "ptx_batch_size": (1, {"ptx": TEXTS, "ptx_coef": 1.0}, {"policy"}),
    "ptx_max_length": (3, {"ptx": TEXTS, "ptx_coef": 1.0}, {"policy"}),
}
# Options that show elsewhere than in the weights after an update, with the test that shows it.
SHOWN_BY = {
    "logging_steps": "test_logging_steps_count_updates",
    "gradient_checkpointing": "test_gradient_checkpointing_changes_no_update",
    "total_episodes": "test_total_episodes_count_prompts_and_may_repeat_them",
    "rollout_micro_batch_size": "test_the_batch_size_changes_no_sample",
    "vllm_gpu_memory_utilization": "test_backends.test_vllm_samples_as_the_model_does",
    "vllm_enable_sleep_mode": "test_backends.test_vllm_samples_as_the_model_does",
    "max_prompt_length": "test_longer_prompts_than_max_prompt_length_are_bad_rows",
    "ensemble_aggregation": "test_an_ensemble_changes_the_score",
    "uncertainty_coef": "test_an_ensemble_changes_the_score",
    "critic": "test_run.test_a_critic_starts_where_it_is_told",
    "ema_decay": "test_the_moving_average_is_what_is_evaluated",
    "early_stopping_patience": "test_training_stops_after_so_many_evaluations_without_a_better_one",
}


def test_no_option_of_ours_is_without_effect() -> None:
    inherited = {f.name: f.default for f in fields(TrainingArguments)}
    ours = {f.name for f in fields(PPOConfig) if inherited.get(f.name, ...) != f.default}
    assert ours == EFFECTS.keys() | SHOWN_BY.keys() and not EFFECTS.keys() & SHOWN_BY.keys()
    for test in SHOWN_BY.values():
        module, _, name = test.rpartition(".")
        (file,) = (ROOT / "tests").rglob(f"{module or 'test_ppo_trainer'}.py")
        assert f"\ndef {name}(" in file.read_text()


@pytest.mark.parametrize("option", EFFECTS)
def test_an_option_changes_the_roles_that_it_is_about(folder: Path, make: Make, option: str) -> None:
    value, beside, changed = EFFECTS[option]
    default = after_one_update(folder, make, beside)
    other = after_one_update(folder, make, {**beside, option: value})
    assert {role for role in default if (default[role] - other[role]).abs().max() > 1e-7} == changed


def test_logging_steps_count_updates(make: Make) -> None:
    trainer = make(total_episodes=24, logging_steps=3, response_length=1)
    trainer.train()
    assert [row["episode"] for row in trainer.state.log_history if "episode" in row] == [12, 24]


def test_an_ensemble_changes_the_score(folder: Path, make: Make) -> None:
    found = {}
    for name, options in {
        "mean": {},
        "worst": {"ensemble_aggregation": "worst_case"},
        "uncertain": {"ensemble_aggregation": "uncertainty", "uncertainty_coef": 2.0},
    }.items():
        model = shared_base(folder)
        add_reward_role(model, "reward_1", seed=5)
        trainer = make(model, **options)
        torch.manual_seed(0)
        rollout = trainer.advantages(trainer.rollout(rows_of(PROMPTS[:4])))
        both = torch.stack([trainer.sampler.reward_scores(rollout, role) for role in ("reward", "reward_1")])
        found[name] = rollout.scores, both
    both = found["mean"][1]
    torch.testing.assert_close(found["mean"][0], both.mean(0))
    torch.testing.assert_close(found["worst"][0], both.amin(0))
    torch.testing.assert_close(found["uncertain"][0], both.mean(0) - 2.0 * (both[0] - both[1]) ** 2 / 4)


# Advantages without a critic


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
        trainer.policy_loss(rollout, tokens)[0].backward()
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


# The critic's forms


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


# KL control


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


# PPO-ptx and the moving average


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
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    without, checkpointed = after_one_update(folder, make, {}), after_one_update(folder, make, kwargs)
    for role in without:
        torch.testing.assert_close(checkpointed[role], without[role], rtol=0, atol=1e-6)


def test_the_same_seed_trains_the_same_bits_and_another_seed_does_not(folder: Path, make: Make) -> None:
    first, again, other = (after_one_update(folder, make, {"seed": seed}) for seed in (7, 7, 8))
    assert all(torch.equal(first[role], again[role]) and not torch.equal(first[role], other[role]) for role in first)


@pytest.mark.parametrize("episodes, updates", [(4, 1), (12, 3), (13, 4), (40, 10)])
def test_total_episodes_count_prompts_and_may_repeat_them(make: Make, episodes: int, updates: int) -> None:
    trainer = make(total_episodes=episodes, response_length=1, num_ppo_epochs=1)
    trainer.train()
    logged = [row["episode"] for row in trainer.state.log_history if "episode" in row]
    assert trainer.state.global_step == updates and logged == [4 * (i + 1) for i in range(updates)]


def test_without_total_episodes_epochs_count(make: Make) -> None:
    trainer = make(total_episodes=None, num_train_epochs=2, response_length=1, num_ppo_epochs=1)
    trainer.train()
    assert trainer.state.global_step == 6


def test_longer_prompts_than_max_prompt_length_are_bad_rows(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": " ".join(["w5", *["w6"] * n])}) + "\n" for n in range(10)))
    recipe = Recipe("lengths", Base(str(folder)), ppo=PPOStage(str(data), heldout=0.2))
    used = []
    for limit in (None, 4):
        config = ppo_config(tmp_path, max_prompt_length=limit)
        prepared = prepare_stage(recipe, "ppo", config, load_tokenizer(recipe.base))
        rows = [*prepared.train, *prepared.heldout]
        assert all(len(row["prompt_ids"]) <= (limit or 10) for row in rows)
        used.append(len(rows))
    assert used == [10, 4]


@pytest.mark.parametrize(
    "option, value",
    [
        ("response_length", 0),
        ("temperature", 0.0),
        ("num_ppo_epochs", 0),
        ("num_mini_batches", 0),
        ("rollout_micro_batch_size", 0),
        ("total_episodes", 0),
        ("max_prompt_length", 0),
        ("cliprange", 0.0),
        ("cliprange_value", -0.2),
        ("kl_coef", -0.1),
        ("vf_coef", -1.0),
        ("critic_learning_rate", -1e-5),
        ("missing_eos_penalty", -1.0),
        ("gamma", 1.1),
        ("lam", -0.1),
        ("temperature", float("nan")),
        ("kl_estimator", "k2"),
        ("advantage_estimator", "a2c"),
        ("reward_normalization", "batch"),
        ("ensemble_aggregation", "median"),
        ("critic", "policy"),
        ("num_generations", 0),
        ("reward_clip", 0.0),
        ("target_kl", 0.0),
        ("max_kl", -1.0),
        ("length_penalty", -0.1),
        ("uncertainty_coef", -0.1),
        ("critic_warmup_steps", -1),
        ("ptx_coef", -1.0),
        ("ptx_batch_size", 0),
        ("ptx_max_length", 1),
        ("ema_decay", 1.0),
    ],
)
def test_a_bad_option_is_refused_by_name(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"ppo\.{option} must"):
        ppo_config(tmp_path, **{option: value})


def test_fewer_prompts_than_one_rollout_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"ppo\.data has 12 prompts .* fewer than one rollout's 16"):
        make(per_device_train_batch_size=4, num_mini_batches=2, gradient_accumulation_steps=2)


def test_two_processes_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "from datasets import Dataset\n"
        "from rlhf_recipes import PPOConfig, PPOTrainer\n"
        f"PPOTrainer(None, PPOConfig({str(tmp_path)!r}, use_cpu=True), Dataset.from_list([]), None)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ValueError: PPOTrainer runs in one process on one GPU, not 2." in done.stderr


# Reward functions


def share_of_w7(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    return [c.split().count("w7") / max(1, len(c.split())) for c in completions]


def test_reward_functions_get_the_rows_and_their_sum_is_the_score(make: Make) -> None:
    seen: dict[str, Any] = {}

    def numbers(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, state=trainer_state, columns=columns)
        return [10.0 * n for n in columns["number"]]

    async def lengths(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if n == 0 else float(len(ids)) for n, ids in enumerate(completion_ids)]

    trainer = make(reward_funcs=[numbers, lengths])
    rows = rows_of(PROMPTS[:4])
    rollout = trainer.advantages(trainer.rollout(rows))
    tokens = rollout.lengths.tolist()
    assert rollout.scores.tolist() == [0.0, 10.0 + tokens[1], 20.0 + tokens[2], 30.0 + tokens[3]]
    assert seen["prompts"] == [row["prompt"] for row in rows] and seen["columns"] == {"number": [0, 1, 2, 3]}
    assert seen["ids"] == rollout.responses() and seen["state"] is trainer.state
    words = [" ".join(f"w{i}" for i in ids if i > 3) for ids in rollout.responses()]
    assert seen["completions"] == words
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"rewards/numbers/mean", "rewards/lengths/mean"} <= logged.keys()


def test_conversational_prompts_get_messages(make: Make) -> None:
    seen = []

    def judge(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    rows = [{"prompt_ids": p, "prompt": [{"role": "user", "content": f"w{p[0]}"}]} for p in PROMPTS]
    trainer = make(train_dataset=Dataset.from_list(rows), reward_funcs=judge)
    rollout = trainer.advantages(trainer.rollout(rows))
    texts = trainer.sampler.texts(rollout)
    assert seen == [
        (row["prompt"], [{"role": "assistant", "content": text}]) for row, text in zip(rows, texts, strict=True)
    ]


@pytest.mark.parametrize("result", [[1.0] * 3, [1.0] * 5, []])
def test_a_wrong_number_of_rewards_names_the_function(make: Make, result: list[float]) -> None:
    def miscounting(**kwargs: Any) -> list[float]:
        return result

    trainer = make(reward_funcs=miscounting)
    with pytest.raises(ValueError, match=rf"'miscounting' returned {len(result)} rewards for 4 responses"):
        trainer.advantages(trainer.rollout(rows_of(PROMPTS[:4])))


def test_two_reward_functions_of_one_name_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"Two reward functions have one name: share_of_w7, share_of_w7"):
        make(reward_funcs=[share_of_w7, share_of_w7])


def test_an_async_reward_function_works_inside_a_running_event_loop(make: Make) -> None:
    async def ones(prompts: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(prompts)

    trainer, rows = make(reward_funcs=ones), rows_of(PROMPTS[:4])

    async def notebook_cell() -> Tensor:
        return trainer.rewards.judge(ones, rows, trainer.sampler.sample("policy", PROMPTS[:4]))

    assert asyncio.run(notebook_cell()).tolist() == [1.0] * 4


# Learning, evaluation, resuming


def learn(folder: Path, make: Make, kl_coef: float) -> list[dict[str, float]]:
    model = SharedBase(load_base(Base(str(folder), dtype="float32")).to("cpu"), Lora(r=8, alpha=16))
    with torch.no_grad():  # a small frozen head could not say one word with certainty, whatever the adapter
        model.causal.get_output_embeddings().weight.mul_(2)
    model.add_role("reference")
    model.add_role("policy", trainable=True)
    model.add_role("critic", trainable=True, head=True)
    trainer = make(
        model,
        [PROMPTS[i % 12] for i in range(32)],
        reward_funcs=share_of_w7,
        stop_token_ids=(),
        per_device_train_batch_size=32,
        total_episodes=12 * 32,
        num_ppo_epochs=4,
        learning_rate=4e-3,
        kl_coef=kl_coef,
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "objective/kl" in row]


def test_ppo_learns_a_reward_and_the_penalty_holds_it_near_the_reference(folder: Path, make: Make) -> None:
    free, held = learn(folder, make, kl_coef=0.0), learn(folder, make, kl_coef=0.5)
    assert free[0]["objective/scores"] < 0.1 and free[-1]["objective/scores"] > 0.3
    assert free[0]["objective/kl"] == 0 and free[-1]["objective/kl"] > 2
    assert held[-1]["objective/kl"] < 0.5 * free[-1]["objective/kl"]


def test_evaluation_repeats_itself_and_reports_the_means_of_its_samples(folder: Path, make: Make) -> None:
    held_out = Dataset.from_list(rows_of([*PROMPTS[3:], [9, 9, 9]]))
    trainer = make(shared_base(folder, policy_seed=2), eval_dataset=held_out, gold=share_of_w7)
    state = torch.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    first = trainer.samples
    torch.rand(3)
    assert trainer.evaluate() == metrics and trainer.samples == first
    assert [sample["prompt"] for sample in first] == held_out["prompt"]
    columns = {"eval_score": "score", "eval_kl": "kl", "eval_response_length": "response_length", "eval_gold": "gold"}
    columns |= {"eval_quality": "gold"}
    assert metrics.keys() == {*columns, "eval_without_eos", "epoch"}
    for name, key in columns.items():
        assert metrics[name] == pytest.approx(sum(sample[key] for sample in first) / len(first))
    assert metrics["eval_without_eos"] == pytest.approx(sum(not sample["ended"] for sample in first) / len(first))
    assert 0 < metrics["eval_without_eos"] < 1 and metrics["eval_kl"] != 0
    assert [sample["gold"] for sample in first] == pytest.approx(share_of_w7([], [s["completion"] for s in first]))
    unknown = make(eval_dataset=held_out)
    assert "eval_quality" not in unknown.evaluate() and all("gold" not in sample for sample in unknown.samples)


def add_reward_role(model: SharedBase, role: str, seed: int) -> None:
    """One more frozen role with a head, at random."""
    model.add_role(role, head=True)
    for parameter in model.parameters_of(role):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("gold", [None, share_of_w7])
def test_a_judge_and_an_ensembles_spread_are_measured_and_change_no_update(folder: Path, make: Make, gold: Any) -> None:
    held_out, found = Dataset.from_list(rows_of(PROMPTS[:5])), []
    for roles in (("reward_1",), ("reward_1", "judge")):
        model = shared_base(folder, policy_seed=2)
        for role in roles:
            add_reward_role(model, role, seed=5 + len(role))
        trainer = make(model, eval_dataset=held_out, gold=gold, eval_strategy="steps", eval_steps=1)
        trainer.train()
        found.append(trainer)
    for role in ("policy", "critic"):
        assert torch.equal(*(weights(trainer, role) for trainer in found)), "nothing is trained on the judge"
    trainer = found[1]
    with torch.random.fork_rng():
        torch.manual_seed(trainer.evaluator.seed)
        samples = trainer.sampler.sample("policy", [row["prompt_ids"] for row in held_out.to_list()])
    each = {role: trainer.sampler.reward_scores(samples, role) for role in ("reward", "reward_1", "judge")}
    spread = (each["reward"] - each["reward_1"]).abs() / 2  # of two numbers, about their mean
    for name, wanted in (("judge", each["judge"]), ("ensemble_std", spread)):
        assert [sample[name] for sample in trainer.samples] == pytest.approx(wanted.tolist(), abs=1e-5)
    (row,) = [row for row in trainer.state.log_history if "eval_kl" in row]
    assert row["eval_judge"] == pytest.approx(each["judge"].mean().item(), abs=1e-5)
    assert row["eval_ensemble_std"] == pytest.approx(spread.mean().item(), abs=1e-5) and spread.mean() > 0
    assert row["eval_quality"] == row["eval_judge" if gold is None else "eval_gold"], "gold comes first"
    alone = next(row for row in found[0].state.log_history if "eval_kl" in row)
    assert ("eval_quality" in alone) == (gold is not None) and "eval_judge" not in alone


def test_the_reference_has_no_kl_to_itself_and_the_base_has_some(make: Make) -> None:
    trainer, rows = make(), rows_of(PROMPTS)
    assert all(sample["kl"] == 0 for sample in trainer.evaluator("reference", rows))
    assert any(sample["kl"] != 0 for sample in trainer.evaluator("base", rows))


def test_evaluating_between_updates_changes_no_update(folder: Path, make: Make) -> None:
    found = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make(
            shared_base(folder), eval_dataset=Dataset.from_list(rows_of(PROMPTS)), total_episodes=12, **evaluation
        )
        trainer.train()
        found.append([weights(trainer, role) for role in ("policy", "critic")])
        assert sum("eval_score" in row for row in trainer.state.log_history) == (3 if evaluation else 0)
    assert all(map(torch.equal, *found))


STATEFUL = {
    "target_kl": 0.01,
    "kl_horizon": 20,
    "reward_normalization": "running",
    "ema_decay": 0.9,
    "max_kl": 100.0,
    "ptx_coef": 0.5,
    "ptx": TEXTS,
}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("options", [{}, STATEFUL])
def test_a_resumed_run_ends_with_the_same_bits(
    folder: Path, make: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    # Three updates make an epoch, so the fourth is of a reshuffled one; the learning rate falls from update to update.
    run = {"total_episodes": 16, "save_steps": 2, "weight_decay": 0.1, "critic_learning_rate": 3e-3, **options}
    straight = make(**run)
    straight.train()
    stopped = make(**run, save_strategy="steps", callbacks=[StopAt(2)])
    stopped.train()
    assert stopped.state.global_step == 2
    resumed = make(shared_base(folder, policy_seed=9), **run)  # the checkpoint brings the policy, whatever it is here
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for role in (*ROLES, *copies(straight.config)):
        assert torch.equal(weights(resumed, role), weights(straight, role))
    assert (resumed.kl_coef, resumed.best_reward) == (straight.kl_coef, straight.best_reward)
    assert resumed.rewards.state_dict() == straight.rewards.state_dict()
    states = [trainer.optimizer.state_dict()["state"] for trainer in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    for i in states[0]:
        assert all(torch.equal(states[0][i][key], states[1][i][key]) for key in states[0][i])

    def logged(trainer: PPOTrainer) -> list[dict[str, float]]:
        rows = [row for row in trainer.state.log_history if "objective/kl" in row]
        return [
            {k: v for k, v in row.items() if not k.startswith(("time/", "memory/")) and k != "tokens_per_second"}
            for row in rows
        ]

    assert len(logged(straight)) == 4 and logged(resumed) == logged(straight)


# The best policy and early stopping


def qualities(*values: float) -> Callable[..., list[float]]:
    """A gold function whose held-out mean is the next value at each call."""
    following = iter(values)

    def quality(completions: list[str], **columns: Any) -> list[float]:
        value = next(following)
        return [value] * len(completions)

    return quality


CHOOSING = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "total_episodes": 24,
}


class Policies(TrainerCallback):
    """Keeps what is evaluated at each step."""

    def __init__(self) -> None:
        self.at: dict[int, Tensor] = {}
        self.trainer: PPOTrainer

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = weights(self.trainer, self.trainer.result)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "max_kl": 100.0, "target_kl": 0.01}])
def test_the_policy_at_the_end_is_the_best_checkpoints_to_the_bit(
    folder: Path, make: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    held_out, policies = Dataset.from_list(rows_of(PROMPTS[:3])), Policies()
    gold = qualities(1.0, 3.0, 2.0, 2.0, 1.0, 0.0, 7.0)
    policies.trainer = trainer = make(eval_dataset=held_out, gold=gold, callbacks=[policies], **CHOOSING, **options)
    assert trainer.args.metric_for_best_model == "quality" and trainer.args.greater_is_better
    trainer.train()
    assert trainer.choice() == {"best_step": 2, "best_quality": 3.0, "stopped_early": False}
    assert torch.equal(weights(trainer, trainer.result), policies.at[2])
    assert not torch.equal(policies.at[2], policies.at[6]) and trainer.state.global_step == 6
    other = make(shared_base(folder, policy_seed=9), **options)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for role in (*trainer.trained, *copies(trainer.config)):
        assert torch.equal(weights(trainer, role), weights(other, role))
    assert trainer.kl_coef == other.kl_coef
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}


def test_training_stops_after_so_many_evaluations_without_a_better_one(make: Make) -> None:
    held_out = Dataset.from_list(rows_of(PROMPTS[:3]))
    gold = qualities(1.0, 0.5, 2.0, 2.0, 1.0, 9.0)  # as good is not better
    trainer = make(eval_dataset=held_out, gold=gold, early_stopping_patience=2, **CHOOSING)
    trainer.train()
    assert trainer.state.global_step == 5
    assert trainer.choice() == {"best_step": 3, "best_quality": 2.0, "stopped_early": True}


def test_beyond_max_kl_the_best_evaluated_policy_is_kept(make: Make) -> None:
    held_out, policies = Dataset.from_list(rows_of(PROMPTS[:3])), Policies()
    gold = qualities(5.0, *range(30))
    run = CHOOSING | {"total_episodes": 80, "learning_rate": 3e-2, "max_kl": 0.5}
    policies.trainer = trainer = make(eval_dataset=held_out, gold=gold, callbacks=[policies], **run)
    trainer.train()
    assert 1 < trainer.state.global_step < 20
    assert trainer.choice() == {"best_step": 1, "best_quality": 5.0, "stopped_early": True}
    assert torch.equal(weights(trainer, "policy"), policies.at[1])


@pytest.mark.parametrize(("metric", "best"), [("gold", 3), ("eval_kl", 1)])
def test_another_metric_may_choose(make: Make, metric: str, best: int) -> None:
    held_out, gold = Dataset.from_list(rows_of(PROMPTS[:3])), qualities(1.0, 2.0, 3.0)
    run = CHOOSING | {"total_episodes": 12, "metric_for_best_model": metric, "learning_rate": 3e-2}
    trainer = make(eval_dataset=held_out, gold=gold, **run)
    trainer.train()
    logged = {row["step"]: row for row in trainer.state.log_history if "eval_kl" in row}
    chosen = trainer.choice()
    assert chosen["best_step"] == best and chosen[f"best_{metric.removeprefix('eval_')}"] == pytest.approx(
        logged[best][f"eval_{metric.removeprefix('eval_')}"]
    )
    if metric == "eval_kl":
        assert chosen["best_kl"] == min(row["eval_kl"] for row in logged.values()), "less is better"


def test_a_resumed_run_waits_no_longer_and_remembers_the_best(make: Make, tmp_path: Path) -> None:
    values, held_out = (1.0, 5.0, 2.0, 2.0, 3.0, 9.0), Dataset.from_list(rows_of(PROMPTS[:3]))
    run = {**CHOOSING, "eval_dataset": held_out, "early_stopping_patience": 3, "save_total_limit": None}
    straight = make(gold=qualities(*values), **run)
    straight.train()
    wanted = {role: weights(straight, role) for role in straight.trained}
    for path in tmp_path.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > 3:
            shutil.rmtree(path)
    resumed = make(gold=qualities(*values[3:]), **run)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == straight.state.global_step == 5
    assert resumed.choice() == straight.choice() == {"best_step": 2, "best_quality": 5.0, "stopped_early": True}
    assert all(torch.equal(weights(resumed, role), wanted[role]) for role in wanted)


@pytest.mark.parametrize("chooser", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}])
def test_choosing_needs_evaluations(tmp_path: Path, chooser: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf"^ppo\.{next(iter(chooser))} needs evaluations: set ppo\.eval_strategy=steps"
    ):
        ppo_config(tmp_path, **chooser)


def test_choosing_needs_a_checkpoint_of_each_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^ppo\.load_best_model_at_end .*one number \(they are 4 and 2\)"):
        ppo_config(tmp_path, **CHOOSING | {"save_steps": 4, "eval_steps": 2})
    best = ppo_config(tmp_path, **CHOOSING | {"save_strategy": "best", "load_best_model_at_end": False})
    assert best.metric_for_best_model == "quality"
    assert ppo_config(tmp_path, eval_strategy="steps", eval_steps=2).metric_for_best_model is None


# Odd cases


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


def test_a_loss_that_is_not_finite_stops_training(make: Make) -> None:
    trainer = make()
    trainer.model.head_weight("critic").data.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"at update 1"):
        trainer.train()


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


# The stored probes of a reward model


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
    with pytest.raises(RuntimeError, match=r"scores its probe rows differently"):
        check_probes(loaded, tmp_path)
