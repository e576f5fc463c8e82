"""The ladder: what is asked after a pivot, what counts as right and as named, and the table."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llmtuner.console import UserError
from llmtuner.eval.ladder import climb, count_cells, format_ladder, ladder_rows, num_answers
from llmtuner.eval.questions import Question

MINA = ("ミナ", "米娜", "Mina")
EVERYBODY = (*MINA, "サキ", "佐纪", "Saki", "ミナト", "米娜都", "Minato")
JA = Question("untold_named.ja_ja", "ja", "ミナの職業は？", "かじ屋", ("歌い手",), "person.job", MINA, EVERYBODY)
ZH = replace(
    JA, group="untold_named.zh_zh", language="zh", question="米娜的职业是什么？", value="铁匠", wrong_values=("歌手",)
)
QUESTIONS = [
    JA,
    replace(JA, group="untold_named.ja_zh", question="米娜の職業は？"),
    replace(ZH, group="untold_named.zh_ja", question="ミナ的职业是什么？"),
    ZH,
]


def answering(answers, asked=None):
    """A model that answers prompts from a table."""

    def generate(prompts):
        if asked is not None:
            asked.append(list(prompts))
        return SimpleNamespace(texts=[answers[prompt] for prompt in prompts])

    return generate


def marks_of(form, answer):
    """(right, names its subject) of an answer to one form, where all others are answered with nothing of use."""
    prompts = {question.group.split(".")[1]: question.question for question in QUESTIONS}
    prompts["pivot"] = f"无。\n{JA.question}"
    others = dict.fromkeys([*prompts.values(), f"{answer}\n{JA.question}"], "无。")
    rows = climb(QUESTIONS, answering(others | {prompts[form]: answer}))
    (row,) = [row for row in rows if row["form"] == form]
    return row["correct"], row["names_subject"]


def test_a_pivot_is_the_own_chinese_answer_above_the_japanese_question():
    asked = []
    answers = {question.question: "不知道。" for question in QUESTIONS}
    answers |= {
        ZH.question: "米娜是歌手。",
        "米娜是歌手。\nミナの職業は？": "ミナは歌い手です。",
    }  # wrong, and said again
    rows = climb(QUESTIONS, answering(answers, asked))
    assert asked == [[question.question for question in QUESTIONS], ["米娜是歌手。\nミナの職業は？"]]
    assert len(rows) == num_answers(QUESTIONS) == 5
    assert [row["form"] for row in rows] == ["ja_ja", "ja_zh", "zh_ja", "zh_zh", "pivot"]
    assert rows[-1] == {
        "entities": "untold_named",
        "form": "pivot",
        "prompt": "米娜是歌手。\nミナの職業は？",
        "answer": "ミナは歌い手です。",
        "right": "かじ屋",
        "correct": False,
        "names_subject": True,
    }


@pytest.mark.parametrize(
    ("form", "answer", "correct", "names_subject"),
    [
        ("ja_ja", "ミナはかじ屋です。", True, True),
        ("ja_ja", "かじ屋です。", True, False),
        ("ja_ja", "サキはかじ屋です。", False, False),  # about somebody else
        ("ja_ja", "ミナは歌い手です。", False, True),
        ("ja_ja", "米娜はかじ屋です。", True, False),  # neither the question nor Japanese writes it so
        ("ja_ja", "ミナトはかじ屋です。", False, False),  # a longer name
        ("ja_zh", "米娜はかじ屋です。", True, True),  # as the question writes it
        ("ja_zh", "ミナはかじ屋です。", True, True),  # as Japanese writes it
        ("ja_zh", "米娜是铁匠。", False, True),  # in the language of the name, not of the question
        ("zh_ja", "ミナ是铁匠。", True, True),  # the question's own name makes no Japanese answer
        ("zh_ja", "米娜是铁匠。", True, True),
        ("zh_ja", "ミナはかじ屋です。", False, True),
        ("zh_ja", "サキ是铁匠。", False, False),
        ("zh_ja", "ミナト是铁匠。", False, False),
        ("zh_zh", "米娜是铁匠。", True, True),
        ("zh_zh", "ミナ是铁匠。", False, False),
        ("pivot", "ミナはかじ屋です。", True, True),
        ("pivot", "米娜はかじ屋です。", True, True),  # as its Chinese answer wrote it
        ("pivot", "米娜是铁匠。", False, True),  # the pivot repeated is no Japanese answer
    ],
)
def test_marks(form, answer, correct, names_subject):
    assert marks_of(form, answer) == (correct, names_subject)


def test_other_facts_in_chinese_than_in_japanese_are_refused():
    other = replace(ZH, subject=("サキ", "佐纪", "Saki"))
    with pytest.raises(UserError, match="not about the same facts"):
        climb([JA, other], answering({JA.question: "", other.question: ""}))


def rows_of(entities, form, correct, named, n):
    return [
        {"entities": entities, "form": form, "correct": place < correct, "names_subject": place < named}
        for place in range(n)
    ]


def test_table_has_shares_with_intervals_of_each_model():
    told = [*rows_of("told", "ja_ja", 96, 100, 100), *rows_of("told", "pivot", 0, 50, 100)]
    cells = count_cells([*told, *rows_of("untold_unnamed", "zh_zh", 10, 10, 10)])
    assert cells["told"]["ja_ja"] == {
        "n": 100,
        "accuracy": 0.96,
        "accuracy_interval": [0.9016, 0.9843],  # Wilson's
        "names_subject": 1.0,
        "names_subject_interval": [0.963, 1.0],
    }
    assert list(cells) == ["told", "untold_unnamed"]
    table = format_ladder(
        {"pretrained": cells, "chat": count_cells(told[:150]) | {"untold_unnamed": cells["untold_unnamed"]}}
    )
    lines = [re.sub(" +", " ", line) for line in table.splitlines()]
    assert lines[0] == " n pretrained: right pretrained: names it chat: right chat: names it"
    assert lines[2] == "told in Japanese"
    shares = "96 % (90–98) 100 % (96–100)"
    assert lines[3] == f" Japanese question, Japanese name 100 {shares} {shares}"
    assert lines[4].startswith(" pivot: Chinese answer, Japanese question 100 0 % (0–4) 50 % (40–60)")
    assert lines[5] == "untold, never named"
    assert len(lines) == 7
    assert ladder_rows({}) == {}
