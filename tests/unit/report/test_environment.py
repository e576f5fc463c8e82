"""The environment a report names."""

import re
import shutil
import subprocess
import sys

import pytest

from llmtuner.report import environment as surroundings
from llmtuner.report.environment import environment


def test_environment():
    facts = environment()
    assert facts["versions"]["Python"] == sys.version.split()[0]
    assert re.fullmatch(r"\d+\.\d+.*", facts["versions"]["transformers"])
    assert int(facts["machine"]["cores"]) >= 1
    assert all(isinstance(value, str) for section in facts.values() for value in section.values())


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(surroundings, "ROOT", tmp_path.resolve())
    assert "code" not in environment()
    git("init", "-q")
    assert "code" not in environment()  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert environment()["code"]["commit"] == commit
    (tmp_path / "file").write_text("2")
    assert environment()["code"]["commit"] == f"{commit} with changes"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(surroundings, "ROOT", tmp_path.resolve() / "inside")  # unpacked in somebody else's repository
    assert "code" not in environment()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "code" not in environment()
