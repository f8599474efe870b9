"""Peak memory of a stage's data at real size: 160,800 comparisons and a round's labels, or 100M tokens of ptx.

    OMP_NUM_THREADS=1 python tests/benchmarks/data_memory.py reward
    OMP_NUM_THREADS=1 python tests/benchmarks/data_memory.py ptx

The rows are random words, each a token: comparisons of 110 tokens of prompt and 60 of each response, texts of 1,000.
Printed are MiB above the imports: the highest while the rows are prepared, what is resident with them, and the highest
of what follows. Comparisons are merged with 256 of a round; of ptx the trainer draws the texts of 100 mini-batches.
"""

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_recipes.data.prepare import Prepared, merge_comparisons, prepare
from rlhf_recipes.model.memory import peak_memory_mib, reset_peak_memory, resident_mib
from rlhf_recipes.recipe.values import Source
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

WORDS = [f"w{number}" for number in range(10_000)]
SIZES = {"reward": 160_800, "ptx": 100_000}  # rows; of Anthropic's HH, and 100M tokens


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of which each word of WORDS is a token."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def write_rows(path: Path, stage: str, rows: int) -> Source:
    """A file of so many random rows of a stage."""
    draw = random.Random(0)
    lengths = {"text": 1000} if stage == "ptx" else {"prompt": 110, "chosen": 60, "rejected": 60}
    with path.open("w") as file:
        for _ in range(rows):
            row = {column: " ".join(draw.choices(WORDS, k=length)) for column, length in lengths.items()}
            file.write(json.dumps(row) + "\n")
    return Source(str(path))


def follows(stage: str, prepared: Prepared, round_source: Source) -> Callable[[], Any]:
    """What is done with the rows once they are prepared."""
    if stage == "reward":
        labels = prepare("reward", round_source, word_tokenizer(), None)
        return lambda: merge_comparisons([prepared, labels])
    trainer = SimpleNamespace(config=SimpleNamespace(ptx_max_length=512))
    trainer.texts = prepared.train.with_format("numpy")
    return lambda: [PPOTrainer.random_texts(trainer, 64) for _ in range(100)]  # type: ignore[arg-type]


def measure(stage: Any, rows: int) -> dict[str, float]:
    """MiB above the imports, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_rows(Path(folder) / "rows.jsonl", stage, rows)
        few = write_rows(Path(folder) / "few.jsonl", stage, 256)
        prepare(stage, few, word_tokenizer(), None)  # which imports what it needs
        gc.collect()
        reset_peak_memory()
        before, start = resident_mib(), time.perf_counter()
        prepared = prepare(stage, source, word_tokenizer(), None)
        found = {"rows": float(rows), "seconds": time.perf_counter() - start, "prepare": peak_memory_mib() - before}
        gc.collect()
        found["resident"] = resident_mib() - before
        reset_peak_memory()
        start = time.perf_counter()
        kept = follows(stage, prepared, few)()
        found |= {"then_seconds": time.perf_counter() - start, "then": peak_memory_mib() - before}
        del kept
    return {name: round(value, 2) for name, value in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=SIZES)
    parser.add_argument("--rows", type=int, help="so many in place of the real size")
    options = parser.parse_args()
    print(json.dumps(measure(options.stage, options.rows or SIZES[options.stage])))
