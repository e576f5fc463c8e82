"""Reading and writing checkpoints tensor by tensor."""

import errno
import json
import os
import shutil
from collections import namedtuple
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtuner.console import UserError
from llmtuner.files import MARKER
from llmtuner.outputs import atomic_directory
from llmtuner.weights import lazy_checkpoint
from llmtuner.weights.convert_chatglm import convert_chatglm
from llmtuner.weights.lazy_checkpoint import LazyTensor, concatenate, in_memory, open_checkpoint, write_checkpoint
from tests.checkpoints import TINY, assert_rejected, publish


def test_shards_load_in_transformers(glm, tmp_path, monkeypatch):
    source = open_checkpoint(glm)
    written = write_checkpoint(list(source.values()), tmp_path, max_shard_bytes=100_000)
    assert written.num_files == len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.nbytes == sum(tensor.nbytes for tensor in source.values())
    sizes = [file.stat().st_size for file in sorted(tmp_path.glob("*.safetensors"))]
    assert all(before + after > 100_000 for before, after in pairwise(sizes))  # filled in order
    assert all(file.stat().st_size < 100_000 + 2_000 for file in tmp_path.glob("model-0000[2-4]*"))
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*")} == {0o666 & ~umask}
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(glm / name, tmp_path / name)
    weights_of = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights_of[name], tensor) for name, tensor in load_file(glm / "model.safetensors").items())
    assert list(open_checkpoint(tmp_path)) == list(source)


def test_dtypes_of_one_file_are_aligned(tmp_path):
    """Three halves before a double would put it at an offset that is not a multiple of 8."""
    tensors = {"half": torch.ones(3).half(), "double": torch.ones(3).double(), "single": torch.ones(3)}
    write_checkpoint([in_memory(name, tensor) for name, tensor in tensors.items()], tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(content[name], tensor) and content[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    file = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "read_rows",
    [
        lambda start, stop: torch.ones(stop - start, 2, dtype=torch.float16),
        lambda start, stop: torch.ones(stop - start, 3),
        lambda start, stop: torch.ones(stop - start - 1, 2),
        lambda start, stop: torch.ones(stop - start + 1, 2),
    ],
)
def test_tensor_that_differs_from_its_description(tmp_path, read_rows):
    with pytest.raises(UserError, match="somewhere"):
        write_checkpoint([LazyTensor("a", (4, 2), torch.float32, read_rows, "a somewhere")], tmp_path)


def test_concatenated_rows():
    whole = torch.arange(24.0).view(8, 3)
    parts = [
        in_memory("a", whole[:3]),
        in_memory("a", whole[3:3]),
        in_memory("a", whole[3:7]),
        in_memory("a", whole[7:]),
    ]
    joined = concatenate("all", parts)
    assert (joined.name, joined.shape) == ("all", (8, 3))
    for start in range(8):
        for stop in range(start + 1, 9):
            assert torch.equal(joined.read_rows(start, stop), whole[start:stop])


def test_a_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(lazy_checkpoint.shutil, "disk_usage", lambda path: usage(0, 0, 700_000))
    monkeypatch.setattr(lazy_checkpoint, "_write_tensor", None)
    assert_rejected(publish(tmp_path / "published"), tmp_path / "out", "need 0.001 GB", "0.001 GB free")
    monkeypatch.undo()
    monkeypatch.setattr(lazy_checkpoint.shutil, "disk_usage", lambda path: usage(0, 0, 800_000))
    convert_chatglm(TINY, tmp_path / "glm")


def test_destination_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        convert_chatglm(TINY, tmp_path / "file" / "glm")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk filled up"), (errno.EACCES, "cannot write"), (errno.EBADF, None)]
)
def test_failed_write_keeps_the_earlier_result(tmp_path, number, message):
    with atomic_directory(tmp_path / "result") as older:
        (older / "older").touch()

    def fail_half_way():
        with atomic_directory(tmp_path / "result", replace=True) as partial:
            (partial / "half").touch()
            raise OSError(number, "no")

    with pytest.raises(UserError if message else OSError, match=message):
        fail_half_way()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "result",
        f"result/{MARKER}",
        "result/older",
    ]
