"""Continued BPE: learns new pieces on top of a tokenizer's own segmentation, so that none is dead and few are wasted.

sentencepiece trains from characters, and a merge into another vocabulary then meets merges it did not know of. Here the
text is first split by the base tokenizer, and the pairs of neighbouring pieces that occur most often become pieces, one
after the other (continued BPE, arXiv 2512.03989). Ranked below every native piece, they join exactly what they joined in
training.

        base    お | 茶 | を | 飲 | み | ま | した | 。
        learned お | 茶 | を | 飲 | み | ました。             (ま+した, then ました+。)

All tokens of the text lie in one array, as a doubly linked list, so that the places of a pair can be joined at once.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from llmtuner.tokenizer.fast import NORMAL, SPACE, encode_by
from llmtuner.tokenizer.merging import processor_of
from llmtuner.tokenizer.scripts import ALPHABET, Script, strings_seen

LONGEST_PIECE = 16  # characters; sentencepiece's own default
BATCH = 4_096  # lines handed to sentencepiece at once
END = 0  # a token that nothing may join: <unk>, which stands for what no piece may hold
GONE = -1  # a token that has been joined to the one before it


@dataclass(frozen=True)
class Lines:
    """Text as the base tokenizer splits it, and what learning must know of it."""

    tokens: np.ndarray
    """int32: ids; `END` between lines and instead of runs of pieces that cannot be part of a new one."""
    names: list[str]
    """id -> piece; behind the base's come the characters of the script that the base spells in bytes."""
    native: int
    """Number of the base's ids."""
    shared_runs: Counter[str]
    """Runs of shared characters that the other language does not write, with how often they occur."""


def read_lines(base: Any, lines: Iterable[str], script: Script) -> Lines:
    """Splits lines by the base tokenizer; 4 bytes of memory for each token.

    Args:
        base: sentencepiece model (`read_model`).
        lines: read once, as a stream.
    """
    # Characters without a piece become temporary ones, so that each is one token and not its three bytes.
    known = {piece.piece for piece in base.pieces}
    spelled_in_bytes = [letter for letter in script.letters.findall(ALPHABET) if letter not in known]
    extended = type(base)()
    extended.CopyFrom(base)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL)
    for rank, letter in enumerate(spelled_in_bytes, start=1):
        extended.pieces.add(piece=letter, score=lowest - rank, type=NORMAL)
    processor = processor_of(extended)

    names = [piece.piece if piece.type == NORMAL else "" for piece in extended.pieces]
    usable = np.array([bool(name) and script.writable.fullmatch(name) is not None for name in names])
    shared_runs: Counter[str] = Counter()
    parts = [np.zeros(1, np.int32)]
    stream = iter(lines)
    while batch := list(islice(stream, BATCH)):
        ids = np.fromiter((index for line in encode_by(processor, batch) for index in (*line, END)), np.int32)
        ids[~usable[ids]] = END
        repeated = (ids[1:] == END) & (ids[:-1] == END)
        parts.append(ids[np.concatenate([[True], ~repeated])])
        shared_runs.update(run for run in script.shared_run.findall("\n".join(batch)) if script.stranger(run))
    return Lines(np.concatenate(parts), names, len(base.pieces), shared_runs)


def shared_strings(runs: Counter[str], script: Script, least: int) -> set[str]:
    """The parts of some runs of shared characters that may become pieces if the other language does not write them.

    Args:
        least: how often a string must occur.
    """
    times: Counter[str] = Counter()
    for run, count in runs.items():
        for start in range(len(run)):
            for end in range(start + 1, min(len(run), start + LONGEST_PIECE) + 1):
                if script.stranger(run[start:end]):
                    times[run[start:end]] += count
    return {string for string, count in times.items() if count >= least}


