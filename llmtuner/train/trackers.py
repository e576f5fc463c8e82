"""Experiment trackers of `report_to`: transformers' own callbacks, kept from ending or littering a run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmtuner.console import print0

# Environment variable by which a tracker finds its directory -> that directory in output_dir, unless the variable is set.
DIRECTORIES: dict[str, Callable[[Path], str]] = {
    "WANDB_DIR": str,
    "MLFLOW_TRACKING_URI": lambda output_dir: (output_dir / "mlruns").resolve().as_uri(),
    "SWANLAB_LOG_DIR": lambda output_dir: str(output_dir / "swanlog"),
}
# mlflow announces the end of directories as a store, and asks for this.
FLAGS = {"MLFLOW_ALLOW_FILE_STORE": "true"}
MODULES = ("_wandb", "_swanlab")  # attributes of callbacks that leave their run open


class GuardedTracker:
    """Passes all events to a tracker; its first error becomes one warning, and then it gets no more.

    A tracker fails when a server or a disk does, hours after it was checked; the run must not.

    Args:
        tracker: a callback of transformers.
        output_dir: of the run, in which trackers that write files write them.
    """

    def __init__(self, tracker: TrainerCallback, output_dir: Path) -> None:
        self.tracker, self.output_dir, self.is_on = tracker, output_dir, True
        self.name = type(tracker).__name__.removesuffix("Callback")

    def __getattr__(self, event: str) -> Callable[..., Any]:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *args, **kwargs: self.guard(lambda: self._handle(event, *args, **kwargs))

    def guard(self, function: Callable[[], Any]) -> Any:
        """Calls a function that may talk to the tracker, unless that has failed before."""
        if not self.is_on:
            return None
        try:
            return function()
        except Exception as error:  # whatever a tracker's library raises
            self.is_on = False
            reason = str(error).strip().splitlines()
            print0(
                f"warning: {self.name} failed and is switched off ({type(error).__name__}: {reason[0] if reason else ''}); "
                "the run goes on, and trainer_log.jsonl has all lines"
            )
            return None

    def _handle(self, event: str, *args: Any, **kwargs: Any) -> Any:
        with _directories(self.output_dir):
            result = getattr(self.tracker, event)(*args, **kwargs)
            if event == "on_train_end":  # else the next run of this process would write into this one's
                for module in MODULES:
                    with suppress(AttributeError):
                        getattr(self.tracker, module).finish()
            return result


def guard_trackers(handler: Any, output_dir: Path) -> None:
    """Replaces the trackers among a Trainer's callbacks by guarded ones."""
    handler.callbacks = [
        GuardedTracker(callback, output_dir)
        if type(callback).__module__.startswith("transformers.integrations")
        else callback
        for callback in handler.callbacks
    ]


@contextmanager
def _directories(output_dir: Path) -> Iterator[None]:
    """Lets trackers write into output_dir unless the environment says where."""
    values = {name: make(output_dir) for name, make in DIRECTORIES.items()} | FLAGS
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
