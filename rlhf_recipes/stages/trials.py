"""What the libraries make of some settings once a model is there, made of one weight before anything is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from ..recipe.overrides import suggestion

STEPS = 1_000  # of the schedule that is tried


def try_settings(stage: str, config: Any) -> None:
    """Raises ValueError, naming the key, for an optimizer, a schedule, or loading that cannot be made.

    Args:
        config: a stage's configuration.
    """
    # Their annotations ask for a PreTrainedModel and a Dataset; any module and any sequence do.
    model = torch.nn.Linear(1, 1)
    with _naming(f"{stage}.optim={OptimizerNames(config.optim).value}, with its optim_args and adam_* settings,"):
        kind, options = Trainer.get_optimizer_cls_and_kwargs(config, model)  # type: ignore[arg-type]
        optimizer = kind(model.parameters(), **options)
    schedule = SchedulerType(config.lr_scheduler_type).value
    with _naming(f"{stage}.lr_scheduler_type={schedule}, with lr_scheduler_kwargs={config.lr_scheduler_kwargs},"):
        warmup = config.get_warmup_steps(STEPS)
        get_scheduler(config.lr_scheduler_type, optimizer, warmup, STEPS, config.lr_scheduler_kwargs)
    if kwargs := config.gradient_checkpointing_kwargs:  # the same by its two names
        with _naming(f"{stage}.gradient_checkpointing_kwargs or activation_checkpointing_kwargs={kwargs}"):
            checkpoint(model, torch.zeros(1), **{"use_reentrant": False, **kwargs})
    if config.torch_compile and config.torch_compile_backend not in (known := torch.compiler.list_backends(())):
        raise ValueError(
            f"There is no {stage}.torch_compile_backend={config.torch_compile_backend}."
            f"{suggestion(config.torch_compile_backend, known)}"
        )
    workers = config.dataloader_num_workers
    with _naming(f"{stage}.dataloader_num_workers={workers}, with the other dataloader options,"):
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=config.dataloader_persistent_workers,
            prefetch_factor=config.dataloader_prefetch_factor,
            multiprocessing_context=config.dataloader_multiprocessing_context,
        )
    if getattr(config, "activation_offloading", False) and config.use_cpu:
        raise ValueError(
            f"{stage}.activation_offloading takes activations off a GPU, and there is none: switch it off."
        )
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(f"{stage}.use_liger_kernel needs a package: pip install liger-kernel.")


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """A block in which whatever a library raises is the user's error."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(f"{what} cannot be used: {first[0]}") from error
