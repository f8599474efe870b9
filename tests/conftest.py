"""What every test needs before torch is imported: one thread (faster for tiny tensors), no network, its own cache."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}
if "RLHF_RECIPES_CACHE" not in os.environ:
    # Made by the first process; the workers of pytest-xdist inherit the variable. It is removed when that process ends.
    _cache = tempfile.TemporaryDirectory(prefix="rlhf-recipes-tests-")
    os.environ["RLHF_RECIPES_CACHE"] = _cache.name


# Files whose tests take longest. They come first, so that at the end no worker waits for another.
LONGEST = [
    "test_notebooks",
    "test_recipe_runs",
    "test_run",
    "test_sweep",
    "test_plan",
    "test_rounds",
    "test_evaluation",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files, and skip the tests marked `gpu` where there is no CUDA device."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def libraries() -> None:
    """Import what nearly every test needs, and spare the garbage collector those million objects at each collection."""
    import rlhf_recipes.pipeline.run  # noqa: F401

    gc.collect()
    gc.freeze()


NEEDS = {"a GPU": "needs a CUDA device", "vLLM": "needs vLLM", "`make parity`": "make parity"}  # -> part of the reason


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say at last how many tests were skipped for want of what."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or hasattr(config, "workerinput"):  # a process of pytest-xdist
        return
    reasons = [str(report.longrepr) for report in terminal.stats.get("skipped", ())]
    counts = {what: sum(part in reason for reason in reasons) for what, part in NEEDS.items()}
    others = len(reasons) - sum(counts.values())
    parts = [f"{count} need {what}" for what, count in counts.items() if count]
    parts += [f"{others} for other reasons, see above"] * bool(others)
    if parts:
        terminal.write_line(f"Skipped: {', '.join(parts)}.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright_api = pytest.importorskip("playwright.sync_api")  # not where tests run on a GPU
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    flags = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"]
    flags += ["disable-sync", "no-first-run"]
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in flags])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[str, str], Any]]:
    """Opens the link, as a Page, in a browser profile of its own, under a name. No script may fail on any page."""
    from playwright.sync_api import Page, expect

    contexts, errors = [], []

    def open_page(link: str, name: str) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(link)
        page.keyboard.type(name)  # the field has the focus
        page.keyboard.press("Enter")
        expect(page.locator("#labeler")).to_have_text(name)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
