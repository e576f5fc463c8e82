"""Runs the two stages, continued pretraining and supervised fine-tuning: data, model, training, adapter, metrics."""

import math
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import DeepSpeedPlugin, broadcast_object_list, gather_object
from torch.utils.data import Dataset, Subset
from transformers import TrainingArguments, set_seed
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from llmtuner.console import TrainingInterrupted, UserError, is_rank_zero, print0
from llmtuner.data.loader import DatasetModule, format_mixture, get_dataset, mixture_stats
from llmtuner.data.packing import ConcatTokenDataset, PackedDataCollator, PackedDataset, PadToMultiple
from llmtuner.eval.bits_per_byte import Windows
from llmtuner.files import atomic_write_json, checksum
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, TrainArgs, serialize_settings
from llmtuner.model.adapters import init_adapter, save_adapter
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.loading import check_vocab_and_context, default_attention, load_model
from llmtuner.model.model_dir import adapter_checksum
from llmtuner.report.environment import device_name
from llmtuner.report.figures import plot_losses
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.train.best_checkpoint import best_metric, retention_loss
from llmtuner.train.callbacks import (
    GracefulStopSignal,
    InitialLossCallback,
    RunStatusCallback,
    TrainBeginCallback,
    peak_memory_gb,
)
from llmtuner.train.checkpointing import (
    check_shared,
    checkpoint_step,
    delete_superseded,
    prepare_output_dir,
    verify_checkpoint,
)
from llmtuner.train.memory import MemoryEstimate, StepEstimator, compute_dtype
from llmtuner.train.resume import find_resume_checkpoint, resume_hint
from llmtuner.train.samples import SampleCallback, read_samples
from llmtuner.train.self_check import SelfCheckCallback
from llmtuner.train.step_settings import MEMORY_FRACTION, StepSettings, choose_step_settings, free_memory
from llmtuner.train.trainer import PackedTrainer

INITIAL_LOSS_SAMPLES = 8  # per dataset; more would cost time and change little
BeforeTraining = Callable[[], None] | None


def run_pt(
    args: TrainArgs, texts: dict[str, list[str]] | None = None, before_training: BeforeTraining = None
) -> dict[str, Any]:
    """Runs continued pretraining on packed documents; arguments and result as of `run_exp`."""
    tokenizer, dataset, stats = load_data(args, "pt")
    print0(f"{len(dataset.train):,} sequences of up to {args.data.cutoff_len:,} tokens; no tokens dropped")
    return {**_train(args, tokenizer, dataset, texts or {}, before_training), "data": stats}


def run_sft(args: TrainArgs, before_training: BeforeTraining = None) -> dict[str, Any]:
    """Runs supervised fine-tuning on packed dialogues; arguments and result as of `run_exp`."""
    tokenizer, dataset, stats = load_data(args, "sft")
    truncated, dropped = dataset.train.pack_index.num_truncated, dataset.train.pack_index.num_dropped
    kept = "last answer and as many turns before it as fit" if args.data.mask_history else "beginning"
    print0(
        f"{len(dataset.train):,} sequences of up to {args.data.cutoff_len:,} tokens; {truncated:,} longer dialogues keep "
        f"their {kept}; {dropped:,} of them are dropped because no target token is left"
    )
    metrics = _train(args, tokenizer, dataset, {}, before_training)
    return {**metrics, "data": stats, "num_truncated": truncated, "num_dropped": dropped}


def load_data(args: TrainArgs, stage: str) -> tuple[Any, DatasetModule, dict[str, dict[str, Any]]]:
    """Loads the tokenizer and the packed datasets, and prints the mixture; returns its statistics too."""
    tokenizer = load_tokenizer(args.model.model_name_or_path)
    check_vocab_and_context(args.model.model_name_or_path, tokenizer, args.data.cutoff_len)
    dataset = get_dataset(stage, args.data, args.training.seed, tokenizer)
    stats = mixture_stats(dataset.train, args.data)
    print0(format_mixture(stats, args.data))
    return tokenizer, dataset, stats


