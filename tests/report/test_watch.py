"""The page that grows with its runs: what is read of growing files, who is let in, and the page in a real Chromium."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from support.command_line import error_of, start
from support.label_page import TOKEN, Client, answering
from support.paths import ROOT
from support.report_run import PROMPTS, measured, write, write_run

from rlhf_recipes.cli.watch import watched as watched_beside
from rlhf_recipes.records.files import RowsReader, read_rows
from rlhf_recipes.report import watch
from rlhf_recipes.report.access import Access
from rlhf_recipes.report.gather import gather
from rlhf_recipes.report.watch import WatchedRuns, watch_app


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def begin_ppo(folder: Path) -> Path:
    """A run in the middle of PPO: 20 updates are done, and one evaluation."""
    write_run(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["ppo"] |= {"state": "running"}
    del manifest["stages"]["ppo"]["results"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    metrics = read_rows(folder / "metrics.jsonl")
    write(folder / "metrics.jsonl", [row for row in metrics if row["stage"] != "ppo" or row["step"] <= 20])
    write(folder / "samples.jsonl", evaluation(20))
    return folder


def evaluation(step: int) -> list[dict[str, Any]]:
    """What an evaluation during PPO leaves: the policy's answer to each prompt, the later the better."""
    return [
        {"stage": "ppo", "step": step, "model": "ppo", "prompt": prompt, "completion": f"at {step}: {n}"}
        | {"response_length": 3, "ended": True, "kl": 0.1, "score": step / 10 + n / 100, "gold": 0.0}
        for n, prompt in enumerate(PROMPTS)
    ]


def far() -> dict[str, Any]:
    """What a run says of its progress."""
    return {"stage": "ppo", "round": 1, "step": 20, "steps": 1400, "seconds": [9000, 9000], "then": []}


# --- Growing files ----------------------------------------------------------------------------------------------------


def test_of_a_growing_file_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "rows.jsonl", RowsReader()
    assert read(path) == []
    rows = [{"step": n} for n in range(1000)]
    write(path, rows)
    assert read(path) == rows
    append(path, {"step": 1000})
    parsed: list[bytes] = []
    monkeypatch.setattr("rlhf_recipes.records.files.json.loads", lambda line: parsed.append(line) or {"step": 1000})
    assert read(path) == [*rows, {"step": 1000}] and parsed == [b'{"step": 1000}\n']


