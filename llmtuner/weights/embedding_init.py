"""Initialises the embedding rows of new tokens from a model's base-vocabulary rows, by the published methods.

Output rows decide whether other languages change: the logit of a convex combination of base-vocabulary rows is the same
combination of their logits, so apart from rounding it never exceeds the largest of them, and greedy answers stay the same.
`CONVEX_METHODS` lists the methods with this property; norm correction and noise lose it. Input rows have no such
constraint, since a new token never occurs in a Chinese or English prompt.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import regex
import torch

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import SPACE
from llmtuner.tokenizer.vocab import Vocab, read_vocab

METHODS = {
    "mean": "mean of the rows of the base tokens that spell it (SambaLingo, arXiv 2404.05829)",
    "first_weighted": "that mean, weights falling by e^2 from token to token (AdaptiVocab, arXiv 2503.19693: output)",
    "last_weighted": "that mean, weights rising by e^2 from token to token (AdaptiVocab, arXiv 2503.19693: input)",
    "global_mean": "mean of all base-vocabulary rows, the same row for every new token (Hewitt 2021)",
    "random": "normal around 0 with the standard deviation of the base-vocabulary rows (the usual default)",
    "focus": "sparsemax-weighted mean of the base tokens that occur in similar contexts (FOCUS, arXiv 2305.14481)",
    "glossary": "from a glossary's translations of it, or for output rows of words that begin with it, else as mean "
    "(cf. PreAlign, arXiv 2407.16222)",
}
CONVEX_METHODS = ("mean", "first_weighted", "last_weighted", "global_mean", "focus", "glossary")
_LOG_WEIGHT_STEP = {"mean": 0.0, "first_weighted": -2.0, "last_weighted": 2.0}  # from token to token
# Letters of scripts that write a space before a word: unlike those by which `TermFinder` tells where a word ends, not katakana
# and digits, and Hangul.
_SPACED_LETTER = regex.compile(
    r"[\p{L}--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]]", regex.V1
)
_ROW_CHUNK = 4096
_COLUMN_CHUNK = 256


@dataclass(frozen=True)
class NewTokens:
    """The ids of new tokens, and how the base tokenizer spells each of them."""

    first_id: int
    base_ids: list[list[int]]
    """For each new token the ids of the base tokens that spell it."""
    unk_id: int | None
    """The id of the token for what cannot be encoded; None if the tokenizer has none."""
    base_range: range
    """The ids of the base vocabulary, without control and special tokens."""

    @property
    def end(self) -> int:
        """One past the last new id."""
        return self.first_id + len(self.base_ids)


def find_new_tokens(base: Path, merged: Path) -> NewTokens:
    """Compares the tokenizers of two directories: new tokens come after all ids of the base, special ones included.

    Raises:
        UserError: if one of them cannot be read, or the second does not keep the ids of the first.
    """
    before, after = read_vocab(base), read_vocab(merged)
    return NewTokens(before.first_new_id, before.spell_new_tokens(after), before.unk_id, before.base_range)


def init_new_embeddings(
    matrix: torch.Tensor,
    new: NewTokens,
    method: str,
    norm_correction: bool = False,
    seed: int = 0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Initialises the rows of new tokens in one embedding matrix.

    Args:
        matrix: [rows, width] of any dtype, at least `new.first_id` rows; it may be memory-mapped: it is read in chunks
            and never converted to fp32 as a whole.
        method: one of `METHODS`.
        norm_correction: scales each row to the median norm of the base-vocabulary rows (as Nemotron's tokenizer extension
            does for input rows); means of several rows are shorter than these.
        seed: of the method "random"; use a different one for each matrix.
        weights: of the method "focus", from `focus_weights`, or "glossary", from `glossary_weights` or for output rows from
            `first_token_weights`.

    Returns:
        [new tokens, width] in fp32

    Raises:
        UserError: if the method is unknown.
    """
    if method not in METHODS:
        raise UserError(f"unknown initialisation method {method!r}. Choose one of: {', '.join(METHODS)}.")
    count, width = len(new.base_ids), matrix.shape[1]
    if method == "random":
        noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        rows = noise * _base_std(matrix, new)
    elif method == "global_mean":
        rows = base_mean(matrix, new).expand(count, width).clone()
    elif method in ("focus", "glossary"):
        assert weights is not None, f"the method {method} needs the weights from {method}_weights"
        rows = weighted_rows(matrix, weights)
    else:
        rows = weighted_rows(matrix, position_weights(new, method))
    if norm_correction:
        rows *= median_norm(matrix, new) / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows


