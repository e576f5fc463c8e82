"""Fused LoRA and RMSNorm in fp32 on a CPU: fewer passes over memory, same results up to rounding.

On a CPU a matrix product costs little more than writing its result; elsewhere, and in 16 bits, the plain layers are used.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.autograd import Function
from torch.nn.functional import linear
from transformers.models.glm.modeling_glm import GlmRMSNorm


def apply_fused_ops(model: torch.nn.Module) -> None:
    """Replaces the LoRA layers and frozen norms of a model by fused ones that share their parameters."""
    for name, module in list(model.named_modules()):
        if type(module) is LoraLinear:
            model.set_submodule(name, _share_state(module, FusedLoraLinear))
        # The original of a norm that is trained in full has no weight (`_free_original_modules`).
        elif type(module) is GlmRMSNorm and module.weight is not None and not module.weight.requires_grad:
            model.set_submodule(name, _share_state(module, FusedRMSNorm))


def _share_state(module: torch.nn.Module, cls: type[torch.nn.Module]) -> torch.nn.Module:
    """Returns a module of class `cls`, a subclass of the module's, with the same parameters, buffers and attributes."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    return twin


class FusedLoraLinear(LoraLinear):
    """Computes peft's LoRA layer as one product with `W + scale B A` while it is trained.

    The choice between the two ways must not depend on the batch: it changes the order in which gradients become ready,
    and ZeRO-2 reduces those of all processes in this order.
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
            or not torch.is_grad_enabled()  # in generation the merged matrix would be formed for a single token
        ):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return FusedLoraFunction.apply(x, base.weight, base.bias, a, b, self.scaling[name])


class FusedLoraFunction(Function):
    """Computes `x (W + scale B A)^T + bias` with a frozen W: LoRA (arXiv 2106.09685) in one product instead of three.

    The backward pass recomputes the merged matrix.
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
        grad, x_2d = grad_outputs[0].reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        grad_x = (grad @ torch.addmm(weight, b, a, alpha=ctx.scale)).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_a = ((grad @ b).T @ x_2d).mul_(ctx.scale)
        grad_b = (grad.T @ (x_2d @ a.T)).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None


class FusedRMSNorm(GlmRMSNorm):
    """Computes Glm's RMSNorm with a frozen weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _is_cpu_fp32(hidden_states):
            return super().forward(hidden_states)
        return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)


class RMSNormFunction(Function):
    """Computes `x / rms(x) * weight` over the last dimension (arXiv 1910.07467), without a gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., hidden], weight [hidden] -> [..., hidden]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.mul(x, inverse_rms).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        x, weight, inverse_rms = ctx.saved_tensors
        grad = grad_outputs[0] * weight
        projection = (grad * x).sum(dim=-1, keepdim=True).mul_(inverse_rms.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse_rms).addcmul_(x, projection), None, None


def _is_cpu_fp32(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
