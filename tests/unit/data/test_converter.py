"""Rows of alpaca and sharegpt datasets become messages; invalid rows say why."""

import json

import pytest

from llmtuner.data.converter import MAX_MESSAGES, InvalidRow, to_messages
from llmtuner.data.tokenize import load_tokenized_dataset
from tests.unit.data.datasets import (
    ALPACA,
    AS_PYTHON,
    CALL,
    SHAREGPT,
    TOOLS,
    WITH_TOOLS,
    calling,
    info,
    lines,
    settings,
    turns,
)


def test_history_and_system_come_first():
    row = {"q": "Q2", "in": None, "a": "A2", "before": [["Q1", "A1"]], "rules": "S"}
    assert [message["content"] for message in to_messages(ALPACA, row)] == ["S", "Q1", "A1", "Q2", "A2"]
    assert [message["role"] for message in to_messages(ALPACA, row)] == ["system", *["user", "assistant"] * 2]
    assert len(to_messages(ALPACA, {"q": "Q", "a": "A"})) == 2


def test_an_empty_system_message_is_none():
    for empty in ("", " \n", None):
        assert [message["role"] for message in to_messages(ALPACA, {"q": "Q", "a": "A", "rules": empty})] == [
            "user",
            "assistant",
        ]
        row = turns("s", "h", "g")
        row["conversations"][0]["value"] = empty
        assert [message["role"] for message in to_messages(SHAREGPT, row)] == ["user", "assistant"]


def test_a_question_may_stand_in_the_input_alone():
    for empty in ({"q": ""}, {"q": " "}, {"q": None}, {}):
        assert to_messages(ALPACA, {**empty, "in": "訳して", "a": "A"})[0] == {"role": "user", "content": "訳して"}


def test_observations_take_the_place_of_questions():
    roles = [message["role"] for message in to_messages(SHAREGPT, turns("s", "h", "g", "o", "g"))]
    assert roles == ["system", "user", "assistant", "observation", "assistant"]


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (ALPACA, {"q": "Q", "a": " \n"}, "column 'a' is empty"),
        (ALPACA, {"q": None, "a": "A"}, "column 'q' holds nothing, not text"),
        (ALPACA, {"q": 3, "a": "A"}, "column 'q' holds int, not text"),
        (ALPACA, {"q": "Q"}, "has no column 'a'"),
        (ALPACA, {"q": "Q", "a": "\udc00"}, "column 'a' holds half a character"),
        (ALPACA, {"q": "Q", "a": "A", "in": 3}, "column 'in' holds int"),
        (ALPACA, {"q": "Q", "a": "A", "rules": ["S"]}, "column 'rules' holds list"),
        (ALPACA, {"q": "Q", "a": "A", "before": "Q1"}, "not a list of pairs"),
        (ALPACA, {"q": "Q", "a": "A", "before": [["Q1"]]}, "not a list of pairs"),
        (ALPACA, {"q": "Q", "a": "A", "before": [["Q1", ""]]}, "answer 1 of column 'before' is empty"),
        (ALPACA, {"q": "Q", "a": "A", "before": [["Q1", "A1"]] * MAX_MESSAGES}, "holds 2,002 messages"),
        (SHAREGPT, {}, "has no column 'conversations'"),
        (SHAREGPT, {"conversations": None}, "holds nothing, not a list"),
        (SHAREGPT, {"conversations": "hello"}, "holds str, not a list"),
        (SHAREGPT, {"conversations": []}, "holds no message"),
        (SHAREGPT, {"conversations": ["hello"]}, "message 1 holds str"),
        (SHAREGPT, turns("h", "bot"), "message 2 has the unknown role 'bot'"),
        (SHAREGPT, turns("h", ["gpt"]), "message 2 has the unknown role ['gpt']"),
        (SHAREGPT, turns("g", "h"), "message 1 is from assistant where the user should speak"),
        (SHAREGPT, turns("h", "g", "h", "h"), "message 4 is from user where the assistant should speak"),
        (SHAREGPT, turns("h", "o"), "message 2 is from observation where the assistant should speak"),
        (SHAREGPT, turns("h", "g", "g"), "message 3 is from assistant where the user should speak"),
        (SHAREGPT, turns("h", "s", "g"), "message 2 is from system, which may only speak first"),
        (SHAREGPT, turns("h", "g", "h"), "the last message is not the assistant's"),
        (SHAREGPT, turns("s"), "the last message is not the assistant's"),
        (SHAREGPT, turns(*"hg" * 501), "holds 1,002 messages; 1,000 is the maximum"),
        (SHAREGPT, {"conversations": [{"from": "human", "value": ""}]}, "message 1 is empty"),
        (SHAREGPT, {"conversations": [{"from": "human"}]}, "message 1 holds nothing, not text"),
    ],
)
def test_bad_row_says_why(source, row, reason):
    with pytest.raises(InvalidRow) as error:
        to_messages(source, row)
    assert reason in str(error.value)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), json.dumps([{"type": "function", "function": TOOLS[0]}])])
