"""Starting rows for new pieces, made from a model's native rows in the ways that are published.

Rows of the output matrix decide what becomes of other languages: the logit of a convex combination of native rows is
that combination of native logits, so, but for the rounding of stored rows, it never exceeds the greatest of them, and
greedy answers stay what they were. `CONVEX_METHODS` names the methods that keep this; a norm correction or noise does not.
Rows of the input matrix are free: a new piece never stands in a Chinese or English prompt.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from llmtuner.console import UserError
from llmtuner.tokenizer.fast import BOS, EOS, SPECIAL_TOKENS, UNK

METHODS = {
    "mean": "mean of the rows of the native pieces that spell it (SambaLingo, arXiv 2404.05829)",
    "first_weighted": "that mean with weights falling by e^2 from piece to piece (AdaptiVocab, arXiv 2503.19693: output)",
    "last_weighted": "that mean with weights rising by e^2 from piece to piece (AdaptiVocab, arXiv 2503.19693: input)",
    "global_mean": "mean of all native rows, the same row for every new piece (Hewitt 2021)",
    "random": "normal around 0 with the standard deviation of the native rows (the habit for fresh embeddings)",
    "focus": "sparsemax-weighted mean of the native pieces used most alike in text (FOCUS, arXiv 2305.14481)",
}
CONVEX_METHODS = ("mean", "first_weighted", "last_weighted", "global_mean", "focus")
_LOG_WEIGHT_STEP = {"mean": 0.0, "first_weighted": -2.0, "last_weighted": 2.0}  # of log weight from piece to piece
_NUM_CONTROL_TOKENS = len((UNK, BOS, EOS))  # they stand before the native pieces, the special tokens behind them
_ROW_CHUNK = 4096
_COLUMN_CHUNK = 256
_TOKEN_CHUNK = 1_000_000
_CONTEXT_SMOOTHING = 0.75  # as in word2vec; without it rare contexts dominate (Levy, Goldberg & Dagan 2015)


@dataclass(frozen=True)
class NewTokens:
    """Which ids are new, and which native ids spell each of them."""

    first_id: int
    base_ids: list[list[int]]
    unk_id: int

    @property
    def end(self) -> int:
        return self.first_id + len(self.base_ids)


def find_new_tokens(base_tokenizer: Path, merged_tokenizer: Path) -> NewTokens:
    """Compares two sentencepiece models; new pieces stand behind the base's and the special tokens.

    Raises:
        UserError: if the second does not continue the first.
    """
    import sentencepiece

    from llmtuner.tokenizer.fast import SPECIAL_TOKENS

    base = sentencepiece.SentencePieceProcessor(model_file=str(base_tokenizer))
    merged = sentencepiece.SentencePieceProcessor(model_file=str(merged_tokenizer))
    size = base.get_piece_size()
    if any(base.id_to_piece(i) != merged.id_to_piece(i) for i in range(size)):
        raise UserError(
            f"{merged_tokenizer} does not begin with the pieces of {base_tokenizer}. Merge again with this base."
        )
    first_id = size + len(SPECIAL_TOKENS)
    newline = base.encode("\n")  # [▁, newline]: what follows is spelled as inside a text
    base_ids = []
    for new_id in range(first_id, merged.get_piece_size()):
        text = merged.id_to_piece(new_id).replace("▁", " ")
        base_ids.append(base.encode("\n" + text)[len(newline) :])
    return NewTokens(first_id, base_ids, base.unk_id())


# --------------------------------------------------------------------------------------------------------------- rows
def init_new_embeddings(
    matrix: torch.Tensor,
    new: NewTokens,
    method: str,
    norm_correction: bool = False,
    seed: int = 0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Starting rows of the new pieces for one embedding matrix.

    Args:
        matrix: [rows, width] of any dtype, at least `new.first_id` rows; it may be mapped from a file: it is read in
            parts and never held in fp32 as a whole.
        method: one of `METHODS`.
        norm_correction: scales each row to the median norm of the native rows (as Nemotron's tokenizer extension does
            for input rows); means of several rows are shorter than these.
        seed: of the method "random"; give the two matrices different ones.
        weights: of the method "focus", from `focus_weights`.

    Returns:
        [new pieces, width] in fp32

    Raises:
        UserError: if the method is unknown.
    """
    if method not in METHODS:
        raise UserError(f"the initialisation {method!r} is unknown. Choose one of: {', '.join(METHODS)}.")
    count, width = len(new.base_ids), matrix.shape[1]
    if method == "random":
        noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        rows = noise * _base_std(matrix, new)
    elif method == "global_mean":
        rows = _base_mean(matrix, new).expand(count, width).clone()
    elif method == "focus":
        assert weights is not None, "focus needs the weights that focus_weights makes"
        rows = weighted_rows(matrix, weights)
    else:
        rows = weighted_rows(matrix, position_weights(new, method))
    if norm_correction:
        rows *= median_norm(matrix, new) / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows


