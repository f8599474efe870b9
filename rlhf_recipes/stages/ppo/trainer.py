"""PPO on a shared base: rollout, advantages, update, log, adapt.

One step of the Trainer is one PPO update: a rollout, then `num_ppo_epochs` passes of `num_mini_batches` optimizer steps
over it. Logging, evaluation, checkpoints and the learning-rate schedule count updates, so a checkpoint always lies on a
rollout boundary.

Of several processes each samples, scores and trains on its share of the rows, and has the whole rollout in between. All
draw the same random numbers and take the same steps, along the sum of their gradients.

B rows, P prompt tokens (left-padded), T response tokens (right-padded).
"""

import copy
import dataclasses
import functools
import itertools
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import identity

from ...data.prepare import Prepared
from ...model.backends import make_backend
from ...model.memory import halved, peak_memory_mib, ran_out
from ...model.processes import all_gather, all_sum_, count, rank, same_random_numbers, take_summed
from ...model.sampler import Sampler, state_values, text_loss
from ...model.shared import SharedBase
from ...model.split import lies_on_several
from ...records.contents import Sample
from ...records.files import read_json
from ..callbacks import StartOnce
from ..compare import Evaluator, held_out_texts, quality
from ..configure import check_shares
from ..float16 import SKIPPED, check_scale, scale_losses
from ..nonfinite import NonFinite
from ..options import PPOConfig
from ..scores import ROLE, RewardFunc, Rewards, resolve_rewards
from ..shares import WritesOnce
from . import objectives
from .metrics import Metrics, rollout_metrics
from .roles import copies
from .rollout import Rollout, draw_passes, micro_batches

logger = logging.getLogger(__name__)

DOING = {  # phase -> what is said where memory runs out in it
    "generate": "sampling responses, {rows} rows at a time",
    "score": "scoring responses, up to {rows} rows at a time by reward models and {micro} by the other roles",
    "update_policy": "training the policy, {micro} rows at a time",
    "update_critic": "training the critic, {micro} rows at a time",
    "evaluate": "evaluating, up to {rows} rows at a time",
}

# The largest log-ratio of a token before the first optimizer step of an update. Whatever the dtype, 0 is right.
EXACT = "val/first_pass_log_ratio_max"

# An optimizer step in which one of these is not finite changes nothing.
STEADY = ("loss/policy_avg", "loss/value_avg", "loss/ptx_avg", "policy/grad_norm", "critic/grad_norm")

STATE = "ppo_state.json"  # in a checkpoint: what changes through training and is no weight


def counted_in_rollouts(args: PPOConfig) -> PPOConfig:
    """A copy for the Trainer, whose batch is a whole rollout, so that it neither accumulates nor sees less than one."""
    counted = copy.copy(args)
    counted.per_device_train_batch_size = args.rollout_prompts
    counted.gradient_accumulation_steps = 1
    counted.remove_unused_columns = False
    counted.dataloader_drop_last = True
    counted.restore_callback_states_from_checkpoint = True  # how long early stopping has waited
    if args.total_episodes is not None:
        counted.max_steps = math.ceil(args.total_episodes / args.rollout_size)
    return counted


