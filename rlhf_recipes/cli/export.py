"""`rlhf-recipes export`: a model of a run as a folder for other tools."""

import argparse
from pathlib import Path

from .command import Command, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument(
        "--model", metavar="NAME", help="sft, ppo, ppo/checkpoint-40, dpo (default: the last that the run has)"
    )
    parser.add_argument(
        "--format",
        choices=("merged",),
        default="merged",
        help="merged: weights and adapter in one, as any tool takes them (default: merged)",
    )
    parser.add_argument(
        "--onto",
        choices=("dequantized", "original"),
        default="dequantized",
        help="of a quantized base: the weights that the adapter was trained on, or those of the base's files "
        "(default: dequantized)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the weights (default: as in training)"
    )
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="of a file of weights, which are in memory (default: 5GB)"
    )
    parser.add_argument("--force", action="store_true", help="keep what is too far from what was trained")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
What was written is loaded by plain transformers and compared with what was trained, on the model's own answers to
held-out prompts of the run. Stopped, it leaves no folder.

  rlhf-recipes export runs/mine --to exports/mine
  rlhf-recipes export runs/mine --model sft --to exports/sft --dtype float16"""


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from accelerate.utils import convert_file_size_to_int

        from ..ship.measure import table
        from ..ship.merged import export_merged
        from ..ship.trained import ExportSettings

        try:
            shard_size = convert_file_size_to_int(options.shard_size)
        except ValueError as error:
            raise ValueError(f"--shard-size must be a size like 5GB, not {options.shard_size!r}.") from error
        settings = ExportSettings(options.model, options.onto, options.dtype, shard_size, None, options.force)
        measured = export_merged(options.run, options.to, settings)
    print(f"{options.to}: {table(measured)}")


COMMAND = Command("write a model of a run as a folder for other tools, and measure it", _arguments, _run)
