"""What the parts of the GPU benchmark share: cases and their results, a model that takes steps, batches, kernels."""

import copy
import gc
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch

from benchmarks import common
from benchmarks.common import CHATGLM3_6B, LORA_RANK, Values
from benchmarks.memory_budget import EMBEDDINGS, glm, make_args
from benchmarks.traffic import optimizations_in_turn
from benchmarks.training import clock, loss_function
from llmtuner.console import print0, print_header
from llmtuner.data.packing import PackedDataCollator
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.files import atomic_write_json
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, FinetuningArguments
from llmtuner.hparams.transformers_args import GRADIENT_CHECKPOINTING
from llmtuner.model.attention import register_varlen
from llmtuner.model.fused import apply_fused_ops
from llmtuner.train.callbacks import peak_memory_gb
from llmtuner.train.flops import flops_per_token, measure_peak_flops
from llmtuner.train.memory import StepEstimator

ACCUMULATION = 4  # micro-batches of a step, as in step 5 of chatglm3-6b
WINDOWS = ((4, 1_024), (1, 4_096))  # sequences and tokens of micro-batches
STACK = optimizations_in_turn()
ALL_ON = list(STACK.values())[-1]
TINY: Values = dict(vocab_size=2_432, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY_WINDOWS = ((4, 32), (1, 128))
PRODUCT = "squared"  # of the large square product, by whose speed a step is judged


@dataclass
class Part:
    """A part of the benchmark: what it may use, and the results of its cases, written after each."""

    name: str
    output: Path
    device: str
    tiny: bool
    seconds: float
    results: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.shape, self.windows, self.rank, self.side = CHATGLM3_6B, WINDOWS, LORA_RANK, 8_192
        if self.tiny:
            self.shape, self.windows, self.rank, self.side = TINY, TINY_WINDOWS, 8, 128

    def run(self, function: Callable[["Part"], None]) -> None:
        """Measures; an error outside the cases is recorded as that of the part."""
        print_header(self.name)
        try:
            function(self)
            self._save()
        except Exception as error:
            self._save(error=last_line(error))

    def measure(self, case: str, function: Callable[[], Values]) -> Values:
        """Records what a case returns, or why it has no result; its own memory on the GPU is freed."""
        if time.monotonic() > self.start + self.seconds:
            values: Values = {"skipped": "out of time"}
        else:
            try:
                values = function()
            except torch.OutOfMemoryError:
                values = {"skipped": "out of memory"}
            except Exception as error:
                values = {"error": last_line(error)}
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        shown = [f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float | int)]
        shown += [f"{name}: {value}" for name, value in values.items() if isinstance(value, str)]
        print0(f"{case}: {', '.join(shown)}")
        self.results[case] = values
        self._save()
        return values

    def _save(self, **values: Any) -> None:
        section = {**values, "seconds": round(time.monotonic() - self.start, 1), "results": self.results}
        atomic_write_json(self.output, {**common.read_results(self.output), self.name: section})

    def peak(self) -> float:
        """FLOP per second of the machine's large product in bf16: that of the machine's part, else measured now."""
        measured = common.read_results(self.output).get("machine", {}).get("results", {})
        for case, values in measured.items():
            if case.endswith(f"{PRODUCT}, bfloat16") and "flop_per_second" in values:
                return values["flop_per_second"]
        return measure_peak_flops(torch.device(self.device), torch.bfloat16, self.side)


def last_line(error: Exception) -> str:
    """The line of a traceback that names the error."""
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:300]


