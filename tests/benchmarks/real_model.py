"""The recipes `smollm2-sentiment` and `smollm2-hh` whole, by the project's own commands, each in one command.

    python tests/benchmarks/real_model.py --model FOLDER --data FILE [--hours 1.5] [--seed 0] [--out DIR]
    python tests/benchmarks/real_model.py --recipe smollm2-hh --model FOLDER --data FILE --heldout-data FILE [...]

FOLDER may be a Hub id, and FILE a Hub dataset; without them it is SmolLM2-135M-Instruct on IMDB and on Anthropic's HH.
Stopped, the same command goes on: each part is a command that resumes, and what is finished is not done again. While it
works it says every minute how far it is and how long the rest takes at the pace of this machine, and at the end it
prints a table, and what the models say to the same held-out prompts. It needs the checkout, the package's dependencies
and, for the first recipe, vaderSentiment. It runs on a CPU or a GPU.

The hours set the length of PPO alone. What comes before takes half an hour on two cores for the first recipe. The
second trains the reward model on all comparisons, to be measured, and then two on parts of them, one for PPO and one to
judge it: an estimated two and a half hours. Once the first part is done, the machine's pace is known, and PPO gets as
many episodes as the rest of the hours hold.
"""

import argparse
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlhf_recipes import Recipe, load, replace
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.evaluate.comparisons import RESULTS
from rlhf_recipes.evaluate.tables import comparisons_table
from rlhf_recipes.recipe.overrides import parse_overrides
from rlhf_recipes.records.files import read_json, read_rows, write_json
from rlhf_recipes.records.manifest import Manifest
from rlhf_recipes.records.recorder import METRICS

LABELER = "rlhf_recipes.worlds.sentiment:labeler"
FEWEST, MOST = 640, 12_800  # episodes: with fewer PPO shows little

# Estimated seconds on two cores of an AMD EPYC in bfloat16: what the parts cost against each other. An episode has its
# share of the evaluations during PPO, a DEMONSTRATION counts prompts of which three in four have one.
SAMPLE, DEMONSTRATION, RANKING, COMPARISON, SCORED, SAMPLED = 0.11, 0.6, 0.68, 1.1, 0.4, 0.5


@dataclass(frozen=True)
class Part:
    """A command, and what it is of the whole."""

    title: str
    words: Sequence[str]  # of `rlhf-recipes`
    seconds: float  # on the machine of the constants above
    share: Callable[[], float]  # that is done, from 0 to 1, as its files say


@dataclass(frozen=True)
class Job:
    """What is to be done: a recipe with the changes of the command line, and where."""

    name: str
    settings: tuple[str, ...]  # changes of the recipe
    out: Path  # the run folder
    seed: int
    heldout_data: Sequence[str]  # comparisons to measure reward models on: DATA, and perhaps --split SPLIT

    @property
    def recipe(self) -> Recipe:
        """The recipe with its changes."""
        return replace(load(self.name), **parse_overrides(self.settings))

    @property
    def an_update(self) -> int:
        """Episodes of a rollout."""
        args = self.recipe.ppo.args
        return args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * args["num_mini_batches"]

    def train(
        self, stage: str, seconds: float, title: str, out: Path | None = None, changes: Sequence[str] = ()
    ) -> Part:
        """The part that trains a stage, in `out` or the run folder, with further changes of the recipe."""
        run_dir = out or self.out
        config = replace(self.recipe, **parse_overrides(changes))
        args = getattr(config, stage).args
        whole = args["total_episodes"] / self.an_update if stage == "ppo" else args["num_train_epochs"]
        unit = "step" if stage == "ppo" else "epoch"

        def share() -> float:
            if Manifest.read(run_dir).is_done(stage):
                return 1.0
            rows = [row for row in read_rows(run_dir / METRICS) if row["stage"] == stage and "epoch" in row]
            return min(0.99, rows[-1][unit] / whole) if rows else 0.0

        words = ["run", self.name, *self.settings, *changes, "--run-dir", str(run_dir), "--stages", stage]
        return Part(title, words, seconds, share)

    def sample(self, of: Sequence[str], path: Path, prompts: int, title: str) -> Part:
        """The part that samples four answers to each prompt; `of` says from what model."""
        places = (path, path.with_suffix(".left_out.jsonl"))

        def share() -> float:
            return min(1.0, sum(len(read_rows(place)) for place in places) / prompts)

        temperature = str(self.recipe.ppo.args["temperature"])
        words = ["sample", *of, "--temperatures", temperature, "--seed", str(self.seed), "--limit", str(prompts)]
        return Part(title, words, prompts * 4 * SAMPLE, share)

    def evaluate(self, words: Sequence[str], result: str, seconds: float, title: str, out: Path | None = None) -> Part:
        """The part that measures, in `out` or the run folder, and leaves a result behind."""
        run_dir = out or self.out
        path = run_dir / "evaluation" / result
        return Part(title, ["evaluate", str(run_dir), *words], seconds, lambda: float(path.is_file()))


