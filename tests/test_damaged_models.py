"""Models that are cut off or quantized: one message that names the file or the reason, before anything heavy."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from llmtuner.console import UserError
from llmtuner.model.loading import load_for_evaluation, load_model
from llmtuner.train.tuner import run_exp
from llmtuner.weights.lazy_checkpoint import check_not_quantized
from llmtuner.weights.merge_lora import merge_adapter
from llmtuner.weights.resize_embeddings import open_model


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def cut(model):
    """The weights as they are after an interrupted download."""
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return file


def in_shards(model):
    """The same weights in two files with an index."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, model / file, {"format": "pt"})
    weight_map = {name: file for file, own in files.items() for name in own}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def start(words, tmp_path, **variables):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WORK_DIR": str(tmp_path / "work"), **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


# ----------------------------------------------------------------------------------------------------------- cut off
@pytest.mark.parametrize("load", [load_model, load_for_evaluation])
def test_cut_weights_are_named(model, load):
    file = cut(model)
    with pytest.raises(UserError, match="damaged or cut off") as caught:
        load(model)
    assert str(file) in str(caught.value)


def test_cut_or_missing_shard_is_named(model):
    in_shards(model)
    load_model(model)
    shard = model / "model-00002-of-00002.safetensors"
    os.truncate(shard, 100)
    with pytest.raises(UserError, match=f"{shard.name} is damaged or cut off"):
        load_model(model)
    shard.unlink()
    with pytest.raises(UserError, match=f"not there: {shard.name}"):
        load_model(model)


def test_training_finds_cut_weights_before_data_are_tokenized(model, tiny_run):
    file = cut(model)
    with pytest.raises(UserError, match="damaged or cut off") as caught:
        run_exp({**tiny_run, "model_name_or_path": str(model)})
    assert str(file) in str(caught.value)
    assert not Path(tiny_run["cache_dir"]).exists()


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        (["step5_train_pt_single_gpu.py"], "step3_zero"),
        (["step7_eval_chat.py", "--chat"], "chat_model"),
        (["step7_eval_chat.py", "--web", "--port", "0"], "chat_model"),
        (
            ["-m", "llmtuner", "train", "--dataset", "x", "--output_dir", "x", "--model_name_or_path", "{model}"],
            "model",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)
def test_cut_weights_are_one_message_of_every_script(model, tmp_path, words, directory):
    if "--web" in words:
        pytest.importorskip("gradio", reason="gradio is not installed")
    file = cut(model)
    result = tmp_path / "work" / directory
    if directory != "model":
        shutil.copytree(model, result)
        file = result / file.name
    ended = start([word.format(model=model) for word in words], tmp_path, BASE_MODEL_DIR=str(model))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("error:") == 1
    assert "is damaged or cut off" in ended.stderr
    assert file.name in ended.stderr


# --------------------------------------------------------------------------------------------------------- quantized
def quantize(model, how):
    """A checkpoint as bitsandbytes, or another tool that says nothing in config.json, would write it."""
    if how == "config":
        config = json.loads((model / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (model / "config.json").write_text(json.dumps(config))
        return
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to({"int8": torch.int8, "uint8": torch.uint8, "fp8": torch.float8_e4m3fn}[how])
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("how", ["config", "int8", "uint8", "fp8"])
def test_quantized_model_is_not_trained_grown_or_merged(model, tiny_model_dir, tiny_run, tmp_path, how):
    quantize(model, how)
    uses = {
        "train": lambda: run_exp({**tiny_run, "model_name_or_path": str(model)}),
        "grow": lambda: open_model(model),
        "merge": lambda: merge_adapter(model, tiny_model_dir, tmp_path / "merged"),
    }
    for use in uses.values():
        with pytest.raises(UserError, match=r"is quantized: .*(quantization_config \(bitsandbytes\)|q_proj\.weight)"):
            use()
    assert not Path(tiny_run["cache_dir"]).exists()


def test_masks_and_positions_in_integers_are_no_quantization(model):
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "model.position_ids": torch.arange(9)}, model / "model.safetensors", {"format": "pt"})
    check_not_quantized(model)


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
