"""Chunked linear cross-entropy: the loss from hidden states, without holding all logits of a batch in memory."""

from typing import Any

import torch

CHUNK_NUMEL = 2**25  # logits in fp32: 128 MB
CHUNK_NUMEL_CPU = 2**22  # logits that fit into a CPU's caches in part


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
        numel = CHUNK_NUMEL_CPU if hidden.device.type == "cpu" else CHUNK_NUMEL
        chunk_size = max(1, numel // len(weight))
        for start in range(0, len(hidden), chunk_size):
            stop = start + chunk_size
            chunk, target = hidden[start:stop].to(dtype), targets[start:stop, None]
            logits = (chunk @ weight_cast.T).float()
            max_logits = logits.amax(dim=1, keepdim=True)
            total -= (logits.gather(1, target) - max_logits).sum()
            exponentials = logits.sub_(max_logits).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            total += sums.log().sum()
            if not (hidden_needs_grad or weight_needs_grad):
                continue
            grad_logits = exponentials.mul_(sums.reciprocal_())  # the probabilities
            grad_logits.scatter_add_(1, target, torch.full_like(sums, -1))
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start:stop] = grad_logits @ weight_cast
            if grad_weight is None:
                continue
            if dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, chunk)
            else:
                grad_weight += grad_logits.T @ chunk
        ctx.grad_hidden, ctx.grad_weight, ctx.weight_dtype = grad_hidden, grad_weight, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        scale = grad_outputs[0]
        grad_hidden = None if ctx.grad_hidden is None else ctx.grad_hidden.mul_(scale)
        grad_weight = None if ctx.grad_weight is None else ctx.grad_weight.mul_(scale).to(ctx.weight_dtype)
        del ctx.grad_hidden, ctx.grad_weight
        return grad_hidden, grad_weight, None, None


def linear_cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the sum over tokens of the cross-entropy, in nats, of logits `hidden @ weight.T`.

    Args:
        hidden: the input of the output layer, [tokens, hidden_size].
        weight: the output layer's, [vocabulary, hidden_size].
        targets: the ids to be predicted, [tokens].
    """
    return ChunkedLinearCrossEntropy.apply(hidden, weight, targets, matmul_dtype(weight))


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a matrix product with `weight`: autocast's where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
