"""The datasets of a run: tokenized, split, mixed and packed for training and evaluation, without loading a model."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from llmtuner.console import UserError, format_table
from llmtuner.data.chat_template import get_template
from llmtuner.data.packing import (
    ConcatTokenDataset,
    PackedDataset,
    concat_and_chunk,
    interleave,
    one_per_sequence,
    pack_best_fit,
)
from llmtuner.data.tokenize import load_tokenized_dataset

if TYPE_CHECKING:
    from llmtuner.hparams import DataArguments


class DatasetModule(NamedTuple):
    """What `get_dataset` returns."""

    train: PackedDataset
    eval: PackedDataset
    """The held-out documents or dialogues of all datasets; empty if nothing is held out."""
    per_dataset: dict[str, PackedDataset]
    """Stage `sft` only: the training dialogues of each dataset, packed by themselves."""


def get_dataset(stage: str, data_args: "DataArguments", seed: int, tokenizer: Any) -> DatasetModule:
    """Packs the training set and the evaluation set of a run.

    Args:
        stage: `pt` (documents, cut where a sequence ends) or `sft` (dialogues, packed complete).
        seed: of the order in which documents or dialogues are drawn.

    Raises:
        UserError: as `load_tokenized_datasets`; if no dialogue of a dataset or of the evaluation set has a target token
            within `cutoff_len`.
    """
    template = get_template(tokenizer, data_args.template, data_args.document_end_token)
    dataset, train_ids, eval_ids = load_tokenized_datasets(data_args, stage, tokenizer)

    def pack(doc_ids: numpy.ndarray, what: str) -> PackedDataset:
        if stage == "pt":
            chunk = concat_and_chunk if data_args.packing else one_per_sequence
            index = chunk(doc_ids, dataset.lengths, data_args.cutoff_len)
            return PackedDataset(dataset, index, len(template.prefix), data_args.neat_packing)
        keep_last_answer = template if data_args.mask_history else None
        in_order = data_args.disable_shuffling
        index = pack_best_fit(doc_ids, dataset, data_args.cutoff_len, data_args.packing, in_order, keep_last_answer)
        if len(doc_ids) and not len(index.doc_ids):
            raise UserError(
                f"{what}: all {len(doc_ids):,} dialogues are dropped, because none has a target token within its first "
                f"{data_args.cutoff_len:,} tokens (cutoff_len); the shortest has {dataset.lengths[doc_ids].min():,} tokens. "
                "Raise cutoff_len, or set mask_history: true, which keeps the end of a dialogue instead of its beginning."
            )
        return PackedDataset(dataset, index, block_diagonal=data_args.neat_packing)

    per_dataset = {}
    if stage == "sft":
        for name, doc_ids in zip(data_args.dataset, train_ids, strict=True):
            per_dataset[name] = pack(doc_ids, f"dataset {name}")
    train = pack(sample_order(dataset, train_ids, data_args, seed), "training data")
    return DatasetModule(train, pack(numpy.concatenate(eval_ids), "held-out data"), per_dataset)


def load_tokenized_datasets(
    data_args: "DataArguments", stage: str, tokenizer: Any
) -> tuple[ConcatTokenDataset, list[numpy.ndarray], list[numpy.ndarray]]:
    """Loads all datasets of a run, tokenizing those that are not cached, and splits them.

    No text that one dataset holds out, or that is in eval_dataset, is trained on through another dataset:
    `ConcatTokenDataset.held_out_elsewhere` counts the rows that are excluded for this reason.

    Returns:
        The documents of all datasets; of each training dataset, those to train on; of each dataset, those held out.

    Raises:
        UserError: as `load_tokenized_dataset`; if nothing is left to train on, or nothing to evaluate on.
    """
    names = [*data_args.dataset, *data_args.eval_dataset]
    dataset = ConcatTokenDataset([load_tokenized_dataset(name, stage, tokenizer, data_args) for name in names])
    train_ids, eval_ids = [], []
    for number, (offset, tokenized) in enumerate(zip(dataset.offsets, dataset.datasets, strict=False)):
        if number >= len(data_args.dataset):
            eval_ids.append(numpy.arange(len(tokenized)) + offset)
            continue
        train, held_out = tokenized.split(data_args.val_size)
        if not len(train):
            raise UserError(
                f"dataset {tokenized.name}: val_size {data_args.val_size} leaves none of its {len(tokenized):,} rows to "
                "train on. Make it smaller."
            )
        train_ids.append(train + offset)
        eval_ids.append(held_out + offset)
    if (data_args.val_size or data_args.eval_dataset) and not sum(map(len, eval_ids)):
        raise UserError(
            f"val_size {data_args.val_size} holds out none of {sum(map(len, train_ids)):,} rows. Make it larger."
        )
    if data_args.val_size >= 1 or data_args.eval_dataset:  # a ratio is chosen by hash alone: the same in all datasets
        _remove_eval_overlap(dataset, train_ids, eval_ids)
    return dataset, train_ids, eval_ids


def _remove_eval_overlap(
    dataset: ConcatTokenDataset, train_ids: list[numpy.ndarray], eval_ids: list[numpy.ndarray]
) -> None:
    """Removes from `train_ids`, in place, the documents whose text any dataset holds out."""
    hashes = dataset.column("hash")
    held_out = numpy.unique(hashes[numpy.concatenate(eval_ids)])
    for number, doc_ids in enumerate(train_ids):
        kept = doc_ids[~numpy.isin(hashes[doc_ids], held_out)]
        if not len(kept):
            raise UserError(
                f"dataset {dataset.datasets[number].name}: all {len(doc_ids):,} rows that are left to train on are also "
                "held out of another dataset (by val_size, or as eval_dataset). Leave it out, or hold out less."
            )
        dataset.held_out_elsewhere[number] = len(doc_ids) - len(kept)
        train_ids[number] = kept


def sample_order(
    dataset: ConcatTokenDataset, train_ids: list[numpy.ndarray], data_args: "DataArguments", seed: int
) -> numpy.ndarray:
    """The documents of the training set in the order in which they are drawn, by `mix_strategy` and `interleave_probs`."""
    if data_args.interleave_unit == "tokens":
        weights = dataset.lengths
    elif data_args.interleave_unit == "bytes":
        weights = dataset.column("bytes").astype(numpy.int64)
    else:
        weights = numpy.ones_like(dataset.lengths)
    probs, shuffle = data_args.interleave_probs or [], not data_args.disable_shuffling
    return interleave(train_ids, weights, probs, data_args.mix_strategy, seed, shuffle)


def mixture_stats(train: PackedDataset, data_args: "DataArguments") -> dict[str, dict[str, Any]]:
    """What each dataset contributes to a training set.

    Returns:
        Of each dataset the counts of its tokenization, `sampled_tokens`, their `ratio` in the training set, the
        `target_ratio` if it was set in tokens, and the rows that are `held_out_elsewhere`.
    """
    dataset, index = train.token_dataset, train.pack_index
    of_part = dataset.dataset_indices(index.doc_ids)
    tokens = numpy.bincount(of_part, weights=index.lengths, minlength=len(dataset.datasets)).astype(int).tolist()
    comparable = data_args.interleave_probs if data_args.interleave_unit == "tokens" else None
    return {
        name: {
            **dataset.datasets[number].counts,
            "target_ratio": comparable[number] if comparable else None,
            "sampled_tokens": tokens[number],
            "ratio": round(tokens[number] / max(train.num_tokens, 1), 4),
            "held_out_elsewhere": dataset.held_out_elsewhere[number],
        }
        for number, name in enumerate(data_args.dataset)
    }


def format_mixture(stats: dict[str, dict[str, Any]], data_args: "DataArguments") -> str:
    """`mixture_stats` as a table."""
    columns = {"kept": "rows", "invalid": "invalid", "duplicates": "duplicates", "tokens": "tokens"}
    columns["sampled_tokens"] = "in this run"
    excluded = sum(counts["held_out_elsewhere"] for counts in stats.values())
    header = ["dataset", *columns.values(), "ratio"]
    header += [f"target, by {data_args.interleave_unit}"] if data_args.interleave_probs else []
    header += ["held out elsewhere"] if excluded else []
    lines = []
    for number, (name, counts) in enumerate(stats.items()):
        line = [name, *(f"{counts[column]:,}" for column in columns), f"{counts['ratio']:.1%}"]
        line += [f"{data_args.interleave_probs[number]:.1%}"] if data_args.interleave_probs else []
        lines.append(line + ([f"{counts['held_out_elsewhere']:,}"] if excluded else []))
    table = format_table(header, lines)
    if any(counts["duplicates"] for counts in stats.values()):
        table += "\nduplicates: rows whose text occurs earlier in the same dataset; they are trained on, too"
    if excluded:
        table += f"\n{excluded:,} rows are not trained on: the same text is held out of another dataset"
    return table