@dataclass(frozen=True)
class Experiment:
    """What there is to be known of a recipe before anything is done."""

    models: tuple[str, ...]  # who is compared
    against: str  # one of them
    judge: str  # of quality, which nothing is trained on
    episode: float  # seconds, as the constants above
    parts: Callable[["Job", "Sizes", int], list["Part"]]


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    demonstrated: int = 640  # prompts that the base answers
    ranked: int = 834  # prompts that the SFT model answers: 5,004 comparisons
    comparisons: int = 4_200  # of people
    measured: int = 440  # of people, held out
    evaluated: int = 192  # held-out prompts
    settings: tuple[str, ...] = ()  # changes of the recipe


# Whole, in seconds, on the model of the tests.
SMALL = Sizes(24, 16, 48, 16, 8, ("base.chat_template=none", "reward.max_length=512", "ppo.max_prompt_length=300"))
SMALL_ARGS = {
    "sft": ("max_length=512", "per_device_train_batch_size=8"),
    "reward": ("num_train_epochs=1",),
    "ppo": ("per_device_train_batch_size=8", "gradient_accumulation_steps=1", "eval_strategy=no"),
}


def sentiment_parts(job: Job, sizes: Sizes, episodes: int) -> list[Part]:
    """The parts of `smollm2-sentiment` in their order. A part's share of 1 means that it is finished."""
    base, samples, labels = (job.out / "feedback" / f"{n}.jsonl" for n in ("base", "samples", "samples.labels"))
    changes = (f"sft.data={base}", f"reward.data={labels}", f"ppo.total_episodes={episodes}")
    job = dataclasses.replace(job, settings=(*job.settings, *changes))
    models = EXPERIMENTS[job.name].models
    from_base = [job.name, *job.settings, "--out", str(base)]
    label = ["label", str(samples), "--by", LABELER, "--seed", str(job.seed)]
    compare = ["--models", ",".join(models), "--under-base"]
    seconds = sizes.evaluated * len(models) * SAMPLED
    return [
        job.sample(from_base, base, sizes.demonstrated, "the base answers"),
        job.train("sft", sizes.demonstrated * DEMONSTRATION, "SFT on the best of its answers"),
        job.sample([str(job.out), "--models", "sft"], samples, sizes.ranked, "the SFT model answers"),
        Part("simulated labelers rank", label, 1.0, lambda: float(labels.is_file())),
        job.train("reward", sizes.ranked * RANKING, "the reward model"),
        job.train("ppo", episodes * EXPERIMENTS[job.name].episode, "PPO"),
        job.evaluate(compare, "evaluation.json", seconds, "the evaluation"),
    ]


def hh_parts(job: Job, sizes: Sizes, episodes: int) -> list[Part]:
    """The same of `smollm2-hh`. What learns from all comparisons has a run folder of its own, `OUT-all`."""
    job = dataclasses.replace(job, settings=(*job.settings, f"ppo.total_episodes={episodes}"))
    every, models = everything(job.out), EXPERIMENTS[job.name].models
    of_all = ("reward.judge_share=0", "reward.heldout=0.01")
    measure = ["--comparisons", *job.heldout_data]
    compare = ["--models", ",".join(models), "--against", "base", "--under-base"]
    learn, score = sizes.comparisons * COMPARISON, sizes.measured * SCORED
    return [
        job.train("reward", learn, "a reward model from all comparisons", every, of_all),
        job.evaluate(measure, RESULTS, score, "what it gets right", every),
        job.train("reward", learn, "two reward models, one of them to judge"),
        job.evaluate(measure, RESULTS, 2 * score, "what they get right"),
        job.train("ppo", episodes * EXPERIMENTS[job.name].episode, "PPO"),
        job.evaluate(compare, "evaluation.json", sizes.evaluated * len(models) * 2 * SAMPLED, "the evaluation"),
    ]


