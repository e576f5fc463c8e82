"""Compares two tokenizers on the same texts: token counts, and where the ids differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtuner.tokenizer.encoding import encode_fast
from llmtuner.tokenizer.vocab import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_SIZE = 4_096  # texts encoded at once


@dataclass(frozen=True)
class EncodingChange:
    """A text that two tokenizers encode differently, from the first difference on."""

    before: list[str]
    after: list[str]


@dataclass(frozen=True)
class Comparison:
    """The same texts encoded with two tokenizers."""

    texts: int
    tokens_before: int
    tokens_after: int
    changes: list[EncodingChange]

    @property
    def token_ratio(self) -> float:
        """Tokens after the merge per token before; below 1 is shorter."""
        return self.tokens_after / self.tokens_before


def compare(before: Vocab, after: Vocab, texts: Sequence[str], window: int = 8) -> Comparison:
    """Counts tokens and collects the texts whose ids differ.

    Args:
        texts: at least one that is not empty.
        window: number of tokens to show of a change.
    """
    tokens_before = tokens_after = 0
    changes = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = list(texts[start : start + BATCH_SIZE])
        for old, new in zip(before.encode(batch), after.encode(batch), strict=True):
            tokens_before += len(old)
            tokens_after += len(new)
            if old != new:
                first = next((i for i, (left, right) in enumerate(zip(old, new, strict=False)) if left != right), 0)
                shown = slice(first, first + window)
                changes.append(EncodingChange(before.display(old[shown]), after.display(new[shown])))
    return Comparison(len(texts), tokens_before, tokens_after, changes)


def encoding_mismatches(tokenizer: "PreTrainedTokenizerFast", vocab: Vocab, texts: Sequence[str]) -> list[str]:
    """The texts to which a fast tokenizer assigns other ids than the vocabulary that it was made from."""
    fast, expected = encode_fast(tokenizer, texts), vocab.encode(texts)
    return [text for text, ids, expected_ids in zip(texts, fast, expected, strict=True) if ids != expected_ids]
