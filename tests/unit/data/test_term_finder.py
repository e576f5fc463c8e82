"""Terms of a glossary are found in text: the longest, as complete words where words are separated."""

import random

import numpy
import pytest

from llmtuner.data import term_finder
from llmtuner.data.term_finder import TermFinder


def found(terms, text):
    return [term for _, term in TermFinder(terms)(text)]


@pytest.fixture(params=[8, 31], autouse=True)
def shift(request, monkeypatch):
    """Tables of the usual size, and of two entries, so that nearly all hashes collide."""
    monkeypatch.setattr(term_finder, "_SHIFT", numpy.uint32(request.param))


def test_what_is_found_is_what_a_search_of_all_substrings_finds():
    rng = random.Random(1)
    for _ in range(200):
        terms = {"".join(rng.choices("天地人一", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 30))}
        text = "".join(rng.choices("天地人一，", k=rng.randint(0, 60)))
        expected, position = [], 0
        while position < len(text):
            longest = max((term for term in terms if text.startswith(term, position)), key=len, default="")
            if longest:
                expected.append((position, longest))
            position += len(longest) or 1
        assert list(TermFinder(terms)(text)) == expected


def test_latin_terms_are_complete_words():
    text = "Mina's minaret, Minas, aMina, 米Mina住; Mina Rays, Mina Ray. Mina"
    assert found({"Mina", "Mina Ray"}, text) == ["Mina", "Mina", "Mina", "Mina Ray", "Mina"]
    assert [start for start, _ in TermFinder({"Mina", "Mina Ray"})(text)] == [0, 31, 38, 49, 59]
    assert found({"米Mina", "Mina米"}, "米Minas sMina米 米Mina Mina米") == ["米Mina", "Mina米"]
    assert found({"in", "in Paris", "Paris"}, "begin Paris") == ["Paris"]


def test_where_words_end_in_other_scripts():
    assert found({"ミナ"}, "ミナは見た。ミナトもセミナーもある") == ["ミナ"]
    assert found({"みな", "米娜"}, "みなも米娜们") == ["みな", "米娜"]
    assert found({"कम"}, "कम कमी") == ["कम"]  # the vowel sign belongs to the word
    assert found({"서울"}, "서울에서") == ["서울"]
    assert found({"𠮷野家", "👍"}, "👍𠮷野家") == ["👍", "𠮷野家"]


def test_of_nothing_nothing_is_found():
    assert found(set(), "天地") == found({"天地"}, "") == []
