"""Texts in three languages, tokenizer models made by hand or trained on them, and the files of ChatGLM3's tokenizer."""

import json
from typing import Any

import pytest

from llmtuner.tokenizer.chatglm3 import BYTE, CONTROL, NORMAL, UNKNOWN
from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
from llmtuner.tokenizer.vocab import SentencePieceVocab
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS
from tests.helpers import ROOT

JA = WRITING_SYSTEMS["japanese"]
GOLDEN = ROOT.parent / "shared" / "chatglm3"
ORIGINAL = GOLDEN / "chatglm3_original_tokenizer.model"
needs_golden = pytest.mark.skipif(not ORIGINAL.is_file(), reason="needs ChatGLM3's tokenizer in ../shared/chatglm3")
JAPANESE = [
    "山の上の小さな町に、木の人形を作るおじいさんが住んでいました。",
    "春になると、町のみんなは川のそばへ桜を見に行きます。「きれいですね」とおばあさんが言いました。",
    "駅から歩いて十分ほどの喫茶店で、彼女は毎朝コーヒーを飲んでいる。",
    "コーヒーの香りがする喫茶店には、猫が三匹いました。",
    "町の図書館では、読みたい本が見つからないこともある。それでも彼女は毎朝そこへ行きます。",
] * 12
CHINESE = [
    "从前有一座山，山上有一座小镇，镇上住着一位木匠。",
    "小镇的图书馆里有很多书，春天来了，大家都去河边看花。",
    "一座山，两条河，三只猫，他们都住在镇上。",
]
ENGLISH = ["A sophisticated philosopher lives in the town.", "The ferry leaves at 9:30, described the people of Aesop."]
ODD = [
    *(
        "",
        " ",
        "   ",
        " a ",
        "a  b",
        "\n",
        "\r\n\ta",
        "a\n\n b",
        "1234567890",
        "３１",
        "\u3000あ\u3000",
        "👍🏽 한국어",
        "x\x00y",
    ),
    *("ああああああああああ", "ーーーーー", "----------------", "▁a▁▁b", "�", "<0x0A>", "<s></s><unk>", "が", "𠮷野家"),
]


def make_sentencepiece(pieces, **rules):
    """A sentencepiece model of exactly these normal pieces, in merge order."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    for piece, kind in [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]:
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=BYTE)
    for rank, piece in enumerate(pieces):
        proto.pieces.add(piece=piece, score=float(-rank), type=NORMAL)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = rules.get("byte_fallback", True)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = rules.get("add_dummy_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = rules.get("remove_extra_whitespaces", False)
    return proto


def make_vocab(pieces, **rules):
    return SentencePieceVocab(make_sentencepiece(pieces, **rules))


def save_model(proto, directory):
    file = directory / "hand.model"
    file.write_bytes(proto.SerializeToString())
    return file


def merge_as_published(base, tokens):
    """A merge with the pieces of the original project's: nine placeholders, and new tokens that all have the score 0."""
    merged = type(base)()
    merged.CopyFrom(base)
    for token in [*(f"vcxv{number}" for number in range(1, 10)), *tokens]:
        merged.pieces.add(piece=token, score=0.0, type=NORMAL)
    return merged


def new_tokens(merged, base):
    return merged.tokens[base.first_new_id :]


# ----------------------------------------------------------------------------------------------------------- training
def train_tokens(base, lines, count, script=JA, reference=()):
    return list(train_continued_bpe(segment_corpus(base, lines, script), count, script, reference))


# ---------------------------------------------------------------------------------------------- held-out text, steps
def write_corpus(directory, names, count=40):
    directory.mkdir(exist_ok=True)
    for name, texts in names.items():
        rows = [{"text": f"{texts[number % len(texts)]}\n{number}"} for number in range(count)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / name).write_text(lines, encoding="utf-8")
