"""Evaluation: win rates by hand, answers that depend on nothing but the model and the prompt, every kind of judge."""

import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace as replace_settings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from playwright.sync_api import Page
from support.command_line import error_of
from support.endpoint import Endpoint, longer, save_judge
from support.label_page import done, press, serving, shown
from support.tiny_models import save_model
from support.worded import WORDS, make_recipe, read, write
from transformers import AutoTokenizer

from rlhf_recipes import Recipe, Source, replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.data.split import dialogue_position, drawing_hash
from rlhf_recipes.evaluate import behaviour, verdict, wins
from rlhf_recipes.evaluate.evaluation import evaluate
from rlhf_recipes.evaluate.judges import find_judge, known_identity, labels_file
from rlhf_recipes.evaluate.models import Answer, Bench, Cache, find_model
from rlhf_recipes.evaluate.people import samples_file
from rlhf_recipes.evaluate.plan import EvaluationSettings, plan_evaluation, unseen_prompts
from rlhf_recipes.evaluate.tables import evaluation_tables
from rlhf_recipes.feedback.rows import read_samples
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.model.shared import SharedBase
from rlhf_recipes.recipe.values import PEOPLE
from rlhf_recipes.records.folder import model_names, read_recipe, recipe_to_show, write_recipe
from rlhf_recipes.report.write import write_report

# --- Win rates by hand ------------------------------------------------------------------------------------------------


def test_a_win_rate_counts_ties_half_and_says_their_share() -> None:
    preferred = wins.preferences([3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 4.0, 4.0])
    assert preferred.tolist() == [1.0, 0.5, 0.0, 1.0]
    found = wins.win_rate(preferred, preferred == 0.5, np.zeros(4), np.arange(4))
    assert (found["rate"], found["ties"], found["prompts"]) == (0.625, 0.25, 4)
    assert 0 <= found["low"] < 0.625 < found["high"] <= 1


def test_the_interval_is_over_prompts() -> None:
    rng = np.random.default_rng(1)
    preferred, prompts = rng.choice([0.0, 1.0], 400, p=[0.4, 0.6]), np.arange(400)
    found = wins.win_rate(preferred, np.zeros(400, bool), np.zeros(400), prompts)
    error = preferred.std() / math.sqrt(400)  # for a mean of many it is the normal interval
    assert found["low"] == pytest.approx(found["rate"] - 1.96 * error, abs=0.002)
    assert found["high"] == pytest.approx(found["rate"] + 1.96 * error, abs=0.002)
    # Answers to one prompt that are all alike say no more than one of them.
    alike = wins.win_rate(
        np.repeat(preferred[:100], 4), np.zeros(400, bool), np.zeros(400), np.repeat(prompts[:100], 4)
    )
    one = wins.win_rate(preferred[:100], np.zeros(100, bool), np.zeros(100), prompts[:100])
    assert alike == {**one, "low": pytest.approx(one["low"]), "high": pytest.approx(one["high"])} | {
        "length_controlled": pytest.approx(one["length_controlled"])
    }


def controlled(preferred: Any, lengths: Any) -> float:
    preferred, lengths = np.asarray(preferred, float), np.asarray(lengths, float)
    return wins.length_controlled(preferred, lengths, np.arange(len(preferred)))["rate"]


def test_what_length_alone_decides_is_even_at_equal_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.normal(0, 10, 2000)
    assert controlled(rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(lengths / lengths.std()))), lengths) == (
        pytest.approx(0.5, abs=0.03)
    )
    longer = lengths + 8  # a model whose answers are longer wins often by that alone
    won = rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    assert won.mean() > 0.65 and controlled(won, longer) == pytest.approx(0.5, abs=0.04)


def test_equal_lengths_leave_the_plain_win_rate_and_swapping_models_its_complement() -> None:
    rng = np.random.default_rng(0)
    preferred, lengths = rng.choice([0.0, 0.5, 1.0], 300), rng.normal(3, 10, 300)
    assert controlled(preferred, np.full(300, 7.0)) == pytest.approx(preferred.mean())
    assert controlled(np.ones(300), lengths) == 1.0
    assert controlled(preferred, lengths) == pytest.approx(1 - controlled(1 - preferred, -lengths), abs=1e-6)


def test_the_regression_is_the_penalised_maximum() -> None:
    rng = np.random.default_rng(0)
    preferred, lengths = rng.random(200), rng.normal(1, 5, 200)
    x = torch.tensor(np.tanh(lengths / lengths.std()))
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(
            coefficients[0] + coefficients[1] * x, torch.tensor(preferred), reduction="sum"
        )
        value = fit + wins.PENALTY / 2 * (coefficients**2).sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    assert controlled(preferred, lengths) == pytest.approx(torch.sigmoid(coefficients[0]).item(), abs=1e-6)


# --- Behaviour by hand ------------------------------------------------------------------------------------------------


