"""Cards: every figure is one that the run wrote, what nobody measured is said, and texts of others stay texts."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from support.hostile import HOSTILE
from support.shipped import make_run
from support.worded import make_recipe

from rlhf_recipes import replace
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.records.files import write_json
from rlhf_recipes.report.blocks import Interval, Intervals, Table, TableRow, Words
from rlhf_recipes.report.gather import gather
from rlhf_recipes.ship.card import draw_overoptimization
from rlhf_recipes.ship.loading import load_code
from rlhf_recipes.ship.markdown import fenced, markdown, plain, without_folders
from rlhf_recipes.ship.trained import find_trained

RATE = {"rate": 0.7, "low": 0.61, "high": 0.78}
HTML = ("details", "/details", "summary", "/summary")  # what a card has of it


def stage(source: str, results: dict[str, Any], **more: Any) -> dict[str, Any]:
    data = {"source": source, "rows": 1234, "train": 1000, "heldout": 99, "dropped": {"too long": 135}}
    return {"state": "done", "seconds": 60.0, "peak_memory_mib": 2048.0, "data": data, "results": results, **more}


def measure(run: Path, said: Sequence[str] = ("An answer.",)) -> None:
    """Write what a run and its evaluation say of themselves: known figures, and answers, the same of each model."""
    pairs = {**RATE, "prompts": 40, "pairs": 50}
    length = {"longer_wins": {**pairs, "rate": 0.52}, "agreement": None, "correlation": None}
    bins = [{"low": 0.5, "high": 1.0, "pairs": 50, "predicted": 0.7, "observed": 0.72}]
    card = {"train_pairs": 354, "accuracy": pairs, "by_source": {}, "length": length, "by_length": []}
    card |= {
        "swap_error": 0.0,
        "calibration": {"expected_calibration_error": 0.04, "bins": bins},
        "demonstrations": None,
        "warnings": ["It was easily gamed."],
    }
    reward = {"heldout_accuracy": 0.7, "members_accuracy": [0.7], "heldout_loss": 0.6, "card": card}
    stages = {
        "sft": stage("sft.jsonl", {"heldout_loss": 0.5, "heldout_token_accuracy": 0.8}, device="Card 9000"),
        "reward": stage("pairs.jsonl", reward),
        "ppo": stage("prompts.jsonl", {}),
    }
    write_json(run / "manifest.json", {"stages": stages, "versions": {"torch": "2.13"}, "base": None})
    win = {"model": "ppo", "against": "sft", "judge": "gold", **RATE, "prompts": 99, "ties": 0.1}
    behaviour = {"tokens": 12.5, "without_eos": 0.25, "refusals": 0.125, "kl": 3.25, "kl_per_token": 0.26}
    ours = {"means": {"gold": 1.25}, "behaviour": behaviour, "tasks": {"hellaswag": {"acc": {"value": 0.41}}}}
    evaluation = {"models": {"ppo": ours}, "wins": [win], "best": None, "warnings": ["Mind this."]}
    (run / "evaluation").mkdir(exist_ok=True)
    write_json(run / "evaluation" / "evaluation.json", evaluation)
    row = {"tokens": 3, "ended": False, "kl": 0.5, "scores": {}}
    rows = [
        {**row, "id": f"p{n}", "prompt": f"w4 w{n}", "completion": text, "model": name}
        for name in ("base", "sft", "ppo")
        for n, text in enumerate(said)
    ]
    (run / "evaluation" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    made = make_run(folder, replace(make_recipe(folder), sft={"data": "hh-rlhf"}))
    measure(made)
    return made


def card_of(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> ModelCard:
    capsys.readouterr()
    main_cli(["push", str(run), "org/name", "--card", *words])
    return ModelCard(capsys.readouterr().out)


def test_a_policys_card_has_the_runs_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(run, capsys, "--base-id", "org/base")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["datasets"] == ["Anthropic/hh-rlhf"], "files are no datasets of the Hub"
    assert not {"license", "language"} & data.keys(), "nobody has measured them"
    results = {result.metric_type: result for result in card.data.eval_results or ()}
    assert results["win_rate"].metric_value == 0.7 and results["acc"].metric_value == 0.41
    assert results["win_rate"].metric_name == (
        "Wins against SFT, judged by gold (95 % interval 61.0% to 78.0%, 99 prompts)"
    )
    text = card.text
    for said in (
        "PPO wins against SFT on 70.0% of 99 held-out prompts (95 % interval 61.0% to 78.0%",
        "| PPO | 1.25 | 12.5 | 25.0% | 12.5% | 3.25 | 0.26 |",
        "| sft | hh-rlhf | MIT | Bai et al. 2022, arXiv:2204.05862 |",
        "| ppo | prompts.jsonl | not known |  |",
        "| reward | 1,234 | 1,000 | 99 | 135 too long | pairs.jsonl |",
        "| all pairs | 70.0% | 61.0% to 78.0% | 50 pairs |  |",
        "- Reward model: It was easily gamed.",
        "- Evaluation: Mind this.",
        "Hardware: Card 9000.",
        "| torch | 2.13 |",
        "| ppo | 1.0 min |",
        "vllm serve org/base --enable-lora --lora-modules policy=org/name --max-lora-rank 16",
        'PeftModel.from_pretrained(base, "org/name")',
        "**PPO** (cut off at the limit of tokens)\n\n```text\nAn answer.\n```",
    ):
        assert said in text, said
    assert "Not measured: perplexity on other texts; quality over the course of PPO" in text
    assert str(run.parent) not in str(card)


def test_a_reward_models_card_has_its_accuracy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = card_of(run, capsys, "--what", "reward", "--samples", "0")
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "text-classification" and data["library_name"] == "transformers"
    assert "base_model" not in data, "the base is a folder of this machine"
    assert [result.metric_value for result in card.data.eval_results or ()] == [0.7]
    assert "## Results" not in card.text and "| all pairs | 70.0% |" in card.text
    assert "base (not public)" in card.text and str(run.parent) not in str(card)


def test_what_was_not_measured_is_said_and_no_figure_stands_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_of(make_run(tmp_path), capsys, "--what", "merged")
    assert not card.data.eval_results
    assert "## Results" not in card.text and "## Samples" not in card.text and not re.search(r"\d%", card.text)
    assert "Not measured: how often it wins against another model; refusals" in card.text
    assert "how close what is uploaded is to what was trained" in card.text
    assert "The hardware was not recorded." in card.text


def test_what_others_wrote_is_no_markup(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = [text[:300] + "\n```\n````` \n<b>" for text in HOSTILE.values()]
    measure(run, hostile)
    evaluated = json.loads((run / "evaluation" / "evaluation.json").read_text())
    write_json(run / "evaluation" / "evaluation.json", {**evaluated, "warnings": hostile})
    card = card_of(run, capsys, "--base-id", "org/base", "--samples", "99")
    measure(run)
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(card.text)
    parts = [part for block in blocks for part in (block, *(block.children or ()))]
    raw = "".join(part.content for part in parts if part.type.startswith("html"))
    assert set(re.findall(r"<([^>]*)>", raw)) <= set(HTML)
    assert not any(part.type in ("image", "link_open") for part in parts)
    fences = [part.content for part in parts if part.type == "fence"]
    for said in hostile:
        assert fences.count("\n".join(said.splitlines()) + "\n") == 3, "of base, SFT model and policy"


def test_texts_are_escaped_by_hand() -> None:
    assert plain("a|b\n<i> *c* `d`") == r"a\|b \<i\> \*c\* \`d\`"
    assert fenced("a\r```") == "````text\na\n```\n````"
    table = Table(["", "n"], [TableRow("a|", ["1"])], "All", folded=True)
    assert markdown(table) == (
        "<details><summary>All</summary>\n\n|  | n |\n| --- | ---: |\n| a\\| | 1 |\n\n</details>"
    )
    share = Intervals("Wins", [Interval("a", "by b", 0.5, 0.25, 0.75, "9 prompts")])
    assert markdown(share).endswith("| a | 50.0% | 25.0% to 75.0% | 9 prompts | by b |")
    assert markdown(Words("a\n_b_")) == r"a \_b\_"


def test_no_folder_of_this_machine_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/a b"))
    monkeypatch.chdir(tmp_path)
    for given, left in {
        f"--run-dir {tmp_path}/runs/x": "--run-dir runs/x",
        "data=/home/a b/rows.jsonl.gz": "data=rows.jsonl.gz",
        "data=/data/x/rows.jsonl, /mnt/y.csv": "data=rows.jsonl, y.csv",
        "/srv/my/judge.py:score and ~/x/y": "judge.py:score and y",
        "read_recipe(Path('/srv/runs/x'))": "read_recipe(Path('x'))",
        "judge:/srv/my/model of file:///srv/rows.csv": "judge:model of rows.csv",
        "https://host/a/b and/or 1/2, org/name": "https://host/a/b and/or 1/2, org/name",
    }.items():
        assert without_folders(given) == left


def test_the_picture_is_of_the_runs_own_evaluations(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [{"stage": "ppo", "step": n, "eval_score": n, "eval_gold": -n, "eval_kl": n**2} for n in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"stage": "ppo", "step": 0, "model": "ppo", "prompt": "w4", "completion": "w5", "response_length": 1}
    asked = [{**row, "ended": True, "kl": 0.0, "score": n, "gold": n} for n in range(4)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    card = card_of(run, capsys, "--base-id", "org/base")
    draw_overoptimization(gather([run])[0], tmp_path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).unlink()
    assert "](overoptimization.png)" in card.text and "over-optimisation." not in card.text.split("## Limits")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["overoptimization.png"]


@pytest.mark.parametrize("format", ["adapter", "merged", "reward", "adapter of reward"])
def test_the_code_of_a_card_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    form, _, model = format.partition(" of ")
    words = [*(["--model", model] if model else ()), *(["--base-id", "org/base"] if form == "adapter" else ())]
    main_cli(["export", str(run), "--to", str(tmp_path / "out"), "--format", form, *words])
    trained = find_trained(run, model or ("reward" if form == "reward" else "ppo"))
    for chats in (False, True) if form == format != "adapter" else (True,):
        capsys.readouterr()
        exec(load_code(trained, form, str(tmp_path / "out"), str(run.parent / "base"), chats), {})
        printed = capsys.readouterr().out
        assert ("'score'" if trained.scores else "'generated_text'") in printed
