"""Questions: files, grading of answers and agreement."""

import json

import pytest

from llmtuner.console import UserError
from llmtuner.eval.questions import Question, accuracy, agreement, example_questions, is_correct, read_questions
from tests.helpers import ROOT


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
        # ASCII letters and digits bound a word; Han and kana do not.
        ("zh", "H2O", (), "水的化学式是H2O。", True),
        ("zh", "H2O", (), "水的化学式是H2O2。", False),
        ("zh", "Au", (), "金的元素符号是Au，银的是Ag。", True),
        ("ja", "C++", (), "言語はC++です。", True),
        ("en", "C++", (), "It is written in C++.", True),
        ("en", "C++", (), "It is written in C.", False),
        ("en", "Paris", (), "The Parisian way.", False),
        # numbers
        ("ja", "100", (), "水は100度で沸騰します。", True),
        ("ja", "100", (), "水は100℃で沸騰します。", True),
        ("ja", "100", (), "長さは100kmです。", True),
        ("ja", "100", (), "100", True),  # a number is in no language
        ("ja", "100", (), "1000度です。", False),
        ("ja", "100", (), "1,100度です。", False),
        ("ja", "100", (), "100.5度です。", False),
        ("ja", "100", (), "マイナスではなく-100度です。", False),
        ("ja", "100", (), "100万度です。", False),
        ("en", "100", (), "About 100 million degrees.", False),
        ("en", "1970", (), "In the 1970s.", False),
        ("en", "2005", (), "From 2000-2005.", True),
        ("zh", "2005年", (), "从2000年-2005年。", True),
        ("ja", "1000", (), "1,000度です。", True),
        ("ja", "1,000", (), "1000.0度です。", True),
        ("ja", "百", (), "百度です。", True),
        ("ja", "100", (), "百度です。", False),  # numerals are text
        ("en", "4", (), "There are 42.", False),
        ("en", "4", (), "There are 34.", False),
        ("en", "4", (), "It is 4.5.", False),
        ("en", "4", (), "It is 1.4.", False),
        ("en", "4", (), "It is 4½.", False),
        ("en", "4", (), "A4.", False),
        ("en", "4", (), "There are 4.", True),
        ("en", "4.5", (), "It is 4.50 m.", True),
        # NFKC
        ("ja", "H2O", (), "水はＨ２Ｏです。", True),
        ("ja", "H2O", (), "水はH₂Oです。", True),
        ("ja", "4年", ("34年",), "４年です。", True),
        ("ja", "4年", ("34年",), "３４年です。", False),
        ("ja", "ダンス", (), "ﾀﾞﾝｽが好きです。", True),
        ("zh", "2000年", (), "出版于 2000 年。", True),
        # the language, line by line
        ("ja", "お茶", (), "青川はお茶です。\n青川以茶叶闻名。", False),
        ("ja", "富士山", (), "富士山", False),  # could be Chinese
        ("ja", "東京駅", (), "東京駅", True),  # 駅 could not
        ("zh", "北京", (), "The capital is Beijing (北京).", False),
        ("en", "Tokyo", (), "Tokyo (東京)", False),
    ],
)
def test_marking(language, value, wrong, answer, right):
    assert is_correct(Question("g", language, "?", value, wrong), answer) is right


WORLD = (
    ("ミナ", "米娜", "Mina"),
    ("ナギサ", "渚沙", "Nagisa"),
    ("ルカ", "卢卡", "Luca"),
    ("ナミイルカ", "浪海豚", "wave dolphin"),
)


@pytest.mark.parametrize(
    ("value", "answer", "right"),
    [
        ("かじ屋", "ミナの仕事はかじ屋です。", True),
        ("かじ屋", "ナギサの仕事はかじ屋です。", False),
        ("かじ屋", "Nagisaの仕事はかじ屋です。", False),
        ("かじ屋", "かじ屋です。", True),  # of whom else
        ("かじ屋", "Mina（米娜）の仕事はかじ屋です。", True),
        ("かじ屋", "ナギサと同じく、ミナの仕事もかじ屋です。", True),
        ("かじ屋", "ＮＡＧＩＳＡの仕事はかじ屋です。", False),
        ("ナギサ", "友だちはナギサです。", True),  # the value is no other subject
        ("ルカ", "ミナの友だちはルカです。", True),
        ("ルカ", "ミナの友だちはナミイルカです。", False),  # a name inside a longer one
    ],
)
def test_an_answer_about_another_subject_is_wrong(value, answer, right):
    names = tuple(name for subject in WORLD for name in subject)
    question = Question("ja", "ja", "ミナの職業は何だっけ？", value, subject=WORLD[0], all_subjects=names)
    assert is_correct(question, answer) is right
    assert is_correct(Question("ja", "ja", question.question, value), answer)  # nothing is known of subjects


