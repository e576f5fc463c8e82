"""Comparing two tokenizers on the same texts."""

from llmtuner.tokenizer.chatglm3 import build_fast_tokenizer
from llmtuner.tokenizer.comparison import compare, encoding_mismatches
from tests.tokenizers import make_vocab, save_model


def test_changes_start_at_the_first_difference(tmp_path):
    base = make_vocab(["▁", "い", "う", "え"])
    merged = base.append(["いう"])
    result = compare(base, merged, ["ええ", "えいうえ", "うい"])
    assert (result.texts, result.tokens_before, result.tokens_after) == (3, 11, 10)
    assert result.token_ratio == 10 / 11
    assert [(change.before, change.after) for change in result.changes] == [(["い", "う", "え"], ["いう", "え"])]
    assert encoding_mismatches(build_fast_tokenizer(save_model(merged.proto, tmp_path)), merged, ["えいうえ"]) == []
    assert encoding_mismatches(
        build_fast_tokenizer(save_model(base.proto, tmp_path)), merged, ["えい", "えいうえ"]
    ) == ["えいうえ"]
