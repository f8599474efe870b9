"""What one of several cards holds of a stage that one card would hold whole."""

from collections.abc import Mapping

from ..model.split import deal
from ..recipe.values import Base
from .skeleton import layers_of, outside_bytes, sharded_bytes, weight_bytes
from .stage_memory import MIB, StagePlan, held_beside


def layers_of_card(base: Base, cards: int) -> tuple[int, int]:
    """Layers on the first card, and on the other that has the most, where a base is laid over several."""
    outside, layers = outside_bytes(base), layers_of(base)
    places = deal([(weight_bytes(base) - outside) / layers] * layers, outside, cards)
    return places.count(0), max(places.count(card) for card in range(1, cards))


def weights_of_card(base: Base, way: str, cards: int) -> float:
    """Bytes of the base's weights on the card that holds the most: of `layers` embeddings and head, or layers alone."""
    if way == "data" or cards == 1:
        return weight_bytes(base)
    if way == "shards":
        return sharded_bytes(base, cards)
    outside = outside_bytes(base)
    a_layer = (weight_bytes(base) - outside) / layers_of(base)
    first, other = layers_of_card(base, cards)
    return max(outside + first * a_layer, other * a_layer)


def plan_of_card(
    base: Base, alone: StagePlan, numbers: Mapping[str, float], way: str, cards: int, on_gpu: bool = True
) -> StagePlan:
    """The memory of the card that holds the most.

    Of `layers` everything that belongs to a layer goes with it: adapters, their gradients and optimizer, keys and
    values, what a forward saves. The others hold adapters whole, and the message in which gradients are summed.

    Args:
        alone: the plan of one card that holds everything.
        numbers: of the stage's dry runs, in bytes (see `plan.at_full_depth`).
        way: one of `several.WAYS`.
    """
    if cards == 1:
        return alone
    gone = 1 - layers_of_card(base, cards)[1] / layers_of(base) if way == "layers" else 0.0
    weights = weights_of_card(base, way, cards) / MIB
    parts = dict(alone.parts)
    for name in ("adapters", "optimizer", "gradients", "kv_cache"):
        parts[name] *= 1 - gone
    parts["weights"] = weights
    message = 0 if way == "layers" else alone.parts["gradients"]

    def in_phase(phase: str) -> float:
        if phase == "label":  # by a model that is there alone
            return alone.phases[phase]
        size = alone.phases[phase] - alone.parts["weights"] + weights - gone * alone.parts["adapters"]
        if phase in ("load", "compare"):
            return size
        size -= gone * (alone.parts["optimizer"] + numbers[f"{phase}.saved"] / MIB)
        if phase in ("train", "update"):
            size += message - gone * alone.parts["gradients"]
        return size - gone * alone.parts["kv_cache"] * (phase == "generate")

    phases = {phase: in_phase(phase) for phase in alone.phases}
    beside = held_beside(max(phases.values()) * MIB, weights * MIB, on_gpu)
    return StagePlan(parts | {name: size / MIB for name, size in beside.items()}, phases)
