"""Variable-length attention: causal attention within each document of a packed batch; transformers knows it as `varlen`."""

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llmtuner.console import UserError
from llmtuner.model.bucketed_attention import BucketedAttention, PaddedRows

VARLEN = "varlen"
UNSUPPORTED_KWARGS = ("sliding_window", "softcap", "s_aux")  # of attention that is more than softmax(q k) v


def register_varlen() -> None:
    """Makes `varlen` known to transformers; no mask function goes with the name, so that transformers makes no mask."""
    AttentionInterface.register(VARLEN, varlen_attention)


def flash_varlen_available() -> bool:
    """Whether there is a GPU that FlashAttention supports: Ampere or newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which autocast computes matrix products of a tensor; without autocast, its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


@dataclass
class Documents:
    """Where the documents of a packed batch begin and end."""

    lengths: list[int]
    """Of all documents of the batch, in order, padding included; they sum to its tokens."""
    cu_seqlens: torch.Tensor
    """Their bounds, int32 [documents + 1], on the device of the batch."""
    _padded_rows: dict[tuple[int, int], PaddedRows] = field(default_factory=dict)

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device) -> "Documents":
        """Computes the bounds."""
        return cls(lengths, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device))

    @cached_property
    def max_length(self) -> int:
        """Returns the length of the longest document."""
        return max(self.lengths)

    def padded_rows(self, heads: int, groups: int) -> tuple[PaddedRows, PaddedRows]:
        """Returns the rows of queries and of keys, which all layers share."""
        for key in ((heads, groups), (groups, groups)):
            if key not in self._padded_rows:
                self._padded_rows[key] = PaddedRows(self.lengths, *key)
        return self._padded_rows[heads, groups], self._padded_rows[groups, groups]


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Computes causal attention within each document, instead of masking what lies between two documents.

    Which way is fastest depends on device and dtype: FlashAttention over all documents at once on a GPU, plain products of
    padded documents in 16 bits on a CPU, SDPA document by document otherwise.

    Args:
        query: [batch, heads, tokens, head_dim]; key and value may have fewer heads (grouped-query attention).
        documents: of the batch. None: each sequence is one document, padded on the right at most.

    Returns:
        [batch, tokens, heads, head_dim], and no attention weights.

    Raises:
        UserError: for a mask, or a model with another kind of attention.
    """
    if attention_mask is not None or any(kwargs.get(name) is not None for name in UNSUPPORTED_KWARGS):
        raise UserError("flash_attn: varlen does not support this model or mask. Set flash_attn: auto.")
    if documents is None:
        documents = Documents.from_lengths([query.shape[2]] * len(query), query.device)
    dtype = autocast_dtype(query)
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1).to(dtype) for tensor in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_16_bit = dtype.itemsize == 2 and not dropout
    with torch.autocast(query.device.type, enabled=False):  # it passes custom operators by, and takes softmax to fp32
        if is_16_bit and q.is_cuda and flash_varlen_available():
            output = _flash_attention(q, k, v, documents, scaling)
        elif is_16_bit and q.device.type == "cpu":
            output = BucketedAttention.apply(q, k, v, documents.padded_rows(q.shape[1], k.shape[1]), scaling)
        else:
            output = _sdpa_by_document(q, k, v, documents, scaling, dropout)
    return output.view(len(query), -1, *output.shape[1:]), None


def _sdpa_by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scaling: float, dropout: float
) -> torch.Tensor:
    """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> like q."""
    # split, not indexed: the gradient of an index has the size of the full tensor
    parts = zip(*(tensor.transpose(0, 1).split(documents.lengths, dim=1) for tensor in (q, k, v)), strict=True)
    how: dict[str, Any] = dict(dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
    # With a batch dimension, for only then do all kernels take part.
    outputs = [scaled_dot_product_attention(*(tensor[None] for tensor in part), **how)[0] for part in parts]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scaling: float
) -> torch.Tensor:
    """As `_sdpa_by_document`, by FlashAttention's kernel for all documents at once (arXiv 2307.08691)."""
    if (len(q) + 128 * len(documents.lengths)) * q.shape[1] * q.shape[2] >= 2**31:  # int32 in its backward pass
        raise UserError(
            f"a micro-batch of {len(q):,} tokens is too large for FlashAttention. Lower per_device_train_batch_size."
        )
    bounds, longest = documents.cu_seqlens, documents.max_length
    output: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, **_causal_options())
    return output


def _causal_options() -> dict[str, Any]:
    """Options of `varlen_attn` for causal attention with grouped queries; their names differ among versions of torch."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    return {**options, **({"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True})}
