"""Adds Japanese pieces to ChatGLM3's sentencepiece model so that no piece dies and other languages stay as they were.

Two things decide what a new piece does to other texts. Its rank: sentencepiece merges the pair with the highest score
first, so a piece ranked below every native one can only join what the native merges have left over. And its characters:
a piece with a kana, or a Han string that Chinese does not write, finds nothing to join in Chinese and English.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtuner.console import UserError
from llmtuner.tokenizer.fast import CONTROL, NORMAL, SPACE, SPECIAL_TOKENS, encode_fast, encode_sentencepiece
from llmtuner.tokenizer.writing_systems import USED_ELSEWHERE, WritingSystem, find_strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


BATCH = 4_096  # texts encoded at once


@dataclass(frozen=True)
class FilterResult:
    """The candidates that may become pieces, and why the others may not."""

    pieces: list[str]
    rejected: Counter[str]
    """reason -> number of candidates"""


def new_candidates(base: Any, candidates: Any) -> list[str]:
    """The pieces of a model that another does not have, in their order.

    Raises:
        UserError: if a candidate is empty, stands there twice, holds a blank inside or is named like a special token.
    """
    native = {piece.piece for piece in base.pieces if piece.type == NORMAL}
    ordered = [piece.piece for piece in candidates.pieces if piece.type == NORMAL]
    new = [piece for piece in ordered if piece not in native]
    problems = [f"{piece!r} {count} times" for piece, count in Counter(ordered).items() if count > 1]
    problems += ["an empty piece"] * ("" in ordered)
    problems += [f"{piece!r} with a blank inside" for piece in new if SPACE in piece[1:]]
    problems += [f"{piece!r}, a special token's name" for piece in new if piece.strip(SPACE) in SPECIAL_TOKENS]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"these candidates cannot become pieces: {'; '.join(problems[:5])}{more}. "
            "Train the candidates anew with step1_train_tokenizer.py."
        )
    return new


def filter_candidates(
    base: Any, candidates: Any, writing_system: WritingSystem, reference: Iterable[str]
) -> FilterResult:
    """Picks from the candidates, in their order, those that only text of the new language can hold.

    What a piece must be written with is said by the script. A ▁ at its start counts as nothing: such a piece is as
    harmless as the rest of it, and saves a token where a text or a message begins. All its characters must have pieces:
    one that the base spells in bytes goes on being spelled so.

    Args:
        base, candidates: sentencepiece models (`read_sentencepiece`); of the candidates only the order of the pieces counts.
        reference: texts of the other language, read as a stream.

    Raises:
        UserError: as `new_candidates`.
    """
    ordered = new_candidates(base, candidates)
    reasons = {piece: problem for piece in ordered if (problem := writing_system.rejection_reason(piece))}
    shared = {
        piece: piece.removeprefix(SPACE)
        for piece in ordered
        if piece not in reasons and not writing_system.exclusive_pattern.search(piece)
    }
    seen = find_strings(set(shared.values()), reference, writing_system)
    reasons |= {piece: USED_ELSEWHERE for piece, string in shared.items() if string in seen}
    characters = {piece.piece for piece in base.pieces}
    characters |= {piece for piece in ordered if len(piece) == 1 and piece not in reasons}
    for piece in ordered:
        if piece not in reasons and not characters.issuperset(piece):
            reasons[piece] = "of a character in bytes"
    return FilterResult([piece for piece in ordered if piece not in reasons], Counter(reasons.values()))


def merge_vocab(base: Any, pieces: Sequence[str], placeholders: bool = True) -> Any:
    """A copy of the base model with nine placeholders for the special tokens and then the new pieces behind its own.

    The placeholders are control pieces: no text produces them, and they keep the special tokens at their ids. The new
    pieces rank below every native piece, in the order given, one score apart.

    Raises:
        UserError: if the base has been merged before.
    """
    if any(piece.piece in SPECIAL_TOKENS for piece in base.pieces):
        raise UserError("the base tokenizer has new pieces already. Set BASE_MODEL_DIR to the model before any merge.")
    merged = type(base)()
    merged.CopyFrom(base)
    if placeholders:
        for token in SPECIAL_TOKENS:
            merged.pieces.add(piece=token, score=0.0, type=CONTROL)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL)
    for rank, piece in enumerate(pieces, start=1):
        merged.pieces.add(piece=piece, score=lowest - rank, type=NORMAL)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def merge_reachable(base: Any, pieces: Sequence[str]) -> tuple[Any, list[str]]:
    """`merge`, without the pieces that no text would ever produce.

    A piece of which the native merges form other parts first is dead weight: a row of the embedding that is never used.

    Returns:
        the merged model and the pieces left out as dead
    """
    dead: set[str] = set()
    while True:
        living = [piece for piece in pieces if piece not in dead]
        merged = merge_vocab(base, living)
        dying = find_unreachable(merged) & set(living)
        if not dying:
            return merged, [piece for piece in pieces if piece in dead]
        dead |= dying


def merge_as_original(base: Any, candidates: Any) -> Any:
    """The merge of the project that this one follows, for comparison: every candidate, all with the highest score.

    Equal scores leave the order of merges to sentencepiece, so the result has no `tokenizer.json`.

    Raises:
        UserError: as `merge` and `new_candidates`.
    """
    merged = merge_vocab(base, new_candidates(base, candidates))
    for piece in merged.pieces[len(base.pieces) + len(SPECIAL_TOKENS) :]:
        piece.score = 0.0
    return merged


def to_processor(proto: Any) -> Any:
    """A `SentencePieceProcessor` for a model in memory."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def find_unreachable(proto: Any) -> set[str]:
    """The normal pieces that no text produces.

    A piece is produced somewhere if and only if it is produced from its own characters alone: as long as nothing merges
    across its ends, what happens between them is the same everywhere.
    """
    bare = type(proto)()
    bare.CopyFrom(proto)
    bare.normalizer_spec.add_dummy_prefix = False
    processor = to_processor(bare)
    normal = {index: piece.piece for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    encoded = processor.encode(list(normal.values()), out_type=int)
    return {piece for (index, piece), ids in zip(normal.items(), encoded, strict=True) if ids != [index]}


def unreachable_tokens(base: Any, merged: Any) -> list[str]:
    """Pieces that a merge made useless: new ones that no text produces, native ones that no text produces any more."""
    return sorted(find_unreachable(merged) - find_unreachable(base))


@dataclass(frozen=True)
class EncodingChange:
    """A text that two tokenizers split differently, from the first difference on."""

    before: list[str]
    after: list[str]


@dataclass(frozen=True)
class Comparison:
    """The same texts under two tokenizers."""

    texts: int
    tokens_before: int
    tokens_after: int
    changes: list[EncodingChange]

    @property
    def token_ratio(self) -> float:
        """Tokens after for each token before; below 1 is shorter."""
        return self.tokens_after / self.tokens_before


def compare(before: Any, after: Any, texts: Sequence[str], window: int = 8) -> Comparison:
    """Counts tokens and collects the texts whose ids differ.

    Args:
        before, after: sentencepiece processors (`to_processor`).
        texts: at least one that is not empty.
        window: tokens that are shown of a change.
    """
    tokens_before = tokens_after = 0
    changes = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        for old, new in zip(encode_sentencepiece(before, batch), encode_sentencepiece(after, batch), strict=True):
            tokens_before += len(old)
            tokens_after += len(new)
            if old != new:
                first = next((at for at, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), 0)
                shown = slice(first, first + window)
                changes.append(EncodingChange(before.id_to_piece(old[shown]), after.id_to_piece(new[shown])))
    return Comparison(len(texts), tokens_before, tokens_after, changes)


def encoding_mismatches(tokenizer: "PreTrainedTokenizerFast", processor: Any, texts: Sequence[str]) -> list[str]:
    """The texts to which a fast tokenizer and a sentencepiece processor give different ids."""
    fast, expected = encode_fast(tokenizer, texts), encode_sentencepiece(processor, texts)
    return [text for text, ids, wanted in zip(texts, fast, expected, strict=True) if ids != wanted]


def count_scripts(pieces: Iterable[str]) -> Counter[str]:
    """Counts pieces by the scripts they are written with, as in "han + hiragana"; "marks" are punctuation."""

    def script(character: str) -> str:
        if not unicodedata.category(character).startswith(("L", "M")) and character not in "〇々":
            return "marks"
        name = unicodedata.name(character, "other").split()[0].lower()
        return {"cjk": "han", "ideographic": "han", "katakana-hiragana": "katakana", "combining": "marks"}.get(
            name, name
        )

    return Counter(
        " + ".join(sorted({script(character) for character in piece.removeprefix(SPACE)})) for piece in pieces
    )
