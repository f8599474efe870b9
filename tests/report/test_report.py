"""The report: its warnings worked by hand, what it reads of run folders, and the page itself in a real Chromium."""

import argparse
import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from playwright.sync_api import Browser, Page, expect
from support.command_line import error_of
from support.hostile import HOSTILE, ODD
from support.report_run import write, write_evaluation, write_run

from rlhf_recipes import load, replace
from rlhf_recipes.cli.command import parse_options
from rlhf_recipes.cli.main import COMMANDS, main_cli
from rlhf_recipes.recipe.overrides import parse_overrides, to_dict
from rlhf_recipes.records.files import read_rows
from rlhf_recipes.records.rates import mean_rate
from rlhf_recipes.report import charts, warnings
from rlhf_recipes.report.blocks import number
from rlhf_recipes.report.gather import gather, title_of
from rlhf_recipes.report.results import headline
from rlhf_recipes.report.sections import report_sections
from rlhf_recipes.report.shared import shared_by_runs
from rlhf_recipes.report.what_now import next_steps
from rlhf_recipes.report.what_was_run import run_command
from rlhf_recipes.report.write import write_pages, write_report


def page_of(*folders: Path) -> str:
    return write_report(folders, folders[0] / "report.html").read_text(encoding="utf-8")


def blocks_of(folder: Path, kind: str) -> list[Any]:
    found = report_sections(gather([folder]))
    return [block for section in found for block in section.blocks if block.kind == kind]


# --- Warnings ---------------------------------------------------------------------------------------------------------


def test_kl_that_still_rises_is_told_from_kl_that_has_settled() -> None:
    # Fifths of two values. The last two have means 4 and 6.
    rising = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0]
    found = warnings.kl_rising(rising)
    assert found is not None and "4.00 and then 6.00 nats" in found and "ppo.kl_coef" in found
    flat = warnings.kl_rising(rising, [1.0, 1.2] * 5)
    assert flat is not None and "The reward did not rise with it: 1.10 and then 1.10." in flat
    assert warnings.kl_rising(rising, rising) == found, "nothing is said of one that rises, too"
    assert warnings.kl_rising([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.2, 4.2]) is None, "by less than a tenth"
    # The last two fifths, 3 and 5, and 2 and 8, have means 4 and 5 and a standard error of the difference above 3.
    assert warnings.kl_rising([0.0] * 6 + [3.0, 5.0, 2.0, 8.0]) is None, "within the noise"
    assert warnings.kl_rising(rising[:9]) is None, "of fewer than ten updates nothing is said"


def test_reward_that_rises_with_length_alone_is_named() -> None:
    reward = [float(n) for n in range(10)]
    length = [10.0 + 2 * n for n in range(10)]  # correlation 1; of fifths the first mean is 11, the last 27
    found = warnings.reward_is_length(reward, length)
    assert found is not None and "from 0.50 to 8.50" in found and "from 11 to 27 tokens" in found and "1.00" in found
    assert warnings.reward_is_length(reward, length[::-1]) is None, "answers became shorter"
    assert warnings.reward_is_length(reward, [20.0] * 10) is None
    noisy = [10.0, 30.0] * 4 + [25.0, 30.0]
    assert warnings.reward_is_length(reward, noisy) is None, "longer at the end, but not together"


