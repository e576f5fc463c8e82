"""Chunked linear cross-entropy: the loss from hidden states, without holding all logits of a batch in memory."""

from typing import Any

import torch

from llmtuner.model.attention import autocast_dtype
from llmtuner.model.pointwise import compiled_on_gpu

CHUNK_NUMEL = 2**27  # logits of a chunk on a GPU: 256 MB in 16 bits, and as much for their gradients
CHUNK_NUMEL_CPU = 2**22  # logits that fit into a CPU's caches in part
CHUNK_ROWS_MULTIPLE = 128  # of a chunk's tokens on a GPU: the tile of a matrix product


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sums the cross-entropy of `hidden @ weight.T` against targets, computing logits chunk by chunk.

    Gradients are computed in the forward pass, while the logits of a chunk are there, so that none is computed twice.
    The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989), in plain PyTorch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> Any:
        """hidden [tokens, hidden_size], weight [vocabulary, hidden_size], targets [tokens] -> scalar, in nats and fp32.

        Matrix products are computed in `dtype`, everything else in fp32.
        """
        hidden_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        weight_cast = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if hidden_needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = _chunk_size(hidden, len(weight))
        for start in range(0, len(hidden), size):
            chunk, target = hidden[start : start + size].to(dtype), targets[start : start + size]
            losses, grad_logits = softmax_cross_entropy(chunk @ weight_cast.T, target)
            total += losses.sum()
            if grad_hidden is not None:
                grad_hidden[start : start + size] = grad_logits @ weight_cast
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, chunk)
        ctx.grad_hidden, ctx.grad_weight, ctx.weight_dtype = grad_hidden, grad_weight, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        scale = grad_outputs[0]
        grad_hidden = None if ctx.grad_hidden is None else ctx.grad_hidden.mul_(scale)
        grad_weight = None if ctx.grad_weight is None else ctx.grad_weight.mul_(scale).to(ctx.weight_dtype)
        del ctx.grad_hidden, ctx.grad_weight
        return grad_hidden, grad_weight, None, None


@compiled_on_gpu
def softmax_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the losses [tokens] in fp32, and the gradient of their sum with respect to the logits, in their dtype.

    Args:
        logits: [tokens, vocabulary].
        targets: [tokens].
    """
    logits32, target = logits.float(), targets[:, None]
    at_target = logits32.gather(1, target).squeeze(1)
    if torch.compiler.is_compiling():  # a comparison, because a scattered addition would be a kernel of its own
        log_sum_exp = logits32.logsumexp(dim=1, keepdim=True)
        is_target = torch.arange(logits.shape[1], device=logits.device) == target
        grad = (logits32 - log_sum_exp).exp() - is_target.float()
        return log_sum_exp.squeeze(1) - at_target, grad.to(logits.dtype)
    largest, probabilities = logits32.amax(dim=1), logits32.softmax(dim=1)
    losses = largest - probabilities.amax(dim=1).log() - at_target  # the largest probability does not underflow
    return losses, probabilities.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32)).to(logits.dtype)


def _chunk_size(hidden: torch.Tensor, vocab_size: int) -> int:
    if hidden.is_cuda:
        return -(-CHUNK_NUMEL // vocab_size // CHUNK_ROWS_MULTIPLE) * CHUNK_ROWS_MULTIPLE
    return max(1, CHUNK_NUMEL_CPU // vocab_size)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds `left @ right` to an fp32 matrix."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:  # the product is added before it is rounded to 16 bits
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def linear_cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the sum over tokens of the cross-entropy, in nats, of logits `hidden @ weight.T`.

    Args:
        hidden: the input of the output layer, [tokens, hidden_size].
        weight: the output layer's, [vocabulary, hidden_size].
        targets: the ids to be predicted, [tokens].
    """
    return ChunkedLinearCrossEntropy.apply(hidden, weight, targets, autocast_dtype(weight))
