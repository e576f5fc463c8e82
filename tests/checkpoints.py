"""What tests of checkpoints share: ChatGLM3's original format in miniature, and adapters of the tiny model."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtuner.console import UserError
from llmtuner.weights.convert_chatglm import convert_chatglm
from tests.helpers import ROOT

TINY = ROOT / "tests" / "fixtures" / "tiny_chatglm3"
CONFIG = json.loads((TINY / "config.json").read_text())


def weights() -> dict[str, torch.Tensor]:
    return load_file(TINY / "model.safetensors")


def publish(directory, tensors=None, tokenizer=None, **changes):
    """Saves a checkpoint in the original format with changes in config.json; None removes an entry."""
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is not False:
        save_file(weights() if tensors is None else tensors, directory / "model.safetensors")
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        shutil.copyfile(tokenizer / "tokenizer.model", directory / "tokenizer.model")
    return directory


def publish_extended(directory, model_file, rows):
    """A checkpoint with the layout of the original project's models: more rows, and the tokenizer that they are for."""
    tensors = weights()
    for name, tensor in tensors.items():
        if len(tensor) == CONFIG["padded_vocab_size"]:
            tensors[name] = torch.randn(rows, tensor.shape[1], generator=torch.Generator().manual_seed(0))
    publish(directory, tensors, padded_vocab_size=rows)
    shutil.copyfile(model_file, directory / "tokenizer.model")
    return directory


def assert_rejected(source, parent, *parts, overwrite=False):
    """Converting into an empty directory raises `UserError` with all parts in its message, and leaves nothing behind."""
    parent.mkdir(exist_ok=True)
    with pytest.raises(UserError) as error:
        convert_chatglm(source, parent / "glm", overwrite)
    for part in parts:
        assert str(part) in str(error.value)
    assert not list(parent.iterdir())


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def truncate(model):
    """The weights as they are after an interrupted download."""
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return file
