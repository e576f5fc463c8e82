"""Attention on a CPU in 16 bits: batched products of documents, those of similar length padded to the longest of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy
import torch
from torch.autograd import Function

# Lengths up to which documents are padded together.
BUCKETS = numpy.array(sorted(factor * 2**power for power in range(4, 20) for factor in (2, 3)))
QUERY_BLOCK = 256  # queries of a document that are multiplied at once: with keys up to the last of them, not all


class Bucket(NamedTuple):
    """Documents that are padded to the same length."""

    start: int
    """Of its first token among the padded tokens of all buckets."""
    num_documents: int
    length: int


class PaddedRows:
    """Maps tokens [tokens, heads, dim] of a packed batch to rows [rows, dim], with each document's heads one after another.

    Rows are ordered by bucket, document, group, head of the group and token, so that a bucket's rows are, without a copy,
    a batch of matrices for grouped-query attention.
    """

    def __init__(self, lengths: list[int], heads: int, groups: int) -> None:
        """`lengths`: of all documents, in order."""
        self.heads, self.groups, self.buckets = heads, groups, list[Bucket]()
        sizes = numpy.array(lengths)
        starts = numpy.cumsum(sizes) - sizes
        sources, masks, start = [], [], 0
        keys = numpy.searchsorted(BUCKETS, sizes)
        for key in numpy.unique(keys):
            members = numpy.flatnonzero(keys == key)
            length = int(sizes[members].max())
            is_token = numpy.arange(length) < sizes[members, None]  # [documents, length]
            tokens = starts[members, None] + numpy.arange(length) * is_token
            rows = tokens[:, None] * heads + numpy.arange(heads)[:, None]  # [documents, heads, length]
            sources.append(rows.ravel())
            masks.append(numpy.broadcast_to(is_token[:, None], rows.shape).ravel())
            self.buckets.append(Bucket(start, len(members), length))
            start += len(members) * length
        source, mask = numpy.concatenate(sources), numpy.concatenate(masks)
        inverse = numpy.empty(int(sizes.sum()) * heads, dtype=numpy.int64)
        inverse[source[mask]] = numpy.flatnonzero(mask)
        self.source, self.inverse = torch.from_numpy(source), torch.from_numpy(inverse)
        self.is_token = torch.from_numpy(mask)[:, None]
        """bool [rows, 1]: false for padding, whose rows repeat those of their document's first token."""

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, dim] -> [rows, dim]."""
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, self.source)

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, dim] -> [tokens, heads, dim], without the padding."""
        return rows.index_select(0, self.inverse).view(-1, self.heads, rows.shape[-1])

    def view(self, rows: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """[rows, dim] -> a bucket's [documents * groups, heads of a group, length, dim]."""
        start, stop = (
            self.heads * token for token in (bucket.start, bucket.start + bucket.num_documents * bucket.length)
        )
        return rows[start:stop].view(bucket.num_documents * self.groups, self.heads // self.groups, bucket.length, -1)


class BucketedAttention(Function):
    """Computes causal attention within documents by matrix products.

    In 16 bits the backward pass of a CPU's fused attention takes several times as long as its products. Probabilities are
    kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        padded_rows: tuple[PaddedRows, PaddedRows],
        scaling: float,
    ) -> torch.Tensor:
        """q [tokens, heads, dim], k and v [tokens, groups, dim], the rows of queries and of keys -> like q."""
        rows, kv_rows = padded_rows
        q, k, v = rows.gather(q), kv_rows.gather(k), kv_rows.gather(v)
        output, probabilities = torch.empty_like(q), []
        for bucket in rows.buckets:
            bucket_q, bucket_output = rows.view(q, bucket), rows.view(output, bucket)
            bucket_k, bucket_v = kv_rows.view(k, bucket)[:, 0], kv_rows.view(v, bucket)[:, 0]
            for queries in _query_blocks(bucket):
                keys, block_q = slice(0, queries.stop), bucket_q[:, :, queries]
                mask = _causal_mask(queries, q.dtype).repeat(bucket_q.shape[1], 1)
                scores = torch.baddbmm(mask, block_q.flatten(1, 2), bucket_k[:, keys].transpose(1, 2), alpha=scaling)
                probabilities.append(scores.float().softmax(dim=-1).to(q.dtype))  # in 16 bits it takes twice as long
                bucket_output[:, :, queries] = (probabilities[-1] @ bucket_v[:, keys]).view(block_q.shape)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.rows, ctx.kv_rows, ctx.scaling = rows, kv_rows, scaling
        return rows.scatter(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        q, k, v, *probabilities = ctx.saved_tensors
        rows, kv_rows = ctx.rows, ctx.kv_rows
        grad = rows.gather(grad_outputs[0]).mul_(rows.is_token)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        remaining = iter(probabilities)
        for bucket in rows.buckets:
            bucket_q, bucket_grad, bucket_grad_q = (rows.view(tensor, bucket) for tensor in (q, grad, grad_q))
            bucket_k, bucket_v, bucket_grad_k, bucket_grad_v = (
                kv_rows.view(tensor, bucket)[:, 0] for tensor in (k, v, grad_k, grad_v)
            )
            for queries in _query_blocks(bucket):
                probability, keys = next(remaining), slice(0, queries.stop)
                block_q, block_grad = (tensor[:, :, queries].flatten(1, 2) for tensor in (bucket_q, bucket_grad))
                bucket_grad_v[:, keys].baddbmm_(probability.transpose(1, 2), block_grad)
                grad_scores = block_grad @ bucket_v[:, keys].transpose(1, 2)
                grad_scores = torch._softmax_backward_data(grad_scores, probability, -1, q.dtype).mul_(ctx.scaling)
                block_grad_q = grad_scores @ bucket_k[:, keys]
                bucket_grad_q[:, :, queries] = block_grad_q.unflatten(1, (bucket_q.shape[1], -1))
                bucket_grad_k[:, keys].baddbmm_(grad_scores.transpose(1, 2), block_q)
        return rows.scatter(grad_q), kv_rows.scatter(grad_k), kv_rows.scatter(grad_v), None, None


def _query_blocks(bucket: Bucket) -> Iterator[slice]:
    """Yields positions of queries."""
    for start in range(0, bucket.length, QUERY_BLOCK):
        yield slice(start, min(start + QUERY_BLOCK, bucket.length))


def _causal_mask(queries: slice, dtype: torch.dtype) -> torch.Tensor:
    """[queries, keys up to the last of them]: -inf where the key comes after the query, else 0."""
    size = queries.stop - queries.start
    return torch.full((size, queries.stop), -torch.inf, dtype=dtype).triu_(1 + queries.start)
