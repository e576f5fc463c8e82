"""Checkpoints that are whole or not there: sealed with the size and checksum of every file, checked before they are used."""

import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtuner.console import InputError, check_writable, disk_errors, is_first_process, say, write_json
from llmtuner.outputs import MARKER, exclusive, finish_publishing, read_marker, recover_directory, swap, sync

SEAL = "whole.json"  # written last: file -> [bytes, CRC-32]
RUN = "a training run"  # in the marker of an output_dir
STAGING = ".saving"  # in output_dir; becomes checkpoint-N once sealed


@contextmanager
def claim_output_dir(output_dir: Path) -> Iterator[None]:
    """Keeps other runs out of a run's directory, and puts right what a killed one left there; rank 0 does it for all.

    Raises:
        InputError: if it cannot be written, another run uses it, or it holds files of this kind that no run of this
            project wrote.
    """
    if not is_first_process():
        yield
        return
    is_new = not output_dir.exists()
    check_writable(output_dir, "output_dir")
    try:
        with exclusive(output_dir / ".lock", str(output_dir)):
            _check_output_dir(output_dir)
            finish_publishing(output_dir)
            for old in output_dir.glob("checkpoint-*.old"):
                recover_directory(output_dir / old.name.split(".")[0], SEAL)
            yield
    finally:
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _check_output_dir(output_dir: Path) -> None:
    """A run writes and deletes files by name; none of another program may be among them."""
    from llmtuner.model.adapters import RUN_FILES

    is_run = (read_marker(output_dir) or {}).get("made_by") == RUN  # a merged model is no run
    ours = is_run or any(output_dir.glob(f"checkpoint-*/{SEAL}")) or _has_settings(output_dir)
    foreign = [] if ours else sorted(path.name for pattern in RUN_FILES for path in output_dir.glob(pattern))
    if foreign:
        raise InputError(
            f"output_dir {output_dir} holds files that no run of this project wrote, such as {foreign[0]}. Nothing was "
            "changed: choose another output_dir."
        )


def _has_settings(output_dir: Path) -> bool:
    """Whether a finished run of an earlier version, which wrote no marker, lies here."""
    try:
        return "finetuning_type" in json.loads((output_dir / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def start_again(output_dir: Path, overwrite: bool) -> None:
    """Marks a directory as a run's, and deletes an earlier run's checkpoints if asked to."""
    write_json(output_dir / MARKER, {"made_by": RUN})  # names no files: the directory is never replaced
    if overwrite:
        forget(output_dir)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first; whether they are whole is another question."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; says which newer ones are damaged."""
    for checkpoint in checkpoints(output_dir):
        damage = find_damage(checkpoint)
        if not damage:
            return checkpoint
        say(f"{checkpoint} is damaged ({damage}): it is not used")
    return None


def find_damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if every file is as it was sealed."""
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, (size, checksum) in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
            if _checksum(file) != checksum:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read: {error}"
    return ""


def seal(directory: Path) -> None:
    """Marks a checkpoint as whole."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SEAL)
    write_json(
        directory / SEAL, {str(file.relative_to(directory)): [file.stat().st_size, _checksum(file)] for file in files}
    )


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


@contextmanager
def kept_older(output_dir: Path, step: int) -> Iterator[None]:
    """While a checkpoint is saved: an error on the way removes what there is of it and says what is left to go on from.

    Raises:
        InputError: if the disk fills up, or may not be written to.
    """
    try:
        with disk_errors(output_dir / f"checkpoint-{step}"):
            yield
    except BaseException as error:
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)
        if isinstance(error, InputError):
            older = checkpoints(output_dir)
            rest = f"{older[0].name} is untouched" if older else "there is no older checkpoint"
            raise InputError(f"{error} ({rest}; the same command goes on from the newest one.)") from error
        raise


def publish(output_dir: Path, step: int, limit: int | None) -> Path:
    """Seals what lies in the staging directory, gives it its name, and deletes the oldest beyond `limit`."""
    staged, destination = output_dir / STAGING / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
    seal(staged)
    sync(staged)
    swap(staged, destination, SEAL)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)
    for old in _ours(output_dir)[limit:] if limit else []:
        shutil.rmtree(old, ignore_errors=True)
    return destination


def forget(output_dir: Path) -> None:
    """Deletes all checkpoints of a run, so that the next one starts anew."""
    for checkpoint in _ours(output_dir):
        shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)


def _ours(output_dir: Path) -> list[Path]:
    """The checkpoints that this project wrote; others are never deleted."""
    return [checkpoint for checkpoint in checkpoints(output_dir) if (checkpoint / SEAL).is_file()]


def check_resumable(checkpoint: Path) -> None:
    """Makes sure that a checkpoint holds more than weights.

    Raises:
        InputError: if it has no optimizer state; says how to train further from its weights.
    """
    # DeepSpeed keeps the optimizer's state in global_stepN/, everything else in files named optimizer*.
    if [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]:
        return
    if (checkpoint / "adapter_config.json").is_file():
        weights = f"set adapter_name_or_path: {checkpoint}"
    else:
        weights = f"copy the tokenizer's files into it and set model_name_or_path: {checkpoint}"
    raise InputError(
        f"{checkpoint} cannot be resumed: it was saved with save_only_model: true, without the state of optimizer, "
        f"learning rate schedule and random numbers. To start a new schedule from its weights, {weights} and another "
        "output_dir. To be able to resume a run, train with save_only_model: false."
    )


def same_run(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Makes sure that a checkpoint comes from a run with these settings.

    Raises:
        InputError: names what differs.
    """
    from llmtuner.hparams import changed_settings

    before = json.loads((checkpoint / "settings.json").read_text(encoding="utf-8"))
    before.setdefault("model checksum", settings.get("model checksum"))  # runs of earlier versions have none
    if changes := changed_settings(before, settings):
        raise InputError(
            f"{checkpoint} was made with other settings:\n  - " + "\n  - ".join(changes) + "\nGo on with those, choose "
            "another output_dir, or set overwrite_output_dir: true (steps: OVERWRITE=1) to start anew."
        )
