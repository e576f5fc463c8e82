"""Starts a script of this project in a process of its own, and checks that it is refused with one line."""

import os
import subprocess
import sys

from tests.helpers import ROOT


def start(words, python=(sys.executable,), cwd=ROOT, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run(
        [*python, *words], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def refused(result, *parts):
    """One line of message, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("\nerror: ")
    assert result.stderr.count("\n") == 2
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr
