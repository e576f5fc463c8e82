"""Variable-length attention equals attention with a block-diagonal mask."""

import pytest
import torch

from llmtuner.console import UserError
from llmtuner.model.attention import VARLEN, varlen_sdpa
from llmtuner.model.loading import default_attention
from tests.training import gradients

DOCUMENTS = [[3, 7, 2], [12], [1, 11]]


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
