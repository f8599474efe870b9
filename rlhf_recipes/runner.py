"""`run(recipe)`: the run folder, the stages in order, skip and resume, progress and the final table."""

import copy
import dataclasses
import gc
import importlib.metadata
import json
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow.compute
import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig

from . import __version__, backends, data, dpo, model, ppo, report, reward, rewards, rounds, sft, summary, tracking
from .advice import out_of_memory, refuse
from .config import DPOConfig, PPOConfig, RewardConfig
from .dry_run import NoPlan
from .files import write_json, write_text
from .memory import peak_memory_mib, reset_peak_memory, resident_mib
from .plan import StagePlan, for_device, plan, settle, stage_plan
from .recipe import STAGES, Recipe, Source, check_args, function, suggestion, to_dict
from .tracking import Tracker

CONFIGS: dict[str, type[TrainingArguments]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "ppo": PPOConfig,
    "dpo": DPOConfig,
}
VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "wandb")


@dataclass(frozen=True)
class Job:
    """All that one stage needs."""

    recipe: Recipe
    stage: str
    run_dir: Path
    config: Any  # one of CONFIGS
    others: dict[str, data.Prepared]  # see _prepare_others
    data: data.Prepared
    tokenizer: PreTrainedTokenizerBase
    fingerprint: dict[str, Any]
    resume: str | None  # the checkpoint to go on from
    round: int = 1  # from the second on `run_dir` is the round's folder, inside the run's
    callbacks: tuple[TrainerCallback, ...] = ()  # the user's, of every stage's trainer
    tracker: Tracker | None = None  # while the stage runs

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def step(self) -> int | None:
        """The step of the checkpoint to go on from."""
        return None if self.resume is None else _state(self.resume).global_step

    @property
    def root(self) -> Path:
        """The run's own folder."""
        return self.run_dir if self.round == 1 else self.run_dir.parent

    @property
    def sft(self) -> Path | None:
        """The SFT adapter; None, the bare base, in a recipe without that stage."""
        return None if self.recipe.sft is None else self.root / "sft"

    @property
    def start(self) -> Path | None:
        """The adapter that the policy starts from: the SFT one, or the policy of the round before."""
        return self.sft if self.round == 1 else rounds.folder(self.root, self.round - 1) / "ppo" / "policy"

    def adapter(self, folder: str, name: str, seed: int) -> "Job":
        """The job of a further reward adapter, in a folder, with a name and a tracked run of its own.

        Args:
            seed: is added to the stage's.
        """
        config = copy.copy(self.config)
        config.output_dir = str(self.folder / folder)
        config.run_name += f"-{name}"
        config.seed += seed
        config.data_seed = None if config.data_seed is None else config.data_seed + seed
        resume = last_checkpoint(Path(config.output_dir))
        return dataclasses.replace(self, stage=f"{self.stage}-{name}", config=config, resume=resume)

    @contextmanager
    def tracked(self, beside: bool = False) -> Iterator["Job"]:
        """The job with its run in the tracker; `beside` that of the stage, for a further reward adapter."""
        with tracking.track(self, beside) as tracker:
            yield dataclasses.replace(self, tracker=tracker)

    def watch(self, trainer: Trainer) -> "Recorder":
        """Log the trainer to the run folder and the terminal, in place of transformers' own printing.

        Rows that an earlier attempt wrote after the checkpoint are dropped: they come again.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            _forget(self.run_dir / name, self.stage, self.step or 0)
        trainer.remove_callback(PrinterCallback)
        recorder = Recorder(self, trainer)
        trainer.add_callback(recorder)
        trainer.add_callback(Progress(self.stage))
        for callback in self.callbacks:
            trainer.add_callback(callback)
        return recorder

    def train(self, trainer: Trainer) -> None:
        """Train from the stage's last checkpoint, if there is one, to the end."""
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                # TRL makes the adapters of a quantized base bfloat16, where a step of 1e-5 on a weight is lost.
                parameter.data = parameter.data.float()
        if self.resume is not None:
            state: Any = _state(self.resume)
            # True of the last step, and where training stopped early or beyond max_kl.
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                # From such a checkpoint the Trainer would take one more step, so it is only loaded. The path of the
                # best one in its state may be that of a folder that has been moved since.
                best = self.folder / f"checkpoint-{state.best_global_step}"
                chosen = trainer.args.load_best_model_at_end and best.is_dir()
                trainer.state = state
                trainer._load_from_checkpoint(str(best) if chosen else self.resume)
                trainer.remove_callback(Progress)
                return
        trainer.train(resume_from_checkpoint=self.resume)


