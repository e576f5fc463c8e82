"""Output directories: they appear complete or not at all, replace only what this project made, and record their inputs."""

import fnmatch
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmtuner.console import UserError, print0
from llmtuner.files import MARKER, atomic_write_json, fsync, fsync_directory, translate_disk_errors
from llmtuner.locks import file_lock

IGNORED_FILES = (MARKER, ".lock", ".DS_Store", ".*.partial")  # patterns of files that hold nobody's work
REPO_ROOT = Path(__file__).resolve().parent.parent
TMP_SUFFIX = re.compile(r"\.[0-9a-f]{8}\.(partial|old|trash)")  # of directories being written or replaced
READY, MANIFEST = ".ready", "manifest.json"  # a directory of complete files on their way into its parent
MAX_NAMES_SHOWN = 3


def check_destination(destination: Path, replace: bool = False) -> Path:
    """Checks that `destination` can be written without losing anything; follows symbolic links.

    Args:
        replace: whether a directory that this project made may be replaced.

    Returns:
        the real path.

    Raises:
        UserError: if it is a directory that is never replaced, or holds anything that this project did not make.
    """
    try:
        path = destination.expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{destination} cannot be followed ({error}). Choose another directory.") from error
    named = str(destination) if path == destination.absolute() else f"{destination} ({path})"
    for place, whose in (
        (Path.cwd(), "the current directory"),
        (Path.home(), "the home directory"),
        (REPO_ROOT, "the repository"),
    ):
        if path == place.resolve() or path in place.resolve().parents:
            around = "" if path == place.resolve() else "around "
            raise UserError(
                f"{named} is a directory {around}{whose}, which is never replaced. Choose another directory."
            )
    if os.path.ismount(path):
        raise UserError(f"{named} is a mount point and cannot be replaced. Choose a directory inside it.")
    if path.exists() and not path.is_dir():
        raise UserError(f"{named} is a file. Choose another directory.")
    if not path.is_dir() or not any(path.iterdir()):
        return path
    marker = read_marker(path)
    foreign = foreign_files(path, marker)
    if marker is None or foreign:
        shown = ", ".join(foreign[:MAX_NAMES_SHOWN]) + (
            f" and {len(foreign) - MAX_NAMES_SHOWN} more" * (len(foreign) > MAX_NAMES_SHOWN)
        )
        raise UserError(
            f"{named} holds files that this project did not make ({shown}). Nothing was changed: move them away "
            "(results of an earlier version, too), or choose another directory."
        )
    if not replace:
        raise UserError(
            f"{named} holds a result of {marker.get('made_by')} already. Set OVERWRITE=1 to replace it (in a settings "
            "file: overwrite_output_dir: true), or choose another directory."
        )
    return path