def test_what_a_writer_does_to_a_file_is_seen(tmp_path: Path) -> None:
    path, read = tmp_path / "rows.jsonl", RowsReader()
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read(path) == [{"a": 1}], "the second line may have more to come"
    append(path)
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 3}\n{"a": 4}\n')
    assert read(path) == [{"a": 1}, {"a": 3}, {"a": 4}], "a resumed stage drops rows, and writes others"
    path.write_text('{"a": 1}\n')
    assert read(path) == [{"a": 1}]
    path.write_text('{"a": 1}\nno row\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2: not JSON"):
            read(path)
    path.write_text('{"a": 1}\n{"a": 5}\n')
    assert read(path) == [{"a": 1}, {"a": 5}]
    path.unlink()
    assert read(path) == []


def test_the_answers_of_a_run_in_the_middle_are_those_of_its_first_and_last_evaluation(tmp_path: Path) -> None:
    folder = begin_ppo(tmp_path / "run")
    assert {row["model"] for row in gather([folder])[0].answers} == {"ppo/update-20"}
    append(folder / "samples.jsonl", *evaluation(30), *evaluation(40))
    answers = gather([folder])[0].answers
    assert [row["completion"] for row in answers if row["model"] == "ppo/update-40"][:2] == ["at 40: 0", "at 40: 1"]
    assert {row["model"] for row in answers} == {"ppo/update-20", "ppo/update-40"}


def test_a_run_says_how_far_it_is(tmp_path: Path) -> None:
    folder = begin_ppo(tmp_path / "run")
    (folder / "progress.json").write_text(json.dumps(far()))
    html = WatchedRuns([folder]).drawn().html
    assert "<span>PPO: update 20 of 1,400</span><span>about 2.5 h left</span>" in html
    assert '<progress max="1400" value="20">' in html and "This stage is not finished" not in html
    (folder / "progress.json").write_text(json.dumps({**far(), "stage": "reward-judge"}))
    assert gather([folder])[0].progress is None, "of a stage that is done"


def test_a_page_is_drawn_again_when_files_have_changed_and_it_has_rested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin_ppo(tmp_path / "run")
    runs = WatchedRuns([folder])
    first = runs.drawn()
    assert runs.drawn() is first
    append(folder / "metrics.jsonl", {"stage": "ppo", "step": 21, **measured(9.0)})
    assert runs.drawn() is first, "a run beside it needs the processor"
    runs.rested = 0.0
    second = runs.drawn()
    assert second.version != first.version and runs.drawn() is second
    runs.rested = 0.0
    (folder / "manifest.json").write_text("{")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
            runs.drawn()


# --- Who is let in ----------------------------------------------------------------------------------------------------


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(watch, "REST", 0)
    with answering(watch_app([begin_ppo(tmp_path / "run")], Access(TOKEN))) as link:
        yield link


def test_only_who_has_the_token_sees_a_run(link: str) -> None:
    client = Client(link)
    for path in ("/", "/?token=", "/?token=another", "/changes", "/changes?token=a-token"):
        assert client("GET", path)[0] == 403
    assert client("GET", "/changes", Cookie=f"page-000000000000={TOKEN}")[0] == 403
    status, headers, page = client("GET", "/", Cookie=client.cookie)
    assert status == 200 and "RLHF report" in page and headers["cache-control"] == "no-store"
    assert client("GET", "/", Cookie=client.cookie, Host="evil.example")[0] == 400
    assert client("POST", "/changes", Cookie=client.cookie)[0] == 405
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', page)[0].replace("&#39;", "'")
    assert "connect-src 'self'; " in policy and "unsafe" not in policy and "trusted-types 'none'" in policy


def test_what_cannot_be_watched_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run folder" in error_of(capsys, ["watch", str(tmp_path)])
    run = str(write_run(tmp_path / "run"))
    assert "cannot listen at 99999" in error_of(capsys, ["watch", run, "--port", "99999"])


def test_the_command_prints_its_link_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "rlhf_recipes", "watch", str(write_run(tmp_path / "run")), "--port", "0"]
    with start(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        link = process.stdout.readline().removeprefix("Open ").strip()
        token = link.partition("token=")[2]
        assert Client(link, token).page.startswith("<!doctype html>")
        process.send_signal(2)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


def test_a_page_beside_a_run_comes_and_ends_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def printed(within: float = 30.0) -> str:
        end, found = time.monotonic() + within, ""
        while "\n" not in found and time.monotonic() < end:
            time.sleep(0.1)
            found += capfd.readouterr().out
        return found

    with watched_beside(tmp_path / "run"):
        assert printed(4.0) == "", "there is no run yet"
        begin_ppo(tmp_path / "run")
        link = re.match(r"Open (\S+)\n", printed())
        assert link
        client = Client(link[1], link[1].partition("token=")[2])
    assert "<!doctype html>" in client.page
    with pytest.raises(ConnectionRefusedError):
        client("GET", "/")


def test_a_page_beside_a_run_that_never_begins_ends_too(tmp_path: Path) -> None:
    with watched_beside(tmp_path / "run"):
        pass


# --- The page in Chromium ---------------------------------------------------------------------------------------------


@pytest.fixture
def watched(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a link. No script may fail on the page, and nothing may be refused."""
    contexts, alarms = [], []

    def open_page(link: str, width: int = 1280) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: alarms.append(str(error)))
        page.on("console", lambda message: alarms.append(message.text))
        page.goto(link)
        expect(page.locator("#grows")).to_contain_text("it grows by itself")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [alarm for alarm in alarms if "ERR_" not in alarm] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_grows_and_the_reader_keeps_his_place(
    link: str, tmp_path: Path, watched: Callable[..., Page], width: int
) -> None:
    folder, page = tmp_path / "run", watched(link, width)
    assert "token" not in page.url
    page.evaluate("() => { window.same = true; }")
    settings = page.locator("details", has_text="settings").first
    settings.locator("summary").click()
    page.locator("select[name=order]").select_option("longest answer first")
    page.get_by_label("Search").fill("question")
    page.get_by_role("button", name="Show more").click()
    page.get_by_label("Search").focus()
    page.locator(".prompt[data-number='12']").evaluate("row => row.scrollIntoView()")
    place = page.locator(".prompt[data-number='12']").bounding_box()
    curve = page.locator("#ppo figure > svg > title").first
    expect(curve).to_contain_text("Reward. training: from 0.025 to 0.5")

    append(folder / "metrics.jsonl", *({"stage": "ppo", "step": n, **measured(n / 9)} for n in range(21, 31)))
    append(folder / "metrics.jsonl", *({"stage": "dpo", "step": n, "loss": 1 / n} for n in (1, 2, 3)))
    append(folder / "samples.jsonl", *evaluation(30))
    expect(page.locator("#dpo h2")).to_have_text("DPO")
    expect(page.locator("nav a", has_text="DPO")).to_have_count(1)
    expect(curve).to_contain_text("Reward. training: from 0.025 to 3.33")
    order = [section.get_attribute("id") for section in page.locator("main > section").all()]
    assert order[:2] == ["warnings", "ppo"], "first what is going on"
    assert order[-3:] == ["dpo", "overoptimisation", "resources"]
    expect(page.locator(".prompt").first.locator(".answer h4")).to_contain_text(["PPO/update-20", "PPO/update-30"])
    assert settings.get_attribute("open") is not None, "what was opened stays open"
    expect(page.get_by_label("Search")).to_have_value("question")
    expect(page.get_by_label("Search")).to_be_focused()
    expect(page.locator("select[name=order] option:checked")).to_have_text("longest answer first")
    expect(page.locator(".prompt")).to_have_count(len(PROMPTS))
    now = page.locator(".prompt[data-number='12']").bounding_box()
    assert place is not None and now is not None and abs(place["y"] - now["y"]) < 3, "what is read stays in its place"
    page.keyboard.type("!")
    expect(page.locator("#found")).to_contain_text("0 of 30")
    assert page.evaluate("() => window.same"), "it was not loaded anew"
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_what_cannot_be_read_and_a_server_that_has_ended_are_said(
    tmp_path: Path, watched: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REST", 0)
    folder = begin_ppo(tmp_path / "run")
    with answering(watch_app([folder], Access(TOKEN))) as link:
        page = watched(link)
        whole = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text("{")
        expect(page.locator("#grows.stopped")).to_contain_text("manifest.json: not JSON")
        (folder / "manifest.json").write_text(whole)
        expect(page.locator("#grows")).to_contain_text("it grows by itself")
    expect(page.locator("#grows.stopped")).to_contain_text("The server does not answer. This is how it was at")
    expect(page.locator("#ppo h2")).to_be_visible()
