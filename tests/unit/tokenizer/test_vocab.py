"""Bases with a BPE tokenizer.json are extended like ChatGLM3's: other text keeps its ids, and every reader agrees."""

import heapq
import itertools
import json
import os
from functools import cache

import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmtuner.console import UserError
from llmtuner.tokenizer.comparison import compare
from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
from llmtuner.tokenizer.merge_vocab import filter_candidates, merge_reachable, unreachable_tokens
from llmtuner.tokenizer.vocab import CHARACTER_TO_BYTE, JsonVocab, SentencePieceVocab, read_vocab
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS
from tests.helpers import ROOT
from tests.tiny_models import tiny_tokenizer
from tests.tokenizers import CHINESE, ENGLISH, JA, JAPANESE, ODD, make_sentencepiece

KHMER = ["ខ្ញុំទៅសាលារៀនរាល់ថ្ងៃ។", "មិត្តរបស់ខ្ញុំទៅសាលារៀនរាល់ព្រឹក។", "រាល់ថ្ងៃខ្ញុំជួបមិត្តនៅសាលារៀន។"] * 9
TOKENIZERS, CORPORA = ROOT.parent / "shared" / "tokenizers", ROOT.parent / "shared" / "corpora"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A directory for each kind of tokenizer.json: byte-level, and metaspace with byte fallback."""
    directories = {}
    for kind in ("qwen3", "llama"):
        directories[kind] = tmp_path_factory.mktemp(kind)
        tiny_tokenizer(kind).save_pretrained(directories[kind])
    directories["metaspace"] = tmp_path_factory.mktemp("metaspace")
    file = directories["metaspace"] / "tokenizer.json"
    file.write_text(json.dumps(metaspace_tokenizer(), ensure_ascii=False), encoding="utf-8")
    return directories


def metaspace_tokenizer():
    """As Llama 2's: a space is ▁, and a character without a token becomes its bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abehinoprstyの山上下在町，。",
        "上下",
    ]
    added = [{"id": i, "content": token, "special": True} for i, token in enumerate(pieces[:3])]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token | flags for token in added],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": ["上 下"],  # a pair as one string, as in files of before 2024
        },
    }


def extend(base, lines, count=80, script=JA, reference=CHINESE):
    tokens = list(train_continued_bpe(segment_corpus(base, lines, script), count, script, reference))
    return merge_reachable(base, tokens)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "metaspace"])
def test_new_tokens_shorten_japanese_and_change_nothing_else(kind, bases, tmp_path):
    base = read_vocab(bases[kind])
    merged, unreachable = extend(base, JAPANESE)
    assert unreachable == unreachable_tokens(base, merged) == []
    assert merged.first_new_id == base.first_new_id + 80
    assert merged.tokens[: base.first_new_id] == base.tokens
    assert compare(base, merged, CHINESE + ENGLISH + ["2020 2021", "if x:\n    return y"]).changes == []
    assert compare(base, merged, JAPANESE[:5]).token_ratio < 0.65
    new = merged.tokens[base.first_new_id :]
    assert all(JA.rejection_reason(base.text(token)) is None for token in new)
    # spelled by the base as the middle of a text would be
    spelled = base.spell_new_tokens(merged)
    assert ["".join(base.tokens[index] for index in ids) for ids in spelled if all(base.tokens[i] for i in ids)] == [
        token for token, ids in zip(new, spelled, strict=True) if all(base.tokens[index] for index in ids)
    ]
    merged.save_model_files(tmp_path, bases[kind])
    assert read_vocab(tmp_path).tokens == merged.tokens
    readers = [Tokenizer.from_file(str(tmp_path / "tokenizer.json"))]
    readers += [AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer]
    texts = JAPANESE[:5] + CHINESE + ENGLISH + [odd for odd in ODD if "<" not in odd]
    for reader in readers:
        assert [reader.encode(text, add_special_tokens=False).ids for text in texts] == merged.encode(texts)
        assert {name: reader.token_to_id(name) for name in base.special_ids()} == base.special_ids()
        # those that differ from the base must differ by the vocabulary alone
        assert str(reader.pre_tokenizer) == str(base.backend.pre_tokenizer)
    for text in [text for text in texts if text.strip() == text]:
        assert readers[0].decode(merged.encode([text])[0]).strip() in (text, "") or kind == "metaspace"


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_special_tokens_are_never_produced_from_text(kind, bases):
    merged, _ = extend(read_vocab(bases[kind]), JAPANESE)
    control = {*merged.special_ids().values()}
    assert len(control) > 5
    for ids in merged.encode([f"a{name}の{name}" for name in merged.special_ids()]):
        assert control.isdisjoint(ids)


