"""Comparing two tokenizers on the same texts."""

from llmtuner.tokenizer.comparison import compare, encoding_mismatches
from llmtuner.tokenizer.fast import build_fast_tokenizer, to_processor
from llmtuner.tokenizer.merge_vocab import merge_vocab
from tests.tokenizers import make_sentencepiece, save_model


def test_changes_start_at_the_first_difference(tmp_path):
    base = make_sentencepiece(["▁", "い", "う", "え"])
    merged = merge_vocab(base, ["いう"])
    before, after = to_processor(base), to_processor(merged)
    result = compare(before, after, ["ええ", "えいうえ", "うい"])
    assert (result.texts, result.tokens_before, result.tokens_after) == (3, 11, 10)
    assert result.token_ratio == 10 / 11
    assert [(change.before, change.after) for change in result.changes] == [(["い", "う", "え"], ["いう", "え"])]
    assert encoding_mismatches(build_fast_tokenizer(save_model(merged, tmp_path)), after, ["えいうえ"]) == []
    assert encoding_mismatches(build_fast_tokenizer(save_model(base, tmp_path)), after, ["えい", "えいうえ"]) == [
        "えいうえ"
    ]
