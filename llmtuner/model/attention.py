"""Variable-length attention: SDPA document by document in a packed batch; transformers knows it as `varlen`."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llmtuner.console import UserError

VARLEN = "varlen"
UNSUPPORTED_KWARGS = ("sliding_window", "softcap", "s_aux")  # of attention that is more than softmax(q k) v


def register_varlen() -> None:
    """Makes `varlen` known to transformers; no mask function goes with the name, so that transformers makes no mask."""
    AttentionInterface.register(VARLEN, varlen_sdpa)


def varlen_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    seq_lens: list[list[int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention within each document, instead of masking what lies between two documents.

    Args:
        query: [batch, heads, tokens, head_dim]; key and value may have fewer heads (grouped-query attention).
        seq_lens: for each sequence, the lengths of its documents, which sum to `tokens`. None: each sequence is one
            document, padded on the right at most.

    Returns:
        [batch, tokens, heads, head_dim], and no attention weights.

    Raises:
        UserError: for a mask, or a model with another kind of attention.
    """
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED_KWARGS):
        raise UserError("flash_attn: varlen does not support this model or mask. Set flash_attn: auto.")
    lengths = [[query.shape[2]]] * len(query) if seq_lens is None else seq_lens
    outputs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        # split, not indexed: the gradient of an index has the size of the full tensor
        for qkv, sizes in zip(zip(query.split(1), key.split(1), value.split(1), strict=True), lengths, strict=True)
        for q, k, v in zip(*(tensor.split(sizes, dim=2) for tensor in qkv), strict=True)
    ]
    joined = torch.cat(outputs, dim=2).transpose(1, 2)  # [1, batch * tokens, heads, head_dim]
    return joined.reshape(len(query), -1, *joined.shape[2:]), None