def test_bytes_of_one_script_may_join_before_they_make_a_character(bases):
    base, khmer = read_vocab(bases["qwen3"]), WRITING_SYSTEMS["khmer"]
    assert all(index < 256 for ids in base.encode(KHMER) for index in ids)  # the base knows Khmer only as bytes
    merged, unreachable = extend(base, KHMER, script=khmer)
    assert unreachable == []
    new = merged.tokens[base.first_new_id :]
    assert [token for token in new if base.text(token) is None] == [
        base.from_bytes(b"\xe1\x9e"),
        base.from_bytes(b"\xe1\x9f"),
    ]
    assert compare(base, merged, KHMER[:3]).token_ratio < 0.3
    assert compare(base, merged, CHINESE + ENGLISH + JAPANESE[:5] + ["ภาษาไทย", "ဗမာ"]).changes == []
    # 々 begins with the bytes of Chinese punctuation, so these may not join
    assert not any(
        base.text(token) is None for token in extend(base, ["人々の日々"] * 9)[0].tokens[base.first_new_id :]
    )


def test_no_token_crosses_the_pre_tokenizers_boundaries(bases):
    base = read_vocab(bases["qwen3"])
    merged, _ = extend(base, ["山の1の山。\n山の", "の　の山"] * 40, 99)
    boundary = base.backend.pre_tokenizer
    for token in merged.tokens[base.first_new_id :]:
        text = base.text(token)
        assert len(boundary.pre_tokenize_str(text.replace("▁", " "))) == 1, text


def test_what_another_training_found_is_filtered_as_for_sentencepiece(bases):
    base = read_vocab(bases["qwen3"])
    candidates = SentencePieceVocab(make_sentencepiece(["山", "の", "町", "の町", "▁の町", "第1", "學町", "町學"]))
    result = filter_candidates(base, candidates, JA, ["町學。"])
    assert [base.text(token) for token in result.accepted] == ["の町", "▁の町", "學町"]
    assert result.rejected == {"digit, letter or sign": 1, "also written in the other language": 2}


