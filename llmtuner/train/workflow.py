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

from llmtuner.console import InputError, Stopped, is_first_process, say, table, write_json
from llmtuner.data.examples import load_examples
from llmtuner.data.packing import (
    FilledUp,
    PackedCollator,
    PackedSequences,
    Pool,
    bin_segments,
    block_segments,
    mix,
    single_segments,
)
from llmtuner.data.template import Template
from llmtuner.data.tokens import Examples
from llmtuner.eval.bits_per_byte import Windows
from llmtuner.hparams import ATTENTION, Arguments, DataArguments, FinetuningArguments, settings_to_save
from llmtuner.model.adapters import prepare_for_training, save_adapter
from llmtuner.model.fused import fuse_layers
from llmtuner.model.loading import best_attention, check_model_fits, load_model
from llmtuner.model.merging import adapter_checksum
from llmtuner.outputs import checksum
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train.checkpoints import check_resumable, find_damage, newest_whole, same_run, start_again
from llmtuner.train.memory import USABLE, free_memory, step_memory
from llmtuner.train.self_check import SelfCheck
from llmtuner.train.trainer import BeforeFirstStep, InitialLoss, PackedTrainer, is_finished
from llmtuner.train.watching import StopSignal

WEIGHTS_ONLY = "save_only_model: true: it holds weights only, and the run cannot be resumed from it."
SEQUENCES_FOR_INITIAL_LOSS = 8  # per data set; more would cost time and change little


BeforeTraining = Callable[[], None] | None


def run_pt(
    arguments: Arguments, texts: dict[str, list[str]] | None = None, before_training: BeforeTraining = None
) -> dict[str, Any]:
    """Continued pretraining on packed documents; returns what was measured, at every evaluation also on held-out texts."""
    model_args, data_args, training_args, _ = arguments
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    check_model_fits(model_args.model_name_or_path, tokenizer, data_args.cutoff_len)
    train, held_out = pack_pt(data_args, training_args.seed, tokenizer)
    met = _say_mix(train, data_args)
    say(f"{len(train):,} sequences of up to {data_args.cutoff_len:,} tokens; no token is left out")
    metrics = _train(arguments, tokenizer, train, held_out, texts=texts, before_training=before_training)
    return {**metrics, "data": met}


def pack_pt(data_args: DataArguments, seed: int, tokenizer: Any) -> tuple[PackedSequences, PackedSequences]:
    """The sequences of documents to train on, and those held out; no model is loaded for them.

    Raises:
        InputError: as `load_pool`.
    """
    prefix = len(Template.of(tokenizer).prefix)

    def pack(pool: Pool, order: numpy.ndarray) -> PackedSequences:
        segments = (block_segments if data_args.packing else single_segments)(order, pool.lengths, data_args.cutoff_len)
        return PackedSequences(pool, segments, prefix, data_args.neat_packing)

    pool, trained, held_out = load_pool(data_args, "pt", tokenizer)
    return pack(pool, _order(pool, trained, data_args, seed)), pack(pool, numpy.concatenate(held_out))


def run_sft(arguments: Arguments, before_training: BeforeTraining = None) -> dict[str, Any]:
    """Instruction tuning on packed dialogues; returns what was measured, each data set's initial loss included."""
    model_args, data_args, training_args, _ = arguments
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    check_model_fits(model_args.model_name_or_path, tokenizer, data_args.cutoff_len)
    train, held_out, samples = pack_sft(data_args, training_args.seed, tokenizer)
    met = _say_mix(train, data_args)
    cut, dropped = train.segments.cut, train.segments.dropped
    kept = "last answer and as many turns before it as fit" if data_args.mask_history else "beginning"
    say(
        f"{len(train):,} sequences of up to {data_args.cutoff_len:,} tokens; {cut:,} longer dialogues keep their {kept}; "
        f"{dropped:,} of them are dropped because no target token is left"
    )
    metrics = _train(arguments, tokenizer, train, held_out, samples, before_training=before_training)
    return {**metrics, "data": met, "cut": cut, "dropped": dropped}


