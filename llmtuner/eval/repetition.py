"""Repetition in generated text: repeated n-grams and loops."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the report reads answers without importing torch
    from llmtuner.eval.generation import GeneratedAnswers

MIN_LOOP_LENGTH = 8  # characters; shorter ones are words such as さまざま, or a row of dots


def repeated_ngram_ratio(texts: Sequence[str], n: int = 4) -> float:
    """Share of character n-grams that occurred before in the same text, over all texts."""
    repeated = total = 0
    for text in texts:
        ngrams = [text[start : start + n] for start in range(len(text) - n + 1)]
        total += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / total if total else 0.0


def find_loops(text: str) -> list[tuple[int, int]]:
    """Spans [start, stop) of at least `MIN_LOOP_LENGTH` characters that repeat what directly precedes them.

    In "abcabcabc" the loop is the last two thirds: with period p, each of its characters equals the one p positions earlier,
    and it is at least p long. Overlapping spans of different periods are merged.
    """
    spans = []
    for period in range(1, len(text) // 2 + 1):
        start = period
        for position in range(period, len(text) + 1):
            if position == len(text) or text[position] != text[position - period]:
                if position - start >= max(period, MIN_LOOP_LENGTH):
                    spans.append((start, position))
                start = position + 1
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def repetition_metrics(answers: "GeneratedAnswers") -> dict[str, Any]:
    """Metrics of free-form answers: repeated 4-grams, longest and mean loop in characters, share finished, throughput."""
    texts = answers.texts
    loop_lengths = [max((stop - start for start, stop in find_loops(text)), default=0) for text in texts]
    finished = sum(answer.finished for answer in answers.answers)
    return {
        "repeated_4gram_ratio": round(repeated_ngram_ratio(texts), 4),
        "longest_loop": max(loop_lengths, default=0),
        "mean_loop": round(sum(loop_lengths) / max(len(texts), 1), 1),
        "finished_ratio": round(finished / max(len(texts), 1), 4),
        "tokens_per_second": answers.tokens_per_second,
    }
