"""Saves checkpoints atomically, with size and checksum of every file, and verifies them before they are used."""

import json
import platform
import shutil
import uuid
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from llmtuner.aliases import locate
from llmtuner.console import UserError, is_rank_zero, print0
from llmtuner.files import MARKER, atomic_write_json, check_writable, fsync_directory, translate_disk_errors
from llmtuner.hparams import diff_settings
from llmtuner.locks import file_lock
from llmtuner.model.adapters import ADAPTER_CONFIG_FILES, WEIGHT_FILES
from llmtuner.outputs import finish_publishing, read_marker, recover_directory, replace_directory
from llmtuner.tokenizer.encoding import TOKENIZER_FILES
from llmtuner.train.schedule import is_other_length

CHECKSUM_FILE = "checksums.json"  # written last: file -> [bytes, CRC-32]
RUN_MARKER = "a training run"  # in the marker of an output_dir
TMP_DIR = ".saving"  # in output_dir; becomes checkpoint-N once it is complete
DRY_RUN_DIR = ".dry_run"  # in output_dir: the output_dir of a dry run
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
    """Locks a run's directory against other runs, and repairs what a killed run left there; rank 0 does it for all.

    Raises:
        UserError: if it cannot be written, another run uses it, or it holds files under the names of a run's files that no
            run of this project wrote.
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
            remove_dry_run(output_dir)
            for old in output_dir.glob("checkpoint-*.old"):
                recover_directory(output_dir / old.name.split(".")[0], locate(old, CHECKSUM_FILE).name)
            yield
    finally:
        if is_new and not any(output_dir.iterdir()):
            output_dir.rmdir()


def check_shared(output_dir: Path, checkpoint: Path | None) -> None:
    """Makes sure that all ranks see output_dir, into which each writes its part of a checkpoint, and one to resume from.

    Raises:
        UserError: names machines that do not see what rank 0 sees.
    """
    probe = [f".probe-{uuid.uuid4()}"]
    try:
        if is_rank_zero():
            (output_dir / probe[0]).touch()
        broadcast_object_list(probe)
        sees_all = (output_dir / probe[0]).exists() and (checkpoint is None or checkpoint.is_dir())
        machines = gather_object([None if sees_all else platform.node()])
    finally:
        if is_rank_zero():
            (output_dir / probe[0]).unlink(missing_ok=True)
    if blind := sorted({machine for machine in machines if machine}):
        raise UserError(
            f"{' and '.join(blind)} cannot see {checkpoint or output_dir} as rank 0 does, and each process writes its part of "
            "a checkpoint there. Set output_dir (steps: WORK_DIR) to a directory that all machines share, such as NFS; or "
            "set save_strategy: no, with which rank 0 saves the result alone and an interrupted run starts over."
        )


def _check_output_dir(output_dir: Path) -> None:
    """Makes sure that no file of another program has a name under which a run writes or deletes files."""
    is_run = (read_marker(output_dir) or {}).get("made_by") == RUN_MARKER  # a merged model is not a run
    is_owned = is_run or bool(_owned_checkpoints(output_dir)) or _has_legacy_settings(output_dir)
    foreign = [] if is_owned else sorted(path.name for pattern in RUN_FILES for path in output_dir.glob(pattern))
    if foreign:
        raise UserError(
            f"output_dir {output_dir} holds files that no run of this project wrote, such as {foreign[0]}. Nothing was "
            "changed: choose another output_dir."
        )


def _has_legacy_settings(output_dir: Path) -> bool:
    """Tells whether this is a finished run of an earlier version, which wrote no marker."""
    try:
        return "finetuning_type" in json.loads(locate(output_dir, "training_args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def prepare_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Marks a directory as a run's, and deletes the checkpoints of an earlier run if `overwrite` is set."""
    atomic_write_json(output_dir / MARKER, {"made_by": RUN_MARKER})  # names no files: the directory is never replaced
    if overwrite:
        delete_checkpoints(output_dir)


def delete_superseded(output_dir: Path, step: int, settings: dict[str, Any]) -> None:
    """Deletes the checkpoints after `step` of a longer or shorter run, which now goes on from there with these settings."""
    for checkpoint in _owned_checkpoints(output_dir):
        with suppress(OSError, ValueError):  # what cannot be read is nobody's
            if checkpoint_step(checkpoint) > step and is_other_length(changed_settings(checkpoint, settings)):
                shutil.rmtree(checkpoint, ignore_errors=True)


def remove_dry_run(output_dir: Path) -> None:
    """Deletes what a dry run has made in a run's directory."""
    if (read_marker(output_dir / DRY_RUN_DIR) or {}).get("made_by") == RUN_MARKER:
        shutil.rmtree(output_dir / DRY_RUN_DIR)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, newest first, without verifying them."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """Returns the step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def valid_checkpoints(output_dir: Path) -> Iterator[Path]:
    """Yields the checkpoints that pass verification, newest first, and prints which do not."""
    for checkpoint in list_checkpoints(output_dir):
        if damage := verify_checkpoint(checkpoint):
            print0(f"{checkpoint} failed verification ({damage}), skipping")
        else:
            yield checkpoint


def verify_checkpoint(checkpoint: Path) -> str:
    """Returns what is wrong with a checkpoint, or an empty text if every file matches its size and checksum."""
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
                return f"{name} does not match its checksum"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{checksums.name} cannot be read: {error}"
    return ""


def write_checksums(directory: Path) -> None:
    """Writes size and checksum of every file of a checkpoint, which marks it as complete."""
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
    """Removes an incomplete checkpoint if saving fails, and says from which one the run can be resumed.

    Raises:
        UserError: if the disk is full or not writable.
    """
    try:
        with translate_disk_errors(output_dir / f"checkpoint-{step}"):
            yield
    except BaseException as error:
        shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)
        if isinstance(error, UserError):
            older = list_checkpoints(output_dir)
            rest = f"{older[0].name} is unchanged" if older else "there is no older checkpoint"
            raise UserError(f"{error} ({rest}; the same command resumes from the latest one.)") from error
        raise


def commit_checkpoint(output_dir: Path, step: int, limit: int | None, kept: Collection[int] = ()) -> Path:
    """Moves a complete checkpoint from the temporary directory to its name, and deletes the oldest beyond `limit`.

    Args:
        kept: steps of checkpoints that are kept beside these.
    """
    partial, destination = output_dir / TMP_DIR / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
    write_checksums(partial)
    fsync_directory(partial)
    replace_directory(partial, destination, CHECKSUM_FILE)
    shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)
    for old in _owned_checkpoints(output_dir)[limit:] if limit else []:
        if checkpoint_step(old) not in {step, *kept}:
            shutil.rmtree(old, ignore_errors=True)
    return destination


def delete_checkpoints(output_dir: Path) -> None:
    """Deletes all checkpoints of a run, so that the next one starts over."""
    for checkpoint in _owned_checkpoints(output_dir):
        shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)


def _owned_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints that this project wrote; others are never deleted."""
    return [checkpoint for checkpoint in list_checkpoints(output_dir) if locate(checkpoint, CHECKSUM_FILE).is_file()]


def changed_settings(checkpoint: Path, settings: dict[str, Any]) -> list[str]:
    """Returns the settings that change what is learned and differ from those of a checkpoint's run, as lines."""
    before = read_settings(checkpoint)
    before.setdefault("model checksum", settings.get("model checksum"))  # runs of earlier versions have none
    return diff_settings(before, settings)


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """Returns the settings of the run that wrote a checkpoint."""
    settings: dict[str, Any] = json.loads(locate(checkpoint, "training_args.json").read_text(encoding="utf-8"))
    return settings