def pack_sft(
    data_args: DataArguments, seed: int, tokenizer: Any
) -> tuple[PackedSequences, PackedSequences, dict[str, PackedSequences]]:
    """The sequences of dialogues to train on, those held out, and those of each data set; no model is loaded for them.

    Raises:
        InputError: as `load_pool`, and if a data set or the held-out part has no dialogue with a target token in reach.
    """
    template = Template.of(tokenizer) if data_args.mask_history else None

    def pack(pool: Pool, order: numpy.ndarray, what: str) -> PackedSequences:
        in_order = data_args.disable_shuffling
        segments = bin_segments(order, pool, data_args.cutoff_len, data_args.packing, in_order, template)
        if len(order) and not len(segments.rows):
            raise InputError(
                f"{what}: all {len(order):,} dialogues are dropped, because none has a target token within its first "
                f"{data_args.cutoff_len:,} tokens (cutoff_len); the shortest has {pool.lengths[order].min():,} tokens. "
                "Raise cutoff_len, or set mask_history: true, which keeps the end of a dialogue instead of its beginning."
            )
        return PackedSequences(pool, segments, isolated=data_args.neat_packing)

    pool, trained, held_out = load_pool(data_args, "sft", tokenizer)
    samples = {
        one.name: pack(pool, rows, f"data set {one.name}") for one, rows in zip(pool.sets, trained, strict=False)
    }
    train = pack(pool, _order(pool, trained, data_args, seed), "training data")
    return train, pack(pool, numpy.concatenate(held_out), "held-out data"), samples


def load_pool(
    data_args: DataArguments, stage: str, tokenizer: Any
) -> tuple[Pool, list[numpy.ndarray], list[numpy.ndarray]]:
    """All data sets of a run, tokenized, and of each the rows to train on and those held out.

    No text that is held out of one data set, or stands in eval_dataset, is trained through another:
    `pool.held_out_elsewhere` counts the rows that are left out for that.

    Raises:
        InputError: if nothing is left to train on, or nothing to evaluate with.
    """
    sets: list[Examples] = [
        load_examples(name, stage, tokenizer, data_args) for name in [*data_args.dataset, *data_args.eval_dataset]
    ]
    pool = Pool(sets)
    trained, held_out = [], []
    for place, (start, one) in enumerate(zip(pool.starts, sets, strict=False)):
        if place < len(data_args.dataset):
            train, held = one.split(data_args.val_size)
            if not len(train):
                raise InputError(
                    f"data set {one.name}: val_size {data_args.val_size} leaves none of its {len(one):,} rows to "
                    "train on. Make it smaller."
                )
            trained.append(train + start)
            held_out.append(held + start)
        else:
            held_out.append(numpy.arange(len(one)) + start)
    if (data_args.val_size or data_args.eval_dataset) and not sum(map(len, held_out)):
        raise InputError(
            f"val_size {data_args.val_size} holds out none of {sum(map(len, trained)):,} rows. Make it larger."
        )
    if data_args.val_size >= 1 or data_args.eval_dataset:  # a share is chosen by hash alone, so the same for all sets
        _exclude_held_out(pool, trained, held_out)
    return pool, trained, held_out


def _exclude_held_out(pool: Pool, trained: list[numpy.ndarray], held_out: list[numpy.ndarray]) -> None:
    """Removes from `trained`, in place, the rows whose text is held out of any data set."""
    hashes = numpy.concatenate([one.table.column("hash") for one in pool.sets])
    excluded = numpy.unique(hashes[numpy.concatenate(held_out)])
    for place, rows in enumerate(trained):
        kept = rows[~numpy.isin(hashes[rows], excluded)]
        if not len(kept):
            raise InputError(
                f"data set {pool.sets[place].name}: all {len(rows):,} rows that are left to train on are also held out of "
                "another data set (by val_size, or as eval_dataset). Leave it out, or hold out less."
            )
        pool.held_out_elsewhere[place] = len(rows) - len(kept)
        trained[place] = kept


