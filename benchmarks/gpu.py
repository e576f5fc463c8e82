"""Steps of ChatGLM3-6B in its full size on one GPU: speed, memory, losses, and the paths that only a GPU takes.

    python -m benchmarks.gpu --minutes 10            everything; then update_readme puts it into docs/gpu.md
    python -m benchmarks.gpu --parts layer steps     some parts again; the others keep their results
    python -m benchmarks.gpu --device cpu --tiny     every part in miniature without a GPU: shows that it runs

Offline: weights are random and made on the GPU, documents are drawn from lengths like those of step 5. On a GPU each part runs
in a process of its own, which gets its share of the minutes that are left. What fails is recorded with its error, what does
not fit is skipped, and the rest goes on. The time of a step is that of four micro-batches, clipping and optimizer.
"""

import argparse
import copy
import gc
import importlib.util
import inspect
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from transformers import AttentionInterface

from benchmarks import common, scaling
from benchmarks.common import CHATGLM3_6B, LORA_RANK, ROOT, Values
from benchmarks.memory_budget import EMBEDDINGS, glm
from benchmarks.training import ALL_OFF, clock, fastest, loss_function, matmul_peak, model_flop, random_model
from llmtuner.console import UserError, print0, print_header, run_cli
from llmtuner.data.packing import PackedDataCollator
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.eval.bits_per_byte import bpb_by_language
from llmtuner.eval.generation import generate_answers
from llmtuner.files import atomic_write_json
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, FinetuningArguments
from llmtuner.hparams.transformers_args import GRADIENT_CHECKPOINTING
from llmtuner.model import attention
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.loading import load_for_evaluation
from llmtuner.report.environment import environment
from llmtuner.train.callbacks import peak_memory_gb
from llmtuner.train.memory import estimate_step_memory
from llmtuner.train.tuner import run_exp
from llmtuner.weights.merge_lora import merge_adapter

ACCUMULATION = 4  # micro-batches of a step, as in step 5 of chatglm3-6b
WINDOWS = ((4, 1_024), (1, 4_096))  # micro-batches
KEPT, RECOMPUTED = "kept", "recomputed"  # activations
OPTIMIZATIONS: dict[str, Values] = {
    "chunked loss": dict(chunked_loss=True),
    "varlen attention": dict(flash_attn="varlen"),
    "fused ops": dict(fused_ops=True),
}
STACK = {"all off": ALL_OFF}  # added one by one
for _name, _change in OPTIMIZATIONS.items():
    STACK[f"+ {_name}"] = {**list(STACK.values())[-1], **_change}