def weighted_rows(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows: sparse weights [new pieces, native ids] times matrix [rows, width], in fp32."""
    natives = matrix[: weights.shape[1]]
    columns = range(0, matrix.shape[1], _COLUMN_CHUNK)
    return torch.cat(
        [torch.sparse.mm(weights, natives[:, start : start + _COLUMN_CHUNK].float()) for start in columns], dim=1
    )


def position_weights(new: NewTokens, method: str) -> torch.Tensor:
    """Sparse [new pieces, native ids]: each piece's spelling, with the positional weights of `method`; rows sum to 1."""
    positions = [torch.arange(len(spelling), dtype=torch.float32) for spelling in new.base_ids]
    return _sparse_weights(
        [list(one) for one in new.base_ids], [(_LOG_WEIGHT_STEP[method] * one).softmax(0) for one in positions], new
    )


def median_norm(matrix: torch.Tensor, new: NewTokens) -> float:
    """Median Euclidean norm of the native pieces' rows, special tokens left out."""
    return float(torch.cat([part.norm(dim=1) for part in _base_row_chunks(matrix, new)]).median())


def _base_row_chunks(matrix: torch.Tensor, new: NewTokens) -> Iterator[torch.Tensor]:
    """The native pieces' rows in fp32, some at a time."""
    natives = matrix[_base_token_ids(new).start : _base_token_ids(new).stop]
    return (part.float() for part in natives.split(_ROW_CHUNK))


def _base_token_ids(new: NewTokens) -> range:
    return range(_NUM_CONTROL_TOKENS, new.first_id - len(SPECIAL_TOKENS))


def _base_mean(matrix: torch.Tensor, new: NewTokens) -> torch.Tensor:
    total = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in _base_row_chunks(matrix, new)]).sum(dim=0)
    return (total / len(_base_token_ids(new))).float()


def _base_std(matrix: torch.Tensor, new: NewTokens) -> float:
    sums = (
        torch.tensor([[part.sum(), part.square().sum()] for part in _base_row_chunks(matrix, new)]).double().sum(dim=0)
    )
    mean, mean_square = (sums / (len(_base_token_ids(new)) * matrix.shape[1])).tolist()
    return math.sqrt(mean_square - mean**2)


def _sparse_weights(ids: Sequence[Sequence[int]], values: Sequence[torch.Tensor], new: NewTokens) -> torch.Tensor:
    """Sparse [new pieces, native ids] from the ids and weights of each new piece; an id named twice counts twice."""
    rows = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(one) for one in ids]))
    columns = torch.tensor([index for one in ids for index in one], dtype=torch.int64)
    size = (len(new.base_ids), new.first_id)
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), torch.cat(list(values)), size, check_invariants=True
    ).coalesce()


# -------------------------------------------------------------------------------------------------------------- focus
def focus_weights(vectors: torch.Tensor, new: NewTokens, chunk_size: int = 256) -> torch.Tensor:
    """What FOCUS makes each new piece of: native pieces by the sparsemax of the cosines of static vectors.

    A new piece without a vector falls back to the mean of its spelling.

    Args:
        vectors: [ids, dimensions] of unit length, or zero for a piece without one (`static_vectors`).

    Returns:
        sparse [new pieces, native ids] in fp32; rows sum to 1
    """
    has_vector = vectors.any(dim=1)
    natives = torch.tensor([index for index in _base_token_ids(new) if has_vector[index]], dtype=torch.int64)
    ids = [list(spelling) for spelling in new.base_ids]
    values = [torch.full((len(spelling),), 1 / len(spelling)) for spelling in new.base_ids]
    found = has_vector[new.first_id : new.end].nonzero()[:, 0]
    for some in found.split(chunk_size) if len(natives) else ():
        for offset, weights in zip(
            some.tolist(), sparsemax(vectors[new.first_id + some] @ vectors[natives].T), strict=True
        ):
            chosen = weights.nonzero()[:, 0]
            ids[offset], values[offset] = natives[chosen].tolist(), weights[chosen]
    return _sparse_weights(ids, values, new)


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """The point of the probability simplex nearest to each row of [rows, choices] (Martins & Astudillo 2016)."""
    falling = scores.sort(dim=1, descending=True).values
    excess = falling.cumsum(dim=1) - 1
    places = torch.arange(1, scores.shape[1] + 1)
    support = (falling * places > excess).sum(dim=1, keepdim=True)
    return (scores - excess.gather(1, support - 1) / support).clamp(min=0)


