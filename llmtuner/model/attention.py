"""Attention within the documents of a packed batch, one document after another; transformers knows it as `varlen`."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llmtuner.console import UserError

VARLEN = "varlen"
UNSUPPORTED_KWARGS = ("sliding_window", "softcap", "s_aux")  # what other models' attention does beside softmax(q k) v


def varlen_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    seq_lens: list[list[int]] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention without a mask: what lies between two documents is not computed, instead of being hidden.

    Args:
        query: [rows, heads, tokens, head_dim]; key and value may have fewer heads, each for several of the query's.
        seq_lens: of each row, the lengths of its documents, which sum to `tokens`. None: each row is one document, and
            padding may stand on its right only.

    Returns:
        [rows, tokens, heads, head_dim], and no weights.

    Raises:
        UserError: for a model whose attention is of another kind, or a mask.
    """
    if attention_mask is not None or any(others.get(name) is not None for name in UNSUPPORTED_KWARGS):
        raise UserError("flash_attn: varlen does not support this model or mask. Set flash_attn: auto.")
    lengths = [[query.shape[2]]] * len(query) if seq_lens is None else seq_lens
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        # Split row by row, not indexed: the gradient of an index is as large as the whole.
        for rows, own in zip(zip(query.split(1), key.split(1), value.split(1), strict=True), lengths, strict=True)
        for q, k, v in zip(*(tensor.split(own, dim=2) for tensor in rows), strict=True)
    ]
    joined = torch.cat(parts, dim=2).transpose(1, 2)  # [1, tokens of all rows, heads, head_dim]
    return joined.reshape(len(query), -1, *joined.shape[2:]), None


# No mask goes with this name, so transformers forms none.
AttentionInterface.register(VARLEN, varlen_sdpa)
