"""`rlhf-recipes chat`: talk to the models of a run."""

import argparse
from pathlib import Path

from ..records.folder import last_model, read_recipe
from .command import Command, add_trust, notes_to_stderr


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--model", metavar="NAME", help="base, sft, ppo, ppo/checkpoint-40, dpo (default: the last that the run has)"
    )
    parser.add_argument("--compare", metavar="NAME", help="another that answers beside it (default: none)")
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0: the likeliest (default: as the run's ppo stage, else 0.7)"
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    recipe = read_recipe(options.run)
    temperature = options.temperature
    if temperature is None:
        temperature = recipe.ppo.args.get("temperature", 0.7) if recipe.ppo is not None else 0.7
    with notes_to_stderr():
        import torch

        from ..evaluate.conversation import Conversation, converse

        models = [options.model or last_model(options.run, recipe), *([options.compare] if options.compare else [])]
        talk = Conversation(options.run, models, temperature, options.max_tokens, options.system)
        torch.manual_seed(options.seed)
    converse(talk, options.compare)


COMMAND = Command("talk to the models of a run", _arguments, _run)
