"""Says where a run stands, from its files alone; starts at once, for it imports nothing large."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from llmtuner.aliases import locate, rename_keys
from llmtuner.console import UserError, display_path
from llmtuner.locks import lock_holder
from llmtuner.train.run_status import read_run_status

Log = list[dict[str, Any]]
LOG_FILE = "trainer_log.jsonl"
BITS_PER_BYTE = "eval_bits_per_byte_"
RECENT, BEFORE = 3, 20  # lines that are compared: the mean of the last ones with that of those before
# Above these a figure is warned of. In the miniature's healthy steps 5 and 6, no line of the log would have been.
LOSS_RISE = 1.15  # of the last lines over the mean of those before
BITS_RISE = 1.02  # of a language over its best
PADDING_RATIO, DATA_WAIT_RATIO = 0.1, 0.1
SILENT_INTERVALS = 10  # time without a new line, in usual times between lines
SILENT_SECONDS = 600


def format_status(directory: Path, now: float | None = None) -> str:
    """Describes the run in an output_dir, or all runs and finished steps in a WORK_DIR.

    Args:
        now: seconds since the epoch; None for the clock.

    Raises:
        UserError: if there is no run.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory. Name a WORK_DIR of the steps, or the output_dir of a run.")
    now = time.time() if now is None else now
    if _is_run(directory):
        return "\n".join(_describe_run(directory, now))
    finished = sorted(path.stem for path in (directory / "metrics").glob("step*.json"))
    lines = [f"finished steps: {', '.join(finished)}"] if finished else []
    if holder := lock_holder(directory / ".lock"):
        lines.append(f"a step is running ({holder})")
    for run in sorted(path for path in directory.iterdir() if path.is_dir() and _is_run(path)):
        lines += _describe_run(run, now)
    if not lines:
        raise UserError(f"{directory} holds no run yet: it has neither {LOG_FILE} nor checkpoints.")
    return "\n".join(lines)


def _is_run(directory: Path) -> bool:
    return (
        locate(directory, LOG_FILE).is_file()
        or bool(read_run_status(directory))
        or next(directory.glob("checkpoint-*"), None) is not None
    )


def _describe_run(directory: Path, now: float) -> Iterator[str]:
    """Yields the lines about one run."""
    file, status = locate(directory, LOG_FILE), read_run_status(directory)
    log = _read_log(file)
    training = [entry for entry in log if "loss" in entry]
    holder, checkpoint = lock_holder(directory / ".lock"), _last_checkpoint(directory)
    logged = training[-1]["step"] if training else 0
    step = max(logged, checkpoint[0] if checkpoint else 0, status.get("step", 0))
    max_steps = status.get("max_steps") or (checkpoint[1] if checkpoint else 0)
    of_all = f" of {max_steps:,}" if max_steps else ""
    state = status.get("state") or ("finished" if (directory / "training_args.json").is_file() else "running")
    name = display_path(directory)
    if holder and not training:
        yield f"{name}: running ({holder}), before its first line in the log"
    elif holder:
        yield f"{name}: running ({holder}), step {step:,}{of_all}{_percent(step, max_steps)}{_time_left(training[-1])}"
    elif state == "finished":
        yield f"{name}: finished after step {step:,}{of_all}"
    elif state in ("diverged", "not finite"):
        yield f"{name}: {'diverged' if state == 'diverged' else 'stopped, loss not finite,'} in step {step + 1:,}{of_all}"
        yield f"  {status['message']}"
    else:
        how = "stopped as asked" if state == "interrupted" else "killed, or ended by an error,"
        yield f"{name}: {how} at step {step:,}{of_all} or later; the same command resumes from the last checkpoint"
    if training:
        yield f"  loss {training[-1]['loss']:.4g} at step {logged:,}{_trend(training)}"
    if bits := _latest_bits(log):
        texts = (f"{language} {last:.3f} ({first:.3f} at first)" for language, first, _, last in bits)
        yield f"  bits per byte {', '.join(texts)}"
    if checkpoint:
        yield f"  last checkpoint: checkpoint-{checkpoint[0]}, {_age(now - checkpoint[2])} ago"
    elif holder:
        yield "  no checkpoint yet"
    if holder:
        yield from (f"  warning: {text}" for text in _warnings(log, now - file.stat().st_mtime if log else 0.0))