def run(
    recipe: Recipe,
    run_dir: Path | None = None,
    stages: Sequence[str] | None = None,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    jobs: int = 1,
) -> dict[str, Any]:
    """Run a recipe's stages in order into `run_dir` (default `runs/<name>`), and return the summary.

    Run again, it skips the stages that are finished and resumes an unfinished one from its last checkpoint.

    Args:
        stages: only these, of `sft`, `reward`, `ppo`, `dpo`; what they build on must be finished in `run_dir`.
        force: run stages that cannot fit by the plan.
        callbacks: given to the trainer of every stage, whose `args.output_dir` tells them which it is.
        jobs: of a recipe with variants, run so many of them at once.
    Raises:
        ValueError: anything wrong with the recipe, its data or the folder, or a stage that cannot fit, before a weight
            is loaded; a stage that ran out of memory.
    """
    run_dir = Path(run_dir or Path("runs") / recipe.name.replace("_", "-"))
    if recipe.variants:
        from . import sweep  # which runs each variant by this function

        return sweep.run(recipe, run_dir, stages, force, callbacks, jobs)
    if jobs != 1:
        raise ValueError(f"Recipe {recipe.name!r} has no variants to run {jobs} of at once: leave out --jobs.")
    wanted = stages_of(recipe, stages)
    _quiet()
    configs = check(recipe, run_dir)
    manifest = open_run(recipe, run_dir, wanted)
    todo = [stage for stage in wanted if manifest["stages"].get(stage, {}).get("state") != "done"]
    later = unfinished_rounds(recipe, run_dir) if "ppo" in wanted else []
    console, waiting = Console(), None
    if todo or later:
        ahead = [stage for stage in configs if stage in todo or (later and stage in ("reward", "ppo"))]
        planned = _plan(recipe, {stage: configs[stage] for stage in ahead}, force, console)
        tokenizer = model.load_tokenizer(recipe.base)
        manifest["base"] = model.fingerprint(recipe.base, tokenizer)
        prepared = {stage: _prepare(recipe, stage, configs[stage], tokenizer) for stage in todo}
        others = {stage: _prepare_others(recipe, stage, configs, tokenizer, prepared) for stage in todo}
        _same_format(prepared, others)
        prompts = rounds.fresh_prompts(recipe, tokenizer, configs["ppo"]) if later else []
        # Not before: a recipe whose data were refused may be corrected and run in the same folder.
        write_json(run_dir / "recipe.json", to_dict(recipe))
        for stage in todo:
            resume = last_checkpoint(run_dir / stage)
            of_stage = others[stage], prepared[stage], tokenizer, manifest["base"], resume
            job = Job(recipe, stage, run_dir, configs[stage], *of_stage, callbacks=tuple(callbacks))
            _train(job, manifest, bool(planned), console)
        for number in later:
            labels = rounds.collect(recipe, run_dir, number, prompts[number - 2], tokenizer, configs["ppo"])
            if labels is None:
                waiting = rounds.instructions(recipe, run_dir, number)
                break
            _run_round(recipe, run_dir, number, configs, tokenizer, bool(planned), console, tuple(callbacks))
    manifests = [read_manifest(rounds.folder(run_dir, number)) for number in _rounds_of(recipe)]
    result = summary.summarize(manifest, [of_round for of_round in manifests if of_round["stages"]])
    write_json(run_dir / "summary.json", result)
    written = report.write([run_dir], run_dir / "report.html")
    if recipe.artifacts and (todo or later):
        tracking.upload_report(recipe, run_dir)
    if result["models"]:
        console.print(summary.table(result))
    console.print(Text(f"{summary.footnote(result)}. Run folder: {run_dir}; report: {written.name}"))
    if waiting is not None:
        console.print(Text(waiting, style="bold"))
    return result