def _order(pool: Pool, trained: list[numpy.ndarray], data_args: DataArguments, seed: int) -> numpy.ndarray:
    if data_args.interleave_by == "tokens":
        weights = pool.lengths
    elif data_args.interleave_by == "bytes":
        weights = numpy.concatenate([one.table.column("bytes") for one in pool.sets]).astype(numpy.int64)
    else:
        weights = numpy.ones(len(pool.lengths), dtype=numpy.int64)
    shares, shuffle = data_args.interleave_probs or [], not data_args.disable_shuffling
    return mix(trained, weights, shares, data_args.mix_strategy, seed, shuffle)


def _say_mix(train: PackedSequences, data_args: DataArguments) -> dict[str, Any]:
    """Prints and returns what each data set gives to the run."""
    pool, own = train.pool, train.segments
    which = numpy.searchsorted(pool.starts, own.rows, side="right") - 1
    tokens = numpy.bincount(which, weights=own.lengths, minlength=len(pool.sets)).astype(int).tolist()
    met, lines = {}, []
    for place, name in enumerate(data_args.dataset):
        share, counts = tokens[place] / max(train.tokens, 1), pool.sets[place].counts
        planned = data_args.interleave_probs[place] if data_args.interleave_probs else None
        comparable = planned if data_args.interleave_by == "tokens" else None  # with the share of tokens
        met[name] = {**counts, "planned_share": comparable, "trained_tokens": tokens[place], "share": round(share, 4)}
        met[name]["held_out_elsewhere"] = pool.held_out_elsewhere[place]
        names = ("kept", "rejected", "duplicates", "tokens")
        lines.append(
            [name, *(f"{counts[one]:,}" for one in names), f"{tokens[place]:,}", f"{share:.1%}"]
            + ([f"{planned:.1%}"] if planned is not None else [])
            + ([f"{pool.held_out_elsewhere[place]:,}"] if any(pool.held_out_elsewhere) else [])
        )
    header = ["data set", "rows", "rejected", "duplicates", "tokens", "in this run", "share"]
    header += [f"planned, by {data_args.interleave_by}"] if data_args.interleave_probs else []
    header += ["held out elsewhere"] if any(pool.held_out_elsewhere) else []
    say(table(header, lines))
    if excluded := sum(pool.held_out_elsewhere):
        say(f"{excluded:,} rows are not trained on: the same text is held out of another data set")
    return met


