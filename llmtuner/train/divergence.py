"""Tells a run that diverges from one whose loss jumps: high above the running median, step after step."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from llmtuner.files import atomic_write_json

STATE_FILE = "divergence.json"  # in a checkpoint
WINDOW = 100  # steps of the running median
# How many values a median needs. A learning rate that is far too high ruins the loss within three steps; the gradient of
# fresh adapters grows at first, since their B matrices are zero.
MIN_VALUES = {"loss": 3, "grad_norm": 20}


@dataclass
class DivergenceMonitor:
    """Running medians of loss and gradient norm, and the steps in a row that are above a multiple of one of them.

    High values do not enter the medians. The state is in every checkpoint, so that a resumed run stops at the same step.
    """

    factor: float
    steps: int
    """How many steps in a row are a divergence; 0: none are."""
    recent: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MIN_VALUES})
    streak: list[dict[str, Any]] = field(default_factory=list)
    """Step, values and documents of each step in a row that was high."""

    def limit(self, name: str) -> float:
        """Returns the value above which a loss or grad_norm is high; infinite while too little is known."""
        known = self.recent[name]
        return self.factor * median(known) if self.steps and len(known) >= MIN_VALUES[name] else math.inf

    def is_high(self, name: str, value: float) -> bool:
        """Adds a value to those of its median unless it is high; an infinite gradient norm is neither."""
        if not math.isfinite(value):
            return False
        if value > self.limit(name):
            return True
        self.recent[name] = [*self.recent[name], value][-WINDOW:]
        return False

    def has_diverged(self) -> bool:
        return 0 < self.steps <= len(self.streak)

    def save(self, checkpoint: Path) -> None:
        """Writes medians and streak beside a checkpoint's other files."""
        state = asdict(self)
        atomic_write_json(checkpoint / STATE_FILE, {name: state[name] for name in ("recent", "streak")})

    def load(self, checkpoint: Path) -> None:
        """Continues from a checkpoint; one of an earlier version has no such state."""
        if (file := checkpoint / STATE_FILE).is_file():
            state = json.loads(file.read_text(encoding="utf-8"))
            self.recent, self.streak = state["recent"], state["streak"]
