"""Fused LoRA, RMSNorm, attention and MLP: fewer passes over memory and fewer kept activations, same results up to rounding.

Two kinds of training gain: in bf16, anywhere, everything between two matrix products stays in bf16 and is read and written
once; in fp32 on a CPU, LoRA becomes one product. In all other cases, and wherever gradients are off, the plain layers run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch.autograd import Function
from torch.nn.functional import linear
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import (
    GlmAttention,
    GlmDecoderLayer,
    GlmMLP,
    GlmRMSNorm,
    eager_attention_forward,
)

from llmtuner.model import pointwise
from llmtuner.model.attention import autocast_dtype


def apply_fused_ops(model: torch.nn.Module) -> None:
    """Replaces layers of a model by fused ones that share their parameters."""
    twins: dict[type, type] = {LoraLinear: FusedLoraLinear, GlmMLP: FusedMLP, GlmAttention: FusedAttention}
    layers = []
    for name, module in list(model.named_modules()):
        if type(module) in twins:
            model.set_submodule(name, _share_state(module, twins[type(module)]))
        # The original of a norm that is trained in full has no weight (`_free_original_modules`).
        elif type(module) is GlmRMSNorm and module.weight is not None and not module.weight.requires_grad:
            model.set_submodule(name, _share_state(module, FusedRMSNorm))
        elif isinstance(module, GlmDecoderLayer):
            layers.append(module)
    if layers:
        layers[0].register_forward_pre_hook(_cast_residual_stream)


def _share_state(module: torch.nn.Module, cls: type[torch.nn.Module]) -> torch.nn.Module:
    """Returns a module of class `cls`, a subclass of the module's, with the same parameters, buffers and attributes."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    return twin


