"""FLOP of a token, counted by hand and by PyTorch's own counter, and the speed of a product."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import init_adapter
from llmtuner.model.loading import load_model
from llmtuner.train.flops import flops_per_token, measure_peak_flops
from llmtuner.train.tuner import run_exp

EMBEDDINGS = ["embed_tokens", "lm_head"]
METHODS = {
    "full": dict(finetuning_type="full"),
    "LoRA": dict(lora_rank=4),
    "LoRA and embeddings": dict(lora_rank=4, additional_target=EMBEDDINGS),
    "last layer": dict(finetuning_type="freeze", freeze_trainable_layers=1),
    "new tokens": dict(lora_rank=4, additional_target=EMBEDDINGS, train_new_tokens_only=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_pytorch_counts(grown_dir, method):
    model = init_adapter(load_model(grown_dir, torch.float32, "eager"), FinetuningArguments(**METHODS[method]), None)
    model.train()
    ids = torch.randint(5, 300, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # Eager attention computes the full square of 64 tokens; documents of 127 tokens attend to 64 on the mean.
    expected = counter.get_total_flops() / ids.numel()
    assert flops_per_token(model, numpy.array([127, 127])) == pytest.approx(expected, rel=0.02)


def test_output_layer_counts_for_target_tokens(tiny_model_dir):
    model, lengths = load_model(tiny_model_dir, torch.float32, "eager"), numpy.array([20])
    head = 6 * model.lm_head.weight.numel()
    model.requires_grad_(True)
    whole, half = (flops_per_token(model, lengths, target_ratio) for target_ratio in (1, 0.5))
    assert whole - half == pytest.approx(head / 2)


def test_measuring_a_product_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert measure_peak_flops(torch.device("cpu"), torch.float32, 64) > 1e6
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_logs_its_utilization(tiny_run):
    metrics = run_exp({**tiny_run, "logging_steps": 2})
    lines = [json.loads(line) for line in Path(tiny_run["output_dir"], "trainer_log.jsonl").read_text().splitlines()]
    logged = [line["mfu"] for line in lines if "loss" in line]
    assert len(logged) == 3
    assert all(0 < mfu < 1 for mfu in logged)
    assert metrics["mfu"] == pytest.approx(sum(logged) / 3, abs=1e-4)
