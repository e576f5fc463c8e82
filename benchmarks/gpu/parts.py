"""The parts of the GPU benchmark that measure: machine, baseline, one layer, whole steps, losses, embeddings, compilation."""

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks.common import Values
from benchmarks.gpu.measuring import (
    ALL_ON,
    PRODUCT,
    STACK,
    Part,
    Trainee,
    case_name,
    kernels,
    measure_step,
    packed_batch,
)
from benchmarks.traffic import OPTIMIZATIONS
from benchmarks.training import ALL_OFF, clock, fastest
from llmtuner.hparams import FinetuningArguments
from llmtuner.model import attention
from llmtuner.report.environment import environment
from llmtuner.train.trainer import forward_packed

ATTENTIONS = ("sdpa", "varlen", "documents", "flex")
LORA_LAYERS = {"peft": False, "fused": True}  # by fused_ops


def measure_machine(part: Part) -> None:
    """The GPU, its packages, memory bandwidth, and the products of a step."""
    part.measure("environment", partial(describe_machine, part))
    part.measure("bandwidth", partial(measure_bandwidth, part))
    hidden, wide, rows = part.shape["hidden_size"], part.shape["intermediate_size"], part.shape["vocab_size"]
    tokens = math.prod(part.windows[0])
    square = (part.side,) * 3
    products = {f"{part.side:,} {PRODUCT}, bfloat16": square, f"{part.side:,} {PRODUCT}, float32": square}
    products |= {"query": (tokens, hidden, hidden), "gate and up": (tokens, hidden, 2 * wide)}
    products |= {"down": (tokens, wide, hidden), "output layer": (tokens, hidden, rows)}
    products |= {"LoRA A": (tokens, hidden, part.rank), "LoRA B": (tokens, part.rank, hidden)}
    for name, shape in products.items():
        dtype = torch.float32 if "float32" in name else torch.bfloat16
        part.measure(name, partial(measure_product, part, shape, dtype))


