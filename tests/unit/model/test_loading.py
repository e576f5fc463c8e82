"""Loading models: damaged or quantized files are one message, and precision follows the memory there is."""

import json
import os
import shutil
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtuner.console import UserError
from llmtuner.model import loading
from llmtuner.model.loading import load_for_evaluation, load_model
from llmtuner.train.tuner import run_exp
from tests.checkpoints import truncate


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def in_shards(model):
    """The same weights in two files with an index."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    order = sorted(weights)
    files = {f"model-0000{part + 1}-of-00002.safetensors": order[part::2] for part in range(2)}
    for file, names in files.items():
        save_file({name: weights[name] for name in names}, model / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --------------------------------------------------------------------------------------------------------- truncated
@pytest.mark.parametrize("load", [load_model, load_for_evaluation])
def test_truncated_weights_are_reported(model, load):
    file = truncate(model)
    with pytest.raises(UserError, match="damaged or truncated") as caught:
        load(model)
    assert str(file) in str(caught.value)


def test_truncated_or_missing_shard_is_reported(model):
    in_shards(model)
    load_model(model)
    shard = model / "model-00002-of-00002.safetensors"
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=f"{shard.name} is damaged or truncated"):
        load_model(model)
    shard.unlink()
    with pytest.raises(UserError, match=f"are missing: {shard.name}"):
        load_model(model)


# ------------------------------------------------------------------------------------------------------ other files
@pytest.mark.parametrize("content", ["", '{"a": ', "[1]", "{}", '"text"', "7", "\udcff"], ids=repr)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_file_is_a_message(model, name, content):
    (model / name).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=str(model)):
        load_for_evaluation(model)


@pytest.mark.parametrize("content", ["", '{"a": ', "[1]", '"text"', "7"], ids=repr)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_damaged_further_file_is_a_message_or_without_effect(model, name, content):
    (model / name).write_text(content)
    with suppress(UserError):  # nothing else may be raised
        load_for_evaluation(model)


@pytest.mark.parametrize(
    "value", [{"hidden_size": "big"}, {"dtype": "float7"}, {"hidden_size": 48}, {"model_type": "x"}]
)
def test_config_with_a_wrong_value_is_a_message(model, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | value))
    with pytest.raises(UserError, match=str(model)):
        load_for_evaluation(model)


def test_directory_that_holds_no_model(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_for_evaluation(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(UserError, match="Make or fetch it again"):
        load_for_evaluation(tmp_path)


def test_a_model_is_evaluated_in_the_precision_that_memory_allows(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(loading, "device", lambda: torch.device("cpu"))
    numbers = sum(parameter.numel() for parameter in load_model(tiny_model_dir).parameters())
    for free, dtype, size in (
        (10**9, torch.float32, 4),
        (4 * numbers, torch.bfloat16, 2),
        (numbers, torch.bfloat16, 2),
    ):
        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        plan = loading.choose_placement(tiny_model_dir)
        assert plan.dtype == dtype
        assert plan.needed == pytest.approx(size * numbers, rel=0.05)  # the header of the file counts too
        assert ("too little" in str(plan)) == (free < plan.needed)


# --------------------------------------------------------------------------------------------------------------- device
def test_weights_go_straight_to_the_device(tiny_model_dir, tiny_run, monkeypatch):
    """Host memory never holds them all. `cuda:1` stands for the GPU of a second process."""
    gpu, maps = torch.device("cuda:1"), []
    from_pretrained = loading.AutoModelForCausalLM.from_pretrained

    def load_on_cpu(*args, device_map, **kwargs):
        maps.append(device_map)
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", load_on_cpu)
    load_model(tiny_model_dir)
    load_model(tiny_model_dir, device=gpu)
    placement = loading.EvalPlacement(gpu, "auto", 0, 0)
    monkeypatch.setattr(loading, "choose_placement", lambda _: placement)
    load_for_evaluation(tiny_model_dir)
    monkeypatch.setattr("transformers.TrainingArguments.device", gpu)
    with pytest.raises((AssertionError, RuntimeError)):  # without a GPU the run ends when it moves something there
        run_exp(tiny_run)
    assert maps == [{"": device} for device in (torch.device("cpu"), gpu, gpu, gpu)]
