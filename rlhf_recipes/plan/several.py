"""A stage on several GPUs, three ways: memory of a card, seconds of a step, and what goes from card to card.

data      every card has the whole base and takes its share of the rows; gradients are summed once an optimizer step
layers    one process lays the layers over the cards of a machine, and one card works at a time
shards    every card takes its share of the rows and keeps a part of each layer, which is gathered before it is used

All of it is computed, from bytes and operations: none has been measured on cards. Latencies are left out, so what
sends little and often is slower than this.
"""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from ..model.base import base_config, precision
from ..recipe.overrides import replace
from ..recipe.values import Recipe
from ..stages.configure import Configs
from .cards import Card
from .hours import SPREAD, Range, seconds_of_step
from .plan import at_full_depth, for_device, settle_auto_sizes, shape_of, stage_plan
from .skeleton import outside_bytes, weight_bytes
from .spread import plan_of_card, weights_of_card
from .stage_memory import GIB, MIB, StagePlan
from .work import flop_of_step, forwards_of_step, weights_of_token

WAYS = ("data", "layers", "shards")

# Of a link's rate: what NCCL's ring gets of NVLink's 450 GB/s, by one of its authors (NVIDIA/nccl-tests, issue 212).
# SPREAD times less is what three A100 had of PCIe's 32 GB/s (issue 178 there: 20).
REACHED = 370 / 450


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, as many in each machine. Raises ValueError where they cannot be."""

    card: Card
    gpus: int  # in all
    nodes: int = 1  # machines
    network: float | None = None  # of a machine, in GB/s and one direction

    def __post_init__(self) -> None:
        if self.gpus % self.nodes:
            raise ValueError(f"--gpus={self.gpus} are of all machines: --nodes={self.nodes} cannot divide them evenly.")
        if self.nodes > 1 and self.network is None:
            raise ValueError(f"--nodes={self.nodes} needs the rate between machines, as in --network 25Gbit.")

    def cards(self, way: str) -> int:
        """How many work on a run; the one process of `layers` has those of one machine."""
        return self.gpus // self.nodes if way == "layers" else self.gpus

    def gb_per_s(self, way: str) -> float | None:
        """The slowest link between them, in one direction. A ring through all cards enters each machine once."""
        if self.nodes == 1 or way == "layers" or self.card.link is None or self.network is None:
            return self.card.link
        return min(self.card.link, self.network)


def network_of(text: str) -> float:
    """The rate of a network in GB/s: `25Gbit` are 3.125, `3GB` are 3. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(gbit|gb)(?:/s)?", text.strip().lower().replace("gbps", "gbit"))
    if match is None or not float(match[1]):
        raise ValueError(f"--network={text} is no rate: write it as 25Gbit (or 3GB, of bytes) a second.")
    return float(match[1]) / (8 if match[2] == "gbit" else 1)


class Indivisible(ValueError):
    """The rows of a step cannot be shared evenly."""


@dataclass(frozen=True)
class OnSeveral:
    """A stage, spread in one way. Seconds are the least and the most; None where the card's rates are not known."""

    cards: int
    plan: StagePlan  # of the card that holds the most
    fits: bool
    sizes: dict[str, int]  # to be set where the recipe's rows at once cannot be shared, and its step can
    sent_bytes: float  # in a step, through the link that carries the most
    computing: Range | None = None
    sending: Range | None = None
    seconds: Range | None = None
    limit_gb_per_s: float | None = None  # a link of less than this takes longer than the computing


def on_several(recipe: Recipe, stage: str, config: Any, cluster: Cluster, way: str) -> OnSeveral:
    """Plan a stage on a cluster.

    `data` and `shards` compute as one card does its share, `layers` as one card does all. What is sent waits for what
    is computed, and the other way round: no layer is gathered while another computes.

    Args:
        config: the stage's trainer configuration, of the whole run.
    Raises:
        Indivisible: the cards cannot share a step.
    """
    cards, card, gpu = cluster.cards(way), cluster.card, cluster.card.gib * GIB
    recipe = replace(recipe, base={"split": None})  # whatever this machine has
    _, recipe, whole = for_device(recipe, stage, config, gpu)
    share = whole if way == "layers" else share_of(stage, whole, cards)
    sizes = {} if way == "layers" else changed_sizes(stage, config, share, cards)
    if stage == "ppo" and way != "data" and cards > 1 and share.generation_backend == "native":
        share.generation_backend = "eager"  # a CUDA graph is of one card, and gathers nothing
    settle_auto_sizes(recipe, stage, share, gpu + weight_bytes(recipe.base) - weights_of_card(recipe.base, way, cards))
    alone = stage_plan(recipe, stage, share, gpu)
    numbers = at_full_depth(shape_of(recipe, stage, share, on_gpu=True))
    planned = plan_of_card(recipe.base, alone, numbers, way, cards)
    sent = sent_bytes(recipe, stage, share, alone, way, cards)
    found = OnSeveral(cards, planned, planned.needed_mib * MIB <= gpu, sizes, sent)
    rate = cluster.gb_per_s(way)
    if card.tflops is None or rate is None:
        return found
    phases = seconds_of_step(recipe, stage, share, alone, card).values()
    computing = sum(least for least, _ in phases), sum(most for _, most in phases)
    least = sent / (rate * 1e9 * REACHED)
    sending = least, least * SPREAD
    return dataclasses.replace(
        found,
        computing=computing,
        sending=sending,
        seconds=(computing[0] + sending[0], computing[1] + sending[1]),
        limit_gb_per_s=sum(sending) / sum(computing) * rate,
    )


