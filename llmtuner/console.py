"""Talks to the person at the terminal: errors with their remedy, rank-0 printing, progress bars, tables, commands to type."""

import errno
import importlib.util
import json
import logging
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Item = TypeVar("Item")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
ROOT = Path(__file__).resolve().parent.parent
IO_ERRORS = (errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.EMFILE)


class UserError(Exception):
    """Reports a problem outside the code: in a file, a setting or a disk.

    The message says what is wrong, where, and what to do next; `run_cli` prints it alone and exits with code 2.
    """


class TrainingInterrupted(Exception):
    """Reports that a run stopped as a person or the system asked; the message says how to resume it."""

    def __init__(self, message: str, signal_number: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = 128 + (signal_number or 0)  # as shells report a signal


def exit_with_error(message: str) -> NoReturn:
    """Prints one error message and ends the program with exit code 2."""
    if not report_to_launcher(f"\nerror: {message}"):
        print(f"\nerror: {message}", file=sys.stderr)
    raise SystemExit(2)


def report_to_launcher(message: str) -> bool:
    """Passes a message to `llmtuner/train/launch.py`, which prints it once for all ranks; false if that did not start us."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or "REPORT_ERRORS_TO_LAUNCHER" not in os.environ:
        return False
    Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    return True


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`: a `UserError` becomes one message and exit code 2, Ctrl-C a quiet exit code 130."""
    if importlib.util.find_spec("sentencepiece") is None:  # before work that the wrong Python cannot finish
        exit_with_error(missing_package("sentencepiece"))
    hide_4_bit_warning()
    try:
        main()
        _destroy_process_group()
    except UserError as error:
        exit_with_error(str(error))
    except TrainingInterrupted as interruption:
        print0(f"\n{interruption}")
        _destroy_process_group()
        raise SystemExit(interruption.exit_code) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if (ROOT / package).exists() or (ROOT / f"{package}.py").exists():  # a mistake of our own
            raise
        exit_with_error(missing_package(str(error.name)))
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if reason := _explain(error):
            exit_with_error(reason)
        if not report_to_launcher(traceback.format_exc()):
            raise
        raise SystemExit(1) from None


def _explain(error: Exception) -> str | None:
    """Says what to do about a system error that nothing closer to it has explained; None for all other errors."""
    if isinstance(error, OSError) and error.errno in (*DISK_FULL, *NOT_WRITABLE, *IO_ERRORS):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Check its owner and permissions, the path, and the free space on that disk."
    # torch's OutOfMemoryError is known by name, since torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of memory: {str(error).partition(chr(10))[0]}. For training, try a smaller per_device_train_batch_size "
            "or cutoff_len, or gradient_checkpointing: true; otherwise close other programs that use memory."
        )
    return None


def missing_package(module: str) -> str:
    """Says that a module is not installed for this Python, and which command to type instead."""
    venv = ROOT / ".venv"
    if (venv / "bin" / "python").exists() and Path(sys.prefix).resolve() != venv.resolve():
        words = [display_path(venv / "bin" / "python"), *_script(), *sys.argv[1:]]
        # Where this package is not in the current directory, that Python may not know it.
        found = _script()[0] != "-m" or Path.cwd() == ROOT
        how = f"Type: {'' if found else f'PYTHONPATH={shlex.quote(str(ROOT))} '}{shlex.join(words)}"
    elif (ROOT / "requirements.txt").exists():
        requirements = shlex.quote(display_path(ROOT / "requirements.txt"))
        how = f"Install it: {interpreter()} -m pip install -r {requirements} (`make demo` does so, into .venv)."
    else:  # installed without its repository
        how = f"Install it: {interpreter()} -m pip install {module}"
    return f"{module} is not installed for this Python ({sys.executable}). {how}"


def _script() -> list[str]:
    """The running program, as typed after the interpreter."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec or is_console_command():
        return ["-m", spec.name.removesuffix(".__main__") if spec else "llmtuner"]
    return sys.argv[:1]


def is_console_command() -> bool:
    """Returns true if the console command `llmtuner` runs, which an installation makes, rather than `python -m llmtuner`."""
    return Path(sys.argv[0]).name == "llmtuner"


def display_path(path: Path) -> str:
    """Returns a path as one would type it: relative to the current directory if that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def interpreter() -> str:
    """Returns what to type for the running Python: `python` if that is it, else its path."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(display_path(Path(sys.executable)))


def command(script: str) -> str:
    """Returns what to type to run a script with the running Python: `.venv/bin/python step4_test_zero.py`."""
    return f"{interpreter()} {shlex.quote(display_path(ROOT / script))}"


def llmtuner_command() -> str:
    """Returns what to type before a command of the trainer: `llmtuner` if that is running, else `python -m llmtuner`."""
    if not is_console_command():
        return f"{interpreter()} -m llmtuner"
    program = Path(sys.argv[0]).absolute()
    return "llmtuner" if shutil.which("llmtuner") == str(program) else shlex.quote(display_path(program))


def hide_4_bit_warning() -> None:
    """Keeps bitsandbytes from logging something at its import, with peft, that nobody can act on; its other warnings stay."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_about_4_bit_weights)


def _is_not_about_4_bit_weights(record: logging.LogRecord) -> bool:
    """False for what bitsandbytes logs at every start on CPUs with bf16 support: a kernel for weights that nothing has here."""
    return not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")


def _destroy_process_group() -> None:
    """Leaves the process group in order: a rank that exits with open connections can be taken down by another's exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_rank_zero() -> bool:
    """Returns true in a single process and on global rank 0 under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def print0(message: str = "") -> None:
    """Prints a line on rank 0 only."""
    if is_rank_zero():
        print(message, flush=True)


def print_header(title: str) -> None:
    """Opens a section of a step's output."""
    print0(f"\n── {title} " + "─" * max(3, 100 - len(title)))


def verdict(check: str, passed: bool, details: str) -> str:
    """A check's outcome as one line: "Zero test passed: 60 of 60 answers identical"."""
    return f"{check} {'passed' if passed else 'FAILED'}: {details}"


def progress(items: Iterable[Item], description: str, total: int | None = None, unit: str = "it") -> Iterable[Item]:
    """Wraps `items` in a progress bar, shown on rank 0's standard error."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, unit=unit, disable=not is_rank_zero(), mininterval=0.5)


def progress_bar(total: float, description: str) -> Any:
    """A progress bar on rank 0's standard error, to be advanced by `update`; it shows percent, not what is counted."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=total, desc=description, bar_format=layout, disable=not is_rank_zero(), mininterval=0.5)


class Timer:
    """Measures the seconds since its creation."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 2)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Aligns rows under a header; wide characters take two columns, all cells but the first are right-aligned."""
    import unicodedata

    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)

    lines = [header, *rows]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]

    def lay_out(line: list[str]) -> str:
        cells = [
            cell + " " * (widths[column] - width(cell)) if column == 0 else " " * (widths[column] - width(cell)) + cell
            for column, cell in enumerate(line)
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([lay_out(header), "  ".join("-" * w for w in widths), *(lay_out(row) for row in rows)])