def test_panels_by_hand() -> None:
    assert behaviour.distinct(["a b a", "b a"], 1) == 2 / 5 and behaviour.distinct(["a b a", "b a"], 2) == 2 / 3
    assert behaviour.repetition("a b c d a b c d") == pytest.approx(1 / 5) and behaviour.repetition("a") == 0
    assert behaviour.similarity("a b c", "c b x y") == pytest.approx(4 / 7) and behaviour.similarity("", "") == 1

    def answer(text: str, row: int, ended: bool = True, kl: float | None = 1.0) -> Answer:
        return Answer("", "m", row, 0, text.split(), ended, kl, text)  # type: ignore[arg-type]

    said = [answer("a b", 0), answer("a b", 0), answer("c d e", 1, False, 3.0), answer("f", 1)]
    panel = behaviour.behaviour_panel(said, None)
    assert panel["tokens"] == 2 and panel["without_eos"] == 0.25 and panel["self_similarity"] == pytest.approx(0.5)
    assert panel["kl"] == 1.5 and panel["kl_per_token"] == 6 / 8 and "sycophancy" not in panel
    assert "kl" not in behaviour.behaviour_panel([answer("a", 0, kl=None)], None)


@pytest.mark.parametrize(
    ("text", "refuses", "agrees"),
    [
        ("I'm sorry, but I can't help with that.", True, False),
        ("I\u2019m sorry, I cannot do that.", True, False),
        ("As an AI language model, I have no opinion.", True, False),
        ("I would rather not say.", True, False),
        ("Yes, I agree.", False, True),
        ("Absolutely! You are right.", False, True),
        ("I completely agree with you.", False, True),
        ("Yes, but it depends.", False, False),
        ("The capital is Paris.", False, False),
        ("No. I disagree.", False, False),
    ],
)
def test_refusals_and_agreement_are_known_by_their_beginnings(text: str, refuses: bool, agrees: bool) -> None:
    assert behaviour.refuses(text) == refuses and behaviour.agrees(text) == agrees


