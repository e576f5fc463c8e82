"""The language of lines and answers, and language confusion."""

import pytest

from llmtuner.eval.evaluate import language_confusion_by_group
from llmtuner.eval.language import (
    LANGUAGES,
    Languages,
    answers_in_language,
    in_language,
    language_confusion,
    languages_of,
)
from llmtuner.eval.questions import Question, is_correct


@pytest.mark.parametrize(
    ("line", "ja", "zh", "en"),
    [
        ("ミナの仕事はかじ屋です。", True, False, False),
        ("米娜是铁匠。", False, True, False),
        ("我不知道。", False, True, False),
        ("富士山", None, True, False),
        ("富士山。", None, True, False),
        ("東京駅", True, False, False),
        ("我喜歡在圖書館裡看書", False, True, False),  # traditional
        ("日本最高的山峰叫做富士山", False, True, False),  # no character tells, but it is no name
        ("Mina is a blacksmith.", False, False, True),
        ("ミナ works as a blacksmith in Milne.", False, False, False),
        ("H2O", None, None, True),
        ("1,931", None, None, None),
        ("…！", None, None, None),
        ("Привет", False, False, False),
        ("ｶﾅ", True, False, False),
    ],
)
def test_language_of_a_line(line, ja, zh, en):
    assert [in_language(line, language) for language in ("ja", "zh", "en")] == [ja, zh, en]
    assert in_language(line, "fr") is (None if line in ("1,931", "…！") else True)


def test_language_confusion_counts_lines_and_answers():
    answers = ["山です。\n\n川です。", "山です。\n这是山。", "富士山", "", "```\nprint(1)\n```\n関数です。"]
    assert [answers_in_language(answer, "ja") for answer in answers] == [True, False, None, None, True]
    assert language_confusion(answers, ["ja"] * 5) == {
        "line_pass_rate": 0.8,
        "lines": 5,
        "undecided_lines": 1,
        "response_pass_rate": 0.6667,
        "responses": 3,
        "undecided_responses": 2,
    }
    nothing = language_confusion(["7"], ["en"])
    assert nothing["line_pass_rate"] is nothing["response_pass_rate"] is None


def test_language_confusion_of_each_group():
    questions = [
        Question("zh", "zh", "你是谁"),
        Question("zh", "zh", "把“今天天气很好”翻译成英文。", answer_language="en"),
        Question("ja_free", "ja", "話して。"),
    ]
    found = language_confusion_by_group(questions, ["我是米娜。", "The weather is fine today.", "The weather."])
    assert {group: one["response_pass_rate"] for group, one in found.items()} == {"zh": 1.0, "ja_free": 0.0}
    assert found["zh"]["responses"] == 2


@pytest.mark.parametrize(
    ("line", "question", "expected"),
    [
        ("ភ្នំពេញ។", "តើរាជធានីមានឈ្មោះអ្វី?", True),
        ("Phnom Penh (ភ្នំពេញ)", "តើរាជធានីមានឈ្មោះអ្វី?", True),
        ("The capital is ភ្នំ", "តើរាជធានីមានឈ្មោះអ្វី?", True),  # as many letters as English words
        ("The capital of this country is ភ្", "តើរាជធានីមានឈ្មោះអ្វី?", False),
        ("Phnom Penh", "តើរាជធានីមានឈ្មោះអ្វី?", False),
        ("金边。", "តើរាជធានីមានឈ្មោះអ្វី?", False),
        ("100", "តើរាជធានីមានឈ្មោះអ្វី?", None),
        ("Hà Nội", "Thủ đô là gì?", True),
        ("It is Hanoi", "Thủ đô là gì?", True),  # not told apart
        ("河内", "Thủ đô là gì?", False),
        ("Ханой", "Thủ đô là gì?", False),
    ],
)
def test_another_language_is_known_by_the_letters_of_the_question(line, question, expected):
    assert in_language(line, "xx", question) is expected


def test_answers_in_another_language_are_graded_and_counted():
    capital = Question("km", "km", "តើរាជធានីនៃប្រទេសកម្ពុជាមានឈ្មោះអ្វី?", "ភ្នំពេញ")
    translation = Question("km", "km", "បកប្រែជាភាសាអង់គ្លេស៖ ភ្នំពេញ", "Phnom Penh", answer_language="en")
    assert is_correct(capital, "រាជធានីគឺ ភ្នំពេញ។")
    assert not is_correct(capital, "It is ភ្នំពេញ.\nThe capital of Cambodia.")
    assert is_correct(translation, "Phnom Penh")
    answers = ["ភ្នំពេញ", "Phnom Penh"]
    languages = Languages(km="Khmer", en="English")
    metrics = language_confusion_by_group([capital, translation], answers, languages)
    assert metrics.keys() == {"km"}
    assert metrics["km"]["response_pass_rate"] == 1.0
    assert language_confusion_by_group([capital, capital], answers, languages)["km"]["response_pass_rate"] == 0.5


def test_the_added_language_comes_first():
    languages = languages_of({"step1": {}, "step2": {"languages": {"km": "Khmer", "en": "English"}}})
    assert (languages.added, languages.name, languages.retained) == ("km", "Khmer", ("en",))
    assert (languages.qa_groups, languages.free_form) == (("en", "km", "km_unseen"), "km_free")
    assert languages.listed() == "Khmer and English"
    assert languages_of({"step1": {}}) is LANGUAGES
    assert LANGUAGES.listed("or") == "Japanese, Chinese or English"
    assert LANGUAGES.listed("and", ["en"]) == "English"
