"""A world small enough to see through: a base model, its labelers and the true quality of every answer.

The recipe `tiny` runs the whole pipeline in it within minutes on a CPU and downloads nothing. Importing this room
loads no torch; `build_base` does, when it is called.
"""

from rlhf_recipes.worlds.tiny.pretrain import build_base
from rlhf_recipes.worlds.tiny.world import comparisons, demonstrations, gold, labeler, pretraining, prompts

__all__ = ["build_base", "comparisons", "demonstrations", "gold", "labeler", "pretraining", "prompts"]
