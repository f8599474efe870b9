"""Where the clone stands, and what may stand beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = (
    ROOT.parent / "shared"
)  # models and data that are no part of the project; tests of them skip where it is absent
