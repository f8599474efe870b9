"""Time and memory of a reward model's optimizer step: a ranking of K = 9 as one element, against its 36 pairs.

    python tests/benchmarks/rankings.py [--json FILE]

Both train the same small random Llama with LoRA on a CPU, on the same responses and with the same loss (that their
gradients are equal is shown in tests/stages/test_reward.py). The pairs go through TRL's own RewardTrainer, which runs
both responses of every pair: 72 rows a step where the ranking has 9. Each measurement is a process of its own, the two
kinds take turns, and the table shows medians.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESPONSES, TOKENS, STEPS, REPEATS = 9, 128, 4, 5
LLAMA: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": 0, "num_labels": 1}


def measure(kind: str) -> dict[str, float]:
    """Seconds of an optimizer step (median, without the first), and peak memory in MiB above that before training."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

    from rlhf_recipes.model.memory import peak_memory_mib, reset_peak_memory
    from rlhf_recipes.stages.options import RewardConfig
    from rlhf_recipes.stages.reward.trainer import RewardTrainer

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.tiny_models import make_tokenizer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    torch.manual_seed(0)
    model: Any = LlamaForSequenceClassification(LlamaConfig(**LLAMA))
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=16, target_modules="all-linear")
    rng = random.Random(0)
    rankings = [[[rng.randrange(4, 4096) for _ in range(TOKENS)] for _ in range(RESPONSES)] for _ in range(STEPS)]
    pairs = list(itertools.combinations(range(RESPONSES), 2))
    if kind == "ranking":
        rows = [{"responses_ids": ids, "ranking": [*range(1, RESPONSES + 1)]} for ids in rankings]
    else:
        rows = [{"chosen_ids": ids[better], "rejected_ids": ids[worse]} for ids in rankings for better, worse in pairs]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = (RewardConfig if kind == "ranking" else trl.RewardConfig)(
            folder,
            per_device_train_batch_size=len(rows) // STEPS,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        trainer = (RewardTrainer if kind == "ranking" else trl.RewardTrainer)(
            get_peft_model(model, lora),  # type: ignore[arg-type]
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
            callbacks=[clock],
        )
        reset_peak_memory()
        before = peak_memory_mib()
        trainer.train()
    assert len(clock.seconds) == STEPS
    return {"seconds": statistics.median(clock.seconds[1:]), "memory_mib": peak_memory_mib() - before}


def main() -> None:
    """Measure both kinds in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--kind", choices=("ranking", "pairs"), help="measure one kind once and print JSON")
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments.kind)))
        return
    found: dict[str, list[dict[str, float]]] = {"ranking": [], "pairs": []}
    for _ in range(REPEATS):
        for kind, measured in found.items():
            command = [sys.executable, __file__, "--kind", kind]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured.append(json.loads(output.splitlines()[-1]))
    result: dict[str, Any] = {"responses": RESPONSES, "tokens": TOKENS, "repeats": REPEATS}
    for kind, measured in found.items():
        result[kind] = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
    result["ratio"] = {key: result["pairs"][key] / result["ranking"][key] for key in result["ranking"]}
    print(f"{'':24}seconds a step   peak memory, MiB")
    for kind, name in (("ranking", "one ranking of 9"), ("pairs", "its 36 pairs (TRL)")):
        print(f"{name:24}{result[kind]['seconds']:14.3f}{result[kind]['memory_mib']:19.0f}")
    print(f"{'ratio':24}{result['ratio']['seconds']:14.1f}{result['ratio']['memory_mib']:19.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
