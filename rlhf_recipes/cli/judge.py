"""`rlhf-recipes judge`: a model ranks."""

import argparse
from pathlib import Path

from .asking import model_arguments, prices_of, question, question_arguments, reach
from .command import Command, notes_to_stderr, positive_int


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="the file that `sample` wrote")
    model_arguments(parser, "--judge")
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


def _run(options: argparse.Namespace) -> None:
    with notes_to_stderr():
        from ..feedback.client import ModelSettings
        from ..feedback.connect import connect
        from ..feedback.judge import JudgeSettings, judge_report, judge_samples
        from ..feedback.ledger import Prices
        from ..feedback.rows import read_samples

        settings = JudgeSettings(*question(options))
        model, prices = ModelSettings(options.judge, **reach(options)), Prices(*prices_of(options))
        samples = read_samples(options.samples)
        out = options.out or options.samples.with_suffix(".judged.jsonl")
        found = judge_samples(samples, out, connect(model), settings, prices, options.parallel, options.limit)
    print(judge_report(found, out))


COMMAND = Command("let a model rank samples", _arguments, _run)
