"""Hashes of JSON values: keys of what was computed before, and ids of rows."""

import hashlib
import json
from typing import Any


def digest(*parts: Any) -> str:
    """The key of what depends on these JSON values: 32 hex digits, whatever the order of an object's keys.

    Raises TypeError for a value that JSON does not know.
    """
    return _sha256(json.dumps(parts, sort_keys=True))[:32]


def row_id(value: Any) -> str:
    """The id of a row that has none, made of the JSON value that it is about: 16 hex digits.

    Files hold such ids, so an object's keys count in the order in which they stand, as they always have.
    """
    return _sha256(json.dumps(value))[:16]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