ALL_ON = list(STACK.values())[-1]
ATTENTIONS = ("sdpa", "varlen", "documents", "flex")
LORA_LAYERS = {"peft": False, "fused": True}  # fused_ops
NUM_KERNELS = 40
TINY: Values = dict(vocab_size=2_432, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
TINY |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY_WINDOWS = ((4, 32), (1, 128))
GRACE = 15  # seconds after its deadline in which a part may finish its latest case


# ------------------------------------------------------------------------------------------------------- running parts
@dataclass
class Part:
    """A part of the run: what it may use, and the results of its cases, written after each."""

    name: str
    output: Path
    device: str
    tiny: bool
    seconds: float
    results: Values = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = time.monotonic()
        self.shape = TINY if self.tiny else CHATGLM3_6B
        self.windows = TINY_WINDOWS if self.tiny else WINDOWS
        self.rank = 8 if self.tiny else LORA_RANK

    def run(self) -> None:
        """Measures; an error outside a case is recorded as that of the part."""
        print_header(self.name)
        try:
            PARTS[self.name][1](self)
            self.save()
        except Exception as error:
            self.save(error=last_line(error))

    def measure(self, case: str, function: Callable[[], Values]) -> Values:
        """Records what a case returns, or why it has no result; nothing on the GPU outlives it but what it was given."""
        if time.monotonic() > self.start + self.seconds:
            values: Values = {"skipped": "out of time"}
        else:
            try:
                values = function()
            except torch.OutOfMemoryError:
                values = {"skipped": "out of memory"}
            except Exception as error:
                values = {"error": last_line(error)}
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        shown = {name: value for name, value in values.items() if not isinstance(value, list | dict)}
        print0(f"{case}: {', '.join(f'{name} {value:.5g}' if isinstance(value, float) else f'{name} {value}' for name, value in shown.items())}")
        self.results[case] = values
        self.save()
        return values

    def save(self, **values: Any) -> None:
        section = {**values, "seconds": round(time.monotonic() - self.start, 1), "results": self.results}
        atomic_write_json(self.output, {**common.read_results(self.output), self.name: section})


def last_line(error: Exception) -> str:
    """The last line of an error's traceback."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]


def run_parts(names: list[str], options: argparse.Namespace) -> None:
    """Runs parts, each with its share of the time that is left.

    On a GPU in a process of its own: an illegal memory access ends one part only, and memory is free again afterwards. The
    next process starts while a part runs, and imports what it needs meanwhile.
    """
    deadline = time.monotonic() + 60 * options.minutes
    waiting = start_process(names[0], options) if options.device == "cuda" else None
    for number, name in enumerate(names):
        shares = [PARTS[later][0] for later in names[number:]]
        seconds = max(0.0, (deadline - time.monotonic()) * shares[0] / sum(shares))
        if waiting is None:
            Part(name, options.output, options.device, options.tiny, seconds).run()
            continue
        process, waiting = waiting, start_process(names[number + 1], options) if names[number + 1 :] else None
        try:
            process.communicate(f"{seconds}\n", timeout=seconds + GRACE)
            error = f"its process exited with code {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = f"stopped {GRACE} seconds after its {seconds:.0f} seconds"
        if error:
            results = common.read_results(options.output)
            atomic_write_json(options.output, {**results, name: {"results": {}, **results.get(name, {}), "error": error}})


def start_process(name: str, options: argparse.Namespace) -> subprocess.Popen:
    """Starts the process of a part, which waits for the number of its seconds on standard input."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--output", str(options.output.resolve())]
    return subprocess.Popen(command + ["--tiny"] * options.tiny, cwd=ROOT, stdin=subprocess.PIPE, text=True)


