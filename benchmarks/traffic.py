"""Memory traffic of a decoder layer of ChatGLM3-6B in a training step on a GPU, computed from its operations.

    python -m benchmarks.traffic            some seconds, no GPU; then update_readme

Forward and backward pass of a micro-batch run on fake tensors, which have shapes and no content, under bf16 autocast; a layer's
share is the difference between two layers and one. What PyTorch computes kernel by kernel counts kernel by kernel; functions
that are compiled on a GPU count as one kernel, which tests/unit/benchmarks/test_traffic.py checks against the compiler.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import CHATGLM3_6B, Values, make_parser, print_results, save_results
from benchmarks.memory_budget import EMBEDDINGS, chatglm3
from benchmarks.training import ALL_OFF, loss_function
from llmtuner.console import run_cli
from llmtuner.data.packing import PackedDataCollator
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, FinetuningArguments
from llmtuner.model.attention import register_varlen
from llmtuner.model.fused import apply_fused_ops
from llmtuner.train.memory import LiveTensors, as_on_a_gpu, fake_copy

BATCH_SIZE, SEQ_LEN = 4, 1_024
DOCUMENTS = (0.4, 0.3, 0.3)  # a sequence's tokens by document
OPTIMIZATIONS: dict[str, Values] = {
    "chunked loss": dict(chunked_loss=True),
    "varlen attention": dict(flash_attn="varlen"),
    "fused ops": dict(fused_ops=True),
}
PHASES, KINDS = ("forward", "backward"), ("product", "attention", "elementwise")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "_scaled_mm"}
ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention", "flex_attention", "varlen_attn")
# Operations that only make another tensor of the same memory, or reserve memory; views are known by their schema.
FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
FREE |= {"new_empty_strided", "_local_scalar_dense", "is_same_size"}
# Operations that do not read what is given as their shape or is overwritten.
WRITING = {"copy_", "fill_", "zero_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# Operations that read as many elements of a tensor as they return, or change as many as they are given.
INDEXED_READS = {"embedding", "gather", "index", "index_select"}
INDEXED_WRITES = {"scatter_", "scatter_add_", "index_put_", "index_add_", "index_copy_"}


class TrafficCounter(TorchDispatchMode):
    """Counts bytes and kernels of all operations by phase and kind.

    An operation is one kernel; it reads each part of its inputs and writes each part of its outputs once. Views cost nothing,
    casts and copies count. Phases are "forward" and "backward", kinds "product", "attention" and "elementwise"; reductions
    and lookups are elementwise too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        self.operations = Counter[tuple[str, str]]()  # (phase, name) -> bytes
        self.paused = False

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        if not self.paused and not is_free(operation):
            self._add(kind_of(operation), name_of(operation), operation_bytes(operation, args, kwargs or {}, results))
        return results

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that computes the same and counts as one elementwise kernel over arguments and results."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.paused, before = True, self.paused
            try:
                results = inspect.unwrap(function)(*args, **kwargs)  # as it is before it is compiled
            finally:
                self.paused = before
            if not self.paused:
                inputs, outputs = tensors_of((args, kwargs)), tensors_of(results)
                self._add("elementwise", function.__name__, region_bytes(inputs) + region_bytes(outputs))
            return results

        return call

    def _add(self, kind: str, name: str, size: int) -> None:
        # A backward pass is a task of the autograd engine; what is recomputed there is a part of it.
        phase = "backward" if torch._C._current_graph_task_id() >= 0 else "forward"
        self.bytes[phase, kind] += size
        self.kernels[phase, kind] += 1
        self.operations[phase, name] += size


def name_of(operation: Any) -> str:
    return operation._schema.name.partition("::")[2]


def kind_of(operation: Any) -> str:
    name = name_of(operation)
    if name.rstrip("_") in PRODUCTS:
        return "product"
    return "attention" if any(part in name for part in ATTENTION) else "elementwise"


def is_free(operation: Any) -> bool:
    return operation.is_view or operation.namespace == "prim" or name_of(operation) in FREE