def _train(
    arguments: Arguments,
    tokenizer: Any,
    train: PackedSequences,
    held_out: PackedSequences,
    samples: dict[str, Any] | None = None,
    texts: dict[str, list[str]] | None = None,
    before_training: BeforeTraining = None,
) -> dict[str, Any]:
    model_args, data_args, training_args, finetuning_args = arguments
    output_dir = Path(training_args.output_dir or ".")
    settings = _settings(arguments, train)
    checkpoint = _checkpoint_to_go_on_from(output_dir, training_args, finetuning_args.overwrite_output_dir, settings)
    if training_args.save_only_model and training_args.save_strategy != "no":
        say("save_only_model: true: checkpoints hold weights only; a run that stops early cannot be resumed")

    set_seed(training_args.seed)  # before the adapter draws its first weights
    whole = finetuning_args.finetuning_type == "full"
    dtype = torch.float32 if whole else _frozen_dtype(training_args)
    attention = ATTENTION[model_args.flash_attn] or best_attention(model_args.model_name_or_path)
    model = load_model(model_args.model_name_or_path, dtype, attention)
    model.config.use_cache = False
    adapter = Path(model_args.adapter_name_or_path) if model_args.adapter_name_or_path else None
    trained = prepare_for_training(model, finetuning_args, adapter, model_args.create_new_adapter)
    if finetuning_args.fused_layers:
        fuse_layers(trained)
    if model_args.disable_gradient_checkpointing is None and _memory_is_short(trained, data_args, training_args):
        training_args.gradient_checkpointing = training_args.activation_checkpointing = True
    settings |= settings_to_save(arguments)  # with what was decided just now
    trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    say(f"training {trainable:,} parameters of {sum(p.numel() for p in trained.parameters()):,}")

    windows = {
        language: Windows.of(
            tokenizer, own[training_args.process_index :: training_args.world_size], data_args.cutoff_len
        )
        for language, own in (texts or {}).items()
    }
    if training_args.do_train and data_args.disable_shuffling:
        training_args.train_sampling_strategy = "sequential"
    with StopSignal() as stop:
        trainer = PackedTrainer(
            finetuning_args,
            PackedCollator(tokenizer.pad_token_id),
            settings,
            train.pool.origin,
            stop,
            windows,
            model=trained,
            args=training_args,
            train_dataset=FilledUp(train, _total_batch(training_args)),
            eval_dataset=_first(held_out, data_args.max_eval_sequences) if len(held_out) else None,
        )
        if data_args.eval_on_each_dataset:
            parts = {one.name: held_out.of_dataset(place) for place, one in enumerate(train.pool.sets)}
            trainer.eval_parts = {
                name: _first(part, data_args.max_eval_sequences) for name, part in parts.items() if len(part)
            }
        check = SelfCheck(trainer, tokenizer, packed=data_args.packing and data_args.neat_packing)
        if not training_args.do_train:
            check.run()
            losses = trainer.evaluate()
            return {name: loss for name, loss in losses.items() if name.endswith("_loss")}
        small = {name: _first(one, SEQUENCES_FOR_INITIAL_LOSS) for name, one in (samples or {}).items()}
        begin = BeforeFirstStep(
            *([before_training] if before_training else []),
            partial(start_again, output_dir, finetuning_args.overwrite_output_dir and checkpoint is None),
            partial(_collect_rejected, train.pool, output_dir),
        )
        for callback in (check, begin, InitialLoss(trainer, small)):
            trainer.add_callback(callback)
        if checkpoint:
            trainer.go_on_from(checkpoint)
        else:
            trainer.train()
        trainer.settle()
        step = trainer.state.global_step
        if trainer.ending and step < trainer.state.max_steps:
            raise Stopped(
                f"stopped after step {step:,} of {trainer.state.max_steps:,}, with {output_dir}/checkpoint-{step}. "
                + _how_to_resume(training_args, finetuning_args),
                stop.received,
            )
        if step < trainer.state.max_steps and (patience := finetuning_args.early_stopping_steps):
            say(f"finished early, after step {step:,}: eval_loss has not improved for {patience} evaluations")
    if is_first_process():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), output_dir, Path(model_args.model_name_or_path))
        write_json(output_dir / "settings.json", settings)
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
        "cut_short": _is_cut_short(training_args, train),
        "tokens": meter.all_tokens,
        "tokens_per_second": round(meter.all_tokens / max(meter.all_seconds, 1e-9), 1),
        "padding_share": round(meter.all_padding / max(meter.all_tokens, 1), 5),
        "lengths": _lengths(train),
        "trainable_parameters": trainable,
        "train_loss": _first_and_last(history, "loss"),
        "eval_loss": _first_and_last(history, "eval_loss"),
        **({"initial_loss": initial} if samples else {}),
    }


def _how_to_resume(training_args: TrainingArguments, finetuning_args: FinetuningArguments) -> str:
    if training_args.save_only_model:
        return WEIGHTS_ONLY
    if finetuning_args.overwrite_output_dir:
        return "Run it again without overwrite_output_dir (steps: without OVERWRITE=1) to resume."
    return "The same command resumes from there."