class Trainee:
    """A model with random weights, its loss and its optimizer.

    Args:
        settings: `flash_attn`, and those of `FinetuningArguments`.
        shape: changes of the part's shape.
    """

    def __init__(
        self, part: Part, settings: Values, dtype: torch.dtype = torch.bfloat16, optimizer: str = "adamw", **shape: int
    ) -> None:
        self.device, self.dtype, self.rank, self.shape = part.device, dtype, part.rank, {**part.shape, **shape}
        torch.manual_seed(0)
        self.model = glm(self._finetuning(settings), part.device, self.shape).train()
        if dtype == torch.float32:
            self.model.float()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optim = "adamw_8bit" if optimizer == "adamw_8bit" else "adamw_torch_fused"
        if optimizer == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer: Any = AdamW8bit(self.parameters, lr=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self._apply(settings)

    def _finetuning(self, settings: Values) -> FinetuningArguments:
        settings = {"lora_rank": self.rank, **EMBEDDINGS, **settings}
        return FinetuningArguments(**{name: value for name, value in settings.items() if name != "flash_attn"})

    def _apply(self, settings: Values) -> None:
        self.settings = settings
        prepare(self.model, settings)
        self.compute_loss = loss_function(self.model, self._finetuning(settings))

    def twin(self, settings: Values) -> "Trainee":
        """The same weights and optimizer with other settings, in modules of their own."""
        twin = copy.copy(self)
        tensors = [*self.model.parameters(), *self.model.buffers()]
        twin.model = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        twin._apply(settings)
        return twin

    def recompute(self, on: bool) -> None:
        """Turns gradient checkpointing on or off."""
        method = getattr(self.model, f"{GRADIENT_CHECKPOINTING}_{'enable' if on else 'disable'}")
        method(*[{"use_reentrant": False}] * on)

    def forward(self, batch: Values) -> torch.Tensor:
        """The mean loss of a batch."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype != torch.float32):
            loss_sum, num_target_tokens = self.compute_loss(batch)
            return loss_sum / num_target_tokens

    def micro_batch(self, batch: Values) -> torch.Tensor:
        """Adds the gradients of a batch; returns its loss."""
        loss = self.forward(batch)
        (loss / ACCUMULATION).backward()
        return loss.detach()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def estimated_gb(self, batch_size: int, seq_len: int, recomputed: bool) -> float:
        """The trainer's own estimate of a step, made of tensors without content."""
        model = glm(self._finetuning(self.settings), "meta", self.shape)
        prepare(model, self.settings)
        args = make_args(
            **{"lora_rank": self.rank, **EMBEDDINGS, **self.settings},
            cutoff_len=seq_len,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=ACCUMULATION,
            optim=self.optim,
        )
        args.training.bf16 = self.dtype == torch.bfloat16
        return StepEstimator(model, args).estimate(batch_size, recomputed).total / 1e9


def prepare(model: Any, settings: Values) -> None:
    """Sets a model's attention and fuses its operations, as the trainer does after loading."""
    register_varlen()
    model.config._attn_implementation = ATTN_IMPLEMENTATIONS[settings["flash_attn"]]
    if settings["fused_ops"]:
        apply_fused_ops(model)


def document_lengths(seq_len: int, draw: numpy.random.Generator) -> numpy.ndarray:
    """Lengths of the documents in a sequence of a pretraining run: lognormal, half of them below 400 tokens."""
    ends = draw.lognormal(math.log(400), 1, size=seq_len).astype(int).clip(2).cumsum()
    return numpy.diff([0, *ends[ends < seq_len - 1], seq_len])


def packed_batch(part: Part, batch_size: int, seq_len: int, seed: int = 0) -> tuple[Values, numpy.ndarray]:
    """A batch on the device, and the lengths of its documents."""
    draw, sequences, lengths = numpy.random.default_rng(seed), [], []
    for _ in range(batch_size):
        lengths.append(document_lengths(seq_len, draw))
        ids = draw.zipf(1.2, size=seq_len) % part.shape["vocab_size"]
        positions = numpy.concatenate([numpy.arange(length) for length in lengths[-1]])
        labels = numpy.where(positions == 0, IGNORE_INDEX, ids)
        documents = numpy.arange(len(lengths[-1]))
        sequences.append(dict(input_ids=ids, labels=labels, position_ids=positions, doc_ids=documents))
    batch: Any = PackedDataCollator(0)(sequences)
    moved = {name: value.to(part.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return moved, numpy.concatenate(lengths)


def measure_step(part: Part, trainee: Trainee, batch_size: int, seq_len: int, recomputed: bool) -> Values:
    """Speed, utilization of the measured product and peak memory of steps, after one that is not timed.

    A step is that of `ACCUMULATION` micro-batches, clipping and optimizer.
    """
    batch, lengths = packed_batch(part, batch_size, seq_len)
    trainee.recompute(recomputed)
    steps, updates = [], []
    if part.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(2 if part.tiny else 3):
        start = clock()
        losses = [trainee.micro_batch(batch) for _ in range(ACCUMULATION)]
        middle = clock()
        trainee.update()
        if number:
            updates.append(clock() - middle)
            steps.append(clock() - start)
    tokens_per_second = ACCUMULATION * batch_size * seq_len / median(steps)
    values: Values = {
        "tokens_per_second": tokens_per_second,
        "utilization": tokens_per_second * flops_per_token(trainee.model, lengths) / part.peak(),
        "milliseconds": 1e3 * median(steps),
        "optimizer_milliseconds": 1e3 * median(updates),
        "loss": float(losses[-1]),
        "peak_gb": peak_memory_gb(),
    }
    if part.device == "cuda":
        values["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    try:
        values["estimated_gb"] = trainee.estimated_gb(batch_size, seq_len, recomputed)
    except Exception as error:  # what was measured stays
        values["estimate_failed"] = last_line(error)
    return values


def kernels(part: Part, function: Callable[[], Any], count: int = 40) -> Values:
    """The kernels of a call that take longest, by the profiler; on a CPU its operators."""
    on_gpu = part.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    start = clock()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        seconds = clock() - start
    found = []
    for event in profile.key_averages():
        if on_gpu and (
            event.device_type == torch.autograd.DeviceType.CPU or getattr(event, "is_user_annotation", False)
        ):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append({"kernel": event.key[:120], "calls": event.count, "milliseconds": spent / 1e3})
    found.sort(key=lambda kernel: -kernel["milliseconds"])
    busy = sum(kernel["milliseconds"] for kernel in found)
    return {"profiled_milliseconds": 1e3 * seconds, "busy_milliseconds": busy, "kernels": found[:count]}


def case_name(optimizations: str, batch_size: int, seq_len: int, recomputed: bool) -> str:
    return f"{optimizations}, {batch_size} x {seq_len:,}, {'recomputed' if recomputed else 'kept'}"
