"""The card of a model of a run, for the Hub: what was measured of it and how it was made, and what was not measured."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..data.read import READERS, file_kind
from ..data.sources import SOURCES, Named, resolve_source
from ..data.text import text
from ..data.tokens import stop_token_id
from ..recipe.lookup import is_function
from ..recipe.values import STAGES, Source
from ..records.files import read_json
from ..records.folder import read_export
from ..report.blocks import Code, Table, percent
from ..report.curves import resources, reward_curves
from ..report.gather import RunContents, best_win, by_judge, model_results, title_of, trust, win_rates
from ..report.overoptimization import FORM, draw_curves, panels, read_curve
from ..report.results import answers, headline, results
from ..report.warnings import warnings_of_run
from ..report.what_was_run import what_was_run
from .adapter import adapter_table
from .loading import load_code, serve_command
from .markdown import fenced, markdown, plain, table, without_folders
from .measure import table as measured_table
from .reward import score_table
from .trained import Trained

PICTURE = "overoptimization.png"
# A model -> the stages whose data it has learned from.
LEARNED_FROM = {
    "sft": ("sft",),
    "reward": ("sft", "reward"),
    "ppo": ("sft", "reward", "ppo", "ptx"),
    "dpo": ("sft", "dpo"),
}


@dataclass(frozen=True)
class Shipped:
    """A model of a run, in the form in which others get it."""

    format: Literal["adapter", "merged", "reward"]
    repo_id: str
    trained: Trained
    base_id: str | None  # what others load the base by; None where they cannot
    folder: Path | None = None  # that `export` has made; None: not yet

    @property
    def stage(self) -> str:
        """The stage that trained it."""
        return next(part for part in self.trained.name.split("/") if part in STAGES)

    @property
    def record(self) -> dict[str, Any]:
        """`export.json`; nothing before the export."""
        return {} if self.folder is None else read_export(self.folder) or {}


def model_card(run: RunContents, shipped: Shipped, samples: int = 3) -> ModelCard:
    """The card.

    Args:
        run: the run folder's contents.
        samples: so many held-out prompts with their answers.
    """
    parts = [f"# {plain(shipped.repo_id.rpartition('/')[2])}"]
    for title, paragraphs in _sections(run, shipped, samples):
        written = [paragraph for paragraph in paragraphs if paragraph]
        parts += [f"## {title}"] * bool(written and title) + written
    return ModelCard(f"---\n{_metadata(run, shipped).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def draw_overoptimization(run: RunContents, folder: Path) -> None:
    """Draw the picture of the card into a folder, for a run that evaluated PPO's reward and quality."""
    from matplotlib import rc_context  # which takes half a second to import

    curve = read_curve(run.folder)
    if curve is not None:
        curves = {run.name: curve}
        with rc_context({"savefig.bbox": "tight"}):  # the legend is wider than one panel
            draw_curves(panels({run.name: run.recipe}, curves), curves, curve.judge, folder)
        (folder / PICTURE).with_suffix(".svg").unlink()


def _metadata(run: RunContents, shipped: Shipped) -> ModelCardData:
    """What the Hub reads of it. Licence and language are nowhere measured, and so left out."""
    scores, is_adapter = shipped.trained.scores, shipped.format == "adapter"
    found = [*(_reward_results(run, shipped) if scores else _policy_results(run, shipped))]
    return ModelCardData(
        base_model=shipped.base_id,
        base_model_relation=shipped.base_id and ("adapter" if is_adapter else "finetune"),
        datasets=[name for name in map(_hub_dataset, _sources(run, shipped).values()) if name] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["rlhf", "reward-model" if scores else shipped.stage, "rlhf_recipes"],
        model_name=shipped.repo_id.rpartition("/")[2] if found else None,  # which heads them
        eval_results=found or None,
    )


def _sources(run: RunContents, shipped: Shipped) -> dict[str, Source]:
    """The data that the model has learned from, by stage."""
    sources = {stage: getattr(run.recipe, stage) for stage in LEARNED_FROM[shipped.stage]}
    return {stage: source for stage, source in sources.items() if source is not None}


def _hub_dataset(source: Source) -> str | None:
    """The id of a dataset of the Hub; None where the rows are from a file, a URL or a function."""
    name = resolve_source(source).data
    is_file = Path(name).exists() or file_kind(Path(name)) in READERS or "://" in name
    if is_function(name) or is_file or "/" not in name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _known(source: Source) -> Named | None:
    """What is known of a source that has a name here, though it be given by its Hub id."""
    return next((named for name, named in SOURCES.items() if source.data in (name, named.data)), None)


