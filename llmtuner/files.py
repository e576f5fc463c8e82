"""Files: atomic writing, JSON, disk errors that say what to do, and checksums."""

import fnmatch
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtuner.console import DISK_FULL, NOT_WRITABLE, UserError

MARKER = ".llmtuner.json"  # in each directory that this project made: by what, from what, and which files
MIN_FREE_BYTES = 2**24  # bytes on a disk that count as none
SAMPLE_BYTES, NUM_SAMPLES = 2**20, 16  # of a large file, what its checksum covers
# What makes a model directory the model that it is; evaluation changes the generation settings and the card.
MODEL_FILES = ("*.safetensors", "*.bin", "*.model", "*.jinja", "*.json")
NOT_MODEL_FILES = ("generation_config.json", "trainer_state.json", MARKER)


def check_writable(directory: Path, setting: str = "WORK_DIR") -> None:
    """Checks that results can be written into `directory`, before any work is done for them.

    Raises:
        UserError: if it cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write-test-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to {directory} ({error.strerror or error}). Set {setting} to a directory that you may write to."
        ) from error


@contextmanager
def translate_disk_errors(destination: Path) -> Iterator[None]:
    """Turns a full disk or missing permissions while writing `destination` into an error that says what to do.

    Raises:
        UserError: for these; all other errors pass through.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)
        if _is_full_disk(error, destination):
            raise UserError(
                f"the disk filled up while writing {destination} ({reason}). Nothing of it is kept: free some space "
                "or write to another disk, and start again."
            ) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise UserError(f"cannot write {destination} ({reason}). Write to another place.") from error
        raise


def _is_full_disk(error: Exception, destination: Path) -> bool:
    """Whether a write failed for lack of space, also where a library hides the error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_FULL
    if any(os.strerror(number) in str(error) for number in DISK_FULL):  # safetensors quotes the system
        return True
    directory = next(path for path in (destination, *destination.absolute().parents) if path.exists())
    # torch.save says only that it failed.
    return (
        isinstance(error, RuntimeError) and "writ" in str(error) and shutil.disk_usage(directory).free < MIN_FREE_BYTES
    )


def atomic_write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a UTF-8 text file that appears complete or not at all.

    Args:
        errors: how to encode a lone surrogate, which has no UTF-8; Python's error handlers.

    Raises:
        UserError: if the disk fills up, or may not be written to.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with translate_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8", errors=errors)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears complete or not at all; raises as `atomic_write_text`."""
    atomic_write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: if the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object. Download it again.")
    return content


def fsync_directory(directory: Path) -> None:
    """Flushes every file of a directory to the disk, so that not even a power cut leaves half of one."""
    for folder, _, files in os.walk(directory):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def has_chatglm_tokenizer(directory: Path) -> bool:
    """Whether a model directory's tokenizer is the sentencepiece model of ChatGLM3, and not a tokenizer.json of another base."""
    converted = directory / "tokenizer.json"
    if converted.is_file():
        return b'"[gMASK]"' in converted.read_bytes()
    return (directory / "tokenizer.model").is_file()


def checksum(path: Path) -> str:
    """Sixteen hexadecimal digits that change when a file, or the model in a directory, changes; "" if missing.

    Covers names, sizes and contents; of a file over 16 MiB, sixteen blocks spread over it, all of which change with
    training. Location and date do not count.

    Raises:
        UserError: if it cannot be read.
    """
    if path.is_file():
        try:
            return f"{_crc(path):08x}{path.stat().st_size & 0xFFFFFFFF:08x}"
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    if not path.is_dir():
        return ""
    names = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.is_file()
        and any(fnmatch.fnmatch(entry.name, pattern) for pattern in MODEL_FILES)
        and entry.name not in NOT_MODEL_FILES
    )
    return checksum_of((name, checksum(path / name)) for name in names)


def checksum_of(parts: Iterable[Any]) -> str:
    """Returns a checksum of several JSON-serializable values."""
    text = json.dumps(list(parts), ensure_ascii=False, sort_keys=True).encode()
    return f"{zlib.crc32(text):08x}{zlib.crc32(text, 1) ^ len(text):08x}"


def _crc(file: Path) -> int:
    size, crc = file.stat().st_size, 0
    with file.open("rb") as content:
        if size <= NUM_SAMPLES * SAMPLE_BYTES:
            return zlib.crc32(content.read())
        for number in range(NUM_SAMPLES):
            content.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            crc = zlib.crc32(content.read(SAMPLE_BYTES), crc)
    return crc
