"""Callbacks of the trainer: progress bar, JSON log, throughput, early stopping, and a graceful stop on a signal."""

import json
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from llmtuner.aliases import THROUGHPUT_KEYS, locate, rename_keys
from llmtuner.files import atomic_write_json
from llmtuner.hparams import FinetuningArguments
from llmtuner.train.best_checkpoint import best_metric, find_best
from llmtuner.train.flops import Utilization
from llmtuner.train.run_status import State, write_run_status


@dataclass
class ThroughputMeter:
    """Counters since the last log line and since the start of the run; both survive a restart."""

    loss: float = 0.0
    """Sum of the step losses since the last log line, averaged over processes."""
    steps: int = 0
    tokens: int = 0
    """Tokens of this process, padding included."""
    padding: int = 0
    target_tokens: int = 0
    """Target tokens of all processes."""
    seconds: float = 0.0
    """Training time, without evaluation and saving."""
    data_seconds: float = 0.0
    """Of these, spent by this process waiting for batches."""
    total_tokens: int = 0
    total_padding: int = 0
    total_seconds: float = 0.0
    wall_seconds: float = 0.0
    """Time since the start of the run, with evaluation and saving, without what was between a stop and a restart."""
    start_time: float = field(default_factory=time.perf_counter)
    wall_start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the enclosed block from training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.start_time += time.perf_counter() - start

    def update_elapsed(self) -> None:
        """Adds the time since the last call to both totals."""
        now = time.perf_counter()
        self.seconds += now - self.start_time
        self.total_seconds += now - self.start_time
        self.start_time = now
        self.wall_seconds += now - self.wall_start
        self.wall_start = now

    def reset_interval(self) -> None:
        """Starts a new logging interval."""
        self.loss, self.steps, self.tokens, self.padding, self.target_tokens, self.seconds = 0.0, 0, 0, 0, 0, 0.0

    def save(self, file: Path) -> None:
        """Writes the counters as JSON."""
        clocks = ("start_time", "wall_start")
        atomic_write_json(file, {name: value for name, value in asdict(self).items() if name not in clocks})

    @classmethod
    def load(cls, checkpoint: Path) -> "ThroughputMeter":
        """Reads the counters of a checkpoint, also one of an earlier version."""
        counters = json.loads(locate(checkpoint, "throughput.json").read_text(encoding="utf-8"))
        return cls(**rename_keys(counters, THROUGHPUT_KEYS))


def peak_memory_gb() -> float:
    """Returns the peak memory in GB: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


class ProgressBarCallback(TrainerCallback):
    """Shows one progress bar for the run; each evaluation gets a line of its own."""

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
            learning_rates = "/".join(
                f"{logs[name]:.1e}" for name in ("learning_rate", "embedding_learning_rate") if name in logs
            )
            self.bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, grad {logs.get('grad_norm', 0):.2f}, lr {learning_rates}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['padding_ratio']:.1%} padding, {logs['peak_memory_gb']} GB"
            )
        if "eval_loss" in logs and state.is_world_process_zero:
            prefix = "eval_bits_per_byte_"
            bits = [f"{name.removeprefix(prefix)} {logs[name]:.3f}" for name in logs if name.startswith(prefix)]
            bpb = f", bits per byte {' '.join(bits)}" if bits else ""
            tqdm.write(f"step {state.global_step:>6,}: eval loss {logs['eval_loss']:.4f}{bpb}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class JsonlLogCallback(TrainerCallback):
    """Writes the log as JSON lines, floats with nine digits (the precision of fp32); `tail -f` follows it.

    A resumed run starts from the log of its checkpoint, so no line appears twice and no line of a lost step remains.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.is_open = False  # an earlier run's log stays until this run has its first line

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            entries = state.log_history[-1:] if self.is_open else rename_keys(state.log_history)
            with self.file.open("a" if self.is_open else "w", encoding="utf-8") as lines:
                lines.writelines(map(self._to_line, entries))
            self.is_open = True

    @staticmethod
    def _to_line(entry: dict[str, Any]) -> str:
        step = {"step": entry["step"]}
        rest = {name: float(f"{value:.9g}") if isinstance(value, float) else value for name, value in entry.items()}
        return json.dumps({**step, **rest}) + "\n"


class TrainBeginCallback(TrainerCallback):
    """Runs actions on rank 0 once settings, data and model have been checked: an earlier run is deleted only then."""

    def __init__(self, *actions: Callable[[], None]) -> None:
        self.actions = actions

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for action in self.actions if state.is_world_process_zero else ():
            action()


