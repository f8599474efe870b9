"""`rlhf-recipes export`: a model of a run as a folder for other tools."""

import argparse
import os
from pathlib import Path
from typing import Any

from .command import Command, add_trust, notes_to_stderr

FORMATS = ("merged", "adapter", "reward", "gguf", "ollama")
# Options that are not of every format.
WHOLE, FILES = ("merged", "reward", "gguf", "ollama"), ("gguf", "ollama")
OPTIONS = {"onto": WHOLE, "dtype": WHOLE, "shard_size": WHOLE, "base_id": ("adapter",), "gguf_type": FILES}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument(
        "--model", metavar="NAME", help="sft, ppo, ppo/checkpoint-40, dpo, reward (default: the last of its kind)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="merged",
        help="merged: weights and adapter in one, as any tool takes them; adapter: as PEFT takes it, on a base of your "
        "own; reward: a reward model as a sequence classifier; gguf, ollama: one file, by llama.cpp's converter "
        "(default: merged)",
    )
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        help="of a quantized base: the weights that the adapter was trained on, or those of the base's files "
        "(default: dequantized)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (default: as in training)"
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="of a file of weights, which are in memory (default: 5GB)")
    parser.add_argument(
        "--base-id", metavar="ID", help="of an adapter: what others load the base by (default: as the recipe has it)"
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=os.environ.get("LLAMA_CPP") or None,
        metavar="DIR",
        help="a checkout of llama.cpp (default: $LLAMA_CPP)",
    )
    parser.add_argument("--gguf-type", metavar="TYPE", help="f16, bf16, q8_0, q4_k_m, ... (default: q8_0)")
    add_trust(parser)
    parser.add_argument("--force", action="store_true", help="keep what is too far from what was trained")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
What was written is loaded by plain transformers and compared with what was trained, on the model's own answers to
held-out prompts of the run. Stopped, it leaves no folder; killed, one that the next of that name takes away.

  rlhf-recipes export runs/mine --to exports/mine
  rlhf-recipes export runs/mine --model sft --to exports/sft --dtype float16
  rlhf-recipes export runs/mine --format reward --to exports/reward
  rlhf-recipes export runs/mine --format adapter --base-id ORG/NAME --to exports/adapter
  rlhf-recipes export runs/mine --format ollama --llama-cpp path/to/llama.cpp --to exports/ollama"""


def _run(options: argparse.Namespace) -> None:
    for name, formats in OPTIONS.items():
        if getattr(options, name) is not None and options.format not in formats:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is of --format {' and '.join(formats)}, not of {options.format}.")
    with notes_to_stderr():
        from accelerate.utils import convert_file_size_to_int

        from ..ship.adapter import export_adapter, exported_words
        from ..ship.gguf import export_gguf, gguf_table
        from ..ship.measure import table
        from ..ship.merged import export_merged
        from ..ship.reward import export_reward, score_table
        from ..ship.trained import ExportSettings

        try:
            shard_size = convert_file_size_to_int(options.shard_size or "5GB")
        except ValueError as error:
            raise ValueError(f"--shard-size must be a size like 5GB, not {options.shard_size!r}.") from error
        settings = ExportSettings(
            model=options.model,
            onto=options.onto or "dequantized",
            dtype=options.dtype,
            shard_size=shard_size,
            base_id=options.base_id,
            llama_cpp=options.llama_cpp,
            gguf_type=options.gguf_type or "q8_0",
            ollama=options.format == "ollama",
            force=options.force,
        )
        export, words = {
            "merged": (export_merged, table),
            "adapter": (export_adapter, exported_words),
            "reward": (export_reward, score_table),
            "gguf": (export_gguf, gguf_table),
            "ollama": (export_gguf, gguf_table),
        }[options.format]
        found: Any = export(options.run, options.to, settings)
    print(f"{options.to}: {words(found)}")


COMMAND = Command("write a model of a run as a folder for other tools, and measure it", _arguments, _run)
