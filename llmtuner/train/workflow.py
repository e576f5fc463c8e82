"""The two stages, each read from top to bottom: data, model, training, adapter, figures."""

import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset
from transformers import TrainerState, TrainingArguments, set_seed

from llmtuner.console import TrainingInterrupted, UserError, is_rank_zero, print0
from llmtuner.data.loader import format_mixture, get_dataset, mixture_stats
from llmtuner.data.packing import ConcatTokenDataset, PackedDataCollator, PackedDataset, PadToMultiple
from llmtuner.eval.bits_per_byte import Windows
from llmtuner.files import atomic_write_json, checksum
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, DataArguments, FinetuningArguments, TrainArgs, serialize_settings
from llmtuner.model.adapters import init_adapter, save_adapter
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.loading import check_vocab_and_context, default_attention, load_model
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train.callbacks import GracefulStopSignal
from llmtuner.train.checkpointing import (
    check_resumable,
    check_resume_settings,
    latest_valid_checkpoint,
    prepare_output_dir,
    verify_checkpoint,
)
from llmtuner.train.memory import MEMORY_FRACTION, estimate_step_memory, free_memory
from llmtuner.train.self_check import SelfCheckCallback
from llmtuner.train.trainer import InitialLossCallback, PackedTrainer, TrainBeginCallback, is_training_finished
from llmtuner.weights.merge_lora import adapter_checksum

WEIGHTS_ONLY_HINT = "save_only_model: true: it holds weights only, and the run cannot be resumed from it."
INITIAL_LOSS_SAMPLES = 8  # per data set; more would cost time and change little


BeforeTraining = Callable[[], None] | None


def run_pt(
    args: TrainArgs, texts: dict[str, list[str]] | None = None, before_training: BeforeTraining = None
) -> dict[str, Any]:
    """Continued pretraining on packed documents; returns what was measured, at every evaluation also on held-out texts."""
    model_args, data_args, training_args = args.model, args.data, args.training
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    check_vocab_and_context(model_args.model_name_or_path, tokenizer, data_args.cutoff_len)
    train, held_out, _ = get_dataset("pt", data_args, training_args.seed, tokenizer)
    stats = mixture_stats(train, data_args)
    print0(format_mixture(stats, data_args))
    print0(f"{len(train):,} sequences of up to {data_args.cutoff_len:,} tokens; no tokens dropped")
    metrics = _train(args, tokenizer, train, held_out, texts=texts, before_training=before_training)
    return {**metrics, "data": stats}


def run_sft(args: TrainArgs, before_training: BeforeTraining = None) -> dict[str, Any]:
    """Instruction tuning on packed dialogues; returns what was measured, each data set's initial loss included."""
    model_args, data_args, training_args = args.model, args.data, args.training
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    check_vocab_and_context(model_args.model_name_or_path, tokenizer, data_args.cutoff_len)
    train, held_out, per_dataset_samples = get_dataset("sft", data_args, training_args.seed, tokenizer)
    stats = mixture_stats(train, data_args)
    print0(format_mixture(stats, data_args))
    cut, dropped = train.pack_index.num_truncated, train.pack_index.num_dropped
    kept = "last answer and as many turns before it as fit" if data_args.mask_history else "beginning"
    print0(
        f"{len(train):,} sequences of up to {data_args.cutoff_len:,} tokens; {cut:,} longer dialogues keep their {kept}; "
        f"{dropped:,} of them are dropped because no target token is left"
    )
    metrics = _train(args, tokenizer, train, held_out, per_dataset_samples, before_training=before_training)
    return {**metrics, "data": stats, "num_truncated": cut, "num_dropped": dropped}


