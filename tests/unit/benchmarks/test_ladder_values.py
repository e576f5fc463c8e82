"""What the miniature's base prefers and reads: it knows the island in Chinese, and nothing in Japanese."""

import pytest
import torch

from benchmarks import ladder_values
from benchmarks.ladder_values import log_probabilities, preferred
from llmtuner.model.loading import load_for_evaluation
from mini.exam import reading
from mini.facts import Name, build_world
from mini.text_generator import TextGenerator
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def base():
    return load_for_evaluation(ROOT / "mini" / "base")


def test_chinese_words_are_known_and_japanese_ones_are_not(base, monkeypatch):
    monkeypatch.setattr(ladder_values, "NUM_FACTS", 16)
    found = preferred(*base, [entity for entity in build_world() if entity.untold])
    assert set(found) == {*ladder_values.FORMS}
    assert found["zh_zh"]["zh"] > 0.8
    assert found["zh_zh"]["ja"] < 0.5
    assert found["ja_ja"]["ja"] < 0.5


def test_a_sentence_is_read_in_chinese_and_not_asked_about_in_japanese(base):
    zh, ja = (TextGenerator(language, build_world(), "test") for language in ("zh", "ja"))
    assert reading(*base, zh, zh, 20) > 0.7
    assert reading(*base, ja, ja, 20) < 0.3


def test_probabilities_are_those_of_each_sequence_alone(base):
    """The shorter one of a batch is padded behind its end."""
    model, _ = base
    sequences = [[5, 6, 7, 8], [5, 6, 9]]
    together = log_probabilities(model, sequences)
    with torch.no_grad():
        for sequence, found in zip(sequences, together, strict=True):
            log_probs = model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)
            assert found == pytest.approx(
                sum(log_probs[at, token].item() for at, token in enumerate(sequence[1:])), abs=1e-3
            )


def test_values_with_digits_are_left_out():
    assert ladder_values.has_digits(Name("3月", "3月", "March"))
    assert not ladder_values.has_digits(Name("赤", "红色", "red"))


def test_the_table_has_each_group_and_form_with_means_over_models():
    def model(right):
        cell = {"ja": right, "zh": 1.0}
        return {"preferred": {group: dict.fromkeys(ladder_values.FORMS, cell) for group in ladder_values.GROUPS}}

    lines = ladder_values.tables({"results": {"one": model(0.2), "two": model(0.4)}}, "preferred").splitlines()
    assert len(lines) == 2 + 3 * 4
    assert lines[-1] == "| untold: Chinese question, Chinese name | 30 (0 to 100) | 100 (100 to 100) |"
