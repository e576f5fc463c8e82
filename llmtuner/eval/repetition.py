"""Whether texts repeat themselves: n-grams that occur again, and loops."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is not needed to look at a text
    from llmtuner.eval.generation import GeneratedAnswers

MIN_LOOP_LENGTH = (
    8  # characters that repeat what stands directly before; fewer are words such as さまざま, or a row of dots
)


def repeated_ngrams(texts: Sequence[str], n: int = 4) -> float:
    """Share of character n-grams that occurred before in the same text, over all texts."""
    seen_again = total = 0
    for text in texts:
        grams = [text[start : start + n] for start in range(len(text) - n + 1)]
        total += len(grams)
        seen_again += len(grams) - len(set(grams))
    return seen_again / total if total else 0.0


def find_loops(text: str) -> list[tuple[int, int]]:
    """Spans [start, stop) of at least `MIN_LOOP_LENGTH` characters that repeat what stands directly before them.

    In "abcabcabc" the loop is the last two thirds: with the period p, every character of it is the one p places earlier,
    and it is at least p long. Overlapping spans of several periods are one.
    """
    spans = []
    for period in range(1, len(text) // 2 + 1):
        start = period
        for place in range(period, len(text) + 1):
            if place == len(text) or text[place] != text[place - period]:
                if place - start >= max(period, MIN_LOOP_LENGTH):
                    spans.append((start, place))
                start = place + 1
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def repetition_metrics(answers: "GeneratedAnswers") -> dict[str, Any]:
    """What is measured of free answers: repetition, loops in characters, ends, and speed."""
    texts = answers.texts
    longest = [max((stop - start for start, stop in find_loops(text)), default=0) for text in texts]
    return {
        "repeated_4gram_ratio": round(repeated_ngrams(texts), 4),
        "longest_loop": max(longest, default=0),
        "mean_loop": round(sum(longest) / max(len(longest), 1), 1),
        "finished_ratio": round(sum(answer.finished for answer in answers.answers) / max(len(texts), 1), 4),
        "tokens_per_second": answers.tokens_per_second,
    }