# --------------------------------------------------------------------------------------------------------------- a step
class Trainee:
    """A model with random weights, its loss and its optimizer.

    Args:
        settings: `flash_attn`, and those of `FinetuningArguments`.
        shape: changes of the part's shape.
    """

    def __init__(
        self, part: Part, settings: Values, dtype: torch.dtype = torch.bfloat16, optimizer: str = "adamw", **shape: int
    ) -> None:
        self.dtype, self.device = dtype, part.device
        self.base_settings = {"lora_rank": part.rank, **EMBEDDINGS}
        self.shape = {**part.shape, **shape}
        torch.manual_seed(0)
        self.model = glm(self._finetuning(settings), part.device, self.shape).train()
        if dtype == torch.float32:
            self.model.float()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if optimizer == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer: Any = AdamW8bit(self.parameters, lr=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.optimizer_bytes = 2 if optimizer == "adamw_8bit" else 8
        self._apply(settings)

    def _finetuning(self, settings: Values) -> FinetuningArguments:
        settings = {**self.base_settings, **settings}
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
        if on:
            getattr(self.model, f"{GRADIENT_CHECKPOINTING}_enable")({"use_reentrant": False})
        else:
            getattr(self.model, f"{GRADIENT_CHECKPOINTING}_disable")()

    def micro_batch(self, batch: Values) -> torch.Tensor:
        """Adds the gradients of a batch; returns its loss."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype != torch.float32):
            loss_sum, num_target_tokens = self.compute_loss(batch)
            loss = loss_sum / num_target_tokens
        (loss / ACCUMULATION).backward()
        return loss.detach()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def estimated_gb(self, batch_size: int, seq_len: int, recomputed: bool) -> float:
        """The trainer's own estimate of a step, for a twin without content."""
        finetuning = self._finetuning(self.settings)
        model = glm(finetuning, "meta", self.shape).to_empty(device="cpu")
        prepare(model, self.settings)
        estimate = estimate_step_memory(model, batch_size, seq_len, recomputed, self.dtype, self.optimizer_bytes)
        return estimate.total / 1e9


def prepare(model: Any, settings: Values) -> None:
    """Sets a model's attention and fuses its operations, as the trainer does after loading."""
    attention.register_varlen()
    model.config._attn_implementation = ATTN_IMPLEMENTATIONS[settings["flash_attn"]]
    if settings["fused_ops"]:
        apply_fused_ops(model)


def packed_batch(part: Part, batch_size: int, seq_len: int, seed: int = 0) -> tuple[Values, numpy.ndarray]:
    """A batch on the device, and the lengths of its documents: lognormal, half of them shorter than 400 tokens."""
    draw = numpy.random.default_rng(seed)
    sequences, lengths = [], []
    for _ in range(batch_size):
        cuts = numpy.unique(draw.lognormal(math.log(400), 1, size=seq_len).astype(int).clip(2).cumsum())
        sizes = numpy.diff([0, *cuts[cuts < seq_len - 1], seq_len])
        ids = draw.zipf(1.2, size=seq_len) % part.shape["vocab_size"]
        positions = numpy.concatenate([numpy.arange(size) for size in sizes])
        labels = numpy.where(positions == 0, IGNORE_INDEX, ids)
        documents = numpy.arange(len(sizes))
        sequences.append(dict(input_ids=ids, labels=labels, position_ids=positions, doc_ids=documents))
        lengths.append(sizes)
    batch: Any = PackedDataCollator(0)(sequences)
    moved = {name: value.to(part.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    return moved, numpy.concatenate(lengths)


def measure_step(part: Part, trainee: Trainee, batch_size: int, seq_len: int, recomputed: bool, steps: int = 2) -> Values:
    """Speed, utilization of the measured product and peak memory of whole steps, after one that is not timed."""
    batch, lengths = packed_batch(part, batch_size, seq_len)
    trainee.recompute(recomputed)
    whole, updates = [], []
    if part.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(1 + steps):
        start = clock()
        for _ in range(ACCUMULATION):
            loss = trainee.micro_batch(batch)
        end = clock()
        trainee.update()
        if number:
            whole.append(clock() - start)
            updates.append(clock() - end)
    tokens_per_second = ACCUMULATION * batch_size * seq_len / median(whole)
    peak = matmul_peak(trainee.dtype, torch.device(part.device))
    values: Values = {"tokens_per_second": tokens_per_second, "milliseconds": 1e3 * median(whole)}
    values |= {"optimizer_milliseconds": 1e3 * median(updates), "loss": float(loss)}
    values["utilization"] = tokens_per_second * model_flop(trainee.model, lengths) / peak
    values["peak_gb"] = peak_memory_gb()
    values["estimated_gb"] = trainee.estimated_gb(batch_size, seq_len, recomputed)
    return values


def kernels(part: Part, function: Callable[[], Any], count: int = NUM_KERNELS) -> Values:
    """The kernels of a call that take longest, by the profiler; on a CPU its operators."""
    on_gpu = part.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    start = clock()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        seconds = clock() - start
    found = []
    for event in profile.key_averages():
        if on_gpu and (event.device_type == torch.autograd.DeviceType.CPU or event.is_user_annotation):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append({"kernel": event.key[:120], "calls": event.count, "milliseconds": spent / 1e3})
    found.sort(key=lambda kernel: -kernel["milliseconds"])
    busy = sum(kernel["milliseconds"] for kernel in found)
    return {"profiled_milliseconds": 1e3 * seconds, "busy_milliseconds": busy, "kernels": found[:count]}


def case_name(optimizations: str, batch_size: int, seq_len: int, recomputed: bool) -> str:
    return f"{optimizations}, {batch_size} x {seq_len:,}, {RECOMPUTED if recomputed else KEPT}"


# ---------------------------------------------------------------------------------------------------------------- parts
def measure_machine(part: Part) -> None:
    """The GPU, its packages, memory bandwidth, and the products of a step."""
    part.measure("environment", partial(describe_machine, part))
    numel = 2**16 if part.tiny else 2**30
    source = torch.zeros(numel, dtype=torch.bfloat16, device=part.device)
    target, on_host = torch.empty_like(source), torch.empty(numel, dtype=torch.bfloat16, pin_memory=part.device == "cuda")

    def bandwidth() -> Values:
        copied, sent = fastest(lambda: target.copy_(source)), fastest(lambda: target.copy_(on_host), 3)
        return {"copied_per_second": 2 * source.nbytes / copied, "host_to_device": source.nbytes / sent}

    part.measure("bandwidth", bandwidth)
    hidden, wide, rows = part.shape["hidden_size"], part.shape["intermediate_size"], part.shape["vocab_size"]
    side, tokens = (128, 128) if part.tiny else (8_192, 4_096)
    products = {f"{side:,} squared": (side, side, side), "gate and up": (tokens, hidden, 2 * wide)}
    products |= {"down": (tokens, wide, hidden), "query": (tokens, hidden, hidden), "output layer": (tokens, hidden, rows)}
    products |= {"LoRA A": (tokens, hidden, part.rank), "LoRA B": (tokens, part.rank, hidden)}
    for name, (rows, inner, columns) in products.items():
        for dtype in (torch.bfloat16, torch.float32)[: 2 if "squared" in name else 1]:

            def product(shape: Any = (rows, inner, columns), dtype: torch.dtype = dtype) -> Values:
                left = torch.randn(shape[0], shape[1], dtype=dtype, device=part.device)
                right = torch.randn(shape[2], shape[1], dtype=dtype, device=part.device)
                return {"flop_per_second": 2 * math.prod(shape) / fastest(lambda: left @ right.T)}

            part.measure(f"{name}, {str(dtype).removeprefix('torch.')}", product)


def describe_machine(part: Part) -> Values:
    """Machine, versions, and the signatures of what differs between PyTorch's versions."""
    values: Values = dict(environment())
    if part.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        values |= {"gpu": properties.name, "memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        values["capability"] = f"{properties.major}.{properties.minor}"
    packages = ("triton", "bitsandbytes", "deepspeed", "flash_attn")
    values["packages"] = {name: importlib.util.find_spec(name) is not None for name in packages}
    varlen = importlib.util.find_spec("torch.nn.attention.varlen") and importlib.import_module("torch.nn.attention.varlen")
    values["varlen_attn"] = str(inspect.signature(varlen.varlen_attn)) if varlen else "missing"
    return values


def measure_baseline(part: Part) -> None:
    """All optimizations off: the largest micro-batch that fits, its kernels, its peak memory against the estimate."""
    trainee = Trainee(part, ALL_OFF)
    for (batch_size, seq_len), recomputed in ((part.windows[0], False), (part.windows[0], True), ((1, part.windows[0][1]), True)):

        def baseline() -> Values:
            values = measure_step(part, trainee, batch_size, seq_len, recomputed)
            batch, _ = packed_batch(part, batch_size, seq_len)
            return values | kernels(part, lambda: (trainee.micro_batch(batch), trainee.update()))

        values = part.measure(case_name("all off", batch_size, seq_len, recomputed), baseline)
        trainee.optimizer.zero_grad(set_to_none=True)
        if values.get("skipped") != "out of memory":
            return


def measure_layer(part: Part) -> None:
    """One decoder layer of full width with 4,096 tokens: each attention, peft's and the fused LoRA."""
    shape = dict(num_hidden_layers=1, vocab_size=1_024)
    AttentionInterface.register("documents", attention.varlen_sdpa)
    plain = Trainee(part, {**ALL_OFF, "chunked_loss": True, "additional_target": []}, **shape)
    for batch_size, seq_len in part.windows:
        for name in ATTENTIONS:
            for lora, fused in LORA_LAYERS.items():
                case = f"{name}, {lora}, {batch_size} x {seq_len:,}"
                part.measure(case, partial(measure_one_layer, part, plain, name, fused, batch_size, seq_len))


def measure_one_layer(part: Part, plain: Trainee, name: str, fused: bool, batch_size: int, seq_len: int) -> Values:
    """Milliseconds of forward and backward pass, kept activations, and the kernels that take longest."""
    if name == "flex" and part.device == "cpu":
        return {"skipped": "has no backward pass on a CPU"}
    settings = {**plain.settings, "fused_ops": fused, "flash_attn": "sdpa" if name in ("sdpa", "flex") else "varlen"}
    layer = plain.twin(settings)
    if name in ("documents", "flex"):  # no setting selects them
        layer.model.config._attn_implementation = {"documents": "documents", "flex": "flex_attention"}[name]
    batch, _ = packed_batch(part, batch_size, seq_len)
    batch["input_ids"] %= layer.shape["vocab_size"]
    batch["labels"] = batch["labels"].clamp(max=layer.shape["vocab_size"] - 1)

    def forward() -> torch.Tensor:
        with torch.autocast(part.device, dtype=torch.bfloat16):
            return layer.compute_loss(batch)[0]

    for _ in range(3):
        forward().backward()
    forwards, backwards = [], []
    for _ in range(3 if part.tiny else 10):
        start = clock()
        loss = forward()
        middle = clock()
        loss.backward()
        forwards.append(middle - start)
        backwards.append(clock() - middle)
    kept = kept_bytes(forward) / 1e9
    profiled = kernels(part, lambda: forward().backward(), 12)
    layer.optimizer.zero_grad(set_to_none=True)
    times = {"forward_milliseconds": 1e3 * median(forwards), "backward_milliseconds": 1e3 * median(backwards)}
    return {**times, "milliseconds": sum(times.values()), "kept_gb": kept, **profiled}


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass leaves allocated until the backward pass; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    before = torch.cuda.memory_allocated()
    loss = forward()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return kept


def measure_steps(part: Part) -> None:
    """Whole steps, the optimizations added one by one."""
    first = Trainee(part, ALL_OFF)
    stack = {name: first.twin(settings) for name, settings in STACK.items()}
    for recomputed in (False, True):
        for batch_size, seq_len in part.windows:
            for name, trainee in stack.items():
                step = partial(measure_step, part, trainee, batch_size, seq_len, recomputed)
                part.measure(case_name(name, batch_size, seq_len, recomputed), step)
                trainee.optimizer.zero_grad(set_to_none=True)
    batch, _ = packed_batch(part, *part.windows[0])
    part.measure("kernels", lambda: kernels(part, lambda: trainee.micro_batch(batch)))


def measure_numerics(part: Part) -> None:
    """Losses of 20 steps at four layers of full width: fp32, plain autocast, and each optimization in bf16."""
    cases = {"fp32": ALL_OFF, "plain autocast": ALL_OFF}
    cases |= {name: {**ALL_OFF, **change} for name, change in OPTIMIZATIONS.items()} | {"all on": ALL_ON}
    batches = [packed_batch(part, *part.windows[0], seed)[0] for seed in range(4)]

    def losses(name: str) -> Values:
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        trainee = Trainee(part, cases[name], dtype, num_hidden_layers=2 if part.tiny else 4)
        found = []
        for step in range(20):
            found.append(trainee.micro_batch(batches[step % len(batches)]))
            trainee.update()
        values: Values = {"losses": torch.stack(found).tolist()}
        if reference := part.results.get("fp32", values).get("losses"):
            differences = [abs(loss - other) for loss, other in zip(values["losses"], reference, strict=True)]
            values |= {"largest_difference": max(differences), "mean_difference": sum(differences) / len(differences)}
        return values

    for name in cases:
        part.measure(name, partial(losses, name))


def measure_paths(part: Part) -> None:
    """Runs of the trainer itself at two layers of full width: what needs a GPU, or behaves otherwise on one."""
    with tempfile.TemporaryDirectory() as name:
        directory, base = Path(name), ROOT / "mini" / "base"
        shape = dict(num_hidden_layers=2, vocab_size=8_192)
        model = base if part.tiny else random_model(directory / "model", base, part.device, **shape)
        settings = scaling.small_run(directory, model)
        settings |= dict(val_size=0.02, max_eval_samples=8, max_steps=6, bf16=True, logging_steps=1, report_to="none")
        settings["cutoff_len"] = 64 if part.tiny else 1_024
        if part.tiny:
            settings |= dict(lora_rank=4, additional_target=[])
        paths = {
            "evaluation alone": evaluate_alone,
            "training, then evaluation": train_then_evaluate,
            "generation": generate,
            "checkpoint and resume": stop_and_resume,
            "fp16": train_in_fp16,
            "DDP, one process": train_in_one_process,
            "ZeRO-2, one process": partial(train_in_one_process, deepspeed=str(ROOT / "ds_config_zero2.json")),
        }
        for number, (path, function) in enumerate(paths.items()):
            output_dir = directory / f"run {number}"
            part.measure(path, lambda: function({**settings, "output_dir": str(output_dir)}, output_dir))


def evaluate_alone(settings: Values, _: Path) -> Values:
    return run_exp({**settings, "do_train": False, "do_eval": True})


def train_then_evaluate(settings: Values, output_dir: Path) -> Values:
    """Trains, merges and evaluates as step 5 does, with the memory that is left after training and the peak afterwards."""
    metrics = run_exp({**settings, "eval_strategy": "steps", "eval_steps": 6, "eval_on_start": True})
    values: Values = {"eval_loss": metrics["eval_loss"]["last"], "training_peak_gb": peak_memory_gb()}
    if torch.cuda.is_available():
        values["left_gb"] = torch.cuda.memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    merged = output_dir.with_name("merged")
    merge_adapter(Path(settings["model_name_or_path"]), output_dir, merged)
    model, tokenizer = load_for_evaluation(merged)
    values["weights_gb"] = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    bits = bpb_by_language(model, tokenizer, {"zh": ["从前有一座山，山上住着一位木匠。"] * 16}, settings["cutoff_len"], "after")
    return {**values, "evaluation_peak_gb": peak_memory_gb(), "bits_per_byte": bits["zh"]}


def generate(settings: Values, _: Path) -> Values:
    model, tokenizer = load_for_evaluation(settings["model_name_or_path"])
    generated = generate_answers(model, tokenizer, ["从前有一座山？", "小镇？"] * 8, max_new_tokens=16)
    return {"answers": len(generated.answers), "tokens_per_second": generated.tokens_per_second}


def stop_and_resume(settings: Values, output_dir: Path) -> Values:
    """The largest difference of a loss between a run, and the same run resumed from its checkpoint in the middle."""
    settings = {**settings, "save_strategy": "steps", "save_steps": 3, "additional_target": []}
    curves = []
    for _ in range(2):
        run_exp(settings)
        curves.append(losses_of(output_dir))
        shutil.rmtree(output_dir / "checkpoint-6")
    first, second = curves
    return {"largest_difference": max(abs(first[step] - second[step]) for step in first), "steps": len(second)}


def train_in_fp16(settings: Values, output_dir: Path) -> Values:
    run_exp({**settings, "bf16": False, "fp16": True})
    return {"loss": finite(losses_of(output_dir)[6])}


def train_in_one_process(settings: Values, output_dir: Path, **changes: Any) -> Values:
    """Trains under torchrun in a single process: NCCL's on a GPU."""
    if "deepspeed" in changes and importlib.util.find_spec("deepspeed") is None:
        return {"skipped": "DeepSpeed is not installed"}
    variables = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": 1}
    done = scaling.launch({**settings, **changes}, 1, **variables)
    return {"loss": finite(losses_of(output_dir)[6]), "process_seconds": done.seconds}


def losses_of(output_dir: Path) -> dict[int, float]:
    """The logged loss of each step."""
    log = map(json.loads, (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in log if "loss" in line}


def finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    return loss


def measure_embeddings(part: Part) -> None:
    """LoRA and both matrices against LoRA alone, and the recipe for one card of 24 GB."""
    for name, changes in {"LoRA": {"additional_target": []}, "LoRA + embeddings": {}}.items():

        def step(changes: Values = changes) -> Values:
            return measure_step(part, Trainee(part, {**ALL_ON, **changes}), *part.windows[0], recomputed=False)

        part.measure(name, step)

    def one_card() -> Values:
        if part.device == "cpu" or importlib.util.find_spec("bitsandbytes") is None:
            return {"skipped": "needs a GPU and bitsandbytes"}
        return measure_step(part, Trainee(part, ALL_ON, optimizer="adamw_8bit"), 1, part.windows[0][1], recomputed=True)

    part.measure("one card of 24 GB", one_card)


def measure_compile(part: Part) -> None:
    """Layers compiled one by one instead of fused operations, and products in fp8."""
    plain = Trainee(part, {**ALL_ON, "fused_ops": False})

    def compiled() -> Values:
        for layer in plain.model.get_base_model().model.layers:
            layer.compile(backend="inductor" if part.device == "cuda" else "eager")
        batch, _ = packed_batch(part, *part.windows[0])
        start = clock()
        plain.micro_batch(batch)
        return {"compile_seconds": clock() - start, **measure_step(part, plain, *part.windows[0], recomputed=False)}

    part.measure("compiled layers", compiled)
    plain.optimizer.zero_grad(set_to_none=True)

    def fp8_product() -> Values:
        side = 128 if part.tiny else 8_192
        left, right = (torch.randn(side, side, device=part.device).to(torch.float8_e4m3fn) for _ in range(2))
        scale = torch.ones((), device=part.device)
        product = partial(torch._scaled_mm, left, right.T, scale, scale, out_dtype=torch.bfloat16)
        return {"flop_per_second": 2 * side**3 / fastest(product)}

    part.measure("fp8 product", fp8_product)
    if "fp8" not in FinetuningArguments.__dataclass_fields__:
        part.measure("fp8 base products", lambda: {"skipped": "this version has no such setting"})
    else:
        step = lambda: measure_step(part, Trainee(part, {**ALL_ON, "fp8": True}), *part.windows[0], recomputed=False)
        part.measure("fp8 base products", step)


# Share of the time, and function.
PARTS: dict[str, tuple[int, Callable[[Part], None]]] = {
    "machine": (2, measure_machine),
    "baseline": (5, measure_baseline),
    "layer": (8, measure_layer),
    "steps": (16, measure_steps),
    "numerics": (6, measure_numerics),
    "paths": (12, measure_paths),
    "embeddings": (6, measure_embeddings),
    "compile": (6, measure_compile),
}


def main() -> None:
    parser = common.make_parser(__doc__, "gpu.json")
    parser.add_argument("--minutes", type=float, default=10, help="after which no further case starts (default: 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a miniature shape and short windows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:  # a process of `run_parts`
        return Part(options.run, options.output, "cuda", options.tiny, float(input())).run()
    if options.device == "cpu" and not options.tiny:
        raise UserError("the full size is for a GPU. Without one, add --tiny.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU. Without one: --device cpu --tiny.")
    if options.parts == list(PARTS):
        options.output.unlink(missing_ok=True)
    run_parts(options.parts, options)
    print0(f"\nresults: {options.output}")
    return None


if __name__ == "__main__":
    run_cli(main)
