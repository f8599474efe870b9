"""A message when a run has ended, or seems to be stuck: a command of the user's own, told which, how and where."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from ..records.progress import PROGRESS
from ..records.terminal import printable

LOOK = 20.0  # seconds between two looks
SILENT = 1800.0  # seconds without a step after which a run may be stuck,
TIMES = 10  # if that is so many times as long as it has ever been silent before

LONGEST = 10_000  # characters of an error that are passed on


@contextmanager
def notifying(command: str | None, run_dir: Path, look: float = LOOK, silent: float = SILENT) -> Iterator[None]:
    """A block behind which the shell runs a command, however the block ends; none where it is None.

    RUN_STATE says how: done, stopped (Ctrl-C, a signal, the clock: the same command goes on) or failed. RUN_DIR says
    where the run is, RUN_ERROR in one line why it failed. While the run works, RUN_STATE=stuck says that it has logged
    nothing for long: once, until it logs again.

    Args:
        look: seconds between two looks at whether it is stuck.
        silent: see `SILENT`.
    """

    def tell(state: str, **more: str) -> None:
        if command is not None:
            said = {"RUN_STATE": state, "RUN_DIR": str(run_dir), **more}
            subprocess.run(command, shell=True, check=False, env=os.environ | said)

    ended = Event()
    if command is not None:
        watching = (run_dir, ended, lambda: tell("stuck"), look, silent)
        Thread(target=_watch_for_silence, args=watching, daemon=True).start()
    state, more = "failed", {}
    try:
        yield
        state = "done"
    except KeyboardInterrupt:
        state = "stopped"
        raise
    except BaseException as error:
        # The system passes on no NUL, no half of a surrogate pair and no 128 KiB in a variable.
        more = {"RUN_ERROR": printable(" ".join(str(error).split()))[:LONGEST]}
        raise
    finally:
        ended.set()
        tell(state, **more)


def _watch_for_silence(run_dir: Path, ended: Event, tell: Callable[[], None], look: float, silent: float) -> None:
    """Call `tell` whenever the run, or all variants of a sweep, have logged nothing for long, until it has ended."""
    logged, since, longest = _last_logged(run_dir), 0.0, 0.0  # since: on the monotonic clock; 0 before the first step
    told = True
    while not ended.wait(look):
        now, last = time.monotonic(), _last_logged(run_dir)
        if last != logged:
            longest = max(longest, now - since) if since else 0.0
            logged, since, told = last, now, False
        elif not told and now - since > max(silent, TIMES * longest):
            told = True
            tell()


def _last_logged(run_dir: Path) -> int:
    """When a step was logged last, in nanoseconds; 0 where none has been."""
    files = [run_dir / PROGRESS, *run_dir.glob(f"*/{PROGRESS}")]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)
