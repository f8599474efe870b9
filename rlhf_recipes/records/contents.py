"""What the files of a run folder hold, with units. All of it is JSON."""

from typing import Any, Literal, NotRequired, TypedDict

# A row of metrics.jsonl: `stage`, `step` (optimizer steps; of PPO updates), and what the trainer logged by its name.
MetricsRow = dict[str, Any]

MeasureName = Literal["score", "ensemble_std", "gold", "judge", "kl", "response_length"]  # of a sample
MeanName = Literal[MeasureName, "without_eos", "perplexity"]
WinName = Literal["win_rate_vs_sft", "judge_win_rate_vs_sft", "reward_win_rate_vs_sft"]


class Fingerprint(TypedDict):
    """What an adapter depends on beside its own weights: the base and how it is loaded."""

    model: str  # a Hub id, or `sha256:` and a hash of a local model's files
    revision: str | None  # the Hub model's commit
    quantization: str | None
    dtype: str  # as `bfloat16`
    tokenizer: str  # a hash of its vocabulary
    chat_template: str  # a hash, of the date too where the template writes one


class DroppedRows(TypedDict):
    """The rows of a source that could not be used."""

    dropped: dict[str, int]  # reason -> rows
    examples: list[str]  # sentences that name the first of them


class DataReport(DroppedRows):
    """What became of a source's rows."""

    source: str
    rows: int  # that were read
    used: int
    train: int
    heldout: int
    heldout_prompts: int  # different ones
    cut: NotRequired[int]  # of the used rows those that were too long, where such rows are not dropped


class WinRate(TypedDict):
    """A share of answers to prompts, from 0 to 1, with its 95 % interval (`records.rates`)."""

    rate: float
    low: float
    high: float
    prompts: int


class PairShare(TypedDict):
    """A share of comparisons, from 0 to 1, with its 95 % interval (`records.rates`)."""

    rate: float
    low: float
    high: float
    prompts: int
    pairs: int


class Sample(TypedDict):
    """A model's answer to a held-out prompt, with what is known of it: a row of samples.jsonl."""

    prompt: Any  # text or messages
    completion: Any  # text or messages
    response_length: int  # tokens
    ended: bool  # by an end of sequence, not by the limit of tokens
    kl: float  # nats, to the reference, summed over the response
    score: NotRequired[float]  # the reward sources' weighted sum
    ensemble_std: NotRequired[float]  # of the reward models' scores
    judge: NotRequired[float]  # the score of the second reward model
    gold: NotRequired[float]
    model: NotRequired[str]  # base, sft, ppo or dpo; every row of the file has it, and `stage` and `step`
    stage: NotRequired[str]
    step: NotRequired[int]


class Means(TypedDict, total=False):
    """The means of a model's samples, and its win rates over the SFT model where it has some."""

    score: float
    ensemble_std: float
    gold: float
    judge: float
    kl: float  # nats a response
    response_length: float  # tokens
    without_eos: float  # share of the responses
    perplexity: float  # on the held-out texts of `ptx`
    quality: float  # in evaluations during PPO: gold where it is known, else what the second reward model says
    win_rate_vs_sft: WinRate  # by gold
    judge_win_rate_vs_sft: WinRate  # by the second reward model
    reward_win_rate_vs_sft: WinRate  # by the reward that PPO trained against


class LengthRule(TypedDict):
    """How far preferring the longer response goes."""

    longer_wins: PairShare  # pairs whose chosen response is the longer one
    agreement: PairShare | None  # pairs of unequal length in which the longer response scores higher
    correlation: float | None  # Pearson's, between the differences in score and in length


class LengthBin(TypedDict):
    """The pairs whose chosen response is longer by so many tokens."""

    shortest: int
    longest: int
    accuracy: PairShare
    longer_wins: PairShare


class ProbabilityBin(TypedDict):
    """The pairs for which a reward model predicts a win with a probability from `low` to `high`."""

    low: float
    high: float
    pairs: int
    predicted: float  # the mean probability
    observed: float  # the share of wins


class Calibration(TypedDict):
    """How well a reward model's probabilities are those of wins."""

    expected_calibration_error: float
    bins: list[ProbabilityBin]


class DemonstrationScores(TypedDict):
    """What a reward model says of held-out demonstrations."""

    count: int
    mean: float
    sd: float
    bias: float  # what is added to every score, to bring the mean to 0


class PairMeasures(TypedDict):
    """What a reward model makes of comparisons: `stages/reward/card.py` says how each is measured."""

    accuracy: PairShare
    by_source: dict[str, PairShare]
    tokens_win: NotRequired[PairShare]  # the accuracy of the words alone; a card of version 0.4 or before lacks it
    length: LengthRule
    by_length: list[LengthBin]
    calibration: Calibration


class RewardCard(PairMeasures):
    """What a reward model gets right on held-out comparisons, and how far its scores can be trusted."""

    train_pairs: int
    swap_error: float  # the largest change of a difference in score, of a sample, where the two swap their places
    demonstrations: DemonstrationScores | None
    warnings: list[str]


class StageResults(TypedDict, total=False):
    """What a finished stage found. Each stage has some of these."""

    heldout_loss: float  # sft: nats a token; reward: nats a comparison; dpo: nats a pair
    heldout_token_accuracy: float  # sft
    heldout_accuracy: float  # reward, dpo: share of the held-out pairs
    members_accuracy: list[float]  # reward: of each adapter of the ensemble
    judge_accuracy: float  # reward: of the second reward model
    card: RewardCard  # reward
    models: dict[str, Means]  # ppo, dpo: the models compared on the held-out prompts that chose none of them
    win_rate_vs_sft: WinRate  # ppo, dpo; these three as in Means
    judge_win_rate_vs_sft: WinRate
    reward_win_rate_vs_sft: WinRate
    # ppo: the update of the best evaluation. best_<metric> is its value, on the prompts that chose, and so too good.
    best_step: int | None
    stopped_early: bool  # ppo


class StageRecord(TypedDict):
    """What the manifest says of a stage that has begun."""

    state: Literal["running", "done"]
    seconds: float  # of all attempts
    peak_memory_mib: float  # the highest of all attempts
    data: DataReport
    device: NotRequired[str]  # the hardware of the last attempt; a version before 0.5 wrote none
    planned_peak_mib: NotRequired[float]
    # Of those that are `auto`, when the stage began (None: all layers), or with which it went on when memory ran out.
    chosen_sizes: NotRequired[dict[str, int | None]]
    results: NotRequired[StageResults]  # once it is done
    copied_from: NotRequired[str]  # the variant that trained it, in a sweep


class Summary(TypedDict):
    """`summary.json`: what a run achieved. A dict by stage counts later rounds as `ppo_2`; so do the models."""

    win_rate_vs_sft: WinRate | None  # these four of the policy that was trained last
    judge_win_rate_vs_sft: WinRate | None
    reward_win_rate_vs_sft: WinRate | None
    kl: float | None  # nats a response
    sft_heldout_loss: float | None  # nats a token
    reward_model_accuracy: float | None  # of the newest reward model
    judge_accuracy: float | None
    seconds: dict[str, float]  # by stage
    peak_memory_mib: dict[str, float]  # by stage
    models: dict[str, Means]
    gold_score: dict[str, float]  # from here on means by model
    reward_score: dict[str, float]
    judge_score: dict[str, float]
    response_length: dict[str, float]  # tokens
    without_eos: dict[str, float]
