"""One training step: the loss, the parameter groups, what is logged, an eval loss that is exact, whole checkpoints."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

from llmtuner.console import UserError
from llmtuner.data.packing import PackedDataCollator, PadToMultiple
from llmtuner.eval.bits_per_byte import Windows, document_bits
from llmtuner.files import atomic_write_json
from llmtuner.hparams import EMBEDDING_MODULES, FinetuningArguments
from llmtuner.model.attention import VARLEN
from llmtuner.train.callbacks import (
    GracefulStopSignal,
    JsonlLogCallback,
    ProgressBarCallback,
    ThroughputMeter,
    peak_memory_gb,
)
from llmtuner.train.checkpointing import TMP_DIR, cleanup_on_failure, commit_checkpoint
from llmtuner.train.loss import linear_cross_entropy_sum

MAX_DOCUMENTS_IN_ERROR = 8  # in an error about a batch
LR_GROUPS = ("learning_rate", "loraplus", "embedding_learning_rate")  # in the order of the optimizer's parameter groups


class MicroBatch(NamedTuple):
    """What is remembered of a micro-batch until its step is made: loss, trained tokens, documents of each sequence."""

    loss: torch.Tensor
    num_target_tokens: torch.Tensor
    doc_ids: list[numpy.ndarray]


class PackedTrainer(Trainer):
    """transformers' Trainer over packed sequences.

    A batch is what `PackedDataCollator` makes. Labels are aligned with the ids and are shifted in `compute_loss`. There is no
    attention mask: positions that restart at 0 separate the documents.

    Args:
        settings: the settings of the run; they are kept beside each checkpoint.
        describe_document: file and line of a document, by its number in a batch's `doc_ids`.
        stop_signal: asks for an early end.
        windows: this process's part of the held-out texts of each language, on which bits per byte are logged.
    """

    model: Any  # a Glm, or peft's wrapper around one

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
        self.finetuning_args, self.settings, self.describe_document, self.stop_signal = (
            finetuning_args,
            settings,
            describe_document,
            stop_signal,
        )
        self.windows = windows
        self.eval_subsets: dict[
            str, Any
        ] = {}  # of each data set, what is held out; their losses are logged beside eval_loss
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.early_stopping = EarlyStopping(finetuning_args.early_stopping_steps)
        for watcher in (
            ProgressBarCallback(),
            JsonlLogCallback(self.output_dir / "trainer_log.jsonl"),
            GracefulStopCallback(self),
            self.early_stopping,
        ):
            self.add_callback(watcher)
        # Trainer shall count the trained tokens of the whole accumulated batch on all ranks, and divide by nothing else.
        self.model_accepts_loss_kwargs = True
        self.meter = ThroughputMeter()
        self.micro_batches: list[MicroBatch] = []  # of the step at hand
        self.should_stop = False
        self.lr_groups: list[str] = []  # which of LR_GROUPS each parameter group is trained at, where they differ
        self.embedding_lr: float | None = None  # of the current step
        self.hidden: torch.Tensor
        if finetuning_args.chunked_loss:
            causal_lm: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            causal_lm.base_model.register_forward_hook(self._keep_hidden)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy in nats, summed over this micro-batch and divided by the trained tokens of the whole batch.

        Set a breakpoint here: everything that a step learns from passes through.
        """
        summed, trained = self._compute_loss_sum(model, inputs)
        if num_items_in_batch is None:
            loss = summed / trained.clamp(min=1)
        else:
            # Gradients are averaged over ranks afterwards, so each rank's share counts once per rank.
            loss = summed / max(num_items_in_batch, 1) * self.accelerator.num_processes  # 0 of a batch without targets
        self._watch(loss, inputs, trained)
        return (loss, None) if return_outputs else loss

    def _compute_loss_sum(self, model: Any, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy summed over the trained tokens of a micro-batch, and how many they are."""
        trained = inputs["loss_indices"]
        targets = inputs["labels"].flatten().index_select(0, trained + 1)
        attention = getattr(self.model.config, "_attn_implementation", "")
        if self.finetuning_args.chunked_loss:
            # The decoder's output is caught by `_keep_hidden`; logits are formed chunk by chunk, where there is a target.
            none = trained.new_zeros(0)
            run_model(model, attention, inputs, logits_to_keep=none)
            hidden, self.hidden = self.hidden.flatten(0, 1).index_select(0, trained), none
            summed = linear_cross_entropy_sum(hidden, lm_head_weight(self.model), targets)
        else:
            logits = run_model(model, attention, inputs).logits.flatten(0, 1).index_select(0, trained)
            summed = cross_entropy(logits.float(), targets, reduction="sum")
        return summed, trained.new_tensor(len(trained))

    def _keep_hidden(self, _: Any, __: Any, outputs: Any) -> None:
        self.hidden = outputs.last_hidden_state

    def _watch(self, loss: torch.Tensor, inputs: dict, trained: torch.Tensor) -> None:
        """Counts a micro-batch; before the last one of a step is learned from, asks all ranks whether to go on.

        Raises:
            UserError: if a loss is not finite, except under fp16, whose loss scaling copes with that.
        """
        self.meter.tokens += inputs["input_ids"].numel()
        self.meter.padding += inputs["num_padding"]
        self.micro_batches.append(MicroBatch(loss.detach(), trained, inputs["doc_ids"]))
        if not self.accelerator.sync_gradients:
            return
        losses = torch.stack([batch.loss for batch in self.micro_batches])
        counts = torch.stack([batch.num_target_tokens for batch in self.micro_batches])
        bad = torch.zeros_like(losses) if self.args.fp16 else (~losses.isfinite()).float()
        stop = torch.full_like(losses[0], self.stop_signal.received is not None)
        sums = torch.stack([losses.sum(), counts.sum(), bad.sum(), stop])
        step_loss, step_trained, any_bad, any_stop = self.accelerator.reduce(sums, reduction="sum").tolist()
        if any_bad:
            batches = [batch for batch, is_bad in zip(self.micro_batches, bad, strict=True) if is_bad]
            rows = [int(row) for batch in batches for documents in batch.doc_ids for row in documents]
            named = gather_object([self.describe_document(row) for row in rows])
            raise UserError(
                f"the loss of step {self.state.global_step + 1} is not finite; the step was not made. In its batch were: "
                + "; ".join(named[:MAX_DOCUMENTS_IN_ERROR])
                + (f" and {len(named) - MAX_DOCUMENTS_IN_ERROR} more" if len(named) > MAX_DOCUMENTS_IN_ERROR else "")
                + ". Look at these, or lower learning_rate; the same command goes on from the newest checkpoint."
            )
        self.should_stop = any_stop > 0
        self.meter.loss += step_loss / self.accelerator.num_processes
        self.meter.target_tokens += int(step_trained)
        self.meter.steps += 1
        self.micro_batches = []

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, with groups of their own for the embedding matrices and LoRA's B matrices if those have their own
        learning rates."""
        ours = (self.finetuning_args.embedding_learning_rate, self.finetuning_args.loraplus_lr_ratio)
        if self.optimizer is None and ours != (None, None):
            base = self.args.learning_rate
            peaks = dict(zip(LR_GROUPS, (base, base * (ours[1] or 1), ours[0]), strict=True))
            groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
            decayed = set(self.get_decay_parameter_names(self.model))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((self._get_lr_group(name), name in decayed), []).append(parameter)
            ordered = sorted(groups.items(), key=lambda group: LR_GROUPS.index(group[0][0]))
            self.lr_groups = [rate for (rate, _), _ in ordered]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "lr": peaks[rate],
                    }
                    for (rate, decay), parameters in ordered
                ],
                **options,
            )
        return super().create_optimizer(*args, **kwargs)

    def _get_lr_group(self, name: str) -> str:
        """Which of LR_GROUPS a parameter is trained at."""
        is_embedding = any(module in name for module in EMBEDDING_MODULES)
        if is_embedding and self.finetuning_args.embedding_learning_rate is not None:
            return "embedding_learning_rate"
        return "loraplus" if self.finetuning_args.loraplus_lr_ratio and ".lora_B." in name else "learning_rate"

    def _get_learning_rate(self) -> float:
        """The current value of `learning_rate`, which Trainer asks for before each update; notes the embeddings' beside it.

        Trainer's own is that of the first parameter group, whichever that is.
        """
        if not self.lr_groups:
            return super()._get_learning_rate()
        optimizer: Any = self.optimizer
        now = {name: float(group["lr"]) for name, group in zip(self.lr_groups, optimizer.param_groups, strict=True)}
        self.embedding_lr = now.get("embedding_learning_rate")
        if "learning_rate" in now:
            return now["learning_rate"]
        # Only embeddings are trained: what the schedule makes of learning_rate, as it would apply to other parameters.
        group = optimizer.param_groups[0]
        return self.args.learning_rate * float(group["lr"]) / group["initial_lr"] if group["initial_lr"] else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the meter counted since the last line to a line with a loss."""
        if "loss" in logs:
            meter = self.meter
            tokens, padding = self.flush_token_counts()
            # Trainer's own mean would begin anew after a restart.
            logs["loss"] = meter.loss / max(meter.steps, 1)
            if self.embedding_lr is not None:
                logs["embedding_learning_rate"] = self.embedding_lr
            logs["tokens_per_second"] = round(tokens / max(meter.seconds, 1e-9), 1)
            logs["target_tokens_per_second"] = round(meter.target_tokens / max(meter.seconds, 1e-9), 1)
            logs["padding_ratio"] = round(padding / max(tokens, 1), 5)
            logs["peak_memory_gb"] = peak_memory_gb()
            steps_left = self.state.max_steps - self.state.global_step
            logs["eta_seconds"] = round(steps_left * meter.seconds / max(meter.steps, 1))
            meter.reset_interval()
        super().log(logs, start_time)

    def flush_token_counts(self) -> tuple[int, int]:
        """Adds what was counted since the last line to the whole run; tokens and padding of all processes since then."""
        meter = self.meter
        meter.update_elapsed()
        counts = torch.tensor([meter.tokens, meter.padding], dtype=torch.float64, device=self.args.device)
        tokens, padding = (int(count) for count in self.accelerator.reduce(counts, reduction="sum").tolist())
        meter.total_tokens += tokens
        meter.total_padding += padding
        meter.tokens = meter.padding = 0
        return tokens, padding

    def evaluate_loss(self, dataset: Any) -> float:
        """Mean loss per trained token over a data set, in nats; the same on every rank."""
        with self.meter.paused():
            model = self._wrap_model(self.model, training=False)
            model.eval()
            totals = torch.zeros(2, dtype=torch.float64)
            for batch in self.get_eval_dataloader(
                PadToMultiple(dataset, self.args.eval_batch_size * self.args.world_size)
            ):
                with torch.no_grad(), self.compute_loss_context_manager():
                    summed, trained = self._compute_loss_sum(model, self._prepare_inputs(batch))
                totals += torch.stack([summed.double().cpu(), trained.double().cpu()])
            totals = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").cpu()
        return float(totals[0] / totals[1].clamp(min=1))

    def evaluate_bpb(self, windows: Windows) -> float:
        """Bits per byte over the held-out texts that the processes have split among them; the same on every rank."""
        with self.meter.paused():
            self.model.eval()
            with self.compute_loss_context_manager():
                bits = document_bits(self.model, windows, tokens_per_batch=2048)
            sums = torch.tensor([bits.sum(), windows.num_bytes.sum()], dtype=torch.float64, device=self.args.device)
            total, total_bytes = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / max(total_bytes, 1)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Logs `eval_loss` over all trained tokens, and bits per byte; called by Trainer at the eval steps."""
        metrics = {f"{metric_key_prefix}_loss": self.evaluate_loss(eval_dataset or self.eval_dataset)}
        for name, part in self.eval_subsets.items():
            metrics[f"{metric_key_prefix}_{name}_loss"] = self.evaluate_loss(part)
        for language, windows in self.windows.items():
            metrics[f"{metric_key_prefix}_bits_per_byte_{language}"] = self.evaluate_bpb(windows)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def resume_from_checkpoint(self, checkpoint: Path) -> None:
        """Trains on from a whole checkpoint as if it had never stopped."""
        self.meter = ThroughputMeter(**json.loads((checkpoint / "throughput.json").read_text(encoding="utf-8")))
        self.args.eval_on_start = False  # it was done
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not is_training_finished(state, self.finetuning_args.early_stopping_steps):
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # Trainer would make one step more
            self._load_from_checkpoint(str(checkpoint))
            self.state = state
            self.meter.start_time = time.perf_counter()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.output_dir / TMP_DIR)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, but the checkpoint appears under its name only when all of it is there."""
        output_dir, step = self.output_dir, self.state.global_step
        self.meter.update_elapsed()
        with self.meter.paused(), cleanup_on_failure(output_dir, step):
            if self.is_world_process_zero():
                shutil.rmtree(output_dir / TMP_DIR, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                staged = output_dir / TMP_DIR / f"checkpoint-{step}"
                atomic_write_json(staged / "training_args.json", self.settings)
                atomic_write_json(
                    staged / "throughput.json", {k: v for k, v in asdict(self.meter).items() if k != "start_time"}
                )
                commit_checkpoint(output_dir, step, self.args.save_total_limit)
            self.accelerator.wait_for_everyone()


class GracefulStopCallback(TrainerCallback):
    """Starts the clock, and ends training after a step, with a checkpoint, once a stop was asked for."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.meter.start_time = time.perf_counter()
        # On resume Trainer takes these intervals from the checkpoint.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.should_stop:
            control.should_save = control.should_training_stop = True


