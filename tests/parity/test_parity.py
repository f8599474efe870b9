"""Our PPO against TRL 1.12.0's, number by number, on the same weights, prompts and responses.

`make parity` runs TRL's trainer (`trl112.py`) in a virtual environment of its own and then these tests, which repeat
its runs with ours. Each comparison holds to 1e-5 of the largest number compared. Where TRL 1.12 follows another rule,
the test shows how far apart the two are, and agrees to 1e-5 once TRL's rule is applied to our numbers.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from numpy.random import RandomState
from safetensors import safe_open
from scenarios import ACCUMULATE, LENGTH, LORA, OPTIONS, ROWS, SCENARIOS, TARGETS, fill, prompts, short
from support.tiny_models import make_tokenizer
from torch import Tensor, nn

from rlhf_recipes.model.base import load_base
from rlhf_recipes.model.sampler import state_values
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import Base, Lora
from rlhf_recipes.stages.options import PPOConfig
from rlhf_recipes.stages.ppo import objectives
from rlhf_recipes.stages.ppo.metrics import rollout_metrics
from rlhf_recipes.stages.ppo.rollout import Rollout
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

ROOT = Path(__file__).parents[2] / ".venv-parity"
DUMP = ROOT / "dump"
TOLERANCE = 1e-5  # of the largest number compared
# AdamW's steps are of the learning rate's size however small a gradient is, its rounding included, and sums round
# otherwise here, where rows lie at the left, than behind TRL's mask.
ADAMW_TOLERANCE = 5e-5
REAL = 1e-3  # of the same: a difference of rules is at least so large

pytestmark = pytest.mark.skipif(
    not all((DUMP / f"{name}.safetensors").is_file() for name in SCENARIOS),
    reason="needs TRL 1.12's numbers: run `make parity`",
)

# Rules of TRL 1.12's that ours does not follow.
BESSEL = "advantages and rewards whitened with Bessel's correction"
LATE = "the score comes one token after an early EOS, and that state has a value"
UNCLIPPED = "max_grad_norm is ignored"
MICRO = "a mini-batch's loss is the mean of its micro-batches' means"
LAST = "no gradient accumulation in the last rollout of a pass over the data"
ACROSS = "gradient accumulation runs on across mini-batches"
PAD = "a response ends before a padding token that was sampled"
PAD_EOS = "where padding is EOS, a response ends before EOS"
NO_STOP = "stop_token=None, the default: a response goes on after EOS"
PENALTY = "missing_eos_penalty also where stop_token_id ended the response"
GENERATED = "old log-probs are generation's scores"
BARE = "under a LoRA policy the reference is the bare base"
DILUTED = "metrics are averaged over padding too"
TEMPERATURE = "temperature + 1e-7"

COLUMNS = ("responses of full length", "early EOS", "early EOS, AdamW")  # of the first table that `make parity` prints

Check = Callable[..., None]
Make = Callable[..., "Ours"]


class Numbers(dict[str, Tensor]):
    """What TRL found in one scenario, by the keys that `trl112.py` gives, and what it logged."""

    logged: list[dict[str, float]]

    def steps(self, update: int) -> list[str]:
        """Keys of an update's calls of the optimizer, in order; each had one micro-batch."""
        count = sum(key.startswith(f"{update}/step") and key.endswith("/rows") for key in self)
        return [f"{update}/step{i}" for i in range(count)]

    def mask(self, update: int = 0, name: str = "padding_mask") -> Tensor:
        """(B, T), true on what TRL takes for response tokens; on those and one more for `padding_mask_p1`."""
        return ~self[f"{update}/{name}"]

    def parameters(self, key: str, role: str) -> Tensor:
        """A role's parameters, or their gradients, in one row."""
        found = sorted(name for name in self if name.startswith(f"{key}/{role}/"))
        return torch.cat([self[name].flatten() for name in found])


