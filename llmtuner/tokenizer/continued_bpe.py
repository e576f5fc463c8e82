"""Continued BPE: trains new tokens on top of the base tokenizer's segmentation, so that all are reachable and few are wasted.

sentencepiece trains from characters, so its tokens meet unknown merges once they are added to another vocabulary. Here the text
is first segmented by the base tokenizer, and the most frequent pairs of adjacent tokens become new tokens, one after the other
(continued BPE, arXiv 2512.03989). Ranked below the base vocabulary, they merge exactly what they merged in training.

        base      お | 茶 | を | 飲 | み | ま | した | 。
        continued お | 茶 | を | 飲 | み | ました。             (ま+した, then ました+。)

All tokens of the text are in one array, as a doubly linked list, so that all positions of a pair can be merged at once.
In byte-level BPE a token may begin or end inside a character; a new token spells complete characters only, or the leading
bytes that only characters of the new language's script begin with (`partial_bytes`).
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llmtuner.tokenizer.chatglm3 import SPACE
from llmtuner.tokenizer.vocab import BOUNDARY, Vocab
from llmtuner.tokenizer.writing_systems import ALL_CHARACTERS, WritingSystem, find_strings, partial_bytes

MAX_TOKEN_LENGTH = 16  # characters; sentencepiece's default
BATCH_SIZE = 4_096  # lines encoded at once
MERGED = -1  # a token that has been merged into the one before it


@dataclass(frozen=True)
class SegmentedCorpus:
    """Text as the base tokenizer segments it."""

    tokens: np.ndarray
    """int32: ids; `BOUNDARY` between lines and in place of runs of tokens that cannot be part of a new one."""
    vocab: Vocab
    """The base, followed by the characters of the writing system that it encodes as the bytes of byte fallback."""
    base_vocab_size: int
    uncommon_runs: Counter[str]
    """Runs of shared characters that the other language does not write, with their frequencies."""


def segment_corpus(base: Vocab, lines: Iterable[str], writing_system: WritingSystem) -> SegmentedCorpus:
    """Segments lines with the base tokenizer; needs 4 bytes of memory per token.

    Args:
        lines: read once, as a stream.
    """
    # Characters in bytes become temporary tokens, so that each is one token and not its three bytes.
    vocab = base.append(
        base.missing_characters(writing_system.letter_pattern.findall(ALL_CHARACTERS)), after_special=False
    )
    texts = [vocab.text(token) for token in vocab.tokens]
    usable = np.array([text is None or bool(text and writing_system.token_pattern.fullmatch(text)) for text in texts])
    usable[BOUNDARY] = False
    uncommon_runs: Counter[str] = Counter()
    parts = [np.zeros(1, np.int32)]
    stream = iter(lines)
    while batch := list(islice(stream, BATCH_SIZE)):
        ids = vocab.segment(batch)
        ids[~usable[ids]] = BOUNDARY
        repeated = (ids[1:] == BOUNDARY) & (ids[:-1] == BOUNDARY)
        parts.append(ids[np.concatenate([[True], ~repeated])])
        uncommon_runs.update(writing_system.uncommon_runs("\n".join(batch)))
    return SegmentedCorpus(np.concatenate(parts), vocab, len(base.tokens), uncommon_runs)


def train_continued_bpe(
    corpus: SegmentedCorpus, count: int, writing_system: WritingSystem, reference: Iterable[str]
) -> Iterator[str]:
    """Yields new tokens by rank; fewer than `count` if the text has no more.

    Args:
        corpus: from `segment_corpus`; its tokens are overwritten.
        reference: text of the other language, read as a stream: strings that occur in it do not become tokens.
    """
    strings = uncommon_strings(corpus.uncommon_runs, writing_system, initial_min_count(corpus))
    allowed = strings - find_strings(strings, reference, writing_system)
    yield from ContinuedBPE(corpus, count, writing_system, allowed).train()


def uncommon_strings(runs: Counter[str], writing_system: WritingSystem, min_count: int) -> set[str]:
    """The substrings of runs of shared characters that may become tokens if the other language does not write them.

    Args:
        min_count: minimum frequency of a string.
    """
    frequencies: Counter[str] = Counter()
    for run, frequency in runs.items():
        for start in range(len(run)):
            for end in range(start + 1, min(len(run), start + MAX_TOKEN_LENGTH) + 1):
                if writing_system.has_uncommon(run[start:end]):
                    frequencies[run[start:end]] += frequency
    return {string for string, frequency in frequencies.items() if frequency >= min_count}


def initial_min_count(corpus: SegmentedCorpus) -> int:
    """The minimum frequency of pairs at first: among six million tokens the 14,000th new token occurs 29 times."""
    return max(2, len(corpus.tokens) // 400_000)


Pair = tuple[int, int, np.ndarray]  # left id, right id, positions of the left one


class ContinuedBPE:
    """Trains new tokens on a `SegmentedCorpus`, the most frequent pair first."""

    def __init__(
        self, corpus: SegmentedCorpus, count: int, writing_system: WritingSystem, allowed_strings: set[str]
    ) -> None:
        """Takes over the tokens of `corpus`.

        Args:
            count: number of new tokens.
            allowed_strings: strings of only shared characters that may become tokens.
        """
        self.writing_system, self.allowed_strings, self.count = writing_system, allowed_strings, count
        self.vocab, self.id_to_token = corpus.vocab, list(corpus.vocab.tokens)
        self.base_vocab_size, self.first_new = corpus.base_vocab_size, len(self.id_to_token)
        self.partial_tokens = {*map(self.vocab.from_bytes, partial_bytes(writing_system))}
        self.token_to_id = {token: index for index, token in enumerate(self.id_to_token) if token}
        self.tokens = corpus.tokens
        self.min_count = initial_min_count(corpus)
        size = self.first_new + count
        self.exclusive, self.shared, self.partial, self.starts_with_space = (np.zeros(size, bool) for _ in range(4))
        self.length = np.zeros(size, np.int32)
        for index, token in enumerate(self.id_to_token):
            self._register(index, token)
        # What the other language writes in bytes stays in bytes, and no token can be built on it.
        temporary = np.arange(self.first_new) >= self.base_vocab_size
        allowed = self.exclusive[: self.first_new] | np.array([token in allowed_strings for token in self.id_to_token])
        self.tokens[(temporary & ~allowed)[self.tokens]] = BOUNDARY

    def _register(self, index: int, token: str) -> None:
        text = self.vocab.text(token)
        self.partial[index] = text is None
        if text is None:
            self.length[index] = 1
            return
        body = text.removeprefix(SPACE)
        self.exclusive[index] = self.writing_system.exclusive_pattern.search(text) is not None
        self.shared[index] = not body or self.writing_system.shared_run_pattern.fullmatch(body) is not None
        self.starts_with_space[index] = text.startswith(SPACE)
        self.length[index] = len(text)

    def train(self) -> Iterator[str]:
        """Yields new tokens by rank; fewer than `count` if the text has no more."""
        self.new_tokens: set[str] = set()
        while True:
            self._collect_pairs()
            while len(self.new_tokens) < self.count and (token := self._next_token()):
                self.new_tokens.add(token)
                yield token
            if len(self.new_tokens) == self.count or self.min_count == 2:
                return
            self.min_count = max(2, self.min_count // 4)

    def _collect_pairs(self) -> None:
        """Finds every pair that is frequent enough, and every character that saves enough bytes."""
        self.tokens = self.tokens[self.tokens != MERGED]
        size = len(self.tokens)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.previous = np.arange(-1, size - 1, dtype=np.int32)
        self.pairs: dict[str, list[Pair]] = {}  # candidate -> all ways in which two tokens of the text spell it
        self.pending_merges: dict[int, list[Pair]] = {}  # id -> pairs that sentencepiece would merge into this token
        counts = np.bincount(self.tokens, minlength=self.first_new)
        # A character in bytes costs at least two tokens more than its own token, so it precedes all pairs that contain it.
        self.heap = [
            (-int(counts[index]) * (len(token.encode()) - 1), token)
            for index, token in enumerate(self.id_to_token[self.base_vocab_size : self.first_new], self.base_vocab_size)
            if counts[index] >= self.min_count and token not in self.new_tokens
        ]
        heapq.heapify(self.heap)
        positions = np.nonzero(self._can_merge(self.tokens[:-1], self.tokens[1:]))[0].astype(np.int32)
        keys = (self.tokens[positions].astype(np.int64) << 32) | self.tokens[positions + 1]
        for key, group in _group_by_key(keys, self.min_count):
            self._add_pair(key >> 32, key & 0xFFFFFFFF, positions[group])
        self._apply_pending()

    def _can_merge(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Which pairs of ids may become a token, judged by their characters."""
        allowed = self.exclusive[left] | self.exclusive[right] | (self.shared[left] & self.shared[right])
        allowed |= self.partial[left] | self.partial[right]  # what they spell together decides (`_may_become_token`)
        fits = self.length[left] + self.length[right] <= MAX_TOKEN_LENGTH
        return (left > BOUNDARY) & (right > BOUNDARY) & ~self.starts_with_space[right] & allowed & fits

    def _add_pair(self, left: int, right: int, positions: np.ndarray) -> None:
        """Adds a pair as a candidate, or as a pending merge if it forms an existing token."""
        token = self.id_to_token[left] + self.id_to_token[right]
        if token in self.token_to_id:  # however rare, sentencepiece would merge it
            if self.vocab.unions_merge:
                self.pending_merges.setdefault(self.token_to_id[token], []).append((left, right, positions))
        elif len(positions) >= self.min_count and self._may_become_token(left, right, token):
            pairs = self.pairs.setdefault(token, [])
            pairs.append((left, right, positions))
            heapq.heappush(self.heap, (-_count(pairs), token))

    def _may_become_token(self, left: int, right: int, token: str) -> bool:
        text = self.vocab.text(token)
        if text is None:
            return token in self.partial_tokens
        complete = not (self.partial[left] or self.partial[right])  # then `_can_merge` has judged the characters
        if not complete and not self.writing_system.token_pattern.fullmatch(text):
            return False
        return (
            bool(self.writing_system.exclusive_pattern.search(text)) or text.removeprefix(SPACE) in self.allowed_strings
        )

    def _next_token(self) -> str | None:
        """Makes the currently most frequent candidate a token, and merges it in the text."""
        while self.heap:
            token = heapq.heappop(self.heap)[1]
            if token in self.new_tokens:
                continue
            if token in self.token_to_id:  # a character in bytes is one temporary token already
                return token
            # Other merges may have used some of its positions since: it may have to go back into the heap.
            pairs = [
                (left, right, self._still_adjacent(left, right, positions))
                for left, right, positions in self.pairs[token]
            ]
            self.pairs[token] = pairs
            if (count := _count(pairs)) < self.min_count:
                continue
            if self.heap and (-count, token) > self.heap[0]:
                heapq.heappush(self.heap, (-count, token))
                continue
            del self.pairs[token]
            new = len(self.id_to_token)
            self.token_to_id[token] = new
            self._register(new, token)
            self.id_to_token.append(token)
            self.pending_merges[new] = pairs
            self._apply_pending()
            return token
        return None

    def _still_adjacent(self, left: int, right: int, positions: np.ndarray) -> np.ndarray:
        return positions[(self.tokens[positions] == left) & (self.tokens[self.next[positions]] == right)]

    def _apply_pending(self) -> None:
        while self.pending_merges:
            new = min(self.pending_merges)  # older tokens rank higher
            self._merge_pairs(new, self.pending_merges.pop(new))

    def _merge_pairs(self, new: int, pairs: list[Pair]) -> None:
        """Merges all pairs that form a token wherever they are still adjacent, left to right, and adds the new pairs."""
        adjacent = [self._still_adjacent(left, right, positions) for left, right, positions in pairs]
        positions = _drop_overlaps(np.unique(np.concatenate(adjacent)), self.next)
        seconds = self.next[positions]
        after = self.next[seconds]
        self.tokens[positions], self.tokens[seconds] = new, MERGED
        self.next[positions], self.previous[after] = after, positions
        right_ids, before = self.tokens[after], self.previous[positions]
        left_ids, ids = self.tokens[before], np.full(len(positions), new)
        selected = np.nonzero(self._can_merge(ids, right_ids))[0]
        for right, group in _group_by_key(right_ids[selected]):
            self._add_pair(new, right, positions[selected[group]])
        # Where two new tokens are adjacent, the pair was added above, with the first one.
        first = ~np.isin(before, positions, assume_unique=True)
        selected = np.nonzero(self._can_merge(left_ids, ids) & first)[0]
        for left, group in _group_by_key(left_ids[selected]):
            self._add_pair(left, new, before[selected[group]])


def _count(pairs: list[Pair]) -> int:
    return sum(len(positions) for _, _, positions in pairs)


def _group_by_key(keys: np.ndarray, min_count: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each key that occurs at least `min_count` times, and the indices at which it does."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    keys = keys[order]
    starts = np.nonzero(np.diff(keys, prepend=-1))[0]
    ends = np.append(starts[1:], len(keys))
    for group in np.nonzero(ends - starts >= min_count)[0]:
        yield int(keys[starts[group]]), order[starts[group] : ends[group]]


def _drop_overlaps(positions: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Of ascending positions of pairs, those that merging from left to right finds: each token is merged once."""
    number = np.arange(len(positions))
    linked = np.zeros(len(positions), bool)
    linked[1:] = following[positions[:-1]] == positions[1:]
    start = np.maximum.accumulate(np.where(linked, 0, number))
    return positions[(number - start) % 2 == 0]
