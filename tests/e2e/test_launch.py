"""Several processes under the launcher: what went wrong is printed once, with the exit code of the process that failed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT
from tests.scripts import free_port

pytestmark = pytest.mark.distributed

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from llmtuner.console import UserError, TrainingInterrupted, run_cli

def main():
    how, rank = sys.argv[1], int(os.environ["RANK"])
    if how == "refused by all" or how == "refused by one" and rank == 1:
        raise UserError("no such corpus")
    if how == "crash of all" or how == "crash of one" and rank == 1:
        raise ZeroDivisionError("a mistake")
    if how == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "ended" and rank == 1:
        os._exit(7)
    if how == "stopped":
        signal.signal(signal.SIGTERM, stopped)
        Path(f"ready{rank}").touch()
    if how != "fine":
        time.sleep(60)

def stopped(number, frame):
    raise TrainingInterrupted("saved", number)

run_cli(main)
"""


def launch(directory, how, port=None):
    (directory / "script.py").write_text(SCRIPT)
    options = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", port or free_port()]
    command = [sys.executable, "-P", str(ROOT / "llmtuner" / "train" / "launch.py"), *options, "script.py", how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("refused by all", 2, "\nerror: no such corpus\n"),
        ("refused by one", 2, "\nerror: no such corpus\n"),
        ("killed", 137, "\nerror: process 1 was killed by SIGKILL (often the system is out of memory).\n"),
        ("ended", 7, "\nerror: process 1 ended with exit code 7.\n"),
        ("fine", 0, ""),
    ],
)
def test_failure_is_one_message(tmp_path, how, code, message):
    launched = launch(tmp_path, how)
    output, errors = launched.communicate(timeout=60)
    assert (launched.returncode, output, errors) == (code, "", message)


@pytest.mark.parametrize("how", ["crash of all", "crash of one"])
def test_crash_is_one_traceback(tmp_path, how):
    launched = launch(tmp_path, how)
    _output, errors = launched.communicate(timeout=60)
    assert launched.returncode == 1
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("ZeroDivisionError: a mistake")
    assert "torch/distributed" not in errors


def test_run_that_is_asked_to_end_says_so_once(tmp_path):
    launched = launch(tmp_path, "stopped")
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        assert launched.poll() is None
        time.sleep(0.05)
    launched.send_signal(signal.SIGTERM)
    output, errors = launched.communicate(timeout=60)
    assert (launched.returncode, output, errors) == (143, "\nsaved\n", "")


def test_port_in_use_is_a_message(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launched = launch(tmp_path, "fine", str(taken.getsockname()[1]))
        _, errors = launched.communicate(timeout=60)
    assert launched.returncode == 2
    assert errors.startswith("\nerror: the processes cannot be started: ")
    assert "MASTER_PORT" in errors
    assert errors.count("\n") == 2


@pytest.mark.parametrize("variables", [{}, {"NPROC_PER_NODE": "two"}, {"OVERWRITE": "ture"}], ids=str)
def test_wrappers_of_the_steps_show_one_message(tmp_path, variables):
    environment = {**os.environ, "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu", "MASTER_PORT": free_port()}
    environment |= {"PYTHON": sys.executable, "WORK_DIR": str(tmp_path / "work"), **variables}
    command = ["bash", str(ROOT / "step5_train_pt_multi_gpu.sh"), "--learning_rate", "x"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("\nerror: ")
    assert ended.stderr.count("\n") == 2
