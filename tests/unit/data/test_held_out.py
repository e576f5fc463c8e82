"""Held-out text: from test files if there are any, else what training leaves out."""

import json

import pytest

from llmtuner.console import UserError
from llmtuner.data.held_out import held_out_texts, is_validation, training_documents
from llmtuner.data.sources import get_dataset_attr
from tests.helpers import ROOT
from tests.tokenizers import CHINESE, JAPANESE, write_corpus

INFO = ROOT / "data" / "dataset_info.json"


def test_held_out_text_comes_from_test_files_if_there_are_any(tmp_path):
    write_corpus(
        tmp_path, {"ja_wiki.train.jsonl": JAPANESE, "ja_a.test.jsonl": ["あ" * 99], "ja_b.test.jsonl": ["い" * 9]}
    )
    texts = held_out_texts("test_ja", ["wikipedia_ja"], INFO, tmp_path, 0.05, 2000)
    assert sum(len(text.encode()) for text in texts) <= 2000
    assert {text[0] for text in texts} == {"あ", "い"}
    assert sum(len(text.encode()) for text in texts if text[0] == "あ") in range(997, 1001)


def test_held_out_text_is_else_what_training_leaves_out(tmp_path):
    write_corpus(tmp_path, {"ja_wiki.train.jsonl": JAPANESE, "ja_aozora.train.jsonl": CHINESE}, count=400)
    texts = held_out_texts("test_ja", ["wikipedia_ja", "aozora_ja"], INFO, tmp_path, 0.05, 10**6)
    trained = list(training_documents(get_dataset_attr("wikipedia_ja", INFO, tmp_path), 0.05))
    of_wiki = [text for text in texts if text.split("\n")[0] in JAPANESE]
    assert 5 < len(of_wiki) < 60
    assert 5 < len(texts) - len(of_wiki) < 60
    assert set(texts).isdisjoint(trained)
    assert len(of_wiki) + len(trained) == 400


def test_missing_held_out_text_names_the_files(tmp_path):
    entries = json.loads(INFO.read_text(encoding="utf-8"))
    for entry in entries.values():
        entry.pop("hf_hub_url", None)
    local = tmp_path / "dataset_info.json"
    local.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(UserError, match=r"en_\*\.test\.[^$]*en_wiki\.train\."):
        held_out_texts("test_en", ["wikitext_en"], local, tmp_path, 0.05, 1000)


def test_held_out_share_is_about_what_was_asked_for():
    held_out = sum(is_validation(f"document {number}", 0.05) for number in range(20_000))
    assert 0.045 < held_out / 20_000 < 0.055
    assert not any(is_validation(f"document {number}", 0.0) for number in range(100))