def test_quality_that_falls_while_the_reward_rises_is_over_optimisation() -> None:
    scores = [[0.0] * 9, [1.0] * 9, [2.0] * 9]
    quality = [[0.0] * 9, [3.0] * 9, [1.0, 1.0, 1.5] * 3]  # falls by 2, 2 and 1.5 from its peak
    found = warnings.over_optimised([0, 20, 40], scores, quality, kept=[30, 40])
    assert found is not None and "from 3.00 at update 20 to 1.17" in found and "from 1.00 to 2.00" in found
    assert "ppo/checkpoint-30" in found
    assert "no checkpoint was kept" in str(warnings.over_optimised([0, 20, 40], scores, quality))
    found = warnings.over_optimised([0, 20, 40], scores, [quality[1], quality[0], quality[2]], kept=[40])
    assert found is not None and "No update was better than the SFT model" in found
    # Falls of 2, -2 and 1.5 have a mean of 0.5 and, of three each, a standard error of 0.6.
    assert warnings.over_optimised([0, 20, 40], scores, [*quality[:2], [1.0, 5.0, 1.5] * 3]) is None
    few = [values[:3] for values in quality]
    assert warnings.over_optimised([0, 20, 40], scores, few) is None, "three prompts are chance"
    assert warnings.over_optimised([0, 20, 40], scores[::-1], quality) is None, "the reward fell too"
    assert warnings.over_optimised([0, 20], scores[:2], quality[:2]) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (warnings.ratio_far([1, 2], [1.0, 0.8]), "0.80 on average in update 2"),
        (warnings.ratio_far([1, 2], [1.05, math.nan]), None),
        (warnings.clipped([0.0] * 8 + [0.4, 0.5]), "45% of the tokens"),
        (warnings.clipped([0.9] * 8 + [0.1, 0.1]), None),
        (warnings.inexact([0.0, 0.25]), "a token's log-ratio was 0.25, and should be 0"),
        (warnings.inexact([0.0, 0.0]), None),
        (warnings.noisy([0.06], [0.002, 0.003]), "KL of 0.0018 in each pass after the first. Updates had 0.0025"),
        (warnings.noisy([0.06], [0.02, 0.03]), None),
        (warnings.noisy([], [0.002]), None),
        (warnings.unexplained([0.9] * 4 + [-0.2] * 6), "-20% of the returns' variance, less than a constant"),
        (warnings.unexplained([-0.9] * 4 + [0.5] * 6), None),
        (warnings.endless([0.0] * 8 + [0.5, 0.75]), "62% of the responses"),
        (warnings.endless([1.0] * 8 + [0.0, 0.1]), None),
        (warnings.entropy_collapsed([2.0] * 5 + [0.5] * 5), "from 2.00 to 0.50"),
        (warnings.entropy_collapsed([2.0] * 5 + [1.0] * 5), None),
        (warnings.uncertain({"low": 0.45, "high": 0.6, "prompts": 1200}), "from 1,200 prompts; it could be chance"),
        (warnings.uncertain({"low": 0.55, "high": 0.85, "prompts": 40}), "55% to 85%"),
        (warnings.uncertain({"low": 0.6, "high": 0.7, "prompts": 400}), None),
    ],
)  # fmt: skip
def test_each_curve_has_its_warning(found: str | None, said: str | None) -> None:
    assert (found is None) if said is None else (found is not None and said in found)


