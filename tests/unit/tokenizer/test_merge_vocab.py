"""Merging vocabularies: accepted candidates, ranks and unreachable tokens."""

import re

import pyarrow.parquet
import pytest

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import CONTROL, NORMAL, SPECIAL_TOKENS, build_fast_tokenizer
from llmtuner.tokenizer.comparison import compare, encoding_mismatches
from llmtuner.tokenizer.merge_vocab import (
    count_scripts,
    filter_candidates,
    merge_as_original,
    merge_reachable,
    new_candidates,
    unreachable_tokens,
)
from llmtuner.tokenizer.sentencepiece_bpe import (
    split_sentences,
    train_bpe,
)
from llmtuner.tokenizer.vocab import read_vocab
from tests.helpers import ROOT
from tests.tokenizers import (
    CHINESE,
    ENGLISH,
    GOLDEN,
    JA,
    JAPANESE,
    ORIGINAL,
    make_vocab,
    needs_golden,
    new_tokens,
    save_model,
    train_tokens,
)

CORPORA = ROOT.parent / "shared" / "corpora"
CHINESE_FILES = [f"zh_{kind}.train" for kind in ("guides", "luxun", "docs", "story", "classic")]
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason="needs real texts in ../shared/corpora")


# ----------------------------------------------------------------------------------------------------------- merging
def test_only_tokens_that_occur_only_in_japanese_are_accepted():
    base = make_vocab(["▁", "山", "上", "の", "学", "校", "駅", "。", "・", "山上"])
    candidates = make_vocab(
        ["山上", "の山", "山の", "学校", "学駅", "駅上", "第1", "Aの", "の。", "！", "・の", "▁の"]
        + ["▁学校", "▁駅上", "畑", "校畑", "蛉", "蛉の", "働", "働の", "々", "ーの", "ー", "山。"]
    )
    choice = filter_candidates(base, candidates, JA, ["我们的学校很大，駅上", "这里是働のところ", "働"])
    assert choice.accepted == ["の山", "山の", "学駅", "の。", "・の", "▁の", "畑", "校畑", "々", "ーの", "ー"]
    assert choice.rejected == {
        "digit, letter or sign": 4,  # 第1 Aの ！ 山。
        "also written in the other language": 6,  # 学校 ▁学校 蛉 are of GB 2312, 駅上 ▁駅上 働 occur in the reference
        "of a character in bytes": 2,  # 蛉の 働の: 蛉 and 働 have no piece of their own
    }
    assert count_scripts(choice.accepted) == {
        "han + hiragana": 2,
        "han": 4,
        "hiragana + marks": 2,
        "hiragana": 1,
        "hiragana + katakana": 1,
        "katakana": 1,
    }


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (["の山", ""], "an empty piece"),
        (["の山", "山の", "の山"], "'の山' 2 times"),
        (["の▁山"], "'の▁山' with a space inside"),
        (["の山", "sop"], "'sop', a special token's name"),
        (["▁<|user|>"], "a special token's name"),
    ],
)
def test_invalid_candidates_are_rejected(pieces, message):
    base = make_vocab(["▁", "山", "の"])
    assert [*new_candidates(base, make_vocab(["山", "の山", "▁の"]))] == ["の山", "▁の"]
    with pytest.raises(UserError, match=re.escape(message)):
        new_candidates(base, make_vocab(pieces))


def test_the_original_method_ranks_every_candidate_first():
    base = make_vocab(["▁", "い", "う", "え", "うえ"])
    merged = merge_as_original(base, make_vocab(["い", "いう", "1a"]))
    assert [(piece.piece, piece.score) for piece in merged.proto.pieces[-2:]] == [("いう", 0.0), ("1a", 0.0)]
    assert merged.processor.encode("いうえ", out_type=str) == ["▁", "いう", "え"]
    assert base.append(["いう"]).processor.encode("いうえ", out_type=str) == ["▁", "い", "うえ"]


def test_new_tokens_rank_below_the_base_vocabulary_in_order(base_file, candidate_file):
    base = read_vocab(base_file)
    merged = base.append(["の山", "山の", "畑"])
    size = len(base.tokens)
    assert merged.proto.pieces[:size] == base.proto.pieces[:]
    assert [(piece.piece, piece.type) for piece in merged.proto.pieces[size : size + 9]] == [
        (t, CONTROL) for t in SPECIAL_TOKENS
    ]
    lowest = min(piece.score for piece in base.proto.pieces if piece.type == NORMAL)
    assert [(piece.piece, piece.score - lowest) for piece in merged.proto.pieces[size + 9 :]] == [
        ("の山", -1),
        ("山の", -2),
        ("畑", -3),
    ]
    with pytest.raises(UserError, match="merged already"):
        merged.append(["の"])