def _policy_results(run: RunContents, shipped: Shipped) -> Iterator[EvalResult]:
    """A policy's win rates and tasks, as the Hub shows them."""
    for win in win_rates(run):
        if win["model"] == shipped.trained.name:
            against, judge = (without_folders(part) for part in (title_of(win["against"]), by_judge(win["judge"])))
            yield EvalResult(
                task_type="text-generation",
                dataset_type="heldout",
                dataset_name="Held-out prompts",
                metric_type="win_rate",
                metric_name=f"Wins against {against}, judged by {judge} (95 % interval {percent(win['low'])} to "
                f"{percent(win['high'])}, {win['prompts']:,} prompts)",
                metric_value=round(win["rate"], 4),
            )
    for task, metrics in model_results(run).get(shipped.trained.name, {}).get("tasks", {}).items():
        for metric, result in metrics.items():
            if math.isfinite(result["value"]):
                yield EvalResult("text-generation", task, task, metric, round(result["value"], 4), metric_name=metric)


def _reward_results(run: RunContents, shipped: Shipped) -> Iterator[EvalResult]:
    """A reward model's accuracy, as the Hub shows it."""
    folder, _, name = shipped.trained.name.rpartition("/")
    part = next((part for part in run.parts if part.folder == run.folder / folder), None)
    if part is None or name != "reward":  # a member of an ensemble has no accuracy of its own
        return
    card = run.card(part)
    if card is not None:
        rate = card["accuracy"]
        yield EvalResult(
            task_type="text-classification",
            dataset_type="heldout",
            dataset_name="Held-out comparisons",
            metric_type="accuracy",
            metric_name=f"Prefers the chosen response (95 % interval {percent(rate['low'])} to {percent(rate['high'])},"
            f" {rate['pairs']:,} pairs)",
            metric_value=round(rate["rate"], 4),
        )


def _sections(run: RunContents, shipped: Shipped, samples: int) -> Iterator[tuple[str, Iterable[str]]]:
    """Titles and paragraphs. A section without any is left out."""
    scores = shipped.trained.scores
    yield "", _about(run, shipped)
    yield "How to load it", _loading(run, shipped)
    yield "What it was trained on", _training(run, shipped)
    if not scores:
        yield "Results", map(markdown, results([run]))
        yield "Over-optimisation", _overoptimization(run, shipped)
    if run.recipe.reward is not None:
        yield "Reward model", map(markdown, reward_curves([run]))
    yield "How close it is to what was trained", _closeness(shipped)
    yield "Warnings", [_bullets(f"{about}: {said}" for about, said in warnings_of_run(run))]
    if not scores:
        yield "Samples", _samples(run, shipped, samples)
    yield "Chat template and stop tokens", _template(run, shipped)
    yield "How it was made", _making(run)
    yield "Limits", [_bullets(_limits(run, shipped))]


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {plain(line)}" for line in lines)


def _about(run: RunContents, shipped: Shipped) -> Iterator[str]:
    """What it is, and the number that says most of it."""
    form = {"adapter": "as a LoRA adapter", "merged": "merged into its base", "reward": "as a sequence classifier"}
    kind = "reward model" if shipped.trained.scores else "policy"
    yield (
        f"The {kind} {plain(shipped.trained.name)} of the run {plain(shipped.trained.run)}, {form[shipped.format]}, "
        "made by rlhf_recipes. All figures here are those that the run, its evaluation and the export wrote."
    )
    best = best_win(run)
    if not shipped.trained.scores and best is not None and best["model"] == shipped.trained.name:
        yield plain(headline(run)[1])


def _is_conversational(run: RunContents) -> bool:
    """Whether prompts are messages, as answers of the run show it; of one without any it is taken to be so."""
    return all(not isinstance(row["prompt"], str) for row in run.answers)


def _loading(run: RunContents, shipped: Shipped) -> Iterator[str]:
    """Code that loads it, and what serves it."""
    base_id = shipped.base_id or "THE-BASE"
    chats = _is_conversational(run)
    yield fenced(load_code(shipped.trained, shipped.format, shipped.repo_id, base_id, chats), "python")
    if not shipped.trained.scores:
        yield fenced(serve_command(shipped.trained, shipped.format, shipped.repo_id, base_id), "bash")
    if shipped.base_id is None and shipped.format == "adapter":
        yield "The base is not public: in its place stands THE-BASE."


def _training(run: RunContents, shipped: Shipped) -> Iterator[str]:
    """The base, and the data of each stage with their licences as far as they are known."""
    base, lora, fingerprint = shipped.trained.base, shipped.trained.recipe.lora, shipped.trained.fingerprint
    facts = {
        "base": shipped.base_id or f"{base.model} (not public)",
        "revision": fingerprint["revision"] or f"none is known; it was {fingerprint['model']}",
        "quantization in training": base.quantization or "none",
        "dtype": fingerprint["dtype"],
        "adapter": f"LoRA, r {lora.r}, alpha {lora.alpha}, on {lora.target_modules}",
    }
    yield table(["", ""], [[key, str(value)] for key, value in facts.items()])
    rows = []
    for stage, source in _sources(run, shipped).items():
        known = _known(source)
        licence = [known.licence, known.citation] if known else ["not known", ""]
        rows.append([stage, source.data, *licence])
    yield table(["stage", "data", "licence", "source"], rows)
    yield from (markdown(block) for block in what_was_run([run]) if isinstance(block, Table) and not block.folded)


