"""Directories that appear complete or not at all, never replace what this project did not make, and say what they came from."""

import atexit
import errno
import fcntl
import fnmatch
import json
import os
import re
import secrets
import shutil
import socket
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtuner.console import InputError, disk_errors, say, write_json

MARKER = ".llmtuner.json"  # in each directory that this project made: by what, from what, and which files
LITTER = (MARKER, ".lock", ".DS_Store", ".*.partial")  # patterns of files that are nobody's work
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system that has none: a run goes without
REPOSITORY = Path(__file__).resolve().parent.parent
SET_ASIDE = re.compile(r"\.[0-9a-f]{8}\.(partial|old|trash)")  # endings of a directory's name before and after its use
READY, MANIFEST = ".ready", "manifest.json"  # files on their way into a directory that others are in
NAMES_SHOWN = 3
SAMPLE_BYTES, SAMPLES = 2**20, 16  # of a large file, what its checksum covers
# What makes a model directory the model that it is; evaluation changes the generation settings and the card.
MODEL_FILES = ("*.safetensors", "*.bin", "*.model", "*.jinja", "*.json")
NOT_MODEL_FILES = ("generation_config.json", "trainer_state.json", MARKER)


# ---------------------------------------------------------------------------------------------------------------- locks
_held: dict[Path, list[int]] = {}  # lock file -> descriptor, and how many times this process holds it


@contextmanager
def exclusive(lock_file: Path, what: str) -> Iterator[None]:
    """Holds a lock that only one process can hold at a time; one that died holds none.

    Args:
        what: what the lock protects, for the message.

    Raises:
        InputError: if another process holds it; names that process.
    """
    acquire(lock_file, what)
    try:
        yield
    finally:
        release(lock_file)


