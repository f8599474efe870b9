"""A recipe for somebody's own data: the data looked at, settings chosen by rule, and written with their reasons."""

import bisect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..data.check import examine, survey_source
from ..data.guess import guess_columns
from ..data.rows import FORMATS, Survey
from ..data.tokens import CHAT_TEMPLATES
from ..model.base import base_config, load_tokenizer
from ..plan.cards import Card, on_card
from ..plan.plan import plan_memory
from ..plan.skeleton import weight_bytes
from ..recipe.values import Base, PPOStage, Recipe, Source, Stage
from ..stages.configure import configure

FEW_COMPARISONS = 5_000
MOST_RESPONSE = 512  # tokens


@dataclass(frozen=True)
class Wanted:
    """What a recipe is wanted for."""

    name: str
    base: str  # a Hub id or a folder
    data: Mapping[str, str]  # of sft, reward and ppo those that there are
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # stage -> TRL's names for the source's
    card: Card | None = None  # None: this machine


class Choice(NamedTuple):
    """Settings that belong together, and why they are so."""

    settings: dict[str, Any]
    why: str


@dataclass
class NewRecipe:
    """A recipe with the reasons for what stands in it."""

    recipe: Recipe
    text: str  # of its file
    guessed: dict[str, dict[str, str]]  # stage -> columns that were guessed from their names
    chat: list[str]  # the stages whose plain text is taken as turns of a conversation
    warnings: list[str]


def new_recipe(wanted: Wanted) -> NewRecipe:
    """Look at the data, choose, and write the text of a recipe file.

    Raises ValueError where the model or the data cannot be read, a file has columns that nobody can guess, or nothing
    fits on the card.
    """
    base, why = choose_base(wanted)
    tokenizer = load_tokenizer(base)
    context = getattr(base_config(base).get_text_config(), "max_position_embeddings", None) or 10**6
    surveys, guessed = {}, {}
    for stage, data in wanted.data.items():
        surveys[stage], guess = look_at(stage, data, wanted.columns.get(stage, {}))
        guessed |= {stage: guess} if guess else {}
    reports = {stage: examine(survey, stage, tokenizer) for stage, survey in surveys.items()}
    plain = [stage for stage, report in reports.items() if not report["conversational"]]
    # Text under TRL's own names is text that goes on, as TRL has it. A file with other names was made for no tool, and
    # with a model that has a chat template, or beside conversations, its questions and answers are turns as well.
    chat = plain if guessed or wanted.columns or len(plain) < len(reports) or base.chat_template is None else []
    for stage in chat:
        surveys[stage].source = replace(surveys[stage].source, chat=True)
        reports[stage] = examine(surveys[stage], stage, tokenizer)
    sources = {stage: survey.source for stage, survey in surveys.items()}
    choices = {
        stage: list(choose_ppo(reports, context) if stage == "ppo" else choose_training(stage, reports[stage], context))
        for stage in sources
    }
    recipe = make_recipe(wanted.name, base, sources, choices)
    for stage in [stage for stage in choices if stage != "ppo"]:
        choices[stage].append(choose_rows(recipe, stage, reports[stage], wanted.card))
    recipe = make_recipe(wanted.name, base, sources, choices)
    text = render(wanted, recipe, why, choices)
    said = [line for stage in reports for line in warnings(stage, reports[stage])]
    return NewRecipe(recipe, text, guessed, chat, said)


