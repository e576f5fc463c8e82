"""What can be seen of a run and said to it: a progress bar, a log of JSON lines, figures per interval, a stop by signal."""

import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback


@dataclass
class ThroughputMeter:
    """Counts since the last line of the log, and since the run began; both survive a restart."""

    loss: float = 0.0
    """Sum of the losses of the steps since the last line, mean over the processes."""
    steps: int = 0
    tokens: int = 0
    """Tokens of this process, padding included."""
    padding: int = 0
    target_tokens: int = 0
    """Trained tokens of all processes."""
    seconds: float = 0.0
    """Of training alone, without evaluation and saving."""
    total_tokens: int = 0
    total_padding: int = 0
    total_seconds: float = 0.0
    start_time: float = field(default_factory=time.perf_counter)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of something else than training out."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.start_time += time.perf_counter() - start

    def update_elapsed(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.start_time
        self.total_seconds += now - self.start_time
        self.start_time = now

    def reset_interval(self) -> None:
        """Begins a new interval."""
        self.loss, self.steps, self.tokens, self.padding, self.target_tokens, self.seconds = 0.0, 0, 0, 0, 0, 0.0


def peak_memory_gb() -> float:
    """Most memory that was in use at a time: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


class ProgressBarCallback(TrainerCallback):
    """One bar for the whole run with what matters and time left; an eval loss gets a line of its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        logs = logs or {}
        if "tokens_per_second" in logs:
            rates = "/".join(
                f"{logs[name]:.1e}" for name in ("learning_rate", "embedding_learning_rate") if name in logs
            )
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, grad {logs.get('grad_norm', 0):.2f}, lr {rates}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['padding_ratio']:.1%} padding, {logs['peak_memory_gb']} GB"
            )
        if "eval_loss" in logs and state.is_world_process_zero:
            start = "eval_bits_per_byte_"
            bits = [f"{name.removeprefix(start)} {logs[name]:.3f}" for name in logs if name.startswith(start)]
            named = f", bits per byte {' '.join(bits)}" if bits else ""
            tqdm.write(f"step {state.global_step:>6,}: eval loss {logs['eval_loss']:.4f}{named}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class JsonlLogCallback(TrainerCallback):
    """`trainer_log.jsonl`: one JSON object per line of the log, nine digits a number (all that fp32 has); `tail -f` shows it.

    A run that goes on from a checkpoint begins with that checkpoint's lines: none is there twice, and none of a future
    that was lost.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.begun = False  # an earlier run's lines stay until this one has its first

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            entries = state.log_history[-1:] if self.begun else state.log_history
            with self.file.open("a" if self.begun else "w", encoding="utf-8") as lines:
                lines.writelines(map(self._line, entries))
            self.begun = True

    @staticmethod
    def _line(entry: dict[str, Any]) -> str:
        step = {"step": entry["step"]}
        rest = {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in entry.items()}
        return json.dumps({**step, **rest}) + "\n"


class GracefulStopSignal:
    """While entered, Ctrl-C and SIGTERM ask for a stop after the step at hand; a second Ctrl-C or SIGTERM stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not deliver signals
            self.before = {one: signal.signal(one, self._receive) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step, with a checkpoint; once more stops at once", file=sys.stderr, flush=True)
