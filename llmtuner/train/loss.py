"""Cross-entropy straight from hidden states: the logits of a long batch are never held whole."""

from typing import Any

import torch

CHUNK_NUMEL = 2**25  # fp32 numbers: 128 MB
CHUNK_NUMEL_CPU = 2**22  # what its caches hold in part


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T` against targets, some rows of logits at a time.

    Gradients are formed in the forward pass, while a chunk of logits is there; so none is computed twice.
    The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989), in plain PyTorch.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> Any:
        """hidden [tokens, width], weight [vocabulary, width], targets [tokens] -> a number, in nats and fp32.

        Matrix products are formed in `dtype`, everything else in fp32.
        """
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        at_once = CHUNK_NUMEL_CPU if hidden.device.type == "cpu" else CHUNK_NUMEL
        step = max(1, at_once // len(weight))
        for start in range(0, len(hidden), step):
            part, target = hidden[start : start + step].to(dtype), targets[start : start + step, None]
            logits = (part @ matrix.T).float()
            largest = logits.amax(dim=1, keepdim=True)
            total -= (logits.gather(1, target) - largest).sum()
            exponentials = logits.sub_(largest).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            total += sums.log().sum()
            if not (want_hidden or want_weight):
                continue
            gradient = exponentials.mul_(sums.reciprocal_())  # the probabilities
            gradient.scatter_add_(1, target, torch.full_like(sums, -1))
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + step] = gradient @ matrix
            if grad_weight is None:
                continue
            if dtype == torch.float32:
                grad_weight.addmm_(gradient.T, part)
            else:
                grad_weight += gradient.T @ part
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
    """Sum over tokens of the cross-entropy in nats of logits `hidden @ weight.T`.

    Args:
        hidden: what the output layer reads, [tokens, width].
        weight: the output layer's, [vocabulary, width].
        targets: the ids to be predicted, [tokens].
    """
    return ChunkedLinearCrossEntropy.apply(hidden, weight, targets, matmul_dtype(weight))


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The precision of a matrix product with `weight`: autocast's where it is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
