"""What makes training faster changes no result beyond rounding: attention by documents, fused layers, the chunked loss."""

import json

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GlmConfig, GlmForCausalLM
from transformers.models.glm.modeling_glm import GlmRMSNorm

from llmtuner.console import UserError
from llmtuner.data.packing import PackedDataCollator
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.model import fused
from llmtuner.model.attention import VARLEN, varlen_sdpa
from llmtuner.model.fused import FusedLoraLinear, FusedRMSNorm, apply_fused_ops
from llmtuner.model.loading import default_attention
from llmtuner.train.tuner import run_exp

DOCUMENTS = [[3, 7, 2], [12], [1, 11]]


def gradients(of, inputs, along):
    """The value of a function, and its gradients along a direction."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    value = of(*leaves)
    return value.detach(), torch.autograd.grad((value * along).sum(), leaves)


# ----------------------------------------------------------------------------------------------------------- attention
def masked(query, key, value):
    """The same by a mask over whole rows, in plain matrix products."""
    owner = torch.stack([torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own)) for own in DOCUMENTS])
    visible = (owner[:, :, None] == owner[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~visible[:, None], -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def test_attention_within_documents_is_attention_with_a_mask():
    torch.manual_seed(0)
    inputs = [torch.randn(3, heads, 12, 8) for heads in (4, 2, 2)]
    along = torch.randn(3, 12, 4, 8)
    module = torch.nn.Module()
    own, own_gradients = gradients(
        lambda *qkv: varlen_sdpa(module, *qkv, None, scaling=0.3, seq_lens=DOCUMENTS)[0], inputs, along
    )
    wanted, wanted_gradients = gradients(masked, inputs, along)
    torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-5)
    for one, other in zip(own_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_row_without_documents_is_one_document():
    qkv = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    whole, none = varlen_sdpa(torch.nn.Module(), *qkv, None)
    assert none is None
    torch.testing.assert_close(whole, varlen_sdpa(torch.nn.Module(), *qkv, None, seq_lens=[[6], [6]])[0])


@pytest.mark.parametrize("other", [{"sliding_window": 8}, {"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_of_another_kind_is_refused(other):
    qkv = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    with pytest.raises(UserError, match="Set flash_attn: auto"):
        varlen_sdpa(torch.nn.Module(), *qkv, None, **other)
    with pytest.raises(UserError, match="Set flash_attn: auto"):
        varlen_sdpa(torch.nn.Module(), *qkv, torch.zeros(1, 1, 6, 6))
    varlen_sdpa(torch.nn.Module(), *qkv, None, **dict.fromkeys(other))


def test_attention_is_chosen_by_machine_and_model(tiny_model_dir, monkeypatch, tmp_path):
    assert default_attention(tiny_model_dir) == VARLEN
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}', encoding="utf-8")
    assert default_attention(tmp_path) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_attention(tiny_model_dir) == "sdpa"
    assert default_attention(tmp_path) is None


def test_a_batch_tells_its_documents_and_trained_places():
    def sequence(lengths, untrained):
        ids = numpy.arange(sum(lengths))
        labels = numpy.where(numpy.isin(ids, untrained), IGNORE_INDEX, ids)
        positions = numpy.concatenate([numpy.arange(size) for size in lengths])
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "doc_ids": ids[:0]}

    empty = {name: numpy.zeros(0, dtype=numpy.int64) for name in ("input_ids", "labels", "position_ids", "doc_ids")}
    batch = PackedDataCollator(0)([sequence([3, 2], [0, 3]), sequence([7], [0, 1, 5]), empty])
    assert batch["seq_lens"] == [[3, 2, 2], [7], [7]]
    wanted = batch["labels"][:, 1:] != IGNORE_INDEX
    places = torch.arange(21).view(3, 7)
    assert batch["loss_indices"].tolist() == places[:, :-1][wanted].tolist() == [0, 1, 3, 8, 9, 10, 12]
    assert batch["labels"].flatten()[batch["loss_indices"] + 1].tolist() == batch["labels"][:, 1:][wanted].tolist()


# -------------------------------------------------------------------------------------------------------- fused layers
def adapted(bias=True, **how):
    """A linear layer with LoRA that has learned something."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **how))
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_lora_in_one_product_is_lora(bias, rslora):
    plain, own = (adapted(bias, use_rslora=rslora) for _ in range(2))
    apply_fused_ops(own)
    assert type(own) is FusedLoraLinear
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
        apply_fused_ops(layer)
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
    apply_fused_ops(own)
    assert type(own) is FusedRMSNorm
    x, along = torch.randn(5, 7, 24) * 3, torch.randn(5, 7, 24)
    (value, (gradient,)), (wanted, (wanted_gradient,)) = (gradients(one, [x], along) for one in (own, plain))
    torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-6, rtol=1e-5)
    half = x.bfloat16()
    assert torch.equal(own(half), plain(half))


def test_a_norm_that_is_trained_stays_the_plain_one():
    norm = GlmRMSNorm(24)
    apply_fused_ops(norm)
    assert type(norm) is GlmRMSNorm


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
    results = []
    for attention in ("eager", VARLEN):
        torch.manual_seed(0)
        base = GlmForCausalLM._from_config(config, attn_implementation=attention)
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
        results.append([logits.detach(), *(one.grad for one in model.parameters() if one.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- whole runs
PLAIN = dict(flash_attn="disabled", fused_ops=False, chunked_loss=False)


FAST = dict(flash_attn="varlen", fused_ops=True, chunked_loss=True)


def logged(settings, directory):
    """Loss and gradient norm of each of twelve steps."""
    short = dict(max_steps=12, eval_strategy="no", eval_on_start=False, plot_loss=False)
    run_exp({**settings, **short, "output_dir": str(directory)})
    lines = [json.loads(line) for line in (directory / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("lever", [*FAST, "all"])
def test_a_run_learns_the_same_with_and_without(tiny_run, tmp_path, stage, lever):
    """Losses and gradient norms of twelve steps, one lever on or all, against none."""
    settings = {**tiny_run, "stage": stage, "dataset": {"pt": "documents", "sft": "dialogues"}[stage]}
    fast = PLAIN | (FAST if lever == "all" else {lever: FAST[lever]})
    wanted, own = logged({**settings, **PLAIN}, tmp_path / "plain"), logged({**settings, **fast}, tmp_path / "fast")
    assert len(own) == 12
    assert numpy.array(own) == pytest.approx(numpy.array(wanted), rel=1e-4)
    assert wanted[-1][0] < wanted[0][0]


def test_adam_in_8_bits_learns_about_the_same(tiny_run, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    settings = {**tiny_run, "embedding_learning_rate": 2e-3}
    wanted = logged(settings, tmp_path / "plain")
    own = logged({**settings, "optim": "adamw_8bit"}, tmp_path / "8bit")
    assert own != wanted
    assert [loss for loss, _ in own] == pytest.approx([loss for loss, _ in wanted], rel=0.01)
