"""PPO on a shared base: rollout -> score -> advantages -> update -> log.

One step of the Trainer is one PPO update: a rollout, then `num_ppo_epochs` passes of `num_mini_batches` optimizer steps
over it. Logging, evaluation, checkpoints and the learning-rate schedule count updates, so a checkpoint always lies on a
rollout boundary.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from trl.trainer.utils import get_callable_name, identity

from . import objectives
from .memory import peak_memory_mib
from .model import SharedBase, load_base
from .recipe import function
from .reward import check_probes
from .rollout import RewardFunc, Rollout, Sampler, Samples, call_reward_func, state_values
from .summary import compare, means

if TYPE_CHECKING:
    from .runner import Job


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`, beside transformers' own. Names and meanings are TRL 1.12's where it had the option.

    A rollout holds per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches prompts; an optimizer
    step takes the first two factors' product, in micro-batches of per_device_train_batch_size.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the policy adapter."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic's adapter and head; None: as the policy."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many PPO updates."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Trade compute for memory, as TRL does."})
    total_episodes: int | None = field(
        default=None, metadata={"help": "Prompts sampled in all; None: num_train_epochs over the data."}
    )
    max_prompt_length: int | None = field(default=512, metadata={"help": "Longer prompts, in tokens, are bad rows."})
    response_length: int = field(default=53, metadata={"help": "Sample at most so many tokens."})
    temperature: float = field(default=0.7, metadata={"help": "The policy is the distribution tempered by this."})
    stop_token_id: int | None = field(
        default=None, metadata={"help": "One more token that ends a response, beside EOS and the chat template's own."}
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Subtracted from the score of a response without EOS."}
    )
    rollout_micro_batch_size: int = field(
        default=64,
        metadata={"help": "Rows sampled or scored at once: memory and speed, and which numbers are drawn."},
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over each rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps in each pass."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL penalty in the reward."})
    kl_estimator: Literal["k1", "k3"] = field(default="k1", metadata={"help": "See objectives.kl_penalty."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the token rewards to unit variance."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "GAE's lambda."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the values."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("response_length", "temperature", "num_ppo_epochs", "num_mini_batches", "rollout_micro_batch_size")
        for name in (*positive, "cliprange", "cliprange_value", "total_episodes", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"ppo.{name} must be above 0, not {value}.")
        for name in ("kl_coef", "vf_coef", "critic_learning_rate", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"ppo.{name} must not be below 0, but is {value}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"ppo.{name} must be from 0 to 1, not {getattr(self, name)}.")
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f"ppo.kl_estimator must be k1 or k3, not {self.kl_estimator!r}.")

    @property
    def mini_batch_size(self) -> int:
        """Rows of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def rollout_size(self) -> int:
        """Rows of one rollout."""
        return self.mini_batch_size * self.num_mini_batches


