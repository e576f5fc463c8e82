"""Elementwise operations of a decoder layer, forward and backward: pure functions, on a GPU one kernel each.

On a GPU these operations are bound by memory: each pass over an intermediate result costs as much as the operation itself.
`torch.compile` makes one pass of them, which reads every input and writes every output once. Elsewhere, or where Triton is
missing, they run eagerly.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch.nn.functional import pad, silu
from torch.utils._triton import has_triton

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled_on_gpu(function: Function) -> Function:
    """Compiles a function for GPUs at its first call with one; `TORCHDYNAMO_DISABLE=1` in the environment prevents it."""
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any) -> Any:
        if not args[0].is_cuda or not has_triton():
            return function(*args)
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args)

    return call  # type: ignore[return-value]


@compiled_on_gpu
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `x / rms(x) * weight` in the dtype of x, and 1 / rms(x) in fp32 (arXiv 1910.07467).

    Args:
        x: [..., hidden].
        weight: [hidden].
    """
    x32 = x.float()
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x32, inverse_rms).mul_(weight).to(x.dtype), inverse_rms


@compiled_on_gpu
def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, inverse_rms: torch.Tensor
) -> torch.Tensor:
    """Returns the gradient of `rms_norm` with respect to x."""
    x32, grad32 = x.float(), torch.mul(grad.float(), weight)
    projection = (grad32 * x32).sum(dim=-1, keepdim=True).mul_(inverse_rms.pow(3)).div_(-x.shape[-1])
    return grad32.mul_(inverse_rms).addcmul_(x32, projection).to(x.dtype)


@compiled_on_gpu
def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Returns `silu(gate) * up`, [..., n], of [..., 2 n] (arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


@compiled_on_gpu
def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of `swiglu` with respect to its input, and its output once more."""
    gate, up = gate_up.chunk(2, dim=-1)
    activated = silu(gate)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([grad_gate, grad * activated], dim=-1), activated * up


@compiled_on_gpu
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first pairs of each head by angles that grow with the position (RoPE, arXiv 2104.09864).

    With `-sin` it is its own inverse, and so its own gradient.

    Args:
        x: [..., heads, head_dim].
        cos, sin: [..., 1, pairs] in fp32; what lies behind the first 2 * pairs values of a head is left as it is.
    """
    size = 2 * cos.shape[-1]
    if torch.compiler.is_compiling():  # Inductor has no complex numbers, and makes a kernel of each concatenation
        rest = (0, x.shape[-1] - size)
        cos, sin = (part[..., None].expand(*part.shape, 2).flatten(-2) for part in (cos, sin))
        sign = 2 * (torch.arange(size, device=x.device) % 2) - 1
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (x * pad(cos, rest, value=1.0) + swapped * pad(sin * sign, rest)).to(x.dtype)
    pairs = x[..., :size].float().unflatten(-1, (-1, 2))  # their complex product takes a quarter of the time
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return torch.cat([rotated.flatten(-2).to(x.dtype), x[..., size:]], dim=-1)