def _train(
    args: TrainArgs,
    tokenizer: Any,
    dataset: DatasetModule,
    texts: dict[str, list[str]],
    before_training: BeforeTraining,
) -> dict[str, Any]:
    """Trains, or only evaluates if do_train is false; saves the adapter and returns the metrics."""
    output_dir, overwrite = Path(args.training.output_dir or "."), args.finetuning.overwrite_output_dir
    settings = run_fingerprint(args, dataset.train)
    num_steps = planned_steps(args.training, dataset.train)
    checkpoint = find_resume_checkpoint(args, settings, num_steps)
    if args.training.world_size > 1 and (checkpoint or args.training.save_strategy != "no"):
        check_shared(output_dir, checkpoint)
    if args.training.save_only_model and args.training.save_strategy != "no":
        print0("save_only_model: true: checkpoints hold weights only; a run that stops early cannot be resumed")
    model, _ = prepare_model(args)
    settings |= serialize_settings(args)  # with what was decided just now
    if args.training.do_train and args.data.disable_shuffling:
        args.training.train_sampling_strategy = "sequential"
    with GracefulStopSignal() as stop:
        trainer = build_trainer(args, model, tokenizer, dataset, settings, texts, stop)
        self_check = SelfCheckCallback(trainer, tokenizer, args.data.packing and args.data.neat_packing)
        if not args.training.do_train:
            self_check.run()
            return {name: loss for name, loss in trainer.evaluate().items() if name.endswith("_loss")}
        on_train_begin = TrainBeginCallback(
            *([before_training] if before_training else []),
            partial(prepare_output_dir, output_dir, overwrite and checkpoint is None),
            *([partial(delete_superseded, output_dir, checkpoint_step(checkpoint), settings)] if checkpoint else []),
            partial(_collect_invalid_rows, dataset.train.token_dataset, output_dir),
        )
        samples = {name: even_subset(part, INITIAL_LOSS_SAMPLES) for name, part in dataset.per_dataset.items()}
        for callback in (self_check, on_train_begin, RunStatusCallback(trainer), InitialLossCallback(trainer, samples)):
            trainer.add_callback(callback)
        if args.finetuning.sample_steps:
            trainer.add_callback(SampleCallback(trainer, tokenizer, args))
        if checkpoint:
            trainer.resume_from_checkpoint(checkpoint, num_steps)
        else:
            trainer.train()
        trainer.flush_token_counts()
    step, max_steps = trainer.state.global_step, trainer.state.max_steps
    if trainer.should_stop and step < max_steps:
        raise TrainingInterrupted(
            f"stopped after step {step:,} of {max_steps:,}, with {output_dir}/checkpoint-{step}. {resume_hint(args)}",
            stop.received,
        )
    if step < max_steps and (patience := args.finetuning.early_stopping_steps):
        watched = best_metric(args.finetuning) or "eval_loss"
        print0(f"finished early, after step {step:,}: {watched} has not improved for {patience} evaluations")
    best = _load_best(trainer, metric) if (metric := best_metric(args.finetuning)) else None
    trained = trainer.trained_state_dict()
    if is_rank_zero():
        base = Path(args.model.model_name_or_path)
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), output_dir, base, trained)
        atomic_write_json(output_dir / "training_args.json", settings)
        if args.finetuning.plot_loss:
            plot_losses(trainer.state.log_history, output_dir)
    metrics = {**_collect_metrics(args, trainer, dataset), **({"best": best} if best else {})}
    if args.finetuning.sample_steps:
        metrics["samples"] = read_samples(output_dir)
    trainer.accelerator.free_memory()  # DeepSpeed's hooks would keep the model in memory
    return metrics


def prepare_model(args: TrainArgs) -> tuple[torch.nn.Module, MemoryEstimate | None]:
    """Loads the model, adds the adapter, and decides on micro-batch and gradient checkpointing.

    Returns:
        the model, and what a step needs of a GPU's memory, if that could be estimated.
    """
    set_seed(args.training.seed)  # before the adapter draws its first weights
    path, finetuning = args.model.model_name_or_path, args.finetuning
    dtype = torch.float32 if finetuning.finetuning_type == "full" else compute_dtype(args.training)
    attention = ATTN_IMPLEMENTATIONS[args.model.flash_attn] or default_attention(path)
    base = load_model(path, dtype, attention, args.training.device)
    base.config.use_cache = False
    adapter = Path(args.model.adapter_name_or_path) if args.model.adapter_name_or_path else None
    model = init_adapter(base, finetuning, adapter, args.model.create_new_adapter)
    if finetuning.fused_ops:
        apply_fused_ops(model)
    estimate = fit_into_memory(model, args) if args.training.do_train else None
    args.training.auto_find_batch_size = False  # Trainer would shrink the global batch once memory has run out
    total = sum(parameter.numel() for parameter in model.parameters())
    print0(f"training {count_trainable(model):,} parameters of {total:,}")
    return model, estimate


