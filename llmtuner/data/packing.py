"""Examples -> sequences without padding in which no document or dialogue sees another.

Six tokens per sequence, documents A (4 tokens) and B (5 tokens); `.` is not trained:

    input_ids     A0 A1 A2 A3 B0 B1 | B2 B3 B4 ...
    labels        .  A1 A2 A3 .  B1 | .  B3 B4 ...     aligned with input_ids; the loss shifts them
    position_ids  0  1  2  3  0  1  | 0  1  2  ...     a position 0 starts a new block of attention

Transformers reads the blocks off `position_ids` when no attention mask is given, so attention is block-diagonal.
"""

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset as TorchDataset

from llmtuner.data.template import IGNORE_INDEX, Template
from llmtuner.data.token_store import TokenizedDataset

Sequence = dict[str, numpy.ndarray]  # input_ids, labels, position_ids: int64 [tokens]; rows: int64 [documents in it]


class ConcatTokenDataset:
    """The rows of several tokenized data sets under one numbering: those of the first, then those of the second, ..."""

    def __init__(self, datasets: list[TokenizedDataset]) -> None:
        self.datasets = datasets
        self.offsets = numpy.cumsum([0, *(len(one.store) for one in datasets)])
        self.lengths = numpy.concatenate([one.store.lengths for one in datasets])
        self.held_out_elsewhere = [0] * len(datasets)
        """Rows of each data set that are not trained on because their text is held out of another one."""

    def locate(self, row: int) -> tuple[TokenizedDataset, int]:
        """The data set that a row of the token_dataset belongs to, and its number there."""
        which = int(numpy.searchsorted(self.offsets, row, side="right")) - 1
        return self.datasets[which], row - int(self.offsets[which])

    def describe_document(self, row: int) -> str:
        """File and line that a row of the token_dataset comes from."""
        examples, number = self.locate(row)
        return f"{examples.name}: {examples.source_of(number)}"


