"""How fast `rlhf-recipes check` reads short comparisons, and in how much memory: rows a second and resident MiB.

    python tests/benchmarks/check_rows.py --rows 2000000

Without `--model` lengths are in characters. The database of hashes and the rows are files in the temporary folder.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from rlhf_recipes.data.check import examine, survey_source
from rlhf_recipes.data.tokens import set_chat_template
from rlhf_recipes.model.memory import resident_mib
from rlhf_recipes.recipe.values import Source

WORDS = ["cats", "eat", "fish", "in", "the", "old", "house", "near", "a", "river", "while", "dogs", "sleep"]


def write_rows(path: Path, rows: int) -> None:
    """Comparisons of some 10 words each; every tenth prompt comes again, every hundredth row is a repetition."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            prompt = f"{number - number % 10 // 9} " + " ".join(WORDS[:12])
            chosen, rejected = (" ".join(draw.choices(WORDS, k=draw.randint(8, 12))) for _ in range(2))
            line = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n"
            file.write(line * (1 + (number % 100 == 0)))


def measure(rows: int, model: str | None) -> dict[str, float]:
    """Seconds, rows a second, resident MiB before and the highest during a check of so many generated rows."""
    tokenizer = None
    if model is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        set_chat_template(tokenizer, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        before, start = resident_mib(), time.perf_counter()
        report = examine(survey_source(Source(str(path))), "reward", tokenizer)
        seconds = time.perf_counter() - start
    return {
        "rows": report["rows"],
        "duplicates": report["duplicates"]["rows"],
        "seconds": round(seconds, 1),
        "rows_a_second": round(report["rows"] / seconds),
        "mib_before": round(before),
        "mib_peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),  # Linux counts KiB
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--model", help="a tokenizer, for lengths in tokens")
    options = parser.parse_args()
    print(json.dumps(measure(options.rows, options.model)))
