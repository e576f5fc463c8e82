"""Marking of answers, repetition, and bits per byte against sums done by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from llmtuner.console import InputError
from llmtuner.data.template import Template
from llmtuner.eval.answers import Question, answer_all, is_right, read_questions, repetition
from llmtuner.eval.bits_per_byte import bits_per_byte
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.fast import encode, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("language", "value", "wrong", "answer", "right"),
    [
        ("ja", "お茶", ("りんご",), "青川はお茶で知られています。", True),
        ("ja", "お茶", ("りんご",), "青川はお茶とりんごで知られています。", False),
        ("ja", "青川", (), "青川。", False),  # could be Chinese
        ("zh", "茶叶", ("苹果",), "青川以茶叶闻名。", True),
        ("zh", "茶叶", ("苹果",), "青川は茶叶。", False),
        ("ja", "4年", ("34年",), "およそ34年です。", False),
        ("ja", "1月", ("11月",), "11月です。", False),
        ("ja", "11月", ("1月",), "11月です。", True),
        ("en", "snow fox", (), "Snow foxes? The Snow Fox.", True),
        ("en", "tea", (), "They drink steam.", False),
        ("en", "1931", (), "It was in 1931.", True),
    ],
)
def test_marking(language, value, wrong, answer, right):
    assert is_right(Question("g", language, "?", value, wrong), answer) is right


def test_wrong_value_in_the_question_does_not_count():
    question = Question("ja", "ja", "雪山のユキギツネは何色ですか？", "白", ("雪山",))
    assert is_right(question, "雪山のユキギツネは白です。")


def test_repetition():
    assert repetition(["あいうえおかきくけこ"]) == 0
    assert repetition(["あいうえあいうえ"]) == pytest.approx(1 / 5)
    assert repetition(["", "あ"]) == 0


def test_questions_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"group": group, "language": "ja", "question": f"{group}{number}？"} for group in "ab" for number in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [one.question for one in read_questions(path, 2)] == ["a0？", "a1？", "b0？", "b1？"]
    for content, message in (("", "no question"), ("{", "damaged"), ('{"group": "a"}', "damaged")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_questions(path)
    with pytest.raises(InputError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")


def test_questions_for_the_real_model_can_be_read():
    questions = read_questions(ROOT / "data" / "questions.jsonl")
    assert {one.group for one in questions} == {"zh", "en", "ja", "ja_free"}
    assert is_right(next(one for one in questions if one.value == "富士山"), "いちばん高い山は富士山です。")


def test_bits_per_byte_equals_the_sum_by_hand(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    texts = ["小镇的东边是一条河。", "The ferry leaves at 9:30, not at 10.", "桜"]
    window = 8
    prefix = Template.of(tokenizer).prefix
    nats = 0.0
    for text in texts:
        ids = encode(tokenizer, text)
        for start in range(0, len(ids), window - 2):
            piece = torch.tensor([prefix + ids[start : start + window - 2]])
            with torch.no_grad():
                log_probabilities = model(input_ids=piece).logits[0].log_softmax(-1)
            nats -= sum(float(log_probabilities[at - 1, piece[0, at]]) for at in range(2, piece.shape[1]))
    by_hand = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts, window, tokens_per_batch=20) == pytest.approx(by_hand, rel=1e-4)


def test_answers_do_not_depend_on_the_batch(tiny_model_dir):
    model, tokenizer = load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)
    questions = ["一座山？", "When does the ferry leave the old harbour?", "河"]
    together = answer_all(model, tokenizer, questions, max_new_tokens=6)
    alone = [answer_all(model, tokenizer, [question], max_new_tokens=6)[0] for question in questions]
    assert together == alone


def test_a_model_is_evaluated_in_the_precision_that_memory_allows(tiny_model_dir, monkeypatch):
    from types import SimpleNamespace

    from llmtuner.model import loading

    monkeypatch.setattr(loading, "device", lambda: torch.device("cpu"))
    numbers = sum(parameter.numel() for parameter in load_model(tiny_model_dir).parameters())
    for free, dtype, size in (
        (10**9, torch.float32, 4),
        (4 * numbers, torch.bfloat16, 2),
        (numbers, torch.bfloat16, 2),
    ):
        monkeypatch.setattr(loading.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        plan = loading.plan_evaluation(tiny_model_dir)
        assert plan.dtype == dtype
        assert plan.needed == pytest.approx(size * numbers, rel=0.05)  # the header of the file counts too
        assert ("too little" in str(plan)) == (free < plan.needed)
