"""What every script shares with the person at the terminal: clear errors, outcome lines, metrics, outputs that appear whole."""

import errno
import importlib.util
import json
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
    """Something outside the code is wrong: a file, a setting, a disk.

    The message says what is wrong, where, and what to do next; `run_cli` prints it alone and exits with code 2.
    """


class TrainingInterrupted(Exception):
    """A person or the system asked a run to end, and it ended in good order; the message says how to go on."""

    def __init__(self, message: str, signal_number: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = 128 + (signal_number or 0)  # as shells report a signal


def exit_with_error(message: str) -> NoReturn:
    """Prints one error message and ends the program with exit code 2."""
    if not report_to_launcher(f"\nerror: {message}"):
        print(f"\nerror: {message}", file=sys.stderr)
    raise SystemExit(2)


def report_to_launcher(message: str) -> bool:
    """Leaves it to `llmtuner/train/launch.py` to print a message once for all its processes; false if it does not run."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or "REPORT_ERRORS_TO_LAUNCHER" not in os.environ:
        return False
    Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    return True


def run_cli(main: Callable[[], None]) -> None:
    """Runs a script's `main`: an `UserError` becomes one message and exit code 2, Ctrl-C a quiet exit code 130."""
    if importlib.util.find_spec("sentencepiece") is None:  # before anything is done that the wrong Python cannot finish
        exit_with_error(missing_package("sentencepiece"))
    try:
        main()
        _destroy_process_group()
    except UserError as error:
        exit_with_error(str(error))
    except TrainingInterrupted as stopped:
        print0(f"\n{stopped}")
        _destroy_process_group()
        raise SystemExit(stopped.exit_code) from None
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
    """What the user can do about an error of the system that nothing nearer has explained; None for all others."""
    if isinstance(error, OSError) and error.errno in (*DISK_FULL, *NOT_WRITABLE, *IO_ERRORS):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Check its owner and permissions, the path, and the room on that disk."
    if (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, which is not imported here
        return (
            f"out of memory: {str(error).partition(chr(10))[0]}. For training, try a smaller per_device_train_batch_size "
            "or cutoff_len, or gradient_checkpointing: true; else close what uses the memory."
        )
    return None


def missing_package(module: str) -> str:
    """Says that a module is not installed for this Python, and which command to type instead."""
    venv = ROOT / ".venv"
    if (venv / "bin" / "python").exists() and Path(sys.prefix).resolve() != venv.resolve():
        how = f"Type: {shlex.join([_short(venv / 'bin' / 'python'), *_script(), *sys.argv[1:]])}"
    else:
        requirements = shlex.quote(_short(ROOT / "requirements.txt"))
        how = f"Install it: {interpreter()} -m pip install -r {requirements} (`make demo` does so, into .venv)."
    return f"{module} is not installed for this Python ({sys.executable}). {how}"


def _script() -> list[str]:
    """What is running, as it was typed behind the interpreter."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]


def _short(path: Path) -> str:
    """A path as one types it: relative to the current directory if that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def interpreter() -> str:
    """What to type for the Python that is running: `python` if that is the one, else its path."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(_short(Path(sys.executable)))


def command(script: str) -> str:
    """What to type to run a script of this project with the Python that is running: `.venv/bin/python step4_test_zero.py`."""
    return f"{interpreter()} {shlex.quote(_short(ROOT / script))}"


def _destroy_process_group() -> None:
    """Closes their connections in order: a process that ends with them open can be taken down by another's end."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_rank_zero() -> bool:
    """True in a single process and on global rank 0 under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def print0(message: str = "") -> None:
    """Prints a line, once, however many processes run."""
    if is_rank_zero():
        print(message, flush=True)


def print_header(title: str) -> None:
    """Opens a part of a step's output."""
    print0(f"\n── {title} " + "─" * max(3, 100 - len(title)))


def progress(items: Iterable[Item], description: str, total: int | None = None, unit: str = "it") -> Iterable[Item]:
    """A progress bar over `items` on the first process's standard error."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, unit=unit, disable=not is_rank_zero(), mininterval=0.5)


def progress_bar(total: float, description: str) -> Any:
    """A progress bar on rank 0's standard error, to be advanced by `update`; it shows percent, not what is counted."""
    from tqdm import tqdm

    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=total, desc=description, bar_format=layout, disable=not is_rank_zero(), mininterval=0.5)


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 2)


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Lays out rows under a header; wide characters count as two columns, all cells but the first are set right."""
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
