"""A run in a notebook: its curves, its last answers and the time that is left, in the cell that runs it."""

import html
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..records.files import RowsReader
from ..report.cell import render_cell
from ..report.gather import gather

REST = 100  # times as long as it took to draw the cell nothing is drawn: it costs a run less than 1 %
HEIGHT = 460  # pixels of the cell


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class ShowInNotebook(TrainerCallback):
    """Draws the run in the notebook's cell, from what the run folder says, while its stages log."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.read = run_dir, RowsReader()
        self.shown: Any = None  # IPython's handle
        self.rested = 0.0  # when it may be drawn again, on the monotonic clock

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() >= self.rested:
            self.draw()

    def draw(self) -> None:
        """Show the run as it is now."""
        from IPython.display import HTML, display

        start = time.monotonic()
        page = html.escape(render_cell(gather([self.run_dir], self.read)))
        # A frame keeps the page's style from the notebook. No script runs in it.
        frame = f'<div><iframe sandbox srcdoc="{page}" width="100%" height="{HEIGHT}" style="border: 0"></iframe></div>'
        if self.shown is None:
            self.shown = display(HTML(frame), display_id=True)
        else:
            self.shown.update(HTML(frame))
        self.rested = time.monotonic() + REST * (time.monotonic() - start)