def _rounds_of(recipe: Recipe) -> range:
    return range(2, 1 if recipe.rounds is None else recipe.rounds.count + 1)


def unfinished_rounds(recipe: Recipe, run_dir: Path) -> list[int]:
    found = {number: read_manifest(rounds.folder(run_dir, number))["stages"] for number in _rounds_of(recipe)}
    return [number for number, stages in found.items() if stages.get("ppo", {}).get("state") != "done"]


def _run_round(
    recipe: Recipe,
    run_dir: Path,
    number: int,
    configs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    planned: bool,
    console: Console,
    callbacks: tuple[TrainerCallback, ...],
) -> None:
    """Train the reward model on all comparisons up to this round, and the policy of the round before against it."""
    folder = rounds.folder(run_dir, number)
    manifest = read_manifest(folder)
    manifest["base"] = model.fingerprint(recipe.base, tokenizer)
    write_json(folder / "recipe.json", to_dict(recipe))
    for stage in ("reward", "ppo"):
        if manifest["stages"].get(stage, {}).get("state") == "done":
            continue
        config = copy.copy(configs[stage])
        config.output_dir, config.run_name = str(folder / stage), f"{run_dir.name}-{folder.name}-{stage}"
        config.data_seed = recipe.seed + number  # each round takes the rows in another order
        prepared = _prepare(recipe, stage, config, tokenizer)
        if stage == "reward":
            prepared = data.merge([prepared, *_labels(recipe, run_dir, number, tokenizer, config)])
        others = _prepare_others(recipe, stage, configs, tokenizer, {})
        of_stage = others, prepared, tokenizer, manifest["base"], last_checkpoint(folder / stage)
        job = Job(recipe, stage, folder, config, *of_stage, round=number, callbacks=callbacks)
        console.print(Text(f"round {number}", style="bold"), end=", ")
        _train(job, manifest, planned, console)