def changed(content, **model):
    return content | {"model": content["model"] | model}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: changed(c, type="Unigram", vocab=[["a", -1.0]]), "it is a Unigram tokenizer; only BPE has merges"),
        (lambda c: changed(c, type="WordPiece"), "it is a WordPiece tokenizer"),
        (lambda c: changed(c, vocab={}), "it has no vocabulary"),
        (lambda c: c | {"normalizer": {"type": "Lowercase"}}, "its normalizer changes text beyond repair (Lowercase)"),
        (lambda c: c | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}, "(NFKC)"),
        (lambda c: changed(c, vocab=c["model"]["vocab"] | {"x": 999_999}), "ids have holes: the highest is 999,999"),
        (
            lambda c: c | {"added_tokens": [*c["added_tokens"], {"content": "\n\n", "id": 419, "special": False}]},
            "are text and cut words ('\\n\\n')",
        ),
        (lambda c: changed(c, end_of_word_suffix="</w>"), "it marks parts of words"),
        (lambda c: changed(c, dropout=0.1), "dropout"),
        (lambda c: c | {"pre_tokenizer": {"type": "Whitespace"}}, "characters outside its vocabulary are lost"),
        (
            lambda c: changed(c, vocab={t: i for t, i in c["model"]["vocab"].items() if t != "!"}),
            "it lacks some of the 256 bytes",
        ),
    ],
)
def test_what_cannot_be_extended_is_refused_with_the_reason(spoil, message, bases, tmp_path):
    content = json.loads((bases["qwen3"] / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(spoil(content)), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_vocab(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_vocab(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        read_vocab(tmp_path / "none")


def test_a_tokenizer_merged_from_another_base_is_refused(bases):
    qwen3, llama = read_vocab(bases["qwen3"]), read_vocab(bases["llama"])
    with pytest.raises(UserError, match="does not begin with the tokens of the base"):
        qwen3.spell_new_tokens(extend(llama, JAPANESE)[0])


# ------------------------------------------------------------------------------------------------- by the book, slowly
def by_the_book(content):
    """Byte-level BPE in Python: normalize, split by the patterns, map bytes to characters, merge by rank."""
    import unicodedata

    splits = [part for part in content["pre_tokenizer"]["pretokenizers"] if part["type"] == "Split"]
    patterns = [regex.compile(part["pattern"]["Regex"]) for part in splits]
    characters = {byte: character for character, byte in CHARACTER_TO_BYTE.items()}
    model = content["model"]
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    ranks: dict = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault(pair, rank)

    @cache
    def encode_word(word):
        parts = [characters[byte] for byte in word.encode()]
        if model.get("ignore_merges") and "".join(parts) in model["vocab"]:
            return (model["vocab"]["".join(parts)],)
        following, preceding = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        waiting = [(ranks[pair], i, *pair) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
        heapq.heapify(waiting)
        while waiting:
            _, i, left, right = heapq.heappop(waiting)
            j = following[i]
            if j == len(parts) or (parts[i], parts[j]) != (left, right):
                continue
            parts[i], parts[j], following[i] = left + right, "", following[j]
            if following[i] < len(parts):
                preceding[following[i]] = i
            for a, b in ((preceding[i], i), (i, following[i])):
                if a >= 0 and b < len(parts) and (parts[a], parts[b]) in ranks:
                    heapq.heappush(waiting, (ranks[parts[a], parts[b]], a, parts[a], parts[b]))
        return tuple(model["vocab"][part] for part in parts if part)

    def encode(text):
        words = [unicodedata.normalize("NFC", text) if content["normalizer"] == {"type": "NFC"} else text]
        for pattern in patterns:
            words = [part for word in words for part in split_isolated(pattern, word)]
        return [index for word in words for index in encode_word(word)]

    return encode


def split_isolated(pattern, text):
    """The matches of a pattern, and what lies between them."""
    end = 0
    for match in pattern.finditer(text):
        yield from filter(None, (text[end : match.start()], match[0]))
        end = match.end()
    if text[end:]:
        yield text[end:]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_ids_are_those_of_bpe_by_the_book(kind, bases):
    merged, _ = extend(read_vocab(bases[kind]), JAPANESE)
    assert isinstance(merged, JsonVocab)
    encode = by_the_book(merged.content)
    texts = JAPANESE + CHINESE + ENGLISH + ODD + KHMER
    assert merged.encode(texts) == [encode(text) for text in texts]


@pytest.mark.slow
@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="needs real tokenizers in ../shared/tokenizers")
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", *(["gptoss"] if "LINES" in os.environ else [])])
def test_real_bases_are_extended_exactly(name, tmp_path, request):
    """Ids through transformers against BPE by the book, on the first LINES of each file; also for gpt-oss if LINES is set."""
    from benchmarks.extend_tokenizers import quotes
    from benchmarks.tokenizer import lines_of, texts

    base = read_vocab(TOKENIZERS / name)
    lines = list(itertools.islice(lines_of(texts(CORPORA, "ja_wiki.train.*")), 800))
    merged, unreachable = extend(base, lines, 300, reference=itertools.islice(texts(CORPORA, "zh_luxun.train.*"), 300))
    assert unreachable == unreachable_tokens(base, merged) == []
    merged.save_model_files(tmp_path, TOKENIZERS / name)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    encode, limit = (
        by_the_book(json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))),
        int(os.environ.get("LINES", "20")),
    )
    count = 0
    for file in sorted(CORPORA.glob("*.parquet")):
        some = list(itertools.islice(lines_of(texts(CORPORA, file.name)), limit))
        count += len(some)
        ids = [encoding.ids for encoding in reader.backend_tokenizer.encode_batch(some, add_special_tokens=False)]
        assert ids == [encode(line) for line in some] == merged.encode(some), file.name
        if file.name.startswith("en_"):
            changed = [line for line, new, old in zip(some, ids, base.encode(some), strict=True) if new != old]
            assert [line for line in changed if not quotes(JA, line)] == []
    print(f"{count:,} lines")
    assert reader.chat_template == AutoTokenizer.from_pretrained(TOKENIZERS / name).chat_template