def _train(
    args: TrainArgs,
    tokenizer: Any,
    train: PackedDataset,
    held_out: PackedDataset,
    per_dataset_samples: dict[str, Any] | None = None,
    texts: dict[str, list[str]] | None = None,
    before_training: BeforeTraining = None,
) -> dict[str, Any]:
    model_args, data_args = args.model, args.data
    training_args, finetuning_args = args.training, args.finetuning
    output_dir = Path(training_args.output_dir or ".")
    settings = run_fingerprint(args, train)
    checkpoint = find_resume_checkpoint(output_dir, training_args, finetuning_args.overwrite_output_dir, settings)
    if training_args.save_only_model and training_args.save_strategy != "no":
        print0("save_only_model: true: checkpoints hold weights only; a run that stops early cannot be resumed")

    set_seed(training_args.seed)  # before the adapter draws its first weights
    whole = finetuning_args.finetuning_type == "full"
    dtype = torch.float32 if whole else compute_dtype(training_args)
    attention = ATTN_IMPLEMENTATIONS[model_args.flash_attn] or default_attention(model_args.model_name_or_path)
    model = load_model(model_args.model_name_or_path, dtype, attention)
    model.config.use_cache = False
    adapter = Path(model_args.adapter_name_or_path) if model_args.adapter_name_or_path else None
    trained = init_adapter(model, finetuning_args, adapter, model_args.create_new_adapter)
    if finetuning_args.fused_ops:
        apply_fused_ops(trained)
    if model_args.disable_gradient_checkpointing is None and needs_gradient_checkpointing(
        trained, data_args, training_args
    ):
        training_args.gradient_checkpointing = training_args.activation_checkpointing = True
    settings |= serialize_settings(args)  # with what was decided just now
    trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    print0(f"training {trainable:,} parameters of {sum(p.numel() for p in trained.parameters()):,}")

    windows = {
        language: Windows.from_texts(
            tokenizer, own[training_args.process_index :: training_args.world_size], data_args.cutoff_len
        )
        for language, own in (texts or {}).items()
    }
    if training_args.do_train and data_args.disable_shuffling:
        training_args.train_sampling_strategy = "sequential"
    with GracefulStopSignal() as stop:
        trainer = PackedTrainer(
            finetuning_args,
            PackedDataCollator(tokenizer.pad_token_id),
            settings,
            train.token_dataset.describe_document,
            stop,
            windows,
            model=trained,
            args=training_args,
            train_dataset=PadToMultiple(train, global_batch_size(training_args)),
            eval_dataset=even_subset(held_out, data_args.max_eval_samples) if len(held_out) else None,
        )
        if data_args.eval_on_each_dataset:
            parts = {one.name: held_out.select_dataset(place) for place, one in enumerate(train.token_dataset.datasets)}
            trainer.eval_subsets = {
                name: even_subset(part, data_args.max_eval_samples) for name, part in parts.items() if len(part)
            }
        check = SelfCheckCallback(trainer, tokenizer, packed=data_args.packing and data_args.neat_packing)
        if not training_args.do_train:
            check.run()
            losses = trainer.evaluate()
            return {name: loss for name, loss in losses.items() if name.endswith("_loss")}
        small = {name: even_subset(one, INITIAL_LOSS_SAMPLES) for name, one in (per_dataset_samples or {}).items()}
        begin = TrainBeginCallback(
            *([before_training] if before_training else []),
            partial(prepare_output_dir, output_dir, finetuning_args.overwrite_output_dir and checkpoint is None),
            partial(_collect_invalid_rows, train.token_dataset, output_dir),
        )
        for callback in (check, begin, InitialLossCallback(trainer, small)):
            trainer.add_callback(callback)
        if checkpoint:
            trainer.resume_from_checkpoint(checkpoint)
        else:
            trainer.train()
        trainer.flush_token_counts()
        step = trainer.state.global_step
        if trainer.should_stop and step < trainer.state.max_steps:
            raise TrainingInterrupted(
                f"stopped after step {step:,} of {trainer.state.max_steps:,}, with {output_dir}/checkpoint-{step}. "
                + _resume_hint(training_args, finetuning_args),
                stop.received,
            )
        if step < trainer.state.max_steps and (patience := finetuning_args.early_stopping_steps):
            print0(f"finished early, after step {step:,}: eval_loss has not improved for {patience} evaluations")
    if is_rank_zero():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), output_dir, Path(model_args.model_name_or_path))
        atomic_write_json(output_dir / "training_args.json", settings)
        if finetuning_args.plot_loss:
            from llmtuner.report.figures import plot_losses

            plot_losses(trainer.state.log_history, output_dir)
    history, meter = trainer.state.log_history, trainer.meter
    initial = {
        name.removeprefix("initial_loss/"): loss
        for entry in history
        for name, loss in entry.items()
        if name.startswith("initial_loss/")
    }
    return {
        "steps": step,
        "cut_short": _is_stopped_by_max_steps(training_args, train),
        "tokens": meter.total_tokens,
        "tokens_per_second": round(meter.total_tokens / max(meter.total_seconds, 1e-9), 1),
        "padding_ratio": round(meter.total_padding / max(meter.total_tokens, 1), 5),
        "lengths": length_histogram(train),
        "trainable_parameters": trainable,
        "train_loss": _first_and_last(history, "loss"),
        "eval_loss": _first_and_last(history, "eval_loss"),
        **({"initial_loss": initial} if per_dataset_samples else {}),
    }


def _resume_hint(training_args: TrainingArguments, finetuning_args: FinetuningArguments) -> str:
    if training_args.save_only_model:
        return WEIGHTS_ONLY_HINT
    if finetuning_args.overwrite_output_dir:
        return "Run it again without overwrite_output_dir (steps: without OVERWRITE=1) to resume."
    return "The same command resumes from there."


