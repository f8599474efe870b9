"""The commands of `rlhf_recipes.feedback`: what each may be told. What does the work is imported when it runs."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command of `rlhf-recipes`."""

    purpose: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# --- check ------------------------------------------------------------------------------------------------------------


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
examples:
  rlhf-recipes check comparisons.jsonl
  rlhf-recipes check comparisons.csv --columns chosen=better rejected=worse --model Qwen/Qwen3-0.6B-Base
  rlhf-recipes check --recipe qwen3-0-6b-hh --stage reward
  rlhf-recipes check helpsteer3 --stage reward        a named source, from the Hub (see --sources)
  rlhf-recipes check copy.jsonl --convert helpsteer3  a copy of it

exit code: 0, or 1 where the stage would refuse the data, or 2 where it cannot be read"""
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="a file, a Hub dataset, module:function, or a named source")
    stages = ("sft", "reward", "ppo", "dpo", "ptx", "rank", "label")
    add("--stage", choices=stages, help="what the data are for (default: what says most about a row)")
    add("--model", metavar="NAME", help="a Hub id, a folder or module:function: lengths in tokens, the chat template")
    add("--chat-template", metavar="NAME", help="as base.chat_template (default: the tokenizer's own)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--recipe", metavar="NAME", help="check a stage's data as this recipe has them; options here come first")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="TRL's column names for the source's")
    add("--convert", metavar="NAME", help="a named source's conversion, or module:function (default: none)")
    add("--subset", metavar="NAME", help="the Hub dataset's configuration")
    add("--split", metavar="NAME", help="the Hub dataset's split (default: train)")
    add("--limit", type=int, metavar="N", help="read only the first N rows (default: all)")
    add("--max-length", type=int, metavar="N", help="tokens of the longest row (default: the stage's own)")
    add("--heldout", type=float, metavar="SHARE", help="of the prompts, kept from training (default: 0.05)")
    add("--other", metavar="DATA", help="a second source, say of evaluation: which prompts are in both")
    add("--other-split", metavar="NAME", help="its split; without --other, of the same dataset (default: as --split)")
    add("--rows", type=int, default=3, metavar="N", help="show the first N usable rows (default: 3)")
    add("--refused", type=int, default=20, metavar="N", help="name the first N refused rows (default: 20)")
    add("--json", action="store_true", help="print JSON")
    add("--sources", action="store_true", help="list the named sources with their licences, and stop")


def _check(options: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):  # libraries print notes as they load; standard output is the report alone
        from rich.console import Console

        from . import check, check_page

    if options.sources:
        check_page.show_sources(Console(highlight=False))
        return
    with redirect_stdout(sys.stderr):
        report = check.run(options)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        check_page.show(report, Console(highlight=False))
    if report["problems"]:
        raise SystemExit(1)


# --- sample -----------------------------------------------------------------------------------------------------------


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or that of a round (runs/x/round-2)")
    parser.add_argument("--prompts", metavar="DATA", help="a source with prompts (default: the run's ppo.data)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where samples go (default: RUN/feedback/samples.jsonl)"
    )
    parser.add_argument("-k", type=int, default=4, help="responses to each prompt, 2 to 9 (default: 4)")
    parser.add_argument(
        "--models",
        default="ppo",
        metavar="M[,M]",
        help="who answers, in turn: base, sft, ppo, dpo, or a folder with an adapter inside RUN (default: ppo)",
    )
    parser.add_argument("--temperatures", default="1.0", metavar="T[,T]", help="in turn for each model (default: 1.0)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N different prompts (default: all)")
    parser.add_argument(
        "--response-length", type=int, metavar="N", help="tokens at most (default: as the run's ppo stage, else 256)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (default: 0)")
    parser.add_argument(
        "--similarity",
        type=float,
        default=0.9,
        metavar="S",
        help="draw a response again that shares this much of its words with another (default: 0.9; 1: only equal ones)",
    )
    parser.add_argument("--attempts", type=int, default=3, metavar="N", help="to get a different response (default: 3)")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="rows at once: memory and speed alone (default: 64)"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Stopped, the same command goes on. A prompt without two different responses goes to *.left_out.jsonl.

  rlhf-recipes sample runs/mine --models sft,ppo --limit 500
  rlhf-recipes sample runs/mine --prompts fresh.jsonl -k 2 --temperatures 0.7,1.0 --out samples.jsonl"""


