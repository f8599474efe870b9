"""A PPO update on several GPUs, in three ways: a table that is computed, and of which nothing was measured.

    python tests/benchmarks/several_gpus.py

PPO in NF4 with r16 on all linear layers, 512 + 512 tokens, 64 rollouts an update, four passes, a reward model and a
critic of its own: sampled in one batch a card, trained row by row with gradient checkpointing. A cell has the GiB of
the card that holds the most, and the middle of the seconds; the way that fits and is fastest is bold. In brackets
stands what does not fit, and a `*` where sending takes longer than computing.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlhf_recipes import Base, PPOConfig
from rlhf_recipes.plan.cards import card_of
from rlhf_recipes.plan.several import WAYS, Cluster, OnSeveral, best_way, network_of, on_several
from rlhf_recipes.recipe.values import PPOStage, Recipe, Stage

CARDS = {"rtx4090": "25Gbit", "h100": "400Gbit"}  # and the network of their machines
MACHINES = ((1, 1), (8, 1), (16, 2), (64, 8))
WORK: dict[str, Any] = {"max_prompt_length": 512, "response_length": 512, "mini_batch_size": 64}
WORK |= {"per_device_train_batch_size": 1, "rollout_micro_batch_size": 64, "gradient_checkpointing": True}


def cell(plan: OnSeveral, is_best: bool) -> str:
    """`12.4; 310`, with the marks that the table has."""
    assert plan.seconds is not None and plan.sending is not None and plan.computing is not None
    star = "*" * (sum(plan.sending) > sum(plan.computing))
    text = f"{plan.plan.needed_mib / 1024:.1f}; {float(f'{sum(plan.seconds) / 2:.2g}'):,g}{star}"
    return f"**{text}**" if is_best else text if plan.fits else f"({text})"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.published_shapes import LLAMA_70B, MISTRAL_7B, QWEN_32B

    models = {"Mistral-7B": MISTRAL_7B, "Qwen2.5-32B": QWEN_32B, "Llama-3.1-70B": LLAMA_70B}
    print("| model | GPUs | data parallel | layers | shards |\n|---|---|---|---|---|")
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(**model).save_pretrained(folder)
            stage = PPOStage("none", args=WORK)
            recipe = Recipe(name, Base(folder, quantization="nf4"), reward=Stage("none"), ppo=stage)
            config = PPOConfig(folder, use_cpu=True, bf16=False, **WORK)
            for card, network in CARDS.items():
                for gpus, nodes in MACHINES:
                    cluster = Cluster(card_of(card), gpus, nodes, network_of(network))
                    found = {way: on_several(recipe, "ppo", config, cluster, way) for way in WAYS}
                    best = best_way(found)
                    cells = " | ".join(cell(plan, way == best) for way, plan in found.items())
                    machines = f", {nodes} machines, {network}" if nodes > 1 else ""
                    print(f"| {name} | {gpus} {card}{machines} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
