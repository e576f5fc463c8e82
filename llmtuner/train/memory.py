"""Memory of a training step: follows every tensor of one on tensors without content.

Nothing is computed and no GPU is needed: a micro-batch's forward pass, loss and backward pass run on fake tensors, which have
shapes and no content, and `LiveTensors` adds up those that are alive at the same time. What lasts through the step (weights,
gradients, optimizer state) follows from its sizes and from how processes share it.
"""

import copy
import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from llmtuner.data.packing import PackedDataCollator
from llmtuner.hparams import FinetuningArguments, TrainArgs
from llmtuner.hparams.parser import read_deepspeed_config
from llmtuner.hparams.transformers_args import GRADIENT_CHECKPOINTING
from llmtuner.model import attention, pointwise
from llmtuner.model.adapters import init_adapter
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.fused import apply_fused_ops
from llmtuner.train import loss
from llmtuner.train.muon import hidden_matrices
from llmtuner.train.trainer import PackedTrainer

COMPILED = (pointwise, loss)  # modules whose decorated functions are compiled on a GPU


def compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Returns the dtype of matrix products, in which frozen weights are held too."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


# ------------------------------------------------------------------------------------------------------ following a step
class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of all tensors alive at the same time, each storage once, and keeps the peak of each phase."""

    def __init__(self, existing: Any) -> None:
        """`existing`: tensors that are alive already."""
        super().__init__()
        self.now, self.phase, self.peak = 0, "before", Counter[str]()
        self.known: set[int] = set()
        self.paused = False
        for tensor in existing:
            self._add(tensor)

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        self._add_results(results)
        return results

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that computes the same, of which only the results are added up."""

        def call(*args: Any) -> Any:
            self.paused, before = True, self.paused
            try:
                results = inspect.unwrap(function)(*args)  # as it is before it is compiled
            finally:
                self.paused = before
            self._add_results(results)
            return results

        return call

    def _add_results(self, results: Any) -> None:
        if self.paused:
            return
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        self.peak[self.phase] = max(self.peak[self.phase], self.now)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.now += size
            weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


class GradientBuckets:
    """Collects gradients as ZeRO-2 does (deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19).

    Args:
        numel: elements of a bucket.
        count: 2 if one is filled while the other is reduced (`overlap_comm`), else 1; 0 if there is memory for them already.
        to_all: whether all processes get what is reduced (`use_multi_rank_bucket_allreduce`), not only the one that needs it.
    """

    def __init__(self, numel: int, count: int, to_all: bool = True) -> None:
        self.numel, self.count, self.to_all = numel, count, to_all
        self.buffers: list[torch.Tensor] = []
        self.filled: list[int] = []

    def collect(self, parameter: torch.nn.Parameter) -> None:
        """Moves a gradient that is ready into a bucket; one that is too large for it stays with its parameter."""
        if not self.buffers:  # setup_buckets, before the first gradient of each backward pass
            self.buffers = [torch.empty(self.numel, dtype=parameter.dtype) for _ in range(self.count)]
        if sum(self.filled) + parameter.numel() > self.numel:
            self.reduce()
        self.filled.append(parameter.numel())
        if parameter.numel() <= self.numel:
            parameter.grad = None

    def reduce(self) -> None:
        """Forms the copy that is sent (allreduce_bucket); a part of a single gradient needs none."""
        if self.buffers and (self.to_all or len(self.filled) > 1):
            torch.empty(sum(self.filled), dtype=self.buffers[0].dtype)
        self.filled = []

    def release(self) -> None:
        """Reduces what is left at the end of a backward pass, and frees the buckets."""
        self.reduce()
        self.buffers = []


class MicroBatchMemory(NamedTuple):
    """Bytes that a micro-batch needs beside weights and the gradients of earlier micro-batches."""

    kept: int
    """At the end of the decoder's forward pass: what is kept for the backward pass."""
    forward: int
    """The peak of forward pass and loss."""
    backward: int
    """The peak of the backward pass."""


