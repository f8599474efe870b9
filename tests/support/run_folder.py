"""What run folders hold, and rows for a run."""

import json
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def states(folder: Path) -> dict[str, str]:
    return {stage: record["state"] for stage, record in manifest_of(folder)["stages"].items()}


def rows_of(folder: Path, stage: str | None = None, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [row for row in rows if stage in (None, row["stage"])]


def mark_running(folder: Path, stage: str) -> None:
    """Make the manifest what it is while a stage runs."""
    manifest = manifest_of(folder)
    manifest["stages"][stage]["state"] = "running"
    (folder / "manifest.json").write_text(json.dumps(manifest))
