"""The base of real text: trained from files named by language, resumed, and not made twice."""

import json

from benchmarks import real_base
from llmtuner.tokenizer.encoding import load_tokenizer
from tests.helpers import TEXTS
from tests.tokenizers import JAPANESE


def write_texts(directory, name, texts):
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (directory / name).write_text("".join(rows), encoding="utf-8")


def test_a_base_is_trained_once_and_reads_no_japanese(tmp_path, monkeypatch):
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    for language, texts in (("zh", TEXTS[:2]), ("en", TEXTS[2:4])):
        numbered = [f"{text} {number}" for text in texts for number in range(100)]
        write_texts(corpora, f"{language}_wiki.train.jsonl", numbered)
        write_texts(corpora, f"{language}_wiki.test.jsonl", texts)
    write_texts(corpora, "ja_wiki.train.jsonl", JAPANESE)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=4)
    monkeypatch.setattr(real_base, "ARCHITECTURE", real_base.ARCHITECTURE | small)
    monkeypatch.setattr(real_base, "VOCAB_SIZE", 400)
    out = tmp_path / "out"
    out.mkdir()
    real_base.write_dataset_info(out)
    metrics = real_base.train(corpora, out, max_steps=3)
    assert metrics["steps"] == 3
    assert "は" not in load_tokenizer(out / "base").get_vocab()
    written = (out / "base" / "model.safetensors").stat().st_mtime_ns
    assert real_base.train(corpora, out, max_steps=3) == metrics
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == written
    evaluated = real_base.evaluate(corpora, out)
    assert {language: bits > 0 for language, bits in evaluated["bits_per_byte"].items()} == {"zh": True, "en": True}
