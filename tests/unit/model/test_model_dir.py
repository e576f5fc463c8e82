"""Quantized weights are rejected wherever weights would be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtuner.console import UserError
from llmtuner.model.model_dir import check_not_quantized
from llmtuner.train.tuner import run_exp
from llmtuner.weights.merge_lora import merge_adapter
from llmtuner.weights.resize_embeddings import open_model


@pytest.fixture
def model(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def quantize(model, how):
    """Makes a checkpoint like one of bitsandbytes, or of a tool that leaves config.json unchanged."""
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
def test_quantized_model_is_not_trained_resized_or_merged(model, tiny_model_dir, tiny_run, tmp_path, how):
    quantize(model, how)
    uses = {
        "train": lambda: run_exp({**tiny_run, "model_name_or_path": str(model)}),
        "resize": lambda: open_model(model),
        "merge": lambda: merge_adapter(model, tiny_model_dir, tmp_path / "merged"),
    }
    for use in uses.values():
        with pytest.raises(UserError, match=r"is quantized: .*(quantization_config \(bitsandbytes\)|q_proj\.weight)"):
            use()
    assert not Path(tiny_run["cache_dir"]).exists()


def test_integer_masks_and_positions_are_not_quantization(model):
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "model.position_ids": torch.arange(9)}, model / "model.safetensors", {"format": "pt"})
    check_not_quantized(model)