def test_tokens_that_base_merges_preempt_are_left_out():
    # い う え お -> い うえ お by base merges: いう forms where no え follows, いうえ from い and うえ, いうえお never.
    base = make_vocab(["▁", "い", "う", "え", "お", "うえ"])
    merged, unreachable = merge_reachable(base, ["いう", "いうえお"])
    assert unreachable == ["いうえお"]
    assert new_tokens(merged, base) == ["いう"]
    assert merged.unreachable() == set()
    # いうえおい depends on いうえお, so both are unreachable; with いうえ between them all are reachable.
    assert merge_reachable(base, ["いう", "いうえお", "いうえおい"])[1] == ["いうえお", "いうえおい"]
    assert merge_reachable(base, ["いう", "いうえ", "いうえお"])[1] == []


def test_unreachable_tokens_are_found_on_both_sides():
    base = make_vocab(["▁", "w", "x", "y", "z", "wx", "yz", "wxyz"])
    assert base.unreachable() == set()
    above = base.append(["xy"])
    above.proto.pieces[-1].score = 1.0  # the original's defect: a new token merges before the base tokens
    assert unreachable_tokens(base, above) == ["wxyz"]  # w xy z: nothing merges with w
    assert unreachable_tokens(base, base.append(["xy"])) == []
    assert unreachable_tokens(base, base.append(["zwxy"])) == ["zwxy"]  # z wx y: base merges take precedence
    defective = make_vocab(["▁", "w", "x", "wxw"])  # a base token that was unreachable before is not counted
    assert defective.unreachable() == {"wxw"}
    assert unreachable_tokens(defective, defective.append(["xx"])) == []


def test_merge_shortens_japanese_and_changes_nothing_else(base_file, merged_file):
    base, merged = read_vocab(base_file), read_vocab(merged_file)
    assert len(new_tokens(merged, base)) > 100
    assert unreachable_tokens(base, merged) == []
    assert compare(base, merged, CHINESE + ENGLISH).changes == []
    assert compare(base, merged, JAPANESE[:5]).token_ratio < 0.4


@needs_golden
def test_original_merge_is_defective_as_published():
    base, merged = read_vocab(ORIGINAL), read_vocab(GOLDEN / "seed_merged_cn_and_ja_tokenizer.model")
    base_pieces = {*base.tokens}
    unreachable = {
        piece for piece in unreachable_tokens(base, merged) if not piece.startswith("vcxv")
    }  # its placeholders
    assert (len(unreachable & base_pieces), len(unreachable - base_pieces)) == (64, 57)


@pytest.mark.slow
@needs_golden
@needs_corpora
def test_real_merge_is_exact_and_shorter_than_the_original(original, tmp_path):
    """Trained on a fifth of the text of `benchmarks.tokenizer merge`, so the ratio is a little worse than there."""

    def documents(name):
        return pyarrow.parquet.read_table(CORPORA / f"{name}.parquet")["text"].to_pylist()

    def lines(name):
        return [line for text in documents(name) for line in text.splitlines() if line.strip()]

    base, reference = read_vocab(ORIGINAL), [text for name in CHINESE_FILES for text in documents(name)]
    japanese = documents("ja_wiki.train")[:1200] + documents("ja_aozora.train")[:20]
    sentences = (sentence for text in japanese for sentence in split_sentences(text))
    train_bpe(sentences, tmp_path / "original.model", 8000, chatglm3_spec=False)
    as_original = merge_as_original(base, read_vocab(tmp_path / "original.model"))
    budget = len(new_tokens(as_original, base))
    pieces = train_tokens(base, [line for text in japanese for line in text.splitlines()], budget, reference=reference)
    merged = base.append(pieces)
    assert len(pieces) == budget
    assert unreachable_tokens(base, merged) == []
    assert len(unreachable_tokens(base, as_original)) > 10
    for name in ("zh_luxun.test", "zh_guides.test", "en_lit.test"):
        assert compare(base, merged, lines(name)).changes == [], name
        assert len(compare(base, as_original, lines(name)).changes) > 20
    for name in ("ja_wiki.test", "ja_aozora.test", "ja_guides.test"):
        ours = compare(base, merged, documents(name)).tokens_after
        assert ours < compare(base, as_original, documents(name)).tokens_after, name
    file = save_model(merged.proto, tmp_path)
    assert encoding_mismatches(build_fast_tokenizer(file), merged, lines("ja_wiki.test") + lines("zh_luxun.test")) == []


@pytest.mark.slow
@needs_golden
@needs_corpora
def test_real_candidates_are_filtered():
    base, candidates = read_vocab(ORIGINAL), read_vocab(GOLDEN / "seed_ja_bpe.model")
    reference = (
        text
        for name in CHINESE_FILES
        for text in pyarrow.parquet.read_table(CORPORA / f"{name}.parquet")["text"].to_pylist()
    )
    merged, _ = merge_reachable(base, filter_candidates(base, candidates, JA, reference).accepted)
    assert len(new_tokens(merged, base)) > 11_000
    assert unreachable_tokens(base, merged) == []