def _labels(
    recipe: Recipe, run_dir: Path, number: int, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Iterator[data.Prepared]:
    """The labels of each round up to this one, with the round as their source where they name none."""
    for earlier in range(2, number + 1):
        path = str(rounds.training_file(recipe, run_dir, earlier))
        assert recipe.reward is not None
        source = dataclasses.replace(recipe.reward, data=path, columns={}, convert=None, limit=None)
        limit = model.longest_row(recipe.base, config.max_length)
        part = data.prepare("reward", source, tokenizer, limit, recipe.seed)
        if "source" not in part.train.column_names:  # the reward card then tells the rounds apart
            named = {side: [f"round-{earlier}"] * len(getattr(part, side)) for side in ("train", "heldout")}
            train, heldout = (getattr(part, side).add_column("source", named[side]) for side in named)
            part = dataclasses.replace(part, train=train, heldout=heldout)
        yield part


def _train(job: Job, manifest: dict[str, Any], planned: bool, console: Console) -> None:
    """Run a stage and say what there is to know of it."""
    console.print(Text(f"{job.stage}: {_data_line(job.data.report)}", style="bold"))
    _run_stage(job, manifest, plan_for_rows(job) if planned else None)
    for warning in manifest["stages"][job.stage]["results"].get("card", {}).get("warnings", ()):
        console.print(Text(f"warning: {warning}", style="yellow"))


def _quiet() -> None:
    """Keep the terminal for what the user can act on."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # transformers 5.23 renamed an option that TRL and PEFT still use by its old name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


def _plan(recipe: Recipe, configs: dict[str, Any], force: bool, console: Console) -> dict[str, StagePlan]:
    """Print what the stages will take, a line each. Raises ValueError where one cannot fit, unless forced."""
    try:
        if "ppo" in configs:
            settle(recipe, configs["ppo"])
        found = plan(recipe, configs)
    except NoPlan as error:
        console.print(Text(f"warning: {error}", style="yellow"))
        return {}
    for stage in found.stages:
        console.print(Text(found.line(stage)))
    if not force:
        refuse(recipe, configs, found)
    return found.stages


def plan_for_rows(job: Job) -> StagePlan:
    """The stage's plan for its data's longest row in place of the longest that is allowed."""
    config, prompts, others = copy.copy(job.config), 0, 0
    table: Any
    for part in (job.data.train, job.data.heldout):
        names = [name for name in part.column_names if name.endswith("_ids")]
        for table in part.select_columns(names).with_format("arrow").iter(batch_size=10_000):
            for name in names:
                column = table[name].combine_chunks()
                if pyarrow.types.is_nested(column.type.value_type):  # rankings have a list of responses
                    column = column.flatten()
                longest = pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py()
                if name == "prompt_ids":
                    prompts = max(prompts, longest)
                else:
                    others = max(others, longest)
    if job.stage == "ppo":
        config.max_prompt_length = prompts
    else:
        config.max_length = prompts + others  # DPO's responses are without their prompts
    on_gpu, recipe, config = for_device(job.recipe, job.stage, config, None)
    return stage_plan(recipe, job.stage, config, on_gpu)


def check(recipe: Recipe, run_dir: Path = Path("runs")) -> dict[str, Any]:
    """Find what is wrong with a recipe before anything is loaded. Returns each stage's TRL configuration.

    Raises ValueError naming the key and the nearest right one.
    """
    tracking.check(recipe)
    configs = {}
    for stage in stages_of(recipe, None):
        section = getattr(recipe, stage)
        check_args(stage, section, CONFIGS[stage])
        configs[stage] = _config(recipe, stage, run_dir)
    if recipe.ppo is not None:
        _check_ppo(recipe, configs["ppo"])
    if recipe.rounds is not None:
        rounds.check(recipe)
    if recipe.gold:
        function(recipe.gold)
    return configs


def _check_ppo(recipe: Recipe, config: PPOConfig) -> None:
    """What of the PPO stage depends on the rest of the recipe."""
    if recipe.reward is None and not recipe.ppo.reward_funcs:
        raise ValueError(f"Recipe {recipe.name!r} has no reward: add a `reward` stage or set ppo.reward_funcs.")
    sources = recipe.ppo.reward_funcs or (rewards.ROLE,)
    for name in sources:
        rewards.check_source(name, recipe.reward is not None)
    rewards.check_weights(config.reward_weights, sources)
    backends.check(config.generation_backend, recipe.base.quantization, model.precision(recipe.base))
    if config.critic == "reward" and recipe.reward is None:
        raise ValueError(
            "ppo.critic=reward copies a reward model, and the recipe has no reward stage: set sft or head."
        )
    if config.ptx_coef and recipe.ptx is None:
        raise ValueError("ppo.ptx_coef mixes in texts and there are none: set ptx.data.")
    if config.metric_for_best_model is None:
        return
    known, metric = _measured(recipe), config.metric_for_best_model.removeprefix("eval_")
    if metric == "quality" and metric not in known:
        raise ValueError(
            "The best policy is that of the best held-out quality, which this recipe does not know: set gold, or "
            "reward.judge_share above 0, or ppo.metric_for_best_model."
        )
    if metric not in known:
        raise ValueError(f"ppo.metric_for_best_model: no evaluation has {metric!r}.{suggestion(metric, known)}")


def _measured(recipe: Recipe) -> list[str]:
    """What evaluations during PPO measure, by the names that `ppo.metric_for_best_model` takes."""
    args = recipe.reward.args if recipe.reward is not None else {}
    own = rewards.ROLE in (recipe.ppo.reward_funcs or (rewards.ROLE,))
    has = {"gold": recipe.gold is not None, "judge": args.get("judge_share"), "perplexity": recipe.ptx is not None}
    has |= {"ensemble_std": own and args.get("ensemble_size", 1) > 1, "quality": has["gold"] or has["judge"]}
    return ["score", "kl", "response_length", "without_eos", *(name for name, known in has.items() if known)]


def stages_of(recipe: Recipe, stages: Sequence[str] | None) -> list[str]:
    has = [stage for stage in STAGES if getattr(recipe, stage) is not None]
    for stage in stages or ():
        if stage not in has:
            raise ValueError(f"Recipe {recipe.name!r} has no stage {stage!r}.{suggestion(stage, has)}")
    return [stage for stage in has if stages is None or stage in stages]


def _config(recipe: Recipe, stage: str, run_dir: Path) -> TrainingArguments:
    """A stage's TRL configuration: our defaults, then the recipe's arguments, then what the runner owns."""
    defaults: dict[str, Any] = {"save_total_limit": 2, "logging_steps": 1 if stage == "ppo" else 10}
    if model.device().type == "cuda":
        defaults["optim"] = "paged_adamw_8bit"  # QLoRA's, arXiv:2305.14314
    owned = {
        "output_dir": str(run_dir / stage),
        "report_to": "none",  # see `tracking`
        "run_name": f"{run_dir.name}-{stage}",
        "seed": recipe.seed,
        "bf16": model.precision(recipe.base) == torch.bfloat16,
        "use_cpu": model.device().type == "cpu",
        "disable_tqdm": True,
    }
    try:
        return CONFIGS[stage](**{**defaults, **getattr(recipe, stage).args, **owned})
    except ValueError as error:
        message = str(error)  # ours name their key, the libraries' do not know the stage
        raise ValueError(message if message.startswith(f"{stage}.") else f"{stage}: {message}") from error


def open_run(recipe: Recipe, run_dir: Path, wanted: list[str]) -> dict[str, Any]:
    """Make the run folder, or check that it is this recipe's and holds what the wanted stages build on."""
    resolved = json.loads(json.dumps(to_dict(recipe)))
    path = run_dir / "recipe.json"
    if path.is_file():
        before = json.loads(path.read_text())
        differences = _differences(before, resolved)
        compared = _without_memory(before), _without_memory(resolved)
        if not before.get("rounds"):  # rounds may follow a finished run
            compared[1].pop("rounds")
        if _differences(*compared):
            raise ValueError(
                f"{run_dir} holds a run of another recipe ({'; '.join(differences)}). "
                "Set another --run-dir, or delete that folder."
            )
    manifest = read_manifest(run_dir)
    for stage in wanted:
        # DPO takes the place of PPO, and builds on the reward model no more than on PPO.
        before = [earlier for earlier in STAGES[: STAGES.index(stage)] if stage != "dpo" or earlier == "sft"]
        for earlier in (earlier for earlier in before if getattr(recipe, earlier) is not None):
            if earlier not in wanted and manifest["stages"].get(earlier, {}).get("state") != "done":
                raise ValueError(f"Stage {stage!r} builds on {earlier!r}, which is not finished in {run_dir}.")
    run_dir.mkdir(parents=True, exist_ok=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, or a new one, with the versions of now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.is_file() else {"stages": {}}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    manifest["versions"] = {"python": platform.python_version(), "rlhf_recipes": __version__, **versions}
    return manifest


def _without_memory(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the settings that change what a run takes and not what it gives, to rounding."""
    recipe = copy.deepcopy(recipe)
    for section in (recipe[stage] for stage in STAGES if recipe.get(stage)):
        args = section["args"]
        free = ["per_device_eval_batch_size", "gradient_checkpointing"]
        if args.get("generation_backend", "native") == "native":  # what others draw depends on the batching
            free.append("rollout_micro_batch_size")
        for key in free:
            args.pop(key, None)
        rows, steps = args.pop("per_device_train_batch_size", 8), args.pop("gradient_accumulation_steps", 1)
        args["mini_batch_size"] = args.get("mini_batch_size") or rows * steps
        args["optim"] = str(args.get("optim")).removeprefix("paged_")
    if recipe.get("rounds"):
        del recipe["rounds"]["count"]  # more rounds may follow those that are done
    return recipe


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old there, new here` for each leaf that differs. Where a run is tracked does not matter."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [key for key in {**old, **new} if prefix or key not in ("tracker", "artifacts")]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1].replace('.args.', '.')}: {old!r} there, {new!r} here"]


def _prepare(recipe: Recipe, stage: Any, config: Any, tokenizer: PreTrainedTokenizerBase) -> data.Prepared:
    """A stage's data. No row may be longer than the stage's limit, or than the model's context."""
    if stage == "ppo":
        limit = model.longest_row(recipe.base, config.max_prompt_length, config.response_length, "ppo.response_length")
    else:
        limit = model.longest_row(recipe.base, config.max_length)
    prepared = _held_out(stage, stage, getattr(recipe, stage), tokenizer, limit, recipe.seed)
    if stage == "reward":  # what is wrong with the split is said now, and not after the SFT stage
        data.set_aside(prepared.train, config.judge_share, recipe.seed)
    return prepared


def _prepare_others(
    recipe: Recipe,
    stage: str,
    configs: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prepared: dict[str, data.Prepared],
) -> dict[str, data.Prepared]:
    """What a stage takes beside its data, which is in `prepared`.

    reward: the SFT stage's `demonstrations`, which set its bias. ppo and dpo: the texts of `ptx`. dpo: the `prompts` on
    which models are compared.
    """
    others = {}
    if stage == "reward" and recipe.sft is not None:
        others["demonstrations"] = prepared.get("sft") or _prepare(recipe, "sft", configs["sft"], tokenizer)
    if stage in ("ppo", "dpo") and recipe.ptx is not None:
        others["ptx"] = _held_out("ptx", "ptx", recipe.ptx, tokenizer, None, recipe.seed)
    if stage == "dpo":
        own = {f.name: getattr(recipe.dpo, f.name) for f in fields(Source)}
        source = Source(
            **own | ({"data": recipe.dpo.prompts, "columns": {}, "convert": None} if recipe.dpo.prompts else {})
        )
        limit = model.longest_row(recipe.base, None, configs["dpo"].response_length, "dpo.response_length")
        try:
            others["prompts"] = _held_out("ppo", "dpo.prompts", source, tokenizer, limit, recipe.seed)
        except ValueError as error:  # `data` names the section that such rows are for
            raise ValueError(f"dpo.prompts: {str(error).removeprefix('ppo.data: ')}") from error
    return others


def held_out(recipe: Recipe, run_dir: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, data.Prepared]]:
    """What the models of a run are compared on, split as in training.

    Returns the configuration of the stage that trained the policy (PPO's, else DPO's, else SFT's), and its `prompts`
    and, where there are any, the texts of `ptx`. Raises ValueError where nothing is held out.
    """
    stage = next((stage for stage in ("ppo", "dpo", "sft") if getattr(recipe, stage) is not None), None)
    if stage is None:
        raise ValueError(
            f"The recipe of {run_dir} has none of the stages sft, ppo and dpo: there is nothing to compare."
        )
    config = _config(recipe, stage, run_dir)
    found = _prepare_others(recipe, stage, {stage: config}, tokenizer, {})
    if stage == "ppo":
        found["prompts"] = _prepare(recipe, stage, config, tokenizer)
    elif stage == "sft":
        found["prompts"] = _held_out("ppo", "sft", getattr(recipe, stage), tokenizer, None, recipe.seed)
    return config, found


def _held_out(
    kind: Any, key: str, source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None, seed: int
) -> data.Prepared:
    """`data.prepare` of a source of which some rows must be held out."""
    prepared = data.prepare(kind, source, tokenizer, limit, seed)
    if len(prepared.heldout) == 0:
        raise ValueError(
            f"{key}.data: no row of {source.data} is held out to evaluate on. It needs two prompts "
            f"or more, with {key}.heldout and {key}.heldout_limit above 0."
        )
    return prepared


def _same_format(prepared: dict[str, data.Prepared], others: dict[str, dict[str, data.Prepared]]) -> None:
    """A reward model that saw chat templates cannot judge plain text: the stages of a run must agree."""
    found = {f"{stage}.data": p.conversational for stage, p in prepared.items()}
    if "dpo" in others:
        found["dpo.prompts"] = others["dpo"]["prompts"].conversational
    if len(set(found.values())) > 1:
        kinds = [f"{key} is {'messages' if messages else 'plain text'}" for key, messages in found.items()]
        raise ValueError(f"The stages must all have messages or all have plain text, but {', '.join(kinds)}.")


def _data_line(report: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
    return f"{report['train']:,} rows to train on, {report['heldout']:,} held out" + (
        f"; dropped {dropped}" if dropped else ""
    )


def _run_stage(job: Job, manifest: dict[str, Any], planned: StagePlan | None) -> None:
    """Run one stage between two writes of the manifest: `running` before, `done` with its results after.

    Raises ValueError, with what to change, where it runs out of memory.
    """
    record = manifest["stages"].setdefault(job.stage, {"seconds": 0.0, "peak_memory_mib": 0.0})
    record |= {"state": "running", "data": job.data.report}
    write_json(job.run_dir / "manifest.json", manifest)
    job.folder.mkdir(parents=True, exist_ok=True)
    set_seed(job.recipe.seed)
    module = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo}[job.stage]
    start, before = time.perf_counter(), record["seconds"]
    reset_peak_memory()
    if planned is not None:
        # On a CPU the measured peak is that of the process, with all that it has loaded before.
        already = 0.0 if torch.cuda.is_available() else resident_mib()
        record["planned_peak_mib"] = round(planned.peak_mib + already, 1)
    try:
        with job.tracked() as tracked:
            record["results"] = module.train(tracked)
            took = {"seconds": before + time.perf_counter() - start, "peak_memory_mib": peak_memory_mib()}
            tracking.conclude(tracked, record["results"] | took)
        record["state"] = "done"
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not should_reduce_batch_size(error):
            raise
        raise ValueError(out_of_memory(error, job.recipe, job.stage, job.config, planned)) from error
    finally:
        record["seconds"] = round(before + time.perf_counter() - start, 1)
        record["peak_memory_mib"] = max(record["peak_memory_mib"], round(peak_memory_mib(), 1))
        write_json(job.run_dir / "manifest.json", manifest)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint. The Trainer writes `trainer_state.json` last: a torn one has none that parses."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)
            continue
        return str(checkpoint)
    return None


def _state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))


