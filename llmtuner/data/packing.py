"""Packs tokenized documents into sequences of `cutoff_len` tokens without padding, each with block-diagonal attention.

Sequences of six tokens from document A (4 tokens) and document B (5 tokens); `.` is IGNORE_INDEX, no loss:

    input_ids     A0 A1 A2 A3 B0 B1 | B2 B3 B4 ...
    labels        .  A1 A2 A3 .  B1 | .  B3 B4 ...     aligned with input_ids; the trainer shifts them
    position_ids  0  1  2  3  0  1  | 0  1  2  ...     every 0 starts a new attention block

transformers derives the block-diagonal mask from `position_ids` when no attention mask is given. A dialogue is packed
like a document, but is never continued in the next sequence.
"""

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy
import torch
from torch.utils.data import Dataset as TorchDataset

from llmtuner.data.chat_template import ChatTemplate
from llmtuner.data.template import IGNORE_INDEX, Template
from llmtuner.data.token_store import TokenizedDataset

PackedSequence = dict[str, numpy.ndarray]  # int64: input_ids, labels, position_ids [tokens]; doc_ids [documents]


class PackedBatch(TypedDict):
    """The contract between collator, trainer and preview.

    There is no attention mask. Labels are not shifted here: `PackedTrainer` predicts from the hidden state at each of
    `loss_indices` the label one position to its right.
    """

    input_ids: torch.Tensor
    """int64 [batch_size, seq_len], padded on the right; padding forms attention blocks of its own."""
    labels: torch.Tensor
    """int64 [batch_size, seq_len], aligned with `input_ids`; IGNORE_INDEX where no loss is computed."""
    position_ids: torch.Tensor
    """int64 [batch_size, seq_len]."""
    loss_indices: torch.Tensor
    """int64 [target tokens]: positions in the flattened batch whose next token is a target. The CPU finds them, so counting
    them needs no synchronization with the GPU."""
    seq_lens: list[int]
    """Lengths of the attention blocks of the flattened batch, in order, padding included."""
    cu_seqlens: torch.Tensor
    """int32 [blocks + 1]: where they begin, and the end of the last."""
    doc_ids: list[numpy.ndarray]
    """Of each sequence, its documents, by their index in the ConcatTokenDataset."""
    num_padding: int
    """Tokens of padding in the batch."""


