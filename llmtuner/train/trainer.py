"""Trains on packed sequences: loss, parameter groups, logging, evaluation and checkpoints of transformers' Trainer.

One optimizer step, from transformers/trainer.py; what is marked with * is defined or overridden here:

    train -> _inner_training_loop -> _run_epoch
        get_batch_samples *           gradient_accumulation_steps batches of PackedDataCollator, and num_items_in_batch,
                                      the number of their target tokens on all ranks
        training_step                 for each of these micro-batches, under autocast_smart_context_manager *
            compute_loss *            loss sum of the micro-batch / num_items_in_batch
                _compute_loss_sum *   forward pass, linear_cross_entropy_sum (loss.py)
                _record_micro_batch * counts tokens, remembers loss and documents
                _finish_step *        on the last micro-batch: all-reduces the figures of the step
                    _check_finite *   raises on all ranks, before the last backward pass, if a loss is NaN or infinite
                    _check_divergence *   raises likewise after many steps with a high loss or gradient norm in a row
            accelerator.backward
        _clip_grad_norm *             first the norm of each group, on steps that are logged
        optimizer.step                parameter groups of create_optimizer *
        lr_scheduler.step             of create_scheduler *, after _get_learning_rate *
        on_step_end                   GracefulStopCallback (callbacks.py)
        _maybe_log_save_evaluate      log *, evaluate *, _save_checkpoint *

To stop at a breakpoint, put `breakpoint()` into `compute_loss`; in several processes `torch.distributed.breakpoint(rank=0)`:

    torchrun --nproc_per_node 2 step5_train_pt_single_gpu.py --max_steps 2
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy
import torch
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, gather_object
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from llmtuner.console import UserError, print0
from llmtuner.data.packing import PackedDataCollator, PadToMultiple
from llmtuner.eval.bits_per_byte import Windows, document_bits
from llmtuner.files import atomic_write_json
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import embedding_parameters
from llmtuner.model.attention import VARLEN, Documents
from llmtuner.train.best_checkpoint import find_best
from llmtuner.train.callbacks import (
    EarlyStopping,
    GracefulStopCallback,
    GracefulStopSignal,
    JsonlLogCallback,
    MfuCallback,
    ProgressBarCallback,
    SaveBeforeDecay,
    ThroughputMeter,
    TimedSave,
    is_training_finished,
    peak_memory_gb,
)
from llmtuner.train.checkpointing import (
    TMP_DIR,
    checkpoint_step,
    cleanup_on_failure,
    commit_checkpoint,
    list_checkpoints,
)
from llmtuner.train.divergence import DivergenceMonitor
from llmtuner.train.flops import Utilization
from llmtuner.train.loss import linear_cross_entropy_sum
from llmtuner.train.muon import MuonAndOther, hidden_matrices
from llmtuner.train.run_status import State, write_run_status
from llmtuner.train.schedule import WSD, constant_steps, scheduler_kwargs
from llmtuner.train.trackers import guard_trackers

MAX_DOCUMENTS_IN_ERROR = 8
START_OVER = "overwrite_output_dir: true; steps: OVERWRITE=1"
LR_GROUPS = ("learning_rate", "loraplus", "embedding_learning_rate")  # in the order of the optimizer's parameter groups


class MicroBatch(NamedTuple):
    """What is remembered of a micro-batch until the end of its step."""

    loss: torch.Tensor
    num_target_tokens: int
    doc_ids: list[numpy.ndarray]
    """Document ids of each sequence."""


class PackedTrainer(Trainer):
    """transformers' Trainer for packed sequences.

    A batch is what `PackedDataCollator` returns. Labels are aligned with `input_ids`; `compute_loss` shifts them. There is
    no attention mask: position ids that restart at 0 separate the documents.

    Args:
        finetuning_args: which parameters are trained, and how.
        collator: makes the batches.
        settings: the run's settings, saved with each checkpoint.
        describe_document: returns file and line of a document id.
        stop_signal: requests a stop.
        windows: language -> this rank's part of the held-out texts, on which bits per byte are logged.
        kwargs: those of `Trainer`.
    """

    model: Any  # a causal language model, or peft's wrapper around one

    def __init__(
        self,
        finetuning_args: FinetuningArguments,
        collator: PackedDataCollator,
        settings: dict[str, Any],
        describe_document: Callable[[int], str],
        stop_signal: GracefulStopSignal,
        windows: dict[str, Windows],
        **kwargs: Any,
    ) -> None:
        super().__init__(data_collator=collator, **kwargs)  # type: ignore[arg-type]  # a PackedBatch is a dict
        self.output_dir = Path(self.args.output_dir or ".")
        self.finetuning_args, self.settings = finetuning_args, settings
        self.describe_document, self.stop_signal = describe_document, stop_signal
        self.windows = windows
        self.eval_subsets: dict[str, Any] = {}  # dataset name -> validation set, whose loss is logged beside eval_loss
        self.attention = self.model.config._attn_implementation or ""
        guard_trackers(self.callback_handler, self.output_dir)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        log = JsonlLogCallback(self.output_dir / "trainer_log.jsonl")
        self.timed_save = TimedSave(self, finetuning_args.save_minutes)
        self.early_stopping = EarlyStopping(finetuning_args)
        for callback in (
            ProgressBarCallback(),
            log,
            MfuCallback(self),
            GracefulStopCallback(self),
            self.timed_save,
            SaveBeforeDecay(self),
            self.early_stopping,
        ):
            self.add_callback(callback)
        # Makes Trainer count the target tokens of the accumulated batch on all ranks, and divide the loss by nothing else.
        self.model_accepts_loss_kwargs = True
        self.meter = ThroughputMeter()
        self.utilization: Utilization | None = None  # known once training begins
        self.micro_batches: list[MicroBatch] = []  # of the current step
        self.should_stop = self.should_save = False
        self.lr_groups: list[str] = []  # the entry of LR_GROUPS of each parameter group, where they differ
        self.embedding_lr: float | None = None  # of the current step
        self.decay_begin: int | None = None  # the step after which the learning rate leaves a constant phase
        self.divergence = DivergenceMonitor(finetuning_args.divergence_factor, finetuning_args.divergence_steps)
        if self.args.train_sampling_strategy == "sequential":  # one data set after another: losses jump between them
            self.divergence.steps = 0
        self.last_grad_norm: torch.Tensor | float = 0.0
        self.last_micro_batches: list[MicroBatch] = []  # of the step before
        self.is_save_postponed = False
        self.group_norms: dict[str, torch.Tensor] = {}  # grad_norm_... of a step that is logged

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Lets batches be copied while the GPU computes, and DDP reduce gradients in place and without a search.

        Trainer has DDP search each step for parameters without gradients, since peft's wrapper is none of its own models. Here
        all that are trained have one, even if a batch has no targets.
        """
        args = super()._build_accelerator_args(**kwargs)
        args["dataloader_config"].non_blocking = True
        # Each weight is used once: a cache would keep the output layer's copy, cast for the call without logits, beside the
        # loss's own.
        args["kwargs_handlers"].append(AutocastKwargs(cache_enabled=False))
        for handler in args["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.find_unused_parameters = bool(self.args.ddp_find_unused_parameters)
                handler.gradient_as_bucket_view = True
        return args

    # ------------------------------------------------------------------------------------------------------------ step
    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Returns the micro-batches of a step and the number of their target tokens; times how long batches took to come."""
        return super().get_batch_samples(self._timed(epoch_iterator), *args, **kwargs)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.meter.data_seconds += time.perf_counter() - start
            yield batch

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Returns autocast to the dtype of the run; `compute_loss_context_manager` enters it, in training and evaluation.

        accelerate's own autocast covers the forward pass of a model that it has prepared: it leaves out the output layer's
        product in the loss, and every evaluation without training.
        """
        return self.accelerator.autocast()

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the cross-entropy in nats, summed over the micro-batch and divided by the target tokens of the batch.

        Set a breakpoint here: every training batch passes through.
        """
        loss_sum, num_target_tokens = self._compute_loss_sum(model, inputs)
        if num_items_in_batch is None:
            loss = loss_sum / max(num_target_tokens, 1)
        else:
            # Gradients are averaged over ranks afterwards; the factor turns the mean into a sum.
            num_targets = torch.as_tensor(num_items_in_batch).clamp(min=1)  # a batch may have none
            loss = loss_sum / num_targets * self.accelerator.num_processes
        self._record_micro_batch(loss, num_target_tokens, inputs)
        if self.accelerator.sync_gradients:
            self._finish_step()
        return (loss, None) if return_outputs else loss

    def _compute_loss_sum(self, model: Any, inputs: dict) -> tuple[torch.Tensor, int]:
        """Returns the cross-entropy summed over the target tokens of a micro-batch, and their number."""
        indices = inputs["loss_indices"]
        targets = inputs["labels"].flatten().index_select(0, indices + 1)
        if self.finetuning_args.chunked_loss:
            # The loss computes logits itself, chunk by chunk and for target tokens only. -1 keeps the last hidden state alone.
            options = {"output_hidden_states": -1, "logits_to_keep": indices.new_zeros(0)}
            outputs = forward_packed(model, self.attention, inputs, **options)
            hidden = outputs.hidden_states[-1].flatten(0, 1).index_select(0, indices)
            del outputs
            loss_sum = linear_cross_entropy_sum(hidden, lm_head_weight(self.model), targets)
        else:
            logits = forward_packed(model, self.attention, inputs).logits.flatten(0, 1).index_select(0, indices)
            loss_sum = cross_entropy(logits.float(), targets, reduction="sum")
        return loss_sum, len(indices)

    def _record_micro_batch(self, loss: torch.Tensor, num_target_tokens: int, inputs: dict) -> None:
        """Counts the tokens of a micro-batch, and remembers it until the end of the step."""
        self.meter.tokens += inputs["input_ids"].numel()
        self.meter.padding += inputs["num_padding"]
        self.micro_batches.append(MicroBatch(loss.detach(), num_target_tokens, inputs["doc_ids"]))

    def _finish_step(self) -> None:
        """All-reduces loss, target tokens, stop and save requests of a step, before the backward pass of its last micro-batch."""
        losses = torch.stack([batch.loss for batch in self.micro_batches])
        # fp16's loss scaling skips steps with infinite gradients by itself.
        not_finite = torch.zeros_like(losses) if self.args.fp16 else (~losses.isfinite()).float()
        count = sum(batch.num_target_tokens for batch in self.micro_batches)
        should_save = self.is_world_process_zero() and self.timed_save.is_due()
        known = losses.new_tensor([count, self.stop_signal.received is not None, should_save])
        norm = torch.as_tensor(self.last_grad_norm, dtype=losses.dtype, device=losses.device)
        sums = torch.cat([losses.sum()[None], not_finite.sum()[None], norm[None], known])
        sums = self.accelerator.reduce(sums, reduction="sum")
        loss, num_not_finite, norm_sum, num_target_tokens, stop_requests, save_requests = sums.tolist()
        self._check_finite(not_finite, num_not_finite)
        loss /= self.accelerator.num_processes
        self._check_divergence(loss, norm_sum / self.accelerator.num_processes)
        self.should_stop, self.should_save = stop_requests > 0, save_requests > 0
        self.meter.loss += loss
        self.meter.target_tokens += int(num_target_tokens)
        self.meter.steps += 1
        self.micro_batches = []

    def _check_finite(self, not_finite: torch.Tensor, num_not_finite: float) -> None:
        """Makes sure that the loss of a step is finite on all ranks.

        Args:
            not_finite: 1 for each micro-batch of this rank whose loss is not, else 0.
            num_not_finite: their number on all ranks.

        Raises:
            UserError: names the documents of the batches whose loss is not finite.
        """
        if not num_not_finite:
            return
        batches = [batch for batch, is_bad in zip(self.micro_batches, not_finite, strict=True) if is_bad]
        documents = format_documents(gather_object(self._describe_documents(batches)))
        self._stop(
            "not finite",
            f"the loss of step {self.state.global_step + 1} is not finite, so this step was not made. Its batch contains: "
            f"{documents}. Check these, or lower learning_rate; the same command resumes from the latest checkpoint.",
        )

    def _check_divergence(self, loss: float, last_grad_norm: float) -> None:
        """Makes sure that loss and gradient norm have not been high for `divergence_steps` steps in a row.

        Args:
            loss: of this step, on all ranks.
            last_grad_norm: of the step before, known only now without making a GPU wait; 0 for none.

        Raises:
            UserError: names what was high, the documents of these steps, and a checkpoint from before.
        """
        monitor, step = self.divergence, self.state.global_step + 1
        norm_is_high = last_grad_norm > 0 and monitor.is_high("grad_norm", last_grad_norm)
        loss_is_high = monitor.is_high("loss", loss)
        if not (loss_is_high or norm_is_high):
            monitor.streak = []
        else:
            steps = [
                *([self.last_micro_batches] if norm_is_high else []),
                *([self.micro_batches] if loss_is_high else []),
            ]
            worst = [max(batches, key=lambda batch: float(batch.loss)) for batches in steps if batches]
            documents = gather_object(self._describe_documents(worst)[:MAX_DOCUMENTS_IN_ERROR])
            name, value = ("loss", loss) if loss_is_high else ("grad_norm", last_grad_norm)
            entry = {"step": step, "name": name, "value": value, "documents": documents[:MAX_DOCUMENTS_IN_ERROR]}
            monitor.streak.append(entry)
        if monitor.has_diverged():
            self._stop("diverged", self._describe_divergence())
        self.last_micro_batches = self.micro_batches

    def _describe_divergence(self) -> str:
        monitor = self.divergence
        first, last = monitor.streak[0]["step"], monitor.streak[-1]
        usual = monitor.limit(last["name"]) / monitor.factor
        documents = dict.fromkeys(document for entry in monitor.streak for document in entry["documents"])
        # The high loss of a step is that of the weights before it, which the checkpoint of the step before holds.
        before = [path for path in list_checkpoints(self.output_dir) if checkpoint_step(path) <= first - 2]
        if before:
            kept = f"{before[0]} is from before: start over ({START_OVER}), or continue from its weights in another "
            kept += f"output_dir (adapter_name_or_path: {before[0]})."
        else:
            kept = f"There is no checkpoint from before: start over ({START_OVER})."
        return (
            f"the run has diverged, so step {last['step']:,} was not made: in {len(monitor.streak)} steps in a row, from "
            f"{first:,}, loss or gradient norm was above {monitor.factor:g} times its running median (divergence_factor). "
            f"The {'loss' if last['name'] == 'loss' else 'gradient norm'} is {last['value']:.4g} instead of about "
            f"{usual:.4g}. These batches contain: {format_documents([*documents])}. Check these documents, or lower "
            f"learning_rate. {kept}"
        )

    def _describe_documents(self, batches: list[MicroBatch]) -> list[str]:
        return [self.describe_document(int(id)) for batch in batches for sequence in batch.doc_ids for id in sequence]

    def _stop(self, state: State, message: str) -> NoReturn:
        """Ends a run that cannot go on, and leaves the reason in output_dir."""
        if self.is_world_process_zero():
            write_run_status(self.output_dir, state, self.state.global_step, self.state.max_steps, message)
        raise UserError(message)

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype of the matrix products of model and loss."""
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return mixed or next(self.model.parameters()).dtype

    def _clip_grad_norm(self, model: Any) -> Any:
        self._record_group_norms()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing is clipped
            self._record_group_norms()
        norm = super()._get_grad_norm(model, grad_norm)
        self.last_grad_norm = 0.0 if norm is None else norm
        return norm

    def _record_group_norms(self) -> None:
        """Computes the gradient norm of the embeddings and of everything else, before clipping, on a step that is logged.

        DeepSpeed has made the step when this is called, and kept no gradients.
        """
        step, args = self.state.global_step + 1, self.args
        is_logged = (step == 1 and args.logging_first_step) or (
            args.logging_strategy == "steps" and step % self.state.logging_steps == 0
        )
        if not is_logged:
            return
        groups: dict[str, list[torch.Tensor]] = {}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                name = "embeddings" if id(parameter) in self.embedding_ids else "layers"
                groups.setdefault(name, []).append(parameter.grad)
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0  # of fp16 gradients, which clipping will divide them by
        self.group_norms = {
            f"grad_norm_{name}": torch.nn.utils.get_total_norm(gradients) / scale for name, gradients in groups.items()
        }

    # ------------------------------------------------------------------------------------------------------- optimizer
    @cached_property
    def embedding_ids(self) -> set[int]:
        """The `id` of every parameter of input and output embeddings."""
        return embedding_parameters(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Adds parameter groups for the embeddings and LoRA's B matrices if they have learning rates of their own, and Muon's."""
        embedding_lr, loraplus_ratio, use_muon = (
            self.finetuning_args.embedding_learning_rate,
            self.finetuning_args.loraplus_lr_ratio,
            self.finetuning_args.use_muon,
        )
        if self.optimizer is None and (embedding_lr, loraplus_ratio, use_muon) != (None, None, False):
            base = self.args.learning_rate
            peaks = dict(zip(LR_GROUPS, (base, base * (loraplus_ratio or 1), embedding_lr), strict=True))
            hidden = set(map(id, hidden_matrices(self.model))) if use_muon else set()
            groups: dict[tuple[bool, str, bool], list[torch.nn.Parameter]] = {}
            decayed = set(self.get_decay_parameter_names(self.model))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    lr_group = self._get_lr_group(name, id(parameter) in self.embedding_ids)
                    groups.setdefault((id(parameter) in hidden, lr_group, name in decayed), []).append(parameter)
            ordered = sorted(groups.items(), key=lambda group: (group[0][0], LR_GROUPS.index(group[0][1])))
            self.lr_groups = [lr_group for (_, lr_group, _), _ in ordered]
            by_optim, by_muon = (
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "lr": peaks[lr_group],
                    }
                    for (is_hidden, lr_group, decay), parameters in ordered
                    if is_hidden is muon
                ]
                for muon in (False, True)
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(by_optim, **options)
            if use_muon:
                self.optimizer = MuonAndOther(self.optimizer, by_muon)
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Lets the last fifth of warm-up, stable, decay be decay unless it is set, and notes where decay begins."""
        args, num_warmup_steps = self.args, self.args.get_warmup_steps(num_training_steps)
        if args.lr_scheduler_type == WSD:
            given: Any = args.lr_scheduler_kwargs or {}
            args.lr_scheduler_kwargs = scheduler_kwargs(WSD, given, num_training_steps)
            self.decay_begin = constant_steps(WSD, given, num_warmup_steps, num_training_steps)[-1]
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_lr_group(self, name: str, is_embedding: bool) -> str:
        """Returns the entry of LR_GROUPS that a parameter belongs to."""
        if is_embedding and self.finetuning_args.embedding_learning_rate is not None:
            return "embedding_learning_rate"
        return "loraplus" if self.finetuning_args.loraplus_lr_ratio and ".lora_B." in name else "learning_rate"

    def _get_learning_rate(self) -> float:
        """Returns the current value of `learning_rate`, and remembers that of the embeddings for the log.

        Trainer's own method returns that of the first parameter group, whichever it is.
        """
        if not self.lr_groups:
            return super()._get_learning_rate()
        optimizer: Any = self.optimizer
        current = {name: float(group["lr"]) for name, group in zip(self.lr_groups, optimizer.param_groups, strict=True)}
        self.embedding_lr = current.get("embedding_learning_rate")
        if "learning_rate" in current:
            return current["learning_rate"]
        # Only embeddings are trained: the value that the schedule would give to other parameters.
        group = optimizer.param_groups[0]
        return self.args.learning_rate * float(group["lr"]) / group["initial_lr"] if group["initial_lr"] else 0.0

    # --------------------------------------------------------------------------------------------------------- logging
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds gradient norms, throughput, padding, memory, MFU and remaining time to a log line with a training loss."""
        if "loss" in logs:
            meter = self.meter
            tokens, padding, data_seconds = self.flush_token_counts()
            # Trainer's own mean would start again after a restart.
            logs["loss"] = meter.loss / max(meter.steps, 1)
            logs |= {name: norm.item() for name, norm in self.group_norms.items()}
            self.group_norms = {}
            if self.embedding_lr is not None:
                logs["embedding_learning_rate"] = self.embedding_lr
            logs["tokens_per_second"] = round(tokens / max(meter.seconds, 1e-9), 1)
            logs["target_tokens_per_second"] = round(meter.target_tokens / max(meter.seconds, 1e-9), 1)
            logs["padding_ratio"] = round(padding / max(tokens, 1), 5)
            logs["data_wait_ratio"] = round(data_seconds / max(meter.seconds * self.args.world_size, 1e-9), 5)
            logs["peak_memory_gb"] = peak_memory_gb()
            if self.utilization:
                in_output_layer = meter.target_tokens if self.finetuning_args.chunked_loss else tokens - padding
                device_seconds = meter.seconds * self.args.world_size
                logs["mfu"] = round(self.utilization.mfu(tokens - padding, in_output_layer, device_seconds), 4)
            steps_left = self.state.max_steps - self.state.global_step
            logs["eta_seconds"] = round(steps_left * meter.seconds / max(meter.steps, 1))
            meter.reset_interval()
        super().log(logs, start_time)

    def flush_token_counts(self) -> tuple[int, int, float]:
        """Adds the counts of the current interval to the totals of the run.

        Returns:
            tokens, padding and seconds spent waiting for batches in the interval, summed over all ranks.
        """
        meter = self.meter
        meter.update_elapsed()
        values = [meter.tokens, meter.padding, meter.data_seconds]
        counts = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        tokens, padding, data_seconds = self.accelerator.reduce(counts, reduction="sum").tolist()
        meter.total_tokens += int(tokens)
        meter.total_padding += int(padding)
        meter.tokens, meter.padding, meter.data_seconds = 0, 0, 0.0
        return int(tokens), int(padding), data_seconds

    # ------------------------------------------------------------------------------------------------------ evaluation
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Logs `eval_loss`, the loss on each dataset's validation set, and bits per byte; Trainer calls it at eval steps."""
        metrics = {f"{metric_key_prefix}_loss": self.evaluate_loss(eval_dataset or self.eval_dataset)}
        for name, subset in self.eval_subsets.items():
            metrics[f"{metric_key_prefix}_{name}_loss"] = self.evaluate_loss(subset)
        for language, windows in self.windows.items():
            metrics[f"{metric_key_prefix}_bits_per_byte_{language}"] = self.evaluate_bpb(windows)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_loss(self, dataset: Any) -> float:
        """Returns the mean loss per target token of a dataset, in nats; the same on every rank."""
        with self.meter.paused():
            model = self._wrap_model(self.model, training=False)
            model.eval()
            totals = torch.zeros(2, dtype=torch.float64)
            padded = PadToMultiple(dataset, self.args.eval_batch_size * self.args.world_size)
            for batch in self.get_eval_dataloader(padded):
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss_sum, num_target_tokens = self._compute_loss_sum(model, self._prepare_inputs(batch))
                totals += torch.tensor([float(loss_sum), num_target_tokens], dtype=torch.float64)
            totals = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").cpu()
        return float(totals[0] / totals[1].clamp(min=1))

    def evaluate_bpb(self, windows: Windows) -> float:
        """Returns the bits per byte of held-out texts that are split among the ranks; the same on every rank."""
        with self.meter.paused():
            self.model.eval()
            with self.compute_loss_context_manager():
                bits = document_bits(self.model, windows, tokens_per_batch=2048)
            sums = torch.tensor([bits.sum(), windows.num_bytes.sum()], dtype=torch.float64, device=self.args.device)
            total, total_bytes = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / max(total_bytes, 1)

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def resume_from_checkpoint(self, checkpoint: Path, num_steps: int) -> None:
        """Continues training from a valid checkpoint as if the run, of `num_steps`, had never stopped."""
        self.meter = ThroughputMeter.load(checkpoint)
        self.divergence.load(checkpoint)
        self.args.eval_on_start = False  # done before the checkpoint
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not is_training_finished(state, num_steps, self.finetuning_args):
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # Trainer would make one more step
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
            self.meter.start_time = time.perf_counter()

    def best_evaluation(self) -> dict[str, Any] | None:
        """Returns the log entry of the best evaluation after a step; None without one, or if no best is asked for."""
        metric, bound = self.early_stopping.metric, self.early_stopping.bound
        best = find_best(self.state.log_history, metric, bound) if metric else None
        return best if best and best["step"] > 0 else None

    def load_weights(self, checkpoint: Path) -> None:
        """Replaces the weights that are trained by those of a checkpoint of this run."""
        if getattr(self.accelerator, "deepspeed_engine_wrapped", None) is None:
            self._load_from_checkpoint(str(checkpoint))
        else:
            is_complete = not isinstance(self.model, PeftModel)
            deepspeed_load_checkpoint(self.model_wrapped, str(checkpoint), load_module_strict=is_complete)

    def trained_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Returns what is trained by DeepSpeed, in fp32 and on the CPU; None if the model itself holds it.

        DeepSpeed trains fp32 weights of which each rank has a part; the model has 16-bit copies. So all ranks must call this,
        and only rank 0 gets the tensors.
        """
        if getattr(self.accelerator, "deepspeed_engine_wrapped", None) is None:
            return None
        from deepspeed.utils import safe_get_full_fp32_param

        trained = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                weight = safe_get_full_fp32_param(parameter)
                if self.is_world_process_zero():
                    trained[name] = (parameter.detach() if weight is None else weight).cpu()
        return trained

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter, or the model if there is none.

        Under DeepSpeed, Trainer would copy the complete model to host memory on every rank, and save 16-bit weights.
        """
        weights = self.trained_state_dict()
        if weights is None:
            super().save_model(output_dir, _internal_call)
        else:
            if not isinstance(self.model, PeftModel):
                tied = {*getattr(self.model, "all_tied_weights_keys", {})}  # they are in `weights` under another name
                weights = {
                    name: weight for name, weight in self.model.state_dict().items() if name not in tied
                } | weights
            self._save(output_dir, weights)

    def _may_be_diverging(self) -> bool:
        """Whether the loss of the step just made, or its gradient norm, is too high for its weights to be kept."""
        return bool(self.divergence.streak) or float(self.last_grad_norm) > self.divergence.limit("grad_norm")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.output_dir / TMP_DIR)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a checkpoint that appears under its name only when it is complete."""
        output_dir, step = self.output_dir, self.state.global_step
        was_postponed, self.is_save_postponed = self.is_save_postponed, False
        if self._may_be_diverging() and not self.control.should_training_stop:
            self.is_save_postponed = True
            if not was_postponed:
                print0(f"step {step:,}: the checkpoint waits until loss and gradient norm are near their medians again")
            return
        self.meter.update_elapsed()
        with self.meter.paused(), cleanup_on_failure(output_dir, step):
            if self.is_world_process_zero():
                shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                partial = output_dir / TMP_DIR / f"checkpoint-{step}"
                atomic_write_json(partial / "training_args.json", self.settings)
                self.meter.save(partial / "throughput.json")
                self.divergence.save(partial)
                best = self.best_evaluation()
                kept = [step for step in (best["step"] if best else None, self.decay_begin) if step is not None]
                commit_checkpoint(output_dir, step, self.args.save_total_limit, kept)
            self.accelerator.wait_for_everyone()


def format_documents(documents: list[str]) -> str:
    """Lists documents for a message, of many the first ones and the number of the others."""
    others = len(documents) - MAX_DOCUMENTS_IN_ERROR
    return "; ".join(documents[:MAX_DOCUMENTS_IN_ERROR]) + (f" and {others} more" if others > 0 else "")


def forward_packed(model: Any, attention: str, inputs: dict, **options: Any) -> Any:
    """Runs the forward pass on a packed batch.

    Args:
        attention: transformers' name of the attention implementation. FlashAttention gets the batch [sequences, tokens]
            as one sequence, and the bounds of documents; it would find them itself, but make the GPU wait in every layer.
        options: further arguments of the model.
    """
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    if attention.startswith("flash"):
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
        bounds, longest = inputs["cu_seqlens"], max(inputs["seq_lens"])
        options |= dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest)
    elif attention == VARLEN:
        options["documents"] = Documents(inputs["seq_lens"], inputs["cu_seqlens"])
    return model(input_ids=ids, position_ids=positions, use_cache=False, **options)


def lm_head_weight(model: Any) -> torch.Tensor:
    """Returns the output layer's weight [vocabulary, hidden] as it is trained: in full, in some rows, or not at all."""
    layer: Any = model.get_output_embeddings()
    if isinstance(layer, TrainableTokensWrapper):
        return layer.token_adapter.get_merged_weights(layer.token_adapter.active_adapters)
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer.weight
