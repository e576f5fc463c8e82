"""constants.py and the environment variables it reads."""

import pytest

from tests.scripts import start


@pytest.mark.slow
def test_empty_directories_are_unset(monkeypatch):
    code = "import constants; print(constants.CORPUS_DIR, constants.WORK_DIR, constants.BASE_MODEL_DIR)"
    empty = dict.fromkeys(("PROFILE", "WORK_DIR", "CORPUS_DIR", "BASE_MODEL_DIR"), "")
    for name in empty:
        monkeypatch.delenv(name, raising=False)
    assert start(["-c", code], **empty).stdout == start(["-c", code]).stdout != ""