def static_vectors(
    texts: Iterable[Sequence[int]],
    ids: int,
    dimensions: int = 100,
    window: int = 5,
    min_count: int = 5,
    seed: int = 0,
) -> torch.Tensor:
    """Static vectors of pieces from tokenized text: those used alike point the same way.

    The largest singular vectors of the positive pointwise mutual information of pieces that stand within `window`
    tokens of each other: what skip-gram with negative sampling factorises (Levy & Goldberg 2014).

    Args:
        texts: ids of each text.
        ids: the number of ids there are.
        min_count: a rarer piece gets no vector.

    Returns:
        [ids, dimensions] in fp32, of unit length; zero for a piece without a vector
    """
    keys, pairs, tokens = _count_cooccurrences(texts, ids, window)
    first, second = numpy.divmod(keys, ids)
    frequent = tokens >= min_count
    kept = frequent[first] & frequent[second]
    first, second, pairs = first[kept], second[kept], pairs[kept]
    association = _positive_pmi(first, second, pairs, ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, singular, _ = torch.svd_lowrank(association, q=dimensions + 10, niter=4)
    vectors = torch.zeros(ids, dimensions)
    vectors[:, : left.shape[1]] = (left * singular.sqrt())[:, :dimensions]
    known = torch.zeros(ids, 1)
    known[association.indices()[0]] = 1  # what is left of the other rows is rounding
    return torch.nn.functional.normalize(vectors * known, dim=1)


def _count_cooccurrences(
    texts: Iterable[Sequence[int]], ids: int, window: int
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Unordered pairs of ids within `window` tokens in one text: keys smaller * ids + greater, counts; counts of ids."""
    keys: numpy.ndarray = numpy.zeros(0, dtype=numpy.int64)
    counts: numpy.ndarray = numpy.zeros(0)
    tokens = numpy.zeros(ids, dtype=numpy.int64)
    for part in _batches(texts):
        stream = numpy.concatenate(part).astype(numpy.int64)
        text = numpy.repeat(numpy.arange(len(part)), [len(one) for one in part])
        tokens += numpy.bincount(stream, minlength=ids)
        found = []
        for distance in range(1, window + 1):
            together = text[:-distance] == text[distance:]
            one, other = stream[:-distance][together], stream[distance:][together]
            found.append(numpy.minimum(one, other) * ids + numpy.maximum(one, other))
        new_keys, new_counts = numpy.unique(numpy.concatenate(found), return_counts=True)
        keys, places = numpy.unique(numpy.concatenate([keys, new_keys]), return_inverse=True)
        counts = numpy.bincount(places, weights=numpy.concatenate([counts, new_counts]))
    return keys, counts, tokens


def _batches(texts: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Texts in lists of about `_TOKEN_CHUNK` tokens."""
    part: list[Sequence[int]] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= _TOKEN_CHUNK:
            yield part
            part, size = [], 0
    if size:
        yield part


def _positive_pmi(first: numpy.ndarray, second: numpy.ndarray, pairs: numpy.ndarray, ids: int) -> torch.Tensor:
    """Sparse [ids, ids]: positive pointwise mutual information of a piece and its smoothed context, from pair counts."""
    mirrored = first != second
    rows = numpy.concatenate([first, second[mirrored]])
    columns = numpy.concatenate([second, first[mirrored]])
    counts = numpy.concatenate([numpy.where(mirrored, pairs, 2 * pairs), pairs[mirrored]])
    margins = numpy.bincount(rows, weights=counts, minlength=ids)
    contexts = margins**_CONTEXT_SMOOTHING
    information = numpy.log(counts * contexts.sum() / (margins[rows] * contexts[columns]))
    positive = information > 0
    places = torch.from_numpy(numpy.stack([rows[positive], columns[positive]]))
    return torch.sparse_coo_tensor(
        places, torch.from_numpy(information[positive]).float(), (ids, ids), check_invariants=True
    ).coalesce()