def _sample(options: argparse.Namespace) -> None:
    from ..recipe import Source, of_run

    recipe = of_run(options.run)
    if options.prompts is None and recipe.ppo is None:
        raise ValueError(f"{options.run} has no ppo stage whose prompts could be taken: set --prompts.")
    own = recipe.ppo.args.get("response_length", 53) if recipe.ppo is not None else 256
    with redirect_stdout(sys.stderr):
        from .sample import Settings, prompts_of, sample

        settings = Settings(
            models=tuple(options.models.split(",")),
            temperatures=_numbers("--temperatures", options.temperatures),
            k=options.k,
            response_length=options.response_length or own,
            seed=options.seed,
            similarity=options.similarity,
            attempts=options.attempts,
        )
        out = options.out or options.run / "feedback" / "samples.jsonl"
        prompts = prompts_of(recipe) if options.prompts is None else Source(options.prompts)
        found = sample(options.run, prompts, out, settings, options.batch_size, options.limit)
    print(
        f"{found['samples']:,} samples in {out}, {found['short']:,} of them with fewer than {options.k} responses; "
        f"{found['left_out']:,} prompts left out, without two different ones.\n"
        f"Have people rank them with `rlhf-recipes label {out}`, or a model with `rlhf-recipes judge`."
    )


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} must be numbers with commas between them, not {text!r}.") from error


# --- label ------------------------------------------------------------------------------------------------------------


def _label_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="the file that `sample` wrote")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="where judgements go (default: SAMPLES with .labels.jsonl)"
    )
    parser.add_argument("--guidelines", type=Path, metavar="FILE", help="text to show beside them (default: none)")
    parser.add_argument(
        "--mode",
        choices=("rank", "pairs"),
        default="rank",
        help="rank all responses at once, or compare two after two until their order is known (default: rank)",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the samples that every labeler gets, 0 to 1, for their agreement (default: 0.2)",
    )
    parser.add_argument("--port", type=int, default=8008, metavar="N", help="to listen at; 0: any (default: 8008)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that share and all orders (default: 0)")
    parser.add_argument(
        "--share", action="store_true", help="listen to the whole network, not encrypted (default: to this machine)"
    )
    parser.epilog = (
        "Each labeler opens the link that is printed and gives a name. Stopped, the same command goes on. Skips go to "
        "*.skipped.jsonl beside the labels; *.token keeps the link's token for the next start: delete it to change it."
    )


def _label(options: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):
        from .label import serve

    serve(**{key: value for key, value in vars(options).items() if key != "command"})


# --- agreement --------------------------------------------------------------------------------------------------------


def _agreement_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Agreement is counted over pairs of responses: better, tie or worse. Intervals are of 95 %, over prompts. Without --out
nothing is written. Both kinds of output are data for the reward stage:

  rlhf-recipes agreement people.jsonl judge.jsonl                              # people and a model compared
  rlhf-recipes agreement people.jsonl --out weighted.jsonl                     # each judgement with a weight
  rlhf-recipes agreement people.jsonl --out merged.jsonl --merge               # a row a prompt, with soft labels
  rlhf-recipes run my-recipe reward.data=weighted.jsonl"""
    parser.add_argument("labels", type=Path, nargs="+", metavar="LABELS", help="files that `label` or `judge` wrote")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="write the judgements, each with its labeler's weight of mean 1: how much more often right than wrong, by "
        "Dawid and Skene's model (default: write nothing)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write a row a prompt instead: the likeliest ranking, with the probability of each preference as a soft "
        "label (default: a row a judgement)",
    )
    parser.add_argument(
        "--fast",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="a judgement that took less is counted as too fast (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: tables)")


def _agreement(options: argparse.Namespace) -> None:
    if options.merge and options.out is None:
        raise ValueError("--merge says what to write; say where as well, with --out FILE.jsonl.")
    if options.out is not None and options.out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, and {options.out} does not.")
    if options.out is not None and options.out.resolve() in [path.resolve() for path in options.labels]:
        raise ValueError(f"--out: {options.out} is one of the files that are read; give another name.")
    with redirect_stdout(sys.stderr):
        from . import agreement

        found = agreement.report(agreement.read(options.labels), options.fast)
    agreement.show(found.numbers, options.json)
    if options.out is not None:
        print(f"{found.write(options.out, options.merge):,} rows in {options.out}", file=sys.stderr)


# --- judge ------------------------------------------------------------------------------------------------------------


def _judge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="the file that `sample` wrote")
    _model_arguments(parser, "--judge")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of the labels (default: SAMPLES with .judged.jsonl)")
    question_arguments(parser)
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N samples (default: all)")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
Each pair of responses is compared in both orders: one wins where both agree, else the pair is a tie. Where the
probability of the answer is known, its mean over both orders is the pair's soft label (`preferences`). Labels are data
for the `reward` stage. Every question and answer is kept in *.asked.jsonl beside them. Stopped, the same command goes
on. A response cannot pretend to end early, but it may try to talk the judge into choosing it, and no template prevents
that.

  rlhf-recipes judge samples.jsonl --judge Qwen/Qwen3-4B-Instruct-2507 --quantization nf4
  rlhf-recipes judge samples.jsonl --judge http://127.0.0.1:8000/v1 --parallel 32
  OPENAI_API_KEY=... rlhf-recipes judge samples.jsonl --judge https://api.openai.com/v1 --model-name gpt-4.1-mini \\
      --price-in 0.40 --price-out 1.60 --max-cost 5"""


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