def interleave(
    rows: list[numpy.ndarray],
    weights: numpy.ndarray,
    shares: list[float],
    strategy: str,
    seed: int,
    shuffle: bool = True,
) -> numpy.ndarray:
    """The order in which rows of several data sets are taken.

    `concat` takes all, shuffled. The others keep the shares exact to within one row at every moment: the next row always
    comes from the data set that is furthest below its share. `interleave_under` stops when one set is used up,
    `interleave_over` repeats those that are until every one has been seen.

    Args:
        rows: of each data set, the rows to draw from.
        weights: what each row of the token_dataset counts for: its tokens, its bytes, or 1.
        shuffle: false takes the rows of each data set in their order.
    """
    permute = numpy.random.default_rng(seed).permutation if shuffle else numpy.asarray
    if strategy == "concat":
        return permute(numpy.concatenate(rows))
    used = [(own, share) for own, share in zip(rows, shares, strict=True) if len(own) and share > 0]
    totals = [weights[own].sum() / share for own, share in used]  # how far a set reaches, in weight of the whole mix
    reach = min(totals) if strategy == "interleave_under" else max(totals)
    drawn, keys = [], []
    for (own, share), total in zip(used, totals, strict=True):
        order = numpy.concatenate([permute(own) for _ in range(int(-(-reach // total)))])
        before = (numpy.cumsum(weights[order]) - weights[order]) / share  # what lies below its share, when it is drawn
        keep = before < reach
        drawn.append(order[keep])
        keys.append(before[keep])
    return numpy.concatenate(drawn)[numpy.argsort(numpy.concatenate(keys), kind="stable")]


@dataclass(frozen=True)
class PackIndex:
    """Which part of which row stands where: segment i is tokens `starts[i]:stops[i]` of `rows[i]`, in sequence
    `sequence[i]`; segments of a sequence follow one another."""

    doc_ids: numpy.ndarray
    starts: numpy.ndarray
    stops: numpy.ndarray
    sequence_ids: numpy.ndarray
    num_truncated: int = 0
    """Dialogues longer than a sequence, of which a part is kept."""
    num_dropped: int = 0
    """Dialogues of which the part that fits holds no target token."""
    head_lens: numpy.ndarray | int = 0
    """How many tokens of the beginning of its row precede each segment, as one document with it."""

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each segment, its head included."""
        return self.head_lens + self.stops - self.starts


def concat_and_chunk(order: numpy.ndarray, lengths: numpy.ndarray, cutoff_len: int) -> PackIndex:
    """Documents one after another, cut into sequences of `cutoff_len` tokens; only the last may be shorter.

    A document that does not fit goes on in the next sequence as if it began there. No token is left out.
    """
    ends = numpy.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    edges = numpy.union1d(ends, numpy.arange(0, total, cutoff_len))
    begins = edges[:-1] if len(edges) else edges
    which = numpy.searchsorted(ends, begins, side="right")
    offset = begins - (ends[which] - lengths[order[which]])
    return PackIndex(order[which], offset, offset + numpy.diff(edges), begins // cutoff_len)


def one_per_sequence(order: numpy.ndarray, lengths: numpy.ndarray, cutoff_len: int) -> PackIndex:
    """Each document in sequences of its own: as many as its length needs."""
    counts = -(-lengths[order] // cutoff_len)
    rows = numpy.repeat(order, counts)
    part = numpy.arange(len(rows)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
    starts = part * cutoff_len
    return PackIndex(rows, starts, numpy.minimum(starts + cutoff_len, lengths[rows]), numpy.arange(len(rows)))


def pack_best_fit(
    order: numpy.ndarray,
    token_dataset: ConcatTokenDataset,
    cutoff_len: int,
    packed: bool = True,
    in_order: bool = False,
    keep_last_answer: Template | None = None,
) -> PackIndex:
    """Whole dialogues, packed by best-fit decreasing into sequences of at most `cutoff_len` tokens.

    `in_order` keeps their order instead: a sequence ends where the next dialogue does not fit.

    A dialogue longer than that keeps its beginning; if no target token is in it, it is dropped. Both are counted.

    Args:
        keep_last_answer: given the template, a longer dialogue keeps what `last_turns` says instead.
    """
    starts, heads = numpy.zeros_like(order), numpy.zeros_like(order)
    stops = numpy.minimum(token_dataset.lengths[order], cutoff_len)
    long = numpy.flatnonzero(token_dataset.lengths[order] > cutoff_len)
    dropped = []
    for place in long.tolist():
        ids, labels = _row(token_dataset, int(order[place]))
        if keep_last_answer:
            heads[place], starts[place], stops[place] = last_turns(ids, cutoff_len, keep_last_answer)
        # The first token of a sequence is never a target.
        if (labels[max(1, starts[place]) : stops[place]] == IGNORE_INDEX).all():
            dropped.append(place)
    order, starts, stops, heads = (numpy.delete(values, dropped) for values in (order, starts, stops, heads))
    lengths = heads + stops - starts
    pack = next_fit if in_order else best_fit_decreasing
    bins = pack(lengths, cutoff_len) if packed else numpy.arange(len(order))
    sorting = numpy.argsort(bins, kind="stable")
    order, starts, stops, heads = (values[sorting] for values in (order, starts, stops, heads))
    return PackIndex(order, starts, stops, bins[sorting], len(long), len(dropped), heads)


def last_turns(ids: numpy.ndarray, cutoff_len: int, template: Template) -> tuple[int, int, int]:
    """The part of a dialogue that is kept when only its last answer is trained: `ids[:head]` and `ids[start:stop]`.

    Whole turns (a question, and all that follows up to the next one) are left out from the front until prefix, system
    message and the other turns fit; then the system message too. If the last turn alone is too long, its question loses
    its beginning. If even its answer is too long, that keeps its beginning, behind up to half a sequence of the question.

    Returns:
        head, start, stop; head + stop - start <= cutoff_len.
    """
    turns = numpy.flatnonzero(ids == template.roles["user"])
    turns = turns if len(turns) else numpy.array([len(template.prefix)])
    for head in (int(turns[0]), len(template.prefix)):
        fitting = turns[head + len(ids) - turns <= cutoff_len]
        if len(fitting):
            return head, int(fitting[0]), len(ids)
    room = cutoff_len - head
    answer = int(numpy.flatnonzero(ids == template.roles["assistant"])[-1])
    start = len(ids) - room
    if start > answer:
        start = max(int(turns[-1]), answer - room // 2)
    return head, start, start + room


def best_fit_decreasing(sizes: numpy.ndarray, capacity: int) -> numpy.ndarray:
    """The bin of each item: items are taken from the largest down, each into the fullest bin that has room for it.

    Bins wait in one stack per free space; a bit set of the stacks that are not empty finds the best fit at once.
    """
    bins = numpy.empty(len(sizes), dtype=numpy.int64)
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    some = opened = 0
    for item in numpy.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = some >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            chosen = waiting[free].pop()
            if not waiting[free]:
                some ^= 1 << free
        else:
            free, chosen, opened = capacity, opened, opened + 1
        bins[item] = chosen
        waiting[free - size].append(chosen)
        some |= 1 << (free - size)
    return bins


def next_fit(sizes: numpy.ndarray, capacity: int) -> numpy.ndarray:
    """The bin of each item: items are taken in order, and a bin is closed when the next item does not fit."""
    bins = numpy.empty(len(sizes), dtype=numpy.int64)
    used = current = 0
    for item, size in enumerate(sizes.tolist()):
        if used + size > capacity:
            used, current = 0, current + 1
        used += size
        bins[item] = current
    return bins


class PackedDataset(TorchDataset):
    """The sequences that segments make up.

    Args:
        prefix_len: tokens at the start of a document that are never a target.
        block_diagonal: false lets attention and positions run across the documents of a sequence.
    """

    def __init__(
        self, token_dataset: ConcatTokenDataset, segments: PackIndex, prefix_len: int = 0, block_diagonal: bool = True
    ) -> None:
        self.token_dataset, self.pack_index, self.prefix_len, self.block_diagonal = (
            token_dataset,
            segments,
            prefix_len,
            block_diagonal,
        )
        count = int(segments.sequence_ids[-1]) + 1 if len(segments.sequence_ids) else 0
        self.first = numpy.searchsorted(segments.sequence_ids, numpy.arange(count + 1))
        self.num_tokens = int(segments.lengths.sum())

    def select_dataset(self, place: int) -> "PackedDataset":
        """What one data set of the token_dataset, by its place, gives to these sequences: its segments, where they stand."""
        segments = self.pack_index
        own = numpy.searchsorted(self.token_dataset.offsets, segments.doc_ids, side="right") - 1 == place
        sequence = numpy.unique(segments.sequence_ids[own], return_inverse=True)[1]
        parts = (segments.doc_ids[own], segments.starts[own], segments.stops[own], sequence)
        heads = numpy.broadcast_to(segments.head_lens, own.shape)[own]
        return PackedDataset(
            self.token_dataset, PackIndex(*parts, head_lens=heads), self.prefix_len, self.block_diagonal
        )

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, number: int) -> Sequence:
        places = slice(int(self.first[number]), int(self.first[number + 1]))
        own = self.pack_index
        rows, heads = own.doc_ids[places], numpy.broadcast_to(own.head_lens, own.doc_ids.shape)[places]
        spans = zip(heads.tolist(), own.starts[places].tolist(), own.stops[places].tolist(), strict=True)
        parts = []
        for row, (head, start, stop) in zip(rows.tolist(), spans, strict=True):
            ids, labels = _row(self.token_dataset, row)
            labels = labels if len(labels) else ids
            if head:
                ids, labels = (numpy.concatenate([values[:head], values[start:stop]]) for values in (ids, labels))
            else:
                ids, labels = ids[start:stop], labels[start:stop]
            labels = labels.astype(numpy.int64)
            labels[: max(1, self.prefix_len - start)] = IGNORE_INDEX  # the first token of a part has no context
            parts.append((ids, labels))
        lengths = [len(ids) for ids, _ in parts]
        return {
            "input_ids": numpy.concatenate([ids for ids, _ in parts]).astype(numpy.int64),
            "labels": numpy.concatenate([labels for _, labels in parts]),
            "position_ids": numpy.concatenate([numpy.arange(size) for size in lengths])
            if self.block_diagonal
            else numpy.arange(sum(lengths)),
            "doc_ids": rows,
        }


def _row(token_dataset: ConcatTokenDataset, row: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    examples, number = token_dataset.locate(row)
    return examples.store.ids(number), examples.store.labels(number)


class PadToMultiple(TorchDataset):
    """A data set with empty sequences behind it, up to a multiple of the batch of all processes.

    Without them the last batch of an epoch would be filled with sequences that were trained already.
    """

    def __init__(self, dataset: Any, multiple: int) -> None:
        self.dataset = dataset
        self.size = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Sequence:
        number = range(self.size)[number]  # an IndexError ends a loop over a data set that has no iterator
        if number < len(self.dataset):
            return self.dataset[number]
        nothing = numpy.zeros(0, dtype=numpy.int64)
        return {"input_ids": nothing, "labels": nothing, "position_ids": nothing, "doc_ids": nothing}


class PackedDataCollator:
    """Stacks sequences into a batch; what little padding there is forms blocks of its own and is not trained.

    A batch holds `input_ids`, `labels`, `position_ids`, each int64 (sequences, longest); `trained`, the places in the
    flattened batch whose next token is trained, int64, so that no device has to be asked how many there are; `documents`, of
    each sequence the lengths of the blocks that see one another; `padding`, a number of tokens; and `rows`, the documents of
    each sequence by their number in the token_dataset.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, sequences: list[Sequence]) -> dict[str, Any]:
        longest = max(2, *(len(one["input_ids"]) for one in sequences))
        fillers = {"input_ids": self.pad_id, "labels": IGNORE_INDEX, "position_ids": 0}
        batch: dict[str, Any] = {key: torch.full((len(sequences), longest), filler) for key, filler in fillers.items()}
        batch["position_ids"] += torch.arange(longest)
        for place, one in enumerate(sequences):
            size = len(one["input_ids"])
            for key in fillers:
                batch[key][place, :size] = torch.from_numpy(one[key])
            batch["position_ids"][place, size:] -= size
        batch["loss_indices"] = (batch["labels"][:, 1:].flatten() != IGNORE_INDEX).nonzero().flatten()
        batch["loss_indices"] += batch["loss_indices"] // (
            longest - 1
        )  # a sequence has one place more than it has next tokens
        batch["seq_lens"] = [_block_lengths(positions) for positions in batch["position_ids"].numpy()]
        batch["num_padding"] = sum(longest - len(one["input_ids"]) for one in sequences)
        batch["doc_ids"] = [one["doc_ids"] for one in sequences]
        return batch


def _block_lengths(positions: numpy.ndarray) -> list[int]:
    return numpy.diff(numpy.append(numpy.flatnonzero(positions == 0), len(positions))).tolist()
