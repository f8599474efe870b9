"""What the command line says of a user's error, and commands in processes of their own."""

import signal
import subprocess
from typing import Any

import pytest

from rlhf_recipes.cli.main import main_cli


def error_of(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The one line that a user's error leaves on stderr."""
    with pytest.raises(SystemExit) as exit:
        main_cli(words)
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process that Ctrl-C ends.

    A shell starts background jobs with SIGINT ignored, which the tests and what they start would inherit.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def failed(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """The last line on stderr, the error, of a command that had begun its work."""
    with pytest.raises(SystemExit) as exit:
        main_cli(words)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