def _judge(options: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):
        from . import judge
        from .client import Settings, connect
        from .ledger import Prices
        from .rows import read_samples

        settings = judge.Settings(*question(options))
        model, prices = Settings(options.judge, **reach(options)), Prices(*prices_of(options))
        samples = read_samples(options.samples)
        out = options.out or options.samples.with_suffix(".judged.jsonl")
        found = judge.judge(samples, out, connect(model), settings, prices, options.parallel, options.limit)
    print(judge.report(found, out))


def question(options: argparse.Namespace) -> tuple[Any, ...]:
    """The arguments of `judge.Settings`. Raises ValueError where a file of them cannot be read."""
    from . import constitution

    principles = [constitution.Principle(options.criteria or constitution.CRITERIA)]
    if options.constitution is not None:
        principles = constitution.read(options.constitution, needs_principle=True)
    template = constitution.COMPARISON if options.template is None else constitution.template(options.template)
    return tuple(principles), template, options.max_tokens, options.seed


def positive_int(text: str) -> int:
    """A whole number above 0, for argparse, which names the option where it is none."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _model_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Which model answers, and what `reach_arguments` add."""
    parser.add_argument(
        name,
        required=True,
        metavar="MODEL|URL",
        help="a Hub id, a local folder, module:function, a run folder, or the URL of an OpenAI-compatible endpoint",
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn principles, and of sampling (default: 0)")
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
    endpoint = parser.add_argument_group("an endpoint")
    endpoint.add_argument("--model-name", metavar="NAME", help="the model there (default: the first that it lists)")
    endpoint.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the key (default: OPENAI_API_KEY; on this machine no key is sent)",
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
    """The settings of `client.connect` beside the model."""
    names = ("role", "quantization", "chat_template", "model_name", "api_key_env", "timeout", "retries")
    return {name: getattr(options, name) for name in names}


def prices_of(options: argparse.Namespace) -> tuple[float, float, float | None]:
    """The arguments of `ledger.Prices`."""
    return options.price_in, options.price_out, options.max_cost


# --- critique ---------------------------------------------------------------------------------------------------------


def _critique_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPTS", help="a file, a Hub dataset or module:function with prompts")
    _model_arguments(parser, "--model")
    parser.add_argument(
        "--out", type=Path, default=Path("revised.jsonl"), metavar="FILE", help="where rows go (default: revised.jsonl)"
    )
    parser.add_argument(
        "--constitution",
        type=Path,
        metavar="FILE",
        help="of principles, one drawn for each revision (default: our own)",
    )
    parser.add_argument("--revisions", type=positive_int, default=1, metavar="N", help="of each answer (default: 1)")
    parser.add_argument(
        "--max-tokens",
        type=positive_int,
        default=512,
        metavar="N",
        help="of an answer, a critique, a revision (default: 512)",
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest (default: 1.0)")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows (default: all)")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
The model answers each prompt (or takes the row's own `completion` or `response`), criticises the answer by a principle,
and revises it. Rows are data for the `sft` stage. Revisions that are empty, cut off, or repeat what was given are left
out. Every question and answer is kept in *.asked.jsonl beside the rows; stopped, the same command goes on.
A constitution is text, a principle a paragraph (or a line, where none is empty; # begins a comment), or a YAML list of
texts or of entries with `principle`, or with `critique` and `revision`, the whole requests; `name` is optional.

  rlhf-recipes critique prompts.jsonl --model runs/mine --role sft --revisions 2 --out revised.jsonl
  rlhf-recipes run mine sft.data=revised.jsonl"""


def _critique(options: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr):
        from ..recipe import Source
        from . import constitution, critique
        from .client import Settings, connect
        from .ledger import Prices

        principles = constitution.read(options.constitution or constitution.DEFAULT)
        settings = critique.Settings(
            tuple(principles), options.revisions, options.max_tokens, options.temperature, options.seed
        )
        model, prices = Settings(options.model, **reach(options)), Prices(*prices_of(options))
        prompts, dropped = critique.read_prompts(Source(options.prompts, limit=options.limit))
        found = critique.critique(prompts, options.out, connect(model), settings, prices, options.parallel)
    print(critique.report(found, options.out, dropped))


COMMANDS = {
    "check": Command("say what a stage will do with some data", _check_arguments, _check),
    "sample": Command("sample responses to be ranked from the policies of a run", _sample_arguments, _sample),
    "label": Command("open a local page on which people rank samples", _label_arguments, _label),
    "agreement": Command("say how far labelers agree, and what each is worth", _agreement_arguments, _agreement),
    "judge": Command("let a model rank samples", _judge_arguments, _judge),
    "critique": Command("let a model revise its answers by a constitution", _critique_arguments, _critique),
}
