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

from llmtuner.tokenizer.fast import NORMAL, SPACE, encode_sentencepiece
from llmtuner.tokenizer.merge_vocab import to_processor
from llmtuner.tokenizer.writing_systems import ALL_CHARACTERS, WritingSystem, find_strings

MAX_TOKEN_LENGTH = 16  # characters; sentencepiece's own default
BATCH_SIZE = 4_096  # lines handed to sentencepiece at once
BOUNDARY = 0  # a token that nothing may join: <unk>, which stands for what no piece may hold
MERGED = -1  # a token that has been joined to the one before it


@dataclass(frozen=True)
class SegmentedCorpus:
    """Text as the base tokenizer splits it, and what learning must know of it."""

    tokens: np.ndarray
    """int32: ids; `BOUNDARY` between lines and instead of runs of pieces that cannot be part of a new one."""
    id_to_token: list[str]
    """id -> piece; behind the base's come the characters of the script that the base spells in bytes."""
    base_vocab_size: int
    """Number of the base's ids."""
    uncommon_runs: Counter[str]
    """Runs of shared characters that the other language does not write, with how often they occur."""


def segment_corpus(base: Any, lines: Iterable[str], writing_system: WritingSystem) -> SegmentedCorpus:
    """Splits lines by the base tokenizer; 4 bytes of memory for each token.

    Args:
        base: sentencepiece model (`read_sentencepiece`).
        lines: read once, as a stream.
    """
    # Characters without a piece become temporary ones, so that each is one token and not its three bytes.
    known = {piece.piece for piece in base.pieces}
    spelled_in_bytes = [
        letter for letter in writing_system.letter_pattern.findall(ALL_CHARACTERS) if letter not in known
    ]
    extended = type(base)()
    extended.CopyFrom(base)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL)
    for rank, letter in enumerate(spelled_in_bytes, start=1):
        extended.pieces.add(piece=letter, score=lowest - rank, type=NORMAL)
    processor = to_processor(extended)

    id_to_token = [piece.piece if piece.type == NORMAL else "" for piece in extended.pieces]
    usable = np.array([bool(name) and writing_system.token_pattern.fullmatch(name) is not None for name in id_to_token])
    uncommon_runs: Counter[str] = Counter()
    parts = [np.zeros(1, np.int32)]
    stream = iter(lines)
    while batch := list(islice(stream, BATCH_SIZE)):
        ids = np.fromiter(
            (index for line in encode_sentencepiece(processor, batch) for index in (*line, BOUNDARY)), np.int32
        )
        ids[~usable[ids]] = BOUNDARY
        repeated = (ids[1:] == BOUNDARY) & (ids[:-1] == BOUNDARY)
        parts.append(ids[np.concatenate([[True], ~repeated])])
        uncommon_runs.update(
            run
            for run in writing_system.shared_run_pattern.findall("\n".join(batch))
            if writing_system.has_uncommon(run)
        )
    return SegmentedCorpus(np.concatenate(parts), id_to_token, len(base.pieces), uncommon_runs)


def uncommon_strings(runs: Counter[str], writing_system: WritingSystem, min_count: int) -> set[str]:
    """The parts of some runs of shared characters that may become pieces if the other language does not write them.

    Args:
        min_count: how often a string must occur.
    """
    times: Counter[str] = Counter()
    for run, count in runs.items():
        for start in range(len(run)):
            for end in range(start + 1, min(len(run), start + MAX_TOKEN_LENGTH) + 1):
                if writing_system.has_uncommon(run[start:end]):
                    times[run[start:end]] += count
    return {string for string, count in times.items() if count >= min_count}