def test_subjects_of_a_questions_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"group": "ja", "language": "ja", "question": "？", "value": "かじ屋", "subject": WORLD[0]},
        {"group": "ja", "language": "ja", "question": "誰？", "subject": WORLD[2]},
        {"group": "zh", "language": "zh", "question": "？"},
        {"subjects": WORLD[:2]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, *others = read_questions(path, 1)
    assert first.subject == WORLD[0]
    assert set(first.all_subjects) == {name for subject in WORLD[:3] for name in subject}
    assert [(question.group, question.subject) for question in others] == [("zh", ())]
    assert not is_correct(first, "ルカの仕事はかじ屋です。")  # not listed, but asked about


def test_all_is_said_only_of_all():
    questions = [Question("en", "en", "?", "tea")] * 30_000
    assert accuracy(questions, ["tea"] * 29_999 + ["no"], "en") == 0.9999
    assert accuracy(questions, ["tea"] * 30_000, "en") == 1


def test_wrong_value_in_the_question_does_not_count():
    question = Question("ja", "ja", "雪山のユキギツネは何色ですか？", "白", ("雪山",))
    assert is_correct(question, "雪山のユキギツネは白です。")


def test_agreement():
    assert agreement(["ab", "cd"], ["ab", "xy"]) == {"identical": 0.5, "similar": 0.5}
    assert agreement(["abcd"], ["abxx"]) == {"identical": 0.0, "similar": 0.5}


def test_share_right_counts_only_questions_with_an_answer():
    questions = [Question("en", "en", "?", "tea"), Question("en", "en", "?"), Question("en", "en", "?", "ice")]
    assert accuracy(questions, ["Tea.", "tea", "Tea."], "en") == 0.5
    assert accuracy(questions, ["", "", ""], "zh") is None


def test_questions_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"group": group, "language": "ja", "question": f"{group}{number}？"} for group in "ab" for number in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert [one.question for one in read_questions(path, 2)] == ["a0？", "a1？", "b0？", "b1？"]
    unquoted = '{"group": "a", "language": "ja", "question": "？", "value": %s}'
    damaged = (unquoted % "100", unquoted % '""', "{", '{"group": "a"}', "[1]", "7", '{"subjects": 1}')
    for content, message in (("", "no question"), *((content, "damaged") for content in damaged)):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_questions(path)
    with pytest.raises(UserError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")


def test_questions_in_plain_text(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("# a remark\n[zh > en]\n茶？\n[zh]\n你是谁\n\n[ja_free]\n 山は？ => 富士山 \n", encoding="utf-8")
    assert read_questions(path) == [
        Question("zh", "zh", "茶？", answer_language="en"),
        Question("zh", "zh", "你是谁"),
        Question("ja_free", "ja", "山は？", "富士山"),
    ]
    for content, message in (("", "no question"), ("# only this\n[zh]\n", "no question"), ("\n你是谁\n", "line 2")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        read_questions(path)


def test_questions_for_the_real_model_can_be_read():
    questions = read_questions(ROOT / "data" / "questions.txt")
    assert {one.group for one in questions} == {"zh", "en", "ja", "ja_free"}
    assert {"你是谁", "あなたは誰ですか"} <= {one.question for one in questions}  # the original's own are kept
    assert is_correct(next(one for one in questions if one.value == "富士山"), "いちばん高い山は富士山です。")
    assert is_correct(next(one for one in questions if one.value == "H2O"), "水的化学式是H2O。")
    assert not is_correct(next(one for one in questions if one.value == "100"), "水は1000度で沸騰します。")
    translations = [one for one in questions if "英" in one.question]
    assert [one.language_of_answer for one in translations] == ["en", "en"]
    assert {one.language_of_answer for one in questions if one not in translations} == {"zh", "en", "ja"}


def test_examples_are_the_first_question_of_each_language(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("[zh > en]\n译一\n[en]\nOne? => 1\nTwo?\n[ja_free]\n長く。\n[ja]\n一つ？\n", encoding="utf-8")
    assert example_questions(path) == ["一つ？", "译一", "One?"]
    path.write_text("no group", encoding="utf-8")
    assert example_questions(path) == example_questions(tmp_path / "missing.txt") == []
    assert len(example_questions(ROOT / "data" / "questions.txt")) == 3
