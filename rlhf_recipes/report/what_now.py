"""What can be done with a run: the section of the report, and the end of the run folder's README.md."""

from collections.abc import Iterator, Sequence
from typing import Any

from .. import __version__
from ..records.folder import model_names
from .blocks import Code, Words
from .gather import RunContents
from .what_was_run import quoted, run_command, where


def what_now(runs: Sequence[RunContents]) -> Iterator[Any]:
    """The commands that go on from one run that has a policy; nothing of several runs."""
    for words, command in next_steps(runs[0]) if len(runs) == 1 else ():
        yield Words(words)
        yield Code(command)


def next_steps(run: RunContents) -> Iterator[tuple[str, str]]:
    """What can be done next, in words, and the command for it, with the run's folder and models in it."""
    models = [name for name in model_names(run.folder) if name != "base" and "checkpoint-" not in name]
    if not models:
        return
    there = quoted(where(run))
    exported = quoted(f"exports/{run.folder.name}")
    if len(models) > 1 and run.evaluation is None:
        yield "Compare its models on held-out prompts:", f"rlhf-recipes evaluate {there}"
    if len(models) > 1:
        yield "Have people compare them, not knowing which is which:", f"rlhf-recipes arena {there}"
    yield "Talk to it:", f"rlhf-recipes chat {there}" + (f" --compare {models[0]}" if len(models) > 1 else "")
    if run.recipe.ppo is not None and run.recipe.reward is not None:
        again = run_command(run, where(run), rounds=len(run.parts) + 1)
        yield "Have people rank what it says, and train on that in another round (it stops and says how):", again
    yield (
        "Write it as a folder for transformers, vLLM and others, or as a file for Ollama:",
        f"rlhf-recipes export {there} --to {exported}",
    )
    yield "Serve it to OpenAI's clients:", f"rlhf-recipes serve {there}"
    yield "Put it on the Hugging Face Hub, with a card of what was measured:", f"rlhf-recipes push {there} ORG/NAME"


def readme(run: RunContents) -> str:
    """The README.md of a run folder."""
    steps = "\n".join(f"{words}\n\n```bash\n{command}\n```\n" for words, command in next_steps(run))
    return f"""\
# {run.name}

A run of rlhf_recipes {__version__}. `report.html` shows it, `recipe.json` has its settings, `summary.json` its results.

## What now

{steps}"""
