"""Who is let in to a page on this machine, and what is said to who is not."""

import hmac
import secrets
import time
from pathlib import Path

from ..records.cache import cache_folder
from ..records.digest import digest
from ..records.files import read_json, write_json

RATE, BURST = 20, 300  # requests of a browser: a second, and at once after a rest. Fast labelers send one or two


class Refusal(Exception):
    """What somebody asked for and cannot have. Args: the HTTP status that says so, and the words for him."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Access:
    """Who is let in: whoever has the token, by the link or in a cookie, which also tells browsers apart.

    The server keeps the token in the user's cache, so that links and pages outlive it. Beside what the page shows it
    could be anybody's: who had written it would know it.
    """

    def __init__(self, token: str | None = None, path: Path | None = None) -> None:
        """
        Args:
            token: what the link must hold (default: what is kept, or a new one).
            path: where it is kept (default: nowhere).
        """
        kept = None if path is None else read_json(path, kind=str)
        self._free: dict[str, float] = {}  # who sent requests -> when they count no more, on the monotonic clock
        self.token: str = token or kept or secrets.token_urlsafe(24)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(path, self.token)

    @property
    def name(self) -> str:
        """The cookie's name: browsers send the cookies of one port to all ports."""
        return f"page-{digest(self.token)[:12]}"

    def opens(self, token: str | None) -> bool:
        """Whether it is the link's token."""
        return secrets.compare_digest((token or "").encode(errors="replace"), self.token.encode())

    def check_rate(self, who: str) -> None:
        """Count a request of a browser, by its key, or of who has none yet. Raises Refusal above RATE and BURST."""
        now = time.monotonic()
        free = max(self._free.get(who, now), now) + 1 / RATE
        if free > now + BURST / RATE:
            raise Refusal(429, "This browser sends too many requests: wait a few seconds.")
        if len(self._free) > BURST:
            self._free = {other: then for other, then in self._free.items() if then > now}
        self._free[who] = free

    def cookie(self, browser: str) -> str:
        """The cookie of a browser, by its key, which nobody can make who has not the token."""
        return f"{browser}.{hmac.new(self.token.encode(), browser.encode(errors='replace'), 'sha256').hexdigest()}"

    def browser(self, cookie: str | None) -> str | None:
        """The key in a cookie; None where we have not made it."""
        browser = (cookie or "").rpartition(".")[0]
        given = (cookie or "").encode(errors="replace")
        return browser if secrets.compare_digest(given, self.cookie(browser).encode()) else None


def access_file(page: str, *paths: Path) -> Path:
    """Where the `Access` to a page (`label`, `watch`) about files or folders is kept."""
    return cache_folder() / page / f"{digest(*(str(path.resolve()) for path in paths))}.json"