class PPOTrainer(WritesOnce):
    """PPO of the `policy` role against the `reference` role, with the values of the `critic` role or without any."""

    model: SharedBase
    args: PPOConfig

    def __init__(
        self,
        model: SharedBase,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] = ROLE,
        gold: RewardFunc | None = None,
        stop_token_ids: Sequence[int] = (),
        ptx: Prepared | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """
        Args:
            model: a shared base with the roles `policy` and, for the estimator `gae`, `critic` (trainable, the critic
                with a head), `reference` and, where it is a source of reward, `reward` with a head.
            train_dataset: rows with `prompt_ids` (token ids) and, for reward functions, `prompt` and any other columns,
                as `prepare("ppo", ...)` gives them.
            eval_dataset: held-out rows, sampled with fixed seeds. Where they choose the policy, measure it on others.
            reward_funcs: sources of the score: functions with TRL's signature, "reward" for the `reward` role, or other
                names as in `PPOStage`.
            gold: a function of the same signature that measures true quality in evaluation, never trained on.
            stop_token_ids: tokens that end a response, beside the tokenizer's EOS.
            ptx: pretraining texts (`prepare("ptx", ...)`) to mix in, and held-out ones to measure perplexity on.
        """
        self.config = args
        check_fit(args, len(train_dataset), ptx is not None, lies_on_several(model))
        # Left in its table until it is drawn: as lists of Python's numbers a token would take 40 bytes.
        self.texts = None if ptx is None else ptx.train.with_format("numpy", ["input_ids"])
        self.kl_coef = args.kl_coef  # which target_kl adapts
        self.micro_batch_size = int(args.per_device_train_batch_size)  # which auto halves
        model.checkpointed = args.checkpointed_layers  # which auto makes more
        self.best_reward = -math.inf  # of the role `best`
        # The policy's forward on the whole rollout, for the first step of the update: its rows, and their log-probs.
        self.kept: tuple[Tensor, Tensor] | None = None
        self.is_exact = True  # so far (see EXACT)
        self.trained = ("policy", "critic") if args.has_critic else ("policy",)
        for role in copies(self.config):
            model.add_role(role, exact=True)
            model.copy_role("policy", role)
        self.samples: list[Sample] = []  # of the last evaluation
        self.metrics = Metrics()

        super().__init__(
            model=model,
            args=counted_in_rollouts(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=identity,
            callbacks=[StartOnce(), *(callbacks or ())],
        )
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        scale_losses(self.accelerator)
        self.scaler = self.accelerator.scaler or torch.amp.GradScaler(enabled=False)
        self.skipped = 0  # optimizer steps since the last log
        self.nonfinite = NonFinite("ppo", args.on_nonfinite)
        self.sampler = self._sampler(stop_token_ids)
        sources = [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, str) else reward_funcs
        self.rewards = Rewards(self.sampler, args, resolve_rewards(sources), lambda: self.state)
        texts = held_out_texts(ptx, args.ptx_max_length)
        self.evaluator = Evaluator(self.sampler, self.rewards, gold, args.seed, texts)

    def _sampler(self, stop_token_ids: Sequence[int]) -> Sampler:
        config, tokenizer = self.config, self.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        own = [] if config.stop_token_id is None else [config.stop_token_id]
        sampler = Sampler(
            self.model,
            tokenizer,
            config.response_length,
            config.temperature,
            int(config.rollout_micro_batch_size),
            [*stop_token_ids, *own],
            lambda: self.accelerator.autocast(),
            auto="rollout_micro_batch_size" in config.auto_sizes,
        )
        longest = None if config.max_prompt_length is None else config.max_prompt_length + config.response_length
        vllm = config.vllm_gpu_memory_utilization, config.vllm_enable_sleep_mode, longest
        sampler.backend = make_backend(config.generation_backend, sampler, *vllm)
        return sampler

    @property
    def result(self) -> str:
        """The role that training is for: the policy or, with `ema_decay`, its moving average."""
        return "policy" if self.config.ema_decay is None else "ema"

    # The update

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One PPO update, from the prompts in `inputs` to the last optimizer step, whose loss it returns."""
        start = time.perf_counter()
        self.model.train()
        same_random_numbers()
        # The Trainer will take a step after the update, along no gradients, which a scaler does not forgive.
        self.optimizer.scaler = None
        # 1. Rollout: the policy answers each prompt, and every role says what it makes of the answers.
        rollout = self.rollout([row for row in inputs for _ in range(self.config.num_generations)])
        # 2. Advantages: how much better each token did than was expected.
        rollout = self.advantages(rollout)
        # 3. Update: optimizer steps on the rollout, unless the policy has left its budget of KL.
        stops = self.config.max_kl is not None and self.guard(rollout)
        loss = 0.0 if stops else self.update(rollout)
        # 4. Log.
        penalty, seconds = self.non_score_reward(rollout), time.perf_counter() - start
        self.metrics.add(rollout_metrics(rollout, penalty, self.kl_coef, seconds))
        # 5. Adapt what follows the policy: its moving average, and the weight of the KL penalty.
        if not stops:
            self.adapt(rollout)
        return torch.tensor(loss, device=self.args.device)

    def guard(self, rollout: Rollout) -> bool:
        """Keep the policy in the role `best` if its rollout is the best so far; beyond `max_kl`, go back to it.

        Returns whether training stops here.
        """
        assert self.config.max_kl is not None
        if rollout.mean_kl > self.config.max_kl:
            for role in ("policy", *(["ema"] if self.result == "ema" else [])):
                self.model.copy_role("best", role)
            self.control.should_training_stop = True
            return True
        reached = (rollout.scores + self.non_score_reward(rollout)).mean().item()
        if reached > self.best_reward:
            self.best_reward = reached
            self.model.copy_role("policy", "best")
        return False

    def rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Sample a response to each row's prompt, and score it by every role.

        Rows of the same prompt, `num_generations` of them, stand side by side.
        """
        with self.phase("generate"):
            samples = self.sampler.sample("policy", [row["prompt_ids"] for row in rows])
        with self.phase("score"):
            raw, logs = self.rewards.raw(rows, samples)
            self.metrics.add(logs)
            same_random_numbers()
            zeros = functools.partial(torch.zeros, samples.response_mask.shape, device=self.model.device)  # (B, T)
            rollout = Rollout(
                **vars(samples),
                log_probs=zeros(),
                ref_log_probs=zeros(),
                entropy=zeros(),
                scores=self.rewards.training_scores(raw, samples),
                values=None,
                passes=draw_passes(samples, self.config),
            )
            self.with_less_memory(lambda: self.score(rollout))
            self.share_scores(rollout)
            return rollout

    def score(self, rollout: Rollout) -> None:
        """What the roles make of this process's rows of a rollout, from the micro-batches of the update's first pass.

        In 16 bits a row's rounding depends on the rows beside it, by as much as an update moves the policy. Scored in
        the same micro-batches a row's ratio is 1 to the bit before the first step (RLinf found the same, its pull
        request 1534).
        """
        rollout.micro_batch_size = self.micro_batch_size
        batches = [micro for rows in rollout.passes[0] for micro in micro_batches(rows, self.micro_batch_size)]
        rollout.log_probs, rollout.entropy = torch.zeros(2, *rollout.response_mask.shape, device=self.model.device)
        rollout.ref_log_probs = self.sampler.log_probs("reference", rollout, batches=batches)[0]
        if self.config.has_critic:
            rollout.values = self.sampler.values(rollout, batches)
        self.kept = None
        if self.config.keeps_forward and len(batches) == 1 and not self.warming_up:
            self.kept = batches[0], self.recorded_forward(rollout, batches[0])
        elif self.config.scores_policy:
            rollout.log_probs, rollout.entropy = self.sampler.log_probs("policy", rollout, True, batches)

    def share_scores(self, rollout: Rollout) -> None:
        """Add to a rollout what `score` has found of the other processes' rows."""
        rollout.is_scored = True
        scores = (rollout.log_probs, rollout.ref_log_probs, rollout.entropy, rollout.values)
        all_sum_([of_all for of_all in scores if of_all is not None])

    def recorded_forward(self, rollout: Rollout, rows: Tensor) -> Tensor:
        """The policy's log-probabilities (b, t) of some rows, with their graph, which become those of the rollout."""
        log_probs, entropy = self.policy_forward(rollout.rows(rows), with_entropy=True)
        rollout.log_probs[rows, : log_probs.shape[1]] = log_probs.detach()
        rollout.entropy[rows, : log_probs.shape[1]] = entropy
        return log_probs

    def policy_forward(self, batch: Rollout, with_entropy: bool = False) -> tuple[Tensor, Any]:
        """The policy's log-probabilities of a micro-batch and, where they are asked for, the entropies."""
        with self.model.role("policy"), self.accelerator.autocast():
            return self.model.log_probs(
                batch.input_ids, batch.attention_mask, batch.response_mask, self.config.temperature, with_entropy
            )

    def batching_noise(self, rollout: Rollout) -> float:
        """Standard deviation, in nats, of what a token's log-probability differs by from one micro-batch to another.

        It is what the passes after the first see beside the policy's own moves; measured on the second's.
        """
        batches = [micro for rows in rollout.passes[1] for micro in micro_batches(rows, self.micro_batch_size)]
        again, _ = self.sampler.log_probs("policy", rollout, batches=batches)
        all_sum_([again])
        return (again - rollout.log_probs)[rollout.response_mask].std(correction=0).item()

    def advantages(self, rollout: Rollout) -> Rollout:
        """The rollout with advantages (B, T) by `advantage_estimator` and, for gae, returns (B, T)."""
        config, group, mask, scores = self.config, self.config.num_generations, rollout.response_mask, rollout.scores
        kl = self.kl_penalty(rollout)  # (B, T)
        if config.advantage_estimator == "grpo":
            advantages = objectives.group_normalized(scores, group)[:, None] * mask
            return dataclasses.replace(rollout, advantages=advantages)
        if config.advantage_estimator == "rloo":
            whole = objectives.token_rewards(scores, kl, mask, self.kl_coef).sum(1)  # (B,)
            advantages = objectives.leave_one_out(whole, group)[:, None] * mask
            return dataclasses.replace(rollout, advantages=advantages)
        if config.advantage_estimator == "reinforce++" and group > 1:
            # The paper's variant with a baseline; a single response has none.
            scores = (scores.view(-1, group) - scores.view(-1, group).mean(1, keepdim=True)).flatten()
        rewards = objectives.token_rewards(scores, kl, mask, self.kl_coef)  # (B, T)
        if config.whiten_rewards:
            rewards = objectives.whiten(rewards, mask, shift_mean=False)
        if rollout.values is None:
            to_go = objectives.returns_to_go(rewards, mask, config.gamma)
            return dataclasses.replace(rollout, advantages=objectives.whiten(to_go, mask))
        advantages, returns = objectives.gae(rewards, rollout.values, mask, config.gamma, config.lam)
        return dataclasses.replace(rollout, advantages=objectives.whiten(advantages, mask), returns=returns)

    def update(self, rollout: Rollout) -> float:
        """`num_ppo_epochs` passes over the rollout in mini-batches. Returns the loss of the last one.

        Raises ValueError where a loss or a gradient is not finite, unless such steps are left out.
        """
        loss, skipped = 0.0, self.skipped
        with self.phase("update"):
            if self.state.global_step == 0 and rollout.passes[-1] is not rollout.passes[0]:
                self.metrics.add({"val/batching_noise": self.batching_noise(rollout)})
            for number, rows in enumerate(itertools.chain(*rollout.passes), 1):
                loss = self.optimizer_step(rollout, rows, number)
        # As in any Trainer the learning-rate schedule waits where nothing has moved.
        self.optimizer._is_overflow = self.skipped - skipped == sum(map(len, rollout.passes))
        return loss

    def adapt(self, rollout: Rollout) -> None:
        """Move the average after the policy (`ema_decay`), and `kl_coef` after the KL (`target_kl`)."""
        config = self.config
        if config.ema_decay is not None:
            self.model.copy_role("policy", "ema", 1 - config.ema_decay)
        if config.target_kl is not None:
            episodes = len(rollout.scores)
            self.kl_coef = objectives.adapted_kl_coef(
                self.kl_coef, rollout.mean_kl, config.target_kl, episodes, config.kl_horizon
            )

    def optimizer_step(self, rollout: Rollout, rows: Tensor, number: int = 1) -> float:
        """One step on a mini-batch: the policy's forward and backward, then the critic's, in micro-batches.

        The two never share a graph, because a backward must run under the role of its forward. Returns the loss, the
        policy's and `vf_coef` times the critic's, without the language-model loss of `ptx`.

        Args:
            number: of the mini-batch, of all those of the update, from 1.
        """
        logged: dict[str, float] = {}
        roles = self.trained[1:] if self.warming_up else self.trained
        for role in roles:
            with self.phase(f"update_{role}"), self.model.role(role):
                logged |= self.backward(role, rollout, rows)
        logged = self.summed(logged, roles)
        loss = logged.get("loss/policy_avg", 0.0) + self.config.vf_coef * logged.get("loss/value_avg", 0.0)
        if logged.get(EXACT):
            self.warn_inexact(logged[EXACT])
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        self.scaler.unscale_(optimizer)  # once, though each role's gradients are clipped by themselves
        for role in roles:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters_of(role), self.config.max_grad_norm or math.inf)
            logged[f"{role}/grad_norm"] = norm.item()
        unsteady = [name for name in STEADY if not math.isfinite(logged.get(name, 0.0))]
        scale, steps = self.scaler.get_scale(), self.scaler.is_enabled() or not unsteady
        if steps:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad()
        if self.scaler.get_scale() < scale:  # some gradient overflowed
            check_scale(self.scaler)
        elif not steps:
            where = f"mini-batch {number} of {sum(map(len, rollout.passes))}"
            ratio = f"whose largest ratio is {self.largest_ratio(rollout, rows):.3g}"
            self.nonfinite.left_out(self.state.global_step + 1, f"{unsteady[0]} of {where}, {ratio},")
        else:
            rollout.fresh = False
            self.nonfinite.passed()
            self.metrics.add(logged)
            return loss
        self.skipped += 1  # nothing has changed
        self.metrics.add({name: value for name, value in logged.items() if math.isfinite(value)})
        return loss if math.isfinite(loss) else 0.0

    def largest_ratio(self, rollout: Rollout, rows: Tensor) -> float:
        """The most, over a mini-batch's tokens, that the policy has made of a token's probability in the rollout."""
        batches = list(micro_batches(rows, self.micro_batch_size))
        now, _ = self.sampler.log_probs("policy", rollout, batches=batches)  # (B, T)
        all_sum_([now])
        return (now - rollout.log_probs)[rows][rollout.response_mask[rows]].max().exp().item()

    def summed(self, averages: dict[str, float], roles: Sequence[str]) -> dict[str, float]:
        """The whole mini-batch's gradients of roles, and its averages, from each process's share of them."""
        if count() == 1:
            return averages
        gradients = [p.grad for role in roles for p in self.model.parameters_of(role) if p.grad is not None]
        names = [name for name in averages if name != EXACT]
        shares = torch.tensor([averages[name] for name in names], device=self.model.device)
        all_sum_([*gradients, shares])
        found = dict(zip(names, shares.tolist(), strict=True))
        return found | ({EXACT: max(all_gather(averages[EXACT]))} if EXACT in averages else {})

    @property
    def warming_up(self) -> bool:
        """Whether only the critic learns in this update."""
        return self.state.global_step < self.config.critic_warmup_steps

    def backward(self, role: str, rollout: Rollout, rows: Tensor) -> dict[str, float]:
        """Gradients of the active role on a mini-batch, and the mini-batch's averages."""
        loss_of = self.policy_loss if role == "policy" else self.value_loss
        tokens = rollout.response_mask[rows].sum()
        ptx = role == "policy" and self.config.ptx_coef > 0
        # Drawn before the work, which may begin again.
        texts = self.random_texts(self.config.ptx_batch_size or len(rows)) if ptx else []
        averages: dict[str, float] = defaultdict(float)

        def work() -> None:
            averages.clear()
            for parameter in self.model.parameters_of(role):
                parameter.grad = None
            if rollout.fresh and rollout.micro_batch_size != self.micro_batch_size:
                self.score(rollout)  # anew, from the micro-batches that there are now
                rollout.is_scored = False
            for micro in micro_batches(rows, self.micro_batch_size):
                loss, shares = loss_of(rollout, micro, tokens)
                self.accelerator.backward(loss)
                for name, share in shares.items():
                    so_far = averages[name]
                    averages[name] = max(so_far, share.item()) if name == EXACT else so_far + share.item()
            if texts:
                averages["loss/ptx_avg"] = self.ptx_backward(texts)

        self.with_less_memory(work)
        if not rollout.is_scored:
            self.share_scores(rollout)
        elif role == "policy" and not self.config.scores_policy:
            all_sum_([rollout.log_probs, rollout.entropy])
        return averages

    def with_less_memory(self, work: Callable[[], None]) -> None:
        """Do the work; where memory runs out and a size is `auto`, again with less.

        Layers are checkpointed first, half of those that are not yet, for that moves no row to another micro-batch;
        then micro-batches have half the rows. All processes begin again where one has run out: nothing in the work may
        wait for another process.
        """
        sizes = self.config.auto_sizes & {"gradient_checkpointing", "per_device_train_batch_size"}
        if not sizes:
            return work()
        while any(all_gather(ran_out(work))):
            layers, first = len(self.model.checkpointable), self.checkpointed_layers
            if "gradient_checkpointing" in sizes and first < layers:
                self.model.checkpointed = layers - (layers - first) // 2
                logger.warning("Out of memory: now %d of %d layers are checkpointed.", self.model.checkpointed, layers)
                kwargs = self.args.gradient_checkpointing_kwargs
                self.model.activation_checkpointing_enable(kwargs if isinstance(kwargs, dict) else None)
            elif "per_device_train_batch_size" in sizes:
                assert self.config.mini_batch_size is not None
                size = min(self.micro_batch_size, self.config.mini_batch_size // count())
                self.micro_batch_size = halved(size, "per_device_train_batch_size")
            else:
                raise torch.OutOfMemoryError("out of memory, with all layers checkpointed.")

    @property
    def checkpointed_layers(self) -> int:
        """So many decoder layers, the first ones, run their forward again in the backward."""
        layers, first = len(self.model.checkpointable), self.model.checkpointed
        return layers if first is None else min(first, layers)

    def policy_loss(self, rollout: Rollout, rows: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped policy loss of a micro-batch, and its share in the mini-batch's averages over `tokens` tokens."""
        kept, self.kept = self.kept, None
        if not self.config.scores_policy:
            log_probs = self.recorded_forward(rollout, rows)
        elif kept is not None and kept[0].data_ptr() == rows.data_ptr():
            log_probs = kept[1]
        else:
            log_probs, _ = self.policy_forward(rollout.rows(rows))
        batch = rollout.rows(rows)
        assert batch.advantages is not None
        loss, sums = objectives.policy_loss(
            log_probs, batch.log_probs, batch.advantages, batch.response_mask, self.config.cliprange, tokens
        )
        if self.config.advantage_estimator == "grpo":
            kl = objectives.kl_penalty(log_probs, batch.ref_log_probs, "k3") * batch.response_mask
            loss = loss + self.kl_coef * kl.sum() / tokens
        shares = {
            "loss/policy_avg": loss.detach(),
            "policy/approxkl_avg": sums["approxkl"].double() / tokens,
            "policy/clipfrac_avg": sums["clipfrac"].double() / tokens,
            "val/ratio": sums["ratio"].double() / tokens,
        }
        if rollout.fresh:
            shares[EXACT] = (log_probs.detach() - batch.log_probs).abs().max()
        return loss, shares

    def value_loss(self, rollout: Rollout, rows: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped value loss of a micro-batch times `vf_coef`, and its share in the mini-batch's averages."""
        batch = rollout.rows(rows)
        assert batch.values is not None and batch.returns is not None
        with self.accelerator.autocast():
            values = state_values(self.model, batch)
        loss, sums = objectives.value_loss(
            values, batch.values, batch.returns, batch.response_mask, self.config.cliprange_value, tokens
        )
        averages = {"loss/value_avg": loss.detach(), "val/clipfrac_avg": sums["clipfrac"] / tokens}
        return self.config.vf_coef * loss, averages

    def random_texts(self, count: int) -> list[list[int]]:
        """So many texts of `ptx`, cut to `ptx_max_length`, the shortest first."""
        assert self.texts is not None
        picked = self.texts[torch.randint(len(self.texts), (count,)).tolist()]["input_ids"]
        return sorted((ids[: self.config.ptx_max_length].tolist() for ids in picked), key=len)

    def ptx_backward(self, texts: list[list[int]]) -> float:
        """Backward of `ptx_coef` times the mean loss per token of texts (InstructGPT, equation 2).

        Returns that mean, in nats, or this process's share of it.
        """
        tokens, total = sum(len(text) - 1 for text in texts), 0.0
        texts = texts[rank() :: count()]
        for start in range(0, len(texts), self.micro_batch_size):
            with self.accelerator.autocast():
                loss, _ = text_loss(self.model, texts[start : start + self.micro_batch_size])
            self.accelerator.backward(self.config.ptx_coef * loss / tokens)
            total += loss.item()
        return total / tokens

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Sample the held-out prompts and log the means. The samples themselves stay in `self.samples`."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        with self.phase("evaluate"):
            self.samples = self.evaluator(self.result, dataset.to_list())
            means = self.evaluator.means(self.result, self.samples)
            means |= quality(means)
        metrics: dict[str, Any] = {f"{metric_key_prefix}_{key}": value for key, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Logging

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to `time/<name>` of the next log, in seconds. An error says what was being done."""
        try:
            with self.metrics.timed(name):
                yield
        except RuntimeError as error:
            if name in DOING:
                error.add_note(DOING[name].format(rows=self.sampler.batch_size, micro=self.micro_batch_size))
            raise

    def kl_penalty(self, rollout: Rollout) -> Tensor:
        """The estimate (B, T) of each token's KL to the reference, by `kl_estimator`."""
        estimator = self.config.kl_estimator or "k1"
        return objectives.kl_penalty(rollout.log_probs, rollout.ref_log_probs, estimator)

    def warn_inexact(self, log_ratio: float) -> None:
        """Say once that the update's first forward is not the one that scored."""
        if self.is_exact:
            logger.warning(
                "Before the first step of an update the policy's ratio should be 1, and a token's log-ratio was %.2g: "
                "its forward with a gradient rounds otherwise than the one without. This noise is in every "
                "policy/approxkl_avg and policy/clipfrac_avg; base.dtype=float16 or float32 makes it smaller.",
                log_ratio,
            )
        self.is_exact = False

    def non_score_reward(self, rollout: Rollout) -> Tensor:
        """The KL penalty's part (B,) of each response's reward."""
        return -self.kl_coef * (self.kl_penalty(rollout) * rollout.response_mask).sum(1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the log of a training step; evaluation and the end of training log what they were given
            logs |= self.metrics.flush()
            logs["episode"] = self.state.global_step * self.config.rollout_size
            logs["memory/peak_mib"] = max(all_gather(peak_memory_mib()))
            if count() > 1:
                logs["processes/summed_mib"] = take_summed() / 2**20
            if self.scaler.is_enabled() or self.config.on_nonfinite == "skip":
                logs[SKIPPED], self.skipped = self.skipped, 0
            if self.config.auto_sizes:
                logs["auto/per_device_train_batch_size"] = self.micro_batch_size
                logs["auto/rollout_micro_batch_size"] = self.sampler.batch_size
            if "gradient_checkpointing" in self.config.auto_sizes:
                logs["auto/checkpointed_layers"] = self.checkpointed_layers
        super().log(logs, start_time)

    # What the Trainer asks of a subclass

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The configured optimizer over a group for each trained role: its adapter, and its head."""
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            rates = {"policy": self.config.learning_rate, "critic": self.config.critic_learning_rate}
            groups = [
                {
                    "params": self.model.parameters_of(role),
                    "lr": rates[role] if rates[role] is not None else self.config.learning_rate,
                    "weight_decay": self.config.weight_decay,
                }
                for role in self.trained
            ]
            self.optimizer = kind(groups, **kwargs)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> None:
        """Nothing is left to clip when the Trainer asks: `optimizer_step` has, for each role by itself."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """See `policy/grad_norm` and `critic/grad_norm`."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        for role in (*self.trained, *copies(self.config)):
            self.model.save_role(role, folder / role)
        state = {"kl_coef": self.kl_coef, "best_reward": self.best_reward, "rewards": self.rewards.state_dict()}
        (folder / STATE).write_text(json.dumps(state) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        for role in (*self.trained, *copies(self.config)):
            self.model.load_role(role, folder / role)
        state = read_json(folder / STATE)
        self.kl_coef, self.best_reward = state["kl_coef"], state["best_reward"]
        self.rewards.load_state_dict(state["rewards"])

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def choice(self) -> dict[str, Any]:
        """The best evaluation, where evaluations are compared: `best_step`, `best_<metric>` and `stopped_early`.

        The highest of several values is too high, by luck: what the policy is worth is measured on other prompts (see
        `train_ppo`). With `load_best_model_at_end` the policy is that of this step. Where no evaluation was, both are
        None; where nothing is saved, the step is.
        """
        metric, state = self.args.metric_for_best_model, self.state
        if metric is None:
            return {}
        found = {"best_step": state.best_global_step, f"best_{metric.removeprefix('eval_')}": state.best_metric}
        return found | {"stopped_early": state.global_step < state.max_steps}


def check_fit(config: PPOConfig, prompts: int, has_texts: bool, split: bool = False) -> None:
    """Raises ValueError where the configuration does not fit the processes, the number of prompts or the texts.

    Args:
        split: the base lies on several GPUs, which are this process's.
    """
    if config.world_size > 1 or (config.n_gpu > 1 and not split):
        raise ValueError(
            f"PPOTrainer wants a process for each GPU, and none of accelerate's: there are "
            f"{max(config.world_size, config.n_gpu)}. Set CUDA_VISIBLE_DEVICES=0 for one process. For several, start "
            "`rlhf-recipes run --processes`, or call rlhf_recipes.join() before PPOConfig(...) in what torchrun starts."
        )
    check_shares("ppo", config)
    if prompts < config.rollout_prompts:
        raise ValueError(
            f"ppo.data has {prompts} prompts to train on, fewer than one rollout's {config.rollout_prompts} "
            "(ppo.mini_batch_size * num_mini_batches / num_generations)."
        )
    if config.ptx_coef and not has_texts:
        raise ValueError("ppo.ptx_coef mixes in texts and there are none: set ptx.data.")