class RunStatusCallback(TrainerCallback):
    """Writes into output_dir that a run is running, and whether it came to its end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write("running", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write("interrupted" if self.trainer.should_stop else "finished", state)

    def _write(self, name: State, state: Any) -> None:
        if state.is_world_process_zero:
            write_run_status(self.trainer.output_dir, name, state.global_step, state.max_steps)


class InitialLossCallback(TrainerCallback):
    """Logs the loss on each dataset before the first step, once the model has been prepared for its devices.

    Args:
        trainer: a `PackedTrainer`.
        samples: dataset name -> the sequences to evaluate.
    """

    def __init__(self, trainer: Any, samples: dict[str, Any]) -> None:
        self.trainer, self.samples = trainer, samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0 and self.samples:
            losses = {name: self.trainer.evaluate_loss(sample) for name, sample in self.samples.items()}
            self.trainer.log({f"initial_loss/{name}": round(loss, 4) for name, loss in losses.items()})


class MfuCallback(TrainerCallback):
    """Counts the model FLOP and measures the device before the first step, while its memory is free."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        with suppress(AttributeError, TypeError, ValueError):  # another model family: a log without mfu
            lengths = trainer.train_dataset.dataset.attention_lengths
            trainer.utilization = Utilization.of(trainer.model, lengths, args.device, trainer.matmul_dtype)


class EarlyStopping(TrainerCallback):
    """Saves the best checkpoint, and stops training once there has been none better for `early_stopping_steps` evaluations.

    transformers' EarlyStoppingCallback counts since its own start; this one counts in the log, which checkpoints hold, so
    that patience is the same after a restart.
    """

    def __init__(self, finetuning_args: FinetuningArguments) -> None:
        self.metric, self.bound = best_metric(finetuning_args), finetuning_args.max_retention_loss
        self.patience = finetuning_args.early_stopping_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        best = find_best(state.log_history, self.metric, self.bound) if self.metric else None
        if best and best["step"] == state.global_step > 0:
            control.should_save = True
        if self.is_due(state.log_history):
            control.should_save = control.should_training_stop = True

    def is_due(self, history: list[dict[str, Any]]) -> bool:
        metric = self.metric or "eval_loss"
        evaluations = [entry for entry in history if metric in entry]
        best = find_best(history, metric, self.bound)
        since = evaluations.index(best) if best else 0
        return self.patience is not None and len(evaluations) - 1 - since >= self.patience


def is_training_finished(state: TrainerState, num_steps: int, finetuning_args: FinetuningArguments) -> bool:
    """Tells whether no step of a run of `num_steps` is left: all have been made, or the run has stopped early."""
    return state.global_step >= num_steps or EarlyStopping(finetuning_args).is_due(state.log_history)


class SaveBeforeDecay(TrainerCallback):
    """Saves a checkpoint when the learning rate is about to decay: from there, the run can be made longer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.trainer.decay_begin and args.save_strategy != "no":
            control.should_save = True


class TimedSave(TrainerCallback):
    """Saves a checkpoint at least every `minutes`, early enough that a killed run loses no more training than that.

    The clock of rank 0 decides; `PackedTrainer._finish_step` asks `is_due` and tells the other ranks.

    Args:
        trainer: a `PackedTrainer`, whose `should_save` says what was decided.
    """

    def __init__(self, trainer: Any, minutes: float | None) -> None:
        self.trainer, self.interval = trainer, math.inf if minutes is None else 60 * minutes
        self.save_seconds = 0.05 * self.interval  # until a checkpoint has been saved
        self.step_seconds = 0.0

    def is_due(self) -> bool:
        """Tells in the middle of a step whether a checkpoint after the next one could come too late."""
        elapsed = time.perf_counter() - self.saved_state_at
        return self.interval < math.inf and elapsed + 2 * self.step_seconds + self.save_seconds >= self.interval

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved_state_at = self.step_end = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step_end = time.perf_counter()
        self.step_seconds = self.step_end - self.step_begin
        if self.trainer.should_save:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved_state_at = self.step_end
        self.save_seconds = time.perf_counter() - self.step_end  # an evaluation of the same step included


class GracefulStopSignal:
    """While entered, Ctrl-C or SIGTERM requests a stop after the current step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "GracefulStopSignal":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to the main thread only
            self.previous_handlers = {
                number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print(
            "\nstopping after this step, then saving a checkpoint; press Ctrl-C again to stop now",
            file=sys.stderr,
            flush=True,
        )


class GracefulStopCallback(TrainerCallback):
    """Starts the clock, and ends training with a checkpoint after the step in which any rank received a stop signal."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.meter.start_time = time.perf_counter()
        state.compute_steps(args, state.max_steps)  # Trainer resumes with the intervals of the checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.should_stop:
            control.should_save = control.should_training_stop = True
        if self.trainer.is_save_postponed:
            control.should_save = True