def everything(out: Path) -> Path:
    """The folder of the run that learns from all comparisons."""
    return out.with_name(f"{out.name}-all")


EXPERIMENTS = {
    "smollm2-sentiment": Experiment(("base", "sft", "ppo"), "sft", "gold", 0.73, sentiment_parts),
    "smollm2-hh": Experiment(("base", "ppo"), "base", "judge", 1.3, hh_parts),
}


def work_through(parts: Sequence[Part], pace: float | None, until: int | None = None) -> float | None:
    """Run what is not finished, saying every minute how far it is. Returns the pace.

    Args:
        until: run only so many of the parts.
        pace: seconds of this machine for one of the constants'; None: not known yet.
    """
    before, start = sum(part.seconds * part.share() for part in parts), time.monotonic()

    def progress() -> tuple[float | None, str]:
        done = sum(part.seconds * part.share() for part in parts)
        taken, whole = time.monotonic() - start, sum(part.seconds for part in parts)
        measured = taken / (done - before) if done - before > 30 else pace
        left = "not known yet" if measured is None else f"{(whole - done) * measured / 60:.0f} minutes"
        return measured, f"{done / whole:.0%} done, {taken / 60:.0f} minutes of this call; left: {left}"

    for number, part in enumerate(parts[:until], 1):
        if part.share() < 1:
            title, ended = f"[{number}/{len(parts)}] {part.title}", threading.Event()
            print(f"{title}: {progress()[1]}", flush=True)

            def say(title: str = title, ended: threading.Event = ended) -> None:
                while not ended.wait(60):
                    print(f"\n{title}: {progress()[1]}", flush=True)

            speaker = threading.Thread(target=say, daemon=True)
            speaker.start()
            try:
                main_cli(list(part.words))
            finally:
                ended.set()
                speaker.join()
    return progress()[0]


def choose_episodes(whole: Sequence[Part], hours: float, pace: float, episode: float, an_update: int) -> int:
    """Episodes of PPO, of so many seconds each, that fit into the hours beside all other parts, in whole updates."""
    others = sum(part.seconds for part in whole if part.title != "PPO")
    fitting = (hours * 3600 / pace - others) / episode
    return max(FEWEST, min(MOST, int(fitting))) // an_update * an_update


COLUMNS = {  # of the panel of behaviour: heading and format
    "tokens": ("tokens", ".1f"),
    "base_perplexity": ("base perplexity", ".1f"),
    "distinct_2": ("distinct bigrams", ".2f"),
    "about_prompt": ("about the prompt", ".0%"),
    "kl": ("KL", ".2f"),
}


