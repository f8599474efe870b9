"""The Hub itself: who may write where, and uploads that go on where they stopped."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from .push import STAGED, Push, upload_folder

# In a repository that holds an earlier push these would be loaded in place of what is there now.
STALE = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
# What the Hub's client is built on, httpx or httpx2, goes by its version: what it raises where there is no answer is
# the base of the client's own errors.
CLIENT_ERROR: Any = HfHubHTTPError.__bases__[0]
HUB_ERRORS = (CLIENT_ERROR, OSError, RuntimeError)  # the last for large files


def check_hub(pushes: Sequence[Push], public: bool) -> None:
    """Raises ValueError where there is no token, it may not write there, or a repository is not as open as is meant."""
    if get_token() is None:
        raise ValueError("There is no token of the Hub: run `hf auth login`, or set HF_TOKEN.")
    with hub_errors("the Hub"):
        user = HfApi().whoami()
    owner = pushes[0].repo_id.partition("/")[0]
    owners = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
    if owner not in owners:
        raise ValueError(f"{owner}: the token is {user['name']}'s, who can write to {', '.join(owners)}.")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("The token can only read: make one that can write, at https://huggingface.co/settings/tokens.")
    for push in pushes:
        with hub_errors(push.repo_id):
            private = _is_private(push)
        if private is not None and private == public:
            raise ValueError(
                f"{push.repo_id} is there, and is {'private' if private else 'public'}: push "
                f"{'without' if private else 'with'} --public, or change it in its settings on the Hub."
            )


def _is_private(push: Push) -> bool | None:
    """Whether a repository is private; None where there is none."""
    try:
        return HfApi().repo_info(push.repo_id, repo_type=push.repo_type).private
    except RepositoryNotFoundError:
        return None


@contextmanager
def hub_errors(where: str, advice: str = "") -> Iterator[None]:
    """A block that talks to the Hub. Raises ValueError for what goes wrong there."""
    try:
        yield
    except HUB_ERRORS as error:
        words = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ValueError(f"{where}: {words} {advice}".rstrip()) from error


def upload_pushes(run_dir: Path, staged: Sequence[tuple[Push, Path]], public: bool) -> Iterator[str]:
    """Upload each folder to its repository, and yield its address. At the end what was staged is removed.

    Raises ValueError where that fails in the middle.
    """
    api = HfApi()
    for push, folder in staged:
        with hub_errors(push.repo_id, "The same command goes on with what is not up yet."):
            address = api.create_repo(push.repo_id, repo_type=push.repo_type, private=not public, exist_ok=True)
            api.upload_folder(
                repo_id=push.repo_id,
                repo_type=push.repo_type,
                folder_path=folder,
                commit_message=f"{push.what} by rlhf_recipes",
                delete_patterns=STALE,
            )
        yield address
    shutil.rmtree(upload_folder(run_dir))
    if (run_dir / STAGED).exists():  # not of labels alone, or where all exports were given
        shutil.rmtree(run_dir / STAGED)
