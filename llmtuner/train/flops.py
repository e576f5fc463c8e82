"""Model FLOP per token, and the speed of a large product on this device; their ratio in a run is its MFU."""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch

PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}  # of a square product large enough for full speed
REPEATS = 5


def flops_per_token(model: Any, lengths: numpy.ndarray, target_ratio: float = 1.0) -> float:
    """Counts the model FLOP of a token in forward and backward pass, as PaLM does for MFU (arXiv 2204.02311, appendix B).

    A parameter of a linear layer counts 2 forward, 2 for the gradient of its input where anything before it is trained,
    and 2 for its own gradient if it is trained itself; attention counts 4 * width of all heads * tokens attended to
    forward, and twice that backward. So a frozen layer under LoRA counts 4 per parameter, a trained one 6. Recomputed
    activations (gradient checkpointing), norms, softmax, the optimizer and embedding lookups do not count.

    Args:
        model: with or without adapters; which parameters are trained is read from it.
        lengths: of the blocks that attention is computed within, in tokens.
        target_ratio: of the tokens on which the output layer is computed.
    """
    head = model.get_output_embeddings()
    head_parameters = {id(parameter) for parameter in head.parameters()}
    skipped = {id(parameter) for parameter in model.get_input_embeddings().parameters()} | head_parameters
    config, flops, has_trained = model.config.get_text_config(), 0.0, False
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attended = width * float(numpy.sum(lengths * (lengths + 1) / 2) / max(lengths.sum(), 1))
    layers: dict[str, bool] = {}  # name of a layer -> whether anything up to its end is trained
    for name, parameter in model.named_parameters():
        has_trained |= parameter.requires_grad
        prefix, _, rest = name.partition("layers.")
        if rest:
            layers[prefix + rest.partition(".")[0]] = has_trained
        if parameter.ndim == 2 and id(parameter) not in skipped:
            flops += parameter.numel() * (2 + 2 * has_trained + 2 * parameter.requires_grad)
    flops += attended * sum(12 if is_trained else 4 for is_trained in layers.values())
    head_numel = max(parameter.numel() for parameter in head.parameters() if parameter.ndim == 2)  # not of its adapter
    is_head_trained = any(parameter.requires_grad for parameter in head.parameters())
    return flops + target_ratio * head_numel * (2 + 2 * has_trained + 2 * is_head_trained)


def measure_peak_flops(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Measures the FLOP per second of a large matrix product in a dtype: the fastest of five, after one that is not timed.

    Takes 0.1 seconds, once in a process. The random states stay as they are.

    Args:
        side: rows of the square matrices; by default enough for full speed.
    """
    return _measure_peak_flops(device, dtype, side or PRODUCT_SIDE["cuda" if device.type == "cuda" else "cpu"])


@cache
def _measure_peak_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    product = left @ right
    fastest = float("inf")
    for _ in range(REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Utilization:
    """What the MFU of a run is computed from."""

    per_token: float
    """Model FLOP of a token, without the output layer."""
    per_target_token: float
    """Model FLOP of the output layer, which the loss computes on target tokens only."""
    peak_flops: float
    """FLOP per second of a large product on one device."""

    @classmethod
    def of(cls, model: Any, lengths: numpy.ndarray, device: torch.device, dtype: torch.dtype) -> "Utilization":
        """Counts the FLOP of a model, and measures its device."""
        body = flops_per_token(model, lengths, target_ratio=0)
        return cls(body, flops_per_token(model, lengths) - body, measure_peak_flops(device, dtype))

    def mfu(self, tokens: int, target_tokens: int, device_seconds: float) -> float:
        """Returns model FLOP per second as a ratio of the speed of a large product.

        Args:
            tokens: of all ranks, without padding.
            device_seconds: seconds times devices.
        """
        flops = tokens * self.per_token + target_tokens * self.per_target_token
        return flops / max(device_seconds, 1e-9) / self.peak_flops