def read_marker(directory: Path) -> dict[str, Any] | None:
    """Reads the record of how this project made a directory; None without one."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "made_by" in marker else None


def foreign_files(directory: Path, marker: Mapping[str, Any] | None) -> list[str]:
    """Lists the files of a directory that its marker does not name."""
    known = set(marker.get("files", ())) if marker else set()
    return sorted(
        name
        for name in _list_files(directory)
        if name not in known and not any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in IGNORED_FILES)
    )


def _list_files(directory: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(directory):  # symbolic links to directories are not followed
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in (*files, *links)]
    return found


def write_marker(directory: Path, made_by: str, made_from: Mapping[str, str] | None = None) -> None:
    """Records in a directory what made it, the checksums of its inputs, and the names of its files."""
    files = sorted(name for name in _list_files(directory) if name != MARKER)
    atomic_write_json(directory / MARKER, {"made_by": made_by, "made_from": dict(made_from or {}), "files": files})


def add_to_marker(directory: Path, *names: str) -> None:
    """Records files that a later step wrote into a directory, if it has a marker."""
    if marker := read_marker(directory):
        atomic_write_json(directory / MARKER, {**marker, "files": sorted({*marker.get("files", ()), *names})})


@contextmanager
def atomic_directory(
    destination: Path, made_by: str | None = None, replace: bool = False, made_from: Mapping[str, str] | None = None
) -> Iterator[Path]:
    """Yields a directory to write into that becomes `destination` once everything has been written.

    After an error nothing is left behind, and an older `destination` is untouched. A killed process leaves the old or the
    new directory under that name, or the old one beside it, which the next call restores (`recover_directory`).

    Args:
        made_by: the writer, for the marker; by default the running script.
        replace: whether an older result may be replaced.
        made_from: name -> `checksum` of each input.

    Raises:
        UserError: as `check_destination`, if another process writes it, or if the disk fills up or may not be written to.
    """
    target = check_destination(destination, replace)
    with translate_disk_errors(target), file_lock(target.with_name(f".{target.name}.lock"), str(target)):
        recover_directory(target)
        check_destination(destination, replace)  # again, now that nobody else can change it
        partial = _sibling(target, "partial")
        partial.mkdir()
        try:
            made_by = made_by or Path(sys.argv[0].removesuffix("/__main__.py")).name
            atomic_write_json(
                partial / MARKER, {"made_by": made_by}
            )  # so that the remains of a killed process are recognised
            yield partial
            write_marker(partial, made_by, made_from)
            fsync_directory(partial)
        except BaseException:
            delete_owned(partial)
            raise
        replace_directory(partial, target)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.{kind}")


def replace_directory(new: Path, target: Path, marker: str = MARKER) -> None:
    """Replaces a directory by a complete new one: renames the old one, then the new one, then deletes the old one.

    Args:
        marker: the file that identifies a directory of this project; an old one without it is kept beside the new.

    Raises:
        UserError: if a directory cannot be renamed; says where the old and the new one are.
    """
    old = _sibling(target, "old") if target.is_dir() and any(target.iterdir()) else None
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
        raise UserError(f"cannot rename a directory to {target} ({error.strerror}): {', '.join(places)}.") from error
    fsync(target.parent)
    if old:
        _discard(old, marker)


def _discard(old: Path, marker: str) -> None:
    trash = old.with_suffix(".trash")  # from here on it may be incomplete
    if (old / marker).is_file():
        old.rename(trash)
        if delete_owned(trash, marker):
            return
        old = trash
    print0(f"note: an older version was not deleted, or not completely: {old}")


def recover_directory(destination: Path, marker: str = MARKER) -> None:
    """Repairs what a killed process left beside `destination`: restores an old version, deletes partial ones."""
    target = destination.expanduser().resolve()
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir()):
        kind = TMP_SUFFIX.fullmatch(path.name.removeprefix(target.name)) if path.name.startswith(target.name) else None
        if kind is None or not ((path / marker).is_file() or _is_empty(path)):
            continue
        if kind[1] == "old" and not target.exists():
            path.rename(target)
            print0(f"{target}: restored after an interrupted replacement")
        elif kind[1] == "old":
            _discard(path, marker)
        else:
            delete_owned(path, marker)


def _is_empty(directory: Path) -> bool:
    """Whether a process was killed before it wrote anything into its directory."""
    return all(fnmatch.fnmatch(name, ".*.partial") for name in _list_files(directory))


def delete_owned(directory: Path, marker: str = MARKER) -> bool:
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
    """Moves the files of a complete directory into its parent, all of them or none.

    `finish_publishing` completes what a killed process began.

    Args:
        staged: holds files only; it is gone afterwards.
        obsolete: files of the parent that do not belong with the new ones; they are deleted if they exist.
    """
    directory = staged.parent
    finish_publishing(directory)
    names = sorted(_list_files(staged))
    atomic_write_json(staged / MANIFEST, {"files": names, "obsolete": sorted(set(obsolete) - set(names))})
    fsync_directory(staged)
    staged.rename(directory / READY)  # from here on the new files are the valid ones
    fsync(directory)
    finish_publishing(directory)


def finish_publishing(directory: Path) -> None:
    """Moves complete files that are waiting into place; does nothing if there are none."""
    ready = directory / READY
    if not (ready / MANIFEST).is_file():
        return
    manifest = json.loads((ready / MANIFEST).read_text(encoding="utf-8"))
    # An adapter may have been downloaded: no name may point outside its directory.
    if any(Path(name).name != name for name in (*manifest["files"], *manifest["obsolete"])):
        raise UserError(f"{ready / MANIFEST} names files outside {directory}. Nothing was changed: delete {ready}.")
    for name in manifest["obsolete"]:
        (directory / name).unlink(missing_ok=True)
    for name in manifest["files"]:
        if (ready / name).exists():
            (ready / name).replace(directory / name)
    fsync(directory)
    shutil.rmtree(ready)