def _overoptimization(run: RunContents, shipped: Shipped) -> Iterator[str]:
    """The picture of reward and quality over the distance from the SFT model."""
    if shipped.stage == "ppo" and (curve := read_curve(run.folder)) is not None:
        yield f"![reward and quality over the square root of the KL]({PICTURE})"
        yield plain(
            f"Held-out evaluations of PPO{' in the first round' if len(run.parts) > 1 else ''}: the reward that it was "
            f"trained against (dashed) and {by_judge(curve.judge)} (solid), relative to the SFT model, with the fits "
            f"of {FORM}."
        )


def _closeness(shipped: Shipped) -> Iterator[str]:
    """What the export measured of itself."""
    measured = shipped.record.get("measured")
    if measured is not None:
        words = {"merged": measured_table, "adapter": adapter_table, "reward": score_table}[shipped.format]
        yield fenced(words(measured))


def _samples(run: RunContents, shipped: Shipped, count: int) -> Iterator[str]:
    """The first prompts of the answers that the run kept, answered by base, SFT model and this one."""
    block, ours = next(answers([run]), None), title_of(shipped.trained.name)
    if block is None or ours not in block.data["models"] or not count:
        return
    yield "The first held-out prompts as they come, none of them chosen."
    for row in block.data["rows"][:count]:
        yield f"**Prompt**\n\n{fenced(text(row['prompt']))}"
        for name, answer in zip(block.data["models"], row["answers"], strict=True):
            if answer is not None and name in ("base", "SFT", ours):
                ended = "" if answer["ended"] else " (cut off at the limit of tokens)"
                yield f"**{plain(name)}**{ended}\n\n{fenced(text(answer['text']))}"


def _template(run: RunContents, shipped: Shipped) -> Iterator[str]:
    """What ends a response, and the template."""
    tokenizer = shipped.trained.tokenizer
    written = None if shipped.folder is None else read_json(shipped.folder / "generation_config.json")
    if written is None:
        ids: Any = [tokenizer.eos_token_id, stop_token_id(tokenizer, _is_conversational(run))]
        ppo = run.recipe.ppo
        ids += [stop] if ppo is not None and (stop := ppo.args.get("stop_token_id")) is not None else []
    else:
        ids = written["eos_token_id"]
    stops = sorted({*(ids if isinstance(ids, list) else [ids])})
    words = ", ".join(f"{tokenizer.convert_ids_to_tokens(stop)} ({stop})" for stop in stops)
    yield f"A response ends with {plain(words)}."
    template = tokenizer.chat_template
    if isinstance(template, str):
        yield f"<details><summary>Chat template</summary>\n\n{fenced(template, 'jinja')}\n\n</details>"


def _making(run: RunContents) -> Iterator[str]:
    """The command, versions, settings, time, memory, hardware."""
    blocks = list(what_was_run([run]))
    command = next(block for block in blocks if isinstance(block, Code))
    if command.text.startswith("rlhf-recipes"):
        yield markdown(command)
    else:
        yield "The recipe is none that comes with the package: all its settings stand below."
    records = [record for part in run.parts for record in part.manifest.stages.values()]
    devices = dict.fromkeys(record["device"] for record in records if "device" in record)
    yield f"Hardware: {plain(', '.join(devices))}." if devices else "The hardware was not recorded."
    yield from map(markdown, resources([run]))
    yield from (markdown(block) for block in blocks if isinstance(block, Table) and block.folded)


def _limits(run: RunContents, shipped: Shipped) -> Iterator[str]:
    """What the figures do not carry: each thing that was not measured, and what holds of all."""
    name, missing = shipped.trained.name, []
    if shipped.trained.scores:
        if not any(run.card(part) for part in run.parts):
            missing.append("how often it prefers what people chose")
    else:
        judges = [win["judge"] for win in win_rates(run) if win["model"] == name]
        found = model_results(run).get(name, {})
        if not judges:
            missing.append("how often it wins against another model")
        elif all(trust(judge) == trust("reward") for judge in judges):
            missing.append("how often it wins by a judge that it was not trained against")
        if "refusals" not in found.get("behaviour", {}):
            missing.append("refusals, repetition, sycophancy")
        if not found.get("tasks"):
            missing.append("knowledge, truthfulness, safety and bias, by any benchmark")
        if "perplexity" not in found:
            missing.append("perplexity on other texts")
        if shipped.stage == "ppo" and read_curve(run.folder) is None:
            missing.append("quality over the course of PPO, and so over-optimisation")
    if not shipped.record:
        missing.append("how close what is uploaded is to what was trained, which the export measures")
    if missing:
        yield f"Not measured: {'; '.join(missing)}."
    yield "The figures say nothing of prompts that are unlike those on which they were measured."
    yield "No licence is stated here: that of the base and those of the data hold."
    if bias := shipped.record.get("measured", {}).get("bias"):
        yield f"The run adds {bias:.3f} to every score, which no classifier can hold; differences are the same."
