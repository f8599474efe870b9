"""The process of a sweep's variant: it runs what standard input orders, and ends with its parent."""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from threading import Thread

from ..recipe.overrides import from_dict
from .command import exit_codes


def end_with_parent() -> None:
    """End this process when its input does. A parent that is killed must leave no writer in a folder to be resumed."""
    os.read(0, 1)  # not sys.stdin.read, whose lock the interpreter wants when it ends
    os._exit(1)


def run_ordered() -> None:
    """Run what standard input orders: the process of a variant."""
    from ..pipeline.run import run

    order = json.loads(sys.stdin.readline())
    Thread(target=end_with_parent, daemon=True).start()
    with exit_codes():
        at = None if order["stop_at"] is None else datetime.fromtimestamp(order["stop_at"])
        options = {"stages": order["stages"], "force": order["force"], "wait": order["wait"], "stop_at": at}
        run(from_dict(order["recipe"]), Path(order["run_dir"]), **options)


if __name__ == "__main__":
    run_ordered()
