"""Layers that pass over memory less often than peft's and transformers' own, with the same results to rounding.

For fp32 on a CPU, where a product of activations costs little more than writing them: elsewhere the plain layers are used.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.autograd import Function
from torch.nn.functional import linear
from transformers.models.glm.modeling_glm import GlmRMSNorm


def apply_fused_ops(model: torch.nn.Module) -> None:
    """Lets the LoRA layers and norms of a model that is to be trained compute as this file does; weights stay theirs."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = FusedLoraLinear
        # Of a norm that is trained in full, peft keeps the original beside it, emptied by `init_adapter`.
        elif type(module) is GlmRMSNorm and module.weight is not None and not module.weight.requires_grad:
            module.__class__ = FusedRMSNorm


class FusedLoraLinear(LoraLinear):
    """peft's LoRA layer; while it is trained, one product with `W + scale B A`.

    Which of both ways is gone may not depend on the batch: gradients become ready in another order, and ZeRO-2 adds up those
    of all processes in the order in which they do.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        name = names[0] if names else ""
        if (
            len(names) != 1
            or args
            or kwargs
            or self.disable_adapters
            or self.merged
            or name in self.lora_variant  # DoRA
            or not isinstance(self.lora_dropout[name], torch.nn.Identity)
            or not _is_cpu_fp32(x)
            or base.weight.dtype != torch.float32  # merged into 16 bits, small updates would be rounded away
            or not torch.is_grad_enabled()  # a single token at a time would form the matrix for nothing
        ):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return FusedLoraFunction.apply(x, base.weight, base.bias, a, b, self.scaling[name])


class FusedLoraFunction(Function):
    """`x (W + scale B A)^T + bias` with a frozen W: LoRA (arXiv 2106.09685) in one product of activations instead of three.

    The merged matrix is formed again for the backward pass, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """x [..., in], weight [out, in], bias [out], a [rank, in], b [out, rank] -> [..., out]."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        x, weight, a, b = ctx.saved_tensors
        grad, rows = grad_outputs[0].reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        grad_x = (grad @ torch.addmm(weight, b, a, alpha=ctx.scale)).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_a = ((grad @ b).T @ rows).mul_(ctx.scale)
        grad_b = (grad.T @ (rows @ a.T)).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


class FusedRMSNorm(GlmRMSNorm):
    """Glm's norm with a frozen weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _is_cpu_fp32(hidden_states):
            return super().forward(hidden_states)
        return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)


class RMSNormFunction(Function):
    """`x / rms(x) * weight` over the last dimension (arXiv 1910.07467); no gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., width], weight [width] -> [..., width]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        grad = grad_outputs[0] * weight
        along = (grad * x).sum(dim=-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(x, along), None, None


def _is_cpu_fp32(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
