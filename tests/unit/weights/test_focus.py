"""FOCUS: co-occurrence vectors and similarity weights by their definitions."""

import itertools
from collections import Counter

import numpy
import pytest
import torch

from llmtuner.weights import focus
from llmtuner.weights.embedding_init import NewTokens, position_weights
from llmtuner.weights.focus import focus_weights, sparsemax, static_vectors

NEW = NewTokens(60, [[5, 9], [11, 12, 13], [7, 7, 20], [30, 31, 32, 33]], 0, range(3, 51))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches of texts and a remainder."""
    monkeypatch.setattr(focus, "_BATCH_TOKENS", 50)


def test_sparsemax_is_the_projection_onto_the_simplex():
    assert torch.allclose(sparsemax(torch.tensor([[0.1, 1.1, 0.2]]))[0], torch.tensor([0.0, 0.95, 0.05]))
    assert torch.allclose(sparsemax(torch.tensor([[3.0, 1.0, 0.0]]))[0], torch.tensor([1.0, 0.0, 0.0]))
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(4))
    low, high = scores.min(dim=1, keepdim=True).values - 1, scores.max(dim=1, keepdim=True).values
    for _ in range(40):  # bisects for the threshold above which the excess sums to 1
        middle = (low + high) / 2
        above = (scores - middle).clamp(min=0).sum(dim=1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    assert torch.allclose(sparsemax(scores), (scores - low).clamp(min=0), atol=1e-5)


def axes(**where: int) -> torch.Tensor:
    """Vectors of 64 ids: `id_5=2` puts id 5 on axis 2; the others have none."""
    vectors = torch.zeros(64, 8)
    for name, axis in where.items():
        vectors[int(name.removeprefix("id_")), axis] = 1.0
    return vectors


def test_focus_selects_base_tokens_with_similar_contexts():
    weights = focus_weights(axes(id_4=0, id_6=1, id_8=1, id_60=0, id_61=1), NEW, chunk_size=1).to_dense()
    assert weights[0].nonzero()[:, 0].tolist() == [4]
    assert weights[1].nonzero()[:, 0].tolist() == [6, 8]
    assert torch.allclose(weights[1, [6, 8]], torch.tensor([0.5, 0.5]))


def test_focus_falls_back_to_the_spelling_and_leaves_special_tokens_out():
    mean = position_weights(NEW, "mean").to_dense()
    weights = focus_weights(axes(id_4=0, id_60=0), NEW).to_dense()
    assert torch.allclose(weights[1:], mean[1:])  # without a vector
    specials = axes(id_0=0, id_2=0, id_51=0, id_59=0, id_60=0)
    assert torch.allclose(focus_weights(specials, NEW).to_dense(), mean)  # no base token with a vector
    weights = focus_weights(specials + axes(id_3=0, id_50=0), NEW).to_dense()
    assert weights[0].nonzero()[:, 0].tolist() == [3, 50]


def random_texts(count=40, ids=12):
    generator = numpy.random.default_rng(5)
    return [generator.integers(0, ids, size=length).tolist() for length in generator.integers(0, 30, size=count)]


def test_pairs_are_counted_within_texts():
    texts = random_texts()
    expected: Counter[tuple[int, int]] = Counter()
    for text in texts:
        for (i, first), (j, second) in itertools.combinations(enumerate(text), 2):
            if j - i <= 3:
                expected[min(first, second), max(first, second)] += 1
    keys, counts, tokens = focus._count_cooccurrences(texts, 12, window=3)
    assert {divmod(int(key), 12): count for key, count in zip(keys, counts, strict=True)} == expected
    assert Counter({index: int(count) for index, count in enumerate(tokens)}) == Counter(itertools.chain(*texts))


def test_ppmi_by_its_definition():
    keys, counts, _ = focus._count_cooccurrences(random_texts(), 12, window=3)
    first, second = numpy.divmod(keys, 12)
    table = numpy.zeros((12, 12))
    numpy.add.at(table, (first, second), counts)
    table = table + table.T  # a pair of equal ids counts from both sides too
    contexts = table.sum(axis=0) ** 0.75
    joint, margin, context = table / table.sum(), table.sum(axis=1) / table.sum(), contexts / contexts.sum()
    with numpy.errstate(divide="ignore"):
        expected = numpy.maximum(numpy.log(joint / (margin[:, None] * context)), 0)
    found = focus._positive_pmi(first, second, counts, 12).to_dense().numpy()
    assert numpy.allclose(found, expected, atol=1e-5)


def test_tokens_in_similar_contexts_have_similar_vectors():
    """Ids 10 and 11 occur between 1 and 2, ids 20 and 21 between 3 and 4; id 30 occurs twice."""
    generator = numpy.random.default_rng(6)
    sentences = [
        [1, generator.choice([10, 11]), 2] if flip else [3, generator.choice([20, 21]), 4] for flip in (0, 1) * 200
    ]
    before = torch.get_rng_state()
    vectors = static_vectors([*sentences, [1, 30, 2], [1, 30, 2]], 40, dimensions=4, window=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert vectors.shape == (40, 4)
    alike = vectors @ vectors.T
    assert float(alike[10, 11]) > 0.99
    assert float(alike[20, 21]) > 0.99
    assert abs(float(alike[10, 20])) < 0.1
    assert not vectors[30].any()  # too rare
    assert not vectors[39].any()  # never seen
    known = vectors.any(dim=1)
    assert known.sum() == 8
    assert torch.allclose(vectors[known].norm(dim=1), torch.ones(8))
    torch.manual_seed(99)
    assert torch.equal(vectors, static_vectors([*sentences, [1, 30, 2], [1, 30, 2]], 40, dimensions=4, window=2))


def test_fewer_ids_than_dimensions():
    vectors = static_vectors([[0, 1, 2, 3] * 10], 6, dimensions=8)
    assert vectors.shape == (6, 8)
    assert not vectors[:, 6:].any()
    assert vectors[:4].norm(dim=1).allclose(torch.ones(4))


def test_no_text_gives_no_vector():
    assert not static_vectors([], 20, dimensions=4).any()
    assert not static_vectors([[5]], 20, dimensions=4).any()
