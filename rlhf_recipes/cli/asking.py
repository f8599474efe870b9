"""Options of the commands that ask a model: what it is asked, how it is reached, what it may cost."""

import argparse
from pathlib import Path
from typing import Any

from .command import add_trust, positive_int, seed


def question_arguments(parser: argparse._ActionsContainer) -> None:
    """What a judge is asked: see `question`."""
    by = parser.add_mutually_exclusive_group()
    by.add_argument(
        "--criteria", metavar="TEXT", help="what makes an answer better (default: it is helpful, true, safe)"
    )
    by.add_argument(
        "--constitution",
        type=Path,
        metavar="FILE",
        help="text or YAML; one of its principles is drawn for each pair (default: --criteria; `default`: our own)",
    )
    parser.add_argument(
        "--template",
        type=Path,
        metavar="FILE",
        help="a question with {prompt} {first} {second} {principle} {mark}, answered by A or B (default: our own)",
    )
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=16,
        metavar="N",
        help="of an endpoint's answer; a model that thinks first needs thousands (default: 16)",
    )


def question(options: argparse.Namespace) -> tuple[Any, ...]:
    """The arguments of `JudgeSettings`. Raises ValueError where a file of them cannot be read."""
    from ..feedback.constitution import COMPARISON, CRITERIA, Principle, read_constitution, read_template

    principles = [Principle(options.criteria or CRITERIA)]
    if options.constitution is not None:
        principles = read_constitution(options.constitution, needs_principle=True)
    template = COMPARISON if options.template is None else read_template(options.template)
    return tuple(principles), template, options.max_tokens, options.seed


def model_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Which model answers, and what `reach_arguments` add."""
    parser.add_argument(
        name,
        required=True,
        metavar="MODEL|URL",
        help="a Hub id, a local folder, module:function, a run folder, or the URL of an OpenAI-compatible endpoint",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of drawn principles, and of sampling (default: 0)")
    reach_arguments(parser)


def reach_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model that answers is reached, and what it may cost: see `reach` and `prices_of`."""
    parser.add_argument(
        "--parallel",
        type=positive_int,
        default=8,
        metavar="N",
        help="requests to an endpoint at once, or rows in a local model's batch (default: 8)",
    )
    local = parser.add_argument_group("a model on this machine")
    local.add_argument("--role", metavar="NAME", help="of a run: base, sft, dpo, ppo (default: the last that it has)")
    local.add_argument("--quantization", choices=("nf4", "int8"), help="load it in 4 or 8 bits (default: as it is)")
    local.add_argument("--chat-template", metavar="NAME", help="transcript, chatml or FILE.jinja (default: its own)")
    add_trust(local)
    endpoint = parser.add_argument_group("an endpoint")
    endpoint.add_argument("--model-name", metavar="NAME", help="the model there (default: the first that it lists)")
    endpoint.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the key (default: OPENAI_API_KEY for OpenAI, none here)",
    )
    endpoint.add_argument("--timeout", type=float, metavar="SECONDS", help="of one try (default: 120)")
    endpoint.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="after time-outs, lost connections, 429 and 5xx, ever later or as Retry-After says (default: 5)",
    )
    cost = parser.add_argument_group("cost", "Earlier calls for the same file count; what is under way is finished.")
    cost.add_argument("--price-in", type=float, default=0.0, metavar="P", help="of 10^6 prompt tokens (default: 0)")
    cost.add_argument("--price-out", type=float, default=0.0, metavar="P", help="of 10^6 answer tokens (default: 0)")
    cost.add_argument("--max-cost", type=float, metavar="P", help="ask no more once it is spent (default: no limit)")


def reach(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of `connect` beside the model."""
    names = ("role", "quantization", "chat_template", "model_name", "api_key_env", "timeout", "retries")
    return {name: getattr(options, name) for name in names}


def prices_of(options: argparse.Namespace) -> tuple[float, float, float | None]:
    """The arguments of `ledger.Prices`."""
    return options.price_in, options.price_out, options.max_cost
