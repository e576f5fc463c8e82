"""How much memory a training step takes: weights, gradients and optimizer by their sizes, activations by counting them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtuner.train.loss import CHUNK_NUMEL

MEMORY_FRACTION = 0.85  # of what is free: the rest goes to fragments, kernels' own buffers and what the estimate misses


def free_memory() -> int | None:
    """Bytes that are free on the GPU; None where there is none, for a CPU's memory is seldom what is short."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the height of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs, of one micro-batch."""
    loss: int
    """A chunk of logits and its gradients, and the output layer's gradient while it is formed."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "loss")
        return ", ".join(f"{part} {getattr(self, part) / 1e9:.1f}" for part in parts) + " GB"


def estimate_step_memory(
    model: Any,
    batch_size: int,
    seq_len: int,
    checkpointing: bool,
    dtype: torch.dtype = torch.float32,
    optimizer_bytes: int = 8,
    processes: int = 1,
) -> MemoryEstimate:
    """An estimate for a model that is prepared for training, before anything is computed.

    Activations are counted by a forward pass over tensors without content: what autograd keeps, each memory once.

    Args:
        batch_size, seq_len: of a micro-batch.
        checkpointing: whether layers keep their input only, and are computed again one at a time.
        dtype: autocast's; fp32 means none.
        optimizer_bytes: for each trained parameter; Adam keeps two numbers.
        processes: that share gradients, the optimizer's state and, in 16 bits, its fp32 copy of the weights (ZeRO-2).
    """
    parameters = list(model.parameters())
    trained = [one for one in parameters if one.requires_grad]
    count = sum(one.numel() for one in trained)
    layers, width, rows_of_output = (
        getattr(model.config, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    activations = saved_activation_bytes(model, batch_size, seq_len, dtype)
    if checkpointing:
        activations = activations // layers + layers * batch_size * seq_len * width * 4
    logits = min(batch_size * seq_len * rows_of_output, CHUNK_NUMEL)
    # Its rows or all of it: the matrix is copied into the product's precision, its gradient formed whole and in fp32.
    output = any(one.requires_grad for name, one in model.named_parameters() if "lm_head" in name)
    return MemoryEstimate(
        weights=sum(one.nbytes for one in parameters),
        gradients=4 * count // processes,
        optimizer=optimizer_bytes * count // processes,
        activations=activations,
        loss=logits * (8 + dtype.itemsize) + output * (4 + dtype.itemsize) * rows_of_output * width,
    )


def saved_activation_bytes(model: Any, batch_size: int, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a forward pass, but for the weights themselves; nothing is computed."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, torch.Tensor] = {name: mode.from_tensor(one) for name, one in tensors.items()}
    own = {one.untyped_storage()._cdata for one in fakes.values()}
    kept: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with mode, _training_mode(model), autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        batch = {"input_ids": ids, "position_ids": torch.arange(seq_len).expand(batch_size, -1), "use_cache": False}
        batch["logits_to_keep"] = torch.zeros(0, dtype=torch.long)
        torch.func.functional_call(model, fakes, (), batch)
    return sum(one.untyped_storage().nbytes() for place, one in kept.items() if place not in own)


@contextmanager
def _training_mode(model: Any) -> Iterator[None]:
    """Training mode, and an attention that needs no GPU to be traced; FlashAttention keeps what the fused kernel keeps."""
    training, attention = model.training, model.config._attn_implementation
    model.train()
    if attention.startswith("flash"):
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.train(training)
        model.config._attn_implementation = attention