def follow_micro_batch(
    model: Any,
    finetuning_args: FinetuningArguments,
    batch_size: int,
    seq_len: int,
    checkpointing: bool,
    dtype: torch.dtype,
    accumulates: bool = True,
    buckets: GradientBuckets | None = None,
    on_gpu: bool = True,
) -> MicroBatchMemory:
    """Follows the tensors of a micro-batch with the trainer's own collator and loss.

    Args:
        model: prepared for training, with real tensors or with fake ones, under their mode. Its mode is changed to
            training, and its gradients are deleted.
        checkpointing: whether layers save only their input and are recomputed one at a time.
        dtype: of autocast; fp32 means none.
        accumulates: whether there are gradients of earlier micro-batches already.
        buckets: where gradients go as soon as they are ready; None: they stay with their parameters.
        on_gpu: whether to go the ways of a GPU; real tensors go those of their device.
    """
    sequence = dict.fromkeys(("input_ids", "labels", "position_ids"), numpy.arange(seq_len)) | {"doc_ids": [0]}
    with unset_fake_temporarily():
        batch: Any = PackedDataCollator(0)([sequence] * batch_size)  # type: ignore[list-item]
    implementation = model.config._attn_implementation or ""
    trainer: Any = SimpleNamespace(model=model, finetuning_args=finetuning_args, attention=implementation)
    model.train()
    if checkpointing:
        getattr(model, f"{GRADIENT_CHECKPOINTING}_enable")({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if accumulates and parameter.requires_grad else None
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    live = LiveTensors([*model.parameters(), *model.buffers(), *gradients])
    del gradients
    before, kept = live.now, 0

    def end_forward(*_: Any) -> None:
        nonlocal kept
        kept, live.phase = live.now - before, "loss"

    language_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hooks = [language_model.base_model.register_forward_hook(end_forward)]
    if buckets is not None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks += [parameter.register_post_accumulate_grad_hook(buckets.collect) for parameter in trained]
    autocast = torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype != torch.float32 else nullcontext()
    with as_on_a_gpu(live.as_one_kernel) if on_gpu else nullcontext(), live:
        with autocast:
            loss_sum, _ = PackedTrainer._compute_loss_sum(trainer, model, batch)
        live.phase = "backward"
        loss_sum.backward()
        if buckets is not None:
            buckets.release()
    for hook in hooks:
        hook.remove()
    if checkpointing:
        getattr(model, f"{GRADIENT_CHECKPOINTING}_disable")()
    model.zero_grad()
    forward = max(live.peak[phase] for phase in ("before", "loss"))
    return MicroBatchMemory(kept, forward - before, live.peak["backward"] - before)


@contextmanager
def as_on_a_gpu(as_one_kernel: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Makes fake tensors of a CPU take the ways of a GPU; autograd follows those of a GPU only where there is one.

    Args:
        as_one_kernel: what becomes of functions that are compiled on a GPU.
    """
    with ExitStack() as stack:
        for module in COMPILED:
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if hasattr(function, "__wrapped__"):
                    stack.enter_context(mock.patch.object(module, name, as_one_kernel(function)))
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(lambda _: True), create=True))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(attention, "flash_varlen_available", return_value=True))
        yield


def fake_copy(model: Any, dtype: torch.dtype | None = None) -> tuple[Any, FakeTensorMode]:
    """Copies a model with fake tensors, which have shapes and no content; returns the mode under which it computes, too.

    The copy is on the CPU, whatever the model is on.

    Args:
        model: its tensors may be on any device, also meta.
        dtype: that of all parameters, as DeepSpeed casts them; None: each keeps its own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {}
    with mode:
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
                fakes[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad)
            else:
                fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
    twin = copy.deepcopy(model, fakes)
    if (twin.config._attn_implementation or "").startswith("flash"):  # has no operation for a CPU, and saves the same
        register_varlen()
        twin.config._attn_implementation = VARLEN
    return twin, mode


# -------------------------------------------------------------------------------------------------------------- estimate
@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each process at the peak of a training step; the parts add up to it."""

    weights: int
    gradients: int
    """Of earlier micro-batches of the step."""
    optimizer: int
    """Its state, and the fp32 weights that DeepSpeed keeps of 16-bit ones."""
    buckets: int
    """Of gradients on their way to other processes: what they add to the peak."""
    activations: int
    """What a micro-batch keeps of the decoder's forward pass for its backward pass."""
    workspace: int
    """What loss or backward pass hold beside them: logits, gradients, a layer that is recomputed."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in vars(self).items() if size)
        return f"{self.total / 1e9:.1f} GB ({parts})"


@dataclass(frozen=True)
class Sharing:
    """How the processes of a run share gradients and optimizer; sizes are bytes of each process."""

    gradients: int
    optimizer: int
    accumulates: bool
    """Whether gradients of earlier micro-batches stay with their parameters."""
    ddp_buckets: int = 0
    """Through the complete step."""
    buckets: GradientBuckets | None = None
    """Where gradients go as soon as they are ready."""


class StepEstimator:
    """Estimates a training step of a model that is prepared for training; each kind of micro-batch is followed once.

    Args:
        model: its tensors may be on any device, also meta. It is not changed.
        args: settings of the run; `estimate` replaces those of the micro-batch.
        processes: number of those that train together.
    """

    def __init__(self, model: Any, args: TrainArgs, processes: int = 1) -> None:
        self.args, self.processes, self.dtype = args, processes, compute_dtype(args.training)
        self.deepspeed = read_deepspeed_config(args.training.deepspeed) if args.training.deepspeed else None
        # DeepSpeed casts all parameters, where accelerate casts the operands of each operation.
        self.model, self.mode = fake_copy(model, None if self.deepspeed is None else self.dtype)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.num_trained = sum(parameter.numel() for parameter in self.trained)
        self.followed: dict[tuple[int, bool, bool, bool], MicroBatchMemory] = {}

    def estimate(self, batch_size: int, checkpointing: bool) -> MemoryEstimate:
        """Estimates a step of micro-batches of `batch_size` sequences, as many as make the global batch of the settings."""
        sharing = self._share(accumulates=sequences_per_step(self.args.training) > batch_size)
        key = (batch_size, checkpointing, sharing.accumulates, sharing.buckets is not None)
        if key not in self.followed:
            dtype = self.dtype if self.deepspeed is None else torch.float32
            settings = (batch_size, self.args.data.cutoff_len, checkpointing, dtype)
            with self.mode:
                self.followed[key] = follow_micro_batch(
                    self.model, self.args.finetuning, *settings, sharing.accumulates, sharing.buckets
                )
        step, buckets = self.followed[key], 0
        if sharing.buckets is not None and step.backward > step.forward:  # else there are none at the peak
            buckets = sharing.buckets.numel * sharing.buckets.count * self.dtype.itemsize
        peak = max(step.forward, step.backward) - buckets
        kept, buckets = min(step.kept, peak), buckets + sharing.ddp_buckets
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return MemoryEstimate(weights, sharing.gradients, sharing.optimizer, buckets, kept, peak - kept)

    def variant(self, optim: str | None = None, processes: int | None = None) -> "StepEstimator":
        """Returns the estimator of the same run with another optimizer or number of processes."""
        twin = copy.copy(self)
        twin.processes = processes or self.processes
        twin.args = replace(self.args, training=copy.copy(self.args.training))
        twin.args.training.optim = optim or self.args.training.optim
        return twin

    def _share(self, accumulates: bool) -> Sharing:
        if self.deepspeed is not None:
            return self._share_by_zero(self.deepspeed)
        gradients = 4 * self.num_trained
        if self.processes == 1:
            return Sharing(gradients * accumulates, self._optimizer_state(), accumulates)
        # DDP's Reducer has buckets for all gradients (torch/csrc/distributed/c10d/reducer.cpp). With gradient_as_bucket_view
        # a gradient is made a view of them when it is reduced; those of a step's earlier micro-batches, which are not, are
        # beside them, for Trainer deletes gradients after each step.
        moved = None if accumulates else GradientBuckets(numel=self.num_trained, count=0)
        return Sharing(gradients * accumulates, self._optimizer_state(), accumulates, gradients, moved)

    def _share_by_zero(self, config: dict[str, Any]) -> Sharing:
        """ZeRO, as deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19 allocates it."""
        zero, size = config.get("zero_optimization") or {}, self.dtype.itemsize
        stage, numel = int(zero.get("stage", 0)), self.num_trained
        share = -(-numel // self.processes) if stage else numel
        # The optimizer updates this process's share of the weights in fp32, as one vector of each parameter group.
        optimizer = 4 * share + self._optimizer_state() * share // max(numel, 1)
        if ((zero.get("offload_optimizer") or {}).get("device") or "none") != "none":
            optimizer = 0
        if stage < 2:
            return Sharing(size * numel, optimizer, accumulates=True)
        in_fp32 = "32" in str((config.get("data_types") or {}).get("grad_accum_dtype"))
        gradients = (4 if in_fp32 else size) * share
        bucket = zero.get("reduce_bucket_size", 5e8)
        bucket = self.model.config.hidden_size**2 if bucket == "auto" else int(bucket)
        to_all = zero.get("use_multi_rank_bucket_allreduce", True)
        buckets = GradientBuckets(bucket, 2 if zero.get("overlap_comm") else 1, to_all)
        return Sharing(gradients, optimizer, accumulates=False, buckets=buckets)

    def _optimizer_state(self) -> int:
        """Returns the bytes of the optimizer's state of all trained parameters."""
        training, finetuning, in_32_bits = self.args.training, self.args.finetuning, 0
        per_parameter = state_bytes_per_parameter(training, flat=self.deepspeed is not None)
        own_groups = (finetuning.embedding_learning_rate, finetuning.loraplus_lr_ratio) != (None, None)
        if "8bit" in training.optim and "torch" not in training.optim and not own_groups and self.deepspeed is None:
            # Trainer.create_optimizer keeps what bitsandbytes stores of nn.Embedding in 32 bits; our own groups do not.
            embeddings = [module for module in self.model.modules() if isinstance(module, torch.nn.Embedding)]
            matrices = [matrix for module in embeddings for matrix in module.parameters() if matrix.requires_grad]
            in_32_bits = sum(matrix.numel() for matrix in matrices)
        by_muon = sum(matrix.numel() for matrix in hidden_matrices(self.model)) if finetuning.use_muon else 0
        others = self.num_trained - in_32_bits - by_muon
        return int(per_parameter * others + 4 * round(per_parameter) * in_32_bits + 4 * by_muon)


def state_bytes_per_parameter(training_args: TrainingArguments, flat: bool = False) -> float:
    """Returns the bytes of optimizer state per trained parameter: what the optimizer makes for a small matrix.

    Args:
        flat: whether it sees a vector instead, as under DeepSpeed; Adafactor keeps less of a matrix.
    """
    name = training_args.optim
    if "paged" in name:  # the driver moves it to the CPU's memory where the GPU's is short
        return 0.0
    small = torch.nn.Parameter(torch.zeros(2**18 if flat else (2**9, 2**9), device=training_args.device))
    small.grad = torch.zeros_like(small)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training_args)
        optimizer = optimizer_class([small], **options)
        optimizer.step()
        state = optimizer.state[small]
    except Exception:  # not installed, as may be what an error message proposes, or made for a complete model only
        return 2.0 if "8bit" in name else 8.0
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)) / small.numel()


def sequences_per_step(training_args: TrainingArguments) -> int:
    """Returns the number of sequences of a step of one process."""
    return training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps


def make_skeleton(config: Any, finetuning_args: FinetuningArguments, dtype: torch.dtype) -> Any:
    """Prepares a model of this configuration for training, on the meta device: without memory for its weights."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)
    model = init_adapter(base, finetuning_args)
    if finetuning_args.fused_ops:
        apply_fused_ops(model)
    return model