def share_of(stage: str, config: Any, cards: int) -> Any:
    """The configuration of one card's share of a step, with no more rows at once than the whole run's has.

    Raises Indivisible where there is none.
    """
    config, is_ppo = copy.copy(config), stage == "ppo"
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rows = config.mini_batch_size if is_ppo else rows
    if rows % cards:
        key = "mini_batch_size" if is_ppo else "per_device_train_batch_size"
        raise Indivisible(f"{cards} cannot share the {rows} rows of an optimizer step evenly: see {stage}.{key}")
    most = min(rows // cards, config.per_device_train_batch_size)
    if is_ppo:
        config.mini_batch_size, config.per_device_train_batch_size = rows // cards, most
    else:
        size = next(size for size in range(most, 0, -1) if rows // cards % size == 0)
        config.per_device_train_batch_size, config.gradient_accumulation_steps = size, rows // cards // size
    return config


def changed_sizes(stage: str, config: Any, share: Any, cards: int) -> dict[str, int]:
    """What a run must be told where its own rows at once cannot be shared: others, with the same step."""
    rows = share.per_device_train_batch_size * cards
    if stage == "ppo" or config.per_device_train_batch_size % cards == 0:
        return {}
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": share.gradient_accumulation_steps}
    return {f"{stage}.{key}": size for key, size in sizes.items()}


def sent_bytes(recipe: Recipe, stage: str, config: Any, alone: StagePlan, way: str, cards: int) -> float:
    """Bytes through the busiest link in a step.

    - A ring sums S bytes of W cards in 2 (W - 1) / W S through each link (Patarasuk and Yuan, 2009; NVIDIA/nccl-tests,
      doc/PERFORMANCE.md): the float32 gradients of all that is trained, once an optimizer step. What PPO's processes
      tell each other of a rollout is some thousandths of that, and is left out.
    - It gathers S bytes in (W - 1) / W S: for `shards` each layer as it is stored, for a forward and for a backward
      (ZeRO stage 3, arXiv:1910.02054, section 7.2.2), and in decoding for every token.
    - `layers` hands hidden states of 16 or 32 bits from card to card, W - 1 times, and their gradients back.
    """
    if cards == 1:
        return 0.0
    base = recipe.base
    unchecked = copy.copy(config)  # a checkpointed layer runs again where it is, gathered for its backward
    unchecked.gradient_checkpointing = False
    if way == "layers":
        forward = 2 * weights_of_token(base)  # FLOP of a token
        passes = sum(flop_of_step(recipe, stage, unchecked).values()) / forward
        return (cards - 1) * passes * base_config(base).get_text_config().hidden_size * precision(base).itemsize
    part = (cards - 1) / cards
    steps = config.num_ppo_epochs * config.num_mini_batches if stage == "ppo" else 1
    summed = 2 * part * steps * alone.parts["gradients"] * MIB
    if way == "data":
        return summed
    layers = weight_bytes(base) - outside_bytes(base)
    return summed + part * layers * sum(forwards_of_step(recipe, stage, unchecked).values())


def best_way(found: dict[str, OnSeveral]) -> str | None:
    """The fastest of the ways that fit; None where none does or no seconds are known."""
    timed = {way: sum(plan.seconds) for way, plan in found.items() if plan.fits and plan.seconds is not None}
    return min(timed, key=timed.__getitem__) if timed else None


def several_as_dict(recipe: Recipe, configs: Configs, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Each stage in each way as JSON values, in MiB, GB and seconds; or why its rows cannot be shared."""
    stages: dict[str, dict[str, Any]] = {}
    for stage, config in configs.items():
        found: dict[str, OnSeveral] = {}
        stages[stage] = {"ways": {}}
        for way in WAYS:
            try:
                found[way] = on_several(recipe, stage, config, cluster, way)
            except Indivisible as error:
                stages[stage]["ways"][way] = {"refused": str(error)}
                continue
            values = dataclasses.asdict(found[way])
            values |= {"needed_mib": found[way].plan.needed_mib, "sent_gb": values.pop("sent_bytes") / 1e9}
            stages[stage]["ways"][way] = values
        stages[stage]["best"] = best_way(found)
    return stages
