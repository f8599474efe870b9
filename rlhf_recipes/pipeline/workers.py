"""Where the variants of a sweep run that run at once: in processes of this machine, or of a Ray cluster's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from ..model.processes import visible_gpus

LOST = 3  # so often a variant goes on elsewhere whose machine was lost


class Workers(Protocol):
    """What runs variants, each in a process of its own."""

    def run(self, order: dict[str, Any], log: Path) -> int:
        """Run what `cli.variant` takes as an order once there is room. Returns its exit code.

        Raises ValueError where it cannot run there.
        """
        ...

    def stop(self) -> None:
        """Let all that run end behind a checkpoint."""
        ...


class Here:
    """So many processes of this machine, each with its part of the cores and, while there are enough, its own GPU."""

    def __init__(self, jobs: int) -> None:
        self.processes: set[subprocess.Popen[str]] = set()  # that run now
        self.places = SimpleQueue[dict[str, str]]()  # the environments that are free
        gpus, cores = visible_gpus(), max(1, (os.cpu_count() or 1) // jobs)
        for job in range(jobs):
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if gpus else {}
            self.places.put({"OMP_NUM_THREADS": str(cores), **gpu})

    def run(self, order: dict[str, Any], log: Path) -> int:
        """See `Workers`."""
        place = self.places.get()
        try:
            return run_process(order, log, python_path() | place, self.processes)
        finally:
            self.places.put(place)

    def stop(self) -> None:
        """See `Workers`."""
        for process in tuple(self.processes):
            process.terminate()


class OnRay:
    """Tasks of a Ray cluster, each with a core, and a GPU where the cluster has GPUs.

    Python, this package, the working directory and the run folder must be the same on all machines.
    """

    def __init__(self, address: str) -> None:
        """Raises ValueError without Ray."""
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("--ray needs a package: pip install 'rlhf_recipes[ray]'.") from error
        before = signal.getsignal(signal.SIGTERM)
        ray.init(address, ignore_reinit_error=True)
        if signal.getsignal(signal.SIGTERM) is not before:  # Ray's own would end this process at once
            signal.signal(signal.SIGTERM, before)
        self.ray, self.running = ray, set[Any]()
        gpus = min(1, ray.cluster_resources().get("GPU", 0))
        self.task = ray.remote(run_task).options(num_cpus=1, num_gpus=gpus, max_retries=LOST)

    def run(self, order: dict[str, Any], log: Path) -> int:
        """See `Workers`."""
        task = self.task.remote(order, log.resolve(), os.getcwd(), python_path())
        self.running.add(task)
        try:
            return self.ray.get(task)
        finally:
            self.running.discard(task)

    def stop(self) -> None:
        """See `Workers`."""
        for task in tuple(self.running):
            self.ray.cancel(task)


def run_task(order: dict[str, Any], log: Path, folder: str, environment: dict[str, str]) -> int:
    """What a task of Ray's does: as on this machine, from the same folder."""
    if not log.parent.is_dir():
        where = f"{socket.gethostname()} does not see {log.parent}"
        raise ValueError(f"{where}: --run-dir must be on storage that all machines share.")
    os.chdir(folder)
    return run_process(order, log, environment, set())


def run_process(
    order: dict[str, Any], log: Path, environment: dict[str, str], running: set[subprocess.Popen[str]]
) -> int:
    """Run what is ordered in a process of its own, whose output goes to a file. Returns its exit code.

    Args:
        environment: of the process, beside what this one has.
        running: holds the process while it runs.
    """
    with (
        log.open("a") as output,
        subprocess.Popen(
            [sys.executable, "-m", "rlhf_recipes.cli.variant"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | environment,
            text=True,
            start_new_session=True,  # Ctrl-C is heard by the parent, and said to it once
        ) as process,
    ):
        assert process.stdin is not None
        running.add(process)
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            while process.poll() is None:  # its input stays open until it ends: see `cli.variant.end_with_parent`
                time.sleep(0.2)  # and no `wait`, which Ray's cancelling does not interrupt
            return process.returncode
        except KeyboardInterrupt:  # by which Ray cancels a task
            process.terminate()
            return process.wait()
        finally:
            running.remove(process)


def python_path() -> dict[str, str]:
    """What is found here (functions of a recipe, the package itself) is found there too."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
