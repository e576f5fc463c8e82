"""The file in which a run says what became of it, for others to read while it runs and afterwards."""

import json
from pathlib import Path
from typing import Any, Literal

from llmtuner.files import atomic_write_json

STATUS_FILE = "status.json"  # in output_dir
State = Literal["running", "finished", "interrupted", "diverged", "not finite"]


def write_run_status(output_dir: Path, state: State, step: int, max_steps: int, message: str = "") -> None:
    """Writes the state of a run; rank 0 calls it when the state changes, not at every step.

    Args:
        message: why it stopped, and what to do.
    """
    status = {"state": state, "step": step, "max_steps": max_steps, "message": message}
    atomic_write_json(output_dir / STATUS_FILE, status)


def read_run_status(output_dir: Path) -> dict[str, Any]:
    """Returns what `write_run_status` wrote; empty for a run of an earlier version."""
    try:
        return json.loads((output_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
