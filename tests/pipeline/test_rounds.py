"""Sampling what is to be ranked, and rounds of feedback: whole runs on a tiny random model."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.command_line import error_of
from support.endpoint import Body, Endpoint, change_weights, error, longer
from support.worded import WORDS, make_recipe, read, same, write

from rlhf_recipes import Recipe, Rounds, Source, replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.feedback.rows import read_samples
from rlhf_recipes.feedback.sample import SampleSettings, alike, prompts_to_rank, sample_responses
from rlhf_recipes.pipeline import rounds
from rlhf_recipes.pipeline.check import check_recipe
from rlhf_recipes.pipeline.rounds import freeze_labels, have_labelled, training_file
from rlhf_recipes.pipeline.stage import run_stage
from rlhf_recipes.recipe.overrides import from_dict, parse_overrides, to_dict
from rlhf_recipes.records.files import Journal, read_json, read_rows
from rlhf_recipes.records.folder import read_recipe, write_recipe
from rlhf_recipes.records.lock import held
from rlhf_recipes.report.gather import gather
from rlhf_recipes.report.sections import report_sections
from rlhf_recipes.stages.job import Job
from rlhf_recipes.stages.stop import StopInOrder, Stopped
from rlhf_recipes.worlds.tiny import comparisons, gold, labeler


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(tmp_path_factory.mktemp("rounds"))


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with three rounds."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, folder)
    return folder


# --- Files that a kill leaves whole -----------------------------------------------------------------------------------


def test_a_journal_keeps_what_was_appended_and_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    journal = Journal(path)
    assert not path.exists(), "nothing is written before there is a row"
    journal.append({"id": 1})
    journal.append({"id": 2, "text": "ü\u2028\n"})
    with path.open("a") as stream:
        stream.write('{"id": 3, "te')
    torn = path.read_bytes()
    assert [row["id"] for row in read_rows(path)] == [1, 2] and path.read_bytes() == torn, "only its writer mends it"
    again = Journal(path)
    assert again.rows == [{"id": 1}, {"id": 2, "text": "ü\u2028\n"}]
    again.append({"id": 4})
    again.remove(lambda row: row["id"] == 2)
    assert Journal(path).rows == [{"id": 1}, {"id": 4}] == read(path)
    path.write_text('{"id": 1}\n{"id": 5}')  # whole, but for its end
    Journal(path).append({"id": 6})
    assert read(path) == [{"id": 1}, {"id": 5}, {"id": 6}]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{oops}\n", "line 2: not JSON"),
        ("[1]\n", "line 2: list, not an object"),
        ("My notes", "line 2: not JSON"),
        ("\0\0\0", "line 2: holds NUL bytes, as a power cut leaves them. Delete what stands from there on"),
    ],
)
def test_a_journal_names_the_line_that_is_none(tmp_path: Path, line: str, part: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n' + line)
    with pytest.raises(ValueError, match=part):
        Journal(tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == '{"id": 1}\n' + line


def test_a_full_disk_costs_no_row_but_the_one_that_did_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import resource, signal, sys; from pathlib import Path; from rlhf_recipes.records.files import Journal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); journal = Journal(Path(sys.argv[1]));"
        "limit = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY));"
        "[journal.append({'id': name}) for name in 'ab']; limit(journal.path.stat().st_size + 5)\n"
        "try: journal.append({'id': 'lost'})\n"
        "except OSError: pass\n"
        "limit(5)\n"
        "try: journal.remove(lambda row: row['id'] == 'a')\n"
        "except OSError: pass\n"
        "limit(resource.RLIM_INFINITY); journal.append({'id': 'c'}); journal.remove(lambda row: row['id'] == 'b')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert Journal(path).rows == [{"id": "a"}, {"id": "c"}]
    assert list(tmp_path.iterdir()) == [path], "what was not written whole takes no room"


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_comes_back_from_its_file(recipe: Recipe, finished: Path) -> None:
    assert read_recipe(finished) == recipe == from_dict(json.loads(json.dumps(to_dict(recipe))))
    with pytest.raises(ValueError, match=r"is no run folder: it has no recipe\.json"):
        read_recipe(finished.parent)


def test_rounds_are_set_key_by_key(recipe: Recipe) -> None:
    words = ["rounds.temperatures=[0.7, 1.0]", "rounds.models=('sft','ppo')", "rounds.size=5"]
    changed = replace(recipe, **parse_overrides(words))
    assert changed.rounds == Rounds(3, recipe.rounds.labeler, None, 5, 3, ("sft", "ppo"), (0.7, 1.0))
    one = replace(recipe, **parse_overrides(["rounds.temperatures=0.7", "rounds.models=sft"])).rounds
    assert one is not None and (one.temperatures, one.models) == ((0.7,), ("sft",))
    assert replace(replace(recipe, rounds=None), rounds={"size": 7}).rounds == Rounds(size=7)
    with pytest.raises(ValueError, match=r"no key rounds.sise. Did you mean size\?"):
        replace(recipe, rounds={"sise": 7})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rounds": {"responses": 10}}, "rounds.responses must be from 2 to 9, not 10"),
        ({"rounds": {"count": 0}}, "rounds.count must be above 0"),
        ({"rounds": {"size": 0}}, "rounds.size must be above 0"),
        ({"rounds": {"models": ("sft,ppo",)}}, r"as in rounds.models=\('sft','ppo'\), and not 'sft,ppo'"),
        ({"rounds": {"models": ()}}, "rounds.models must name at least one"),
        ({"rounds": {"labeler": "peple"}}, "rounds.labeler: 'peple' is not 'people', no function"),
        ({"rounds": {"enough": 1.5}}, "rounds.enough must be above 0 and at most 1"),
        ({"rounds": {"temperatures": (0.0,)}}, "rounds.temperatures must be above 0"),
        ({"rounds": {"labeler": f"{__file__}:nobody"}}, "has no function 'nobody'"),
        ({"reward": None, "ppo": {"reward_funcs": (f"{__file__}:write",), "critic": "sft"}}, "rounds needs a reward"),
    ],
)
def test_rounds_that_cannot_be_are_refused_at_once(recipe: Recipe, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        check_recipe(replace(recipe, **changes))


def test_too_few_prompts_are_found_before_anything_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 40 different prompts, and 2 rounds of 30 want 60"):
        run(replace(recipe, rounds={"size": 30}), tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_k_different_responses_with_their_origins(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    settings = SampleSettings(("sft", "ppo"), (0.7, 1.3), k=3, response_length=6, seed=5)
    prompts = Source(str(finished.parent / "prompts.jsonl"))
    write(Path(prompts.data), [{"prompt": word, "topic": index} for index, word in enumerate([*WORDS[:12], WORDS[0]])])
    found = sample_responses(finished, prompts, out, settings)
    rows = read_samples(out)
    assert found == {"samples": 12, "short": sum(len(row["responses"]) < 3 for row in rows), "left_out": 0}
    assert [row["prompt"] for row in rows] == WORDS[:12] and [row["topic"] for row in rows] == list(range(12))
    for row in rows:
        texts = row["responses"]
        assert len(texts) == len(row["origins"]) and len(texts) == len(set(texts))
        assert not any(alike(a, b, 0.9) for i, a in enumerate(texts) for b in texts[:i])
    ways = Counter((origin["model"], origin["temperature"]) for row in rows for origin in row["origins"])
    assert len(ways) == 4 and max(ways.values()) - min(ways.values()) <= 3, "each way has its share"
    assert {origin["seed"] for row in rows for origin in row["origins"]} == {5}


def test_sampling_that_was_cut_goes_on_to_the_same_samples_in_other_batches(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_recipes.feedback.sample.AT_ONCE", 4)
    prompts = prompts_to_rank(read_recipe(finished))
    settings = SampleSettings(("ppo",), k=2, response_length=6)
    sample_responses(finished, prompts, tmp_path / "whole.jsonl", settings, limit=10)
    whole = (tmp_path / "whole.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    sample_responses(finished, prompts, tmp_path / "cut.jsonl", settings, batch_size=3, limit=10)
    assert (tmp_path / "cut.jsonl").read_text() == whole
    sample_responses(
        finished, prompts, tmp_path / "other.jsonl", SampleSettings(("ppo",), k=2, response_length=6, seed=1), limit=10
    )
    assert (tmp_path / "other.jsonl").read_text() != whole


def test_samples_of_other_settings_are_not_mixed(finished: Path, tmp_path: Path) -> None:
    prompts, out = prompts_to_rank(read_recipe(finished)), tmp_path / "samples.jsonl"
    sample_responses(finished, prompts, out, SampleSettings(k=2, response_length=4), limit=2)
    before = out.read_text()
    with pytest.raises(ValueError, match=r"samples of other settings \(k: 2 there, 3 here\): name another file"):
        sample_responses(finished, prompts, out, SampleSettings(k=3, response_length=4), limit=2)
    assert out.read_text() == before


def test_samples_of_another_model_of_the_same_name_are_not_mixed(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out, settings = tmp_path / "run", tmp_path / "samples.jsonl", SampleSettings(k=2, response_length=4)
    shutil.copytree(finished, folder)
    write_recipe(folder, read_recipe(finished))  # a copy is nobody's before
    prompts = prompts_to_rank(read_recipe(folder))
    sample_responses(folder, prompts, out, settings, limit=2)
    change_weights(folder / "ppo" / "policy")
    with pytest.raises(ValueError, match=r"samples of other settings \(weights: {'ppo': .*: name another file, or del"):
        sample_responses(folder, prompts, out, settings, limit=4)
    assert len(read(out)) == 2 and not caplog.messages
    written = tmp_path / "samples.settings.json"
    written.write_text(json.dumps({key: value for key, value in read_json(written).items() if key != "weights"}))
    sample_responses(folder, prompts, out, settings, limit=4)  # an earlier version has sampled
    assert len(read(out)) == 4
    assert caplog.messages == [f"{out} does not say of which weights its samples are: they are taken for those of now."]


def test_a_prompt_without_two_different_responses_is_left_out(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    # So cold, a model has one thing to say.
    found = sample_responses(
        finished, prompts_to_rank(read_recipe(finished)), out, SampleSettings(k=2, temperatures=(1e-4,)), limit=3
    )
    left_out = read(tmp_path / "samples.left_out.jsonl")
    assert found["left_out"] == len(left_out) == 3 - found["samples"] > 0
    assert all(len(row["responses"]) < 2 for row in left_out)


def test_near_duplicates() -> None:
    ten = "a b c d e f g h i j"
    assert alike(ten, ten.replace("j", "x"), 0.9) and not alike(ten, ten.replace("i j", "x y"), 0.9)
    assert alike("a  b", "a b", 1.0) and not alike("a b", "b a", 1.0)


def test_the_sample_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "samples.jsonl"
    words = ["sample", str(finished / "round-2"), "--out", str(out), "-k", "2", "--models", "sft,ppo", "--limit", "3"]
    main_cli([*words, "--temperatures", "1,1.2"])
    printed = capsys.readouterr().out
    assert re.search(rf"3 samples in {re.escape(str(out))}, \d of them with fewer than 2 responses", printed)
    assert {origin["model"] for row in read(out) for origin in row["origins"]} == {"sft", "ppo"}
    assert all(len(text.split()) <= 8 for row in read(out) for text in row["responses"]), "the run's response_length"
    for wrong, part in (
        (["--models", "pop"], "has no finished model 'pop'"),
        (["--temperatures", "warm"], "--temperatures must be numbers"),
        (["-k", "1"], "k must be 2 to 9"),
        (["--prompts", "absent.jsonl"], "no file absent.jsonl"),
        (["--response-length", "100000"], "response_length=100000 leaves no room"),
    ):
        with pytest.raises(SystemExit) as exit:
            main_cli([*words, "--out", str(tmp_path / "other.jsonl"), *wrong])
        error = capsys.readouterr().err
        assert exit.value.code == 2 and part in error and "Traceback" not in error


# --- Rounds -----------------------------------------------------------------------------------------------------------


def test_three_rounds_go_on_from_each_others_policy_with_all_labels(recipe: Recipe, finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "sft", "ppo", "ppo_2", "ppo_3"]
    assert {"reward_2", "ppo_2", "reward_3", "ppo_3"} <= summary["seconds"].keys()
    first = json.loads((finished / "manifest.json").read_text())["stages"]["reward"]["data"]
    seen = set()
    for number in (2, 3):
        folder = finished / f"round-{number}"
        labels = read(folder / "feedback" / "labels.jsonl")
        prompts = {row["prompt"] for row in labels}
        assert len(labels) == 12 and not seen & prompts, "prompts are fresh"
        seen |= prompts
        assert all(min(row["ranking"]) == 1 and row["labeler"] == recipe.rounds.labeler for row in labels)  # type: ignore[union-attr]
        data = json.loads((folder / "manifest.json").read_text())["stages"]["reward"]["data"]
        usable = [row for row in labels if len(set(row["ranking"])) > 1]
        assert data["rows"] == first["rows"] + 12 * (number - 1)
        assert number > 2 or data["used"] == first["used"] + len(usable)
        assert not same(folder / "ppo" / "policy", finished / "ppo" / "policy")
        card = json.loads((folder / "reward" / "card.json").read_text())
        assert set(card["by_source"]) <= {"round-2", "round-3"} and card["by_source"], "the card tells them apart"


def test_a_run_writes_its_report_with_all_rounds(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "At a dotted line a round begins" in page and "ppo, round 3" in page and "all pairs, round 2" in page
    main_cli(["report", str(finished), "--out", str(finished / "again.html")])
    assert capsys.readouterr().out == f"{finished / 'again.html'}\n"
    assert (finished / "again.html").read_text(encoding="utf-8") == page, "the same run gives the same page"
    (of_run,) = gather([finished])
    found = {section.id: section.blocks for section in report_sections([of_run])}
    assert [*found] == ["what", "results", "answers", "sft", "reward", "ppo", "overoptimisation", "resources", "now"]
    assert found["answers"][0].data["models"] == ["base", "SFT", "PPO", "round-2/PPO", "round-3/PPO"]
    assert found["resources"][1].rows[0].label == "sampling responses"
    steps, kl = of_run.ppo("objective/kl")
    gaps = [step for step, value in zip(steps, kl, strict=True) if math.isnan(value)]
    assert gaps == of_run.starts()[1:] == [2, 4], "rounds of two updates each are counted on"


def test_the_second_round_starts_where_the_first_ended_and_keeps_its_reference(finished: Path) -> None:
    of_round = [row for row in read(finished / "round-2" / "metrics.jsonl") if "objective/kl" in row]
    assert of_round[0]["objective/kl"] != 0, "its policy has left the SFT model"
    first = [row for row in read(finished / "metrics.jsonl") if "objective/kl" in row]
    assert first[0]["objective/kl"] == 0
    assert all(abs(row["val/ratio"] - 1) < 0.5 for row in of_round)
    ended = [row for row in read(finished / "samples.jsonl") if row.get("model") == "sft"]
    again = [row for row in read(finished / "round-2" / "samples.jsonl") if row.get("model") == "sft"]
    assert [row["completion"] for row in ended] == [row["completion"] for row in again], "one SFT model in all rounds"


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_killed_round_goes_on_to_the_same_end(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    two = replace(recipe, rounds={"count": 2})
    real = run_stage

    def killed(job: Job, *rest: Any) -> None:
        if (job.round, job.stage) == (2, stage):
            raise KeyboardInterrupt
        real(job, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rlhf_recipes.pipeline.stage.run_stage", killed)
        run(two, tmp_path / "run")
    run(two, tmp_path / "run")
    for part in ("reward", "ppo/policy"):
        assert same(tmp_path / "run" / "round-2" / part, finished / "round-2" / part)
    run(recipe, tmp_path / "run")  # more rounds may follow
    assert same(tmp_path / "run" / "round-3" / "ppo" / "policy", finished / "round-3" / "ppo" / "policy")


def test_a_round_in_use_is_refused(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    manifest = tmp_path / "run" / "round-3" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    with (
        held(manifest.parent),
        pytest.raises(ValueError, match=rf"{manifest.parent} is in use by process \d+ of"),
    ):
        run(recipe, tmp_path / "run")


@pytest.mark.parametrize("part", ["collect_samples", "collect_labels", "prepare_stage"])
def test_the_clock_ends_a_round_between_its_parts(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """What was sampled, and ranked, until then stays."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "round-3")
    clock, real = StopInOrder(), getattr(rounds, part)

    def takes_long(*args: Any) -> Any:
        found = real(*args)
        clock.deadline = 0.0
        return found

    monkeypatch.setattr(rounds, part, takes_long)
    with pytest.raises(Stopped) as stopped:
        run(recipe, tmp_path / "run", callbacks=[clock])
    feedback, samples = tmp_path / "run" / "round-3" / "feedback", "round-3/feedback/samples.jsonl"
    assert stopped.value.code == 143 and read(tmp_path / "run" / samples) == read(finished / samples)
    assert (feedback / "labels.trained.jsonl").is_file() == (part != "collect_samples")
    assert not (tmp_path / "run" / "round-3" / "reward").exists()