def test_sycophancy_is_agreeing_with_an_opinion_and_with_its_opposite() -> None:
    questions = behaviour.opinions()
    assert len(questions) >= 40 and len(set(questions)) == len(questions)
    assert behaviour.sycophancy(["Yes."] * len(questions)) == 1
    assert behaviour.sycophancy(["Yes.", "No."] * (len(questions) // 2)) == 0


# --- A run, evaluated -------------------------------------------------------------------------------------------------


def words(completions: list[str], **columns: Any) -> list[float]:
    """The gold of these tests: many words."""
    return [float(len(text.split())) for text in completions]


def ends_low(completions: list[str], **columns: Any) -> list[float]:
    """Another judge."""
    return [-float(text.split()[-1][1:]) if text.split() else 0.0 for text in completions]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("evaluate")
    texts = [{"text": f"{one} {other} w9"} for one in WORDS[:8] for other in WORDS[8:16]]
    return replace(
        make_recipe(folder),
        rounds=None,
        gold=f"{__file__}:words",
        ptx=Source(str(write(folder / "texts.jsonl", texts)), heldout=0.2),
        sft={"heldout": 0.3},
        reward={"judge_share": 0.4, "heldout": 0.3},
        ppo={"heldout": 0.3},
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate-run") / "run"
    run(recipe, folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(finished: Path) -> dict[str, Any]:
    return evaluate(finished)


@pytest.fixture
def copied(finished: Path, evaluated: dict[str, Any], tmp_path: Path) -> Path:
    folder = shutil.copytree(finished, tmp_path / "run")
    write_recipe(folder, recipe_to_show(folder))  # the copy is the user's own as well
    return folder


def answers_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluation" / "answers.jsonl").read_text().splitlines()]


def win(result: dict[str, Any], model: str, judge: str, against: str = "sft") -> dict[str, Any]:
    (found,) = [w for w in result["wins"] if (w["model"], w["judge"], w["against"]) == (model, judge, against)]
    return found


def test_every_model_is_compared_by_every_judge_that_the_run_has(
    recipe: Recipe, finished: Path, evaluated: dict[str, Any]
) -> None:
    names = ["base", "sft", "ppo/checkpoint-1", "ppo/checkpoint-2", "ppo"]
    assert model_names(finished) == list(evaluated["models"]) == names
    assert list(evaluated["judges"]) == ["gold", "judge", "reward"] and evaluated["against"] == ["sft"]
    assert len(evaluated["wins"]) == 3 * 4
    assert json.loads((finished / "evaluation" / "evaluation.json").read_text()) == evaluated
    rows = answers_of(finished)
    prompts = {row["id"] for row in rows}
    assert len(rows) == 5 * evaluated["prompts"] and len(prompts) == evaluated["prompts"]
    for name in names:
        mine = [row for row in rows if row["model"] == name]
        assert all(row["scores"]["gold"] == len(row["completion"].split()) for row in mine)
        for judge in evaluated["judges"]:
            mean = sum(row["scores"][judge] for row in mine) / len(mine)
            assert evaluated["models"][name]["means"][judge] == pytest.approx(mean)
        theirs = {row["id"]: row["scores"]["gold"] for row in rows if row["model"] == "sft"}
        won = [0.5 + 0.5 * np.sign(row["scores"]["gold"] - theirs[row["id"]]) for row in mine]
        if name != "sft":
            assert win(evaluated, name, "gold")["rate"] == pytest.approx(np.mean(won))
    assert all(row["kl"] == 0 for row in rows if row["model"] == "sft")
    assert evaluated["models"]["ppo"]["weights"] == evaluated["models"]["ppo/checkpoint-2"]["weights"]
    assert evaluated["best"]["judge"] == "gold" and evaluated["best"]["model"].startswith("ppo")
    assert any("only" in sentence and "prompts" in sentence for sentence in evaluated["warnings"])


def test_prompts_are_those_that_training_held_out(recipe: Recipe, finished: Path, evaluated: dict[str, Any]) -> None:

    assert recipe.ppo is not None
    prepared = prepare("ppo", recipe.ppo, load_tokenizer(recipe.base), 200, recipe.seed)
    assert {row["prompt"] for row in answers_of(finished)} == set(prepared.heldout["prompt"])


def test_prompts_that_another_stage_was_trained_on_are_left_out(recipe: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": f"{word} w9", "completion": " w5"} for word in WORDS]
    source = str(write(tmp_path / "demonstrations.jsonl", rows[:40]))
    fresh, said = unseen_prompts(rows, replace(recipe, sft={"data": source, "heldout": 0.0}, reward=None))
    assert fresh == rows[40:] and said[0].startswith("40 of the 60 prompts") and "heldout, 0.3" in said[0]
    fresh, said = unseen_prompts(rows[:40], replace(recipe, sft={"data": source, "heldout": 0.0}, reward=None))
    assert len(fresh) == 40 and "on all prompts" in said[0], "there are no others"
    assert unseen_prompts(rows, replace(recipe, sft={"data": source, "heldout": 0.3}, reward=None)) == (rows, [])


def test_a_limit_draws_prompts_like_the_whole(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    # Of two words, so that none is a prompt of the run.
    rows = [{"prompt": f"{first} {second}", "red": n < 10} for n, first in enumerate(WORDS[:20]) for second in WORDS]
    settings = EvaluationSettings(prompts=str(write(tmp_path / "rows.jsonl", rows)), limit=100, judges=("gold",))
    plan = plan_evaluation(finished, recipe, load_tokenizer(recipe.base), settings)
    assert len(plan.rows) == 100 and 30 < sum(row["red"] for row in plan.rows) < 70


def test_a_limit_draws_from_what_was_held_out_whatever_its_number_of_turns() -> None:
    """A prompt of one turn is the opening by whose hash its dialogue is held out, so that its own hash is low too."""
    one = [[{"role": "user", "content": word}] for word in map(str, range(4_000))]
    more = [[*prompt, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}] for prompt in one]
    heldout = [prompt for prompt in one[:2_000] + more[2_000:] if dialogue_position(prompt, 0) < 0.1]
    drawn = sorted(heldout, key=lambda prompt: drawing_hash(prompt, 0))[:100]
    assert 30 < sum(len(prompt) == 1 for prompt in drawn) < 70


def test_prompts_that_go_on_from_a_trained_one_are_left_out(recipe: Recipe, tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    other = [{"role": "user", "content": "w9"}]
    source = str(write(tmp_path / "rows.jsonl", [{"prompt": turns[:1], "completion": turns[1:2]}]))
    fresh, said = unseen_prompts(
        [{"prompt": turns}, {"prompt": other}], replace(recipe, sft={"data": source, "heldout": 0.0}, reward=None)
    )
    assert fresh == [{"prompt": other}] and said[0].startswith("1 of the 2 prompts")


def test_perplexity_is_the_models_own(recipe: Recipe, finished: Path, evaluated: dict[str, Any]) -> None:

    assert recipe.ptx is not None
    tokenizer = load_tokenizer(recipe.base)
    texts = prepare("ptx", recipe.ptx, tokenizer, None, recipe.seed).heldout["input_ids"]
    causal, losses = load_base(recipe.base), []
    with torch.no_grad():
        for ids in texts:
            logits = causal(torch.tensor([ids])).logits[0, :-1].float()
            losses += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
    found = {name: of["perplexity"] for name, of in evaluated["models"].items()}
    assert found["base"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert len(set(found.values())) == 4, "the last checkpoint is the policy"


def test_a_second_judge_samples_nothing_and_the_first_stays(
    copied: Path, evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("no model is needed")

    monkeypatch.setattr(SharedBase, "generate", never)
    monkeypatch.setattr("rlhf_recipes.evaluate.models.load_base", never)
    other = f"{__file__}:ends_low"
    found = evaluate(copied, EvaluationSettings(judges=(other,)))
    assert set(found["judges"]) == {other, "gold", "judge", "reward"}
    assert win(found, "ppo", "gold") == win(evaluated, "ppo", "gold")
    assert found["models"]["ppo"]["perplexity"] == evaluated["models"]["ppo"]["perplexity"]
    rows = [row for row in answers_of(copied) if row["model"] == "ppo"]
    assert [row["scores"][other] for row in rows] == ends_low([row["completion"] for row in rows])


def test_a_moved_run_is_the_users_again_once_he_has_run_its_recipe_there(
    recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(finished, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"names code or servers, .*: gold="):
        evaluate(moved)
    run(recipe, moved)
    assert read_recipe(moved) == read_recipe(finished)


def test_a_judge_of_an_evaluation_json_is_neither_run_nor_asked(copied: Path, tmp_path: Path) -> None:
    """Anybody may have written it."""
    code, mark = tmp_path / "their.py", tmp_path / "mark"
    code.write_text(f"open({str(mark)!r}, 'w')\ndef gold(**columns): ...\n")
    written = copied / "evaluation" / "evaluation.json"
    before = json.loads(written.read_text())
    (copied / "judged-x.jsonl").write_text("")
    with Endpoint(longer) as endpoint:
        theirs = {f"{code}:gold": "f", endpoint.url: "e", "path": "x/../../judged-x", f"{code}:absent": "a", "two": 2}
        written.write_text(json.dumps({**before, "judges": before["judges"] | theirs}))
        found = evaluate(copied, EvaluationSettings(judges=("gold",)))
        assert not endpoint.bodies and endpoint.listed == 0
    assert not mark.exists() and list(found["judges"]) == ["gold", "judge", "reward"]


def test_what_a_judge_said_goes_with_its_code_and_weights(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def gold(**columns): ...\n")
    asking = EvaluationSettings().asking
    for name, change in (
        (f"{code}:gold", lambda: code.write_text("def gold(**columns): ...  # now otherwise\n")),
        (str(save_judge(tmp_path / "judge")), lambda: save_model(tmp_path / "judge", seed=2)),
        (str(save_judge(tmp_path / "other")), lambda: save_template(tmp_path / "other")),
    ):
        before = find_judge(name, finished, recipe, asking).identity
        assert find_judge(name, finished, recipe, asking).identity == before
        change()
        assert find_judge(name, finished, recipe, asking).identity != before
    classifier = known_identity(str(tmp_path / "other"), finished, recipe)
    save_template(tmp_path / "other")
    assert known_identity(str(tmp_path / "other"), finished, recipe) != classifier
    gold = find_judge("gold", finished, recipe, asking)
    assert gold.identity == known_identity("gold", finished, recipe)
    for name in (str(finished), ".", "a" * 300, "a" * 300 + ":b"):  # a run that was asked, or a name of nothing
        assert known_identity(name, finished, recipe) != gold.identity


def save_template(folder: Path) -> None:
    """Give a saved model another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "{# of no effect #}"
    tokenizer.save_pretrained(folder)


def test_neither_batches_nor_limits_nor_kills_change_an_answer(
    finished: Path, copied: Path, evaluated: dict[str, Any], tmp_path: Path
) -> None:
    few = evaluate(finished, EvaluationSettings(batch_size=3, limit=5, models=("ppo", "sft")), tmp_path / "few")
    kept = ("id", "model", "completion", "ended", "tokens")
    whole = {(row["id"], row["model"]): row for row in answers_of(finished)}
    rows = [json.loads(line) for line in (tmp_path / "few" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and few["prompts"] == 5
    assert all(row[key] == whole[row["id"], row["model"]][key] for row in rows for key in kept)
    # As if it had been killed while it wrote a row.
    cache = copied / "evaluation" / "cache.jsonl"
    content = cache.read_bytes()
    cache.write_bytes(content[: len(content) // 2])
    assert evaluate(copied) == evaluated and answers_of(copied) == answers_of(finished)


def test_an_answer_of_another_form_in_the_cache_is_named(finished: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(limit=2, models=("ppo",), judges=("gold",))
    evaluate(finished, settings, tmp_path)
    cache = tmp_path / "cache.jsonl"
    rows = read(cache)
    for value in ({"ids": [{}], "ended": True, "kl": 0.1}, {"ids": [5], "ended": True}, 3):
        write(cache, [{**rows[0], "value": value}, *rows[1:]])
        with pytest.raises(ValueError, match=rf"cache\.jsonl: the row of the key {rows[0]['key']} is no answer"):
            evaluate(finished, settings, tmp_path)


def test_several_answers_to_a_prompt_differ_and_the_first_is_the_single_one(finished: Path, tmp_path: Path) -> None:
    found = evaluate(finished, EvaluationSettings(samples=3, models=("ppo",), judges=("gold",)), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    first = [row["completion"] for row in rows if row["model"] == "ppo" and row["sample"] == 0]
    assert first == [row["completion"] for row in answers_of(finished) if row["model"] == "ppo"]
    assert 0 < found["models"]["ppo"]["behaviour"]["self_similarity"] < 1
    assert win(found, "ppo", "gold")["prompts"] == found["prompts"], "intervals are over prompts, not answers"
    hotter = evaluate(
        finished, EvaluationSettings(models=("ppo",), judges=("gold",), temperature=0.01), tmp_path / "cold"
    )
    assert hotter["models"]["ppo"]["means"] != found["models"]["ppo"]["means"]


def test_people_judge_in_the_arena_and_are_a_judge_from_then_on(
    copied: Path,
    evaluated: dict[str, Any],
    opened: Callable[[str, str], Page],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ann likes more words, Bob fewer: the page, the command and the report say so."""
    settings, out = EvaluationSettings(models=("ppo", "sft"), judges=("people",)), copied / "evaluation"
    assert "Nobody has judged these answers yet" in " ".join(evaluate(copied, settings)["warnings"])
    samples = read_samples(samples_file(out))
    tastes = {"Ann": lambda text: len(text.split()), "Bob": lambda text: -len(text.split())}
    with serving(samples_file(out), labels_file(out, PEOPLE), overlap=1.0) as link:
        pages = {name: opened(link, name) for name in tastes}
        for name, page in pages.items():
            for count in range(1, len(samples) + 1):
                first, second = (tastes[name](text) for text in shown(page))
                press(page, f"{'1' if first > second else '2' if second > first else 'b'} Enter")
                done(page, count, len(samples))
            assert "ppo" not in page.content()

    monkeypatch.setattr(uvicorn.Server, "run", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    main_cli(["arena", str(copied), "--models", "ppo,sft", "--port", "0", "--sheet"])
    printed = capsys.readouterr().out
    assert "Wins by person" in printed and f"reward.data={out / 'judged-people.jsonl'}" in printed
    found = json.loads((out / "evaluation.json").read_text())
    by_gold, by_people = win(found, "ppo", "gold"), win(found, "ppo", "people")
    assert by_people["rate"] == pytest.approx(0.5), "what one likes the other does not"
    assert by_people["high"] - by_people["low"] > by_gold["high"] - by_gold["low"]
    people = found["people"]
    assert people["people"] == {"Ann": len(samples), "Bob": len(samples)}
    rates = {row["person"]: row["rate"] for row in people["by_person"]}
    assert rates["Ann"] == pytest.approx(1 - rates["Bob"])
    # Of all pairs, equal answers are a tie, and Ann's taste is gold.
    differ = len(samples) / found["prompts"]
    assert rates["Ann"] * differ + 0.5 * (1 - differ) == pytest.approx(by_gold["rate"])
    assert people["agreement"]["people"]["rate"] == 0 and "gold" not in people["agreement"]
    assert {"gold", "judge", "reward"} < found["judges"].keys()
    assert json.loads((out / "evaluation.json").read_text()) == evaluate(copied, settings)

    prepared = prepare(
        "reward", Source(str(out / "judged-people.jsonl")), load_tokenizer(read_recipe(copied).base), 200, 0
    )
    assert prepared.report["rows"] > 0, "what was judged is data for a reward model"
    write_report([copied], copied / "report.html")
    page = (copied / "report.html").read_text()
    assert "What people say" in page and "Wins by person" in page and "judged by people" in page


def test_people_type_prompts_and_judge_the_answers_while_they_wait(
    copied: Path,
    opened: Callable[[str, str], Page],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is shown as it comes is what `evaluate` draws for the same prompts, and votes on it are counted."""
    out = copied / "evaluation" / "typed"
    shown_pairs: dict[str, list[str]] = {}
    drawn: set[str] = set()

    def in_browser(samples: Path, labels: Path, *, answer: Any, **options: Any) -> None:
        with serving(samples, labels, answer=answer) as link:
            page = opened(link, "Ann")
            for prompt in (
                f"{WORDS[0]} {WORDS[-1]}",
                "w4 w5 w6 w7 " * 1200,
                *(f"w7 {word}" for word in [*WORDS[:6], "<eos> w8"]),
            ):
                page.locator("#question").fill(prompt)
                prompt = prompt.replace("<eos>", "< eos>")  # no visitor spells a special token
                press(page, "Control+Enter")
                page.wait_for_selector("#ask:visible, .card button")
                said = page.locator("#said").text_content()
                if page.locator("#ask").is_visible():
                    shown_pairs[prompt] = [said or ""]
                    continue
                shown_pairs[prompt] = shown(page)
                assert "ppo" not in page.content() and "sft" not in page.content()
                press(page, "1 Enter")
                page.wait_for_selector("#ask:visible")
            press(page, "Escape")
        drawn.update(json.loads(line)["key"] for line in (out / "cache.jsonl").read_text().splitlines())

    monkeypatch.setattr("rlhf_recipes.evaluate.live.serve_label_page", in_browser)
    main_cli(["arena", str(copied), "--models", "ppo,sft", "--live", "--response-length", "8"])
    assert "Wins against sft on" in capsys.readouterr().out
    trained, long, *others = shown_pairs.values()
    assert "were trained on this prompt" in trained[0] and "there is room for" in long[0]
    judged = [pair for pair in others if len(pair) == 2]
    assert judged, "some pair of answers differs"
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} <= drawn, "evaluate has drawn nothing anew"
    texts = {prompt: {row["completion"] for row in rows if row["prompt"] == prompt} for prompt in shown_pairs}
    assert [texts[prompt] for prompt, pair in shown_pairs.items() if pair in judged] == [set(pair) for pair in judged]
    found = json.loads((out / "evaluation.json").read_text())
    assert found["people"]["votes"] == len(judged) and win(found, "ppo", "people")["prompts"] >= len(judged)
    labels = [json.loads(line) for line in labels_file(out, PEOPLE).read_text().splitlines()]
    assert [[label["responses"][index] for index in label["order"]] for label in labels] == judged
    assert json.loads((out / "prompts.jsonl").read_text().splitlines()[-1])["prompt"] == "w7 < eos> w8"
    with pytest.raises(SystemExit):
        main_cli(["arena", str(copied), "--live", "--limit", "3"])
    assert "leave out --prompts, --limit and --samples" in capsys.readouterr().err


def test_a_model_that_is_asked_judges_in_both_orders(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Endpoint(longer) as endpoint:
        words = ["evaluate", str(copied), "--models", "ppo", "--judge", endpoint.url, "--parallel", "4"]
        main_cli(words)
        asked = len(endpoint.bodies)
        main_cli([*words, "--json"])
        assert len(endpoint.bodies) == asked, "nothing is asked twice"
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.rindex('{\n  "against"') :])
    rows = {(row["id"], row["model"]): row["completion"] for row in answers_of(copied)}
    pairs = [(text, rows[id, "sft"]) for (id, model), text in rows.items() if model == "ppo"]
    assert asked == 2 * len({tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]})
    lengths = wins.preferences([len(ours) for ours, _ in pairs], [len(theirs) for _, theirs in pairs])
    assert win(found, "ppo", endpoint.url)["rate"] == pytest.approx(lengths.mean())


def test_a_files_answers_are_an_opponent_of_the_judges_that_there_are(finished: Path, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"w4 {word}", "output": "w5 " * n + "w6", "generator": "other", "dataset": "d"}
        for n, word in enumerate(WORDS[:6])
    ]
    path = str(write(tmp_path / "outputs.jsonl", rows))
    settings = EvaluationSettings(models=("ppo",), prompts=path, samples=2)
    found = evaluate(finished, settings, tmp_path / "out")
    assert found["against"] == ["other"] and found["prompts"] == 6 and list(found["models"]) == ["ppo", "other"]
    assert list(found["judges"]) == ["gold", "judge", "reward"], "the judges are the run's, by their names"
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    theirs = [row for row in answers if row["model"] == "other"]
    assert [row["scores"]["gold"] for row in theirs] == [n + 1 for n in range(6) for _ in range(2)]
    ours = [row["scores"]["gold"] for row in answers if row["model"] == "ppo"]
    expected = wins.preferences(ours, [row["scores"]["gold"] for row in theirs]).mean()
    assert win(found, "ppo", "gold", against="other")["rate"] == pytest.approx(expected)
    panel = found["models"]["other"]["behaviour"]
    assert "self_similarity" not in panel and panel["tokens"] == pytest.approx(sum(range(2, 8)) / 6)
    # Named, the run's own models are compared with instead, and nothing else stands in the result.
    own = evaluate(finished, replace_settings(settings, against=("sft",)), tmp_path / "own")
    assert list(own["models"]) == ["ppo", "sft"]


def test_a_local_model_judges_by_its_probabilities(finished: Path, tmp_path: Path) -> None:
    judge = str(save_judge(tmp_path / "judge"))
    found = evaluate(finished, EvaluationSettings(models=("ppo",), judges=(judge,)), tmp_path / "out")
    rate = win(found, "ppo", judge)
    assert 0 < rate["rate"] < 1
    swapped = evaluate(
        finished, EvaluationSettings(models=("sft",), against=("ppo",), judges=(judge,)), tmp_path / "out"
    )
    other = win(swapped, "sft", judge, against="ppo")
    assert other["rate"] == pytest.approx(1 - rate["rate"]) and other["ties"] == rate["ties"]


def test_models_of_other_runs(recipe: Recipe, finished: Path, copied: Path, tmp_path: Path) -> None:
    same = f"{copied}:ppo"
    found = evaluate(finished, EvaluationSettings(models=("ppo", same), judges=("gold", "reward")), tmp_path / "same")
    assert found["models"][same]["weights"] == found["models"]["ppo"]["weights"]
    assert win(found, same, "gold") == {**win(found, "ppo", "gold"), "model": same}
    base = save_model(tmp_path / "other-base", seed=7)
    run(replace(recipe, base={"model": str(base)}, reward=None, ppo=None, ptx=None), tmp_path / "other")
    other = f"{tmp_path / 'other'}:sft"
    found = evaluate(finished, EvaluationSettings(models=("ppo", other), judges=("gold", "reward")), tmp_path / "out")
    assert "kl" not in found["models"][other]["behaviour"] and "perplexity" not in found["models"][other]
    assert {"gold", "reward"} == found["models"][other]["means"].keys()
    assert found["models"][other]["weights"] != found["models"]["sft"]["weights"]


# --- Tasks ------------------------------------------------------------------------------------------------------------

TASK = """\
task: choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


def test_tasks_of_the_harness_are_done_by_the_adapter_over_its_base(
    recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    questions = [{"q": f"w{i} w{i + 1}", "choices": ["w5", f"w{i + 3}"], "gold": i % 2} for i in range(10, 40)]
    write(tasks / "rows.jsonl", questions)
    (tasks / "choice.yaml").write_text(TASK.format(file=tasks / "rows.jsonl"))
    settings = EvaluationSettings(models=("base", "sft"), judges=("gold",), tasks=("choice",), task_dir=tasks, limit=4)
    found = evaluate(finished, settings, tmp_path / "out")
    bench = Bench(recipe, Cache(tmp_path / "none.jsonl"), 8)
    for name in ("base", "sft"):
        role, right = bench.hold(find_model(finished, recipe, name).folder), 0
        for row in questions:
            ids = [bench.tokenizer(f"{row['q']} {choice}")["input_ids"] for choice in row["choices"]]
            with bench.shared.role(role), torch.no_grad():
                logits = bench.shared.causal(torch.tensor([ids[0]])).logits[0, -2]
            right += int(logits[[tokens[-1] for tokens in ids]].argmax()) == row["gold"]
        accuracy = found["models"][name]["tasks"]["choice"]["acc"]
        assert accuracy["value"] == pytest.approx(right / len(questions)) and accuracy["error"] > 0
    titles = [str(table.title) for table in evaluation_tables(found)]
    assert titles[-1] == "Alignment tax"


# --- What to ship, and what to distrust -------------------------------------------------------------------------------


def result(gold: list[float], reward: list[float]) -> dict[str, Any]:
    names, panel = ["sft", "ppo/checkpoint-10", "ppo"], {"tokens": 8.0, "refusals": 0.0, "repetition": 0.0}
    panel |= {"without_eos": 0.0, "distinct_2": 0.5}
    rates = {"gold": gold, "reward": reward}
    return {
        "prompts": 200,
        "samples": 1,
        "against": ["sft"],
        "judges": {"gold": "g", "reward": "r"},
        "models": {
            name: {"behaviour": dict(panel), "means": {judge: of[i] for judge, of in rates.items()}}
            for i, name in enumerate(names)
        },
        "wins": [
            {"model": name, "against": "sft", "judge": judge, "rate": of[i], "low": of[i] - 0.05, "high": of[i] + 0.05}
            | {"ties": 0.0, "prompts": 200, "length_controlled": {"rate": of[i], "low": 0.0, "high": 1.0}}
            | {"halves": [{"rate": of[i], "low": of[i] - 0.07, "high": of[i] + 0.07, "prompts": 100}] * 2}
            for judge, of in rates.items()
            for i, name in enumerate(names)
            if name != "sft"
        ],
    }


def test_the_checkpoint_to_ship_wins_most_by_quality_and_never_by_the_reward() -> None:
    found = result([0.5, 0.7, 0.55], [0.5, 0.8, 0.95])
    chosen = verdict.policy_to_ship(found)
    assert chosen is not None and (chosen["model"], chosen["judge"]) == ("ppo/checkpoint-10", "gold")
    assert "intervals are apart" in chosen["words"]
    close = verdict.policy_to_ship(result([0.5, 0.6, 0.58], [0.5, 0.8, 0.9]))
    assert close is not None and "may be chance" in close["words"]
    worse = verdict.policy_to_ship(result([0.5, 0.48, 0.3], [0.5, 0.8, 0.9]))
    assert worse is not None and worse["words"].startswith("None beats sft. ppo/checkpoint-10 comes nearest: by gold")
    found["judges"] = {"reward": "r"}
    assert verdict.policy_to_ship(found) is None, "what PPO was trained against says nothing of quality"


def test_the_rate_of_the_policy_to_ship_is_not_of_the_prompts_that_chose_it() -> None:
    """Ten policies that all win half of 60 prompts: the best of them wins more of those that say so."""
    said = []
    for seed in range(60):
        rng, names, prompts = np.random.default_rng(seed), [f"ppo/checkpoint-{i}" for i in range(10)], np.arange(60)
        of_all = [wins.win_rate(rng.random(60).round(), np.zeros(60, bool), np.zeros(60), prompts) for _ in names]
        entries = [{"model": name, "against": "sft", "judge": "g", **w} for name, w in zip(names, of_all, strict=True)]
        found = {"models": dict.fromkeys(names), "against": ["sft"], "judges": {"g": "g"}, "wins": entries}
        chosen = verdict.policy_to_ship(found)
        assert chosen is not None
        said.append(int(re.search(r"by g it wins (\d+)%", chosen["words"])[1]))  # type: ignore[index]
    assert np.mean(said) == pytest.approx(50, abs=3)


def test_a_policy_that_training_chose_is_judged_on_other_prompts(recipe: Recipe, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "heldout": 0.4}
    chooses = replace(
        recipe, sft=None, reward=None, ptx=None, ppo={**changes, "reward_funcs": (f"{__file__}:ends_low",)}
    )
    summary = run(chooses, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    start = [row["model"] for row in rows].index("base")
    chose, reported = ({row["prompt"] for row in part} for part in (rows[:start], rows[start:]))
    assert chose and reported and not chose & reported
    assert (
        len(chose | reported)
        == json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["ppo"]["data"]["heldout_prompts"]
    )
    assert summary["models"]["ppo"]["win_rate_vs_sft"]["prompts"] == len(reported)
    found = evaluate(tmp_path / "run", EvaluationSettings(models=("ppo",)))
    assert {row["prompt"] for row in answers_of(tmp_path / "run")} == reported
    assert any("chose the policy" in sentence for sentence in found["warnings"])


def test_what_is_to_be_distrusted_is_said() -> None:
    found = result([0.5, 0.7, 0.4], [0.5, 0.8, 0.95])
    rng = np.random.default_rng(0)
    scores = {
        judge: {
            name: (1.0 * of["means"][judge] + 0.1 * rng.normal(size=200)).tolist()
            for name, of in found["models"].items()
        }
        for judge in ("gold", "reward")
    }
    found["models"]["ppo"]["behaviour"] |= {"tokens": 20.0, "kl": 30.0, "kl_per_token": 1.5, "refusals": 0.4}
    said = " ".join(verdict.evaluation_warnings(found, scores))
    for part in ("over-optimised", "length grew", "far from the reference", "refuses 40%", "pleases the reward model"):
        assert part in said
    calm = result([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert verdict.evaluation_warnings(calm, {}) == []


def said_of(models: int, prompts: int, each: int, fall: float, seed: int) -> bool:
    """Whether over-optimisation is said of so many policies of equal quality, the last lower by `fall` and rewarded.

    Answers to one prompt are alike, within a model and between models.
    """
    rng, names = np.random.default_rng(seed), ["sft", *(f"ppo/checkpoint-{i}" for i in range(models - 1)), "ppo"]
    shared, own = rng.normal(size=(prompts, 1)), rng.normal(size=(models + 1, prompts, 1))
    gold = 0.7 * shared + 0.5 * own + 0.5 * rng.normal(size=(models + 1, prompts, each))  # (models, prompts, each)
    gold[-1] -= fall
    scores = {
        "gold": dict(zip(names, gold.reshape(models + 1, -1).tolist(), strict=True)),
        "reward": {name: [float(i)] * (prompts * each) for i, name in enumerate(names)},
    }
    panel = {"tokens": 8.0, "refusals": 0.0, "repetition": 0.0, "without_eos": 0.0, "distinct_2": 0.5}
    of_models = {name: {"behaviour": panel, "means": {}} for name in names}
    found = {"prompts": prompts, "samples": each, "against": ["sft"], "models": of_models, "wins": []}
    said = verdict.evaluation_warnings({**found, "judges": {"gold": "g", "reward": "r"}}, scores)
    return any("over-optimised" in sentence for sentence in said)


@pytest.mark.parametrize("models", [2, 5, 20])
def test_equal_policies_are_seldom_called_over_optimised(models: int) -> None:
    for prompts, each in ((20, 1), (100, 1), (25, 4)):
        alarms = np.mean([said_of(models, prompts, each, 0.0, seed) for seed in range(150)])
        assert alarms <= 0.05 + 0.035, (prompts, each)  # 150 draws of 5 % have a standard error of 1.8 points
        assert np.mean([said_of(models, prompts, each, 0.9, seed) for seed in range(20)]) >= 0.6, "it has power"


# --- What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--models", "pop"], "has no finished model 'pop'"),
        (["--models", "nowhere:ppo"], "is no run folder"),
        (["--judge", "nobody"], "it is none of gold, people, reward and judge"),
        (["--judge", "people:nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--judge", "math:nothing"], "has no function 'nothing'"),
        (["--judge", "http://127.0.0.1:9", "--retries", "0"], "failed, after 0 retries"),
        (["--tasks", "no_such_task"], "the harness has no task 'no_such_task'"),
        (["--tasks", "tax", "--task-dir", "nowhere"], "--task-dir: there is no folder nowhere"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--response-length", "100000"], "leaves no room"),
        (["--prompts", "nowhere.jsonl"], "--prompts: there is no file nowhere.jsonl"),
    ],
)
def test_a_users_error_comes_before_any_weight(
    finished: Path,
    words: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_recipes.evaluate.models.load_base", lambda *args: pytest.fail("a weight was loaded"))
    assert part in error_of(capsys, ["evaluate", str(finished), *words])


def test_prompts_that_training_saw_are_left_out(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    assert recipe.ppo is not None
    found = evaluate(
        finished, EvaluationSettings(prompts=recipe.ppo.data, models=("ppo",), judges=("gold",)), tmp_path / "all"
    )
    assert found["prompts"] < 40 and any("the run was trained on them" in words for words in found["warnings"])
    seen = write(tmp_path / "seen.jsonl", [{"prompt": "w5 w6"}])
    found = evaluate(
        finished, EvaluationSettings(prompts=str(seen), models=("ppo",), judges=("gold",)), tmp_path / "new"
    )
    assert found["prompts"] == 1


def test_a_run_without_any_judge_says_so(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("reward", "evaluation"))
    settings = json.loads((bare / "recipe.json").read_text())
    (bare / "recipe.json").write_text(json.dumps({**settings, "gold": None}))
    with pytest.raises(ValueError, match="has neither gold nor a reward model: name a --judge"):
        evaluate(bare)
    with pytest.raises(ValueError, match=r"knows no true quality"):
        evaluate(bare, EvaluationSettings(judges=("gold",)))
    with pytest.raises(ValueError, match=r"no finished reward model of that name \(set reward\.judge_share\)"):
        evaluate(bare, EvaluationSettings(judges=("judge",)))