class EarlyStopping(TrainerCallback):
    """Ends training, with a checkpoint, once `eval_loss` has not improved for `patience` evaluations.

    It counts in the log, which a checkpoint holds, so that patience is the same after a restart.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.is_due(state.log_history):
            control.should_save = control.should_training_stop = True

    def is_due(self, history: list[dict[str, Any]]) -> bool:
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
        best = min(range(len(losses)), key=lambda place: losses[place], default=0)
        return self.patience is not None and len(losses) - 1 - best >= self.patience


def is_training_finished(state: TrainerState, patience: int | None) -> bool:
    """Whether a run has nothing left to train: all its steps are made, or it has stopped early."""
    return state.global_step >= state.max_steps or EarlyStopping(patience).is_due(state.log_history)


class TrainBeginCallback(TrainerCallback):
    """Does on rank 0 what waits until settings, data and model have been checked: an earlier run is deleted only then."""

    def __init__(self, *actions: Callable[[], None]) -> None:
        self.actions = actions

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for action in self.actions if state.is_world_process_zero else ():
            action()


class InitialLossCallback(TrainerCallback):
    """Logs the loss of each data set before the first step, once the model has been prepared for its devices."""

    def __init__(self, trainer: PackedTrainer, samples: dict[str, Any]) -> None:
        self.trainer, self.samples = trainer, samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0 and self.samples:
            self.trainer.log(
                {
                    f"initial_loss/{name}": round(self.trainer.evaluate_loss(one), 4)
                    for name, one in self.samples.items()
                }
            )


def run_model(model: Any, attention: str, inputs: dict, **options: Any) -> Any:
    """A forward pass over a packed batch.

    Args:
        attention: transformers' name of the kernel; flash attention gets the batch [sequences, tokens] as one row.
    """
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    if attention.startswith("flash"):
        # Flash attention reads packed documents off the positions of one row only.
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    if attention == VARLEN:
        options["seq_lens"] = inputs["seq_lens"]
    return model(input_ids=ids, position_ids=positions, use_cache=False, **options)


def lm_head_weight(model: Any) -> torch.Tensor:
    """The matrix [vocabulary, width] that makes logits, as it is trained: whole, in some rows, or not at all."""
    layer: Any = model.get_output_embeddings()
    if isinstance(layer, TrainableTokensWrapper):
        return layer.token_adapter.get_merged_weights(layer.token_adapter.active_adapters)
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    return layer.weight
