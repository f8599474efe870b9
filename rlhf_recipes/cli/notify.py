"""A message when a run has ended: a command of the user's own, told how and where."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def notifying(command: str | None, run_dir: Path) -> Iterator[None]:
    """A block behind which the shell runs a command, however the block ends; none where it is None.

    RUN_STATE says how: done, stopped (Ctrl-C, a signal, the clock: the same command goes on) or failed. RUN_DIR says
    where the run is, RUN_ERROR in one line why it failed.
    """
    said = {"RUN_STATE": "done", "RUN_DIR": str(run_dir)}
    try:
        yield
    except KeyboardInterrupt:
        said["RUN_STATE"] = "stopped"
        raise
    except BaseException as error:
        said |= {"RUN_STATE": "failed", "RUN_ERROR": " ".join(str(error).split())}
        raise
    finally:
        if command is not None:
            subprocess.run(command, shell=True, check=False, env=os.environ | said)
