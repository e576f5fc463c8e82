"""The command line `python -m llmtuner`: its commands and what they refuse."""

import os
import resource
import subprocess
import sys

import pytest

from llmtuner.console import UserError
from tests.checkpoints import TINY, publish
from tests.helpers import ROOT


def command(*words, preexec_fn=None, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    line = [sys.executable, "-m", "llmtuner", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=preexec_fn)


def test_command_line(tmp_path):
    source = publish(tmp_path / "published", quantization_bit=4)
    (tmp_path / "room").mkdir()
    for words, part in [(("convert", source, tmp_path / "room" / "glm"), "quantized"), (("convert",), "usage")]:
        result = command(*words)
        assert (result.returncode, result.stderr.count("error:")) == (2, 1)
        assert part in result.stderr
        assert "Traceback" not in result.stderr
    assert not list((tmp_path / "room").iterdir())


def test_doors_of_the_command_line(tmp_path, monkeypatch):
    from llmtuner.__main__ import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["llmtuner", *map(str, words)])
        main()

    call("convert", TINY, tmp_path / "glm")
    with pytest.raises(UserError, match="OVERWRITE=1"):
        call("convert", TINY, tmp_path / "glm")
    monkeypatch.setenv("OVERWRITE", "1")
    call("convert", TINY, tmp_path / "glm")
    for door in ("train", "export"):
        with pytest.raises(UserError, match="cannot read"):
            call(door, tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="two directories or more"):
        call("compare", tmp_path, "--output", tmp_path / "page.html")


@pytest.mark.slow
def test_disk_that_fills_up(tmp_path):
    """For real: the process may not write a file of more than 300 kB."""
    room = tmp_path / "room"
    room.mkdir()
    result = command(
        *("convert", TINY, room / "glm"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert result.returncode == 2, result.stderr
    assert "the disk filled up while writing" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(room.iterdir())
