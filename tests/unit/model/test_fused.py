"""Fused operations equal the plain ones up to rounding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GlmConfig
from transformers.models.glm.modeling_glm import GlmRMSNorm

from llmtuner.model import fused
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.fused import FusedLoraLinear, FusedRMSNorm, apply_fused_ops
from tests.training import gradients

DOCUMENTS = [[3, 7, 2], [12], [1, 11]]


# -------------------------------------------------------------------------------------------------------- fused layers
def adapted(bias=True, **how):
    """A linear layer with LoRA that has learned something."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **how))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def fuse(layer):
    model = torch.nn.Sequential(layer)
    apply_fused_ops(model)
    return model[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_lora_in_one_product_is_lora(bias, rslora):
    plain, own = (adapted(bias, use_rslora=rslora) for _ in range(2))
    weights = dict(own.named_parameters())
    own = fuse(own)
    assert type(own) is FusedLoraLinear
    assert all(weights[name] is parameter for name, parameter in own.named_parameters())
    x, along = torch.randn(3, 10, 12), torch.randn(3, 10, 20)
    values = []
    for layer in (plain, own):
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        leaf = x.clone().requires_grad_()
        value = layer(leaf)
        values.append([value, *torch.autograd.grad((value * along).sum(), [leaf, *weights])])
    assert "FusedLoraFunction" in type(values[1][0].grad_fn).__name__
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_lora_is_pefts_own_where_one_product_is_another_thing_or_slower(monkeypatch):
    asked = []
    monkeypatch.setattr(fused.FusedLoraFunction, "apply", lambda *_: asked.append("product"))
    x = torch.randn(30, 12)

    def by_product(layer, x=x):
        layer = fuse(layer)
        asked.clear()
        layer(x)
        return bool(asked)

    assert by_product(adapted())
    assert not by_product(adapted(lora_dropout=0.5))
    assert not by_product(adapted(use_dora=True))
    assert by_product(adapted(), x[:1])  # whatever the batch: processes have to agree
    with torch.no_grad():
        assert not by_product(adapted())
    assert not by_product(adapted().double(), x.double())
    half = adapted()
    half.base_layer.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_product(half)
        assert not by_product(adapted())
    disabled = adapted()
    disabled.enable_adapters(False)
    assert not by_product(disabled)
    merged = adapted()
    merged.merge()
    assert not by_product(merged)


def test_fused_norm_is_the_norm():
    torch.manual_seed(0)
    plain = GlmRMSNorm(24, eps=1e-5).requires_grad_(False)
    torch.nn.init.normal_(plain.weight)
    own = GlmRMSNorm(24, eps=1e-5).requires_grad_(False)
    own.load_state_dict(plain.state_dict())
    own = fuse(own)
    assert type(own) is FusedRMSNorm
    x, along = torch.randn(5, 7, 24) * 3, torch.randn(5, 7, 24)
    (value, (gradient,)), (wanted, (wanted_gradient,)) = (gradients(one, [x], along) for one in (own, plain))
    torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-6, rtol=1e-5)
    half = x.bfloat16()
    assert torch.equal(own(half), plain(half))


def test_a_norm_that_is_trained_stays_the_plain_one():
    assert type(fuse(GlmRMSNorm(24))) is GlmRMSNorm


def test_a_whole_model_computes_the_same():
    config = GlmConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        attention_bias=True,
    )
    register_varlen()
    results = []
    for attention in ("eager", VARLEN):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        kinds = {type(module) for module in model.modules()}
        if attention == VARLEN:
            apply_fused_ops(model)
            kinds = {type(module) for module in model.modules()}
            assert {FusedLoraLinear, FusedRMSNorm} <= kinds
        ids = torch.arange(36).view(3, 12)
        positions = torch.stack([torch.cat([torch.arange(size) for size in own]) for own in DOCUMENTS])
        apart = {"seq_lens": DOCUMENTS} if attention == VARLEN else {}
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **apart).logits
        logits.square().mean().backward()
        results.append(
            [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
        )
    assert len(results[0]) == len(results[1]) > 20
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
