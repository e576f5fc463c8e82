"""Finds the terms of a glossary in text: at each position the longest, from left to right, none overlapping another."""

from collections import defaultdict
from collections.abc import Collection, Iterator

import numpy
import regex

_SHIFT = numpy.uint32(32 - 24)  # tables of 2**24 entries, by the upper bits of a hash
# Letters of scripts whose words are separated. Katakana is one of them: a loanword ends where the katakana do.
_SPACED_LETTER = regex.compile(
    r"[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Hangul}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]]", regex.V1
)


def is_spaced(character: str) -> bool:
    """Whether a character belongs to words that are separated from their neighbors; false of none ("")."""
    return bool(_SPACED_LETTER.match(character))


class TermFinder:
    """Finds terms in texts, hundreds of thousands as fast as a few.

    A term in a script with spaces is found as a complete word; one in a script without spaces anywhere, so that a term may be
    found inside a word that is none.

    Hashes of the prefixes of all terms are looked up at all positions of a text at once. They tell how long a term may be at a
    position; whether it is one is then looked up by itself, for hashes collide.
    """

    def __init__(self, terms: Collection[str]) -> None:
        self.terms = terms
        self.spaced = {term for term in terms if is_spaced(term[0]) or is_spaced(term[-1])}
        self.max_length = max(map(len, terms), default=0)
        self.is_prefix, self.is_term = numpy.zeros((2, 1 << 24), dtype=bool)
        of_length: dict[int, list[str]] = defaultdict(list)
        for term in terms:
            of_length[len(term)].append(term)
        for length, same_length in of_length.items():
            hashes = numpy.zeros(len(same_length), dtype=numpy.uint32)
            for column in _code_points("".join(same_length)).reshape(-1, length).T:
                hashes = _extend(hashes, column)
                self.is_prefix[hashes >> _SHIFT] = True
            self.is_term[hashes >> _SHIFT] = True

    def __call__(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields the position of each term, and the term."""
        end = 0
        for start, longest in self._candidates(text):
            if start < end:
                continue
            for length in range(longest, 0, -1):
                term = text[start : start + length]  # shorter at the end of the text
                if term in self.terms and (term not in self.spaced or _is_word(text, start, start + len(term))):
                    yield start, term
                    end = start + len(term)
                    break

    def _candidates(self, text: str) -> Iterator[tuple[int, int]]:
        """The positions at which a term may begin, and the longest that it may be."""
        codes = _code_points(text + "\0" * self.max_length)
        longest = numpy.zeros(len(text), dtype=numpy.int64)
        positions, hashes = numpy.arange(len(text)), numpy.zeros(len(text), dtype=numpy.uint32)
        for length in range(1, self.max_length + 1):
            hashes = _extend(hashes, codes[positions + (length - 1)])
            goes_on = self.is_prefix[hashes >> _SHIFT]
            positions, hashes = positions[goes_on], hashes[goes_on]
            longest[positions[self.is_term[hashes >> _SHIFT]]] = length
            if not len(positions):
                break
        starts = numpy.flatnonzero(longest)
        return zip(starts.tolist(), longest[starts].tolist(), strict=True)


def _code_points(text: str) -> numpy.ndarray:
    return numpy.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _extend(hashes: numpy.ndarray, codes: numpy.ndarray) -> numpy.ndarray:
    """The hashes of strings that are one character longer."""
    return (hashes ^ codes) * numpy.uint32(0x85EBCA6B) + (hashes >> numpy.uint32(15))


def _is_word(text: str, start: int, end: int) -> bool:
    """Whether no word of a script with spaces goes on beyond either end of a part of a text."""
    edges = (text[start - 1 : start], text[start]), (text[end - 1], text[end : end + 1])
    return not any(is_spaced(left) and is_spaced(right) for left, right in edges)