def least_count(lines: Lines) -> int:
    """Pairs rarer than this are not looked at, at first: among six million tokens the 14,000th piece occurs 29 times."""
    return max(2, len(lines.tokens) // 400_000)


def learn_pieces(lines: Lines, count: int, script: Script, reference: Iterable[str]) -> Iterator[str]:
    """Yields new pieces in the order in which they are to rank; fewer than `count` if the text holds no more.

    Args:
        lines: from `read_lines`; their tokens are used up.
        reference: text of the other language, read as a stream: what it holds does not become a piece.
    """
    strings = shared_strings(lines.shared_runs, script, least_count(lines))
    yield from ContinuedBPE(lines, count, script, strings - strings_seen(strings, reference, script)).learn()


Pair = tuple[int, int, np.ndarray]  # left id, right id, places of the left one


class ContinuedBPE:
    """Learns pieces from `Lines`, the most frequent pair of neighbours first."""

    def __init__(self, lines: Lines, count: int, script: Script, unseen: set[str]) -> None:
        """Takes over the tokens of `lines`.

        Args:
            count: pieces wanted.
            unseen: strings of shared characters alone that may become pieces.
        """
        self.script, self.unseen, self.count = script, unseen, count
        self.names, self.native, self.first_new = list(lines.names), lines.native, len(lines.names)
        self.ids = {name: index for index, name in enumerate(self.names) if name}
        self.tokens = lines.tokens
        self.least = least_count(lines)
        size = len(self.names) + count
        self.own, self.shared, self.blank = (np.zeros(size, bool) for _ in range(3))
        self.length = np.zeros(size, np.int32)
        for index, name in enumerate(self.names):
            self._describe(index, name)
        # What the other language writes in bytes stays in bytes, and nothing can be built on it.
        temporary = np.arange(len(self.names)) >= self.native
        allowed = self.own[: len(self.names)] | np.array([name in unseen for name in self.names])
        self.tokens[(temporary & ~allowed)[self.tokens]] = END

    def _describe(self, index: int, name: str) -> None:
        body = name.removeprefix(SPACE)
        self.own[index] = self.script.has_own.search(name) is not None
        self.shared[index] = not body or self.script.shared_run.fullmatch(body) is not None
        self.blank[index] = name.startswith(SPACE)
        self.length[index] = len(name)

    def learn(self) -> Iterator[str]:
        """Yields pieces in the order in which they are to rank; fewer than wanted if the text holds no more."""
        self.learned: set[str] = set()
        while True:
            self._gather()
            while len(self.learned) < self.count and (piece := self._most_frequent()):
                self.learned.add(piece)
                yield piece
            if len(self.learned) == self.count or self.least == 2:
                return
            self.least = max(2, self.least // 4)

    def _gather(self) -> None:
        """Finds every pair that occurs often enough, and every character that is worth a piece."""
        self.tokens = self.tokens[self.tokens != GONE]
        size = len(self.tokens)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.previous = np.arange(-1, size - 1, dtype=np.int32)
        self.pairs: dict[str, list[Pair]] = {}  # a string and all the ways in which it stands in the text as two tokens
        self.due: dict[int, list[Pair]] = {}  # id -> pairs that make this piece: sentencepiece would join them
        times = np.bincount(self.tokens, minlength=self.first_new)
        # A character spelled in bytes costs two tokens or more than its piece, so it comes before all pairs that hold it.
        self.heap = [
            (-int(times[index]) * (len(self.names[index].encode()) - 1), self.names[index])
            for index in range(self.native, self.first_new)
            if times[index] >= self.least and self.names[index] not in self.learned
        ]
        heapq.heapify(self.heap)
        places = np.nonzero(self._may_join(self.tokens[:-1], self.tokens[1:]))[0].astype(np.int32)
        for pair, where in _groups((self.tokens[places].astype(np.int64) << 32) | self.tokens[places + 1], self.least):
            self._offer(pair >> 32, pair & 0xFFFFFFFF, places[where])
        self._join_due()

    def _may_join(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Which pairs of ids could be a piece by their characters."""
        pure = self.own[left] | self.own[right] | (self.shared[left] & self.shared[right])
        fits = self.length[left] + self.length[right] <= LONGEST_PIECE
        return (left > END) & (right > END) & ~self.blank[right] & pure & fits

    def _offer(self, left: int, right: int, places: np.ndarray) -> None:
        """Notes a pair: as a candidate, or to be joined if it makes a piece that exists."""
        name = self.names[left] + self.names[right]
        if name in self.ids:  # however rare, sentencepiece would join it
            self.due.setdefault(self.ids[name], []).append((left, right, places))
        elif len(places) < self.least:
            return
        elif self.own[left] or self.own[right] or name.removeprefix(SPACE) in self.unseen:
            pairs = self.pairs.setdefault(name, [])
            pairs.append((left, right, places))
            heapq.heappush(self.heap, (-_count(pairs), name))

    def _most_frequent(self) -> str | None:
        """Makes a piece of the candidate that occurs most often now, and joins it in the text."""
        while self.heap:
            name = heapq.heappop(self.heap)[1]
            if name in self.learned:
                continue
            if name in self.ids:  # a character in bytes, one token already
                return name
            # Other joins have taken some of its places meanwhile: it may have to wait.
            pairs = [(left, right, self._standing(left, right, places)) for left, right, places in self.pairs[name]]
            self.pairs[name] = pairs
            if (count := _count(pairs)) < self.least:
                continue
            if self.heap and (-count, name) > self.heap[0]:
                heapq.heappush(self.heap, (-count, name))
                continue
            del self.pairs[name]
            self.ids[name] = len(self.names)
            self._describe(len(self.names), name)
            self.names.append(name)
            self.due[self.ids[name]] = pairs
            self._join_due()
            return name
        return None

    def _standing(self, left: int, right: int, places: np.ndarray) -> np.ndarray:
        return places[(self.tokens[places] == left) & (self.tokens[self.next[places]] == right)]

    def _join_due(self) -> None:
        while self.due:
            new = min(self.due)  # older pieces rank higher
            self._join(new, self.due.pop(new))

    def _join(self, new: int, pairs: list[Pair]) -> None:
        """Joins all pairs that make a piece wherever they still stand, from the left, and notes the pairs that come about."""
        standing = [self._standing(left, right, places) for left, right, places in pairs]
        places = _without_overlaps(np.unique(np.concatenate(standing)), self.next)
        seconds = self.next[places]
        after = self.next[seconds]
        self.tokens[places], self.tokens[seconds] = new, GONE
        self.next[places], self.previous[after] = after, places
        following, before = self.tokens[after], self.previous[places]
        ids = np.full(len(places), new)
        where = np.nonzero(self._may_join(ids, following))[0]
        for right_id, group in _groups(following[where]):
            self._offer(new, right_id, places[where[group]])
        # Where two stand in a row, the pair was noted above, with the first one.
        leading = self.tokens[before]
        where = np.nonzero(self._may_join(leading, ids) & ~np.isin(before, places, assume_unique=True))[0]
        for left_id, group in _groups(leading[where]):
            self._offer(left_id, new, before[where[group]])


def _count(pairs: list[Pair]) -> int:
    return sum(len(places) for _, _, places in pairs)


def _groups(keys: np.ndarray, least: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each key that occurs at least so often, and where it does."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    keys = keys[order]
    starts = np.nonzero(np.diff(keys, prepend=-1))[0]
    ends = np.append(starts[1:], len(keys))
    for group in np.nonzero(ends - starts >= least)[0]:
        yield int(keys[starts[group]]), order[starts[group] : ends[group]]


def _without_overlaps(places: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Of pairs that begin at some places (rising), those that joining from the left finds: each token is joined once."""
    number = np.arange(len(places))
    linked = np.zeros(len(places), bool)
    linked[1:] = following[places[:-1]] == places[1:]
    start = np.maximum.accumulate(np.where(linked, 0, number))
    return places[(number - start) % 2 == 0]