def report(job: Job) -> list[str]:
    """The tables, and what the models say to the same prompts."""
    experiment = EXPERIMENTS[job.name]
    evaluation, summary = read_json(job.out / "evaluation" / "evaluation.json"), read_json(job.out / "summary.json")
    assert evaluation is not None and summary is not None
    lines = [
        f"The reward model is right on {summary['reward_model_accuracy']:.1%} of held-out pairs. "
        f"{evaluation['prompts']} held-out prompts.",
        "",
    ]
    wins = {(win["model"], win["judge"]): win for win in evaluation["wins"] if win["against"] == experiment.against}
    judges = list(dict.fromkeys((experiment.judge, "reward")))
    headings = ["model", *(f"{judge}, wins (95 %)" for judge in judges), *(title for title, _ in COLUMNS.values())]
    lines += [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for model in experiment.models:
        entry = evaluation["models"][model]
        cells = []
        for judge in judges:
            win = wins.get((model, judge))
            won = "" if win is None else f", {win['rate']:.1%} ({win['low']:.1%} to {win['high']:.1%})"
            cells.append(f"{entry['means'][judge]:.2f}{won}")
        cells += [format(entry["behaviour"][key], form) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return [*lines, *samples(job.out, experiment)]


def samples(run_dir: Path, experiment: Experiment) -> list[str]:
    """What the models say to the first prompts, and to those where the policy is worst by the judge of quality."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in read_rows(run_dir / "evaluation" / "answers.jsonl"):
        by_prompt.setdefault(row["id"], {})[row["model"]] = row
    prompts, judge, lines = list(by_prompt.values()), experiment.judge, []
    worst = sorted(prompts[4:], key=lambda rows: rows["ppo"]["scores"][judge])[:2]
    for title, chosen in (("The first prompts", prompts[:4]), (f"Where the policy is worst by {judge}", worst)):
        lines += ["", f"{title}:"]
        for rows in chosen:
            lines += ["", f"> {rows['base']['prompt'][-1]['content']!r}"]
            lines += [
                f"- {name} ({rows[name]['scores'][judge]:.2f}): {rows[name]['completion']!r}"
                for name in experiment.models
            ]
    return lines


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=EXPERIMENTS, default="smollm2-sentiment")
    parser.add_argument("--model", help="a Hub id or a folder (default: that of the recipe)")
    parser.add_argument("--data", help="a Hub dataset or a file (default: that of the recipe)")
    parser.add_argument(
        "--heldout-data", help="comparisons on which reward models are measured (default: HH's split test)"
    )
    parser.add_argument("--hours", type=float, help="for all of it (default: 1.5, and a quarter on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/RECIPE)")
    parser.add_argument("--small", action="store_true", help="whole in small sizes, to see that it works")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="further changes of the recipe")
    options = parser.parse_args(words)
    sizes = SMALL if options.small else Sizes()
    job = job_of(options, sizes)
    experiment = EXPERIMENTS[job.name]
    hours = options.hours or (0.25 if torch.cuda.is_available() else 1.5)
    chosen = job.out / "feedback" / "episodes.json"  # a run that goes on keeps what it began with
    if not chosen.is_file():
        whole = experiment.parts(job, sizes, job.an_update)
        pace = work_through(whole, None, until=1) or (0.05 if torch.cuda.is_available() else 1.0)
        fitting = choose_episodes(whole, hours, pace, experiment.episode, job.an_update)
        chosen.parent.mkdir(parents=True, exist_ok=True)
        write_json(chosen, {"episodes": job.an_update if options.small else fitting, "pace": pace})
    kept = read_json(chosen)
    assert kept is not None
    work_through(experiment.parts(job, sizes, kept["episodes"]), kept["pace"])
    for run_dir in (everything(job.out), job.out) if job.heldout_data else ():
        print(run_dir)
        Console().print(comparisons_table(read_json(run_dir / "evaluation" / RESULTS)))
    print("\n".join(report(job)))


def job_of(options: argparse.Namespace, sizes: Sizes) -> Job:
    """What the command line asks for."""
    recipe, settings = load(options.recipe), [f"seed={options.seed}", "tracker=none", *sizes.settings]
    settings += [f"ppo.heldout_limit={sizes.evaluated}"]
    settings += [f"base.model={options.model}"] if options.model else []
    settings += ["base.dtype=bfloat16"] if cpu_multiplies_in_bfloat16() else []
    if options.small:
        settings += [f"{s}.{arg}" for s, args in SMALL_ARGS.items() if getattr(recipe, s) is not None for arg in args]
    heldout: list[str] = []
    if options.recipe == "smollm2-hh":
        if options.small or not options.data:
            settings += [f"{stage}.limit={sizes.comparisons}" for stage in ("reward", "ppo")]
        settings += [f"reward.data={options.data}"] if options.data else []
        heldout = [options.heldout_data] if options.heldout_data else [recipe.reward.data, "--split", "test"]
    settings += [f"ppo.data={options.data}"] if options.data else []
    out = options.out or Path("runs") / options.recipe
    return Job(options.recipe, (*settings, *options.settings), out, options.seed, heldout)


def cpu_multiplies_in_bfloat16() -> bool:
    """Whether there is no GPU, whose precision is chosen at run time, but a CPU that gains by 16 bits."""
    flags = Path("/proc/cpuinfo")
    return not torch.cuda.is_available() and flags.is_file() and "avx512_bf16" in flags.read_text()


if __name__ == "__main__":
    main()