def operation_bytes(operation: Any, args: Any, kwargs: Any, results: Any) -> int:
    """Bytes that an operation reads and writes."""
    name, arguments = name_of(operation), operation._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    written, read = [], []
    for argument in arguments:
        tensors = tensors_of(given.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += tensors if is_written else []
        if not (argument.is_out or (name in WRITING and argument.name == "self")):
            read += tensors
    known = {storage_of(tensor) for tensor in written}
    written += [tensor for tensor in tensors_of(results) if storage_of(tensor) not in known]
    if name in INDEXED_READS:
        return region_bytes(read[1:]) + 2 * region_bytes(written)
    if name in INDEXED_WRITES:  # read[0] is what is changed, the last one the values
        return region_bytes(read[1:]) + 2 * region_bytes(read[-1:])
    return region_bytes(read) + region_bytes(written)


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def region_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors, the same part of the same storage once; what is expanded has its size before."""
    regions = {}
    for tensor in tensors:
        sizes = [pair for pair in zip(tensor.shape, tensor.stride(), strict=True) if pair[1]]
        size = tensor.itemsize * math.prod(length for length, _ in sizes) if tensor.numel() else 0
        regions[storage_of(tensor), tensor.storage_offset(), tuple(sorted(sizes))] = size
    return sum(regions.values())


def follow(model: Any, settings: Values, batch: Any) -> tuple[TrafficCounter, int]:
    """Follows a micro-batch that finds the gradients of an earlier one.

    Args:
        model: prepared for training. Its attention and operations are changed as the settings say.
        settings: `flash_attn`, `fused_ops` and `chunked_loss`.

    Returns:
        the counter, and the bytes that the decoder's forward pass keeps for the backward pass.
    """
    finetuning = FinetuningArguments(**{name: value for name, value in settings.items() if name != "flash_attn"})
    register_varlen()
    model.config._attn_implementation = ATTN_IMPLEMENTATIONS[settings["flash_attn"]]
    if finetuning.fused_ops:
        apply_fused_ops(model)
    counter, kept = TrafficCounter(), 0
    model, mode = fake_copy(model)
    with mode:
        for parameter in model.train().parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        live = LiveTensors([*model.parameters(), *model.buffers(), *gradients])
        before = live.now

        def end_forward(*_: Any) -> None:
            nonlocal kept
            kept = live.now - before

        model.get_base_model().base_model.register_forward_hook(end_forward)
        with as_on_a_gpu(counter.as_one_kernel), live, counter:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                summed, _ = loss_function(model, finetuning)(batch)
            summed.backward()
    return counter, kept


def packed_batch(batch_size: int, seq_len: int) -> Any:
    """A micro-batch of packed sequences of several documents each."""
    lengths = [int(seq_len * ratio) for ratio in DOCUMENTS[1:]]
    lengths.insert(0, seq_len - sum(lengths))
    ids, positions = numpy.arange(seq_len) % 7, numpy.concatenate([numpy.arange(length) for length in lengths])
    sequence: Any = {"input_ids": ids, "labels": ids, "position_ids": positions, "doc_ids": numpy.arange(len(lengths))}
    return PackedDataCollator(0)([sequence] * batch_size)


def layer_traffic(settings: Values, shape: Values, batch_size: int, seq_len: int) -> Values:
    """Traffic of one layer and of all that is outside the layers, by following models of two layers and of one."""
    batch = packed_batch(batch_size, seq_len)
    counted = []
    for layers in (1, 2):
        model = chatglm3(EMBEDDINGS, {**shape, "num_hidden_layers": layers})
        counted.append(follow(model, settings, batch))
    (one, one_kept), (two, two_kept) = counted
    values: Values = {}
    for kind in KINDS:
        for phase in PHASES:
            values[f"{kind}_{phase}_gb"] = (two.bytes[phase, kind] - one.bytes[phase, kind]) / 1e9
        values[f"{kind}_gb"] = sum(values[f"{kind}_{phase}_gb"] for phase in PHASES)
        values[f"{kind}_kernels"] = sum(two.kernels[phase, kind] - one.kernels[phase, kind] for phase in PHASES)
        values[f"{kind}_outside_gb"] = sum(one.bytes[phase, kind] for phase in PHASES) / 1e9 - values[f"{kind}_gb"]
    values["kernels"] = sum(values[f"{kind}_kernels"] for kind in KINDS)
    return {name: round(value, 6) for name, value in values.items()} | {"kept_mb": (two_kept - one_kept) / 1e6}


def optimizations_in_turn() -> dict[str, Values]:
    """Settings without optimizations, and with one more of them in each line."""
    settings = {"all off": ALL_OFF}
    for name, change in OPTIMIZATIONS.items():
        settings[f"+ {name}"] = {**list(settings.values())[-1], **change}
    return settings


def main() -> None:
    options = make_parser(__doc__, "traffic.json").parse_args()
    results = {}
    for name, settings in optimizations_in_turn().items():
        results[name] = layer_traffic(settings, CHATGLM3_6B, BATCH_SIZE, SEQ_LEN)
        for key in ("elementwise_gb", "kept_mb"):
            results[name][f"{key}_fraction"] = results[name][key] / results["all off"][key]
    print_results(f"a layer of ChatGLM3-6B, {BATCH_SIZE} x {SEQ_LEN:,} tokens, computed", results)
    save_results(options.output, {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "results": results})


if __name__ == "__main__":
    run_cli(main)
