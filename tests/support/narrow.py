"""A machine on which only few rows go through a model at once."""

from types import TracebackType
from typing import Any

import torch
from torch import nn


class Narrow:
    """Inside the block, a forward of more rows runs out of memory; what goes through is counted.

    Attributes:
        rows, tokens: of each forward that went through, padding included where rows are not packed.
        refused: how many did not.
    """

    def __init__(self, module: nn.Module, rows: int = 2**20) -> None:
        self.module, self.most = module, rows
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.refused = 0

    def _look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids, starts = kwargs["input_ids"], kwargs.get("cu_seq_lens_q")
        rows = len(ids) if starts is None else len(starts) - 1
        if rows > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.rows.append(rows)
        self.tokens.append(ids.numel())

    def __enter__(self) -> "Narrow":
        self.hook = self.module.register_forward_pre_hook(self._look, with_kwargs=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.hook.remove()
