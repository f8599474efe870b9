"""What measures a run's models: how much goes through a reward model at once, and what happens on little memory."""

import json
from pathlib import Path
from typing import Any

import torch
from support.narrow import Narrow
from support.tiny_models import save_model

from rlhf_recipes import Base, Lora, Recipe
from rlhf_recipes.evaluate.models import Bench, Cache
from rlhf_recipes.model.base import fingerprint, load_base, load_tokenizer
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.stages.reward.adapters import PROBES, score_rows


def test_long_rows_are_scored_few_at_a_time_and_fewer_where_memory_runs_out(tmp_path: Path) -> None:
    recipe = Recipe("bench", Base(str(save_model(tmp_path / "model"))), lora=Lora(r=4))
    shared = SharedBase(load_base(recipe.base), recipe.lora, fingerprint(recipe.base, load_tokenizer(recipe.base)))
    shared.add_role("reward", head=True)
    torch.nn.init.normal_(shared.head_weight("reward"))
    rows = [[4 + (7 * i + j) % 60 for j in range(length)] for i, length in enumerate([300] * 60 + [5] * 40)]
    shared.save_role("reward", tmp_path / "reward")
    alone: Any = torch.stack([score_rows(shared, [row])[0] for row in rows])
    (tmp_path / "reward" / PROBES).write_text(json.dumps({"input_ids": rows[:2], "scores": alone[:2].tolist()}))
    bench = Bench(recipe, Cache(tmp_path / "scores.jsonl"), batch_size=64)
    with Narrow(bench.shared.backbone, rows=24) as narrow:
        found = bench.scores(tmp_path / "reward", rows)
    torch.testing.assert_close(torch.tensor(found), alone, rtol=0, atol=1e-5)
    assert max(narrow.tokens) <= 2**13 and max(narrow.rows) <= 24
    assert narrow.refused <= 2, "what did not fit once is not tried again"
