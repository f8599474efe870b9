"""The recipe `smollm2-sentiment` whole, by the project's own commands, in one command, on a CPU or a GPU.

    python tests/benchmarks/real_model.py --model FOLDER --data FILE [--hours 1.5] [--seed 0] [--out DIR]

FOLDER may be a Hub id, and FILE a Hub dataset; without them it is SmolLM2-135M-Instruct on IMDB. Stopped, the same
command goes on: each part is a command that resumes, and what is finished is not done again. While it works it says
every minute how far it is and how long the rest takes at the pace of this machine, and at the end it prints one table,
and what base, SFT model and policy say to the same held-out prompts. It needs the checkout, the package's dependencies
and vaderSentiment.

The hours set the length of PPO alone. What comes before takes half an hour on two cores, by an estimate. Once its
first part is done, the machine's pace is known, and PPO gets as many episodes as the rest of the hours hold.
"""

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_recipes import Recipe, load, replace
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.recipe.overrides import parse_overrides
from rlhf_recipes.records.files import read_json, read_rows, write_json
from rlhf_recipes.records.manifest import Manifest
from rlhf_recipes.records.recorder import METRICS

NAME = "smollm2-sentiment"
LABELER = "rlhf_recipes.worlds.sentiment:labeler"
SPOKEN = ("base", "sft", "ppo")  # who is compared
FEWEST, MOST = 640, 12_800  # episodes: with fewer PPO shows little

# Estimated seconds on two cores of an AMD EPYC in bfloat16: what the parts cost against each other. EPISODE has a share
# of the evaluations during PPO, DEMONSTRATION counts prompts of which three in four have one.
SAMPLE, DEMONSTRATION, RANKING, EPISODE, ANSWER = 0.11, 0.6, 0.68, 0.73, 0.5


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    demonstrated: int = 640  # prompts that the base answers
    ranked: int = 834  # prompts that the SFT model answers: 5,004 comparisons
    evaluated: int = 192  # held-out prompts
    settings: tuple[str, ...] = ()  # changes of the recipe


# Whole, in seconds, on the model of the tests.
SMALL = Sizes(
    24,
    16,
    8,
    (
        "base.chat_template=none",
        "sft.max_length=512",
        "sft.per_device_train_batch_size=8",
        "reward.max_length=512",
        "reward.num_train_epochs=1",
        "ppo.max_prompt_length=300",
        "ppo.per_device_train_batch_size=8",
        "ppo.gradient_accumulation_steps=1",
        "ppo.eval_strategy=no",
    ),
)


@dataclass(frozen=True)
class Part:
    """A command, and what it is of the whole."""

    title: str
    words: Sequence[str]  # of `rlhf-recipes`
    seconds: float  # on the machine of the constants above
    share: Callable[[], float]  # that is done, from 0 to 1, as its files say


def parts_of(settings: Sequence[str], run_dir: Path, sizes: Sizes, episodes: int, seed: int) -> list[Part]:
    """The parts in their order. A part's share of 1 means that it is finished."""
    base, samples, labels = (run_dir / "feedback" / f"{n}.jsonl" for n in ("base", "samples", "samples.labels"))
    run = ["run", NAME, *settings, f"ppo.total_episodes={episodes}", "--run-dir", str(run_dir), "--stages"]
    sample = ["--temperatures", str(load(NAME).ppo.args["temperature"]), "--seed", str(seed), "--limit"]

    def sampled(path: Path, wanted: int) -> Callable[[], float]:
        places = (path, path.with_suffix(".left_out.jsonl"))
        return lambda: min(1.0, sum(len(read_rows(place)) for place in places) / wanted)

    def trained(stage: str, share: Callable[[dict[str, Any]], float]) -> Callable[[], float]:
        def done() -> float:
            if Manifest.read(run_dir).is_done(stage):
                return 1.0
            rows = [row for row in read_rows(run_dir / METRICS) if row["stage"] == stage and "epoch" in row]
            return min(0.99, share(rows[-1])) if rows else 0.0

        return done

    config = recipe_of(settings)
    epochs = {stage: getattr(config, stage).args["num_train_epochs"] for stage in ("sft", "reward")}
    updates = episodes / episodes_of_an_update(config)
    evaluation = run_dir / "evaluation" / "evaluation.json"
    return [
        Part(
            "the base answers",
            ["sample", NAME, *settings, "--out", str(base), *sample, str(sizes.demonstrated)],
            sizes.demonstrated * 4 * SAMPLE,
            sampled(base, sizes.demonstrated),
        ),
        Part(
            "SFT on the best of its answers",
            [*run, "sft"],
            sizes.demonstrated * DEMONSTRATION,
            trained("sft", lambda row: row["epoch"] / epochs["sft"]),
        ),
        Part(
            "the SFT model answers",
            ["sample", str(run_dir), "--models", "sft", *sample, str(sizes.ranked)],
            sizes.ranked * 4 * SAMPLE,
            sampled(samples, sizes.ranked),
        ),
        Part(
            "simulated labelers rank",
            ["label", str(samples), "--by", LABELER, "--seed", str(seed)],
            1.0,
            lambda: float(labels.is_file()),
        ),
        Part(
            "the reward model",
            [*run, "reward"],
            sizes.ranked * RANKING,
            trained("reward", lambda row: row["epoch"] / epochs["reward"]),
        ),
        Part("PPO", [*run, "ppo"], episodes * EPISODE, trained("ppo", lambda row: row["step"] / updates)),
        Part(
            "the evaluation",
            ["evaluate", str(run_dir), "--models", ",".join(SPOKEN), "--under-base"],
            sizes.evaluated * len(SPOKEN) * ANSWER,
            lambda: float(evaluation.is_file()),
        ),
    ]