@cache
def trl(name: str) -> Numbers:
    with safe_open(DUMP / f"{name}.safetensors", "pt") as file:
        numbers = Numbers({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 # not a mapping
        numbers.logged = json.loads(file.metadata()["logged"])
    return numbers


class Scripted(SharedBase):
    """Generates the given responses in place of sampled ones: one batch, which the sampler has put in order."""

    script: Tensor

    def generate(self, input_ids: Tensor, *args: Any) -> Tensor:
        return self.script


class Ours(PPOTrainer):
    """Our trainer, with what the tests look at kept."""

    gradients: dict[str, Tensor]  # of the first optimizer step, by role

    def run(self, numbers: Numbers, updates: int = 1) -> Iterator[tuple[int, Rollout]]:
        """Repeat TRL's updates: its prompts, responses and mini-batches. Yields each update's rollout before it."""
        self.create_optimizer_and_scheduler(num_training_steps=updates)
        self.optimizer.register_step_pre_hook(self.keep_gradients)
        for update in range(updates):
            rollout = self.replay(numbers, update)
            yield update, rollout
            rows = []
            for key in numbers.steps(update):
                rows.append(numbers[f"{key}/rows"])
                if numbers[f"{key}/steps"]:
                    self.optimizer_step(rollout, torch.cat(rows))
                    rows.clear()
            self.lr_scheduler.step()

    def replay(self, numbers: Numbers, update: int = 0) -> Rollout:
        """The rollout of TRL's prompts and responses."""
        queries = numbers[f"{update}/queries"]
        padding = self.processing_class.pad_token_id
        rows = [{"prompt_ids": query[query != padding].tolist()} for query in queries]
        order = torch.tensor([len(row["prompt_ids"]) for row in rows]).argsort(stable=True)
        self.model.script = numbers[f"{update}/responses"][order]
        return self.advantages(self.rollout(rows))

    def keep_gradients(self, *args: Any) -> None:
        if not hasattr(self, "gradients"):
            self.gradients = {
                role: flat({name: p.grad for name, p in named(self.model, role).items()})
                for role in ("policy", "critic")
            }

    def token_rewards(self, rollout: Rollout) -> Tensor:
        """Reward (B, T) of each token."""
        kl = objectives.kl_penalty(rollout.log_probs, rollout.ref_log_probs, self.config.kl_estimator or "k1")
        return objectives.token_rewards(rollout.scores, kl, rollout.response_mask, self.config.kl_coef)

    def logged(self, name: str) -> Tensor:
        """Every value of a metric so far."""
        return torch.tensor(self.metrics.values[name])


class Bessel(Ours):
    """TRL's rule: whitening divides by the standard deviation of a sample, not of a population."""

    def advantages(self, rollout: Rollout) -> Rollout:
        rollout = super().advantages(rollout)
        assert rollout.advantages is not None
        return replace(rollout, advantages=rollout.advantages * bessel(rollout.response_mask))


class LateScore(Bessel):
    """TRL's rules for a response that ends early, beside `Bessel`'s.

    The score is the reward of one token more, after EOS. The state after EOS has a value, an error and a part in the
    mean of the value loss, and the advantage of EOS bootstraps from it.
    """

    def advantages(self, own: Rollout) -> Rollout:
        config, mask = self.config, own.response_mask
        self.late = mask | mask.roll(1, 1)  # the first column is true in any case
        with torch.no_grad(), self.model.role("critic"):
            values = state_values(self.model, replace(own, response_mask=self.late))
        kl = objectives.kl_penalty(own.log_probs, own.ref_log_probs, config.kl_estimator or "k1") * mask
        self.late_rewards = objectives.token_rewards(own.scores, kl, self.late, config.kl_coef)
        if config.whiten_rewards:
            mean = objectives.masked_mean(self.late_rewards, self.late)
            scaled = objectives.whiten(self.late_rewards, self.late) * bessel(self.late)
            self.late_rewards = (scaled + mean) * self.late
        advantages, returns = objectives.gae(self.late_rewards, values, self.late, config.gamma, config.lam)
        advantages = objectives.whiten(advantages, mask) * bessel(mask)
        return replace(own, values=values, advantages=advantages, returns=returns)

    def optimizer_step(self, rollout: Rollout, rows: Tensor, number: int = 1) -> float:
        """Each micro-batch's own mean, over the number of micro-batches that there ought to be."""
        losses = (("policy", self.policy_loss, rollout.response_mask), ("critic", self.value_loss, self.late))
        for micro in rows.split(self.config.per_device_train_batch_size):
            for role, loss_of, mask in losses:
                tokens = mask[micro].sum()
                with self.model.role(role):
                    loss, sums = loss_of(replace(rollout, response_mask=mask), micro, tokens)
                    (loss / self.config.gradient_accumulation_steps).backward()
                self.metrics.add(sums)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0.0


def bessel(mask: Tensor) -> Tensor:
    """Ratio of a population's standard deviation to a sample's, of the numbers where `mask` is true."""
    return torch.sqrt((mask.sum() - 1) / mask.sum())


def named(model: SharedBase, role: str) -> dict[str, nn.Parameter]:
    return {short(name): p for name, p in model.named_parameters() if f".{role}." in name}


def flat(tensors: dict[str, Any]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for _, tensor in sorted(tensors.items())]).clone()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Builds our trainer for a scenario, with TRL's adapters and heads."""

    def trainer(name: str, kind: type[Ours] = Ours, **options: Any) -> Ours:
        scenario = SCENARIOS[name]
        base = load_base(Base(str(DUMP / "base"), dtype=scenario.dtype)).to("cpu")
        model = Scripted(base, Lora(LORA["r"], LORA["lora_alpha"], target_modules=tuple(TARGETS)))
        for role in ("policy", "reference", "reward", "critic"):
            model.add_role(role, trainable=role in ("policy", "critic"), head=role in ("reward", "critic"))
            if role != "reference":  # a fresh adapter, which changes nothing: TRL's reference is the bare base
                fill(role, named(model, role))
        options = OPTIONS | {"max_grad_norm": 0.0} | scenario.options | options
        options.setdefault("per_device_train_batch_size", ROWS // options["num_mini_batches"])
        config = PPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=scenario.dtype == "bfloat16",
            gradient_checkpointing=False,
            total_episodes=ROWS * scenario.updates,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        data = Dataset.from_list([{"prompt_ids": ids, "prompt": ""} for ids in prompts(scenario.prompts)])
        return kind(model, config, data, make_tokenizer(scenario.pad))

    return trainer


@dataclass
class Report:
    """The tables that `make parity` prints. A number is a largest difference and what it is a part of."""

    equal: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)  # by quantity and column
    rules: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)  # by rule and what it changes
    left: dict[str, float] = field(default_factory=dict)  # by rule: the relative difference that it does not explain

    def lines(self) -> list[str]:
        lines = [f"| largest difference | {' | '.join(COLUMNS)} |", "|---|---|---|---|"]
        for quantity, found in self.equal.items():
            cells = ["{:.0e} of {:.2g}".format(*found[column]) if column in found else "" for column in COLUMNS]
            lines.append(f"| {quantity} | {' | '.join(cells)} |")
        lines += ["", "| TRL 1.12's rule | changes | by up to | of | left once applied |", "|---|---|---|---|---|"]
        before = ""
        for (rule, what), (size, of) in self.rules.items():
            left = f"{self.left[rule]:.0e}" if rule in self.left else ""
            name, left = (rule, left) if rule != before else ("", "")
            lines.append(f"| {name} | {what} | {size:.2g} | {of:.2g} | {left} |")
            before = rule
        return lines


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    report = Report()
    yield report
    (ROOT / "report.md").write_text("\n".join(report.lines()) + "\n")


