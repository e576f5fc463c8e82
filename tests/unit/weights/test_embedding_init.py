"""Initial embeddings of new tokens: each method against its definition, and what output rows promise other languages."""

import math

import pytest
import torch

from llmtuner.console import UserError
from llmtuner.tokenizer.vocab import JsonVocab, read_vocab
from llmtuner.weights import embedding_init
from llmtuner.weights.embedding_init import (
    CONVEX_METHODS,
    METHODS,
    NewTokens,
    first_token_weights,
    glossary_weights,
    init_new_embeddings,
    median_norm,
    position_weights,
    weighted_rows,
)
from llmtuner.weights.focus import focus_weights
from tests.tiny_models import tiny_tokenizer
from tests.tokenizers import make_vocab
from tests.unit.tokenizer.test_vocab import metaspace_tokenizer

BASE = range(3, 51)  # after <unk>, <s>, </s>; nine special tokens and four padding rows follow
NEW = NewTokens(60, [[5, 9], [11, 12, 13], [7, 7, 20], [30, 31, 32, 33]], 0, range(3, 51))


@pytest.fixture
def matrix():
    """64 rows of width 40; the rows outside the base vocabulary are outliers."""
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(1)) + 0.3
    rows[:3] = rows[51:] = 1000.0
    return rows