def recipe_of(settings: Sequence[str]) -> Recipe:
    """The recipe with the changes of the command line."""
    return replace(load(NAME), **parse_overrides(settings))


def episodes_of_an_update(recipe: Recipe) -> int:
    """Episodes of a rollout."""
    args = recipe.ppo.args
    return args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * args["num_mini_batches"]


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


def choose_episodes(whole: Sequence[Part], hours: float, pace: float, an_update: int) -> int:
    """Episodes of PPO that fit into the hours beside all other parts, in whole updates."""
    others = sum(part.seconds for part in whole if part.title != "PPO")
    fitting = (hours * 3600 / pace - others) / EPISODE
    return max(FEWEST, min(MOST, int(fitting))) // an_update * an_update


def report(run_dir: Path) -> list[str]:
    """The table, and what the models say to the same prompts: the first ones, and where the policy is worst by gold."""
    evaluation, summary = read_json(run_dir / "evaluation" / "evaluation.json"), read_json(run_dir / "summary.json")
    assert evaluation is not None and summary is not None
    answers = read_rows(run_dir / "evaluation" / "answers.jsonl")
    wins = {win["model"]: win for win in evaluation["wins"] if win["judge"] == "gold"}
    columns = {
        "base_perplexity": ("base perplexity", ".1f"),
        "distinct_2": ("distinct bigrams", ".2f"),
        "about_prompt": ("about the prompt", ".0%"),
        "kl": ("KL", ".2f"),
    }
    headings = [
        "model",
        "gold",
        "wins against SFT (95 %)",
        "reward",
        "tokens",
        *(title for title, _ in columns.values()),
    ]
    lines = [
        f"Labelers rank {len(read_rows(run_dir / 'feedback' / 'samples.labels.jsonl')):,} prompts; the reward model is "
        f"right on {summary['reward_model_accuracy']:.1%} of held-out pairs. {evaluation['prompts']} held-out prompts.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for model in SPOKEN:
        entry, win = evaluation["models"][model], wins.get(model)
        won = "" if win is None else f"{win['rate']:.1%} ({win['low']:.1%} to {win['high']:.1%})"
        means, panel = entry["means"], entry["behaviour"]
        cells = [format(panel[key], form) for key, (_, form) in columns.items()]
        lines.append(
            f"| {model} | {means['gold']:.2f} | {won} | {means['reward']:.2f} | {panel['tokens']:.1f} "
            f"| {' | '.join(cells)} |"
        )
    by_prompt: dict[str, dict[str, Any]] = {}
    for row in answers:
        by_prompt.setdefault(row["id"], {})[row["model"]] = row
    prompts = list(by_prompt.values())
    worst = sorted(prompts[4:], key=lambda rows: rows["ppo"]["scores"]["gold"])[:2]
    for title, chosen in (("The first prompts", prompts[:4]), ("Where the policy is worst by gold", worst)):
        lines += ["", f"{title}:"]
        for rows in chosen:
            lines += ["", f"> {rows['base']['prompt'][-1]['content']!r}"]
            lines += [f"- {name} ({rows[name]['scores']['gold']:.2f}): {rows[name]['completion']!r}" for name in SPOKEN]
    return lines


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a folder (default: that of the recipe)")
    parser.add_argument("--data", help="a Hub dataset or a file (default: that of the recipe)")
    parser.add_argument("--hours", type=float, help="for all of it (default: 1.5, and a quarter on a GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / NAME, help="the run folder")
    parser.add_argument("--small", action="store_true", help="whole in small sizes, to see that it works")
    options = parser.parse_args(words)
    sizes = SMALL if options.small else Sizes()
    feedback = options.out / "feedback"
    settings = [
        f"seed={options.seed}",
        "tracker=none",
        f"sft.data={feedback / 'base.jsonl'}",
        f"reward.data={feedback / 'samples.labels.jsonl'}",
        f"ppo.heldout_limit={sizes.evaluated}",
        *sizes.settings,
        *([f"base.model={options.model}"] if options.model else []),
        *([f"ppo.data={options.data}"] if options.data else []),
        *(["base.dtype=bfloat16"] if cpu_multiplies_in_bfloat16() else []),
    ]
    an_update = episodes_of_an_update(recipe_of(settings))
    hours = options.hours or (0.25 if torch.cuda.is_available() else 1.5)
    chosen = feedback / "episodes.json"  # a run that goes on keeps what it began with
    if not chosen.is_file():
        whole = parts_of(settings, options.out, sizes, an_update, options.seed)
        pace = work_through(whole, None, until=1) or (0.05 if torch.cuda.is_available() else 1.0)
        episodes = an_update if options.small else choose_episodes(whole, hours, pace, an_update)
        write_json(chosen, {"episodes": episodes, "pace": pace})
    kept = read_json(chosen)
    assert kept is not None
    work_through(parts_of(settings, options.out, sizes, kept["episodes"], options.seed), kept["pace"])
    print("\n".join(report(options.out)))


def cpu_multiplies_in_bfloat16() -> bool:
    """Whether there is no GPU, whose precision is chosen at run time, but a CPU that gains by 16 bits."""
    flags = Path("/proc/cpuinfo")
    return not torch.cuda.is_available() and flags.is_file() and "avx512_bf16" in flags.read_text()


if __name__ == "__main__":
    main()
