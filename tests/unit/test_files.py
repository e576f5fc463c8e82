"""Files: errors of the disk are one message, and a checksum tells contents apart and nothing else."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from llmtuner.console import UserError
from llmtuner.files import checksum, translate_disk_errors


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "filled up"),
        (OSError(errno.EACCES, "Permission denied"), "cannot write"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "filled up"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "filled up"),
        (RuntimeError("shapes differ"), None),
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (UserError("No space left on device"), None),
    ],
)
def test_errors_of_the_disk_and_others(tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=1000))
    expected = (
        pytest.raises(UserError, match=message) if message else pytest.raises(type(error), match=str(error.args[-1]))
    )
    with expected as raised, translate_disk_errors(tmp_path / "not" / "there"):
        raise error
    assert (raised.value is error) == (message is None)
    monkeypatch.undo()  # with room on the disk a failed write of PyTorch is something else
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError), translate_disk_errors(tmp_path):
            raise error


# ------------------------------------------------------------------------------------------------------------ checksums
def test_checksum_tells_contents_apart_and_nothing_else(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(40 * 2**20))
        (tmp_path / name / "config.json").write_text("{}")
    os.utime(tmp_path / "two" / "config.json", (1, 1))
    (tmp_path / "two" / "README.md").write_text("a card")
    (tmp_path / "two" / "generation_config.json").write_text("{}")
    first = checksum(tmp_path / "one")
    assert checksum(tmp_path / "two") == first != ""
    for place in (0, 13 * 2**20 + 7, 40 * 2**20 - 1):  # its head, inside a sample, its end
        with (tmp_path / "two" / "model.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        changed = checksum(tmp_path / "two")
        assert changed != first
        first = changed
    (tmp_path / "two" / "config.json").write_text('{"a": 1}')
    assert checksum(tmp_path / "two") != first
    assert checksum(tmp_path / "nowhere") == ""
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == {}