def _is_stopped_by_max_steps(training_args: TrainingArguments, train: PackedDataset) -> bool:
    """Whether max_steps ended the run before num_train_epochs would have."""
    planned = training_args.num_train_epochs * -(-len(train) // global_batch_size(training_args))
    return 0 < training_args.max_steps < planned


def needs_gradient_checkpointing(model: Any, data_args: DataArguments, training_args: TrainingArguments) -> bool:
    """Whether activations have to be computed again in the backward pass; the first process decides for all."""
    short = [False]
    if is_rank_zero() and (free := free_memory()) is not None:
        needed = estimate_step_memory(
            model,
            training_args.per_device_train_batch_size,
            data_args.cutoff_len,
            checkpointing=False,
            dtype=compute_dtype(training_args),
            optimizer_bytes=2 if "8bit" in str(training_args.optim) else 8,
            processes=training_args.world_size if training_args.deepspeed else 1,
        )
        short = [needed.total > MEMORY_FRACTION * free]
        how = "are computed again in the backward pass" if short[0] else "are kept"
        print0(f"a step needs about {needed}; {free / 1e9:.1f} GB are free: activations {how}")
    if training_args.world_size > 1:
        broadcast_object_list(short)
    return short[0]


def length_histogram(train: PackedDataset) -> dict[str, list[int]]:
    """How many of the documents or dialogues of a run have edges[i] <= tokens < edges[i + 1]."""
    lengths = train.token_dataset.lengths[numpy.unique(train.pack_index.doc_ids)]
    counts = numpy.bincount(numpy.log2(numpy.maximum(lengths, 1)).astype(int))
    first = int(numpy.flatnonzero(counts)[0])
    return {"edges": [2**power for power in range(first, len(counts) + 1)], "counts": counts[first:].tolist()}


def run_fingerprint(args: TrainArgs, train: PackedDataset) -> dict[str, Any]:
    """What shapes a run: its settings, how many processes share it, its data and the weights that it starts from."""
    data = {
        f"data set {one.name}": f"{len(one):,} rows, checksum {zlib.crc32(one.store.column('hash').tobytes()):08x}"
        for one in train.token_dataset.datasets
    }
    if args.model.create_new_adapter and (earlier := args.model.adapter_name_or_path):
        data["merged adapter"] = f"sha256 {adapter_checksum(Path(earlier))[:8]}"
    model = {"model checksum": checksum(Path(args.model.model_name_or_path))}
    return {**serialize_settings(args), "processes": args.training.world_size, **data, **model}


def find_resume_checkpoint(
    output_dir: Path, training_args: TrainingArguments, overwrite: bool, settings: dict[str, Any]
) -> Path | None:
    """The newest whole checkpoint of this very run; the first process looks for all."""
    found: list[Path | None] = [None]
    named = training_args.resume_from_checkpoint
    if is_rank_zero():
        if not isinstance(named, str):
            found = [None if overwrite else latest_valid_checkpoint(output_dir)]
        elif damage := verify_checkpoint(Path(named)):
            raise UserError(
                f"resume_from_checkpoint {named} cannot be resumed from: {damage}. Name another one, or none."
            )
        else:
            found = [Path(named)]
        if found[0] is not None:
            state = TrainerState.load_from_json(str(found[0] / "trainer_state.json"))
            if not is_training_finished(state, settings.get("early_stopping_steps")):
                check_resumable(found[0])
            check_resume_settings(found[0], settings)
            print0(f"resuming from {found[0]}")
    if training_args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _collect_invalid_rows(token_dataset: ConcatTokenDataset, output_dir: Path) -> None:
    """Puts the unusable rows of all data sets, by file and line, into output_dir/invalid_rows.jsonl."""
    if is_rank_zero():
        with (output_dir / "invalid_rows.jsonl").open("wb") as collected:
            for one in token_dataset.datasets:
                with (one.directory / "invalid_rows.jsonl").open("rb") as rejected:
                    shutil.copyfileobj(rejected, collected)


def compute_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Frozen weights are held in the precision in which they are multiplied."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def global_batch_size(training_args: TrainingArguments) -> int:
    """Sequences of one step, over accumulation and all processes."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


def even_subset(dataset: Any, count: int) -> TorchDataset:
    """An even sample of a packed data set: neighbours in a list of bins are alike in length."""
    size = len(dataset)
    return Subset(dataset, [index * size // count for index in range(count)]) if size > count else dataset


def _first_and_last(history: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    values = [round(entry[name], 4) for entry in history if name in entry]
    return {"first": values[0] if values else None, "last": values[-1] if values else None}
