"""Examples -> sequences without padding in which no document or dialogue sees another.

Six tokens per sequence, documents A (4 tokens) and B (5 tokens); `.` is not trained:

    input_ids     A0 A1 A2 A3 B0 B1 | B2 B3 B4 ...
    labels        .  A1 A2 A3 .  B1 | .  B3 B4 ...     aligned with input_ids; the loss shifts them
    position_ids  0  1  2  3  0  1  | 0  1  2  ...     a position 0 starts a new block of attention

Transformers reads the blocks off `position_ids` when no attention mask is given, so attention is block-diagonal.
"""

import bisect
from typing import Any

import numpy
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Dataset as TorchDataset

from llmtuner.data.template import IGNORE

Sequence = dict[str, numpy.ndarray]  # input_ids, labels, position_ids: int64, one dimension, at most cutoff_len


def example_lengths(examples: Dataset) -> numpy.ndarray:
    """Tokens of each example, read from the Arrow offsets without touching the tokens."""
    import pyarrow.compute

    if not len(examples):
        return numpy.zeros(0, dtype=numpy.int64)
    return (
        pyarrow.compute.list_value_length(examples.with_format("arrow")["input_ids"][:]).to_numpy().astype(numpy.int64)
    )


def mix(lengths: list[numpy.ndarray], shares: list[float], strategy: str, seed: int) -> list[tuple[int, int]]:
    """The order in which examples of several data sets are taken, as (data set, example).

    `concat` takes all, shuffled. The others keep the shares of tokens exact to within one example at every moment: the
    next example comes from the data set that is furthest below its share. `interleave_under` stops when one is used up,
    `interleave_over` repeats those that are until every one has been seen.
    """
    rng = numpy.random.default_rng(seed)
    orders = [rng.permutation(len(own)) for own in lengths]
    if strategy == "concat":
        pairs = [(which, int(index)) for which, order in enumerate(orders) for index in order]
        return [pairs[index] for index in rng.permutation(len(pairs))]
    taken = [0] * len(lengths)  # tokens
    position = [0] * len(lengths)  # examples
    rounds = [0] * len(lengths)
    drawn: list[tuple[int, int]] = []
    active = [which for which, share in enumerate(shares) if share > 0 and len(lengths[which])]
    while active:
        which = min(active, key=lambda one: taken[one] / shares[one])
        index = int(orders[which][position[which]])
        drawn.append((which, index))
        taken[which] += int(lengths[which][index])
        position[which] += 1
        if position[which] == len(lengths[which]):
            rounds[which] += 1
            if strategy == "interleave_under" or all(rounds[one] for one in active):
                break
            position[which] = 0
            orders[which] = rng.permutation(len(lengths[which]))
    return drawn