def weighted_rows(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows in fp32: sparse weights [new tokens, base ids] times matrix [rows, width]."""
    base_rows = matrix[: weights.shape[1]]
    columns = range(0, matrix.shape[1], _COLUMN_CHUNK)
    return torch.cat(
        [torch.sparse.mm(weights, base_rows[:, start : start + _COLUMN_CHUNK].float()) for start in columns], dim=1
    )


def position_weights(new: NewTokens, method: str) -> torch.Tensor:
    """Sparse [new tokens, base ids]: weights by position in the spelling of each token; rows sum to 1."""
    positions = [torch.arange(len(ids), dtype=torch.float32) for ids in new.base_ids]
    return sparse_weights(
        new.base_ids, [(_LOG_WEIGHT_STEP[method] * position).softmax(0) for position in positions], new
    )


def glossary_weights(
    base: Vocab, merged: Vocab, new: NewTokens, translations: Mapping[str, Collection[str]]
) -> tuple[torch.Tensor, int]:
    """Weights of base tokens for each new token: the mean of its translations, each of which is the mean of its tokens.

    A new token that is no term of the glossary, without the mark of a space before it, is the mean of its spelling.

    Args:
        translations: term in the added language -> its translations into languages of the base.

    Returns:
        sparse [new tokens, base ids] in fp32, whose rows sum to 1; how many new tokens have a translation
    """
    terms = [(merged.text(token) or "").removeprefix(SPACE) for token in merged.tokens[new.first_id :]]
    spelled = _spell_translations(base, {term: translations.get(term, ()) for term in terms})
    num_translated = sum(bool(spelled[term]) for term in terms)
    choices = [spelled[term] or [spelling] for term, spelling in zip(terms, new.base_ids, strict=True)]
    return _mean_of_means(choices, new), num_translated


def first_token_weights(
    base: Vocab, merged: Vocab, new: NewTokens, translations: Mapping[str, Collection[str]]
) -> tuple[torch.Tensor, int]:
    """Weights of base tokens for the output row of each new token, which is what its logit is computed from.

    Half is the mean of its spelling, and half the mean of the first tokens of the translations of all terms that begin with
    it: where a model is about to say a word in a language of the base, the word's first token is what it predicts. A new
    token that begins no term is the mean of its spelling.

    Args:
        translations: term in the added language -> its translations into languages of the base.

    Returns:
        sparse [new tokens, base ids] in fp32, whose rows sum to 1; how many new tokens begin a term
    """
    first: dict[int, dict[int, None]] = {}
    terms = [term for term in translations if term]
    spelled = _spell_translations(base, translations)
    for term, ids in zip(terms, _spell(merged, terms), strict=True):
        first.setdefault(ids[0], {}).update(dict.fromkeys(spelling[0] for spelling in spelled[term]))
    firsts = [[*first.get(index, ())] for index in range(new.first_id, new.end)]
    choices = [[spelling, other] if other else [spelling] for spelling, other in zip(new.base_ids, firsts, strict=True)]
    return _mean_of_means(choices, new), sum(map(bool, firsts))


def _spell_translations(base: Vocab, translations: Mapping[str, Collection[str]]) -> dict[str, list[list[int]]]:
    spelled = iter(_spell(base, [text for texts in translations.values() for text in texts]))
    return {term: [next(spelled) for _ in texts] for term, texts in translations.items()}


def _spell(vocab: Vocab, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as in the middle of a longer one, where a word of a script with spaces has one before it."""
    spaced = [" " + text if _SPACED_LETTER.match(text) else text for text in texts]
    return vocab.spell([vocab.from_bytes(text.encode()) or text.replace(" ", SPACE) for text in spaced])


def _mean_of_means(choices: Sequence[Sequence[Sequence[int]]], new: NewTokens) -> torch.Tensor:
    """Sparse weights of the mean over each token's spellings, each of which is the mean of its ids."""
    ids = [[index for spelling in one for index in spelling] for one in choices]
    values = [
        torch.cat([torch.full((len(spelling),), 1 / len(spelling) / len(one)) for spelling in one]) for one in choices
    ]
    return sparse_weights(ids, values, new)


def sparse_weights(ids: Sequence[Sequence[int]], values: Sequence[torch.Tensor], new: NewTokens) -> torch.Tensor:
    """Sparse [new tokens, base ids] from the ids and weights of each new token; the weights of a repeated id add up."""
    rows = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(row) for row in ids]))
    columns = torch.tensor([index for row in ids for index in row], dtype=torch.int64)
    size = (len(new.base_ids), new.first_id)
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), torch.cat(list(values)), size, check_invariants=True
    ).coalesce()


def median_norm(matrix: torch.Tensor, new: NewTokens) -> float:
    """Median L2 norm of the base-vocabulary rows."""
    return float(torch.cat([chunk.norm(dim=1) for chunk in _base_row_chunks(matrix, new)]).median())


def base_mean(matrix: torch.Tensor, new: NewTokens) -> torch.Tensor:
    """Mean of the base-vocabulary rows: [width] in fp32."""
    total = torch.stack([chunk.sum(dim=0, dtype=torch.float64) for chunk in _base_row_chunks(matrix, new)]).sum(dim=0)
    return (total / len(new.base_range)).float()


def _base_std(matrix: torch.Tensor, new: NewTokens) -> float:
    sums = torch.tensor([[chunk.sum(), chunk.square().sum()] for chunk in _base_row_chunks(matrix, new)])
    mean, mean_square = (sums.double().sum(dim=0) / (len(new.base_range) * matrix.shape[1])).tolist()
    return math.sqrt(mean_square - mean**2)


def _base_row_chunks(matrix: torch.Tensor, new: NewTokens) -> Iterator[torch.Tensor]:
    """Yields the base-vocabulary rows in fp32, `_ROW_CHUNK` at a time."""
    base_rows = matrix[new.base_range.start : new.base_range.stop]
    return (chunk.float() for chunk in base_rows.split(_ROW_CHUNK))