class PPOTrainer(Trainer):
    """PPO of the `policy` role against the `reference` role, with the values of the `critic` role."""

    model: SharedBase
    args: PPOConfig

    def __init__(
        self,
        model: SharedBase,
        args: PPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = (),
        gold: RewardFunc | None = None,
        stop_token_ids: Sequence[int] = (),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        """
        Args:
            model: a shared base with the roles `policy` and `critic` (trainable, the critic with a head), `reference`
                and, where there are no reward functions, `reward` with a head.
            train_dataset: rows with `prompt_ids` (token ids) and, for reward functions, `prompt` and any other columns,
                as `data.prepare("ppo", ...)` gives them.
            eval_dataset: held-out rows, sampled with fixed seeds.
            reward_funcs: functions with TRL's signature whose sum is the score, in place of the `reward` role.
            gold: a function of the same signature that measures true quality in evaluation, never trained on.
            stop_token_ids: tokens that end a response, beside the tokenizer's EOS.
        """
        self.config = args
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(
                f"PPOTrainer runs in one process on one GPU, not {max(args.world_size, args.n_gpu)}. "
                "Start it without torchrun or accelerate launch, with CUDA_VISIBLE_DEVICES=0."
            )
        if len(train_dataset) < args.rollout_size:
            raise ValueError(
                f"ppo.data has {len(train_dataset)} prompts to train on, fewer than one rollout's {args.rollout_size} "
                "(ppo.per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches)."
            )
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.reward_funcs = {get_callable_name(function): function for function in functions}
        if len(self.reward_funcs) < len(functions):
            raise ValueError(f"Two reward functions have one name: {', '.join(map(get_callable_name, functions))}.")
        self.gold = gold
        self.samples: list[dict[str, Any]] = []  # of the last evaluation
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)

        # The Trainer counts whole rollouts, so it must neither accumulate nor see less than one rollout as a batch.
        counting = copy.copy(args)
        counting.per_device_train_batch_size = args.rollout_size
        counting.gradient_accumulation_steps = 1
        counting.remove_unused_columns = False
        counting.dataloader_drop_last = True
        if args.total_episodes is not None:
            counting.max_steps = math.ceil(args.total_episodes / args.rollout_size)
        super().__init__(
            model=model,
            args=counting,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=identity,
            callbacks=callbacks,
        )
        self.sampler = Sampler(
            model,
            processing_class,
            args.response_length,
            args.temperature,
            args.rollout_micro_batch_size,
            [*stop_token_ids, *([args.stop_token_id] if args.stop_token_id is not None else [])],
            lambda: self.accelerator.autocast(),
        )

    # The update

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One PPO update, from the prompts in `inputs` to the last optimizer step, whose loss it returns."""
        start = time.perf_counter()
        self.model.train()
        rollout = self.rollout(inputs)
        with self.phase("update"):
            for _ in range(self.config.num_ppo_epochs):
                order = torch.randperm(len(inputs)).to(rollout.input_ids.device)
                for rows in order.split(self.config.mini_batch_size):
                    self.optimizer_step(rollout, rows)
        self.record(rollout, time.perf_counter() - start)
        loss = self._sums["loss/policy_avg"][-1] + self.config.vf_coef * self._sums["loss/value_avg"][-1]
        if not math.isfinite(loss):
            raise RuntimeError(
                f"The PPO loss is {loss} at update {self.state.global_step + 1}: lower ppo.learning_rate."
            )
        return torch.tensor(loss, device=self.args.device)

    def rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Sample a response to each prompt, and find everything the update needs to know of it."""
        config = self.config
        with self.phase("generate"):
            samples = self.sampler.sample("policy", [row["prompt_ids"] for row in rows])
        with self.phase("score"):
            sources = self.score(rows, samples)
            scores = torch.stack(list(sources.values())).sum(0)  # (B,)
            if config.missing_eos_penalty is not None:
                scores = scores - config.missing_eos_penalty * ~samples.ended
            log_probs, entropy = self.sampler.log_probs("policy", samples)
            ref_log_probs, _ = self.sampler.log_probs("reference", samples)
            values = self.sampler.values(samples)
        for name, of_source in sources.items():
            self._sums[f"rewards/{name}/mean"].append(of_source.mean().item())
        mask = samples.response_mask
        kl = objectives.kl_penalty(log_probs, ref_log_probs, config.kl_estimator)
        rewards = objectives.token_rewards(scores, kl, mask, config.kl_coef)
        if config.whiten_rewards:
            rewards = objectives.whiten(rewards, mask, shift_mean=False)
        advantages, returns = objectives.gae(rewards, values, mask, config.gamma, config.lam)
        return Rollout(
            **vars(samples),
            log_probs=log_probs,
            ref_log_probs=ref_log_probs,
            entropy=entropy,
            values=values,
            scores=scores,
            advantages=objectives.whiten(advantages, mask),
            returns=returns,
        )

    def score(self, rows: list[dict[str, Any]], samples: Samples) -> dict[str, Tensor]:
        """Each source's scores (B,), whose sum PPO maximises: the reward functions or, without any, the reward role."""
        if not self.reward_funcs:
            return {"reward_model": self.sampler.reward_scores(samples)}
        return {name: self.judge(reward_func, rows, samples) for name, reward_func in self.reward_funcs.items()}

    def judge(self, reward_func: RewardFunc, rows: list[dict[str, Any]], samples: Samples) -> Tensor:
        """A reward function's scores (B,) of the samples."""
        texts = self.sampler.texts(samples)
        return call_reward_func(reward_func, rows, samples.responses(), texts, self.state).to(self.model.device)

    def optimizer_step(self, rollout: Rollout, rows: Tensor) -> None:
        """One step on a mini-batch: the policy's forward and backward, then the critic's, in micro-batches.

        The two never share a graph, because a backward must run under the role of its forward.
        """
        tokens = rollout.response_mask[rows].sum()
        rows = rows[rollout.attention_mask[rows].sum(1).argsort()]  # rows of like length share a micro-batch
        totals: dict[str, float] = defaultdict(float)
        for role, loss_of in (("policy", self.policy_loss), ("critic", self.value_loss)):
            with self.model.role(role):
                for micro in rows.split(self.config.per_device_train_batch_size):
                    loss, sums = loss_of(rollout.rows(micro), tokens)
                    self.accelerator.backward(loss)
                    for name, value in sums.items():
                        totals[name] += value.item()
            if self.config.max_grad_norm > 0:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters_of(role), self.config.max_grad_norm)
                totals[f"{role}/grad_norm"] = float(norm or 0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in totals.items():
            self._sums[name].append(value)

    def policy_loss(self, batch: Rollout, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped policy loss of a micro-batch, and its share in the mini-batch's averages over `tokens` tokens."""
        with self.accelerator.autocast():
            log_probs, _ = self.model.log_probs(
                batch.input_ids, batch.attention_mask, batch.response_mask, self.config.temperature
            )
        loss, sums = objectives.policy_loss(
            log_probs, batch.log_probs, batch.advantages, batch.response_mask, self.config.cliprange, tokens
        )
        return loss, {
            "loss/policy_avg": loss.detach(),
            "policy/approxkl_avg": sums["approxkl"] / tokens,
            "policy/clipfrac_avg": sums["clipfrac"] / tokens,
            "val/ratio": sums["ratio"] / tokens,
        }

    def value_loss(self, batch: Rollout, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped value loss of a micro-batch times `vf_coef`, and its share in the mini-batch's averages."""
        with self.accelerator.autocast():
            values = state_values(self.model, batch)
        loss, sums = objectives.value_loss(
            values, batch.values, batch.returns, batch.response_mask, self.config.cliprange_value, tokens
        )
        averages = {"loss/value_avg": loss.detach(), "val/clipfrac_avg": sums["clipfrac"] / tokens}
        return self.config.vf_coef * loss, averages

    # Evaluation

    def evaluate_role(self, role: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sample one response to each row's prompt from a role, always with the same random numbers.

        Returns a dict a row: prompt, completion, response_length (tokens), ended, kl (nats, to the reference, summed
        over the response), score (reward role or functions) and, where gold is known, gold.
        """
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            samples = self.sampler.sample(role, [row["prompt_ids"] for row in rows])
        scores = torch.stack(list(self.score(rows, samples).values())).sum(0)
        gold = self.judge(self.gold, rows, samples) if self.gold else None
        kl = (self.sampler.log_probs(role, samples)[0] - self.sampler.log_probs("reference", samples)[0]).sum(1)
        texts = self.sampler.texts(samples)
        return [
            {
                "prompt": rows[i]["prompt"],
                "completion": texts[i],
                "response_length": int(samples.lengths[i]),
                "ended": bool(samples.ended[i]),
                "kl": kl[i].item(),
                "score": scores[i].item(),
                **({"gold": gold[i].item()} if gold is not None else {}),
            }
            for i in range(len(rows))
        ]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Sample the held-out prompts and log the means. The samples themselves stay in `self.samples`."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        with self.phase("evaluate"):
            self.samples = self.evaluate_role("policy", dataset.to_list())
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in means(self.samples).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Logging

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to `time/<name>` of the next log, in seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()
            self._seconds[name] += time.perf_counter() - start

    def record(self, rollout: Rollout, seconds: float) -> None:
        """Add an update's metrics, under TRL's names, to those of the next log. KL and entropy are sums over a row."""
        mask, sums = rollout.response_mask, self._sums
        kl = rollout.log_probs - rollout.ref_log_probs
        penalty = objectives.kl_penalty(rollout.log_probs, rollout.ref_log_probs, self.config.kl_estimator) * mask
        non_score = -self.config.kl_coef * penalty.sum(1)
        for name, value in {
            "objective/kl": kl.sum(1).mean(),
            "objective/entropy": -rollout.log_probs.sum(1).mean(),
            "objective/non_score_reward": non_score.mean(),
            "objective/rlhf_reward": (rollout.scores + non_score).mean(),
            "objective/scores": rollout.scores.mean(),
            "policy/entropy_avg": objectives.masked_mean(rollout.entropy, mask),
            "val/explained_variance": objectives.explained_variance(rollout.values, rollout.returns, mask),
            "val/num_eos_tokens": rollout.ended.sum(),
            "response_length": mask.sum(1).float().mean(),
            "without_eos": 1 - rollout.ended.float().mean(),
            "tokens_per_second": mask.sum() / seconds,
        }.items():
            sums[name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # the log of a training step; evaluation and the end of training log what they were given
            logs |= {name: sum(values) / len(values) for name, values in self._sums.items()}
            logs |= {f"time/{name}": seconds for name, seconds in self._seconds.items()}
            logs["episode"] = self.state.global_step * self.config.rollout_size
            logs["memory/peak_mib"] = peak_memory_mib()
            self._sums.clear()
            self._seconds.clear()
        super().log(logs, start_time)

    # What the Trainer asks of a subclass

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The configured optimizer over two groups: the policy's adapter, and the critic's adapter and head."""
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            rates = {"policy": self.config.learning_rate, "critic": self.config.critic_learning_rate}
            groups = [
                {
                    "params": self.model.parameters_of(role),
                    "lr": rates[role] if rates[role] is not None else self.config.learning_rate,
                    "weight_decay": self.config.weight_decay,
                }
                for role in ("policy", "critic")
            ]
            self.optimizer = kind(groups, **kwargs)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> None:
        """Nothing is left to clip when the Trainer asks: `optimizer_step` has, for each role by itself."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        """See `policy/grad_norm` and `critic/grad_norm`."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        for role in ("policy", "critic"):
            self.model.save_role(role, folder / role)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for role in ("policy", "critic"):
            self.model.load_role(role, Path(resume_from_checkpoint) / role)


def train(job: "Job") -> dict[str, Any]:
    """The `ppo` stage: put the roles on one base, train, save policy and critic, compare the models.

    The critic starts as a copy of the reward model, as InstructGPT's did; without a reward model it is a copy of the
    SFT adapter with a zero head. Returns the comparison on the held-out prompts.
    """
    recipe, run_dir = job.recipe, job.run_dir
    shared = SharedBase(load_base(recipe.base), recipe.lora, job.fingerprint)
    start = run_dir / "sft" if recipe.sft is not None else None
    shared.add_role("reference", start)
    shared.add_role("policy", start, trainable=True)
    if recipe.reward is not None:
        shared.add_role("reward", run_dir / "reward", head=True)
        shared.add_role("critic", run_dir / "reward", trainable=True, head=True)
        check_probes(shared, run_dir / "reward")
    else:
        shared.add_role("critic", start, trainable=True)
        shared.add_head("critic")
    trainer = PPOTrainer(
        model=shared,
        args=job.config,
        train_dataset=job.data.train,
        eval_dataset=job.data.heldout,
        processing_class=job.tokenizer,
        reward_funcs=[function(name) for name in recipe.ppo.reward_funcs],
        gold=function(recipe.gold) if recipe.gold else None,
        stop_token_ids=[job.data.stop_token_id],
    )
    recorder = job.watch(trainer)
    job.train(trainer)
    for role in ("policy", "critic"):
        shared.save_role(role, job.folder / role)
        job.tokenizer.save_pretrained(job.folder / role)
    results, samples = compare(trainer)
    recorder.samples(trainer.state.global_step, samples)
    return results
