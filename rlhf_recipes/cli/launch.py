"""Starting a run in several processes: torchrun's own launcher, and one message where one of them fails."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

from ..records.terminal import printable


def launch(processes: int, words: Sequence[str]) -> None:
    """Run Python with these words in so many processes of this machine.

    Where one of them raises, dies or is killed, the others are ended, what happened is printed, and this process exits:
    with 2 after a user's error, else with 1. SIGINT and SIGTERM stop them as they stop one process.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from ..stages.stop import STOPPED

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it would say each failure once more
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    stopped_by = [signal.SIGINT]

    def stop_in_order(number: int, frame: Any) -> None:
        stopped_by[:] = [signal.Signals(number)]
        raise SignalException("stopped", signal.SIGINT)  # what the processes are sent: SIGTERM would end them at once

    signal.signal(signal.SIGTERM, stop_in_order)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
        shutdown_timeout=24 * 3600,  # for the step under way, and its checkpoint
    )
    try:
        elastic_launch(config, sys.executable)(*words)
    except SignalException as error:
        raise SystemExit(128 + stopped_by[0]) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in STOPPED:  # by the clock
            raise SystemExit(failure.exitcode) from error
        said = failure.message if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        end_after_failure(rank, processes, failure.error_file_data["message"], said, error)


def end_after_failure(rank: int, processes: int, written: Any, otherwise: str, error: Exception) -> NoReturn:
    """Say which process failed and why, and exit: with 2 after a user's error, else with 1.

    Args:
        written: what `model.processes.reported` wrote of it; anything but a dict where that wrote nothing.
        otherwise: what is said then.
    """
    is_users, said = False, otherwise
    if isinstance(written, dict):
        kind, _, said = written["message"].partition(": ")
        is_users = kind == "ValueError"
        if not is_users:
            print(printable(written["extraInfo"]["py_callstack"], keep="\n\t"), file=sys.stderr)
            said = written["message"]
    print(printable(f"error: process {rank} of {processes}: {said}", keep="\n\t"), file=sys.stderr)
    if not is_users:
        print("the others were ended; run the same command again to resume", file=sys.stderr)
    raise SystemExit(2 if is_users else 1) from error
