"""Training by sentencepiece: sentences, the base's rules, vocabulary size and mixing by bytes."""

import pytest
import sentencepiece

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import NORMAL, build_fast_tokenizer, read_sentencepiece
from llmtuner.tokenizer.sentencepiece_bpe import (
    MAX_SENTENCE_BYTES,
    interleave_by_bytes,
    short_sentences,
    split_sentences,
    train_bpe,
)
from tests.tokenizers import JAPANESE, ODD


def test_sentences_keep_their_closing_quotes():
    text = "「行くの？」と彼。\n\n  \nえっ！？本当（たぶん。）だ\r\nEnd\n。」"
    assert list(split_sentences(text)) == [
        "「行くの？」",
        "と彼。",
        "えっ！？",
        "本当（たぶん。）",
        "だ",
        "End",
        "。」",
    ]


@pytest.mark.parametrize("character", ["a", "あ", "👍"])
def test_long_sentences_are_split_and_not_lost(character):
    size = len(character.encode())
    fitting = MAX_SENTENCE_BYTES // size
    assert list(split_sentences(character * fitting)) == [character * fitting]
    parts = list(split_sentences(character * (3 * fitting + 1)))
    assert "".join(parts) == character * (3 * fitting + 1)
    assert max(len(part.encode()) for part in parts) <= MAX_SENTENCE_BYTES


def test_training_counts_what_sentencepiece_would_skip(tmp_path):
    sentences = ["ねこがねむる。"] * 30 + ["あ" * 1398, "いぬ▅いぬ"]
    trained = train_bpe(sentences, tmp_path / "a.model", 300, threads=1)
    assert (trained.sentences, trained.skipped) == (32, 2)
    assert trained.input_bytes == 30 * 21 + 1398 * 3 + 15
    pieces = {piece.piece for piece in read_sentencepiece(tmp_path / "a.model").pieces}
    assert {"ね", "ねこ"} <= pieces
    assert "ぬ" not in pieces  # the count is correct: those two were not read
    assert "いぬ▅いぬ" not in "".join(split_sentences("いぬ▅いぬ"))
    assert train_bpe(split_sentences("いぬ▅いぬ\n" * 9), tmp_path / "b.model", 300, threads=1).skipped == 0


def test_trained_model_follows_the_spec(candidate_file, tmp_path):
    proto = read_sentencepiece(candidate_file)
    build_fast_tokenizer(candidate_file)  # rejects any other spec
    processor = sentencepiece.SentencePieceProcessor(model_file=str(candidate_file))
    for text in JAPANESE[:5] + ODD + ["Ａ １ ２　㍿"]:
        if not {"\x00", "▁"} & set(text):
            assert processor.decode(processor.encode(text)) == text
    train_bpe(["は  2020 年   2020 年"] * 50, tmp_path / "digits.model", 290, threads=1)
    for piece in [*proto.pieces, *read_sentencepiece(tmp_path / "digits.model").pieces]:
        if piece.type == NORMAL and len(piece.piece) > 1:
            assert not any(character.isdigit() for character in piece.piece)
            assert piece.piece.strip("▁")
            assert "▁" not in piece.piece[1:]


def test_vocabulary_follows_the_text(tmp_path):
    few = train_bpe(["ねこ"] * 5, tmp_path / "few.model", 5000, threads=1)
    assert 259 < few.vocab_size < 300
    many = train_bpe(JAPANESE, tmp_path / "many.model", 300, character_coverage=1.0, threads=1)
    characters = len(set("".join(JAPANESE)))
    assert many.vocab_size == 259 + 2 * characters > 300
    assert set("".join(JAPANESE)) <= {piece.piece for piece in read_sentencepiece(tmp_path / "many.model").pieces}


def test_failed_training_leaves_no_file(tmp_path):
    def broken():
        yield "ねこがねむる。"
        raise UserError("row 2 is damaged")

    with pytest.raises(UserError, match="row 2 is damaged"):
        train_bpe(broken(), tmp_path / "ja.model", 300, threads=1)
    with pytest.raises(UserError, match="no sentences"):
        train_bpe([], tmp_path / "ja.model", 300, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_interleaving_draws_from_the_stream_furthest_behind():
    streams = {"wiki": iter(["w" * 10] * 9), "aozora": iter(["a" * 10] * 9)}
    ratios = {"wiki": 0.8, "aozora": 0.2}
    drawn = [name for name, _ in interleave_by_bytes(streams, ratios, 60)]
    # used / ratio after each text:  w 12.5 0 | a 12.5 50 | w 25 50 | w 37.5 50 | w 50 50 | w 62.5 50
    assert drawn == ["wiki", "aozora", "wiki", "wiki", "wiki", "wiki"]


def test_interleaving_stops_when_a_stream_has_ended_and_counts_bytes():
    streams = {"long": iter(["あ"] * 99), "short": iter(["abc"] * 2)}
    drawn = [name for name, _ in interleave_by_bytes(streams, {"long": 0.5, "short": 0.5}, 10**6)]
    assert drawn == ["long", "short", "long", "short", "long"]


def test_short_sentences_come_from_different_texts():
    assert short_sentences(
        ["短い。ちょうどいい文。短い。", "ない", "ちょうどいい文。", "もう一つの文。"], count=2, shortest=5, longest=9
    ) == [
        "ちょうどいい文。",
        "もう一つの文。",
    ]
