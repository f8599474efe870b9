"""Starting a run in the workers of a Ray cluster: each starts the process that torchrun would have started."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .launch import end_after_failure

LOST = 3  # so often a run goes on by itself without what it has lost


class ProcessFailed(Exception):
    """A worker's process ended. Args: its exit code, and what `model.processes.reported` wrote of it, or None."""


def launch_on_ray(address: str, workers: int, words: Sequence[str], run_dir: Path) -> None:
    """Run Python with these words in so many workers of a Ray cluster, with a GPU each where the cluster has GPUs.

    Python, this package, the working directory and the run folder must be the same on all machines. Where a worker or
    its process is lost, the run goes on from its last checkpoint in as many workers as before.

    Raises ValueError without Ray. Exits as `launch` does.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.train import (  # pyright: ignore[reportMissingImports]
            RunConfig,
            ScalingConfig,
            WorkerGroupError,
        )
        from ray.train.torch import TorchConfig, TorchTrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("--ray needs a package: pip install 'rlhf_recipes[ray]'.") from error
    from ..stages.stop import STOPPED

    ray.init(address)
    scratch = run_dir.resolve() / "ray"
    mark = scratch / uuid.uuid4().hex
    scratch.mkdir(parents=True, exist_ok=True)
    mark.touch()
    # The process that was lost may hold the folder for a second more.
    order = {"words": [*words, "--wait"], "folder": os.getcwd(), "mark": str(mark)}
    gpus = ray.cluster_resources().get("GPU", 0)
    for attempt in range(LOST + 1):
        trainer = TorchTrainer(
            work,
            train_loop_config=order,
            torch_config=TorchConfig("gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus)),
            run_config=RunConfig(name="workers", storage_path=str(scratch)),
        )
        try:
            trainer.fit()
            break
        except WorkerGroupError as error:
            rank, failure = min(error.worker_failures.items(), key=lambda item: (_is_loss(item[1]), item[0]))
            code, written = failure.args if isinstance(failure, ProcessFailed) else (1, None)
            if code in STOPPED:  # by the clock
                raise SystemExit(code) from error
            if not _is_loss(failure) or attempt == LOST:
                end_after_failure(rank, workers, written, str(failure), error)
            print(f"worker {rank} of {workers} was lost; the run goes on from its last checkpoint", file=sys.stderr)
    shutil.rmtree(scratch, ignore_errors=True)


def _is_loss(failure: Exception) -> bool:
    """Whether a worker is gone, or its process was killed: it is not known to fail again."""
    return not isinstance(failure, ProcessFailed) or failure.args[0] < 0


def work(order: dict[str, Any]) -> None:
    """What each worker does. Ray has said in the environment which it is, and made a group, which agrees on a port.

    Raises ProcessFailed.
    """
    mark = Path(order["mark"])
    if not mark.is_file():
        where = f"{socket.gethostname()} does not see {mark.parent}"
        raise ProcessFailed(
            2, {"message": f"ValueError: {where}: --run-dir must be on storage that all machines share"}
        )
    import torch.distributed as dist
    from torch.distributed.elastic.utils.distributed import get_free_port

    port = [get_free_port() if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(port)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "error.json"
        environment = os.environ | {"MASTER_PORT": str(port[0]), "TORCHELASTIC_ERROR_FILE": str(report)}
        environment.pop("ACCELERATE_TORCH_DEVICE", None)  # the process sees one GPU, whose number is 0
        code = subprocess.call([sys.executable, *order["words"]], cwd=order["folder"], env=environment)
        if code:
            raise ProcessFailed(code, json.loads(report.read_text())["message"] if report.is_file() else None)
