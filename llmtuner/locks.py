"""Locks between processes: one run at a time writes a directory; a process that dies releases its locks."""

import atexit
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtuner.console import UserError
from llmtuner.files import translate_disk_errors

LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # by a file system; a run then goes without
_held: dict[Path, list[int]] = {}  # lock file -> descriptor, and how many times this process holds it


@contextmanager
def file_lock(lock_file: Path, what: str) -> Iterator[None]:
    """Holds a lock that only one process can hold at a time; a dead process holds none.

    Args:
        what: what the lock protects, for the message.

    Raises:
        UserError: if another process holds it; names that process.
    """
    acquire_lock(lock_file, what)
    try:
        yield
    finally:
        release_lock(lock_file)


def acquire_lock(lock_file: Path, what: str) -> None:
    """Takes a lock until `release`, or until this process ends; a process may take the same one again.

    Raises:
        UserError: as `exclusive`.
    """
    lock_file = lock_file.resolve()
    if lock_file in _held:
        _held[lock_file][1] += 1
        return
    with translate_disk_errors(lock_file):
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by forked workers
            except (BlockingIOError, PermissionError):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"{what} is in use by {holder or 'another process'}. Wait until that has ended, or stop it."
                ) from None
            except OSError as error:
                if error.errno not in LOCKS_UNSUPPORTED:
                    os.close(descriptor)
                    raise
            if _is_same_file(descriptor, lock_file):
                break
            os.close(descriptor)  # its holder deleted it at that very moment
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    _held[lock_file] = [descriptor, 1]


@atexit.register
def _release_all_locks() -> None:
    for lock_file in list(_held):
        _held[lock_file][1] = 1
        release_lock(lock_file)


def lock_holder(lock_file: Path) -> str | None:
    """Returns which process holds a lock, by its own words; None if none does."""
    lock_file = lock_file.resolve()
    if lock_file in _held:  # opening and closing the file would release it
        return lock_file.read_text(encoding="utf-8")
    try:
        descriptor = os.open(lock_file, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCKS_UNSUPPORTED:
            return None
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
    finally:
        os.close(descriptor)  # which releases it
    return None


def release_lock(lock_file: Path) -> None:
    """Releases a lock that `acquire_lock` took."""
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