def describe_machine(part: Part) -> Values:
    """Machine and versions, and the signature of what differs between PyTorch's versions."""
    values: Values = dict(environment())
    if part.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        values |= {"gpu": properties.name, "total_memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        values["capability"] = f"{properties.major}.{properties.minor}"
    packages = ("triton", "bitsandbytes", "deepspeed", "flash_attn")
    values["installed"] = [name for name in packages if importlib.util.find_spec(name)]
    varlen = "torch.nn.attention.varlen"
    found = importlib.import_module(varlen) if importlib.util.find_spec(varlen) else None
    return values | {"varlen_attn": str(inspect.signature(found.varlen_attn)) if found else "missing"}


def measure_bandwidth(part: Part) -> Values:
    """Bytes read and written per second by a copy on the device, and sent per second from pinned memory."""
    numel = 2**16 if part.tiny else 2**30
    source = torch.zeros(numel, dtype=torch.bfloat16, device=part.device)
    on_host = torch.zeros(numel, dtype=torch.bfloat16, pin_memory=part.device == "cuda")
    target = torch.empty_like(source)
    copied, sent = fastest(lambda: target.copy_(source)), fastest(lambda: target.copy_(on_host), 3)
    return {"bytes_per_second": 2 * source.nbytes / copied, "host_bytes_per_second": source.nbytes / sent}


def measure_product(part: Part, shape: tuple[int, ...], dtype: torch.dtype) -> Values:
    """FLOP per second of [m, k] @ [n, k].T, of m, k, n."""
    left = torch.randn(shape[0], shape[1], dtype=dtype, device=part.device)
    right = torch.randn(shape[2], shape[1], dtype=dtype, device=part.device)
    return {"flop_per_second": 2 * math.prod(shape) / fastest(lambda: left @ right.T)}


def measure_baseline(part: Part) -> None:
    """All optimizations off: the largest micro-batch that fits, its kernels, its peak memory beside the estimate."""
    trainee = Trainee(part, ALL_OFF)
    batch_size, seq_len = part.windows[0]

    for sequences, recomputed in ((batch_size, False), (batch_size, True), (1, True)):
        step = partial(measure_step, part, trainee, sequences, seq_len, recomputed)
        values = part.measure(case_name("all off", sequences, seq_len, recomputed), step)
        trainee.optimizer.zero_grad(set_to_none=True)
        if values.get("skipped") != "out of memory":
            break
    measure_kernels(part, trainee, sequences, seq_len)


def measure_kernels(part: Part, trainee: Trainee, batch_size: int, seq_len: int) -> None:
    """The kernels of a micro-batch and of the optimizer."""
    batch, _ = packed_batch(part, batch_size, seq_len)
    part.measure("kernels", lambda: kernels(part, lambda: (trainee.micro_batch(batch), trainee.update())))


def measure_layer(part: Part) -> None:
    """One decoder layer of full width with 4,096 tokens: each attention, with peft's and the fused LoRA."""
    rows = 1_024  # of the embeddings, which are trained: their gradient is small, and the layer's input is fp32 as in a run
    plain = Trainee(part, ALL_OFF, num_hidden_layers=1, vocab_size=rows)
    for name in ATTENTIONS:  # what is compiled, and may take long, comes last
        for batch_size, seq_len in part.windows:
            batch, _ = packed_batch(part, batch_size, seq_len)
            batch["input_ids"] %= rows
            for lora, fused in LORA_LAYERS.items():
                layer = partial(measure_one_layer, part, plain, name, fused, batch)
                part.measure(f"{name}, {lora}, {batch_size} x {seq_len:,}", layer)


def measure_one_layer(part: Part, plain: Trainee, name: str, fused: bool, batch: Values) -> Values:
    """Milliseconds and kernels of the layer's forward and backward pass, and the bytes that it keeps in between."""
    if name == "flex" and part.device == "cpu":
        return {"skipped": "flex attention has no backward pass on a CPU"}
    by_settings = {"documents": "varlen", "flex": "sdpa"}.get(name, name)
    layer = plain.twin({**plain.settings, "fused_ops": fused, "flash_attn": by_settings})
    config = layer.model.config
    if name == "flex":  # no setting selects it
        config._attn_implementation = "flex_attention"
    decoder = layer.model.get_base_model().model
    # Without FlashAttention's kernel, documents are computed one after another.
    is_off = mock.patch.object(attention, "flash_varlen_available", return_value=False)
    kernel = is_off if name == "documents" else nullcontext()

    def forward() -> torch.Tensor:
        with torch.autocast(part.device, dtype=torch.bfloat16), kernel:
            return forward_packed(decoder, config._attn_implementation, batch).last_hidden_state

    def allocated() -> int:
        return torch.cuda.memory_allocated() if part.device == "cuda" else 0

    gradient = torch.ones_like(forward())
    forwards, backwards, kept = [], [], 0
    for _ in range(3 if part.tiny else 12):
        before, start = allocated(), clock()
        hidden = forward()
        middle = clock()
        kept = allocated() - before
        hidden.backward(gradient)
        forwards.append(middle - start)
        backwards.append(clock() - middle)
    values = {"forward_milliseconds": 1e3 * median(forwards), "backward_milliseconds": 1e3 * median(backwards)}
    values["kept_gb"] = kept / 1e9
    return values | kernels(part, lambda: forward().backward(gradient), 12)


def measure_steps(part: Part) -> None:
    """Whole steps, the optimizations added one by one; then the kernels with all on."""
    first = Trainee(part, ALL_OFF)
    stack = {name: first.twin(settings) for name, settings in STACK.items()}
    for recomputed in (False, True):
        for batch_size, seq_len in part.windows:
            for name, trainee in stack.items():
                step = partial(measure_step, part, trainee, batch_size, seq_len, recomputed)
                part.measure(case_name(name, batch_size, seq_len, recomputed), step)
                first.optimizer.zero_grad(set_to_none=True)
    measure_kernels(part, trainee, *part.windows[0])


def measure_numerics(part: Part) -> None:
    """Losses of 20 steps at four layers of full width: fp32, plain autocast, and each optimization in bf16."""
    cases = {"fp32": ALL_OFF, "plain autocast": ALL_OFF}
    cases |= {name: {**ALL_OFF, **change} for name, change in OPTIMIZATIONS.items()} | {"all on": ALL_ON}
    batches = [packed_batch(part, *part.windows[0], seed)[0] for seed in range(4)]

    def train(name: str) -> Values:
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        trainee = Trainee(part, cases[name], dtype, num_hidden_layers=2 if part.tiny else 4)
        losses = []
        for step in range(20):
            losses.append(trainee.micro_batch(batches[step % len(batches)]))
            trainee.update()
        values: Values = {"losses": torch.stack(losses).tolist()}
        reference = part.results.get("fp32", values).get("losses", [])
        differences = [abs(loss - exact) for loss, exact in zip(values["losses"], reference, strict=False)]
        return values | {"largest_difference": max(differences, default=math.nan)}

    for name in cases:
        part.measure(name, partial(train, name))


def measure_embeddings(part: Part) -> None:
    """LoRA and both matrices against LoRA alone, and the recipe for one card of 24 GB."""

    def step(sequences: int, recomputed: bool, optimizer: str = "adamw", **changes: Any) -> Values:
        trainee = Trainee(part, {**ALL_ON, **changes}, optimizer=optimizer)
        return measure_step(part, trainee, sequences, part.windows[0][1], recomputed)

    part.measure("LoRA", partial(step, part.windows[0][0], False, additional_target=[]))
    part.measure("LoRA + embeddings", partial(step, part.windows[0][0], False))
    missing = part.device == "cpu" or not importlib.util.find_spec("bitsandbytes")
    skip: Callable[[], Values] = lambda: {"skipped": "8-bit Adam needs a GPU and bitsandbytes"}  # noqa: E731
    part.measure("one card of 24 GB", skip if missing else partial(step, 1, True, "adamw_8bit"))


def measure_compile(part: Part) -> None:
    """Compiled decoder layers instead of fused operations, and products in fp8."""
    size = part.windows[0]

    def compiled() -> Values:
        trainee = Trainee(part, {**ALL_ON, "fused_ops": False})
        for layer in trainee.model.get_base_model().model.layers:
            layer.compile(backend="inductor" if part.device == "cuda" else "eager")
        batch, _ = packed_batch(part, *size)
        start = clock()
        trainee.micro_batch(batch)
        return {"compile_seconds": clock() - start, **measure_step(part, trainee, *size, recomputed=False)}

    def fp8_product() -> Values:
        left, right = (torch.randn(part.side, part.side, device=part.device).to(torch.float8_e4m3fn) for _ in range(2))
        scale = torch.ones((), device=part.device)
        product = partial(torch._scaled_mm, left, right.T, scale, scale, out_dtype=torch.bfloat16)
        return {"flop_per_second": 2 * part.side**3 / fastest(product)}

    def fp8_step() -> Values:
        if "fp8" not in FinetuningArguments.__dataclass_fields__:
            return {"skipped": "there is no such setting"}
        return measure_step(part, Trainee(part, {**ALL_ON, "fp8": True}), *size, recomputed=False)

    part.measure("compiled layers", compiled)
    part.measure("fp8 product", fp8_product)
    part.measure("fp8", fp8_step)
