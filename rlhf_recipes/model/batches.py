"""How many rows go through a model at once: the one rule for all that runs without gradients."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from .memory import halved, ran_out

# Tokens that go through the model at one time where there is no gradient: more of them keep no GPU busier.
TOKENS_AT_ONCE = 2**13


@dataclass
class Batches:
    """Batches of at most `size` rows, and of fewer from when memory has run out."""

    size: int
    option: str | None = None  # what sets the size, named where memory runs out; None: running out is an error

    def run_whole(self, work: Callable[[int], None]) -> None:
        """Call `work` with how many rows may be under way, and again with half as many where memory runs out."""
        if self.option is None:
            return work(self.size)
        while ran_out(lambda: work(self.size)):
            self.size = halved(self.size, self.option)

    def run(
        self,
        lengths: Tensor,
        work: Callable[[Tensor], None],
        tokens_at_once: int | None = None,
        of_one_length: bool = False,
        doing: str = "scoring",
    ) -> None:
        """Call `work` with the indices of each batch's rows. Rows of like length share one: little of it is padding.

        On a terminal, a bar shows how far it is where that takes longer than a second.

        Args:
            lengths: (B,) tokens of each row, on the CPU.
            tokens_at_once: a batch has no more tokens than this, padding included, unless a single row has.
            of_one_length: no batch has padding.
            doing: what the bar calls it.
        """
        order = lengths.argsort(stable=True)  # (B,)
        lengths = lengths[order]
        start = 0
        with tqdm(total=len(order), desc=doing, unit="row", leave=False, delay=1, disable=None) as bar:
            while start < len(order):
                rows = min(self.size, len(order) - start)
                while tokens_at_once and rows > 1 and rows * int(lengths[start + rows - 1]) > tokens_at_once:
                    rows -= 1
                if of_one_length:
                    rows = int((lengths[start : start + rows] == lengths[start]).sum())
                batch = functools.partial(work, order[start : start + rows])
                if self.option is None:
                    batch()
                elif ran_out(batch):
                    self.size = halved(rows, self.option)
                    continue
                start += rows
                bar.update(rows)