def acquire(lock_file: Path, what: str) -> None:
    """Takes a lock until `release`, or until this process ends; a process may take the same one again.

    Raises:
        InputError: as `exclusive`.
    """
    lock_file = lock_file.resolve()
    if lock_file in _held:
        _held[lock_file][1] += 1
        return
    with disk_errors(lock_file):
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by forked workers
            except (BlockingIOError, PermissionError):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise InputError(
                    f"{what} is in use by {holder or 'another process'}. Wait until that has ended, or stop it."
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
            if _is_same_file(descriptor, lock_file):
                break
            os.close(descriptor)  # its holder deleted it at that very moment
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[lock_file] = [descriptor, 1]


@atexit.register
def _release_all() -> None:
    for lock_file in list(_held):
        _held[lock_file][1] = 1
        release(lock_file)


def release(lock_file: Path) -> None:
    """Gives a lock back."""
    lock_file = lock_file.resolve()
    held = _held[lock_file]
    held[1] -= 1
    if not held[1]:
        del _held[lock_file]
        lock_file.unlink(missing_ok=True)
        os.close(held[0])


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------------------------------- what may be replaced
def check_destination(destination: Path, replace: bool = False) -> Path:
    """Makes sure that `destination` can be written, and that nothing is lost by it; symbolic links are followed.

    Args:
        replace: whether a directory that this project made may be replaced.

    Returns:
        the real path.

    Raises:
        InputError: if it is a place that is never replaced, or holds anything that this project did not make.
    """
    try:
        path = destination.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{destination} cannot be followed ({error}). Choose another directory.") from error
    named = str(destination) if path == destination.absolute() else f"{destination} ({path})"
    for place, whose in (
        (Path.cwd(), "the current directory"),
        (Path.home(), "the home directory"),
        (REPOSITORY, "the repository"),
    ):
        if path == place.resolve() or path in place.resolve().parents:
            around = "" if path == place.resolve() else "around "
            raise InputError(
                f"{named} is a directory {around}{whose}, which is never replaced. Choose another directory."
            )
    if os.path.ismount(path):
        raise InputError(f"{named} is a mount point and cannot be replaced. Choose a directory inside it.")
    if path.exists() and not path.is_dir():
        raise InputError(f"{named} is a file. Choose another directory.")
    if not path.is_dir() or not any(path.iterdir()):
        return path
    marker = read_marker(path)
    foreign = foreign_files(path, marker)
    if marker is None or foreign:
        shown = ", ".join(foreign[:NAMES_SHOWN]) + (
            f" and {len(foreign) - NAMES_SHOWN} more" * (len(foreign) > NAMES_SHOWN)
        )
        raise InputError(
            f"{named} holds files that this project did not make ({shown}). Nothing was changed: move them away "
            "(results of an earlier version, too), or choose another directory."
        )
    if not replace:
        raise InputError(
            f"{named} holds a result of {marker.get('made_by')} already. Set OVERWRITE=1 to replace it (in a settings "
            "file: overwrite_output_dir: true), or choose another directory."
        )
    return path


def read_marker(directory: Path) -> dict[str, Any] | None:
    """What a directory says of how this project made it; None if it does not."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "made_by" in marker else None


def foreign_files(directory: Path, marker: Mapping[str, Any] | None) -> list[str]:
    """The files in a directory that its marker does not name."""
    known = set(marker.get("files", ())) if marker else set()
    return sorted(
        name
        for name in _files(directory)
        if name not in known and not any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in LITTER)
    )


def _files(directory: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(directory):  # symbolic links to directories are not followed
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in (*files, *links)]
    return found


def mark(directory: Path, made_by: str, made_from: Mapping[str, str] | None = None) -> None:
    """Writes into a directory what made it, the checksums of what it was made from, and the names of its files."""
    files = sorted(name for name in _files(directory) if name != MARKER)
    write_json(directory / MARKER, {"made_by": made_by, "made_from": dict(made_from or {}), "files": files})


def add_to_marker(directory: Path, *names: str) -> None:
    """Names files that a later step wrote into a directory, if it has a marker."""
    if marker := read_marker(directory):
        write_json(directory / MARKER, {**marker, "files": sorted({*marker.get("files", ()), *names})})


# ------------------------------------------------------------------------------------------------ complete or not at all
@contextmanager
def atomic_directory(
    destination: Path, made_by: str | None = None, replace: bool = False, made_from: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Yields a directory to write into that becomes `destination` only when everything has been written.

    After an error nothing is left behind and an older `destination` is untouched. A process that is killed leaves either
    the old or the new one under that name, or the old one beside it, which the next call puts back
    (`recover_directory`).

    Args:
        made_by: what writes it, for the marker; by default the running script.
        replace: whether an older result may be replaced.
        made_from: name -> `checksum` of what it is made from.

    Raises:
        InputError: as `check_destination`, if another process writes it, or if the disk fills up or may not be written to.
    """
    target = check_destination(destination, replace)
    with disk_errors(target), exclusive(target.with_name(f".{target.name}.lock"), str(target)):
        recover_directory(target)
        check_destination(destination, replace)  # nobody else can change it now
        partial = _beside(target, "partial")
        partial.mkdir()
        try:
            made_by = made_by or Path(sys.argv[0].removesuffix("/__main__.py")).name
            write_json(partial / MARKER, {"made_by": made_by})  # by this a rest of a killed process is recognised
            yield partial
            mark(partial, made_by, made_from)
            sync(partial)
        except BaseException:
            delete_made(partial)
            raise
        swap(partial, target)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.{kind}")


def swap(new: Path, target: Path, marker: str = MARKER) -> None:
    """Gives a complete directory its name: the old one is renamed, then the new one, then the old one is deleted.

    Args:
        marker: the file by which a directory of this project is recognised; an old one without it is left beside.

    Raises:
        InputError: if a directory cannot be renamed; says where the old and the new one are.
    """
    old = _beside(target, "old") if target.is_dir() and any(target.iterdir()) else None
    try:
        if old:
            target.rename(old)
        new.rename(target)
    except OSError as error:
        if old and old.exists():
            with suppress(OSError):
                old.rename(target)
        places = [f"the new version is complete in {new}"]
        if old:
            places.append(f"the old one in {target if target.exists() else old}")
        raise InputError(f"cannot give {target} its name ({error.strerror}): {', '.join(places)}.") from error
    _sync_one(target.parent)
    if old:
        _throw_away(old, marker)


def _throw_away(old: Path, marker: str) -> None:
    trash = old.with_suffix(".trash")  # from here on it may be incomplete
    if (old / marker).is_file():
        old.rename(trash)
        if delete_made(trash, marker):
            return
        old = trash
    say(f"note: an older version was not deleted, or not completely: {old}")


def recover_directory(destination: Path, marker: str = MARKER) -> None:
    """Puts right what a killed process left beside `destination`: an old version goes back, rests are deleted."""
    target = destination.expanduser().resolve()
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        kind = SET_ASIDE.fullmatch(path.name.removeprefix(target.name)) if path.name.startswith(target.name) else None
        if kind is None or not ((path / marker).is_file() or _holds_nothing(path)):
            continue
        if kind[1] == "old" and not target.exists():
            path.rename(target)
            say(f"{target}: put back after its replacement was interrupted")
        elif kind[1] == "old":
            _throw_away(path, marker)
        else:
            delete_made(path, marker)


def _holds_nothing(directory: Path) -> bool:
    """Whether a process was killed before it had written anything into its directory."""
    return all(fnmatch.fnmatch(name, ".*.partial") for name in _files(directory))


def delete_made(directory: Path, marker: str = MARKER) -> bool:
    """Deletes a directory that this project made, its marker last; false if something of it could not be deleted."""
    try:
        for path in sorted(directory.iterdir(), key=lambda path: path.name == marker):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        directory.rmdir()
    except OSError:
        return not directory.exists()
    return True


def publish_files(staged: Path, obsolete: Iterable[str] = ()) -> None:
    """Moves the files of a complete directory among those of its parent, all of them or none.

    What a killed process has begun, `finish_publishing` ends.

    Args:
        staged: holds files only; it is gone afterwards.
        obsolete: files of the parent that do not belong to the new ones; those that there are, are deleted.
    """
    directory = staged.parent
    finish_publishing(directory)
    names = sorted(_files(staged))
    write_json(staged / MANIFEST, {"files": names, "obsolete": sorted(set(obsolete) - set(names))})
    sync(staged)
    staged.rename(directory / READY)  # from here on the new files count
    _sync_one(directory)
    finish_publishing(directory)


def finish_publishing(directory: Path) -> None:
    """Moves files into their place that are complete and waiting for it; does nothing if there are none."""
    ready = directory / READY
    if not (ready / MANIFEST).is_file():
        return
    manifest = json.loads((ready / MANIFEST).read_text(encoding="utf-8"))
    # An adapter may have been downloaded: no name may lead out of its directory.
    if any(Path(name).name != name for name in (*manifest["files"], *manifest["obsolete"])):
        raise InputError(f"{ready / MANIFEST} names files outside {directory}. Nothing was changed: delete {ready}.")
    for name in manifest["obsolete"]:
        (directory / name).unlink(missing_ok=True)
    for name in manifest["files"]:
        if (ready / name).exists():
            (ready / name).replace(directory / name)
    _sync_one(directory)
    shutil.rmtree(ready)


def sync(directory: Path) -> None:
    """Has the system write every file of a directory to the disk, so that not even a power cut leaves half of one."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync_one(Path(folder, name))
        _sync_one(Path(folder))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ checksums
def checksum(path: Path) -> str:
    """Sixteen hexadecimal digits that change when a file, or what matters of a model directory, changes; "" if missing.

    Names and sizes count, and the contents: of a file over 16 MiB sixteen pieces spread over it, which no retrained model
    leaves as they were. Where a file lies, and its date, do not count.

    Raises:
        InputError: if it cannot be read.
    """
    if path.is_file():
        try:
            return f"{_crc(path):08x}{path.stat().st_size & 0xFFFFFFFF:08x}"
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
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
    """A checksum over several values that JSON can hold."""
    text = json.dumps(list(parts), ensure_ascii=False, sort_keys=True).encode()
    return f"{zlib.crc32(text):08x}{zlib.crc32(text, 1) ^ len(text):08x}"


def _crc(file: Path) -> int:
    size, crc = file.stat().st_size, 0
    with file.open("rb") as content:
        if size <= SAMPLES * SAMPLE_BYTES:
            return zlib.crc32(content.read())
        for number in range(SAMPLES):
            content.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            crc = zlib.crc32(content.read(SAMPLE_BYTES), crc)
    return crc
