"""`rlhf-recipes arena`: the page on which people compare the models of a run."""

import argparse
import shlex

from .command import Command, add_trust, notes_to_stderr
from .evaluate import ANSWERS, answer_arguments, print_result
from .label import PAGE, page_arguments


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
The models answer prompts as `evaluate` has them answer, and two answers stand side by side, whose they are hidden.
Each person opens the link that is printed and gives a name. Ctrl-C ends it and prints how often people preferred which
model, by person, and how far other judges agree with people; the same command goes on, and `evaluate` and `report` show
it from then on. What was judged is data for the next reward model: reward.data=RUN/evaluation/judged-people.jsonl.

  rlhf-recipes arena runs/tiny
  rlhf-recipes arena runs/mine --models sft,ppo,runs/other:ppo --against sft --limit 100 --sheet
  rlhf-recipes arena runs/mine --live
  rlhf-recipes agreement runs/mine/evaluation/judged-people.jsonl"""
    answer_arguments(parser)
    parser.add_argument(
        "--live",
        action="store_true",
        help="people type the prompts, and two models answer each while they wait; results go to RUN/evaluation/typed",
    )
    page_arguments(parser)
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..evaluate.arena import arena
        from ..evaluate.judges import labels_file
        from ..evaluate.live import arena_live, live_folder
        from ..evaluate.plan import EvaluationSettings
        from ..evaluate.tables import evaluation_tables
        from ..recipe.values import PEOPLE

    settings = EvaluationSettings(**{name: getattr(options, name) for name in ANSWERS})
    page = {name: getattr(options, name) for name in PAGE}
    out = options.out or (live_folder(options.run) if options.live else options.run / "evaluation")
    result = (arena_live if options.live else arena)(options.run, settings, out, seed=options.seed, **page)
    if result is None:
        return print("Nobody has asked anything.")
    print_result(result, evaluation_tables(result), out / "evaluation.json")
    if result["people"] is not None:
        print(f"The next reward model can learn from it: reward.data={labels_file(out, PEOPLE)}")
        if out == options.run / "evaluation":
            print(f"The report shows it:\n  rlhf-recipes report {shlex.quote(str(options.run))}")


COMMAND = Command("open a local page on which people compare the models of a run", _arguments, _run)
