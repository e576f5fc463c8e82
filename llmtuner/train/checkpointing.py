"""Checkpoints that are whole or not there: sealed with the size and checksum of every file, checked before they are used."""

import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtuner.aliases import locate
from llmtuner.console import UserError, is_rank_zero, print0
from llmtuner.files import MARKER, atomic_write_json, check_writable, fsync_directory, translate_disk_errors
from llmtuner.hparams import diff_settings
from llmtuner.locks import file_lock
from llmtuner.model.adapters import ADAPTER_CONFIG_FILES, WEIGHT_FILES
from llmtuner.outputs import finish_publishing, read_marker, recover_directory, replace_directory
from llmtuner.tokenizer.fast import TOKENIZER_FILES

CHECKSUM_FILE = "checksums.json"  # written last: file -> [bytes, CRC-32]
RUN_MARKER = "a training run"  # in the marker of an output_dir
TMP_DIR = ".saving"  # in output_dir; becomes checkpoint-N once sealed
# What a run writes into its directory under names that other programs use too.
RUN_FILES = (
    *ADAPTER_CONFIG_FILES,
    *WEIGHT_FILES,
    *TOKENIZER_FILES,
    "checkpoint-*",
    "trainer_log.jsonl",
    "training_args.json",
    "invalid_rows.jsonl",
    "*_loss.png",
)


@contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """Keeps other runs out of a run's directory, and puts right what a killed one left there; rank 0 does it for all.

    Raises:
        UserError: if it cannot be written, another run uses it, or it holds files of this kind that no run of this
            project wrote.
    """
    if not is_rank_zero():
        yield
        return
    is_new = not output_dir.exists()
    check_writable(output_dir, "output_dir")
    try:
        with file_lock(output_dir / ".lock", str(output_dir)):
            _check_output_dir(output_dir)
            finish_publishing(output_dir)
            for old in output_dir.glob("checkpoint-*.old"):
                recover_directory(output_dir / old.name.split(".")[0], locate(old, CHECKSUM_FILE).name)
            yield
    finally:
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()


def _check_output_dir(output_dir: Path) -> None:
    """A run writes and deletes files by name; none of another program may be among them."""
    is_run = (read_marker(output_dir) or {}).get("made_by") == RUN_MARKER  # a merged model is no run
    ours = is_run or bool(_owned_checkpoints(output_dir)) or _has_legacy_settings(output_dir)
    foreign = [] if ours else sorted(path.name for pattern in RUN_FILES for path in output_dir.glob(pattern))
    if foreign:
        raise UserError(
            f"output_dir {output_dir} holds files that no run of this project wrote, such as {foreign[0]}. Nothing was "
            "changed: choose another output_dir."
        )


def _has_legacy_settings(output_dir: Path) -> bool:
    """Whether a finished run of an earlier version, which wrote no marker, lies here."""
    try:
        return "finetuning_type" in json.loads(locate(output_dir, "training_args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def prepare_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Marks a directory as a run's, and deletes an earlier run's checkpoints if asked to."""
    atomic_write_json(output_dir / MARKER, {"made_by": RUN_MARKER})  # names no files: the directory is never replaced
    if overwrite:
        delete_checkpoints(output_dir)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first; whether they are whole is another question."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def latest_valid_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; says which newer ones are damaged."""
    for checkpoint in list_checkpoints(output_dir):
        damage = verify_checkpoint(checkpoint)
        if not damage:
            return checkpoint
        print0(f"{checkpoint} failed verification ({damage}), skipping")
    return None


def verify_checkpoint(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty if every file is as it was sealed."""
    checksums = locate(checkpoint, CHECKSUM_FILE)
    try:
        files = json.loads(checksums.read_text(encoding="utf-8"))
        for name, (size, checksum) in files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
            if _checksum(file) != checksum:
                return f"{name} has other bytes than were written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{checksums.name} cannot be read: {error}"
    return ""


def write_checksums(directory: Path) -> None:
    """Marks a checkpoint as whole."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUM_FILE)
    atomic_write_json(
        directory / CHECKSUM_FILE,
        {str(file.relative_to(directory)): [file.stat().st_size, _checksum(file)] for file in files},
    )


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


@contextmanager
def cleanup_on_failure(output_dir: Path, step: int) -> Iterator[None]:
    """While a checkpoint is saved: an error on the way removes what there is of it and says what is left to go on from.

    Raises:
        UserError: if the disk fills up, or may not be written to.
    """
    try:
        with translate_disk_errors(output_dir / f"checkpoint-{step}"):
            yield
    except BaseException as error:
        shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)
        if isinstance(error, UserError):
            older = list_checkpoints(output_dir)
            rest = f"{older[0].name} is untouched" if older else "there is no older checkpoint"
            raise UserError(f"{error} ({rest}; the same command goes on from the newest one.)") from error
        raise


def commit_checkpoint(output_dir: Path, step: int, limit: int | None) -> Path:
    """Seals what lies in the staging directory, gives it its name, and deletes the oldest beyond `limit`."""
    staged, destination = output_dir / TMP_DIR / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
    write_checksums(staged)
    fsync_directory(staged)
    replace_directory(staged, destination, CHECKSUM_FILE)
    shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)
    for old in _owned_checkpoints(output_dir)[limit:] if limit else []:
        shutil.rmtree(old, ignore_errors=True)
    return destination


def delete_checkpoints(output_dir: Path) -> None:
    """Deletes all checkpoints of a run, so that the next one starts anew."""
    for checkpoint in _owned_checkpoints(output_dir):
        shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)


def _owned_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that this project wrote; others are never deleted."""
    return [checkpoint for checkpoint in list_checkpoints(output_dir) if locate(checkpoint, CHECKSUM_FILE).is_file()]


def check_resumable(checkpoint: Path) -> None:
    """Makes sure that a checkpoint holds more than weights.

    Raises:
        UserError: if it has no optimizer state; says how to train further from its weights.
    """
    # DeepSpeed keeps the optimizer's state in global_stepN/, everything else in files named optimizer*.
    if [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]:
        return
    if (checkpoint / "adapter_config.json").is_file():
        weights = f"set adapter_name_or_path: {checkpoint}"
    else:
        weights = f"copy the tokenizer's files into it and set model_name_or_path: {checkpoint}"
    raise UserError(
        f"{checkpoint} cannot be resumed: it was saved with save_only_model: true, without the state of optimizer, "
        f"learning rate schedule and random numbers. To start a new schedule from its weights, {weights} and another "
        "output_dir. To be able to resume a run, train with save_only_model: false."
    )


def check_resume_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Makes sure that a checkpoint comes from a run with these settings.

    Raises:
        UserError: names what differs.
    """
    before = json.loads(locate(checkpoint, "training_args.json").read_text(encoding="utf-8"))
    before.setdefault("model checksum", settings.get("model checksum"))  # runs of earlier versions have none
    if changes := diff_settings(before, settings):
        raise UserError(
            f"{checkpoint} was made with other settings:\n  - " + "\n  - ".join(changes) + "\nGo on with those, choose "
            "another output_dir, or set overwrite_output_dir: true (steps: OVERWRITE=1) to start anew."
        )