class DocumentBlocks(TorchDataset):
    """Documents one after another in a given order, cut into sequences of `cutoff_len` tokens.

    A document that does not fit goes on in the next sequence as if it began there. The last sequence may be shorter.
    """

    def __init__(
        self, sets: list[Dataset], order: list[tuple[int, int]], cutoff_len: int, untrained: list[int]
    ) -> None:
        starts = numpy.cumsum([0] + [len(one) for one in sets])
        self.examples = concatenate_datasets(sets).with_format("numpy", columns=["input_ids"])
        self.order = numpy.array([starts[which] + index for which, index in order], dtype=numpy.int64)
        lengths = numpy.concatenate([example_lengths(one) for one in sets])
        self.ends = numpy.cumsum(lengths[self.order])
        self.cutoff_len = cutoff_len
        self.untrained = untrained  # ids that are never a target: the prefix
        self.tokens = int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return -(-self.tokens // self.cutoff_len)

    def __getitem__(self, number: int) -> Sequence:
        begin, end = number * self.cutoff_len, min((number + 1) * self.cutoff_len, self.tokens)
        parts = []
        which = int(numpy.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            ids = self.examples[int(self.order[which])]["input_ids"].astype(numpy.int64)
            skip = begin - (int(self.ends[which]) - len(ids))
            ids = ids[skip : skip + end - begin]
            parts.append((ids, numpy.where(numpy.isin(ids, self.untrained), IGNORE, ids)))
            begin += len(ids)
            which += 1
        return join(parts)


class DialogueBins(TorchDataset):
    """Whole dialogues, packed by best-fit decreasing into sequences of at most `cutoff_len` tokens.

    A dialogue longer than that is cut at its end; one that has no trained token left is dropped. Both are counted.
    """

    def __init__(self, sets: list[Dataset], order: list[tuple[int, int]], cutoff_len: int) -> None:
        starts = numpy.cumsum([0] + [len(one) for one in sets])
        self.examples = concatenate_datasets(sets).with_format("numpy", columns=["input_ids", "labels"])
        self.cutoff_len = cutoff_len
        lengths = numpy.concatenate([example_lengths(one) for one in sets])
        chosen, self.cut, self.dropped = [], 0, 0
        for which, index in order:
            row = int(starts[which] + index)
            if lengths[row] > cutoff_len:
                self.cut += 1
                if (self.examples[row]["labels"][:cutoff_len] == IGNORE).all():
                    self.dropped += 1
                    continue
            chosen.append(row)
        cut_lengths = numpy.minimum(lengths, cutoff_len)
        self.bins = best_fit_decreasing([(int(cut_lengths[row]), row) for row in chosen], cutoff_len)
        self.tokens = int(cut_lengths[chosen].sum())

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, number: int) -> Sequence:
        rows = [self.examples[row] for row in self.bins[number]]
        cut = slice(self.cutoff_len)
        return join(
            [(row["input_ids"][cut].astype(numpy.int64), row["labels"][cut].astype(numpy.int64)) for row in rows]
        )


def join(parts: list[tuple[numpy.ndarray, numpy.ndarray]]) -> Sequence:
    """Puts (ids, labels) behind one another; the first token of each part has no context, so it is not trained."""
    labels = [numpy.concatenate([[IGNORE], own[1:]]) for _, own in parts]
    return {
        "input_ids": numpy.concatenate([ids for ids, _ in parts]),
        "labels": numpy.concatenate(labels),
        "position_ids": numpy.concatenate([numpy.arange(len(ids)) for ids, _ in parts]),
    }


def best_fit_decreasing(items: list[tuple[int, int]], capacity: int) -> list[list[int]]:
    """Packs (size, item) pairs into bins, each item, largest first, into the fullest bin that still has room for it."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin), sorted
    for size, item in sorted(items, key=lambda pair: -pair[0]):
        place = bisect.bisect_left(room, (size, -1))
        if place == len(room):
            free, target = capacity, len(bins)
            bins.append([])
        else:
            free, target = room.pop(place)
        bins[target].append(item)
        bisect.insort(room, (free - size, target))
    return bins


class PackedCollator:
    """Stacks sequences into `(batch, longest)` tensors; what little padding there is forms blocks of its own, untrained."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.tokens = 0
        self.padding = 0

    def __call__(self, sequences: list[Sequence]) -> dict[str, Any]:
        longest = max(len(one["input_ids"]) for one in sequences)
        batch: dict[str, list[numpy.ndarray]] = {"input_ids": [], "labels": [], "position_ids": []}
        for one in sequences:
            missing = longest - len(one["input_ids"])
            self.tokens += longest
            self.padding += missing
            fillers = {
                "input_ids": numpy.full(missing, self.pad_id),
                "labels": numpy.full(missing, IGNORE),
                "position_ids": numpy.arange(missing),
            }
            for key, filler in fillers.items():
                batch[key].append(numpy.concatenate([one[key], filler]))
        return {key: torch.from_numpy(numpy.stack(rows)) for key, rows in batch.items()}
