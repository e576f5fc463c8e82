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

from llmtuner.console import TrainingInterrupted, UserError, format_table, is_rank_zero, print0
from llmtuner.data.packing import (
    ConcatTokenDataset,
    PackedDataCollator,
    PackedDataset,
    PadToMultiple,
    concat_and_chunk,
    interleave,
    one_per_sequence,
    pack_best_fit,
)
from llmtuner.data.template import Template
from llmtuner.data.token_store import TokenizedDataset
from llmtuner.data.tokenize import load_tokenized_dataset
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
    train, held_out = get_pt_dataset(data_args, training_args.seed, tokenizer)
    stats = mixture_stats(train, data_args)
    print0(f"{len(train):,} sequences of up to {data_args.cutoff_len:,} tokens; no tokens dropped")
    metrics = _train(args, tokenizer, train, held_out, texts=texts, before_training=before_training)
    return {**metrics, "data": stats}


def get_pt_dataset(data_args: DataArguments, seed: int, tokenizer: Any) -> tuple[PackedDataset, PackedDataset]:
    """The sequences of documents to train on, and those held out; no model is loaded for them.

    Raises:
        UserError: as `load_tokenized_datasets`.
    """
    prefix = len(Template.from_tokenizer(tokenizer).prefix)

    def pack(token_dataset: ConcatTokenDataset, order: numpy.ndarray) -> PackedDataset:
        segments = (concat_and_chunk if data_args.packing else one_per_sequence)(
            order, token_dataset.lengths, data_args.cutoff_len
        )
        return PackedDataset(token_dataset, segments, prefix, data_args.neat_packing)

    token_dataset, trained, held_out = load_tokenized_datasets(data_args, "pt", tokenizer)
    return pack(token_dataset, sample_order(token_dataset, trained, data_args, seed)), pack(
        token_dataset, numpy.concatenate(held_out)
    )


def run_sft(args: TrainArgs, before_training: BeforeTraining = None) -> dict[str, Any]:
    """Instruction tuning on packed dialogues; returns what was measured, each data set's initial loss included."""
    model_args, data_args, training_args = args.model, args.data, args.training
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    check_vocab_and_context(model_args.model_name_or_path, tokenizer, data_args.cutoff_len)
    train, held_out, per_dataset_samples = get_sft_dataset(data_args, training_args.seed, tokenizer)
    stats = mixture_stats(train, data_args)
    cut, dropped = train.pack_index.num_truncated, train.pack_index.num_dropped
    kept = "last answer and as many turns before it as fit" if data_args.mask_history else "beginning"
    print0(
        f"{len(train):,} sequences of up to {data_args.cutoff_len:,} tokens; {cut:,} longer dialogues keep their {kept}; "
        f"{dropped:,} of them are dropped because no target token is left"
    )
    metrics = _train(args, tokenizer, train, held_out, per_dataset_samples, before_training=before_training)
    return {**metrics, "data": stats, "num_truncated": cut, "num_dropped": dropped}


def get_sft_dataset(
    data_args: DataArguments, seed: int, tokenizer: Any
) -> tuple[PackedDataset, PackedDataset, dict[str, PackedDataset]]:
    """The sequences of dialogues to train on, those held out, and those of each data set; no model is loaded for them.

    Raises:
        UserError: as `load_tokenized_datasets`, and if a data set or the held-out part has no dialogue with a target token in reach.
    """
    template = Template.from_tokenizer(tokenizer) if data_args.mask_history else None

    def pack(token_dataset: ConcatTokenDataset, order: numpy.ndarray, what: str) -> PackedDataset:
        in_order = data_args.disable_shuffling
        segments = pack_best_fit(order, token_dataset, data_args.cutoff_len, data_args.packing, in_order, template)
        if len(order) and not len(segments.doc_ids):
            raise UserError(
                f"{what}: all {len(order):,} dialogues are dropped, because none has a target token within its first "
                f"{data_args.cutoff_len:,} tokens (cutoff_len); the shortest has {token_dataset.lengths[order].min():,} tokens. "
                "Raise cutoff_len, or set mask_history: true, which keeps the end of a dialogue instead of its beginning."
            )
        return PackedDataset(token_dataset, segments, block_diagonal=data_args.neat_packing)

    token_dataset, trained, held_out = load_tokenized_datasets(data_args, "sft", tokenizer)
    per_dataset_samples = {
        one.name: pack(token_dataset, rows, f"data set {one.name}")
        for one, rows in zip(token_dataset.datasets, trained, strict=False)
    }
    train = pack(token_dataset, sample_order(token_dataset, trained, data_args, seed), "training data")
    return train, pack(token_dataset, numpy.concatenate(held_out), "held-out data"), per_dataset_samples