def _forget(path: Path, stage: str, step: int) -> None:
    """Drop a stage's rows that are about to be written again: after the step it resumes from, or after its training."""
    if path.is_file():
        kept, again = [], False
        for line in path.read_text().split("\n")[:-1]:  # what follows the last line end is torn
            row = json.loads(line)
            # The comparison of the models at the end begins with the base.
            again = again or (row["stage"] == stage and (row["step"] > step or row.get("model") == "base"))
            if row["stage"] != stage or not again:
                kept.append(line + "\n")
            # This row ends the training. It stays with a checkpoint of the last step; the evaluation comes again.
            again = again or (row["stage"] == stage and "train_runtime" in row)
        write_text(path, "".join(kept))


class Recorder(TrainerCallback):
    """Appends each logged row to `metrics.jsonl`, each evaluation's samples to `samples.jsonl`; both to the tracker."""

    def __init__(self, job: Job, trainer: Trainer) -> None:
        assert job.tracker is not None
        self.job, self.trainer, self.tracker = job, trainer, job.tracker

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self.job.run_dir / name).open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.append("metrics.jsonl", [{"stage": self.job.stage, "step": state.global_step, **logs}])
        if "train_runtime" not in logs:  # the totals at the end are no points of a curve
            self.tracker.point(logs, state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer, ppo.PPOTrainer):
            self.samples(state.global_step, [{"model": "ppo", **sample} for sample in self.trainer.samples])

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Record held-out prompts with their responses and scores."""
        rows = [{"stage": self.job.stage, "step": step, **sample} for sample in samples]
        self.append("samples.jsonl", rows)
        self.tracker.table("completions", samples, step)


class Progress(TrainerCallback):
    """A progress bar over the stage's steps with the numbers that matter in it."""

    SHOWN: ClassVar = {
        "loss": "loss",
        "accuracy": "accuracy",
        "rewards/accuracies": "accuracy",
        "objective/scores": "reward",
        "objective/kl": "KL",
        "response_length": "tokens",
        "eval_gold": "gold",
        "eval_judge": "judge",
    }

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.shown |= {label: f"{logs[key]:.3g}" for key, label in self.SHOWN.items() if key in logs}
        if self.stage == "ppo":
            self.shown.pop("loss", None)
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