class ConcatTokenDataset:
    """Documents of several tokenized datasets, numbered consecutively: those of the first dataset, then the second, ..."""

    def __init__(self, datasets: list[TokenizedDataset]) -> None:
        self.datasets = datasets
        self.offsets = numpy.cumsum([0, *(len(dataset.store) for dataset in datasets)])
        self.lengths = numpy.concatenate([dataset.store.lengths for dataset in datasets])
        """Tokens of each document, int64."""
        self.held_out_elsewhere = [0] * len(datasets)
        """Rows of each dataset that are excluded from training because another dataset holds out the same text."""

    def column(self, name: str) -> numpy.ndarray:
        """A column of `TokenStore` over all documents."""
        return numpy.concatenate([dataset.store.column(name) for dataset in self.datasets])

    def dataset_indices(self, doc_ids: numpy.ndarray | int) -> numpy.ndarray:
        """The dataset of each document, as an index into `datasets`."""
        return numpy.searchsorted(self.offsets, doc_ids, side="right") - 1

    def locate(self, doc_id: int) -> tuple[TokenizedDataset, int]:
        """The dataset of a document, and the document's index there."""
        dataset = int(self.dataset_indices(doc_id))
        return self.datasets[dataset], doc_id - int(self.offsets[dataset])

    def tokens(self, doc_id: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Ids of a document and its labels, int32; labels are empty if they equal the ids."""
        dataset, row = self.locate(doc_id)
        return dataset.store.ids(row), dataset.store.labels(row)

    def describe_document(self, doc_id: int) -> str:
        """Dataset, file and line of a document."""
        dataset, row = self.locate(doc_id)
        return f"{dataset.name}: {dataset.source_of(row)}"


def interleave(
    doc_ids: list[numpy.ndarray],
    weights: numpy.ndarray,
    probs: list[float],
    strategy: str,
    seed: int,
    shuffle: bool = True,
) -> numpy.ndarray:
    """Interleaves the documents of several datasets.

    `concat` takes all, shuffled. The other strategies keep the ratios exact to within one document at any point: the next
    document always comes from the dataset that is furthest below its target. `interleave_under` stops when one dataset is
    exhausted; `interleave_over` repeats exhausted datasets until every document has been used.

    Args:
        doc_ids: of each dataset, the documents to draw from.
        weights: what each document counts for: its tokens, its bytes, or 1.
        probs: target ratio of each dataset; unused by `concat`.
        shuffle: false keeps the order within each dataset.
    """
    permute = numpy.random.default_rng(seed).permutation if shuffle else numpy.asarray
    if strategy == "concat":
        return permute(numpy.concatenate(doc_ids))
    used = [(ids, prob) for ids, prob in zip(doc_ids, probs, strict=True) if len(ids) and prob > 0]
    totals = [weights[ids].sum() / prob for ids, prob in used]  # weight of the mixture at which a dataset is exhausted
    end = min(totals) if strategy == "interleave_under" else max(totals)
    drawn, keys = [], []
    for (ids, prob), total in zip(used, totals, strict=True):
        order = numpy.concatenate([permute(ids) for _ in range(int(-(-end // total)))])
        due = (numpy.cumsum(weights[order]) - weights[order]) / prob  # weight of the mixture at which each is drawn
        keep = due < end
        drawn.append(order[keep])
        keys.append(due[keep])
    return numpy.concatenate(drawn)[numpy.argsort(numpy.concatenate(keys), kind="stable")]


@dataclass(frozen=True)
class PackIndex:
    """Where each part of a document goes: tokens `starts[i]:stops[i]` of document `doc_ids[i]` are in sequence
    `sequence_ids[i]`. Entries are sorted by sequence, and concatenated in this order."""

    doc_ids: numpy.ndarray
    starts: numpy.ndarray
    stops: numpy.ndarray
    sequence_ids: numpy.ndarray
    num_truncated: int = 0
    """Dialogues longer than a sequence, of which a part is kept."""
    num_dropped: int = 0
    """Truncated dialogues without a target token in the part that fits; they are left out."""
    head_lens: numpy.ndarray | int = 0
    """Tokens from the beginning of the same document that precede each part, in the same attention block."""

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each part, including its head."""
        return self.head_lens + self.stops - self.starts


def concat_and_chunk(doc_ids: numpy.ndarray, lengths: numpy.ndarray, cutoff_len: int) -> PackIndex:
    """Concatenates documents and cuts them into sequences of `cutoff_len` tokens; only the last may be shorter.

    A document that does not fit continues in the next sequence as a document of its own. No tokens are dropped.

    Args:
        lengths: tokens of every document, indexed by `doc_ids`.
    """
    ends = numpy.cumsum(lengths[doc_ids])
    total = int(ends[-1]) if len(ends) else 0
    edges = numpy.union1d(ends, numpy.arange(0, total, cutoff_len))
    begins = edges[:-1] if len(edges) else edges
    part_of = numpy.searchsorted(ends, begins, side="right")
    starts = begins - (ends[part_of] - lengths[doc_ids[part_of]])
    return PackIndex(doc_ids[part_of], starts, starts + numpy.diff(edges), begins // cutoff_len)


def one_per_sequence(doc_ids: numpy.ndarray, lengths: numpy.ndarray, cutoff_len: int) -> PackIndex:
    """Gives each document sequences of its own: as many as its length needs."""
    counts = -(-lengths[doc_ids] // cutoff_len)
    repeated = numpy.repeat(doc_ids, counts)
    part = numpy.arange(len(repeated)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    starts = part * cutoff_len
    stops = numpy.minimum(starts + cutoff_len, lengths[repeated])
    return PackIndex(repeated, starts, stops, numpy.arange(len(repeated)))


def pack_best_fit(
    doc_ids: numpy.ndarray,
    token_dataset: ConcatTokenDataset,
    cutoff_len: int,
    packed: bool = True,
    in_order: bool = False,
    keep_last_answer: Template | ChatTemplate | None = None,
) -> PackIndex:
    """Packs complete dialogues into sequences of at most `cutoff_len` tokens by best-fit decreasing.

    A longer dialogue keeps its beginning, and is dropped if that holds no target token. Both are counted.

    Args:
        packed: false gives each dialogue a sequence of its own.
        in_order: keep the order of the dialogues: a sequence ends where the next dialogue does not fit.
        keep_last_answer: given the template, a longer dialogue is truncated by `last_turns` instead.
    """
    starts, heads = numpy.zeros_like(doc_ids), numpy.zeros_like(doc_ids)
    stops = numpy.minimum(token_dataset.lengths[doc_ids], cutoff_len)
    too_long = numpy.flatnonzero(token_dataset.lengths[doc_ids] > cutoff_len)
    dropped = []
    for i in too_long.tolist():
        ids, labels = token_dataset.tokens(int(doc_ids[i]))
        if keep_last_answer:
            heads[i], starts[i], stops[i] = last_turns(ids, cutoff_len, keep_last_answer)
        # The first token of a sequence is never a target.
        if (labels[max(1, starts[i]) : stops[i]] == IGNORE_INDEX).all():
            dropped.append(i)
    doc_ids, starts, stops, heads = (numpy.delete(values, dropped) for values in (doc_ids, starts, stops, heads))
    lengths = heads + stops - starts
    pack = next_fit if in_order else best_fit_decreasing
    bins = pack(lengths, cutoff_len) if packed else numpy.arange(len(doc_ids))
    sorting = numpy.argsort(bins, kind="stable")
    doc_ids, starts, stops, heads = (values[sorting] for values in (doc_ids, starts, stops, heads))
    return PackIndex(doc_ids, starts, stops, bins[sorting], len(too_long), len(dropped), heads)


def last_turns(ids: numpy.ndarray, cutoff_len: int, template: Template | ChatTemplate) -> tuple[int, int, int]:
    """Truncates a dialogue whose last answer alone is trained on; `ids[:head]` and `ids[start:stop]` are kept.

    Complete turns (a question and everything up to the next one) are removed from the front until prefix, system message
    and the remaining turns fit, then the system message. If the last turn alone is too long, its question loses its
    beginning. If the answer itself is too long, its beginning is kept, after up to half a sequence of the question.

    Returns:
        head, start, stop; head + stop - start <= cutoff_len.
    """
    turns, answer = template.find_turns(ids)
    prefix_len = len(template.dialogue_prefix)
    turns = turns if len(turns) else numpy.array([prefix_len])
    for head in (int(turns[0]), prefix_len):
        fitting = turns[head + len(ids) - turns <= cutoff_len]
        if len(fitting):
            return head, int(fitting[0]), len(ids)
    capacity = cutoff_len - head
    start = len(ids) - capacity
    if start > answer:
        start = max(int(turns[-1]), answer - capacity // 2)
    return head, start, start + capacity


def best_fit_decreasing(sizes: numpy.ndarray, capacity: int) -> numpy.ndarray:
    """Assigns each item to a bin: from the largest item down, each goes to the fullest bin that it fits into.

    Bins wait in one stack per amount of free space. Bit k of `available` is set if stack k is not empty, so the lowest set
    bit from `size` on is the best fit.
    """
    bins = numpy.empty(len(sizes), dtype=numpy.int64)
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    available = num_bins = 0
    for item in numpy.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = available >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            chosen = stacks[free].pop()
            if not stacks[free]:
                available ^= 1 << free
        else:
            free, chosen, num_bins = capacity, num_bins, num_bins + 1
        bins[item] = chosen
        stacks[free - size].append(chosen)
        available |= 1 << (free - size)
    return bins


def next_fit(sizes: numpy.ndarray, capacity: int) -> numpy.ndarray:
    """Assigns each item to a bin, in order; a bin is closed when the next item does not fit."""
    bins = numpy.empty(len(sizes), dtype=numpy.int64)
    used = current = 0
    for item, size in enumerate(sizes.tolist()):
        if used + size > capacity:
            used, current = 0, current + 1
        used += size
        bins[item] = current
    return bins


class PackedDataset(TorchDataset):
    """The sequences that a PackIndex describes.

    Args:
        prefix_len: tokens at the beginning of a document that are never targets.
        block_diagonal: false lets attention and positions run across the documents of a sequence.
    """

    def __init__(
        self, token_dataset: ConcatTokenDataset, pack_index: PackIndex, prefix_len: int = 0, block_diagonal: bool = True
    ) -> None:
        self.token_dataset, self.pack_index = token_dataset, pack_index
        self.prefix_len, self.block_diagonal = prefix_len, block_diagonal
        count = int(pack_index.sequence_ids[-1]) + 1 if len(pack_index.sequence_ids) else 0
        self.bounds = numpy.searchsorted(pack_index.sequence_ids, numpy.arange(count + 1))
        self.num_tokens = int(pack_index.lengths.sum())

    @property
    def attention_lengths(self) -> numpy.ndarray:
        """Tokens of each block that attention is computed within."""
        lengths = numpy.asarray(self.pack_index.lengths)
        return lengths if self.block_diagonal else numpy.add.reduceat(lengths, self.bounds[:-1])

    def select_dataset(self, dataset: int) -> "PackedDataset":
        """The parts of these sequences that come from one dataset, given by its index in the ConcatTokenDataset."""
        index = self.pack_index
        selected = self.token_dataset.dataset_indices(index.doc_ids) == dataset
        sequence_ids = numpy.unique(index.sequence_ids[selected], return_inverse=True)[1]
        parts = (index.doc_ids[selected], index.starts[selected], index.stops[selected], sequence_ids)
        heads = numpy.broadcast_to(index.head_lens, selected.shape)[selected]
        selection = PackIndex(*parts, head_lens=heads)
        return PackedDataset(self.token_dataset, selection, self.prefix_len, self.block_diagonal)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, sequence_id: int) -> PackedSequence:
        entries = slice(int(self.bounds[sequence_id]), int(self.bounds[sequence_id + 1]))
        index = self.pack_index
        doc_ids = index.doc_ids[entries]
        heads = numpy.broadcast_to(index.head_lens, index.doc_ids.shape)[entries]
        spans = zip(heads.tolist(), index.starts[entries].tolist(), index.stops[entries].tolist(), strict=True)
        parts = []
        for doc_id, (head, start, stop) in zip(doc_ids.tolist(), spans, strict=True):
            ids, labels = self.token_dataset.tokens(doc_id)
            labels = labels if len(labels) else ids
            if head:
                ids, labels = (numpy.concatenate([values[:head], values[start:stop]]) for values in (ids, labels))
            else:
                ids, labels = ids[start:stop], labels[start:stop]
            labels = labels.astype(numpy.int64)
            labels[: max(1, self.prefix_len - start)] = IGNORE_INDEX  # the first token of a part has no context
            parts.append((ids, labels))
        lengths = [len(ids) for ids, _ in parts]
        blocks = lengths if self.block_diagonal else [sum(lengths)]
        return {
            "input_ids": numpy.concatenate([ids for ids, _ in parts]).astype(numpy.int64),
            "labels": numpy.concatenate([labels for _, labels in parts]),
            "position_ids": numpy.concatenate([numpy.arange(length) for length in blocks]),
            "doc_ids": doc_ids,
        }


class PadToMultiple(TorchDataset):
    """Pads a dataset with empty sequences to a multiple of the global batch size.

    Otherwise the sampler would fill the last batch of an epoch with sequences that have been used already.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.size = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, sequence_id: int) -> PackedSequence:
        sequence_id = range(self.size)[sequence_id]  # an IndexError ends a loop over a dataset without an iterator
        if sequence_id < len(self.dataset):
            return self.dataset[sequence_id]
        return dict.fromkeys(("input_ids", "labels", "position_ids", "doc_ids"), numpy.zeros(0, dtype=numpy.int64))


class PackedDataCollator:
    """Stacks sequences into a `PackedBatch`."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, sequences: list[PackedSequence]) -> PackedBatch:
        lengths = [len(sequence["input_ids"]) for sequence in sequences]
        seq_len = max(2, *lengths)
        input_ids = torch.full((len(sequences), seq_len), self.pad_id)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        position_ids = torch.arange(seq_len).repeat(len(sequences), 1)
        for row, (length, sequence) in enumerate(zip(lengths, sequences, strict=True)):
            input_ids[row, :length] = torch.from_numpy(sequence["input_ids"])
            labels[row, :length] = torch.from_numpy(sequence["labels"])
            position_ids[row, :length] = torch.from_numpy(sequence["position_ids"])
            position_ids[row, length:] -= length
        starts = (position_ids.flatten() == 0).nonzero().flatten()
        cu_seqlens = torch.cat([starts, torch.tensor([position_ids.numel()])])
        loss_indices = (labels[:, 1:].flatten() != IGNORE_INDEX).nonzero().flatten()
        loss_indices += loss_indices // (seq_len - 1)  # a row has one position more than it has next tokens
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": position_ids,
            "loss_indices": loss_indices,
            "seq_lens": cu_seqlens.diff().tolist(),
            "cu_seqlens": cu_seqlens.int(),
            "doc_ids": [sequence["doc_ids"] for sequence in sequences],
            "num_padding": input_ids.numel() - sum(lengths),
        }