def initial_min_count(lines: SegmentedCorpus) -> int:
    """Pairs rarer than this are not looked at, at first: among six million tokens the 14,000th piece occurs 29 times."""
    return max(2, len(lines.tokens) // 400_000)


def train_continued_bpe(
    lines: SegmentedCorpus, count: int, writing_system: WritingSystem, reference: Iterable[str]
) -> Iterator[str]:
    """Yields new pieces in the order in which they are to rank; fewer than `count` if the text holds no more.

    Args:
        lines: from `segment_corpus`; their tokens are used up.
        reference: text of the other language, read as a stream: what it holds does not become a piece.
    """
    strings = uncommon_strings(lines.uncommon_runs, writing_system, initial_min_count(lines))
    yield from ContinuedBPE(
        lines, count, writing_system, strings - find_strings(strings, reference, writing_system)
    ).train()


Pair = tuple[int, int, np.ndarray]  # left id, right id, places of the left one


class ContinuedBPE:
    """Learns pieces from `SegmentedCorpus`, the most frequent pair of neighbours first."""

    def __init__(self, lines: SegmentedCorpus, count: int, writing_system: WritingSystem, unseen: set[str]) -> None:
        """Takes over the tokens of `lines`.

        Args:
            count: pieces wanted.
            unseen: strings of shared characters alone that may become pieces.
        """
        self.writing_system, self.unseen, self.count = writing_system, unseen, count
        self.id_to_token, self.base_vocab_size, self.first_new = (
            list(lines.id_to_token),
            lines.base_vocab_size,
            len(lines.id_to_token),
        )
        self.token_to_id = {name: index for index, name in enumerate(self.id_to_token) if name}
        self.tokens = lines.tokens
        self.min_count = initial_min_count(lines)
        size = len(self.id_to_token) + count
        self.exclusive, self.shared, self.starts_with_space = (np.zeros(size, bool) for _ in range(3))
        self.length = np.zeros(size, np.int32)
        for index, name in enumerate(self.id_to_token):
            self._register(index, name)
        # What the other language writes in bytes stays in bytes, and nothing can be built on it.
        temporary = np.arange(len(self.id_to_token)) >= self.base_vocab_size
        allowed = self.exclusive[: len(self.id_to_token)] | np.array([name in unseen for name in self.id_to_token])
        self.tokens[(temporary & ~allowed)[self.tokens]] = BOUNDARY

    def _register(self, index: int, name: str) -> None:
        body = name.removeprefix(SPACE)
        self.exclusive[index] = self.writing_system.exclusive_pattern.search(name) is not None
        self.shared[index] = not body or self.writing_system.shared_run_pattern.fullmatch(body) is not None
        self.starts_with_space[index] = name.startswith(SPACE)
        self.length[index] = len(name)

    def train(self) -> Iterator[str]:
        """Yields pieces in the order in which they are to rank; fewer than wanted if the text holds no more."""
        self.learned: set[str] = set()
        while True:
            self._collect_pairs()
            while len(self.learned) < self.count and (piece := self._next_token()):
                self.learned.add(piece)
                yield piece
            if len(self.learned) == self.count or self.min_count == 2:
                return
            self.min_count = max(2, self.min_count // 4)

    def _collect_pairs(self) -> None:
        """Finds every pair that occurs often enough, and every character that is worth a piece."""
        self.tokens = self.tokens[self.tokens != MERGED]
        size = len(self.tokens)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.previous = np.arange(-1, size - 1, dtype=np.int32)
        self.pairs: dict[str, list[Pair]] = {}  # a string and all the ways in which it stands in the text as two tokens
        self.pending_merges: dict[
            int, list[Pair]
        ] = {}  # id -> pairs that make this piece: sentencepiece would join them
        times = np.bincount(self.tokens, minlength=self.first_new)
        # A character spelled in bytes costs two tokens or more than its piece, so it comes before all pairs that hold it.
        self.heap = [
            (-int(times[index]) * (len(self.id_to_token[index].encode()) - 1), self.id_to_token[index])
            for index in range(self.base_vocab_size, self.first_new)
            if times[index] >= self.min_count and self.id_to_token[index] not in self.learned
        ]
        heapq.heapify(self.heap)
        places = np.nonzero(self._can_merge(self.tokens[:-1], self.tokens[1:]))[0].astype(np.int32)
        for pair, where in _group_by_key(
            (self.tokens[places].astype(np.int64) << 32) | self.tokens[places + 1], self.min_count
        ):
            self._add_pair(pair >> 32, pair & 0xFFFFFFFF, places[where])
        self._apply_pending()

    def _can_merge(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Which pairs of ids could be a piece by their characters."""
        pure = self.exclusive[left] | self.exclusive[right] | (self.shared[left] & self.shared[right])
        fits = self.length[left] + self.length[right] <= MAX_TOKEN_LENGTH
        return (left > BOUNDARY) & (right > BOUNDARY) & ~self.starts_with_space[right] & pure & fits

    def _add_pair(self, left: int, right: int, places: np.ndarray) -> None:
        """Notes a pair: as a candidate, or to be joined if it makes a piece that exists."""
        name = self.id_to_token[left] + self.id_to_token[right]
        if name in self.token_to_id:  # however rare, sentencepiece would join it
            self.pending_merges.setdefault(self.token_to_id[name], []).append((left, right, places))
        elif len(places) < self.min_count:
            return
        elif self.exclusive[left] or self.exclusive[right] or name.removeprefix(SPACE) in self.unseen:
            pairs = self.pairs.setdefault(name, [])
            pairs.append((left, right, places))
            heapq.heappush(self.heap, (-_count(pairs), name))

    def _next_token(self) -> str | None:
        """Makes a piece of the candidate that occurs most often now, and joins it in the text."""
        while self.heap:
            name = heapq.heappop(self.heap)[1]
            if name in self.learned:
                continue
            if name in self.token_to_id:  # a character in bytes, one token already
                return name
            # Other joins have taken some of its places meanwhile: it may have to wait.
            pairs = [
                (left, right, self._still_adjacent(left, right, places)) for left, right, places in self.pairs[name]
            ]
            self.pairs[name] = pairs
            if (count := _count(pairs)) < self.min_count:
                continue
            if self.heap and (-count, name) > self.heap[0]:
                heapq.heappush(self.heap, (-count, name))
                continue
            del self.pairs[name]
            self.token_to_id[name] = len(self.id_to_token)
            self._register(len(self.id_to_token), name)
            self.id_to_token.append(name)
            self.pending_merges[self.token_to_id[name]] = pairs
            self._apply_pending()
            return name
        return None

    def _still_adjacent(self, left: int, right: int, places: np.ndarray) -> np.ndarray:
        return places[(self.tokens[places] == left) & (self.tokens[self.next[places]] == right)]

    def _apply_pending(self) -> None:
        while self.pending_merges:
            new = min(self.pending_merges)  # older pieces rank higher
            self._merge_pairs(new, self.pending_merges.pop(new))

    def _merge_pairs(self, new: int, pairs: list[Pair]) -> None:
        """Joins all pairs that make a piece wherever they still stand, from the left, and notes the pairs that come about."""
        standing = [self._still_adjacent(left, right, places) for left, right, places in pairs]
        places = _drop_overlaps(np.unique(np.concatenate(standing)), self.next)
        seconds = self.next[places]
        after = self.next[seconds]
        self.tokens[places], self.tokens[seconds] = new, MERGED
        self.next[places], self.previous[after] = after, places
        following, before = self.tokens[after], self.previous[places]
        ids = np.full(len(places), new)
        where = np.nonzero(self._can_merge(ids, following))[0]
        for right_id, group in _group_by_key(following[where]):
            self._add_pair(new, right_id, places[where[group]])
        # Where two stand in a row, the pair was noted above, with the first one.
        leading = self.tokens[before]
        where = np.nonzero(self._can_merge(leading, ids) & ~np.isin(before, places, assume_unique=True))[0]
        for left_id, group in _group_by_key(leading[where]):
            self._add_pair(left_id, new, before[where[group]])


def _count(pairs: list[Pair]) -> int:
    return sum(len(places) for _, _, places in pairs)


def _group_by_key(keys: np.ndarray, min_count: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each key that occurs at least so often, and where it does."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    keys = keys[order]
    starts = np.nonzero(np.diff(keys, prepend=-1))[0]
    ends = np.append(starts[1:], len(keys))
    for group in np.nonzero(ends - starts >= min_count)[0]:
        yield int(keys[starts[group]]), order[starts[group] : ends[group]]


def _drop_overlaps(places: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Of pairs that begin at some places (rising), those that joining from the left finds: each token is joined once."""
    number = np.arange(len(places))
    linked = np.zeros(len(places), bool)
    linked[1:] = following[places[:-1]] == places[1:]
    start = np.maximum.accumulate(np.where(linked, 0, number))
    return places[(number - start) % 2 == 0]
