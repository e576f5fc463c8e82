"""Continued BPE equals counting all pairs again, and shortens Japanese without changing anything else."""

import itertools
import random
from collections import Counter

import pytest

from llmtuner.tokenizer.chatglm3 import build_fast_tokenizer
from llmtuner.tokenizer.comparison import compare, encoding_mismatches
from llmtuner.tokenizer.continued_bpe import ContinuedBPE, segment_corpus
from llmtuner.tokenizer.merge_vocab import count_scripts, filter_candidates, unreachable_tokens
from llmtuner.tokenizer.vocab import read_vocab
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS
from tests.tokenizers import CHINESE, ENGLISH, JA, JAPANESE, ODD, make_vocab, train_tokens


def test_the_most_frequent_pair_comes_first():
    base = make_vocab(["▁", "い", "う", "え", "お", "うえ"])
    lines = ["いうお"] * 4 + ["おい"] * 3 + ["えお"] * 2
    # い+う 4 times, then いう+お; お+い 3 times; ▁+い... a line begins like a text
    assert train_tokens(base, lines, 3) == ["▁い", "▁いう", "▁いうお"]
    assert train_tokens(base, ["お" + line for line in lines], 2) == ["▁お", "▁おい"]
    assert train_tokens(base, lines, 99)[-1] in {"えお", "▁えお"}  # and ends when no pair occurs twice
    # うえ is a base token: い+う never occurs as a pair
    assert "いう" not in "".join(train_tokens(base, ["いうえ"] * 9, 9)).replace("いうえ", "")


def brute_force(base, lines, count):
    """The same by encoding all lines with sentencepiece and recounting all pairs after each new token."""
    pieces = []
    while len(pieces) < count:
        pairs = Counter()
        for line in base.append(pieces).processor.encode(lines, out_type=str):
            for left, right in itertools.pairwise(line):
                name = left + right
                usable = all(JA.token_pattern.fullmatch(part) for part in (left, right, name))
                if usable and JA.exclusive_pattern.search(name) and len(name) <= 16:
                    pairs[name] += 1
        best = min(pairs, key=lambda name: (-pairs[name], name), default="")
        if pairs[best] < 2:
            break
        pieces.append(best)
    return pieces


@pytest.mark.parametrize(
    ("alphabet", "base_tokens"),
    [
        ("いうえお、。", ["うえ"]),
        ("いうえ 1A、、", ["うえ"]),
        ("いいいう", []),
        ("い", []),
        ("おいうえ", ["おいう", "いうえ"]),  # base tokens that form when いう does, both from it
    ],
)
def test_training_equals_recounting_all_pairs(alphabet, base_tokens):
    shuffle = random.Random(1)
    base = make_vocab(["▁", *"いうえお、。1A", *base_tokens])
    lines = ["".join(shuffle.choices(alphabet, k=shuffle.randrange(2, 40))).strip() for _ in range(200)]
    lines += ["おいうえ"] * 90
    expected = brute_force(base, lines, 60)
    bpe = ContinuedBPE(segment_corpus(base, lines, JA), 60, JA, set())
    assert list(bpe.train()) == expected
    merged = base.append(expected)
    assert unreachable_tokens(base, merged) == []
    # the merged tokenizer segments the text as training left it
    split = [piece for line in merged.processor.encode(lines, out_type=str) for piece in line]
    joined = [bpe.id_to_token[index] for index in bpe.tokens if index > 0]
    assert joined == [piece for piece in split if JA.token_pattern.fullmatch(piece)]


def test_rare_pairs_follow_when_frequent_ones_are_exhausted():
    base = make_vocab(["▁", *"いうえお"])
    lines = ["いう"] * 50 + ["えお"] * 3
    bpe = ContinuedBPE(segment_corpus(base, lines, JA), 9, JA, set())
    bpe.min_count = 40
    assert list(bpe.train()) == ["▁い", "▁いう", "▁え", "▁えお"]


def test_characters_in_bytes_become_tokens_unless_the_other_language_writes_them():
    base = make_vocab(["▁", "の", "人"])
    lines = ["人の駅の人"] * 5 + ["人の働の人"] * 5 + ["人の蛉の人"] * 9
    pieces = train_tokens(base, lines, 99, reference=["不働"])
    assert "駅" in pieces
    assert pieces.index("駅") < min(at for at, piece in enumerate(pieces) if piece != "駅" and "駅" in piece)
    assert not any("働" in piece or "蛉" in piece for piece in pieces)  # 働 occurs in the reference, 蛉 in GB 2312
    assert unreachable_tokens(base, base.append(pieces)) == []


def test_new_tokens_shorten_japanese_and_change_nothing_else(base_file, tmp_path):
    base = read_vocab(base_file)
    pieces = train_tokens(base, JAPANESE, 120, reference=CHINESE)
    assert len(pieces) == 120
    merged = base.append(pieces)
    assert unreachable_tokens(base, merged) == []
    assert compare(base, merged, CHINESE + ENGLISH + ["山上有一座城，城里、乡下。", "2020 2021"]).changes == []
    assert compare(base, merged, JAPANESE[:5]).token_ratio < 0.35
    assert not any(character.isdigit() for piece in pieces for character in piece)
    assert filter_candidates(base, base.append(pieces, after_special=False), JA, CHINESE).accepted == pieces
    file = tmp_path / "tokenizer.model"
    merged.save(file)
    assert encoding_mismatches(build_fast_tokenizer(file), merged, JAPANESE[:5] + CHINESE + ENGLISH + ODD) == []


@pytest.mark.parametrize(
    ("language", "lines"),
    [
        (
            "korean",
            ["우리는 매일 아침 학교에 갑니다.", "학교에 가는 길에 친구를 만났습니다.", "친구를 만나면 즐겁습니다!"],
        ),
        ("thai", ["ฉันไปโรงเรียนทุกวัน", "เพื่อนของฉันไปโรงเรียนทุกเช้า", "ทุกวันฉันพบเพื่อนที่โรงเรียน"]),
    ],
)
def test_other_languages_by_a_setting(language, lines, base_file, tmp_path):
    base = read_vocab(base_file)
    pieces = train_tokens(base, lines * 9, 80, WRITING_SYSTEMS[language])
    merged = base.append(pieces)
    assert compare(base, merged, lines).token_ratio < 0.35
    assert compare(base, merged, CHINESE + ENGLISH + JAPANESE[:5]).changes == []
    assert unreachable_tokens(base, merged) == []
    assert all(WRITING_SYSTEMS[language].exclusive_pattern.search(piece) for piece in pieces)
    assert set("".join(count_scripts(pieces)).replace("marks", "").split(" + ")) - {""} <= {
        language.replace("korean", "hangul")
    } or all(kind.replace(" + marks", "") == language.replace("korean", "hangul") for kind in count_scripts(pieces))
