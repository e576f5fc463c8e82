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

import torch

from llmtuner.console import UserError
from llmtuner.data.term_finder import is_spaced
from llmtuner.tokenizer.chatglm3 import SPACE
from llmtuner.tokenizer.vocab import Vocab, read_vocab

METHODS = {
    "mean": "mean of the rows of the base tokens that spell it (SambaLingo, arXiv 2404.05829)",
    "first_weighted": "that mean, weights falling by e^2 from token to token (AdaptiVocab, arXiv 2503.19693: output)",
    "last_weighted": "that mean, weights rising by e^2 from token to token (AdaptiVocab, arXiv 2503.19693: input)",
    "global_mean": "mean of all base-vocabulary rows, the same row for every new token (Hewitt 2021)",
    "random": "normal around 0 with the standard deviation of the base-vocabulary rows (the usual default)",
    "focus": "sparsemax-weighted mean of the base tokens that occur in similar contexts (FOCUS, arXiv 2305.14481)",
    "glossary": "mean of the rows of its translations, where a glossary has them, else as mean (cf. PreAlign, arXiv 2407.16222)",
}
CONVEX_METHODS = ("mean", "first_weighted", "last_weighted", "global_mean", "focus", "glossary")
_LOG_WEIGHT_STEP = {"mean": 0.0, "first_weighted": -2.0, "last_weighted": 2.0}  # from token to token
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
        weights: of the method "focus", from `focus_weights`, or "glossary", from `glossary_weights`.

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
    ids, values, num_translated = [], [], 0
    for token, spelling in zip(merged.tokens[new.first_id :], new.base_ids, strict=True):
        texts = translations.get((merged.text(token) or "").removeprefix(SPACE), ())
        # As in the middle of a text: a word of a script with spaces has one before it.
        spaced = [" " + text if is_spaced(text[0]) else text for text in texts]
        spellings = base.spell([base.from_bytes(text.encode()) or text.replace(" ", SPACE) for text in spaced])
        num_translated += bool(spellings)
        spellings = spellings or [spelling]
        ids.append([index for part in spellings for index in part])
        values.append(torch.cat([torch.full((len(part),), 1 / len(part) / len(spellings)) for part in spellings]))
    return sparse_weights(ids, values, new), num_translated


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