def _is_cut_short(training_args: TrainingArguments, train: PackedSequences) -> bool:
    """Whether max_steps ended the run before num_train_epochs would have."""
    planned = training_args.num_train_epochs * -(-len(train) // _total_batch(training_args))
    return 0 < training_args.max_steps < planned


def _memory_is_short(model: Any, data_args: DataArguments, training_args: TrainingArguments) -> bool:
    """Whether activations have to be computed again in the backward pass; the first process decides for all."""
    short = [False]
    if is_first_process() and (free := free_memory()) is not None:
        needed = step_memory(
            model,
            training_args.per_device_train_batch_size,
            data_args.cutoff_len,
            checkpointing=False,
            dtype=_frozen_dtype(training_args),
            optimizer_bytes=2 if "8bit" in str(training_args.optim) else 8,
            processes=training_args.world_size if training_args.deepspeed else 1,
        )
        short = [needed.total > USABLE * free]
        how = "are computed again in the backward pass" if short[0] else "are kept"
        say(f"a step needs about {needed}; {free / 1e9:.1f} GB are free: activations {how}")
    if training_args.world_size > 1:
        broadcast_object_list(short)
    return short[0]


def _lengths(train: PackedSequences) -> dict[str, list[int]]:
    """How many of the documents or dialogues of a run have edges[i] <= tokens < edges[i + 1]."""
    lengths = train.pool.lengths[numpy.unique(train.segments.rows)]
    counts = numpy.bincount(numpy.log2(numpy.maximum(lengths, 1)).astype(int))
    first = int(numpy.flatnonzero(counts)[0])
    return {"edges": [2**power for power in range(first, len(counts) + 1)], "counts": counts[first:].tolist()}


def _settings(arguments: Arguments, train: PackedSequences) -> dict[str, Any]:
    """What shapes a run: its settings, how many processes share it, its data and the weights that it starts from."""
    data = {
        f"data set {one.name}": f"{len(one):,} rows, checksum {zlib.crc32(one.table.column('hash').tobytes()):08x}"
        for one in train.pool.sets
    }
    if arguments[0].create_new_adapter and (earlier := arguments[0].adapter_name_or_path):
        data["merged adapter"] = f"sha256 {adapter_checksum(Path(earlier))[:8]}"
    model = {"model checksum": checksum(Path(arguments[0].model_name_or_path))}
    return {**settings_to_save(arguments), "processes": arguments[2].world_size, **data, **model}


def _checkpoint_to_go_on_from(
    output_dir: Path, training_args: TrainingArguments, overwrite: bool, settings: dict[str, Any]
) -> Path | None:
    """The newest whole checkpoint of this very run; the first process looks for all."""
    found: list[Path | None] = [None]
    named = training_args.resume_from_checkpoint
    if is_first_process():
        if not isinstance(named, str):
            found = [None if overwrite else newest_whole(output_dir)]
        elif damage := find_damage(Path(named)):
            raise InputError(
                f"resume_from_checkpoint {named} cannot be gone on from: {damage}. Name another one, or none."
            )
        else:
            found = [Path(named)]
        if found[0] is not None:
            state = TrainerState.load_from_json(str(found[0] / "trainer_state.json"))
            if not is_finished(state, settings.get("early_stopping_steps")):
                check_resumable(found[0])
            same_run(found[0], settings)
            say(f"going on from {found[0]}")
    if training_args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _collect_rejected(pool: Pool, output_dir: Path) -> None:
    """Puts the unusable rows of all data sets, by file and line, into output_dir/rejected.jsonl."""
    if is_first_process():
        with (output_dir / "rejected.jsonl").open("wb") as collected:
            for one in pool.sets:
                with (one.directory / "rejected.jsonl").open("rb") as rejected:
                    shutil.copyfileobj(rejected, collected)


def _frozen_dtype(training_args: TrainingArguments) -> torch.dtype:
    """Frozen weights are held in the precision in which they are multiplied."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def _total_batch(training_args: TrainingArguments) -> int:
    """Sequences of one step, over accumulation and all processes."""
    return training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size


def _first(dataset: Any, count: int) -> TorchDataset:
    """An even sample of a packed data set: neighbours in a list of bins are alike in length."""
    size = len(dataset)
    return Subset(dataset, [index * size // count for index in range(count)]) if size > count else dataset


def _first_and_last(history: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    values = [round(entry[name], 4) for entry in history if name in entry]
    return {"first": values[0] if values else None, "last": values[-1] if values else None}