def test_warnings_of_a_run_name_what_they_are_about(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_evaluation(folder)
    found = [*warnings.warnings_of_run(gather([folder])[0])]
    assert ("Evaluation", "Mind this.") in found
    assert any(about == "Reward model" and "36 comparisons" in text for about, text in found)
    assert not any(about == "PPO" for about, _ in found), "its curves are as they should be"


# --- What is read of a run --------------------------------------------------------------------------------------------


def test_the_verdict_is_of_the_most_trusted_judge(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    percent, words = headline(gather([folder])[0])
    assert percent == "66.7%" and "PPO wins against SFT on 66.7% of 30 held-out prompts" in words and "gold" in words
    write_evaluation(folder)
    percent, words = headline(gather([folder])[0])
    assert percent == "70.0%" and "60.0% to 80.0%" in words and "by the second reward model" in words
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"]["ppo"]["results"]["win_rate_vs_sft"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "evaluation" / "evaluation.json").unlink()
    assert "may only have learned to please" in headline(gather([folder])[0])[1]


def test_an_evaluation_is_shown_with_all_that_it_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_evaluation(folder, "mine.py:taste")
    page = page_of(folder)
    for part in ("mine.py:taste", "12.5", "25.0%", "50.0%", "3.25", "14.2", "0.41 ± 0.01", "hellaswag, acc_norm"):
        assert part in page, part
    assert "at equal length 55.0% (60.0% to 80.0%); 10% ties" in page and "Best of all that was compared: PPO." in page
    (answers,) = blocks_of(folder, "answers")
    assert answers.data["models"] == ["SFT", "PPO"] and answers.data["rows"][0]["answers"][1]["text"] == "of ppo"


def test_the_command_runs_the_same_recipe_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(load("tiny"), tracker="none", seed=3, ppo={"kl_coef": 0.02, "reward_funcs": ("reward", "a:b")})
    (code,) = blocks_of(write_run(tmp_path / "a run", changed), "code")
    words = shlex.split(code.text)
    assert words[:3] == ["rlhf-recipes", "run", "tiny"] and words[-2:] == ["--run-dir", f"{tmp_path}/a run-again"]
    assert replace(load("tiny"), **parse_overrides(words[3:-2])) == changed
    assert {"tracker=none", "seed=3", "ppo.kl_coef=0.02"} < set(words), "what is as shipped is left out"
    monkeypatch.chdir(tmp_path)
    assert blocks_of(tmp_path / "a run", "code")[0].text.endswith(" --run-dir 'a run-again'"), "as one would type it"


def test_a_recipe_of_ones_own_runs_again_from_its_folder(tmp_path: Path) -> None:
    own = replace(load("tiny"), name="own", tracker="none")
    (code,) = blocks_of(write_run(tmp_path / "run", own), "code")
    python, flag, program = shlex.split(code.text)
    assert (python, flag) == ("python", "-c")
    said: list[Any] = []
    exec(program.replace("from rlhf_recipes import run;", ""), {"run": lambda *words: said.extend(words)})
    assert said == [own, tmp_path / "run-again"]


def test_what_can_be_done_next_is_said_in_this_runs_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "runs" / "my run", replace(load("tiny"), tracker="none", seed=3))
    assert "now" not in {section.id for section in report_sections(gather([folder]))}, "nothing is trained yet"
    for name in ("sft", "ppo/policy", "ppo/checkpoint-10/policy"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").touch()
    commands = [shlex.split(command) for _, command in next_steps(gather([folder])[0])]
    there = "runs/my run"
    assert ["rlhf-recipes", "chat", there, "--compare", "sft"] in commands
    assert ["rlhf-recipes", "export", there, "--to", "exports/my run"] in commands
    (again,) = [words[2:] for words in commands if words[1] == "run"]
    assert again[-2:] == ["--run-dir", there] and again[0] == "tiny"
    rounds = replace(load("tiny"), **parse_overrides(again[1:-2]))
    assert (rounds.rounds.count, rounds.rounds.labeler, rounds.seed) == (2, "people", 3)
    for words in commands:
        parser = argparse.ArgumentParser()
        COMMANDS[words[1]].arguments(parser)
        parse_options(parser, words[2:])
    write_evaluation(folder)
    (run,) = gather([folder])
    assert not any("evaluate" in command for _, command in next_steps(run)), "that has been done"
    assert write_pages(folder) == [command for _, command in next_steps(run)]
    written = (folder / "README.md").read_text()
    assert written.startswith("# my run") and all(command in written for _, command in next_steps(run))


def test_another_round_of_a_recipe_of_ones_own_begins_from_its_folder(tmp_path: Path) -> None:
    own = replace(load("tiny"), name="own", tracker="none")
    (run,) = gather([write_run(tmp_path / "run", own)])
    program = shlex.split(run_command(run, str(tmp_path / "run"), rounds=3))[2]
    said: list[Any] = []
    exec(program.replace("import replace, run;", "import replace;"), {"run": lambda *words: said.extend(words)})
    assert said == [replace(own, rounds={"count": 3, "labeler": "people"}), tmp_path / "run"]


@pytest.mark.parametrize("there", [[], ["sft"], ["sft", "reward"], ["ppo"]])
def test_a_run_in_the_middle_has_a_report_of_what_there_is(tmp_path: Path, there: list[str]) -> None:
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"] = {stage: manifest["stages"][stage] for stage in there}
    if there:
        manifest["stages"][there[-1]] |= {"state": "running"}
        del manifest["stages"][there[-1]]["results"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for name in ("metrics.jsonl", "samples.jsonl"):
        write(folder / name, [row for row in read_rows(folder / name) if row["stage"] in there])
    page = page_of(folder)
    assert ("This stage is not finished" in page) == bool(there)
    titles = {section.id for section in report_sections(gather([folder]))}
    assert titles >= {"what", *there} and "results" not in titles
    assert ("answers" in titles) == ("ppo" in there)


def test_what_is_no_number_leaves_a_gap(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows[-20:]:
        row |= {"objective/kl": math.nan, "val/ratio": math.inf, "loss/value_avg": -math.inf}
    write(folder / "metrics.jsonl", rows)
    drawn = re.findall("<svg.*?</svg>", page_of(folder), re.DOTALL)
    assert len(drawn) > 10 and not any(re.search(r"\bnan\b|\binf", one) for one in drawn)


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in error_of(capsys, ["report", str(tmp_path)])
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"stage": "ppo", "st')  # a kill leaves that, and it is nothing to complain of
    page_of(folder)
    (folder / "manifest.json").write_text("{")
    assert "manifest.json: not JSON" in error_of(capsys, ["report", str(folder)])


def test_a_file_with_values_that_nothing_of_ours_writes_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["reward"]["results"]["card"] = {"accuracy": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = error_of(capsys, ["report", str(folder)])
    assert f"{folder}: a file there holds what this package does not write (" in said and "please report it" in said
    with pytest.raises(ValueError, match="a file there holds what this package does not write"):
        write_pages(folder)  # as a run does at its end


def test_runs_are_compared_and_what_they_share_is_there_once(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one" / "run")
    changed = replace(load("tiny"), tracker="none", ppo={"kl_coef": 0.02})
    second = write_run(tmp_path / "two" / "run", changed, gain=2, said={n: f"longer {n}" for n in range(5)})
    main_cli(["report", str(first), str(second)])
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert "2 runs compared" in page and "one/run" in page and "two/run" in page
    found = {section.id: section.blocks for section in report_sections(gather([first, second]))}

    def differ(*runs: Path) -> list[tuple[str, list[str]]]:
        blocks = next(section.blocks for section in report_sections(gather(runs)) if section.id == "what")
        titled = [block for block in blocks if getattr(block, "title", "") == "Where their settings differ"]
        return [(line.label, line.cells) for block in titled for line in block.rows]

    assert differ(first, second) == [("ppo.kl_coef", ["0.1", "0.02"])]
    wins, means = found["results"]
    assert [row.label for row in wins.rows] == ["PPO against SFT"] * 2, "both have the same rates, by gold and reward"
    assert [line.label for line in means.rows] == ["base", "SFT", "PPO"]
    names = [f"{run}: {model}" for run in ("one/run", "two/run") for model in ("base", "SFT", "PPO")]
    assert found["answers"][0].data["models"] == names, "their answers differ"
    without = write_run(tmp_path / "four" / "run", replace(load("tiny"), tracker="none", ppo=None))
    assert differ(first, without) == [("ppo", ["set", "None"])], "not each of its options"
    same = page_of(first, write_run(tmp_path / "three" / "run"))
    assert "Their settings are the same." in same
    models = json.loads(re.findall(r'id="answers-data">(.*?)</script>', same)[0])["models"]
    assert models == ["base", "SFT", "PPO"], "all answers are the same"


def test_models_are_called_by_their_stages() -> None:
    names = ["base", "ppo", "round-2/ppo", "ppo/checkpoint-40", "runs/ppo/other:dpo"]
    titles = ["base", "PPO", "round-2/PPO", "PPO/checkpoint-40", "runs/ppo/other:DPO"]
    assert [title_of(name) for name in names] == titles


def test_the_figure_of_a_sweep_is_in_its_report_and_in_no_other(tmp_path: Path) -> None:
    for name in ("free", "bound"):
        write_run(tmp_path / "sweep" / name)
    alone = write_run(tmp_path / "alone")
    (tmp_path / "sweep" / "overoptimization.svg").write_bytes(b"<svg></svg>")
    link = "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="
    assert page_of(tmp_path / "sweep").count(link) == page_of(tmp_path / "sweep", alone).count(link) == 1
    assert link not in page_of(alone) and link not in page_of(tmp_path / "sweep" / "free")


def test_what_only_some_runs_share_names_them(tmp_path: Path) -> None:
    runs = gather([write_run(tmp_path / name) for name in "abc"])
    found = [(0, "x", 1), (1, "x", 1), (2, "x", 2), (0, "y", 3), (1, "y", 3), (2, "y", 3), (2, "y", 3)]
    assert shared_by_runs(runs, found) == [("a, b: x", 0, 1), ("c: x", 2, 2), ("y", None, 3), ("c: y", 2, 3)]


def test_the_second_reward_model_is_shown_as_a_judge(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    results = {stage: of["results"] for stage, of in manifest["stages"].items()}
    results["reward"] |= {"judge_accuracy": 0.625, "members_accuracy": [0.75, 0.5]}
    results["ppo"] |= {"judge_win_rate_vs_sft": mean_rate([1.0, 1.0, 1.0, 0.0, 0.0] * 6)}
    del results["ppo"]["win_rate_vs_sft"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = read_rows(folder / "metrics.jsonl")
    rows = [{("eval_judge" if key == "eval_gold" else key): value for key, value in row.items()} for row in rows]
    write(folder / "metrics.jsonl", [*rows, {"stage": "reward-judge", "step": 10, "loss": 0.7}])
    page = page_of(folder)
    assert "members 75.0%, 50.0%; the judge 62.5%" in page and "judge, training" in page
    assert "Quality by the second reward model, held out" in page


def test_a_sweep_stands_for_its_variants(tmp_path: Path) -> None:
    for name in ("low", "high"):
        write_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "recipe.json").write_text(json.dumps(to_dict(load("tiny"))))
    assert [run.name for run in gather([tmp_path / "sweep"])] == ["high", "low"]


def test_numbers_have_three_digits_that_count() -> None:
    said = [number(value) for value in (0.0, 0.123, -1.234, 12.345, 123.4, 12345.6, math.nan, None)]
    assert said == ["0.00", "0.12", "\N{MINUS SIGN}1.23", "12.3", "123", "12,346", "", ""]


# --- Charts -----------------------------------------------------------------------------------------------------------


def test_long_curves_are_thinned_to_means_and_ranges_that_are_said() -> None:
    steps = [float(step) for step in range(100_000)]
    found = charts.lines("A", [charts.Curve("a", steps, [step % 2 for step in steps])])
    assert found is not None and found.note == "A point is the mean of 200 updates, a band their range."
    assert len(found.svg) < 60_000
    short = charts.lines("A", [charts.Curve("a", steps[:500], steps[:500])])
    assert short is not None and not short.note


def test_a_charts_colours_are_the_style_sheets_and_its_words_are_text() -> None:
    hostile = "<script>alert(1)</script> & \"'"
    curves = [charts.Curve(hostile, [0, 1, 2], [0.5, math.nan, 1], 1), charts.Curve("b", [1], [0.2], 9, "points")]
    found = charts.lines(hostile, curves, "share")
    assert found is not None and charts.lines("empty", [charts.Curve("a", [1], [math.nan])]) is None
    assert charts.lines("endless KL", [charts.Curve("a", [1, math.inf], [1, 2])], x_label="KL", marks=[math.inf])
    assert charts.lines("endless KL", [charts.Curve("a", [math.inf], [1])], x_label="KL") is None
    root = ElementTree.fromstring(found.svg)
    painted = {value for one in root.iter() for name, value in one.items() if name in ("fill", "stroke")}
    assert painted <= {"none", "var(--dim)", "var(--line)", "var(--c1)"}, "number 9 has the colour of number 1"
    assert not any("style" in one.attrib for one in root.iter()), "the page's policy forbids them"
    title = root.find("title")
    assert title is not None and title.text is not None and hostile in title.text and "from 0.5 to 1" in title.text
    assert "100%" in "".join(root.itertext())


# --- The page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([write_run(tmp_path_factory.mktemp("page") / "run")], tmp_path_factory.mktemp("out") / "r.html")


@pytest.fixture
def shown(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a file. No script may fail on it, nothing may be refused, and nothing but the file may be asked for."""
    contexts, alarms = [], []

    def show(path: Path, width: int = 1280, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: alarms.append(str(error)))
        page.on("console", lambda message: alarms.append(message.text))
        page.on("dialog", lambda dialog: alarms.append(dialog.message))
        page.on("request", lambda request: alarms.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert not [alarm for alarm in alarms if alarm != "data:,"]


def brightness(page: Page) -> int:
    found = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return max(map(int, re.findall(r"\d+", found)[:3]))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_a_desktop_and_a_phone_in_light_and_dark(
    page_path: Path, shown: Callable[..., Page], width: int, scheme: str
) -> None:
    page = shown(page_path, width, color_scheme=scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert (brightness(page) < 64) == (scheme == "dark")
    for link in page.locator("nav a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1
    page.evaluate("() => document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    letters = "() => [...document.querySelectorAll('.grid svg text')].map(one => one.getBoundingClientRect().height)"
    assert min(page.evaluate(letters)) >= 9, "tick labels can be read"
    strokes = "() => [...document.querySelectorAll('.grid path')].map(one => getComputedStyle(one).stroke)"
    assert "rgb(31, 111, 196)" in page.evaluate(strokes) if scheme == "light" else "rgb(121, 178, 242)"


def numbers(page: Page) -> list[int]:
    return [int(str(one.get_attribute("data-number"))) for one in page.locator(".prompt").all()]


def test_answers_are_searched_filtered_and_sorted(page_path: Path, shown: Callable[..., Page]) -> None:
    page = shown(page_path)
    expect(page.locator(".prompt")).to_have_count(20)
    page.get_by_role("button", name="Show more").click()
    assert numbers(page) == [*range(1, 31)]
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    page.locator("select[name=show]").select_option("losses")
    assert numbers(page) == [*range(1, 31, 3)], "every third is worse"
    page.locator("select[name=show]").select_option("all")
    page.locator("select[name=order]").select_option("largest gain first")
    assert numbers(page)[:4] == [2, 3, 5, 6]
    page.locator("select[name=order]").select_option("longest answer first")
    assert numbers(page)[:3] == [30, 29, 28]
    page.locator("select[name=model]").select_option("base")
    page.locator("select[name=show]").select_option("ties")
    expect(page.locator("#found")).to_have_text("30 of 30 prompts match; 20 are shown.")
    page.locator("h1").click()
    page.keyboard.type("/ppo 17")
    expect(page.get_by_label("Search")).to_be_focused()
    assert numbers(page) == [18]
    page.get_by_label("base", exact=True).press("Space")
    expect(page.locator(".answer h4")).to_have_text(["SFT", "PPO"])
    page.get_by_label("Search").fill("nobody says this")
    expect(page.locator("#found")).to_have_text("0 of 30 prompts match; 0 are shown.")


def test_hostile_texts_are_text(tmp_path: Path, shown: Callable[..., Page]) -> None:
    texts = [*HOSTILE.values(), *ODD]
    script = HOSTILE["escape"] + HOSTILE["handler"] + HOSTILE["template"]
    recipe = replace(load("tiny"), name="hostile", tracker="none", sft={"data": script})
    folder = write_run(tmp_path / "<img src=x onerror=alert(1)>" / "run", recipe, said=dict(enumerate(texts)))
    write_evaluation(folder, script)
    answers = [
        {"id": str(n), "prompt": text, "model": script, "completion": text, "tokens": 1, "ended": True, "scores": {}}
        for n, text in enumerate(texts)
    ]
    write(folder / "evaluation" / "answers.jsonl", answers)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["sft"]["data"] |= {"source": script, "dropped": {script: 1}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    other = write_run(tmp_path / "two" / "run")
    page = shown(write_report([folder, other], tmp_path / "report.html"), 390)
    while page.get_by_role("button", name="Show more").is_visible():
        page.get_by_role("button", name="Show more").click()
    assert page.title() == "2 runs compared: RLHF report"
    seen = set(page.locator(".prompt .asked .text").all_text_contents())
    assert seen >= {*HOSTILE.values(), *ODD.values()}
    assert page.locator("img, iframe, object, meta[http-equiv=refresh], base").count() == 0
    assert page.locator("script").count() == 2 and page.locator("main a").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, "nothing pushes the page apart"


def test_a_print_has_no_controls(page_path: Path, shown: Callable[..., Page]) -> None:
    page = shown(page_path, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    for hidden in ("nav", "#controls", "#more"):
        expect(page.locator(hidden)).to_be_hidden()
    expect(page.locator(".prompt").first).to_be_visible()
    assert brightness(page) > 200, "on white paper"


def test_the_page_may_run_nothing_but_its_own(page_path: Path) -> None:
    page = page_path.read_text(encoding="utf-8")
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', page)[0].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for kind, pattern in (("style", "<style>(.*?)</style>"), ("script", '<script type="module">(.*?)</script>')):
        (part,) = re.findall(pattern, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r'(?:src|href)="(?!#|data:,)', page), "it links to nothing but itself"


def test_a_run_says_how_exact_it_is(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    table = page[page.index("Rounding") :].partition("</table>")[0]
    assert "0 is exact" in table and re.findall(r">([0-9.]+)</td>", table) == ["0", "0.05"]