def load_tokenized_datasets(
    data_args: DataArguments, stage: str, tokenizer: Any
) -> tuple[ConcatTokenDataset, list[numpy.ndarray], list[numpy.ndarray]]:
    """All data sets of a run, tokenized, and of each the rows to train on and those held out.

    No text that is held out of one data set, or stands in eval_dataset, is trained through another:
    `token_dataset.held_out_elsewhere` counts the rows that are left out for that.

    Raises:
        UserError: if nothing is left to train on, or nothing to evaluate with.
    """
    sets: list[TokenizedDataset] = [
        load_tokenized_dataset(name, stage, tokenizer, data_args)
        for name in [*data_args.dataset, *data_args.eval_dataset]
    ]
    token_dataset = ConcatTokenDataset(sets)
    trained, held_out = [], []
    for place, (start, one) in enumerate(zip(token_dataset.offsets, sets, strict=False)):
        if place < len(data_args.dataset):
            train, held = one.split(data_args.val_size)
            if not len(train):
                raise UserError(
                    f"data set {one.name}: val_size {data_args.val_size} leaves none of its {len(one):,} rows to "
                    "train on. Make it smaller."
                )
            trained.append(train + start)
            held_out.append(held + start)
        else:
            held_out.append(numpy.arange(len(one)) + start)
    if (data_args.val_size or data_args.eval_dataset) and not sum(map(len, held_out)):
        raise UserError(
            f"val_size {data_args.val_size} holds out none of {sum(map(len, trained)):,} rows. Make it larger."
        )
    if data_args.val_size >= 1 or data_args.eval_dataset:  # a share is chosen by hash alone, so the same for all sets
        _remove_eval_overlap(token_dataset, trained, held_out)
    return token_dataset, trained, held_out


def _remove_eval_overlap(
    token_dataset: ConcatTokenDataset, trained: list[numpy.ndarray], held_out: list[numpy.ndarray]
) -> None:
    """Removes from `trained`, in place, the rows whose text is held out of any data set."""
    hashes = numpy.concatenate([one.store.column("hash") for one in token_dataset.datasets])
    excluded = numpy.unique(hashes[numpy.concatenate(held_out)])
    for place, rows in enumerate(trained):
        kept = rows[~numpy.isin(hashes[rows], excluded)]
        if not len(kept):
            raise UserError(
                f"data set {token_dataset.datasets[place].name}: all {len(rows):,} rows that are left to train on are also held out of "
                "another data set (by val_size, or as eval_dataset). Leave it out, or hold out less."
            )
        token_dataset.held_out_elsewhere[place] = len(rows) - len(kept)
        trained[place] = kept


def sample_order(
    token_dataset: ConcatTokenDataset, trained: list[numpy.ndarray], data_args: DataArguments, seed: int
) -> numpy.ndarray:
    if data_args.interleave_unit == "tokens":
        weights = token_dataset.lengths
    elif data_args.interleave_unit == "bytes":
        weights = numpy.concatenate([one.store.column("bytes") for one in token_dataset.datasets]).astype(numpy.int64)
    else:
        weights = numpy.ones(len(token_dataset.lengths), dtype=numpy.int64)
    shares, shuffle = data_args.interleave_probs or [], not data_args.disable_shuffling
    return interleave(trained, weights, shares, data_args.mix_strategy, seed, shuffle)


def mixture_stats(train: PackedDataset, data_args: DataArguments) -> dict[str, Any]:
    """Prints and returns what each data set gives to the run."""
    token_dataset, own = train.token_dataset, train.pack_index
    which = numpy.searchsorted(token_dataset.offsets, own.doc_ids, side="right") - 1
    tokens = numpy.bincount(which, weights=own.lengths, minlength=len(token_dataset.datasets)).astype(int).tolist()
    stats, lines = {}, []
    for place, name in enumerate(data_args.dataset):
        share, counts = tokens[place] / max(train.num_tokens, 1), token_dataset.datasets[place].counts
        planned = data_args.interleave_probs[place] if data_args.interleave_probs else None
        comparable = planned if data_args.interleave_unit == "tokens" else None  # with the share of tokens
        stats[name] = {**counts, "target_ratio": comparable, "sampled_tokens": tokens[place], "ratio": round(share, 4)}
        stats[name]["held_out_elsewhere"] = token_dataset.held_out_elsewhere[place]
        names = ("kept", "invalid", "duplicates", "tokens")
        lines.append(
            [name, *(f"{counts[one]:,}" for one in names), f"{tokens[place]:,}", f"{share:.1%}"]
            + ([f"{planned:.1%}"] if planned is not None else [])
            + ([f"{token_dataset.held_out_elsewhere[place]:,}"] if any(token_dataset.held_out_elsewhere) else [])
        )
    header = ["data set", "rows", "invalid", "duplicates", "tokens", "in this run", "share"]
    header += [f"planned, by {data_args.interleave_unit}"] if data_args.interleave_probs else []
    header += ["held out elsewhere"] if any(token_dataset.held_out_elsewhere) else []
    print0(format_table(header, lines))
    if excluded := sum(token_dataset.held_out_elsewhere):
        print0(f"{excluded:,} rows are not trained on: the same text is held out of another data set")
    return stats


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
