"""`rlhf-recipes serve`: exported models behind an OpenAI-compatible endpoint of this machine."""

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from ..records.terminal import printable
from .command import Command, add_trust, notes_to_stderr, positive_int


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN|DIR", help="run folders, and what `export` has written"
    )
    parser.add_argument(
        "--models",
        metavar="NAMES",
        help="of a run: sft,ppo, ... (default: its last policy), which are exported into RUN/exports first",
    )
    parser.add_argument(
        "--engine", choices=("transformers", "vllm"), help="(default: vllm, or transformers where it is not installed)"
    )
    parser.add_argument(
        "--port", type=positive_int, default=8000, metavar="N", help="to listen at, of this machine (default: 8000)"
    )
    parser.add_argument(
        "--engine-options",
        default="",
        metavar="WORDS",
        help='handed to the engine, for example "--max-model-len 4096" (default: none)',
    )
    add_trust(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
The server is the engine's own: `transformers serve` takes merged exports, as many as you name; `vllm serve` takes one,
or adapters of one base. Each is asked for by the name of its folder or, of a run, of the model. Ctrl-C ends it.

  rlhf-recipes serve runs/mine --models sft,ppo --engine transformers
  rlhf-recipes serve exports/mine
  rlhf-recipes serve exports/sft-adapter exports/ppo-adapter --engine vllm"""


def _run(options: argparse.Namespace) -> None:
    if options.port > 65535:
        raise ValueError(f"--port must be at most 65535, not {options.port}.")
    try:
        words = shlex.split(options.engine_options)
    except ValueError as error:
        raise ValueError(f"--engine-options {options.engine_options!r} are no words of a shell: {error}.") from error
    with notes_to_stderr():
        from ..ship.serve import find_engine, find_served, how_to_ask, serving, warnings

        engine = find_engine(options.engine)
        models = [name for name in (options.models or "").split(",") if name]
        served = [model for folder in options.folders for model in find_served(folder, models)]
        for warning in warnings(engine, served):
            print(printable(f"warning: {warning}"))
    signal.signal(signal.SIGTERM, _end)  # so that the engine does not outlive this process
    try:
        with serving(engine, served, options.port, words) as process:
            print(f"Served by {engine}; Ctrl-C ends it.\n{how_to_ask(served, options.port)}", flush=True)
            process.wait()
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


COMMAND = Command("serve models of a run, or exports, to OpenAI's clients", _arguments, _run)
