"""Adds tokens to a base tokenizer so that every one is reachable and other languages keep their tokenization.

Two properties of a new token decide its effect on other texts. Its rank: BPE merges the pair with the highest rank first, so
a token that ranks below the base vocabulary can only merge what the base merges have left over. And its characters:
a token with a kana, or a Han string that Chinese does not write, finds nothing to merge in Chinese and English.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import SPACE, SPECIAL_TOKENS
from llmtuner.tokenizer.vocab import SentencePieceVocab, Vocab
from llmtuner.tokenizer.writing_systems import USED_ELSEWHERE, WritingSystem, find_strings


# ---------------------------------------------------------------------------------------------------------- candidates
@dataclass(frozen=True)
class FilterResult:
    """The candidates that may be added, and why the others may not."""

    accepted: list[str]
    rejected: Counter[str]
    """reason -> number of candidates"""


def new_candidates(base: Vocab, candidates: Vocab) -> dict[str, str]:
    """The tokens of another tokenizer that the base does not have, in their order: as the base would write them -> text.

    Raises:
        UserError: if a candidate is duplicated, has a space inside or is named like a special token.
    """
    known, special = {*base.tokens}, {*SPECIAL_TOKENS, *base.special_ids()}
    texts = [text for token in candidates.tokens if token and (text := candidates.text(token))]
    counts = Counter(texts)
    new = [text for text in counts if base.from_text(text) not in known]
    problems = [f"{text!r} {count} times" for text, count in counts.items() if count > 1]
    problems += [f"{text!r} with a space inside" for text in new if SPACE in text[1:]]
    problems += [f"{text!r}, a special token's name" for text in new if text.strip(SPACE) in special]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"these candidates cannot be added: {'; '.join(problems[:5])}{more}. "
            "Train the candidates again with step1_train_tokenizer.py."
        )
    return {base.from_text(text): text for text in new}


def filter_candidates(
    base: Vocab, candidates: Vocab, writing_system: WritingSystem, reference: Iterable[str]
) -> FilterResult:
    """Accepts the candidates, in their order, that occur only in text of the new language.

    A ▁ at the start makes no difference: such a token is as harmless as the rest of it, and saves a token at the start of a
    text or message. Every character must have a token: what the base encodes as bytes stays in bytes.

    Args:
        candidates: only the order of its tokens counts.
        reference: texts of the other languages, read as a stream.

    Raises:
        UserError: as `new_candidates`.
    """
    ordered = new_candidates(base, candidates)
    reasons = {token: reason for token, text in ordered.items() if (reason := writing_system.rejection_reason(text))}
    shared = {
        token: text.removeprefix(SPACE)
        for token, text in ordered.items()
        if token not in reasons and not writing_system.exclusive_pattern.search(text)
    }
    in_reference = find_strings(set(shared.values()), reference, writing_system)
    reasons |= {token: USED_ELSEWHERE for token, string in shared.items() if string in in_reference}
    characters = {text for token, text in ordered.items() if len(text) == 1 and token not in reasons}
    in_bytes = {*base.missing_characters({character for text in ordered.values() for character in text})} - characters
    for token, text in ordered.items():
        if token not in reasons and not in_bytes.isdisjoint(text):
            reasons[token] = "of a character in bytes"
    return FilterResult([token for token in ordered if token not in reasons], Counter(reasons.values()))


# --------------------------------------------------------------------------------------------------------------- merge
def merge_reachable(base: Vocab, tokens: Sequence[str]) -> tuple[Vocab, list[str]]:
    """Appends tokens to the base, without unreachable ones, whose embedding rows would never be used.

    A token is unreachable if the base merges always form other parts first.

    Returns:
        the merged tokenizer and the tokens left out as unreachable
    """
    unreachable: set[str] = set()
    while True:
        kept = [token for token in tokens if token not in unreachable]
        merged = base.append(kept)
        more = merged.unreachable() & set(kept)
        if not more:
            return merged, [token for token in tokens if token in unreachable]
        unreachable |= more


def merge_as_original(base: SentencePieceVocab, candidates: Vocab) -> SentencePieceVocab:
    """The merge of the original project, for comparison: every candidate, all with the highest score.

    Equal scores leave the order of merges to sentencepiece, so the result cannot be a `tokenizer.json`.

    Raises:
        UserError: as `new_candidates`.
    """
    merged = base.append([*new_candidates(base, candidates)])
    for piece in merged.proto.pieces[base.first_new_id :]:
        piece.score = 0.0
    return merged


def unreachable_tokens(base: Vocab, merged: Vocab) -> list[str]:
    """Tokens that a merge made unreachable: new ones that no text produces, and base tokens no longer produced."""
    return sorted(merged.unreachable() - base.unreachable())


def count_scripts(tokens: Iterable[str]) -> Counter[str]:
    """Counts tokens by the Unicode scripts of their characters, as in "han + hiragana"; "marks" is punctuation."""
    aliases = {"cjk": "han", "ideographic": "han", "katakana-hiragana": "katakana", "combining": "marks"}

    def script(character: str) -> str:
        if not unicodedata.category(character).startswith(("L", "M")) and character not in "〇々":
            return "marks"
        name = unicodedata.name(character, "other").split()[0].lower()
        return aliases.get(name, name)

    return Counter(" + ".join(sorted(set(map(script, token.removeprefix(SPACE))))) for token in tokens)
