"""Adds Japanese pieces to ChatGLM3's sentencepiece model so that no piece dies and other languages stay as they were.

Two things decide what a new piece does to other texts. Its rank: sentencepiece merges the pair with the highest score
first, so a piece ranked below every native one can only join what the native merges have left over. And its characters:
a piece with a kana, or a Han string that Chinese does not write, finds nothing to join in Chinese and English.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtuner.console import InputError
from llmtuner.tokenizer.fast import CONTROL, NORMAL, SPACE, SPECIAL_TOKENS, encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KANA = r"\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = r"\u3005-\u3007\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAS_KANA = re.compile(f"[{KANA}]")
_HAN_RUN = re.compile(f"[{HAN}]+")
_KANA_AND_HAN = re.compile(f"[{KANA}{HAN}]+")


@dataclass(frozen=True)
class Choice:
    """The candidates that may become pieces, and why the others may not."""

    pieces: list[str]
    left_out: Counter[str]
    """reason -> number of candidates"""


def choose_pieces(base: Any, candidates: Any, reference: Iterable[str]) -> Choice:
    """Picks from the candidates, in their order, those that only Japanese text can hold.

    A piece must consist of kana and Han characters alone: no digit, Latin letter or punctuation. It must hold a kana,
    or be a Han string that never occurs in the Chinese reference. A ▁ at its start counts as nothing: such a piece is as
    harmless as the rest of it, and saves a token where a text or a message begins (2 % of a single sentence's). All its
    characters must have pieces: one that Chinese spells in bytes goes on being spelled so.

    Args:
        base, candidates: sentencepiece models (`read_model`); of the candidates only the order of the pieces counts.
        reference: Chinese texts, read as a stream.
    """
    native = {piece.piece for piece in base.pieces}
    ordered = [piece.piece for piece in candidates.pieces if piece.type == NORMAL]
    reasons: dict[str, str] = {}
    for piece in ordered:
        if piece in native:
            reasons[piece] = "native already"
        elif not _KANA_AND_HAN.fullmatch(piece.removeprefix(SPACE)):
            reasons[piece] = "digit, letter or sign"
    han_only = [piece for piece in ordered if piece not in reasons and not _HAS_KANA.search(piece)]
    seen = strings_seen({piece.removeprefix(SPACE) for piece in han_only}, reference)
    reasons |= {piece: "Chinese too" for piece in han_only if piece.removeprefix(SPACE) in seen}
    characters = native | {piece for piece in ordered if len(piece) == 1 and piece not in reasons}
    for piece in ordered:
        if piece not in reasons and not characters.issuperset(piece):
            reasons[piece] = "of a character in bytes"
    return Choice([piece for piece in ordered if piece not in reasons], Counter(reasons.values()))


def strings_seen(strings: set[str], texts: Iterable[str]) -> set[str]:
    """Those of some Han strings that occur in the texts; memory does not grow with the texts."""
    waiting: dict[int, set[str]] = {}
    for string in strings:
        waiting.setdefault(len(string), set()).add(string)
    seen: set[str] = set()
    for text in texts:
        for run in _HAN_RUN.findall(text):
            for length, wanted in waiting.items():
                found = wanted.intersection(run[start : start + length] for start in range(len(run) - length + 1))
                wanted -= found
                seen |= found
    return seen


def merge(base: Any, pieces: Sequence[str]) -> Any:
    """A copy of the base model with nine placeholders for the special tokens and then the new pieces behind its own.

    The placeholders are control pieces: no text produces them, and they keep the special tokens at their ids. The new
    pieces rank below every native piece, in the order given, one score apart.

    Raises:
        InputError: if the base has been merged before.
    """
    if any(piece.piece in SPECIAL_TOKENS for piece in base.pieces):
        raise InputError("the base tokenizer has new pieces already. Set BASE_MODEL_DIR to the model before any merge.")
    merged = type(base)()
    merged.CopyFrom(base)
    for token in SPECIAL_TOKENS:
        merged.pieces.add(piece=token, score=0.0, type=CONTROL)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL)
    for rank, piece in enumerate(pieces, start=1):
        merged.pieces.add(piece=piece, score=lowest - rank, type=NORMAL)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def merge_living(base: Any, pieces: Sequence[str]) -> tuple[Any, list[str]]:
    """`merge`, without the pieces that no text would ever produce.

    A piece of which the native merges form other parts first is dead weight: a row of the embedding that is never used.

    Returns:
        the merged model and the pieces left out as dead
    """
    dead: set[str] = set()
    while True:
        living = [piece for piece in pieces if piece not in dead]
        merged = merge(base, living)
        dying = unreachable(merged) & set(living)
        if not dying:
            return merged, [piece for piece in pieces if piece in dead]
        dead |= dying


def unreachable(proto: Any) -> set[str]:
    """The normal pieces that no text produces.

    A piece is produced somewhere if and only if it is produced from its own characters alone: as long as nothing merges
    across its ends, what happens between them is the same everywhere.
    """
    import sentencepiece

    bare = type(proto)()
    bare.CopyFrom(proto)
    bare.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
    normal = {index: piece.piece for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    encoded = processor.encode(list(normal.values()), out_type=int)
    return {piece for (index, piece), ids in zip(normal.items(), encoded, strict=True) if ids != [index]}


def dead_pieces(base: Any, merged: Any) -> list[str]:
    """Pieces that a merge made useless: new ones that no text produces, native ones that no text produces any more."""
    return sorted(unreachable(merged) - unreachable(base))


@dataclass(frozen=True)
class Change:
    """A text that two tokenizers split differently, from the first difference on."""

    before: list[str]
    after: list[str]


@dataclass(frozen=True)
class Comparison:
    """The same texts under two tokenizers."""

    texts: int
    tokens_before: int
    tokens_after: int
    changes: list[Change]

    @property
    def token_ratio(self) -> float:
        """Tokens after for each token before; below 1 is shorter."""
        return self.tokens_after / self.tokens_before


def compare(
    before: "PreTrainedTokenizerFast", after: "PreTrainedTokenizerFast", texts: Sequence[str], window: int = 8
) -> Comparison:
    """Counts tokens and collects the texts whose ids differ.

    Args:
        texts: at least one that is not empty.
        window: tokens that are shown of a change.
    """
    tokens_before = tokens_after = 0
    changes = []
    for old, new in zip(encode_batch(before, texts), encode_batch(after, texts), strict=True):
        tokens_before += len(old)
        tokens_after += len(new)
        if old != new:
            first = next((at for at, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
            shown = slice(first, first + window)
            changes.append(Change(_pieces(before, old[shown]), _pieces(after, new[shown])))
    return Comparison(len(texts), tokens_before, tokens_after, changes)


def _pieces(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(index)) for index in ids]


def disagreements(tokenizer: "PreTrainedTokenizerFast", model_file: Path, texts: Sequence[str]) -> list[str]:
    """The texts to which a fast tokenizer and the sentencepiece model it was made from give different ids."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    expected = processor.encode(list(texts), out_type=int)
    return [
        text for text, ids, fast in zip(texts, expected, encode_batch(tokenizer, texts), strict=True) if ids != fast
    ]


def kinds(pieces: Iterable[str]) -> Counter[str]:
    """Counts pieces by what they are written with."""

    def kind(piece: str) -> str:
        if not _HAS_KANA.search(piece):
            return "one kanji" if len(piece) == 1 else "several kanji"
        return "kanji and kana" if _HAN_RUN.search(piece) else "kana"

    return Counter(map(kind, pieces))
