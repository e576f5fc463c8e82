"""Token ids on disk: bounded batches, documents with their origin, memory-mapped reading."""

import json
import pickle

from llmtuner.data import tokenize as tokenize_module
from llmtuner.data.held_out import is_validation
from llmtuner.data.template import Template
from llmtuner.data.tokenize import load_tokenized_dataset
from tests.unit.data.datasets import lines, settings


def test_table_maps_many_batches_and_travels_by_path(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize_module, "MAX_BATCH_BYTES", 100)
    monkeypatch.setattr(tokenize_module, "MAX_BATCH_ROWS", 4)
    dataset = load_tokenized_dataset("dialogues", "sft", tokenizer, settings(corpus))
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 2_000
    dialogues = [
        [{"role": "user", "content": f"第{n}条河？"}, {"role": "assistant", "content": f"柳树 {n}"}] for n in range(20)
    ]
    for row, (ids, labels) in enumerate(Template.from_tokenizer(tokenizer).encode_dialogues(tokenizer, dialogues)):
        assert copy.store.ids(row).tolist() == ids.tolist()
        assert copy.store.labels(row).tolist() == labels.tolist()
    assert not copy.store.ids(0).flags.writeable  # a view into the file
    texts = [json.dumps(messages, ensure_ascii=False) for messages in dialogues]
    assert copy.split(0.3)[1].tolist() == [row for row, text in enumerate(texts) if is_validation(text, 0.3)]


def test_batches_are_bounded_by_rows_and_by_bytes(corpus, tokenizer, monkeypatch):
    sizes = []
    documents = Template.encode_documents

    def watched(self, tokenizer, texts, threads=1):
        sizes.append((len(texts), sum(map(len, texts))))
        return documents(self, tokenizer, texts, threads)

    monkeypatch.setattr(Template, "encode_documents", watched)
    monkeypatch.setattr(tokenize_module, "MAX_BATCH_BYTES", 1_500)
    lines(corpus / "documents.jsonl", [{"text": "a" * 900}] * 6 + [{"text": "b"}] * 1_200 + [{"text": "c" * 5_000}])
    load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert sizes == [(2, 1_800)] * 3 + [(1_000, 1_000), (201, 5_200)]