def choose_base(wanted: Wanted) -> tuple[Base, str]:
    """The base with its quantization and chat template, and why."""
    base = Base(wanted.base)
    size = weight_bytes(replace(base, dtype="bfloat16")) / 1e9
    why = [f"{size:.1f} GB in 16 bits"]
    if wanted.card is not None and size > 0.3 * wanted.card.gib:
        base = replace(base, quantization="nf4")
        why.append(f"NF4 leaves room on {wanted.card.gib:.0f} GiB")
    tokenizer = load_tokenizer(base)
    if tokenizer.chat_template == CHAT_TEMPLATES["transcript"]:  # which one without a template of its own gets
        template = "chatml" if {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys() else "transcript"
        base = replace(base, chat_template=template)
        why.append("it has no chat template of its own")
    return base, "; ".join(why)


def look_at(stage: str, data: str, columns: Mapping[str, str]) -> tuple[Survey, dict[str, str]]:
    """The survey of a stage's source, and the columns that were guessed. Raises ValueError where they cannot be."""
    survey = survey_source(Source(data, columns=dict(columns)))
    guess: dict[str, str] = {}
    if not columns and not any(survey.counts(stage).values()):
        found = guess_columns(survey.theirs, FORMATS[stage]) or {}
        guess = {ours: theirs for ours, theirs in found.items() if ours != theirs}
        survey = survey_source(Source(data, columns=guess))
    survey.format(stage)
    if survey.total < 2_000:  # of which a twentieth says nothing
        survey.source = replace(survey.source, heldout=0.1)
    return survey, guess


def choose_training(stage: str, report: Mapping[str, Any], context: int) -> Iterator[Choice]:
    """What does not depend on the card, of SFT or the reward model."""
    rate = {"sft": 1e-4, "reward": 9e-5}[stage]
    schedule = {"learning_rate": rate, "lr_scheduler_type": "cosine"}
    yield Choice(schedule, "InstructGPT's, times ten for LoRA (thinkingmachines.ai/blog/lora)")
    rows = report["train"]
    most = 1 if stage == "reward" else 2
    epochs = 3 if rows < 1_000 else most if rows < 10_000 else 1
    yield Choice(
        {"num_train_epochs": epochs}, f"{rows:,} rows" + (", which one pass would barely teach" if epochs > 1 else "")
    )
    length, why = choose_length([report["lengths"]["whole"]], 32, context)
    yield Choice({"max_length": length}, why)


def choose_length(lengths: list[Mapping[str, float]], step: int, most: int) -> tuple[int, str]:
    """A length that 95 % of the rows do not exceed, and why."""
    wanted = max(int(of["95 %"]) for of in lengths)
    length = min(-(-wanted // step) * step, most)
    return length, f"95 % have at most {wanted:,} tokens" + (f", the model at most {most:,}" if length == most else "")


def choose_ppo(reports: Mapping[str, Mapping[str, Any]], context: int) -> Iterator[Choice]:
    """PPO's settings. Its rows are chosen by the plan when it begins."""
    answers = [reports[stage]["lengths"] for stage in ("sft", "reward") if stage in reports]
    preferred = [of[name] for of in answers for name in ("completion", "chosen", "response") if name in of][:1]
    response, why_response = choose_length(preferred, 16, min(MOST_RESPONSE, context // 2))
    prompt, why_prompt = choose_length([reports["ppo"]["lengths"]["prompt"]], 16, context - response)
    prompts = reports["ppo"]["train"]
    rollout = 256 if prompts >= 5_000 else 64
    while rollout > max(prompts, 8):  # a rollout has each prompt once at most
        rollout //= 2
    episodes = max(40 * rollout, min(2 * prompts, 100 * rollout) // rollout * rollout)
    times = episodes / max(prompts, 1)
    yield Choice({"learning_rate": 3e-5, "critic_learning_rate": 9e-5}, "arXiv:2403.17031 and InstructGPT, times ten")
    yield Choice(
        {"total_episodes": episodes}, f"each of {prompts:,} prompts {times:.2g} times, {episodes // rollout} updates"
    )
    batches = {"mini_batch_size": rollout // 2, "num_mini_batches": 2, "num_ppo_epochs": 1}
    yield Choice(batches, f"{rollout} episodes a rollout, two steps, one pass (InstructGPT)")
    auto: dict[str, Any] = dict.fromkeys(
        ("per_device_train_batch_size", "rollout_micro_batch_size", "gradient_checkpointing"), "auto"
    )
    yield Choice(auto, "what fits")
    yield Choice({"max_prompt_length": prompt}, why_prompt)
    yield Choice(
        {"response_length": response, "missing_eos_penalty": 1.0}, f"{why_response}; one without an end costs 1"
    )
    yield Choice({"temperature": 1.0, "kl_coef": 0.05}, "InstructGPT; arXiv:2403.17031. Raise kl_coef where it games")
    every = {"eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, "save_total_limit": 1}
    yield Choice(every, "of at least 40 updates")


def choose_rows(recipe: Recipe, stage: str, report: Mapping[str, Any], card: Card | None) -> Choice:
    """The rows that are trained at once, by the plan: the most that fit, without checkpointing as long as four do.

    Raises ValueError where not even one row fits.
    """
    batch = {"sft": 32, "reward": 64}[stage]  # InstructGPT's
    why = f"{batch} (InstructGPT)"
    while batch > 8 and report["train"] < 20 * batch:
        batch //= 2
        why = f"{batch}, so that {report['train']:,} rows are {report['train'] // batch} steps"
    sizes = [(rows, False) for rows in (16, 8, 4)] + [(rows, True) for rows in (16, 8, 4, 2, 1)]
    sizes = [(rows, checkpointing) for rows, checkpointing in sizes if rows <= batch]
    gpu = None if card is None else card.gib * 2**30
    device_recipe = recipe if card is None else on_card(recipe, card)

    def settings(size: tuple[int, bool]) -> dict[str, Any]:
        rows, checkpointing = size
        accumulated = {"gradient_accumulation_steps": batch // rows}
        return {"per_device_train_batch_size": rows, **accumulated, "gradient_checkpointing": checkpointing}

    def fits(size: tuple[int, bool]) -> bool:
        section = getattr(device_recipe, stage)
        tried = replace(device_recipe, **{stage: replace(section, args={**section.args, **settings(size)})})
        return plan_memory(tried, configure(tried), gpu, only=[stage]).fits_in(stage)

    chosen = sizes[bisect.bisect_left(sizes[:-1], True, key=fits)]
    if chosen == sizes[-1] and not fits(chosen):
        raise ValueError(f"{stage} fits with no batch size: take a smaller --base, or a larger --gpu.")
    return Choice(settings(chosen), f"{why}; {chosen[0]} at once fit, by the plan")


def make_recipe(name: str, base: Base, sources: Mapping[str, Source], choices: Mapping[str, list[Choice]]) -> Recipe:
    """The recipe of the choices so far."""
    stages: dict[str, Any] = {}
    for stage, source in sources.items():
        args = {key: value for choice in choices[stage] for key, value in choice.settings.items()}
        kind = PPOStage if stage == "ppo" else Stage
        stages[stage] = kind(**vars(source), args=args)
    return Recipe(name=name, base=base, **stages)


def warnings(stage: str, report: Mapping[str, Any]) -> Iterator[str]:
    """What is thin or wrong with the data of a stage, and what to do."""
    source, rows = report["source"], report["used"]
    yield from (f"{source}: {problem}" for problem in report["problems"])
    if report["dropped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items())
        yield f"{source}: {sum(report['dropped'].values()):,} of {report['rows']:,} rows cannot be used ({reasons})."
    if report["duplicates"]["rows"] > rows / 10:
        yield f"{source}: {report['duplicates']['rows']:,} of {rows:,} rows are there more than once."
    if stage == "ppo" and report["train"] < 1_000:
        yield f"{source}: {report['train']:,} prompts are few, and PPO sees each again and again."
    pairs = report["pairs"]
    if report["opposed"]:
        longest, shortest = (f"{part['source']} (in {part['rate']:.0%})" for part in report["opposed"])
        yield (
            f"{source}: in {longest} the longer response is better more often than not, in {shortest} the shorter one. "
            "A small model may learn nothing from both at once: try each alone."
        )
    if stage == "reward":
        if rows < FEW_COMPARISONS:
            yield (
                f"{source}: {rows:,} comparisons are few; a reward model wants {FEW_COMPARISONS:,} or more. "
                "`rlhf-recipes sample` and `label` make more."
            )
        judged = sum(pairs.values())
        if judged and pairs.get("longer", 0) > 0.65 * judged:
            yield (
                f"{source}: the better response is the longer one in {pairs['longer'] / judged:.0%}. The reward model "
                "may learn no more than that: its card will say so, and ppo.length_penalty is against it."
            )


def render(wanted: Wanted, recipe: Recipe, why: str, choices: Mapping[str, list[Choice]]) -> str:
    """The file of a recipe."""
    card = "this machine" if wanted.card is None else wanted.card.name
    stages = "".join(_stage(stage, getattr(recipe, stage), choices[stage]) for stage in choices)
    names = ["Base", *(["PPOStage"] if "ppo" in choices else []), "Recipe", "Stage", "main"]
    return f'''\
"""Never run at its own size: {_code(", ".join(wanted.data.values()))[1:-1]} on {_code(wanted.base)[1:-1]}, for {card}.

Made by `rlhf-recipes new`; each choice has its reason beside it, and is yours to change.
"""

from rlhf_recipes import {", ".join(names)}

recipe = Recipe(
    name={_code(recipe.name)},
    base={_call("Base", vars(recipe.base), vars(Base(recipe.base.model)), first="model")},  # {why}
{stages})

if __name__ == "__main__":
    main(recipe)
'''


def _stage(stage: str, section: Stage, choices: list[Choice]) -> str:
    """A stage of the file: its source, and a line for each choice."""
    kind = type(section).__name__
    source = {key: value for key, value in vars(section).items() if key != "args"}
    head = _call(kind, source, vars(type(section)(section.data)), first="data").removesuffix(")")
    lines = [
        f"        {', '.join(f'{key}={_code(value)}' for key, value in choice.settings.items())},  # {choice.why}\n"
        for choice in choices
    ]
    return f"    {stage}={head}, args=dict(\n{''.join(lines)}    )),\n"


def _call(kind: str, values: Mapping[str, Any], defaults: Mapping[str, Any], first: str) -> str:
    """A call with the first argument and those that are not as they would be without."""
    others = [f"{key}={_code(value)}" for key, value in values.items() if key != first and value != defaults[key]]
    return f"{kind}({', '.join([_code(values[first]), *others])})"


def _code(value: Any) -> str:
    """A value as Python, with double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_code(key)}: {_code(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
