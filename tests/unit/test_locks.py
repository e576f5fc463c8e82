"""Locks between processes: a second one is refused, and a dead one holds nothing."""

import os
import subprocess
import sys

import pytest

from llmtuner.console import UserError
from llmtuner.locks import acquire_lock, file_lock, release_lock
from tests.helpers import ROOT

HOLDS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from llmtuner.locks import acquire_lock
acquire_lock(Path(sys.argv[2]), "it")
print("held", flush=True)
time.sleep(60)
"""


def test_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    lock = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(ROOT), str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"WORK_DIR=here is in use by process {holder.pid} on "):
            acquire_lock(lock, "WORK_DIR=here")
    finally:
        holder.kill()
        holder.wait()
    assert lock.exists()  # a dead process leaves the file, and nothing else
    with file_lock(lock, "it"), file_lock(lock, "it"):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()
    with pytest.raises(KeyError):
        release_lock(lock)