def apart(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest number."""
    assert ours.shape == theirs.shape
    return float((ours.detach().double() - theirs.double()).abs().max()), float(theirs.abs().max())


@pytest.fixture
def agree(report: Report) -> Check:
    """Asserts that two tensors agree to a `tolerance` of the largest number, or of `scale`, with some rules applied."""

    def check(
        what: str,
        column: str,
        ours: Tensor,
        theirs: Tensor,
        *rules: str,
        scale: Any = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        size, largest = apart(ours, theirs)
        largest = largest if scale is None else float(scale)
        if column:
            row = report.equal.setdefault(what, {})
            row[column] = max(row.get(column, (0.0, 0.0)), (size, largest))
        for rule in rules:
            report.left[rule] = max(report.left.get(rule, 0.0), size / largest)
        assert size <= tolerance * largest, f"{what} ({column or rules}): {size:.2e} of {largest:.3g}"

    return check


@pytest.fixture
def differ(report: Report) -> Check:
    """Asserts that a rule makes a difference, of more than `least` times the largest number."""

    def check(rule: str, what: str, ours: Tensor, theirs: Tensor, least: float = REAL) -> None:
        size, largest = report.rules[rule, what] = apart(ours, theirs)
        assert size > least * largest, f"{rule}, {what}: {size:.2e} of {largest:.3g}"

    return check


# A whole training run


@pytest.mark.parametrize(
    "name, column, kind",
    [("full", COLUMNS[0], Bessel), ("early", COLUMNS[1], LateScore), ("adamw", COLUMNS[2], LateScore)],
)
def test_eight_updates(make: Make, agree: Check, name: str, column: str, kind: type[Ours]) -> None:
    numbers, ours = trl(name), make(name, kind)
    rules = [BESSEL] if kind is Bessel else [BESSEL, LATE]
    start = {role: flat(named(ours.model, role)) for role in ("policy", "critic")}
    for update, rollout in ours.run(numbers, 8):
        compare_rollout(agree, column, rules, ours, rollout, numbers, update)
        if update == 1:
            first = {role: flat(named(ours.model, role)) for role in start}
    for role in start:
        agree(f"{role} gradient", column, ours.gradients[role], numbers.parameters("0/gradient", role), *rules)
    for loss, key in (("policy", "pg_loss"), ("value", "vf_loss")):
        theirs = torch.stack([numbers[f"{step}/{key}"] for update in range(8) for step in numbers.steps(update)])
        agree(f"{loss} loss of each step", column, ours.logged(f"loss/{loss}_avg"), theirs, *rules)
    for role, before in start.items():
        for updates, after in (("1 update", first[role]), ("8 updates", flat(named(ours.model, role)))):
            theirs = numbers.parameters(f"{int(updates[0]) - 1}/after", role)
            # Part of what was learned; for AdamW, of the parameters.
            scale, tolerance = (theirs - before).abs().max(), TOLERANCE
            if name == "adamw":
                scale, tolerance = theirs.abs().max(), ADAMW_TOLERANCE
            what = f"{role} parameters after {updates}"
            agree(what, column, after, theirs, *rules, UNCLIPPED, scale=scale, tolerance=tolerance)
    # The run did go where the losses are clipped.
    assert all(sum(ours.logged(name)) > 1 for name in ("policy/clipfrac_avg", "val/clipfrac_avg"))


def compare_rollout(
    agree: Check, column: str, rules: list[str], ours: Ours, rollout: Rollout, numbers: Numbers, update: int
) -> None:
    """What an update starts from. Outside the response TRL's log-probs are 1 and ours 0."""
    mask, late, key = rollout.response_mask, numbers.mask(update, "padding_mask_p1"), f"{update}/"
    rewards = ours.late_rewards if isinstance(ours, LateScore) else ours.token_rewards(rollout)
    assert torch.equal(mask, numbers.mask(update)) and torch.equal(late, mask) == (LATE not in rules)
    assert numbers[key + "logprobs"][~mask].eq(1).all() and not rollout.log_probs[~mask].any()
    agree("log-probs", column, rollout.log_probs[mask], numbers[key + "logprobs"][mask])
    agree("reference log-probs", column, rollout.ref_log_probs[mask], numbers[key + "ref_logprobs"][mask], BARE)
    agree("scores", column, rollout.scores, numbers[key + "scores"])
    agree("values", column, rollout.values, numbers[key + "values"], *rules[1:])
    agree("token rewards", column, rewards, numbers[key + "rewards"], *rules[1:])
    agree("returns", column, rollout.returns, numbers[key + "returns"], *rules[1:])
    agree("whitened advantages", column, rollout.advantages, numbers[key + "advantages"], *rules)


def test_whitened_rewards_k3_and_a_discount(make: Make, agree: Check) -> None:
    numbers, ours, rules = trl("whiten"), make("whiten", LateScore), (BESSEL, LATE)
    (_, rollout), *_ = ours.run(numbers)
    agree("token rewards", "", ours.late_rewards, numbers["0/rewards"], *rules)
    agree("returns", "", rollout.returns, numbers["0/returns"], *rules)
    agree("whitened advantages", "", rollout.advantages, numbers["0/advantages"], *rules)
    for role in ("policy", "critic"):
        agree(f"{role} gradient", "", ours.gradients[role], numbers.parameters("0/gradient", role), *rules)


def test_the_learning_rate_moves_once_in_an_update(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, ours, rates = trl("full"), make("full"), []
    ours.model.script = numbers["0/responses"]
    adapt = ours.adapt
    monkeypatch.setattr(ours, "adapt", lambda *a: (rates.append(ours.optimizer.param_groups[0]["lr"]), adapt(*a)))
    ours.train()
    assert len(set(rates)) == 8 and rates == pytest.approx([row["lr"] for row in numbers.logged], rel=1e-12)


def test_what_is_logged(make: Make, agree: Check, differ: Check) -> None:
    numbers, ours = trl("full"), make("full", Bessel)
    for _, rollout in ours.run(numbers):
        ours.metrics.add(rollout_metrics(rollout, ours.non_score_reward(rollout), ours.kl_coef, 1.0))
    names = [f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")]
    names += ["loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "policy/approxkl_avg"]
    for name in [*names, "val/ratio", "val/num_eos_tokens"]:
        own, theirs = ours.logged(name).mean(), torch.tensor(numbers.logged[0][name])
        agree("12 logged metrics", COLUMNS[0], own, theirs, scale=theirs.abs().clamp(min=1))


def test_metrics_over_padding(make: Make, agree: Check, differ: Check) -> None:
    numbers, ours = trl("early"), make("early", LateScore)
    (_, rollout), *_ = ours.run(numbers)
    tokens = torch.stack([rollout.response_mask[numbers[f"{step}/rows"]].sum() for step in numbers.steps(0)])
    places = ROWS // 2 * LENGTH
    for name, at_padding in (("policy/approxkl_avg", 0), ("val/ratio", 1)):
        own, theirs = ours.logged(name), torch.tensor(numbers.logged[0][name])
        differ(DILUTED, name, own.mean(), theirs)
        agree(name, "", ((own * tokens + at_padding * (places - tokens)) / places).mean(), theirs, DILUTED)


# Where TRL 1.12 follows another rule


def test_whitening_as_of_a_sample(make: Make, differ: Check) -> None:
    numbers = trl("full")
    rollout = make("full").replay(numbers)
    what = f"advantages of {rollout.response_mask.sum()} tokens"
    differ(BESSEL, what, rollout.advantages, numbers["0/advantages"])


def test_the_score_after_an_early_eos(make: Make, differ: Check) -> None:
    numbers, ours = trl("early"), make("early", Bessel)
    (_, rollout), *_ = ours.run(numbers)
    mask, late = rollout.response_mask, numbers.mask(0, "padding_mask_p1")
    assert (late.sum(1) - rollout.lengths).tolist() == [1, 1, 0, 1, 0, 1, 1, 1]
    differ(LATE, "token rewards", ours.token_rewards(rollout), numbers["0/rewards"])
    differ(LATE, "returns of the response", rollout.returns[mask], numbers["0/returns"][mask])
    differ(LATE, "advantages", rollout.advantages, numbers["0/advantages"])
    differ(LATE, "first value loss", ours.logged("loss/value_avg")[0], numbers["0/step0/vf_loss"])
    for role in ("policy", "critic"):
        differ(LATE, f"first {role} gradient", ours.gradients[role], numbers.parameters("0/gradient", role))


def test_no_gradient_clipping(make: Make, differ: Check) -> None:
    numbers, ours = trl("full"), make("full", Bessel, max_grad_norm=OPTIONS["max_grad_norm"])
    start = {role: flat(named(ours.model, role)) for role in ("policy", "critic")}
    list(ours.run(numbers))
    for role, before in start.items():
        moved, theirs = flat(named(ours.model, role)) - before, numbers.parameters("0/after", role) - before
        differ(UNCLIPPED, f"what the {role} learns in an update, at 0.1", moved, theirs)


def test_gradient_accumulation(make: Make, agree: Check, differ: Check) -> None:
    numbers, whole, ours = trl("accumulate"), make("accumulate", LateScore), make("accumulate", LateScore, **ACCUMULATE)
    start = {role: flat(named(ours.model, role)) for role in ("policy", "critic")}
    list(whole.run(numbers))
    for update, _ in ours.run(numbers, 2):
        if update == 1:
            first = {role: flat(named(ours.model, role)) for role in start}
    for role, before in start.items():
        gradient, last = numbers.parameters("0/gradient", role), flat(named(ours.model, role))
        differ(MICRO, f"first {role} gradient", whole.gradients[role], gradient)
        agree(f"{role} gradient", "", ours.gradients[role], gradient, MICRO)
        for update, after, rule in ((0, first[role], MICRO), (1, last, LAST)):
            theirs = numbers.parameters(f"{update}/after", role)
            agree(f"{role} parameters", "", after, theirs, rule, scale=(theirs - before).abs().max())
    steps = [sum(bool(numbers[f"{step}/steps"]) for step in numbers.steps(update)) for update in (0, 1)]
    differ(LAST, "optimizer steps in 2 epochs of 1 mini-batch", torch.tensor(2.0), torch.tensor(float(steps[1])))
    assert steps == [2, 4]


def test_mini_batches_with_gradient_accumulation(make: Make, agree: Check, differ: Check) -> None:
    numbers, ours = trl("accumulate_mini"), make("accumulate_mini", LateScore, **ACCUMULATE, num_mini_batches=1)
    start = {role: flat(named(ours.model, role)) for role in ("policy", "critic")}
    list(ours.run(numbers))
    steps = sum(bool(numbers[f"{step}/steps"]) for step in numbers.steps(0))
    differ(ACROSS, "optimizer steps in 2 epochs of 2 mini-batches", torch.tensor(4.0), torch.tensor(float(steps)))
    for role, before in start.items():
        after, theirs = flat(named(ours.model, role)), numbers.parameters("0/after", role)
        agree(f"{role} parameters", "", after, theirs, ACROSS, scale=(theirs - before).abs().max())


@pytest.mark.parametrize("name, rule", [("sampled_pad", PAD), ("pad_is_eos", PAD_EOS)])
def test_masks_by_comparing_with_padding(make: Make, agree: Check, differ: Check, name: str, rule: str) -> None:
    numbers, ours = trl(name), make(name)
    rollout = ours.replay(numbers)
    responses, mask = numbers["0/responses"], rollout.response_mask
    seen = responses.ne(ours.processing_class.pad_token_id).cumprod(1).bool()
    assert torch.equal(seen, numbers.mask()) and not (seen & ~mask).any()
    differ(rule, f"response tokens of {ROWS} rows", mask.sum().float(), seen.sum().float())
    differ(rule, "scores", rollout.scores, numbers["0/scores"])

    attention = torch.cat([rollout.attention_mask[:, :-LENGTH], seen], 1)
    cut = replace(rollout, response_mask=seen, attention_mask=attention)
    log_probs, _ = ours.sampler.log_probs("policy", cut)
    scores = ours.sampler.reward_scores(cut) - OPTIONS["missing_eos_penalty"] * ~rollout.ended
    agree("scores", "", scores, numbers["0/scores"], rule)
    agree("log-probs", "", log_probs[seen], numbers["0/logprobs"][seen], rule)
    agree("values", "", ours.sampler.values(cut)[seen], numbers["0/values"][seen], rule)


def test_no_stop_token_by_default(make: Make, agree: Check, differ: Check) -> None:
    numbers, ours = trl("no_stop"), make("no_stop")
    rollout = ours.replay(numbers)
    tokens = rollout.response_mask.sum().float()
    differ(NO_STOP, f"response tokens of {ROWS} rows", tokens, numbers.mask().sum().float())
    differ(NO_STOP, "scores", rollout.scores, numbers["0/scores"])
    ours.sampler.stop_token_ids = [-1]
    rollout = ours.replay(numbers)
    for what, own, key in (
        ("scores", rollout.scores, "scores"),
        ("log-probs", rollout.log_probs, "logprobs"),
        ("values", rollout.values, "values"),
    ):
        agree(what, "", own, numbers[f"0/{key}"], NO_STOP)


def test_the_penalty_where_a_stop_token_is_not_eos(make: Make, agree: Check, differ: Check) -> None:
    numbers, ours = trl("stop_id"), make("stop_id", stop_token_id=50)
    rollout = ours.replay(numbers)
    assert torch.equal(rollout.response_mask, numbers.mask()) and rollout.ended.sum() == 7
    differ(PENALTY, "scores", rollout.scores, numbers["0/scores"])
    penalized = rollout.scores - OPTIONS["missing_eos_penalty"] * rollout.ended
    agree("scores", "", penalized, numbers["0/scores"], PENALTY)


@pytest.mark.parametrize(
    "name, what",
    [
        ("sampled", "first ratio, float32"),
        ("sampled_bf16", "first ratio, bfloat16"),
        ("sampled_warped", "first ratio, float32, the model's own repetition_penalty=1.3"),
    ],
)
def test_old_log_probs_from_generation(make: Make, agree: Check, differ: Check, name: str, what: str) -> None:
    numbers, ours = trl(name), make(name)
    rollout = ours.replay(numbers)
    rows = numbers["0/step0/rows"]
    kept = numbers.mask()[rows]
    assert rollout.response_mask[rows].sum() > kept.sum()  # the model did sample a padding token
    ratio = numbers["0/step0/ratio"][kept].float()
    differ(GENERATED, what, torch.ones_like(ratio), ratio, 0 if name == "sampled" else REAL)
    batch = rollout.rows(rows)
    with ours.model.role("policy"):
        _, logged = ours.policy_loss(rollout, rows, batch.response_mask.sum())
    assert logged["val/ratio"] == 1 and logged["policy/approxkl_avg"] == 0
    if name == "sampled":
        seen = numbers.mask()
        agree("log-probs", "", rollout.log_probs[seen], numbers["0/logprobs"][seen], GENERATED)


def test_the_reference_is_the_bare_base(make: Make, differ: Check) -> None:
    numbers, ours = trl("full"), make("full")
    fill("policy", named(ours.model, "reference"))  # as after SFT: both start from its adapter
    rollout = ours.replay(numbers)
    kl = (rollout.log_probs - rollout.ref_log_probs).sum(1).mean()
    assert kl == 0
    differ(BARE, "objective/kl before the first update, nats", kl, numbers["0/kl"].sum(1).mean())


def test_the_temperature(make: Make, differ: Check) -> None:
    ours, temperature = make("full"), OPTIONS["temperature"]
    rollout = ours.replay(trl("full"))
    with torch.no_grad(), ours.model.role("policy"):
        logits = ours.model.causal(rollout.input_ids[:, -LENGTH:]).logits.double()
    own, theirs = ((logits / tau).log_softmax(-1) for tau in (temperature, temperature + 1e-7))
    differ(TEMPERATURE, "log-probs, in float64", own, theirs, 0)


def test_settings_that_trl_does_not_follow() -> None:
    numbers = trl("full")
    # Every run was given gradient_checkpointing=True, TRL's default.
    assert not numbers["checkpointing"]
    # NumPy draws the mini-batches, and is never seeded: its state is as trl112.py left it, whatever the trainer's seed.
    assert torch.equal(numbers["numpy_state"], torch.from_numpy(RandomState(0).get_state()[1].astype("int64")))
