"""A tokenizer and a directory of small datasets."""

import pytest

from llmtuner.tokenizer.encoding import load_tokenizer
from tests.unit.data.datasets import DIALOGUES, DOCUMENTS, info, lines


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir):
    return load_tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def corpus(tmp_path):
    """Thirty documents, of which two are alike, and twenty dialogues."""
    texts = [f"小镇的第{number}条河。The ferry leaves at {number}." for number in range(29)]
    lines(tmp_path / "documents.jsonl", [{"text": text} for text in [*texts, texts[3]]])
    lines(tmp_path / "dialogues.jsonl", [{"q": f"第{n}条河？", "in": "", "a": f"柳树 {n}"} for n in range(20)])
    info(tmp_path, documents=DOCUMENTS, dialogues=DIALOGUES)
    return tmp_path
