"""`rlhf-recipes chat`: talk to the models of a run, or to an export."""

import argparse
from pathlib import Path

from .command import Command, add_trust, notes_to_stderr, seed


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN|DIR", help="a run folder, or what `export` has written")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="of a run: base, sft, ppo, ppo/checkpoint-40, dpo (default: the last that it has)",
    )
    parser.add_argument(
        "--compare", metavar="NAME", help="another model of the run, or an export's folder, beside it (default: none)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0: the likeliest (default: as in PPO or the export, else 0.7)"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of sampling (default: 0)")
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        import torch

        from ..evaluate.conversation import Conversation, converse

        models = [options.model, *([options.compare] if options.compare else [])]
        talk = Conversation(options.folder, models, options.temperature, options.max_tokens, options.system)
        torch.manual_seed(options.seed)
    converse(talk, options.compare)


COMMAND = Command("talk to the models of a run, or to an export", _arguments, _run)
