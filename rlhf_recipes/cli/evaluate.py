"""`rlhf-recipes evaluate`: the models of a run compared."""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..records.terminal import printable
from .asking import prices_of, question, question_arguments, reach, reach_arguments
from .command import Command, notes_to_stderr, positive_int, seed


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
A judge is gold (the recipe's, where true quality is known), people (who judged in `arena`; people:FILE takes over a
file of such judgements from elsewhere), reward (what PPO was trained against), judge (the second reward model of
reward.judge_share), module:function or file.py:function of TRL's signature, a reward adapter, a sequence classifier, or
a model that is asked about each pair of answers, in both orders: a Hub id, a folder, a run, or the URL of an OpenAI-
compatible endpoint. Answers are kept by content in RUN/evaluation, so that a second judge samples nothing; what earlier
judges said stays. Stopped, the same command goes on.

  rlhf-recipes evaluate runs/tiny
  rlhf-recipes evaluate runs/tiny --models sft,ppo,runs/other:ppo --against sft,base --samples 4
  rlhf-recipes evaluate runs/mine --judge http://127.0.0.1:8000/v1 --parallel 32
  rlhf-recipes evaluate runs/mine --models base,sft,ppo --tasks tax --task-limit 500
  rlhf-recipes evaluate runs/mine --rewardbench reward-bench-2.parquet --judge reward judge
  rlhf-recipes evaluate runs/mine --comparisons Anthropic/hh-rlhf --split test"""
    answer_arguments(parser)
    add = parser.add_argument
    add(
        "--judge",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="who judges (default: gold, judge and reward, as far as RUN has them)",
    )
    add(
        "--under-base",
        action="store_true",
        help="measure by the bare base how natural the answers are, and whether they are about their prompts",
    )
    add("--json", action="store_true", help="print evaluation.json in place of tables")
    _other_measures(parser)
    question_arguments(parser)
    reach_arguments(parser)


def answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models answer which prompts, and where what is found goes: see `ANSWERS`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder")
    add(
        "--models",
        type=_words,
        default=(),
        metavar="M[,M]",
        help="base, sft, ppo, ppo/checkpoint-40, dpo, round-2/ppo, or PATH/TO/RUN:NAME of another run "
        "(default: all that RUN has)",
    )
    add(
        "--against",
        type=_words,
        default=(),
        metavar="M[,M]",
        help="what they are compared with (default: sft, or who gave the answers in --prompts)",
    )
    add(
        "--prompts",
        metavar="DATA",
        help="a source of prompts, or a file of AlpacaEval or Arena-Hard (default: those that training held out)",
    )
    add("--limit", type=positive_int, metavar="N", help="only N prompts, drawn by a hash (default: all)")
    add("--samples", type=positive_int, default=1, metavar="K", help="answers of each model to a prompt (default: 1)")
    add("--temperature", type=float, metavar="T", help="of sampling, above 0 (default: as in training)")
    add("--response-length", type=positive_int, metavar="N", help="tokens at most (default: as in training)")
    add("--seed", type=seed, default=0, metavar="N", help="of sampling and of drawn principles (default: 0)")
    add("--batch-size", type=positive_int, default=64, metavar="N", help="rows at once: memory and speed (default: 64)")
    add("--out", type=Path, metavar="DIR", help="where results go (default: RUN/evaluation)")


# The settings of an evaluation that `answer_arguments` add.
ANSWERS = ("models", "against", "prompts", "limit", "samples", "temperature", "response_length", "seed", "batch_size")


def _other_measures(parser: argparse.ArgumentParser) -> None:
    """What is measured beside, or in place of, comparing answers."""
    tax = parser.add_argument_group("the alignment tax")
    tax.add_argument("--texts", metavar="DATA", help="texts for perplexity (default: what `ptx` held out, if any)")
    tax.add_argument(
        "--tasks",
        type=_words,
        default=(),
        metavar="T[,T]",
        help="of EleutherAI's lm-evaluation-harness; tax: truthfulqa_mc2, hellaswag and toxigen (default: none)",
    )
    tax.add_argument("--task-dir", type=Path, metavar="DIR", help="YAML files of tasks of your own (default: none)")
    tax.add_argument("--task-limit", type=positive_int, metavar="N", help="questions of each task (default: all)")
    bench = parser.add_argument_group("the reward model itself")
    only_one = bench.add_mutually_exclusive_group()
    only_one.add_argument(
        "--rewardbench",
        type=Path,
        metavar="FILE",
        help="RewardBench or RewardBench 2, in place of comparing models: how often a --judge (default: reward and "
        "judge) scores the right response highest",
    )
    only_one.add_argument(
        "--comparisons",
        metavar="DATA",
        help="a source of comparisons, in place of comparing models: the reward card's figures of a --judge (default: "
        "reward and judge) on them, beside what length and words alone would get",
    )
    bench.add_argument("--split", help="of --comparisons, where it is a Hub dataset (default: train)")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..evaluate.comparisons import RESULTS as COMPARISONS
        from ..evaluate.comparisons import evaluate_comparisons
        from ..evaluate.evaluation import evaluate
        from ..evaluate.judges import Asking
        from ..evaluate.plan import EvaluationSettings
        from ..evaluate.rewardbench import evaluate_rewardbench, results_name
        from ..evaluate.tables import comparisons_table, evaluation_tables, rewardbench_table
        from ..feedback.judge import JudgeSettings
        from ..feedback.ledger import Prices

        asking = Asking(
            reach(options), JudgeSettings(*question(options)), Prices(*prices_of(options)), options.parallel
        )
        named = (*ANSWERS, "texts", "tasks", "task_dir", "task_limit", "under_base")
        chosen = {name: getattr(options, name) for name in named}
        settings = EvaluationSettings(**chosen, judges=tuple(options.judge), asking=asking)
        if options.split is not None and options.comparisons is None:
            raise ValueError("--split is of --comparisons: name those too.")
        if options.rewardbench is not None:
            _check_alone("rewardbench", settings)
            result = evaluate_rewardbench(options.run, options.rewardbench, settings, options.out)
            tables, name = [rewardbench_table(result)], results_name(result["version"])
        elif options.comparisons is not None:
            _check_alone("comparisons", settings)
            result = evaluate_comparisons(
                options.run, options.comparisons, options.split or "train", settings, options.out
            )
            tables, name = [comparisons_table(result)], COMPARISONS
        else:
            result = evaluate(options.run, settings, options.out)
            tables, name = evaluation_tables(result), "evaluation.json"
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print_result(result, tables, (options.out or options.run / "evaluation") / name)


def print_result(result: dict[str, Any], tables: list[Any], path: Path) -> None:
    """Print what was found: tables of it, warnings, what to ship, and where all of it stands."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for table in tables:
        console.print(table)
        console.print()
    for warning in result["warnings"]:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"))
    if result.get("best") is not None:
        console.print(Text(printable(result["best"]["words"]), style="bold"))
    console.print(Text(f"All of it: {path}"))


def _check_alone(option: str, settings: Any) -> None:
    """Raises ValueError where what compares models is set beside an option that would do nothing with it."""
    used = ("judges", "batch_size", "asking")
    for field in fields(settings):
        if field.name not in used and getattr(settings, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise ValueError(f"--{name} is of comparing models, which --{option} does not do: leave one of them out.")


COMMAND = Command("compare the models of a run on held-out prompts", _arguments, _run)