def _cast_residual_stream(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Casts the input of the first layer, which has the dtype of the trained embeddings (fp32), to bf16 under autocast."""
    hidden, *rest = args
    return (hidden.to(torch.bfloat16) if _computes_bf16(hidden) else hidden, *rest)


def _computes_bf16(x: torch.Tensor) -> bool:
    """Whether products of x are computed in bf16 while something is trained."""
    return torch.is_grad_enabled() and autocast_dtype(x) == torch.bfloat16


def _is_cpu_fp32(x: torch.Tensor) -> bool:
    return autocast_dtype(x) == torch.float32 and x.device.type == "cpu"


# ---------------------------------------------------------------------------------------------------------------- LoRA
class LoraWeights(NamedTuple):
    """A linear layer: `x (weight + scale b a)^T + bias`, where only a and b are trained."""

    weight: torch.Tensor
    """[out, in]"""
    bias: torch.Tensor | None
    """[out]"""
    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[out, rank]"""
    scale: float


def lora_weights(layer: torch.nn.Module, dtype: torch.dtype) -> LoraWeights | None:
    """Returns the weights of a layer with one plain adapter and frozen weights in `dtype`; None for any other layer."""
    if not isinstance(layer, FusedLoraLinear) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base: Any = layer.get_base_layer()
    if len(names) != 1 or base.weight.dtype != dtype or base.weight.requires_grad:
        return None
    name = names[0]
    if name in layer.lora_variant or not isinstance(layer.lora_dropout[name], torch.nn.Identity):  # DoRA, dropout
        return None
    a: Any = layer.lora_A[name]
    b: Any = layer.lora_B[name]
    return LoraWeights(base.weight, base.bias, a.weight, b.weight, layer.scaling[name])


class FusedLoraLinear(LoraLinear):
    """Computes peft's LoRA layer with fewer passes while it is trained.

    The choice between the ways must not depend on the batch: it changes the order in which gradients become ready, and
    ZeRO-2 reduces those of all processes in this order.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # In generation, without gradients, the merged matrix would be formed for a single token.
        if torch.is_grad_enabled() and not (args or kwargs):
            if _computes_bf16(x) and (weights := lora_weights(self, torch.bfloat16)):
                return lora_linears(x, [weights])[0]
            if _is_cpu_fp32(x) and (weights := lora_weights(self, torch.float32)):
                return MergedLoraFunction.apply(x, *weights)
        return super().forward(x, *args, **kwargs)


class MergedLoraFunction(Function):
    """Computes `x (W + scale B A)^T + bias` with a frozen W: LoRA (arXiv 2106.09685) in one product instead of three.

    For fp32 on a CPU, where a product costs little more than writing its result. In 16 bits the merged matrix would lose
    small updates. The backward pass recomputes it.
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


def lora_linears(x: torch.Tensor, layers: Sequence[LoraWeights], is_gate_up: bool = False) -> tuple[torch.Tensor, ...]:
    """Computes linear layers with LoRA that share their input, in bf16.

    Args:
        x: [..., in]; with `is_gate_up` [..., 2 in], and the layers' input is swiglu(x), which is not kept.

    Returns:
        the layers' outputs, [..., out] each.
    """
    scales = tuple(layer.scale for layer in layers)
    tensors = [tensor for layer in layers for tensor in layer[:4]]
    return LoraFunction.apply(x.to(torch.bfloat16), is_gate_up, scales, *tensors)


class LoraFunction(Function):
    """Computes `lora_linears` (arXiv 2106.09685): the adapters' products are added into those of the frozen weights.

    Only x and the products with A are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, is_gate_up: bool, scales: tuple[float, ...], *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        """tensors: the first four fields of `LoraWeights`, layer by layer."""
        weights, biases, all_a, trained_b = (tensors[index::4] for index in range(4))
        dtype = x.dtype
        scaled_a = torch.cat([a.detach().mul(scale).to(dtype) for a, scale in zip(all_a, scales, strict=True)])
        all_b = [b.detach().to(dtype) for b in trained_b]
        flat = x.flatten(0, -2)
        inputs = pointwise.swiglu(flat) if is_gate_up else flat
        inputs_a = inputs @ scaled_a.T
        outputs = []
        for weight, bias, b, part in zip(weights, biases, all_b, _split(inputs_a, all_b), strict=True):
            output = inputs @ weight.T if bias is None else torch.addmm(bias, inputs, weight.T)
            outputs.append(output.addmm_(part, b.T).unflatten(0, x.shape[:-1]))
        ctx.save_for_backward(x, inputs_a, scaled_a, *weights, *all_b)
        ctx.is_gate_up, ctx.scales, ctx.dtypes = is_gate_up, scales, [tensor.dtype for tensor in all_a]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        x, inputs_a, scaled_a, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        weights, all_b = rest[:count], rest[count:]
        grads = [grad.flatten(0, -2) for grad in grad_outputs]
        grad_a_outputs = torch.empty_like(inputs_a)
        for grad, b, part in zip(grads, all_b, _split(grad_a_outputs, all_b), strict=True):
            torch.mm(grad, b, out=part)
        grad_inputs = grad_a_outputs @ scaled_a
        for grad, weight in zip(grads, weights, strict=True):
            grad_inputs.addmm_(grad, weight)
        inputs = x.flatten(0, -2)
        if ctx.is_gate_up:
            grad_inputs, inputs = pointwise.swiglu_backward(grad_inputs, inputs)
        grad_a = (grad_a_outputs.T @ inputs).split([b.shape[1] for b in all_b])
        results: list[torch.Tensor | None] = []
        parts = zip(grads, grad_a, _split(inputs_a, all_b), ctx.scales, ctx.dtypes, strict=True)
        for grad, layer_grad_a, part, scale, dtype in parts:
            results += [None, None, layer_grad_a.to(dtype).mul_(scale), (grad.T @ part).to(dtype)]
        return grad_inputs.view(x.shape), None, None, *results


def _split(products_a: torch.Tensor, all_b: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Splits [tokens, sum of ranks] into one view per layer."""
    return products_a.split([b.shape[1] for b in all_b], dim=1)


# ---------------------------------------------------------------------------------------------------------------- Glm
class FusedRMSNorm(GlmRMSNorm):
    """Computes Glm's RMSNorm with a frozen weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not (_is_cpu_fp32(hidden_states) or _computes_bf16(hidden_states)):
            return super().forward(hidden_states)
        return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)


class RMSNormFunction(Function):
    """Computes `x / rms(x) * weight` over the last dimension, without a gradient for the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., hidden], weight [hidden] -> [..., hidden]."""
        normed, inverse_rms = pointwise.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        return normed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        return pointwise.rms_norm_backward(grad_outputs[0], *ctx.saved_tensors), None, None


class FusedMLP(GlmMLP):
    """Computes Glm's MLP and keeps one of its inner activations, where the plain one keeps four."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if _computes_bf16(hidden_states) and (down := lora_weights(self.down_proj, torch.bfloat16)):
            return lora_linears(self.gate_up_proj(hidden_states), [down], is_gate_up=True)[0]
        return super().forward(hidden_states)


class FusedAttention(GlmAttention):
    """Computes Glm's attention with one product for the adapters of queries, keys and values, and rotates in one pass."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        layers = []
        if _computes_bf16(hidden_states) and past_key_values is None and position_embeddings is not None:
            found = [lora_weights(layer, torch.bfloat16) for layer in (self.q_proj, self.k_proj, self.v_proj)]
            layers = [layer for layer in found if layer]
        if len(layers) < 3 or position_embeddings is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (output.view(shape) for output in lora_linears(hidden_states, layers))
        # [batch, tokens, 1, pairs]: transformers repeats the pairs' values.
        cos, sin = (part[..., None, : part.shape[-1] // 2].float() for part in position_embeddings)
        query, key = (RotaryFunction.apply(tensor, cos, sin) for tensor in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            *(tensor.transpose(1, 2) for tensor in (query, key, value)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class RotaryFunction(Function):
    """Applies `pointwise.rotate`; the backward pass rotates back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, heads, head_dim], cos and sin [batch, tokens, 1, pairs] -> like x."""
        ctx.save_for_backward(cos, sin)
        return pointwise.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return pointwise.rotate(grad_outputs[0], cos, -sin), None, None