def test_a_finished_run_loads_nothing_again(recipe: Recipe, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.pipeline.one_run.load_tokenizer", lambda base: pytest.fail("it is finished"))
    assert list(run(recipe, finished)["models"])[-1] == "ppo_3"


@pytest.mark.parametrize("weigh", [False, True])
def test_a_round_trains_on_the_labels_that_there_were(recipe: Recipe, tmp_path: Path, weigh: bool) -> None:
    """People go on labelling while it trains; resumed, a stage must see the same rows."""
    labels = tmp_path / "round-2" / "feedback" / "labels.jsonl"
    labels.parent.mkdir(parents=True)
    people = replace(recipe, rounds={"labeler": "people", "weigh_labelers": weigh})
    row = {"prompt": "w4", "responses": ["w5", "w6"], "ranking": [1, 2], "labeler": "Ann"}
    write(labels, [{**row, "id": "1"}, {**row, "id": "2"}])
    with labels.open("a") as stream:
        stream.write('{"id": "3", "pro')  # the page writes it right now
    freeze_labels(labels, weigh)
    write(labels, [{**row, "id": str(number)} for number in range(5)])
    freeze_labels(labels, weigh)
    frozen = training_file(people, tmp_path, 2)
    assert [row["id"] for row in read(frozen)] == ["1", "2"] and all(("weight" in row) == weigh for row in read(frozen))
    assert training_file(people, tmp_path, 3).parent.parent.name == "round-3"


@pytest.mark.parametrize("left", [0, 4.5])
def test_labels_that_a_power_cut_has_torn_are_given_again(recipe: Recipe, tmp_path: Path, left: float) -> None:
    samples, labels = tmp_path / "samples.jsonl", tmp_path / "labels.jsonl"
    write(samples, [{"id": str(n), "prompt": "w4", "responses": ["w5", "w5 w6"]} for n in range(6)])
    assert have_labelled(recipe, samples, labels, 0)
    whole = labels.read_bytes()
    labels.write_bytes(whole[: int(len(whole) * left / 6)])
    assert have_labelled(recipe, samples, labels, 0) and labels.read_bytes() == whole


def test_no_labels_are_never_frozen(tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    for name in ("labels.jsonl", "labels.trained.jsonl"):  # the latter as an earlier version left it
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"labels\.jsonl holds no labels to train on\. Label some samples"):
        freeze_labels(labels, weigh=False)
    write(labels, [{"id": "1"}])
    freeze_labels(labels, weigh=False)
    assert read(tmp_path / "labels.trained.jsonl") == [{"id": "1"}]


def test_a_round_of_a_judge_stops_at_its_cost_and_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    samples, labels = tmp_path / "samples.jsonl", tmp_path / "labels.jsonl"
    write(samples, [{"id": str(n), "prompt": "w4", "responses": ["w5", "w5 w6"]} for n in range(3)])
    with Endpoint(longer) as endpoint:
        judged = replace(recipe, rounds={"labeler": endpoint.url, "price_out": 1e6, "max_cost": 13.0})  # 3 an answer
        with pytest.raises(ValueError, match=r"rounds\.max_cost=13\.0: 2 of the 3 labels of this round have cost 12"):
            have_labelled(judged, samples, labels, 0)
        assert len(endpoint.bodies) == 4
        assert have_labelled(replace(judged, rounds={"max_cost": 18.0}), samples, labels, 0)
    assert len(endpoint.bodies) == 6 and len(read(labels)) == 3
    with pytest.raises(ValueError, match=r"rounds\.price_in"):
        check_recipe(replace(judged, rounds={"price_out": 0.0}))


def test_a_round_does_not_go_on_without_the_samples_on_which_its_judge_failed(recipe: Recipe, tmp_path: Path) -> None:
    samples, labels = tmp_path / "samples.jsonl", tmp_path / "labels.jsonl"
    write(samples, [{"id": str(n), "prompt": "w4", "responses": ["w5", f"w5 {'w6 ' * n}"]} for n in range(1, 5)])

    busy = True

    def reply(body: Body, number: int) -> Any:
        if "w6 w6 w6 w6" in (question := body["messages"][0]["content"]):
            return "Neither."  # which is an answer, and stays one
        return error(400, "busy") if "w6 w6 w6" in question and busy else longer(body)

    with Endpoint(reply) as endpoint:
        judged = replace(recipe, rounds={"labeler": endpoint.url})
        with pytest.raises(ValueError, match=r"failed on 1 of the 4 samples of this round\. Run the same again"):
            have_labelled(judged, samples, labels, 0)
        assert have_labelled(replace(judged, rounds={"enough": 0.75}), samples, labels, 0)
        busy = False
        assert have_labelled(judged, samples, labels, 0)
    assert [row["id"] for row in read(labels)] == ["1", "2", "3"]


def test_people_are_waited_for(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = replace(recipe, rounds={"labeler": "people", "count": 2, "enough": 0.75})
    folder = tmp_path / "run"
    assert "ppo_2" not in run(people, folder)["models"]
    samples, labels = (
        folder / "round-2" / "feedback" / "samples.jsonl",
        folder / "round-2" / "feedback" / "labels.jsonl",
    )
    waiting = " ".join(capsys.readouterr().out.split())
    assert "Round 2 waits for labels: 0 of 12 samples are judged" in waiting and "rlhf-recipes label" in waiting
    drawn = samples.read_text()
    rows = read_samples(samples)
    judged = [{**row, "ranking": list(range(1, len(row["responses"]) + 1)), "labeler": "Ann"} for row in rows]
    write(labels, judged[:7])
    write(labels.with_suffix(".skipped.jsonl"), [{"id": rows[7]["id"], "labeler": "Ann", "skipped": True}])
    assert "ppo_2" not in run(people, folder)["models"]
    assert "8 of 12 samples are judged" in " ".join(capsys.readouterr().out.split())
    write(labels, judged[:8])
    write(labels.with_suffix(".skipped.jsonl"), [{"id": rows[8]["id"], "labeler": "Ann", "skipped": True}])
    assert "ppo_2" in run(people, folder)["models"]
    assert samples.read_text() == drawn, "they are not drawn again"


def test_a_labeler_that_returns_something_else_is_named(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def two(prompts, responses, seed):\n    return [[1, 2] for _ in prompts]\n")
    bad = replace(recipe, rounds={"labeler": f"{tmp_path}/mine.py:two", "count": 2})
    with pytest.raises(ValueError, match=r"mine.py:two must return a rank for each response of each of the 12 prompts"):
        run(bad, tmp_path / "run")


def test_tinys_labeler_errs_as_often_as_in_its_comparisons() -> None:
    rows = comparisons(2000)
    pairs = [[row["chosen"], row["rejected"]] for row in rows]
    prompts = [row["prompt"] for row in rows]
    rankings = labeler(prompts, pairs, seed=3)
    scores = [gold([p, p], pair) for p, pair in zip(prompts, pairs, strict=True)]
    agrees = [(s[0] > s[1]) == (r[0] < r[1]) for s, r in zip(scores, rankings, strict=True)]
    assert sum(agrees) / len(agrees) == pytest.approx(0.73, abs=0.03)
    assert labeler(prompts[:50], pairs[:50], seed=3) != labeler(prompts[:50], pairs[:50], seed=4)


def test_a_judge_labels_a_round(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "principles.txt").write_text("Choose the answer with more words.\n")
    folder = tmp_path / "run"
    with Endpoint(longer) as endpoint:
        rounds = {"labeler": endpoint.url, "count": 2, "size": 4, "constitution": str(tmp_path / "principles.txt")}
        assert "ppo_2" in run(replace(recipe, rounds=rounds, tracker="wandb"), folder)["models"]
    assert len(list((folder / "round-2" / "wandb").glob("offline-run-*"))) == 2, "one W&B run a stage"
    labels = read(folder / "round-2" / "feedback" / "labels.jsonl")
    assert len(labels) == 4 and {row["labeler"] for row in labels} == {"judge:scripted"}
    for row in labels:
        lengths = [len(text) for text in row["responses"]]
        assert row["ranking"] == [1 + sum(other > length for other in lengths) for length in lengths]
    assert all("more words" in body["messages"][0]["content"] for body in endpoint.bodies)
    data = json.loads((folder / "round-2" / "manifest.json").read_text())["stages"]["reward"]["data"]
    assert data["rows"] == 44


# --- Before the first round -------------------------------------------------------------------------------------------


def test_a_recipes_bare_base_can_be_sampled_before_it_is_run(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.jsonl"
    found = sample_responses(recipe, prompts_to_rank(recipe), out, SampleSettings(("base",), k=2), limit=3)
    assert found["samples"] == 3 and {o["model"] for row in read(out) for o in row["origins"]} == {"base"}
    with pytest.raises(ValueError, match="only its base can be sampled"):
        sample_responses(recipe, prompts_to_rank(recipe), out, SampleSettings(("sft",), k=2))
    capsys.readouterr()
    assert "say with --out where its samples go" in error_of(capsys, ["sample", "tiny"])
    assert "a run keeps its own: leave out seed=1" in error_of(capsys, ["sample", "runs/mine", "seed=1"])


def test_a_function_labels_samples_in_the_place_of_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "def longest(prompts, responses, seed):\n"
        "    return [[1 + sum(len(b) > len(a) for b in some) for a in some] for some in responses]\n"
    )
    samples, labels = tmp_path / "samples.jsonl", tmp_path / "samples.labels.jsonl"
    write(samples, [{"prompt": "p", "responses": ["a", "abc", "ab"], "topic": 4}])
    command = ["label", str(samples), "--by", f"{tmp_path}/mine.py:longest"]
    for _ in range(2):  # again, it says the same
        main_cli(command)
        (row,) = read(labels)
        assert row["ranking"] == [3, 1, 2] and row["labeler"] == command[-1] and row["topic"] == 4
    assert f"1 labels in {labels}" in capsys.readouterr().out
    write(labels, [{**row, "labeler": "Ann"}])
    assert "holds labels of Ann: name another --labels" in error_of(capsys, command)
    assert read(labels)[0]["labeler"] == "Ann"
