"""A run folder as training leaves it, with random adapters in place of trained ones, and exports in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from support.tiny_models import save_model
from support.worded import make_recipe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_recipes import Recipe, replace
from rlhf_recipes.model.base import fingerprint, load_base, load_tokenizer
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.overrides import to_dict
from rlhf_recipes.records.files import write_json
from rlhf_recipes.stages.reward.adapters import PROBES, score_rows

# Reads from standard input, and writes for each folder what plain transformers or PEFT says of rows of token ids.
FRESH = """
import json, os, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

assert "rlhf_recipes" not in sys.modules
asked = json.load(sys.stdin)
answers = {}
for folder, rows in asked.items():
    if os.path.isfile(folder + "/adapter_config.json"):
        model, scores = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto"), False
    else:
        config = json.load(open(folder + "/config.json"))
        scores = config["architectures"][0].endswith("ForSequenceClassification")
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
        lost = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]]
        assert not lost, (folder, info)
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0].float() for row in rows]
    answers[folder] = [(row if scores else row.log_softmax(-1)).tolist() for row in logits]
json.dump(answers, sys.stdout)
"""


def save_lettered(folder: Path, architecture: str) -> Path:
    """Write a tiny random model whose tokens are letters.

    transformers reads the tokenizer of some architectures by a class of its own, which takes no list of words.
    """
    save_model(folder, architecture)
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *"Ġ▁abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def make_run(folder: Path, recipe: Recipe | None = None, size: float = 0.1, **base: Any) -> Path:
    """A run of PPO on a recipe's base: a policy and a reward model, both random and `size` large.

    Without a recipe it is one over a few words, on a tiny random model in the folder.
    """
    recipe = replace(make_recipe(folder) if recipe is None else recipe, rounds=None, base=base)
    run = folder / "run"
    tokenizer = load_tokenizer(recipe.base)
    identity = fingerprint(recipe.base, tokenizer)
    shared = SharedBase(load_base(recipe.base), recipe.lora, identity)
    places = {"policy": run / "ppo" / "policy", "reward": run / "reward"}
    for number, (role, place) in enumerate(places.items()):
        shared.add_role(role, head=role == "reward", exact=True)
        generator = torch.Generator().manual_seed(number)
        for parameter in shared.parameters_of(role):
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
        shared.save_role(role, place)
    probes = [[4, 5, 6, 2], [7, 8, 2], [9, 10, 11, 12, 13, 2]]
    write_json(run / "reward" / PROBES, {"input_ids": probes, "scores": score_rows(shared, probes).tolist()})
    write_json(run / "recipe.json", to_dict(recipe))
    return run


def in_a_fresh_process(asked: dict[Path, list[list[int]]]) -> dict[Path, list[torch.Tensor]]:
    """What exported folders say of rows of token ids, loaded by plain transformers or PEFT without this package.

    Returns for each row log-probabilities (L, V), or the score (1,) of a reward model.
    """
    # -I: neither the working directory nor PYTHONPATH, where the package may be.
    process = subprocess.run(
        [sys.executable, "-I", "-c", FRESH],
        input=json.dumps({str(folder): rows for folder, rows in asked.items()}),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout)
    return {folder: [torch.tensor(row) for row in answers[str(folder)]] for folder in asked}
