"""Locks between processes: a second one is refused, and a dead one holds nothing."""

import os

import pytest

from llmtuner.console import UserError
from llmtuner.locks import acquire_lock, file_lock, release_lock
from tests.scripts import locked_by_another_process


def test_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    lock = tmp_path / ".lock"
    with (
        locked_by_another_process(lock) as holder,
        pytest.raises(UserError, match=rf"WORK_DIR=here is in use by process {holder} on "),
    ):
        acquire_lock(lock, "WORK_DIR=here")
    assert lock.exists()  # a dead process leaves the file, and nothing else
    with file_lock(lock, "it"), file_lock(lock, "it"):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()
    with pytest.raises(KeyError):
        release_lock(lock)
