"""FOCUS (arXiv 2305.14481): weights of base tokens for each new token, from how tokens are used in text.

Static token vectors are made from co-occurrence counts; each new token is a sparsemax-weighted mean of the base tokens whose
vectors are most similar to its own.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from llmtuner.weights.embedding_init import NewTokens, sparse_weights

_BATCH_TOKENS = 1_000_000
_CONTEXT_SMOOTHING = 0.75  # as in word2vec; without it rare contexts dominate (Levy, Goldberg & Dagan 2015)


def focus_weights(vectors: torch.Tensor, new: NewTokens, chunk_size: int = 256) -> torch.Tensor:
    """Weights of base tokens for each new token: the sparsemax of the cosine similarities of their vectors.

    A new token without a vector falls back to the mean of its spelling.

    Args:
        vectors: [ids, dimensions] of unit length, or zero for a token without a vector (`static_vectors`).

    Returns:
        sparse [new tokens, base ids] in fp32; rows sum to 1
    """
    has_vector = vectors.any(dim=1)
    base = torch.tensor([index for index in new.base_range if has_vector[index]], dtype=torch.int64)
    ids = [list(spelling) for spelling in new.base_ids]
    values = [torch.full((len(spelling),), 1 / len(spelling)) for spelling in new.base_ids]
    offsets = has_vector[new.first_id : new.end].nonzero()[:, 0]
    for chunk in offsets.split(chunk_size) if len(base) else ():
        similarities = vectors[new.first_id + chunk] @ vectors[base].T
        for offset, weights in zip(chunk.tolist(), sparsemax(similarities), strict=True):
            support = weights.nonzero()[:, 0]
            ids[offset], values[offset] = base[support].tolist(), weights[support]
    return sparse_weights(ids, values, new)


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """The point of the probability simplex nearest to each row of [rows, classes] (Martins & Astudillo 2016)."""
    descending = scores.sort(dim=1, descending=True).values
    excess = descending.cumsum(dim=1) - 1
    ranks = torch.arange(1, scores.shape[1] + 1)
    support = (descending * ranks > excess).sum(dim=1, keepdim=True)
    return (scores - excess.gather(1, support - 1) / support).clamp(min=0)


def static_vectors(
    texts: Iterable[Sequence[int]],
    vocab_size: int,
    dimensions: int = 100,
    window: int = 5,
    min_count: int = 5,
    seed: int = 0,
) -> torch.Tensor:
    """Static vectors of tokens from tokenized text: tokens in similar contexts have similar directions.

    The leading singular vectors of the positive pointwise mutual information (PPMI) of tokens within `window` tokens of each
    other, which is what skip-gram with negative sampling factorises (Levy & Goldberg 2014).

    Args:
        texts: the ids of each text.
        min_count: a rarer token gets no vector.

    Returns:
        [vocab_size, dimensions] in fp32, of unit length; zero for a token without a vector
    """
    keys, counts, token_counts = _count_cooccurrences(texts, vocab_size, window)
    first, second = np.divmod(keys, vocab_size)
    frequent = token_counts >= min_count
    kept = frequent[first] & frequent[second]
    ppmi = _positive_pmi(first[kept], second[kept], counts[kept], vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, singular, _ = torch.svd_lowrank(ppmi, q=dimensions + 10, niter=4)
    vectors = torch.zeros(vocab_size, dimensions)
    vectors[:, : left.shape[1]] = (left * singular.sqrt())[:, :dimensions]
    has_vector = torch.zeros(vocab_size, 1)
    has_vector[ppmi.indices()[0]] = 1  # other rows hold rounding errors only
    return torch.nn.functional.normalize(vectors * has_vector, dim=1)


def _count_cooccurrences(
    texts: Iterable[Sequence[int]], vocab_size: int, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts unordered pairs of ids within `window` tokens of one text.

    Returns:
        pair keys (smaller id * vocab_size + larger id), their counts, and the count of each id
    """
    keys: np.ndarray = np.zeros(0, dtype=np.int64)
    counts: np.ndarray = np.zeros(0)
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in _batches(texts):
        ids = np.concatenate(batch).astype(np.int64)
        text_index = np.repeat(np.arange(len(batch)), [len(text) for text in batch])
        token_counts += np.bincount(ids, minlength=vocab_size)
        found = []
        for distance in range(1, window + 1):
            same_text = text_index[:-distance] == text_index[distance:]
            left, right = ids[:-distance][same_text], ids[distance:][same_text]
            found.append(np.minimum(left, right) * vocab_size + np.maximum(left, right))
        new_keys, new_counts = np.unique(np.concatenate(found), return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate([counts, new_counts]))
    return keys, counts, token_counts


def _batches(texts: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Yields texts in lists of about `_BATCH_TOKENS` tokens."""
    batch: list[Sequence[int]] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if size:
        yield batch


def _positive_pmi(first: np.ndarray, second: np.ndarray, counts: np.ndarray, vocab_size: int) -> torch.Tensor:
    """Sparse [vocab_size, vocab_size]: PPMI of a token and its smoothed context, from pair counts."""
    mirrored = first != second
    rows = np.concatenate([first, second[mirrored]])
    columns = np.concatenate([second, first[mirrored]])
    counts = np.concatenate([np.where(mirrored, counts, 2 * counts), counts[mirrored]])
    margins = np.bincount(rows, weights=counts, minlength=vocab_size)
    contexts = margins**_CONTEXT_SMOOTHING
    pmi = np.log(counts * contexts.sum() / (margins[rows] * contexts[columns]))
    positive = pmi > 0
    indices = torch.from_numpy(np.stack([rows[positive], columns[positive]]))
    return torch.sparse_coo_tensor(
        indices, torch.from_numpy(pmi[positive]).float(), (vocab_size, vocab_size), check_invariants=True
    ).coalesce()
