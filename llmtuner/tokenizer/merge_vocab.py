"""Adds tokens to ChatGLM3's sentencepiece model so that every one is reachable and other languages keep their tokenization.

Two properties of a new token decide its effect on other texts. Its rank: sentencepiece merges the pair with the highest score
first, so a token that ranks below the base vocabulary can only merge what the base merges have left over. And its characters:
a token with a kana, or a Han string that Chinese does not write, finds nothing to merge in Chinese and English.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmtuner.console import UserError
from llmtuner.tokenizer.fast import CONTROL, NORMAL, SPACE, SPECIAL_TOKENS, to_processor
from llmtuner.tokenizer.writing_systems import USED_ELSEWHERE, WritingSystem, find_strings


# ---------------------------------------------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class FilterResult:
    """The candidates that may be added, and why the others may not."""

    accepted: list[str]
    rejected: Counter[str]
    """reason -> number of candidates"""


def new_candidates(base: Any, candidates: Any) -> list[str]:
    """The pieces of a sentencepiece model that the base does not have, in their order.

    Raises:
        UserError: if a candidate is empty, duplicated, has a space inside or is named like a special token.
    """
    base_pieces = {piece.piece for piece in base.pieces if piece.type == NORMAL}
    ordered = [piece.piece for piece in candidates.pieces if piece.type == NORMAL]
    new = [piece for piece in ordered if piece not in base_pieces]
    problems = [f"{piece!r} {count} times" for piece, count in Counter(ordered).items() if count > 1]
    problems += ["an empty piece"] * ("" in ordered)
    problems += [f"{piece!r} with a space inside" for piece in new if SPACE in piece[1:]]
    problems += [f"{piece!r}, a special token's name" for piece in new if piece.strip(SPACE) in SPECIAL_TOKENS]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"these candidates cannot be added: {'; '.join(problems[:5])}{more}. "
            "Train the candidates again with step1_train_tokenizer.py."
        )
    return new


def filter_candidates(
    base: Any, candidates: Any, writing_system: WritingSystem, reference: Iterable[str]
) -> FilterResult:
    """Accepts the candidates, in their order, that occur only in text of the new language.

    A ▁ at the start makes no difference: such a token is as harmless as the rest of it, and saves a token at the start of a
    text or message. Every character must have a piece: what the base encodes as bytes stays in bytes.

    Args:
        base, candidates: sentencepiece models (`read_sentencepiece`); of the candidates only the order of the pieces counts.
        reference: texts of the other language, read as a stream.

    Raises:
        UserError: as `new_candidates`.
    """
    ordered = new_candidates(base, candidates)
    reasons = {token: reason for token in ordered if (reason := writing_system.rejection_reason(token))}
    shared = {
        token: token.removeprefix(SPACE)
        for token in ordered
        if token not in reasons and not writing_system.exclusive_pattern.search(token)
    }
    in_reference = find_strings(set(shared.values()), reference, writing_system)
    reasons |= {token: USED_ELSEWHERE for token, string in shared.items() if string in in_reference}
    characters = {piece.piece for piece in base.pieces}
    characters |= {token for token in ordered if len(token) == 1 and token not in reasons}
    for token in ordered:
        if token not in reasons and not characters.issuperset(token):
            reasons[token] = "of a character in bytes"
    return FilterResult([token for token in ordered if token not in reasons], Counter(reasons.values()))


# --------------------------------------------------------------------------------------------------------------- merge
def merge_vocab(base: Any, tokens: Sequence[str], placeholders: bool = True) -> Any:
    """Copies the base model and appends nine placeholders for the special tokens and then the new tokens.

    The placeholders are control pieces, which no text produces; they keep the ids of the special tokens. The new tokens rank
    below the base vocabulary in the order given, one score apart.

    Raises:
        UserError: if the base has been merged before.
    """
    if any(piece.piece in SPECIAL_TOKENS for piece in base.pieces):
        raise UserError("the base tokenizer has been merged already. Set BASE_MODEL_DIR to the model before any merge.")
    merged = type(base)()
    merged.CopyFrom(base)
    if placeholders:
        for token in SPECIAL_TOKENS:
            merged.pieces.add(piece=token, score=0.0, type=CONTROL)
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL)
    for rank, token in enumerate(tokens, start=1):
        merged.pieces.add(piece=token, score=lowest - rank, type=NORMAL)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def merge_reachable(base: Any, tokens: Sequence[str]) -> tuple[Any, list[str]]:
    """`merge_vocab` without unreachable tokens, whose embedding rows would never be used.

    A token is unreachable if the base merges always form other parts first.

    Returns:
        the merged model and the tokens left out as unreachable
    """
    unreachable: set[str] = set()
    while True:
        kept = [token for token in tokens if token not in unreachable]
        merged = merge_vocab(base, kept)
        more = find_unreachable(merged) & set(kept)
        if not more:
            return merged, [token for token in tokens if token in unreachable]
        unreachable |= more


def merge_as_original(base: Any, candidates: Any) -> Any:
    """The merge of the original project, for comparison: every candidate, all with the highest score.

    Equal scores leave the order of merges to sentencepiece, so the result cannot be a `tokenizer.json`.

    Raises:
        UserError: as `merge_vocab` and `new_candidates`.
    """
    merged = merge_vocab(base, new_candidates(base, candidates))
    for piece in merged.pieces[len(base.pieces) + len(SPECIAL_TOKENS) :]:
        piece.score = 0.0
    return merged


def find_unreachable(proto: Any) -> set[str]:
    """The normal pieces that no text produces.

    A piece is reachable if and only if its own characters alone produce it: as long as nothing merges across its ends, the
    merges between them are the same in any context.
    """
    bare = type(proto)()
    bare.CopyFrom(proto)
    bare.normalizer_spec.add_dummy_prefix = False
    normal = {index: piece.piece for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    encoded = to_processor(bare).encode(list(normal.values()), out_type=int)
    return {piece for (index, piece), ids in zip(normal.items(), encoded, strict=True) if ids != [index]}


def unreachable_tokens(base: Any, merged: Any) -> list[str]:
    """Tokens that a merge made unreachable: new ones that no text produces, and base tokens no longer produced."""
    return sorted(find_unreachable(merged) - find_unreachable(base))


def count_scripts(tokens: Iterable[str]) -> Counter[str]:
    """Counts tokens by the Unicode scripts of their characters, as in "han + hiragana"; "marks" is punctuation."""
    aliases = {"cjk": "han", "ideographic": "han", "katakana-hiragana": "katakana", "combining": "marks"}

    def script(character: str) -> str:
        if not unicodedata.category(character).startswith(("L", "M")) and character not in "〇々":
            return "marks"
        name = unicodedata.name(character, "other").split()[0].lower()
        return aliases.get(name, name)

    return Counter(" + ".join(sorted(set(map(script, token.removeprefix(SPACE))))) for token in tokens)