def count_trainable(model: torch.nn.Module) -> int:
    """Counts the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def build_trainer(
    args: TrainArgs,
    model: torch.nn.Module,
    tokenizer: Any,
    dataset: DatasetModule,
    settings: dict[str, Any],
    texts: dict[str, list[str]],
    stop: GracefulStopSignal,
) -> PackedTrainer:
    rank, world_size, max_samples = args.training.process_index, args.training.world_size, args.data.max_eval_samples
    windows = {
        language: Windows.from_texts(tokenizer, documents[rank::world_size], args.data.cutoff_len)
        for language, documents in texts.items()
    }
    trainer = PackedTrainer(
        args.finetuning,
        PackedDataCollator(tokenizer.pad_token_id or 0),  # without one any id will do: no token attends to padding
        settings,
        dataset.train.token_dataset.describe_document,
        stop,
        windows,
        model=model,
        args=args.training,
        train_dataset=PadToMultiple(dataset.train, global_batch_size(args.training)),
        eval_dataset=even_subset(dataset.eval, max_samples) if len(dataset.eval) else None,
    )
    if args.data.eval_on_each_dataset:
        for index, source in enumerate(dataset.train.token_dataset.datasets):
            if len(part := dataset.eval.select_dataset(index)):
                trainer.eval_subsets[source.name] = even_subset(part, max_samples)
    return trainer


def _load_best(trainer: PackedTrainer, metric: str) -> dict[str, Any] | None:
    """Says which evaluation was the best and, with `load_best_model_at_end`, goes back to its weights.

    Returns:
        metric, step and value; None if no evaluation kept to `max_retention_loss`.
    """
    args = trainer.finetuning_args
    best, last_step = trainer.best_evaluation(), trainer.state.global_step
    if best is None:
        evaluations = [entry for entry in trainer.state.log_history if metric in entry]
        losses = [retention_loss(entry, evaluations[0], metric) for entry in evaluations[1:]]
        print0(
            f"warning: no checkpoint is better than the model before training by {metric}"
            + (
                f" within max_retention_loss {args.max_retention_loss:.1%}"
                if args.max_retention_loss is not None
                else ""
            )
            + (f"; the smallest loss of the others was {min(losses):.1%}" if losses else "")
            + ". The last weights are saved"
        )
        return None
    step, value = best["step"], best[metric]
    checkpoint = trainer.output_dir / f"checkpoint-{step}"
    print0(f"best checkpoint: step {step:,} of {last_step:,}, {metric} {value:.4f}")
    if args.load_best_model_at_end and step != last_step:
        damage: list[str] = [verify_checkpoint(checkpoint) if is_rank_zero() else ""]
        if trainer.args.world_size > 1:
            broadcast_object_list(damage)
        if damage[0]:
            print0(f"warning: {checkpoint} cannot be loaded ({damage[0]}): the weights of step {last_step:,} are saved")
            return None
        trainer.load_weights(checkpoint)
        print0(f"the weights of step {step:,} are saved")
    return {"metric": metric, "step": step, "value": value}


def _collect_metrics(args: TrainArgs, trainer: PackedTrainer, dataset: DatasetModule) -> dict[str, Any]:
    """Returns what `run_exp` documents."""
    training_args, price = args.training, args.finetuning.price_per_hour
    history, meter, prefix = trainer.state.log_history, trainer.meter, "initial_loss/"
    initial = {
        name.removeprefix(prefix): loss for entry in history for name, loss in entry.items() if name.startswith(prefix)
    }
    steps_per_epoch = -(-len(dataset.train) // global_batch_size(training_args))
    return {
        "steps": trainer.state.global_step,
        "cut_short": 0 < training_args.max_steps < training_args.num_train_epochs * steps_per_epoch,
        "tokens": meter.total_tokens,
        "tokens_per_second": round(meter.total_tokens / max(meter.total_seconds, 1e-9), 1),
        "padding_ratio": round(meter.total_padding / max(meter.total_tokens, 1), 5),
        **({"mfu": mfu} if (mfu := _mean_mfu(history)) else {}),
        "wall_seconds": round(meter.wall_seconds, 1),
        "processes": training_args.world_size,
        "device": device_name(),
        "peak_memory_gb": peak_memory_gb(),
        **({"price_per_hour": price} if price is not None else {}),
        "lengths": length_histogram(dataset.train),
        "trainable_parameters": count_trainable(trainer.model),
        "train_loss": _first_and_last(history, "loss"),
        "eval_loss": _first_and_last(history, "eval_loss"),
        **({"initial_loss": initial} if dataset.per_dataset else {}),
    }


def _mean_mfu(history: list[dict[str, Any]]) -> float | None:
    """Returns the mean over all steps of a run's log, of which a line covers the steps since the one before it."""
    lines = [entry for entry in history if "mfu" in entry]
    steps = numpy.diff([0, *(entry["step"] for entry in lines)])
    return round(float(numpy.average([entry["mfu"] for entry in lines], weights=steps)), 4) if lines else None


