"""Variable-length attention equals attention with a block-diagonal mask, in every way in which it is computed."""

import numpy
import pytest
import torch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtuner.console import UserError
from llmtuner.data.packing import PackedDataCollator
from llmtuner.model import attention, bucketed_attention
from llmtuner.model.attention import VARLEN, Documents, autocast_dtype, varlen_attention
from llmtuner.model.loading import default_attention, load_model
from llmtuner.train.trainer import forward_packed
from tests.training import gradients

LENGTHS = [[3, 7, 2], [12], [1, 11]]
DOCUMENTS = Documents.from_lengths([length for row in LENGTHS for length in row], torch.device("cpu"))
MODULE = torch.nn.Module()


def inputs_and_direction():
    torch.manual_seed(0)
    return [torch.randn(3, heads, 12, 8) for heads in (4, 2, 2)], torch.randn(3, 12, 4, 8)


def masked(query, key, value):
    """The same by a mask over complete sequences, in plain matrix products."""
    owner = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
    visible = (owner[:, :, None] == owner[:, None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
    key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~visible[:, None], -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def varlen(*qkv):
    return varlen_attention(MODULE, *qkv, None, scaling=0.3, documents=DOCUMENTS)[0]


def assert_equals_masked(of, inputs, along, **tolerance):
    value, found = gradients(of, inputs, along)
    wanted, wanted_gradients = gradients(masked, inputs, along)
    for one, other in zip((value, *found), (wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(one.float(), other.float(), **tolerance)


def test_attention_within_documents_is_attention_with_a_mask():
    assert_equals_masked(varlen, *inputs_and_direction(), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ products on a CPU
@pytest.mark.parametrize("block", [256, 4])
@pytest.mark.parametrize("buckets", [[8, 16], [4, 8, 12], [16]])
def test_products_of_padded_documents_are_attention_with_a_mask(monkeypatch, block, buckets):
    monkeypatch.setattr(bucketed_attention, "QUERY_BLOCK", block)
    monkeypatch.setattr(bucketed_attention, "BUCKETS", torch.tensor(buckets).numpy())
    documents = Documents(DOCUMENTS.lengths, DOCUMENTS.cu_seqlens)

    def products(*qkv):
        flat = (tensor.transpose(1, 2).flatten(0, 1) for tensor in qkv)
        rows = documents.padded_rows(4, 2)
        return bucketed_attention.BucketedAttention.apply(*flat, rows, 0.3).view(3, 12, 4, 8)

    assert_equals_masked(products, *inputs_and_direction(), atol=1e-5, rtol=1e-5)


def test_in_bf16_a_cpu_multiplies_padded_documents(monkeypatch):
    calls = []
    apply = bucketed_attention.BucketedAttention.apply
    monkeypatch.setattr(attention.BucketedAttention, "apply", lambda *args: calls.append(args[0].dtype) or apply(*args))
    inputs, along = inputs_and_direction()
    varlen(*inputs)
    assert not calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_masked(varlen, inputs, along, atol=0.06, rtol=0.02)
    assert calls == [torch.bfloat16]
    dropped = varlen_attention(
        MODULE, *(tensor.bfloat16() for tensor in inputs), None, dropout=0.5, documents=DOCUMENTS
    )
    assert dropped[0].shape == along.shape
    assert len(calls) == 1  # products know no dropout


# -------------------------------------------------------------------------------------------------------------- on a GPU
def stand_in(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size, enable_gqa, *_):
    """FlashAttention's operator on a CPU, document by document: output, log-sum-exp and random state."""
    assert (max_q, max_k, is_causal, list(window_size), enable_gqa) == (12, 12, True, [-1, 0], True)
    assert cu_q.tolist() == cu_k.tolist() == DOCUMENTS.cu_seqlens.tolist()
    assert {query.dtype, key.dtype, value.dtype} == {torch.bfloat16}
    output = attention._sdpa_by_document(query, key, value, DOCUMENTS, scale, 0.0)
    return output.contiguous(), torch.zeros(4, len(query)), torch.zeros(2, dtype=torch.uint64)


def backward_stand_in(grad, query, key, value, *rest):
    """Its backward operator; below autograd, so by hand."""
    scale = next(item for item in rest if isinstance(item, float))
    grads = [torch.zeros(tensor.shape) for tensor in (query, key, value)]
    for part in DOCUMENTS.cu_seqlens.unfold(0, 2, 1).tolist():
        rows = slice(*part)
        for head in range(4):
            q, k, v, g = (
                tensor[rows, index].float()
                for tensor, index in ((query, head), (key, head // 2), (value, head // 2), (grad, head))
            )
            hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
            probabilities = (q @ k.T * scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)
            grad_probabilities = g @ v.T
            centred = grad_probabilities - (grad_probabilities * probabilities).sum(dim=-1, keepdim=True)
            scores = probabilities * centred * scale
            grads[0][rows, head] = scores @ k
            grads[1][rows, head // 2] += scores.T @ q
            grads[2][rows, head // 2] += probabilities.T @ g
    return tuple(gradient.to(query.dtype) for gradient in grads)


def test_flash_attention_gets_bounds_and_bf16(monkeypatch):
    for operator, function in (("_varlen_attn", stand_in), ("_varlen_attn_backward", backward_stand_in)):
        library.register_kernel(f"torch_attn::{operator}", "cpu", function)

    def flash(q, k, v, rows, scaling):
        return attention._flash_attention(q, k, v, DOCUMENTS, scaling)

    monkeypatch.setattr(attention.BucketedAttention, "apply", flash)  # where a GPU's turn would be
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equals_masked(varlen, *inputs_and_direction(), atol=0.06, rtol=0.02)


def test_a_gpu_takes_flash_attention(monkeypatch):
    devices = []

    def spy(q, k, v, *bounds, **options):
        devices.append((q.device.type, q.dtype, q.shape, k.shape, options["scale"]))
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "varlen_attn", spy)
    monkeypatch.setattr(attention, "_causal_options", dict)
    monkeypatch.setattr(attention, "flash_varlen_available", lambda: True)
    with FakeTensorMode():
        qkv = [torch.empty(3, heads, 12, 8, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
        documents = Documents(DOCUMENTS.lengths, torch.empty(6, dtype=torch.int32, device="cuda"))
        output, _ = varlen_attention(MODULE, *qkv, None, documents=documents)
        huge = [torch.empty(1, heads, 2**19, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 2, 2)]
        one = Documents([2**19], torch.empty(2, dtype=torch.int32, device="cuda"))
        with pytest.raises(UserError, match="Lower per_device_train_batch_size"):
            varlen_attention(MODULE, *huge, None, documents=one)
    assert output.shape == (3, 12, 4, 8)
    assert devices == [("cuda", torch.bfloat16, (36, 4, 8), (36, 2, 8), 8**-0.5)]


@pytest.mark.parametrize("window", [True, False])
def test_versions_of_torch_name_causal_attention_differently(monkeypatch, window):
    def newer(query, *, window_size=(-1, -1), enable_gqa=False): ...
    def older(query, is_causal=False): ...

    monkeypatch.setattr(attention, "varlen_attn", newer if window else older)
    wanted = {"window_size": (-1, 0), "enable_gqa": True} if window else {"is_causal": True}
    assert attention._causal_options() == wanted


def test_a_sequence_without_documents_is_one_document():
    qkv = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    output, none = varlen_attention(MODULE, *qkv, None)
    assert none is None
    two = Documents.from_lengths([6, 6], torch.device("cpu"))
    torch.testing.assert_close(output, varlen_attention(MODULE, *qkv, None, documents=two)[0])


@pytest.mark.parametrize("other", [{"sliding_window": 8}, {"softcap": 50.0}, {"s_aux": torch.zeros(4)}])
def test_attention_of_another_kind_is_refused(other):
    qkv = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    with pytest.raises(UserError, match="Set flash_attn: auto"):
        varlen_attention(MODULE, *qkv, None, **other)
    with pytest.raises(UserError, match="Set flash_attn: auto"):
        varlen_attention(MODULE, *qkv, torch.zeros(1, 1, 6, 6))
    varlen_attention(MODULE, *qkv, None, **dict.fromkeys(other))


def test_attention_is_chosen_by_machine_and_model(tiny_model_dir, monkeypatch, tmp_path):
    assert default_attention(tiny_model_dir) == VARLEN
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}', encoding="utf-8")
    assert default_attention(tmp_path) == "eager"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, attention_name in (((7, 5), "sdpa"), ((8, 0), VARLEN), ((9, 0), VARLEN)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert default_attention(tiny_model_dir) == attention_name
    assert default_attention(tmp_path) is None


@pytest.mark.parametrize("attention_name", ["eager", "sdpa", VARLEN])
def test_packed_documents_of_other_families_are_as_if_alone(family_dir, attention_name):
    assert default_attention(family_dir) == VARLEN
    model = load_model(family_dir, attention=attention_name)
    documents = [numpy.arange(start, start + size) for start, size in ((20, 9), (100, 4), (50, 7))]

    def logits(*documents):
        sequence = {
            "input_ids": numpy.concatenate(documents),
            "labels": numpy.concatenate(documents),
            "position_ids": numpy.concatenate([numpy.arange(len(ids)) for ids in documents]),
            "doc_ids": numpy.arange(len(documents)),
        }
        with torch.no_grad():
            return forward_packed(model, attention_name, PackedDataCollator(pad_id=0)([sequence])).logits[0]

    alone = torch.cat([logits(ids) for ids in documents])
    torch.testing.assert_close(logits(*documents), alone, atol=1e-5, rtol=1e-5)


def test_products_have_the_dtype_of_autocast():
    x = torch.zeros(2)
    assert autocast_dtype(x) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(x) == torch.bfloat16