def test_tools_and_calls_are_read(tools):
    system, *others = to_messages(WITH_TOOLS, calling(tools))
    assert system["role"] == "system"
    assert system["content"] == (
        "Answer the following questions as best as you can. You have access to the following tools:\n"
        + json.dumps(TOOLS, ensure_ascii=False, indent=4)
    )
    assert others == [
        {"role": "user", "content": "北京天气"},
        {"role": "assistant", "metadata": "get_weather", "content": AS_PYTHON},
        {"role": "observation", "content": '{"temp": 20}'},
        {"role": "assistant", "content": "20度"},
    ]
    row = calling(tools)
    row["conversations"].insert(0, {"from": "system", "value": "S"})
    assert to_messages(WITH_TOOLS, row)[0]["content"] == f"S\n{system['content']}"
    assert to_messages(WITH_TOOLS, row, "D")[0]["content"] == f"S\n{system['content']}"
    assert to_messages(WITH_TOOLS, calling(tools), "D")[0]["content"] == f"D\n{system['content']}"


def test_rows_without_tools_are_ordinary(corpus, tokenizer, capsys):
    ordinary = [
        turns("h", "g") | empty for empty in ({}, {"tools": None}, {"tools": ""}, {"tools": "[]"}, {"tools": []})
    ]
    for row in ordinary:
        assert to_messages(WITH_TOOLS, row) == to_messages(SHAREGPT, row)
    tagged = {"formatting": "sharegpt", "columns": WITH_TOOLS.columns, "tags": {"function_tag": "function_call"}}
    lines(corpus / "talks.jsonl", ordinary[:1] * 3)
    info(corpus, talks={"file_name": "talks.jsonl", **tagged})
    assert len(load_tokenized_dataset("talks", "sft", tokenizer, settings(corpus))) == 3
    assert "talks: no row has a column 'tools'" in capsys.readouterr().out
    lines(corpus / "talks.jsonl", [*ordinary, calling(TOOLS)])
    assert len(load_tokenized_dataset("talks", "sft", tokenizer, settings(corpus))) == 6
    assert "no row has" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (calling("{"), "column 'tools' is not valid JSON"),
        (calling({"name": "x"}), "column 'tools' is not a list of tools"),
        (calling(["x"]), "tool 1 of column 'tools' is not an object with a name"),
        (calling(TOOLS, "Q", "get_weather"), "message 2 is not valid JSON"),
        (calling(TOOLS, "Q", '{"name": "x y", "arguments": {}}'), "message 2 is not a call of the form"),
        (calling(TOOLS, "Q", '{"name": "x", "arguments": [1]}'), "message 2 is not a call of the form"),
        (calling(TOOLS, "Q", json.dumps([CALL, CALL])), "message 2 calls 2 tools at once"),
        (calling(TOOLS, "Q", None), "message 2 is not a call of the form"),
    ],
)
def test_bad_tools_are_a_problem_of_their_row(row, reason):
    with pytest.raises(InvalidRow) as error:
        to_messages(WITH_TOOLS, row)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("call", "content"),
    [
        ([CALL], AS_PYTHON),
        ({"name": "f", "arguments": '{"a": "it\'s"}'}, '```python\ntool_call(a="it\'s")\n```'),
        ({"name": "f"}, "```python\ntool_call()\n```"),
        ({"name": "f", "arguments": {"is": 1, "a-b": 2}}, "```python\ntool_call(**{'is': 1, 'a-b': 2})\n```"),
    ],
)
def test_calls_are_written_as_python(call, content):
    row = calling(TOOLS, "Q", json.dumps(call))
    assert to_messages(WITH_TOOLS, row)[-1]["content"] == content
