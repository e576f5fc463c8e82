"""Starting rows of new pieces: each method against its definition, and what output rows promise other languages."""

import itertools
import math
from collections import Counter

import numpy
import pytest
import torch

from llmtuner.console import UserError
from llmtuner.weights import embedding_init
from llmtuner.weights.embedding_init import (
    CONVEX_METHODS,
    METHODS,
    NewTokens,
    focus_weights,
    init_new_embeddings,
    median_norm,
    position_weights,
    sparsemax,
    static_vectors,
    weighted_rows,
)

NATIVES = range(3, 51)  # behind <unk>, <s>, </s>; nine special tokens and four rows of padding follow
NEW = NewTokens(60, [[5, 9], [11, 12, 13], [7, 7, 20], [30, 31, 32, 33]], unk_id=0)


@pytest.fixture
def matrix():
    """64 rows, 40 wide; the rows that are no native pieces' stand out."""
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)) + 0.3
    rows[:3] = rows[51:] = 1000.0
    return rows


@pytest.fixture
def focus():
    """Weights in which each new piece has natives of its own."""
    vectors = torch.nn.functional.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    return focus_weights(vectors, NEW)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts and a rest in every loop over parts."""
    for name, size in (("_ROW_CHUNK", 10), ("_COLUMN_CHUNK", 16), ("_TOKEN_CHUNK", 50)):
        monkeypatch.setattr(embedding_init, name, size)


# --------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mean_is_formed_in_fp32(matrix, dtype):
    stored = matrix.to(dtype)
    rows = init_new_embeddings(stored, NEW, "mean")
    assert rows.dtype == torch.float32
    for row, spelling in zip(rows, NEW.base_ids, strict=True):
        assert torch.allclose(row, stored[spelling].float().mean(dim=0), atol=1e-6)


def test_weights_by_position(matrix):
    total = 1 + math.exp(-2) + math.exp(-4)
    falling = sum(matrix[index] * math.exp(-2 * place) / total for place, index in enumerate([11, 12, 13]))
    rising = sum(matrix[index] * math.exp(-2 * place) / total for place, index in enumerate([13, 12, 11]))
    assert torch.allclose(init_new_embeddings(matrix, NEW, "first_weighted")[1], falling, atol=1e-6)
    assert torch.allclose(init_new_embeddings(matrix, NEW, "last_weighted")[1], rising, atol=1e-6)


def test_statistics_are_of_native_pieces_alone(matrix):
    natives = matrix[NATIVES.start : NATIVES.stop]
    mean = init_new_embeddings(matrix, NEW, "global_mean")
    assert torch.allclose(mean, natives.mean(dim=0).expand(4, -1), atol=1e-5)
    assert median_norm(matrix, NEW) == pytest.approx(float(natives.norm(dim=1).median()))
    many = NewTokens(60, [[5]] * 2000, unk_id=0)
    noise = init_new_embeddings(matrix, many, "random")
    assert float(noise.std()) == pytest.approx(float(natives.std()), rel=0.02)
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(noise, init_new_embeddings(matrix, many, "random", seed=0))
    assert not torch.equal(noise, init_new_embeddings(matrix, many, "random", seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_norm_correction_keeps_the_direction(matrix, focus, method):
    plain = init_new_embeddings(matrix, NEW, method, weights=focus)
    corrected = init_new_embeddings(matrix, NEW, method, norm_correction=True, weights=focus)
    assert torch.allclose(corrected.norm(dim=1), torch.full((4,), median_norm(matrix, NEW)))
    assert torch.allclose(torch.cosine_similarity(plain, corrected), torch.ones(4))


def test_norm_correction_of_a_zero_row_is_zero(matrix):
    matrix[9] = -matrix[5]
    assert torch.equal(init_new_embeddings(matrix, NEW, "mean", norm_correction=True)[0], torch.zeros(40))


def test_an_unknown_method_is_refused(matrix):
    with pytest.raises(UserError, match=r"'median' is unknown.*mean, first_weighted"):
        init_new_embeddings(matrix, NEW, "median")


# ------------------------------------------------------------------------------------------------------- the promise
@pytest.mark.parametrize("method", CONVEX_METHODS)
def test_convex_output_rows_never_win(matrix, focus, method):
    """The greatest logit of a new piece is at most the greatest native one, whatever the hidden state."""
    hidden = torch.randn(5000, 40, generator=torch.Generator().manual_seed(3))
    natives = (hidden @ matrix[NATIVES.start : NATIVES.stop].T).max(dim=1).values
    excess = (hidden @ init_new_embeddings(matrix, NEW, method, weights=focus).T).max(dim=1).values - natives
    assert float(excess.max()) < 1e-4
    corrected = (
        (hidden @ init_new_embeddings(matrix, NEW, method, norm_correction=True, weights=focus).T).max(dim=1).values
    )
    if method != "global_mean":  # so short before that even scaled it wins nowhere here
        assert float((corrected - natives).max()) > 1


def test_weights_are_convex(focus):
    for weights in (focus, *(position_weights(NEW, method) for method in ("mean", "first_weighted", "last_weighted"))):
        dense = weights.to_dense()
        assert dense.shape == (4, 60)
        assert float(dense.min()) >= 0
        assert torch.allclose(dense.sum(dim=1), torch.ones(4))


def test_combine_reads_only_rows_below_the_first_new_id(matrix):
    matrix[60:] = float("nan")
    weights = position_weights(NEW, "mean")
    assert torch.allclose(weighted_rows(matrix, weights), weights.to_dense() @ matrix[:60], atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- focus
def test_sparsemax_is_the_projection_onto_the_simplex():
    assert torch.allclose(sparsemax(torch.tensor([[0.1, 1.1, 0.2]]))[0], torch.tensor([0.0, 0.95, 0.05]))
    assert torch.allclose(sparsemax(torch.tensor([[3.0, 1.0, 0.0]]))[0], torch.tensor([1.0, 0.0, 0.0]))
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(4))
    low, high = scores.min(dim=1, keepdim=True).values - 1, scores.max(dim=1, keepdim=True).values
    for _ in range(40):  # the threshold at which what stands above sums to 1, by bisection
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


def test_focus_takes_natives_that_are_used_alike():
    weights = focus_weights(axes(id_4=0, id_6=1, id_8=1, id_60=0, id_61=1), NEW, chunk_size=1).to_dense()
    assert weights[0].nonzero()[:, 0].tolist() == [4]
    assert weights[1].nonzero()[:, 0].tolist() == [6, 8]
    assert torch.allclose(weights[1, [6, 8]], torch.tensor([0.5, 0.5]))


def test_focus_falls_back_to_the_spelling_and_leaves_special_tokens_out():
    mean = position_weights(NEW, "mean").to_dense()
    weights = focus_weights(axes(id_4=0, id_60=0), NEW).to_dense()
    assert torch.allclose(weights[1:], mean[1:])  # no vector of their own
    specials = axes(id_0=0, id_2=0, id_51=0, id_59=0, id_60=0)
    assert torch.allclose(focus_weights(specials, NEW).to_dense(), mean)  # no native piece with a vector
    weights = focus_weights(specials + axes(id_3=0, id_50=0), NEW).to_dense()
    assert weights[0].nonzero()[:, 0].tolist() == [3, 50]


def random_texts(count=40, ids=12):
    generator = numpy.random.default_rng(5)
    return [generator.integers(0, ids, size=length).tolist() for length in generator.integers(0, 30, size=count)]


def test_pairs_are_counted_within_texts():
    texts = random_texts()
    expected: Counter[tuple[int, int]] = Counter()
    for text in texts:
        for (one, first), (other, second) in itertools.combinations(enumerate(text), 2):
            if other - one <= 3:
                expected[min(first, second), max(first, second)] += 1
    keys, counts, tokens = embedding_init._count_cooccurrences(texts, 12, window=3)
    assert {divmod(int(key), 12): count for key, count in zip(keys, counts, strict=True)} == expected
    assert Counter({index: int(count) for index, count in enumerate(tokens)}) == Counter(itertools.chain(*texts))


def test_positive_information_by_its_definition():
    keys, counts, _ = embedding_init._count_cooccurrences(random_texts(), 12, window=3)
    first, second = numpy.divmod(keys, 12)
    table = numpy.zeros((12, 12))
    numpy.add.at(table, (first, second), counts)
    table = table + table.T  # a pair of equal ids is seen from both sides too
    contexts = table.sum(axis=0) ** 0.75
    joint, own, context = table / table.sum(), table.sum(axis=1) / table.sum(), contexts / contexts.sum()
    with numpy.errstate(divide="ignore"):
        expected = numpy.maximum(numpy.log(joint / (own[:, None] * context)), 0)
    found = embedding_init._positive_pmi(first, second, counts, 12).to_dense().numpy()
    assert numpy.allclose(found, expected, atol=1e-5)


def test_pieces_used_alike_point_the_same_way():
    """Ids 10 and 11 stand between 1 and 2, ids 20 and 21 between 3 and 4; id 30 occurs twice."""
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
