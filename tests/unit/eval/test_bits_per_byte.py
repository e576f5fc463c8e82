"""Bits per byte against sums done by hand."""

import math

import numpy
import pytest
import torch

from llmtuner.data.template import Template
from llmtuner.eval.bits_per_byte import Windows, bits_per_byte, bootstrap_ci, document_bits
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import encode, load_tokenizer
from tests.tiny_models import tiny_tokenizer


def test_bits_per_byte_equals_the_sum_by_hand(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    texts = ["小镇的东边是一条河。", "The ferry leaves at 9:30, not at 10.", "桜"]
    window = 8
    prefix = Template.from_tokenizer(tokenizer).prefix
    nats = 0.0
    for text in texts:
        ids = encode(tokenizer, text)
        for start in range(0, len(ids), window - 2):
            piece = torch.tensor([prefix + ids[start : start + window - 2]])
            with torch.no_grad():
                log_probabilities = model(input_ids=piece).logits[0].log_softmax(-1)
            nats -= sum(float(log_probabilities[at - 1, piece[0, at]]) for at in range(2, piece.shape[1]))
    by_hand = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts, window, tokens_per_batch=20) == pytest.approx(by_hand, rel=1e-4)


def test_bits_are_those_of_each_document(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    texts = ["小镇的东边是一条河。" * 3, "The ferry leaves at 9:30.", "桜"]
    windows = Windows.from_texts(tokenizer, texts, context_length=8)
    assert windows.num_bytes.tolist() == [90, 25, 3]
    alone = [bits_per_byte(model, tokenizer, [text], 8) * len(text.encode()) for text in texts]
    assert document_bits(model, windows).tolist() == pytest.approx(alone, rel=1e-5)
    assert document_bits(model, Windows.from_texts(tokenizer, [], 8)).tolist() == []


def test_interval_covers_what_other_documents_would_have_given():
    draw = numpy.random.default_rng(5)
    covered = 0
    for seed in range(200):
        num_bytes = draw.integers(50, 500, 80)
        bits = num_bytes * draw.normal(2.0, 0.5, 80)
        low, high = bootstrap_ci(bits, num_bytes, seed=seed)
        covered += low <= 2.0 <= high
    assert 180 <= covered <= 199  # 95 % of 200 are 190
    assert bootstrap_ci(numpy.array([8.0]), numpy.array([4])) == (2.0, 2.0)


@pytest.mark.parametrize(("kind", "before"), [("qwen3", "<|endoftext|>"), ("llama", "<|begin_of_text|>")])
def test_the_first_token_has_a_context_in_other_bases_too(kind, before):
    tokenizer = tiny_tokenizer(kind)
    windows = Windows.from_texts(tokenizer, ["一座山"], 64)
    assert windows.input_ids == [[tokenizer.convert_tokens_to_ids(before), *encode(tokenizer, "一座山")]]
    assert windows.prefix_length == 1