def _read_log(file: Path) -> Log:
    """Returns the lines of a log that may be written at this moment."""
    log = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            log.append(rename_keys(json.loads(line)))
        except ValueError:
            continue  # not complete yet
    return log


def _last_checkpoint(directory: Path) -> tuple[int, int, float] | None:
    """Returns step, max_steps and time of the newest checkpoint that is complete."""
    found = []
    for path in directory.glob("checkpoint-*"):
        checksums, number = locate(path, "checksums.json"), path.name.removeprefix("checkpoint-")
        if number.isdigit() and checksums.is_file():
            found.append((int(number), path, checksums.stat().st_mtime))
    if not found:
        return None
    step, path, saved = max(found)
    try:
        max_steps = int(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["max_steps"])
    except (OSError, ValueError, KeyError):
        max_steps = 0
    return step, max_steps, saved


def _latest_bits(log: Log) -> list[tuple[str, float, float, float]]:
    """Returns each language with its first, lowest and last bits per byte."""
    names = dict.fromkeys(name for entry in log for name in entry if name.startswith(BITS_PER_BYTE))
    series = {name: [entry[name] for entry in log if name in entry] for name in names}
    return [(name.removeprefix(BITS_PER_BYTE), vals[0], min(vals), vals[-1]) for name, vals in series.items()]


def _compare(values: list[float]) -> tuple[float, float] | None:
    """Returns the mean of the last values and of those before; None while there are too few."""
    if len(values) < 2 * RECENT:
        return None
    return fmean(values[-RECENT:]), fmean(values[-RECENT - BEFORE : -RECENT])


def _trend(training: Log) -> str:
    means = _compare([entry["loss"] for entry in training])
    if not means:
        return ""
    change = means[0] / means[1] - 1
    word = "level" if abs(change) < 0.01 else "falling" if change < 0 else "rising"
    since = training[max(0, len(training) - RECENT - BEFORE)]["step"]
    return f", {word} ({change:+.0%} from the mean since step {since:,})"


def _warnings(log: Log, silent_seconds: float) -> Iterator[str]:
    """Yields what a running run should be looked at for."""
    training = [entry for entry in log if "loss" in entry]
    means = _compare([entry["loss"] for entry in training])
    if means and means[0] > LOSS_RISE * means[1]:
        yield f"the loss of the last {RECENT} lines ({means[0]:.4g}) is above the mean of those before ({means[1]:.4g})"
    for language, first, lowest, last in _latest_bits(log):
        if last > BITS_RISE * lowest:
            yield f"bits per byte of {language} got worse: {last:.3f}, at best {lowest:.3f}, at first {first:.3f}"
    ratios = {
        "padding_ratio": (
            PADDING_RATIO,
            "of the tokens are padding: set packing: true, or a cutoff_len that fits the data",
        ),
        "data_wait_ratio": (
            DATA_WAIT_RATIO,
            "of the time the device waits for batches: raise dataloader_num_workers, or put cache_dir on a faster disk",
        ),
    }
    for name, (limit, text) in ratios.items():
        values = [entry[name] for entry in training[-RECENT:] if name in entry]
        if values and fmean(values) > limit:
            yield f"{fmean(values):.0%} {text}"
    usual = _seconds_per_line(training)
    if usual and silent_seconds > max(SILENT_SECONDS, SILENT_INTERVALS * usual):
        yield f"the log has had no new line for {_age(silent_seconds)}; one took {_age(usual)} before"


def _seconds_per_line(training: Log) -> float:
    """Returns the time between the last two lines, by the speed that they report; 0 if unknown."""
    if len(training) < 2 or not training[-2].get("eta_seconds") or not training[-1].get("eta_seconds"):
        return 0.0
    return max(0.0, training[-2]["eta_seconds"] - training[-1]["eta_seconds"])


def _percent(step: int, max_steps: int) -> str:
    return f" ({step / max_steps:.0%})" if max_steps else ""


def _time_left(entry: dict[str, Any]) -> str:
    return f", about {_age(entry['eta_seconds'])} left" if "eta_seconds" in entry else ""


def _age(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} seconds"
