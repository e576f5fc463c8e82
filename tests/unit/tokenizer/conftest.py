"""Tokenizer models trained on a few texts."""

import pytest

from llmtuner.tokenizer.chatglm3 import build_fast_tokenizer, read_sentencepiece
from llmtuner.tokenizer.merge_vocab import (
    filter_candidates,
    merge_reachable,
    new_candidates,
)
from llmtuner.tokenizer.sentencepiece_bpe import (
    split_sentences,
    train_bpe,
)
from llmtuner.tokenizer.vocab import read_vocab
from tests.tokenizers import CHINESE, JA, JAPANESE, ORIGINAL, merge_as_published


@pytest.fixture(scope="session")
def base_file(tiny_tokenizer_dir):
    return tiny_tokenizer_dir / "tokenizer.model"


@pytest.fixture(scope="session")
def candidate_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("candidates") / "ja.model"
    train_bpe((sentence for text in JAPANESE for sentence in split_sentences(text)), file, 600, threads=1)
    return file


@pytest.fixture(scope="session")
def merged_file(base_file, candidate_file, tmp_path_factory):
    base = read_vocab(base_file)
    choice = filter_candidates(base, read_vocab(candidate_file), JA, CHINESE)
    file = tmp_path_factory.mktemp("merged") / "tokenizer.model"
    merge_reachable(base, choice.accepted)[0].save(file)
    return file


@pytest.fixture(scope="session")
def tied_file(base_file, candidate_file, tmp_path_factory):
    """The same candidates, merged as the original project did: they share a score."""
    file = tmp_path_factory.mktemp("tied") / "tokenizer.model"
    tokens = {*new_candidates(read_vocab(base_file), read_vocab(candidate_file)), *"いた", "いた", "たい"}
    file.write_bytes(merge_as_published(read_sentencepiece(base_file), sorted(tokens)).SerializeToString())
    return file


@pytest.fixture(scope="session")
def original():
    return build_fast_tokenizer(ORIGINAL)
