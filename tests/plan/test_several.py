"""Several GPUs by bytes and operations: a Llama of 8 layers, small enough to be worked out by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from rlhf_recipes import Base, Lora, PPOConfig
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.plan.cards import Card, card_of
from rlhf_recipes.plan.several import (
    REACHED,
    Cluster,
    Indivisible,
    OnSeveral,
    best_way,
    changed_sizes,
    network_of,
    on_several,
)
from rlhf_recipes.plan.several import share_of as share
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.recipe.values import PPOStage, Recipe, Stage

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA |= {"intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 1000}
CARD = Card("round", 24, gb_per_s=1000, tflops=100, link=10)

LAYER = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)  # bytes in 16 bits: attention, MLP, norms
TABLE = 2 * 1000 * 64  # of embeddings, and of the head
LAYERS = 8 * LAYER + 2 * 64 + 2 * 4 * 8  # and the last norm, and frequencies of the positions, twice
# An adapter of rank 4 on all seven linear layers. Policy and critic are trained; the critic has a head.
ADAPTER = 8 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
GRADIENTS = 4 * (2 * ADAPTER + 64)
STEPS = 2 * 2  # of the optimizer: passes, mini-batches
# Of a row: each token decoded, four roles scored, two trained in two passes, each forward and backward.
PASSES = 1 + 4 + 2 * 2 * 2


@pytest.fixture(scope="module")
def ppo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, PPOConfig]:
    """PPO of 16 rollouts of 8 + 8 tokens in two mini-batches, two passes."""
    folder = str(tmp_path_factory.mktemp("model"))
    AutoConfig.for_model(**LLAMA).save_pretrained(folder)
    args: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "num_mini_batches": 2}
    args |= {"num_ppo_epochs": 2, "rollout_micro_batch_size": 4, "max_prompt_length": 8, "response_length": 8}
    args |= {"optim": "adamw_torch", "gradient_checkpointing": True}
    recipe = Recipe(
        "far",
        Base(folder),
        lora=Lora(r=4),
        reward=Stage("none", args={"max_length": 16}),
        ppo=PPOStage("none", args=args),
    )
    return recipe, PPOConfig(folder, use_cpu=True, bf16=False, **args)


def planned(ppo: tuple[Recipe, PPOConfig], way: str, gpus: int = 4, **cluster: Any) -> OnSeveral:
    recipe, config = ppo
    return on_several(recipe, "ppo", config, Cluster(CARD, gpus, **cluster), way)


def test_bytes_that_are_sent_are_those_that_were_worked_out(ppo: tuple[Recipe, PPOConfig]) -> None:
    summed = 2 * 3 / 4 * STEPS * GRADIENTS
    assert planned(ppo, "data").sent_bytes == pytest.approx(summed)
    # A card has 4 rollouts: 8 tokens of one batch of them, then 4 micro-batches of a row.
    gathers = 8 + 4 * 4 + 4 * 2 * 2 * 2
    assert planned(ppo, "shards").sent_bytes == pytest.approx(summed + 3 / 4 * LAYERS * gathers)
    assert planned(ppo, "layers").sent_bytes == pytest.approx(3 * 16 * 16 * PASSES * 64 * 2)
    assert [planned(ppo, way, 1).sent_bytes for way in ("data", "layers", "shards")] == [0, 0, 0]


def test_a_card_holds_its_part_of_the_weights(ppo: tuple[Recipe, PPOConfig]) -> None:
    one = planned(ppo, "data", 1).plan
    data, layers, shards = (planned(ppo, way).plan for way in ("data", "layers", "shards"))
    mib = 2**20
    assert one.parts["weights"] * mib == data.parts["weights"] * mib == LAYERS + 2 * TABLE
    # A quarter of all is less than the tables, beside which is the first layer alone. Of the others one has three.
    assert layers.parts["weights"] * mib == pytest.approx(2 * TABLE + LAYERS / 8)
    assert shards.parts["weights"] * mib == 2 * TABLE + LAYERS / 4 + 2 * LAYERS / 8
    for name in ("adapters", "optimizer", "gradients"):
        assert layers.parts[name] == one.parts[name] * 3 / 8
        assert shards.parts[name] == data.parts[name] == one.parts[name]
    assert layers.parts["kv_cache"] * mib == 4 * 16 * 3 * 2 * 2 * 64, "of 4 rows of 16 tokens, in 3 of 8 layers"
    weights = data.parts["weights"] - shards.parts["weights"]
    assert data.phases["update"] - shards.phases["update"] == pytest.approx(weights), "both hold the message"
    assert all(layers.phases[phase] < one.phases[phase] for phase in one.phases)
    assert one == planned(ppo, "layers", 1).plan == planned(ppo, "shards", 1).plan
    two = planned(ppo, "layers", 2).plan.parts["weights"] * mib
    assert two == pytest.approx(6 * LAYERS / 8), "a half holds the tables and 2.4 layers, of which 2 have their middle"


def test_seconds_are_bytes_and_operations_over_rates(ppo: tuple[Recipe, PPOConfig]) -> None:
    one, data, layers, shards = (planned(ppo, *case) for case in (("data", 1), ("data",), ("layers",), ("shards",)))
    assert one.computing == one.seconds and one.sending == (0, 0)
    assert data.computing is not None and data.sending is not None and one.computing is not None
    assert data.sending == pytest.approx([n * data.sent_bytes / (10e9 * REACHED) for n in (1, 1.5)])
    assert data.seconds == pytest.approx([sum(pair) for pair in zip(data.computing, data.sending, strict=True)])
    assert data.computing[1] < one.computing[1], "a share of the rows"
    assert layers.computing is not None and layers.computing[1] == pytest.approx(one.computing[1]), "one at a time"
    assert shards.computing is not None and shards.sending is not None and shards.seconds is not None
    assert shards.seconds[0] == shards.computing[0] + shards.sending[0], "nothing is computed meanwhile"
    slower = planned(ppo, "data", nodes=2, network=data.limit_gb_per_s)
    assert slower.sending is not None and slower.computing is not None
    assert sum(slower.sending) == pytest.approx(sum(slower.computing)), "there the network begins to be the limit"
    assert best_way({"data": data, "layers": layers}) == "data"


def test_machines_and_their_network() -> None:
    assert {text: network_of(text) for text in ("25Gbit", "100gbps", "3GB", "3.5GB/s")} == {
        "25Gbit": 3.125,
        "100gbps": 12.5,
        "3GB": 3,
        "3.5GB/s": 3.5,
    }
    two = Cluster(card_of("h100"), 16, 2, network_of("400Gbit"))
    assert [two.gb_per_s(way) for way in ("data", "shards", "layers")] == [50, 50, 450]
    assert [two.cards(way) for way in ("data", "shards", "layers")] == [16, 16, 8]
    assert Cluster(card_of("rtx4090"), 16, 2, 100).gb_per_s("data") == 32
    for wrong in ("25", "0Gbit", "fast"):
        with pytest.raises(ValueError, match=f"--network={wrong} is no rate: write it as 25Gbit"):
            network_of(wrong)
    with pytest.raises(ValueError, match="--nodes=3"):
        Cluster(CARD, 8, 3, 1)
    with pytest.raises(ValueError, match="--network 25Gbit"):
        Cluster(CARD, 8, 2)


def test_rows_that_cannot_be_shared(ppo: tuple[Recipe, PPOConfig]) -> None:
    with pytest.raises(Indivisible, match=r"3 cannot share the 8 rows of an optimizer step evenly: see ppo.mini_batch"):
        planned(ppo, "data", 3)
    assert planned(ppo, "layers", 3).cards == 3
    _, config = ppo
    assert share("ppo", config, 8).rollout_size == 2


def test_a_step_is_shared_in_other_micro_batches_where_its_own_cannot_be() -> None:
    config: Any = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=6)
    shared = share("sft", config, 8)
    assert (shared.per_device_train_batch_size, shared.gradient_accumulation_steps) == (3, 1)
    sizes = {"sft.per_device_train_batch_size": 24, "sft.gradient_accumulation_steps": 1}
    assert changed_sizes("sft", config, shared, 8) == sizes
    assert changed_sizes("sft", config, share("sft", config, 4), 4) == {}, "its own can"


def test_the_command_compares_the_ways(
    ppo: tuple[Recipe, PPOConfig], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "far.py"
    file.write_text(
        "import json\nfrom rlhf_recipes.recipe.overrides import from_dict\n"
        f"recipe = from_dict(json.loads({json.dumps(to_dict(ppo[0]))!r}))\n"
    )
    words = ["plan", str(file), "--gpu", "rtx4090", "--gpus", "4"]
    main_cli([*words, "--nodes", "2", "--network", "25Gbit", "--json"])
    ways = json.loads(capsys.readouterr().out)["ppo"]["ways"]
    assert ways["data"]["fits"] and ways["layers"]["cards"] == 2 and ways["shards"]["sent_gb"] > ways["data"]["sent_gb"]
    main_cli(words)
    printed = " ".join(capsys.readouterr().out.split())
    for said in ("4 x rtx4090: computed, never measured", "GiB of a card", "best of what fits"):
        assert said in printed
    with pytest.raises(SystemExit):
        main_cli([*words, "--nodes", "2"])
    assert "--nodes=2 needs the rate between machines, as in --network 25Gbit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main_cli([*words[:-2], "--nodes", "2"])
    assert "say with --gpus how many" in capsys.readouterr().err
