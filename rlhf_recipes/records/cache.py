"""The user's cache: what is kept beside all run folders."""

import os
from pathlib import Path

from huggingface_hub.constants import HF_HOME


def cache_folder() -> Path:
    """Where bases that a function builds, dry runs and `own_runs` are kept: $RLHF_RECIPES_CACHE, or beside HF_HOME."""
    return Path(os.environ.get("RLHF_RECIPES_CACHE") or Path(HF_HOME).parent / "rlhf_recipes").expanduser()
