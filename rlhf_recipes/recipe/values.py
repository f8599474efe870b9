"""Recipes: one frozen value says everything a run needs.

Standard library only, so that importing a recipe costs milliseconds and loads neither torch nor trl.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

STAGES = ("sft", "reward", "ppo", "dpo")
PEOPLE = "people"  # the labeler of rounds for which a run waits, and in evaluations who judged in the arena


@dataclass(frozen=True)
class Base:
    """The frozen model that every role shares.

    `model` is a Hub id, a local folder, or `module:function`, a function that writes a model into the folder that it is
    given (`function(folder: Path) -> None`); its result is kept in the cache and built once.
    """

    model: str  # a Hub id, a local folder, or module:function
    revision: str | None = None  # the Hub model's commit, branch or tag
    quantization: Literal["nf4", "int8"] | None = None  # nf4: 4-bit NormalFloat with double quantization (QLoRA)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: 16 bits on a GPU or quantized
    attn_implementation: str | None = None  # None: what transformers chooses
    split: Literal["layers", "shards"] | None = None  # layers: over all GPUs of one process; shards: over processes
    chat_template: str | None = None  # transcript, chatml, a .jinja file; None: the tokenizer's own
    chat_template_date: str | None = None  # YYYY-MM-DD, a template's today; None: the day on which the run is begun
    trust_remote_code: bool = False  # run code that comes with the model


@dataclass(frozen=True)
class Lora:
    """Shape of every adapter: all roles have the same, because the reward adapter starts as a copy of the SFT one."""

    r: int = 16  # rank
    alpha: int = 32  # the adapter's product is scaled by alpha / r
    dropout: float = 0.0  # while SFT and the reward model train; PPO has none
    target_modules: str | tuple[str, ...] = "all-linear"  # as in PEFT's LoraConfig


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    `data` is a named source (`rlhf-recipes check --sources`), a Hub dataset id, a local JSONL, JSON, CSV or Parquet
    file (also .gz), or `module:function`, a function without arguments that returns rows.

    `convert` brings rows of another format into one that is accepted: a named source's conversion, for a copy of it, or
    `module:function`, which takes all rows and returns rows, best one by one.
    """

    data: str  # a named source, a Hub dataset id, a local file or a URL, or module:function
    subset: str | None = None  # the Hub dataset's configuration name
    split: str = "train"  # the Hub dataset's split; a local file is one split
    limit: int | None = None  # take only so many rows, drawn by a hash of the prompt; of a function its first
    convert: str | None = None  # a named source's, or module:function, from rows to rows; None: by a file's columns
    columns: Mapping[str, str] = field(default_factory=dict)  # TRL's column name -> the source's
    chat: bool = False  # plain text becomes turns of a conversation: the prompt the user's, the rest the assistant's
    heldout: float = 0.05  # share of the dialogues (prompts with the same first turn) that is kept from training
    heldout_limit: int = 256  # evaluate on at most so many held-out rows
    bad_rows: Literal["drop", "refuse"] = "drop"  # rows that cannot be used: drop and report them, or stop


@dataclass(frozen=True)
class Stage(Source):
    """One stage: its data, and the arguments of its trainer.

    `args` goes verbatim to SFTConfig, RewardConfig, PPOConfig or DPOConfig.
    """

    args: Mapping[str, Any] = field(default_factory=dict)  # of the trainer


@dataclass(frozen=True)
class PPOStage(Stage):
    """The PPO stage.

    Its reward is the weighted sum (`reward_weights` of PPOConfig) of the sources in `reward_funcs`:

    - `reward`, the shared reward role (an ensemble, if the reward stage trained one); the default where there is one
    - `module:function` or `file.py:function`, a function of TRL's signature, sync or async:
      `function(prompts, completions, completion_ids, **columns) -> list[float]`
    - a Hub id or a folder of a sequence-classification model, which has its own tokenizer and chat template
    """

    reward_funcs: tuple[str, ...] = ()  # sources: reward, module:function, a model; none: reward

    @property
    def reward_sources(self) -> tuple[str, ...]:
        """The sources of the reward, the shared reward role where none is named."""
        return self.reward_funcs or ("reward",)


