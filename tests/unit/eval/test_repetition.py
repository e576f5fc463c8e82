"""Repetition and loops in answers."""

import pytest

from llmtuner.eval.repetition import find_loops, repeated_ngram_ratio


def test_repetition():
    assert repeated_ngram_ratio(["あいうえおかきくけこ"]) == 0
    assert repeated_ngram_ratio(["あいうえあいうえ"]) == pytest.approx(1 / 5)
    assert repeated_ngram_ratio(["", "あ"]) == 0


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", []),
        ("abcabcabcabc", [(3, 12)]),
        ("xyabcdefghabcdefgh!", [(10, 18)]),
        ("xyabcdefgabcdefg!", []),  # seven characters are a phrase
        ("さまざまな色。", []),
        ("あああああああああああ", [(1, 11)]),
        ("その歌は歌です。その歌は歌です。その歌は歌です。", [(8, 24)]),
        ("abcdefghabcdefgh, 123456789123456789", [(8, 16), (27, 36)]),
        ("abcdefgh--abcdefgh", []),  # not directly before
        ("abcdefghijklabcdefgh! 0123456789", []),  # not the whole of what stands before
    ],
)
def test_loops(text, spans):
    assert find_loops(text) == spans
