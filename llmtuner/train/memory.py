"""Estimates the memory of a training step: weights, gradients and optimizer by their sizes, activations by tracing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtuner.train.loss import CHUNK_NUMEL

MEMORY_FRACTION = 0.85  # of free memory; the rest is left to fragmentation, kernel workspaces and the estimate's errors


def free_memory() -> int | None:
    """Returns the free bytes of the GPU, or None without one: a CPU's memory is seldom what is short."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What one micro-batch saves for its backward pass."""
    loss: int
    """A chunk of logits and its gradients, and the output layer's gradient."""

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
    """Estimates the memory of a step of a model that is prepared for training, without computing anything.

    Args:
        batch_size, seq_len: of a micro-batch.
        checkpointing: whether layers save only their input and are recomputed one at a time.
        dtype: of autocast; fp32 means none.
        optimizer_bytes: per trained parameter; Adam keeps two fp32 values.
        processes: number of those that share gradients, optimizer state and, in 16 bits, its fp32 master weights (ZeRO-2).
    """
    parameters = list(model.parameters())
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    config = model.config
    num_layers, hidden_size, vocab_size = config.num_hidden_layers, config.hidden_size, config.vocab_size
    activations = saved_activation_bytes(model, batch_size, seq_len, dtype)
    if checkpointing:
        activations = activations // num_layers + num_layers * batch_size * seq_len * hidden_size * 4
    num_logits = min(batch_size * seq_len * vocab_size, CHUNK_NUMEL)
    # In full or in rows, a trained output layer is cast to the product's dtype, and its gradient is formed in fp32.
    trains_output = any(parameter.requires_grad for name, parameter in model.named_parameters() if "lm_head" in name)
    return MemoryEstimate(
        weights=sum(parameter.nbytes for parameter in parameters),
        gradients=4 * num_trained // processes,
        optimizer=optimizer_bytes * num_trained // processes,
        activations=activations,
        loss=num_logits * (8 + dtype.itemsize) + trains_output * (4 + dtype.itemsize) * vocab_size * hidden_size,
    )


def saved_activation_bytes(model: Any, batch_size: int, seq_len: int, dtype: torch.dtype) -> int:
    """Returns the bytes that autograd saves in a forward pass, without the weights; each storage counts once.

    The forward pass runs on fake tensors, which have shapes but no content.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
    weights = {fake.untyped_storage()._cdata for fake in fakes.values()}
    saved: dict[int, torch.Tensor] = {}  # holds the tensors, so that no address is reused

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    with mode, _training_mode(model), autocast, torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        batch = {"input_ids": ids, "position_ids": torch.arange(seq_len).expand(batch_size, -1), "use_cache": False}
        batch["logits_to_keep"] = torch.zeros(0, dtype=torch.long)
        torch.func.functional_call(model, fakes, (), batch)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in weights)


@contextmanager
def _training_mode(model: Any) -> Iterator[None]:
    """Enters training mode; FlashAttention, which needs a GPU, is traced as SDPA, which saves the same."""
    training, attention = model.training, model.config._attn_implementation
    model.train()
    if attention.startswith("flash"):
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.train(training)
        model.config._attn_implementation = attention