@dataclass(frozen=True)
class DPOStage(Stage):
    """The DPO stage. It compares the models on the held-out prompts of `prompts`, or else of its own data."""

    prompts: str | None = None  # a source like `data`


@dataclass(frozen=True)
class Rounds:
    """Rounds of feedback after the first, each in a folder of its own (`round-2`, ...).

    A round samples `responses` to each of `size` fresh prompts from `models`, has them ranked by `labeler`, trains the
    reward model anew on all comparisons so far, and goes on with PPO from the policy of the round before. The SFT model
    stays the reference.

    - `people`: the run stops and says how to label; run again, it goes on once `enough` of the samples are judged
    - `module:function` or `file.py:function`, a simulated labeler:
      `function(prompts, responses, seed) -> list[list[int]]`, a rank for each response, 1 for the best
    - a model (Hub id, folder) or the URL of an OpenAI-compatible endpoint: see `rlhf-recipes judge`
    """

    count: int = 3  # rounds in all; the first has the recipe's own comparisons
    labeler: str = PEOPLE  # people, module:function, or a judge
    prompts: str | None = None  # a source of prompts like `ppo.data`; None: that one
    size: int = 256  # prompts labelled in a round
    responses: int = 4  # to each prompt, 2 to 9
    models: tuple[str, ...] = ("ppo",)  # what is sampled: ppo (of the round before), sft, base
    temperatures: tuple[float, ...] = (1.0,)  # each model answers at each of them in turn
    enough: float = 1.0  # share of the samples that people must have judged or skipped, or a judge not failed on
    weigh_labelers: bool = False  # each by what it is worth: see `rlhf-recipes agreement`
    constitution: str | None = None  # of a judge: a file of principles; None: its own criteria
    price_in: float = 0.0  # of 10^6 tokens that an endpoint reads
    price_out: float = 0.0  # of 10^6 tokens that it answers
    max_cost: float | None = None  # of a round's labels, in the currency of the prices; None: no limit
    api_key_env: str | None = None  # of an endpoint: the environment variable with its key; None: OpenAI's, for OpenAI


@dataclass(frozen=True)
class Recipe:
    """Supervised fine-tuning, a reward model, PPO and DPO on one base. A stage that is None is left out.

    `ptx` holds the pretraining texts (rows with `text`) that `ppo.ptx_coef` mixes into PPO. `rounds` asks for more
    feedback after PPO.

    `gold` names a function like those in `PPOStage.reward_funcs`. It measures true quality where that is known, is
    never trained on, and gives the win rate in the final table.

    `variants` makes the recipe a sweep: each name has the changes, as `replace` takes them, that make its recipe of
    this one. Each runs in a run folder of its own inside the sweep's, and what several need alike is trained once.
    """

    name: str  # of the run folder, unless --run-dir is given
    base: Base
    sft: Stage | None = None
    reward: Stage | None = None
    ppo: PPOStage | None = None
    dpo: DPOStage | None = None
    ptx: Source | None = None
    rounds: Rounds | None = None
    lora: Lora = Lora()
    gold: str | None = None  # a reward function that measures true quality
    seed: int = 0  # of weights, data order, held-out split and sampling
    tracker: Literal["wandb", "trackio", "tensorboard", "none"] = "wandb"  # where curves go
    artifacts: bool = False  # give the tracker the adapters of each stage and, at the end, the report
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> changes of this recipe


SECTIONS: dict[str, type] = {
    "base": Base,
    "lora": Lora,
    "sft": Stage,
    "reward": Stage,
    "ppo": PPOStage,
    "dpo": DPOStage,
    "ptx": Source,
    "rounds": Rounds,
}
