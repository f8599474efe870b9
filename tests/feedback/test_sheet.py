"""The sheet of questions about each response: its file, what may be answered, and the page in a real Chromium."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from support.label_page import done, press, serving, shown
from support.worded import read, write

from rlhf_recipes.feedback.board import Board
from rlhf_recipes.feedback.rows import read_judgements, read_samples
from rlhf_recipes.feedback.sheet import DEFAULT, Question, read_sheet
from rlhf_recipes.report.access import Refusal

SHEET = """
- {name: quality, ask: Overall quality, steps: 3}
- {name: made_up, ask: Makes something up, help: "It isn't <b>so</b>."}
"""
# Half a kilobyte that stands for 10 ** 10 texts.
BOMB = "- name: q\n  ask: a\n  steps:\n    - &a0 [x]\n" + "".join(
    f"    - &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11)
)


def write_sheet(folder: Path, text: str = SHEET) -> Path:
    path = folder / "sheet.yaml"
    path.write_text(text)
    return path


def write_pairs(folder: Path, count: int) -> Path:
    rows = [{"id": f"s{n}", "prompt": f"Prompt {n}", "responses": [f"{n}.0", f"{n}.1"]} for n in range(count)]
    return write(folder / "samples.jsonl", rows)


def test_the_shipped_sheet_is_instructgpts() -> None:
    sheet = {question.name: question for question in read_sheet()}
    assert len(sheet) == 12 and sheet["quality"].steps == 7
    assert all(question.steps is None for name, question in sheet.items() if name != "quality")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- [", "cannot be read as YAML"),
        ("- {name: &a x, ask: *a}", "write out what the alias (*name) stands for"),
        (BOMB, "write out what the alias"),
        ("name: x", "must be a list of questions"),
        ("[]", "must be a list of questions"),
        ("- x", "entry 1: a question has `name` and `ask`"),
        ("- {name: x}", "entry 1: a question has `name` and `ask`"),
        ("- {name: x, ask: y, scale: 3}", "and nothing else"),
        ("- {name: x y, ask: z}", "`name` must be 1 to 40 letters"),
        ("- {name: x, ask: no}", "`ask` must be text"),
        ("- {name: x, ask: y, help: }", "`help` must be text"),
        ("- {name: x, ask: y, steps: 1}", "`steps` must be a whole number from 2 to 10"),
        ("- {name: x, ask: y, steps: true}", "`steps` must be a whole number from 2 to 10"),
        ("- {name: x, ask: y}\n- {name: x, ask: z}", "entry 2: another question is called 'x'"),
    ],
)
def test_a_file_that_is_no_sheet_is_named(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ValueError, match="--sheet: ") as error:
        read_sheet(write_sheet(tmp_path, text))
    assert part in str(error.value) and "sheet.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sheet": None}, "the answers of 2 responses"),
        ({"sheet": [{"quality": 1, "made_up": True}]}, "the answers of 2 responses"),
        ({"sheet": [{"quality": 1}, {"quality": 1}]}, "an answer to each question"),
        ({"sheet": [{"quality": 1, "made_up": True, "x": 1}] * 2}, "and to no other"),
        ({"sheet": [{"quality": 4, "made_up": True}] * 2}, "quality must be a whole number from 1 to 3"),
        ({"sheet": [{"quality": True, "made_up": True}] * 2}, "quality must be a whole number"),
        ({"sheet": [{"quality": 1, "made_up": 1}] * 2}, "made_up must be true or false"),
        ({"all_bad": True}, "only of responses that tie"),
        ({"all_bad": "x", "ranking": [1, 1]}, "true or false"),
    ],
)
def test_a_wrong_answer_is_refused_and_not_written(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    sheet = (Question("quality", "Q", 3), Question("made_up", "M"))
    board = Board(read_samples(write_pairs(tmp_path, 1)), tmp_path / "labels.jsonl", 1.0, 0, sheet)
    said = {"id": "s0", "ranking": [1, 2], "seconds": 1, "sheet": [{"quality": 1, "made_up": True}] * 2} | changes
    with pytest.raises(Refusal, match=part) as error:
        board.rank("Ann", said)
    assert error.value.status == 422 and not (tmp_path / "labels.jsonl").exists()


def test_a_sheet_is_filled_in_and_kept_with_its_response(tmp_path: Path, opened: Callable[[str, str], Page]) -> None:
    labels = tmp_path / "labels.jsonl"
    with serving(write_pairs(tmp_path, 3), sheet=write_sheet(tmp_path)) as link:
        page = opened(link, "Ann")
        texts = shown(page)
        press(page, "2 Enter")
        expect(page.locator("#said")).to_have_text("Response 1: Overall quality is missing.")
        # The first step of the scale has the focus, and the keyboard alone goes on from there.
        press(page, "Tab Space")
        page.get_by_role("button", name="Response 2: Overall quality 3 of 3").click()
        page.get_by_role("button", name="Response 2: Makes something up").click()
        page.reload()  # the draft is kept
        expect(page.locator(".sheet button[aria-pressed=true]")).to_have_text(["2", "3", "Makes something up"])
        press(page, "Control+Enter")
        done(page, 1, 3)
        (row,) = read(labels)
        sheet = dict(zip(row["responses"], row["sheet"], strict=True))
        assert [sheet[text] for text in texts] == [{"quality": 2, "made_up": False}, {"quality": 3, "made_up": True}]
        assert dict(zip(row["responses"], row["ranking"], strict=True)) == {texts[0]: 2, texts[1]: 1}

        press(page, "b")
        expect(page.locator("#bad")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#tie")).to_have_attribute("aria-pressed", "false")
        for response in (1, 2):
            page.get_by_role("button", name=f"Response {response}: Overall quality 1 of 3").click()
        press(page, "Control+Enter")
        done(page, 2, 3)
        assert (read(labels)[1]["ranking"], read(labels)[1]["all_bad"]) == ([1, 1], True)
        press(page, "u")
        done(page, 1, 3)
        expect(page.locator("#bad")).to_have_attribute("aria-pressed", "true")
        expect(page.locator(".sheet button[aria-pressed=true]")).to_have_text(["1", "1"])
        press(page, "= Control+Enter")
        done(page, 2, 3)
        assert "all_bad" not in read(labels)[1]
    assert len(read_judgements([labels])) == 2


WORK = """async count => {
  const shown = document.getElementById("count"), milliseconds = [];
  for (let judged = 1; judged <= count; judged++) {
    const start = performance.now();
    const next = new Promise(resolve => new MutationObserver(resolve).observe(shown, {childList: true}));
    for (const scale of document.querySelectorAll(".scale")) scale.querySelectorAll("button")[3].click();
    const prompt = document.getElementById("prompt");
    for (const key of ["1", "Enter"])
      prompt.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
    await next;
    if (!shown.textContent.startsWith(`${judged} of ${count}`)) throw new Error(shown.textContent);
    milliseconds.push(performance.now() - start);
  }
  return milliseconds;
}"""


@pytest.mark.long
def test_a_thousand_pairs_with_the_shipped_sheet_take_no_waiting(
    tmp_path: Path, opened: Callable[[str, str], Page]
) -> None:
    with serving(write_pairs(tmp_path, 1000), sheet=DEFAULT) as link:
        milliseconds = opened(link, "Ann").evaluate(WORK, 1000)
    rows = read(tmp_path / "labels.jsonl")
    assert len(rows) == 1000 and all(row["sheet"][0]["quality"] == 4 for row in rows)
    print(f"median {median(milliseconds):.1f} ms, of the last hundred {median(milliseconds[-100:]):.1f}")
    assert median(milliseconds[-100:]) < 3 * median(milliseconds[:100])
