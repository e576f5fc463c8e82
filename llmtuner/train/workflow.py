"""The two stages, each read from top to bottom: data, model, training, adapter, figures."""

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset
from transformers import TrainingArguments, set_seed

from llmtuner.console import InputError, Stopwatch, is_first_process, say, write_json
from llmtuner.data.examples import load_examples
from llmtuner.data.packing import DialogueBins, DocumentBlocks, PackedCollator, example_lengths, mix
from llmtuner.data.sources import find_source
from llmtuner.data.template import Template
from llmtuner.hparams import ATTENTION, Arguments, DataArguments
from llmtuner.model.adapters import prepare_for_training, save_adapter
from llmtuner.model.loading import check_rows, load_model
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train.trainer import InitialLoss, PackedTrainer

SEQUENCES_FOR_INITIAL_LOSS = 8  # per data set; more would cost time and change little


def run_pt(arguments: Arguments) -> dict[str, Any]:
    """Continued pretraining on packed documents; returns what was measured."""
    model_args, data_args, training_args, _ = arguments
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    template = Template.of(tokenizer)
    train_sets, held_out_sets = _load_sets(data_args, training_args, "pt", tokenizer)

    def pack(sets: list[Any]) -> DocumentBlocks:
        return DocumentBlocks(sets, _order(sets, data_args, training_args.seed), data_args.cutoff_len, template.prefix)

    train, held_out = pack(train_sets), pack(held_out_sets)
    _say_mix(data_args.dataset, train_sets, train.order, train.tokens)
    return _train(arguments, tokenizer, train, held_out)


def run_sft(arguments: Arguments) -> dict[str, Any]:
    """Instruction tuning on packed dialogues; returns what was measured, each data set's initial loss included."""
    model_args, data_args, training_args, _ = arguments
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    train_sets, held_out_sets = _load_sets(data_args, training_args, "sft", tokenizer)

    def pack(sets: list[Any]) -> DialogueBins:
        return DialogueBins(sets, _order(sets, data_args, training_args.seed), data_args.cutoff_len)

    train, held_out = pack(train_sets), pack(held_out_sets)
    if train.cut:
        say(
            f"{train.cut:,} dialogues longer than {data_args.cutoff_len} tokens were cut, {train.dropped:,} of them dropped"
        )
    samples = {name: pack([one]) for name, one in zip(data_args.dataset, train_sets, strict=True)}
    return _train(arguments, tokenizer, train, held_out, samples)


def _load_sets(
    data_args: DataArguments, training_args: TrainingArguments, stage: str, tokenizer: Any
) -> tuple[list[Any], list[Any]]:
    """Tokenized data sets, split into trained and held-out examples. One process tokenizes, the others wait."""
    dataset_info = Path(data_args.dataset_dir) / "dataset_info.json"
    sources = [find_source(name, dataset_info, Path(data_args.corpus_dir)) for name in data_args.dataset]
    train_sets, held_out_sets = [], []
    for source in sources:
        with training_args.main_process_first(desc=f"tokenizing {source.name}"):
            examples = load_examples(
                source, stage, tokenizer, Path(data_args.cache_dir), data_args.val_size, data_args.max_samples
            )
        held_out = numpy.asarray(examples["held_out"], dtype=bool)
        if held_out.all():
            raise InputError(
                f"data set {source.name}: val_size {data_args.val_size} leaves none of its {len(examples)} rows to train on."
            )
        train_sets.append(examples.select(numpy.flatnonzero(~held_out)))
        held_out_sets.append(examples.select(numpy.flatnonzero(held_out)))
    return train_sets, held_out_sets


def _order(sets: list[Any], data_args: DataArguments, seed: int) -> list[tuple[int, int]]:
    shares = data_args.interleave_probs
    strategy = data_args.mix_strategy
    if shares is None or len(shares) != len(sets):
        shares, strategy = [1.0] * len(sets), "concat"
    return mix([example_lengths(one) for one in sets], shares, strategy, seed)


def _say_mix(names: list[str], sets: list[Any], order: numpy.ndarray, total: int) -> None:
    ends = numpy.cumsum([len(one) for one in sets])
    lengths = numpy.concatenate([example_lengths(one) for one in sets])
    which = numpy.searchsorted(ends, order, side="right")
    shares = [lengths[order[which == index]].sum() / total for index in range(len(names))]
    parts = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))
    say(f"mix of {total:,} tokens: {parts}")


def _train(
    arguments: Arguments,
    tokenizer: Any,
    train: TorchDataset,
    held_out: TorchDataset,
    samples: dict[str, Any] | None = None,
) -> dict[str, Any]:
    model_args, data_args, training_args, finetuning_args = arguments
    set_seed(training_args.seed)  # before the adapter draws its first weights
    dtype = torch.float32 if finetuning_args.finetuning_type == "full" or not training_args.bf16 else torch.bfloat16
    attention = ATTENTION[model_args.flash_attn] or ("sdpa" if torch.cuda.is_available() else "eager")
    model = load_model(model_args.model_name_or_path, dtype, attention)
    check_rows(model, tokenizer, model_args.model_name_or_path)
    model.config.use_cache = False
    trained = prepare_for_training(model, finetuning_args)
    trainable = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    say(f"training {trainable:,} parameters of {sum(p.numel() for p in trained.parameters()):,}")

    collator = PackedCollator(tokenizer.pad_token_id)
    trainer = PackedTrainer(
        model=trained,
        args=training_args,
        train_dataset=train,
        eval_dataset=_first(held_out, data_args.max_eval_sequences),
        finetuning=finetuning_args,
        collator=collator,
    )
    small_samples = {name: _first(one, SEQUENCES_FOR_INITIAL_LOSS) for name, one in (samples or {}).items()}
    initial = InitialLoss(trainer, small_samples)
    trainer.add_callback(initial)

    watch = Stopwatch()
    trainer.train()
    seconds = watch.seconds()
    output_dir = Path(training_args.output_dir or ".")
    if is_first_process():
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), output_dir)
        write_json(output_dir / "settings.json", json.loads(training_args.to_json_string()))
        write_json(output_dir / "log.json", trainer.state.log_history)
        if finetuning_args.plot_loss:
            from llmtuner.eval.plots import plot_losses

            plot_losses(trainer.state.log_history, output_dir)
    tokens = collator.tokens * training_args.world_size
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_second": round(tokens / max(seconds - trainer.seconds_in_evaluation, 1e-9), 1),
        "padding_share": round(collator.padding / max(collator.tokens, 1), 5),
        "trainable_parameters": trainable,
        "train_loss": {"first": _rounded(losses[:1]), "last": _rounded(losses[-1:])},
        "eval_loss": {"first": _rounded(eval_losses[:1]), "last": _rounded(eval_losses[-1:])},
        **({"initial_loss": initial.losses} if samples else {}),
    }


def _first(dataset: Any, count: int) -> TorchDataset:
    """An even sample of a packed data set: neighbours in a list of bins are alike in length."""
    size = len(dataset)
    return Subset(dataset, [index * size // count for index in range(count)]) if size > count else dataset


def _rounded(losses: list[float]) -> float | None:
    return round(losses[0], 4) if losses else None