@pytest.fixture
def focus_sparse_weights():
    """FOCUS weights from random vectors."""
    vectors = torch.nn.functional.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(2)), dim=1)
    return focus_weights(vectors, NEW)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and a remainder in every loop over chunks."""
    for name, size in (("_ROW_CHUNK", 10), ("_COLUMN_CHUNK", 16)):
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


def test_statistics_cover_the_base_vocabulary_only(matrix):
    base_tokens = matrix[BASE.start : BASE.stop]
    mean = init_new_embeddings(matrix, NEW, "global_mean")
    assert torch.allclose(mean, base_tokens.mean(dim=0).expand(4, -1), atol=1e-5)
    assert median_norm(matrix, NEW) == pytest.approx(float(base_tokens.norm(dim=1).median()))
    many = NewTokens(60, [[5]] * 2000, 0, range(3, 51))
    noise = init_new_embeddings(matrix, many, "random")
    assert float(noise.std()) == pytest.approx(float(base_tokens.std()), rel=0.02)
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(noise, init_new_embeddings(matrix, many, "random", seed=0))
    assert not torch.equal(noise, init_new_embeddings(matrix, many, "random", seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_norm_correction_keeps_the_direction(matrix, focus_sparse_weights, method):
    plain = init_new_embeddings(matrix, NEW, method, weights=focus_sparse_weights)
    corrected = init_new_embeddings(matrix, NEW, method, norm_correction=True, weights=focus_sparse_weights)
    assert torch.allclose(corrected.norm(dim=1), torch.full((4,), median_norm(matrix, NEW)))
    assert torch.allclose(torch.cosine_similarity(plain, corrected), torch.ones(4))


def test_norm_correction_of_a_zero_row_is_zero(matrix):
    matrix[9] = -matrix[5]
    assert torch.equal(init_new_embeddings(matrix, NEW, "mean", norm_correction=True)[0], torch.zeros(40))


def test_an_unknown_method_is_refused(matrix):
    with pytest.raises(UserError, match=r"unknown initialisation method 'median'.*mean, first_weighted"):
        init_new_embeddings(matrix, NEW, "median")


# ------------------------------------------------------------------------------------------------------- the promise
@pytest.mark.parametrize("method", CONVEX_METHODS)
def test_convex_output_rows_never_win(matrix, focus_sparse_weights, method):
    """The largest logit of a new token never exceeds the largest base-vocabulary logit, for any hidden state."""
    hidden = torch.randn(5000, 40, generator=torch.Generator().manual_seed(3))
    base_tokens = (hidden @ matrix[BASE.start : BASE.stop].T).max(dim=1).values
    excess = (hidden @ init_new_embeddings(matrix, NEW, method, weights=focus_sparse_weights).T).max(
        dim=1
    ).values - base_tokens
    assert float(excess.max()) < 1e-4
    corrected = (
        (hidden @ init_new_embeddings(matrix, NEW, method, norm_correction=True, weights=focus_sparse_weights).T)
        .max(dim=1)
        .values
    )
    if method != "global_mean":  # so short that it wins nowhere here even when scaled
        assert float((corrected - base_tokens).max()) > 1


def test_weights_are_convex(focus_sparse_weights):
    for weights in (
        focus_sparse_weights,
        *(position_weights(NEW, method) for method in ("mean", "first_weighted", "last_weighted")),
    ):
        dense = weights.to_dense()
        assert dense.shape == (4, 60)
        assert float(dense.min()) >= 0
        assert torch.allclose(dense.sum(dim=1), torch.ones(4))


def test_weighted_rows_reads_only_rows_below_the_first_new_id(matrix):
    matrix[60:] = float("nan")
    weights = position_weights(NEW, "mean")
    assert torch.allclose(weighted_rows(matrix, weights), weights.to_dense() @ matrix[:60], atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ glossary
@pytest.fixture(params=["sentencepiece", "metaspace", "qwen3"])
def vocab(request, tmp_path):
    if request.param == "sentencepiece":
        return make_vocab(["▁", *"abeiklnortw山上下在町，。", "上下", "in", "▁w", "▁wa", "ter"])
    if request.param == "metaspace":
        return JsonVocab(metaspace_tokenizer())
    tiny_tokenizer(request.param).save_pretrained(tmp_path)
    return read_vocab(tmp_path)


def merge(vocab, *texts):
    tokens = [vocab.from_text(text) for text in texts]
    return vocab.append(tokens), NewTokens(vocab.first_new_id, vocab.spell(tokens), vocab.unk_id, vocab.base_range)


def test_a_translated_token_is_the_mean_of_its_translations(vocab):
    """Translations are spelled as in the middle of a text, of which the start is cut off here."""
    merged, new = merge(vocab, "みず", "▁みず", "みずうみ", "み")
    weights, translated = glossary_weights(
        vocab, merged, new, {"みず": ["在上下", "water"], "うみ": ["山"], "": ["町"]}
    )
    before, chinese, english = vocab.encode(["在，", "在，在上下", "在， water"])
    expected = torch.zeros(new.first_id)
    for part in (chinese[len(before) :], english[len(before) :]):
        for index in part:
            expected[index] += 0.5 / len(part)
    rows = weights.to_dense()
    assert translated == 2
    assert torch.allclose(rows[0], expected)
    assert torch.equal(rows[1], rows[0])  # the mark of a space is no part of the word
    assert torch.equal(rows[2:], position_weights(new, "mean").to_dense()[2:])
    assert torch.allclose(rows.sum(dim=1), torch.ones(4))


def test_the_output_row_of_a_token_leans_on_what_translations_begin_with(vocab):
    merged, new = merge(vocab, "み", "ず", "みず")
    words = {"みず": ["在上下", "water"], "みずみ": ["在町"], "み": ["山"], "": ["町"], "山": ["町"]}
    weights, found = first_token_weights(vocab, merged, new, words)
    rows, mean = weights.to_dense(), position_weights(new, "mean").to_dense()
    before, chinese, english, mountain = vocab.encode(["在，", "在，在上下", "在， water", "在，山"])
    expected = mean[2] / 2
    for ids in (chinese, english):
        expected[ids[len(before)]] += 0.25  # once, though two translations begin with 在
    assert found == 2
    assert torch.allclose(rows[2], expected)
    assert torch.allclose(rows[0], mean[0] / 2 + torch.eye(new.first_id)[mountain[len(before)]] / 2)
    assert torch.equal(rows[1], mean[1])
    assert torch.allclose(rows.sum(dim=1), torch.ones(3))


def test_only_scripts_with_spaces_have_one_before_a_word(vocab):
    """Katakana words are found as a whole in a text, but no space separates them; nor a number from Chinese before it."""
    merged, new = merge(vocab, "カ", "タ", "カタ")
    weights, found = first_token_weights(vocab, merged, new, {"カタ": ["町"], "タ": ["在"]})
    before, town = vocab.encode(["在，", "在，町"])
    assert found == 2
    assert weights.to_dense()[2, town[len(before)]] >= 0.5


def test_a_translation_of_several_words_has_its_spaces(vocab):
    merged, new = merge(vocab, "みず")
    weights, _ = glossary_weights(vocab, merged, new, {"みず": ["in water"]})
    before, english = vocab.encode(["在，", "在， in water"])
    assert {*weights.coalesce().indices()[1].tolist()} == {*english[len(before) :]}
