"""Fused operations equal the plain ones up to rounding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GlmConfig
from transformers.models.glm.modeling_glm import GlmRMSNorm

from llmtuner.model import fused
from llmtuner.model.attention import VARLEN, Documents, register_varlen
from llmtuner.model.fused import FusedAttention, FusedLoraLinear, FusedMLP, FusedRMSNorm, apply_fused_ops
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
    assert "MergedLoraFunction" in type(values[1][0].grad_fn).__name__
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_lora_is_pefts_own_where_one_product_is_another_thing_or_slower(monkeypatch):
    asked = []
    monkeypatch.setattr(fused.MergedLoraFunction, "apply", lambda *_: asked.append("product"))
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
    in_bf16 = own(x.bfloat16())
    assert in_bf16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bf16.float(), wanted, atol=0.02, rtol=0.02)


def test_a_norm_that_is_trained_stays_the_plain_one():
    assert type(fuse(GlmRMSNorm(24))) is GlmRMSNorm


CONFIG = GlmConfig(
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
IDS = torch.arange(36).view(3, 12)
POSITIONS = torch.stack([torch.cat([torch.arange(size) for size in sizes]) for sizes in DOCUMENTS])


def glm(attention, is_fused, dtype=torch.float32, **lora):
    """A Glm with adapters that have learned something, and embeddings that are trained in full, in fp32."""
    register_varlen()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIG, attn_implementation=attention).to(dtype)
    targets = dict(
        target_modules="all-linear", exclude_modules=["lm_head"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model = get_peft_model(base, LoraConfig(**{"r": 4, **targets, **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if is_fused:
        apply_fused_ops(model)
    return model.train()


def loss_and_gradients(model, attention, **options):
    if attention == VARLEN:
        lengths = [length for row in DOCUMENTS for length in row]
        options["documents"] = Documents.from_lengths(lengths, torch.device("cpu"))
    logits = model(input_ids=IDS, position_ids=POSITIONS, use_cache=False, **options).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


def test_a_complete_model_computes_the_same():
    fused_model = glm(VARLEN, True)
    assert {FusedLoraLinear, FusedRMSNorm, FusedMLP, FusedAttention} <= {
        type(module) for module in fused_model.modules()
    }
    loss, grads = loss_and_gradients(fused_model, VARLEN)
    wanted, wanted_grads = loss_and_gradients(glm("eager", False), "eager")
    torch.testing.assert_close(loss, wanted)
    assert grads.keys() == wanted_grads.keys()
    assert len(grads) > 20
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted_grads[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bf16_gradients_are_as_near_to_fp32_as_those_of_plain_layers(checkpointing):
    _, exact = loss_and_gradients(glm("eager", False), "eager")
    errors = {}
    for attention, is_fused in (("eager", False), (VARLEN, True)):
        model = glm(attention, is_fused, torch.bfloat16)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, grads = loss_and_gradients(model, attention)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        errors[is_fused] = [float((grads[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert sum(errors[True]) < 1.25 * sum(errors[False])
    assert max(errors[True]) < 2 * max(errors[False]) < 0.2