def _first_and_last(history: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    values = [round(entry[name], 4) for entry in history if name in entry]
    return {"first": values[0] if values else None, "last": values[-1] if values else None}


def fit_into_memory(model: torch.nn.Module, args: TrainArgs) -> MemoryEstimate | None:
    """Sets micro-batch and gradient checkpointing to what fits into GPU memory, as far as the settings leave them open.

    All processes decide alike, by the GPU with the least free memory.

    Raises:
        UserError: if nothing fits; it names settings that would.
    """
    training, free = args.training, free_memory()
    if free is None:
        return None
    if training.world_size > 1:
        gather_object([free])  # the first communication: from here on NCCL's own buffers count as used
        free = min(gather_object([free_memory()]))
    available = free + sum(parameter.nbytes for parameter in model.parameters() if parameter.is_cuda)
    try:
        settings, estimate = choose_step_settings(StepEstimator(model, args, training.world_size), available)
    except UserError:
        raise
    except Exception as error:  # fake tensors cannot follow what depends on values, as some other model families do
        print0(f"the memory of a step cannot be estimated for this model ({type(error).__name__}: {error})")
        recompute = args.model.disable_gradient_checkpointing is None or bool(training.gradient_checkpointing)
        batch_size, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
        _apply_step_settings(training, StepSettings(batch_size, accumulation, recompute))
        return None
    print0(f"estimated step memory: {estimate} of {available / 1e9:.1f} GB: {settings}")
    if estimate.total > MEMORY_FRACTION * available:
        print0(
            "warning: little of the GPU's memory is left; if it runs out, set a smaller per_device_train_batch_size, or "
            "optim: adamw_8bit"
        )
    _apply_step_settings(training, settings)
    return estimate


def _apply_step_settings(training: TrainingArguments, settings: StepSettings) -> None:
    changes = settings.changes(training)
    for name, value in changes.items():
        setattr(training, name, value)
    training.activation_checkpointing = training.gradient_checkpointing
    if training.deepspeed and "per_device_train_batch_size" in changes:
        # "auto" was replaced when the arguments were made.
        config = training.hf_deepspeed_config = HfTrainerDeepSpeedConfig(training.deepspeed)
        config.trainer_config_process(training)
        training.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=config)


def length_histogram(train: PackedDataset) -> dict[str, list[int]]:
    """Counts the documents of a run by length: `counts[i]` of them have edges[i] <= tokens < edges[i + 1]."""
    lengths = train.token_dataset.lengths[numpy.unique(train.pack_index.doc_ids)]
    counts = numpy.bincount(numpy.log2(numpy.maximum(lengths, 1)).astype(int))
    first = int(numpy.flatnonzero(counts)[0])
    return {"edges": [2**power for power in range(first, len(counts) + 1)], "counts": counts[first:].tolist()}


def run_fingerprint(args: TrainArgs, train: PackedDataset) -> dict[str, Any]:
    """Returns what determines the result of a run: settings, number of processes, data, and the weights it starts from."""
    data = {
        f"data set {dataset.name}": (
            f"{len(dataset):,} rows, checksum {zlib.crc32(dataset.store.column('hash').tobytes()):08x}"
        )
        for dataset in train.token_dataset.datasets
    }
    if args.model.create_new_adapter and (earlier := args.model.adapter_name_or_path):
        data["merged adapter"] = f"sha256 {adapter_checksum(Path(earlier))[:8]}"
    model = {"model checksum": checksum(Path(args.model.model_name_or_path))}
    return {**serialize_settings(args), "processes": args.training.world_size, **data, **model}


def planned_steps(training: TrainingArguments, train: PackedDataset) -> int:
    """Returns the number of steps of a whole run."""
    per_epoch = -(-len(train) // global_batch_size(training))
    return training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)


def _collect_invalid_rows(token_dataset: ConcatTokenDataset, output_dir: Path) -> None:
    """Writes the invalid rows of all datasets, by file and line, into output_dir/invalid_rows.jsonl."""
    with (output_dir / "invalid_rows.jsonl").open("wb") as collected:
        for dataset in token_dataset.datasets:
            with (dataset.directory / "invalid_rows.jsonl").open("rb") as rows:
                shutil.copyfileobj(rows, collected)


def global_batch_size(training_args: TrainingArguments) -> int:
    """Returns the number of sequences of a step, over gradient accumulation and all processes."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


def even_subset(dataset: Any, count: int) -> Dataset:
    """Samples a packed dataset at even intervals: neighbouring bins are of similar length."""
    size = len(dataset)
    return Subset(dataset, [index * size // count for index in range(count)]) if size > count else dataset
