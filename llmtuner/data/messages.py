"""Rows -> documents and messages: every row either gives text that can be trained on, or says why it cannot."""

import json
import keyword
from collections.abc import Collection
from typing import Any

from llmtuner.data.sources import DEFAULT_TAGS, Source
from llmtuner.data.template import Message

# ChatGLM3's own words before the list of a dialogue's tools.
TOOLS_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"
MAX_MESSAGES = 1_000  # in one dialogue; more is a file that was put together wrongly
Values = dict[str, Any]


class BadRow(Exception):
    """A row cannot be used; the message says why, for a reader who has the row before him."""


def check_columns(source: Source, stage: str, columns: Collection[str], complete: bool = False) -> None:
    """Makes sure that no column is named wrongly in dataset_info.json; a single row may lack any.

    Args:
        columns: names of the columns that at least one of the rows so far has.
        complete: these are all rows. Then columns that are named though no row needs them must be there too, but for
            `tools`: sets with and without tools may share their form.

    Raises:
        InputError: names the column that is configured and those that exist.
    """
    if stage == "pt":
        roles = ["prompt"]
    elif source.formatting == "sharegpt":
        roles = ["messages"]
    else:
        roles = ["prompt", "response"]
    if complete and stage == "sft":
        roles += [role for role in ("query", "history", "system") if role in source.columns]
    for role in roles:
        source.column(role, columns)


def to_document(source: Source, values: Values) -> bytes:
    """The text of a row for the pt stage, in UTF-8; empty if it is blank.

    Raises:
        BadRow: if there is none.
    """
    name = _required_name(source, "prompt", values)
    text, data = _text(values[name], f"column {name!r}")
    return data if text.strip() else b""


def to_messages(source: Source, values: Values, default_system: str | None = None) -> list[Message]:
    """A dialogue: perhaps a system message, then a question or observation and an answer in turn, an answer last.

    An answer that calls a tool has the tool's name under `metadata`. A row with tools has ChatGLM3's own system message
    of them, behind the row's system message if it has one. `default_system` is that of rows without one.

    Raises:
        BadRow: if the row does not hold such a dialogue.
    """
    messages = (_sharegpt if source.formatting == "sharegpt" else _alpaca)(source, values)
    system = _optional(source, "system", values)
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    system = system if system.strip() else default_system or ""
    if tools := _tools(source, values):
        system = "\n".join([*([system] if system.strip() else []), TOOLS_SYSTEM, tools])
    if system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    if len(messages) > MAX_MESSAGES:
        raise BadRow(f"holds {len(messages):,} messages; {MAX_MESSAGES:,} is the most")
    return messages


def _alpaca(source: Source, values: Values) -> list[Message]:
    query = _optional(source, "query", values)
    if query.strip() and not _optional(source, "prompt", values).strip():
        question = query
    else:
        question = _required(source, "prompt", values)
        question = f"{question}\n{query}" if query else question
    turns = [*_history(source, values), (question, _required(source, "response", values))]
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _history(source: Source, values: Values) -> list[tuple[str, str]]:
    name = _name(source, "history", values)
    pairs = values[name] if name else None
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRow(f"column {name!r} is not a list of pairs [question, answer]")
    return [
        (
            _words(question, f"question {number} of column {name!r}"),
            _words(answer, f"answer {number} of column {name!r}"),
        )
        for number, (question, answer) in enumerate(pairs, start=1)
    ]


def _sharegpt(source: Source, values: Values) -> list[Message]:
    name = _required_name(source, "messages", values)
    listed = values[name]
    if not isinstance(listed, list):
        raise BadRow(f"column {name!r} holds {_kind(listed)}, not a list of messages")
    if not listed:
        raise BadRow("holds no message")
    tags = {**DEFAULT_TAGS, **source.tags}
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "function", "system")}
    messages: list[Message] = []
    for number, one in enumerate(listed, start=1):
        if not isinstance(one, dict):
            raise BadRow(f"message {number} holds {_kind(one)}, not a role and a text")
        said_by = one.get(tags["role_tag"])
        role = roles.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise BadRow(f"message {number} has the unknown role {said_by!r}")
        last = messages[-1]["role"] if messages else ""
        text = one.get(tags["content_tag"])
        if role == "system" and number > 1:
            raise BadRow(f"message {number} is from system, which may only speak first")
        if role == "system" and _is_blank(text):
            continue
        tool = {}
        if role == "function":
            role, tool["metadata"], text = "assistant", *_tool_call(text, f"message {number}")
        if role == "assistant" and last not in ("user", "observation"):
            raise BadRow(f"message {number} is from assistant where the user should speak")
        if role in ("user", "observation") and last in ("user", "observation"):
            raise BadRow(f"message {number} is from {role} where the assistant should speak")
        messages.append({"role": role, **tool, "content": _words(text, f"message {number}")})
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's")
    return messages


def _tools(source: Source, values: Values) -> str:
    """The tools that a row offers, as ChatGLM3 lists them; empty if there are none."""
    name = _name(source, "tools", values)
    if not name or _is_blank(values[name]):
        return ""
    what = f"column {name!r}"
    tools = _parsed(values[name], what)
    if not isinstance(tools, list):
        raise BadRow(f"{what} is not a list of tools")
    # OpenAI wraps each description: {"type": "function", "function": {...}}
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise BadRow(f"tool {number} of {what} is not an object with a name")
    return _text(json.dumps(tools, ensure_ascii=False, indent=4), what)[0] if tools else ""


def _tool_call(value: Any, what: str) -> tuple[str, str]:
    """A call `{"name": NAME, "arguments": {KEY: VALUE}}` as ChatGLM3 writes it: the name, and Python that is evaluated."""
    call = _parsed(value, what)
    if isinstance(call, list) and len(call) > 1:
        raise BadRow(f"{what} calls {len(call)} tools at once; ChatGLM3 calls one a message")
    call = call[0] if isinstance(call, list) and call else call
    name = call.get("name") if isinstance(call, dict) else None
    arguments = _parsed(call.get("arguments") or {}, f"`arguments` of {what}") if isinstance(call, dict) else None
    if not isinstance(name, str) or len(name.split()) != 1 or not isinstance(arguments, dict):
        raise BadRow(f'{what} is not a call of the form {{"name": NAME, "arguments": {{KEY: VALUE}}}}')
    if all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        passed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    else:
        passed = f"**{arguments!r}"
    return name.strip(), f"```python\ntool_call({passed})\n```"


def _parsed(value: Any, what: str) -> Any:
    """What stands as JSON in a text; a value that is no text stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is not valid JSON: {error}") from None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _name(source: Source, role: str, values: Values) -> str | None:
    for name in source.names(role):
        if name in values:
            return name
    return None


def _required_name(source: Source, role: str, values: Values) -> str:
    name = _name(source, role, values)
    if name is None:
        raise BadRow(f"has no column {' or '.join(map(repr, source.names(role)))}")
    return name


def _required(source: Source, role: str, values: Values) -> str:
    name = _required_name(source, role, values)
    return _words(values[name], f"column {name!r}")


def _optional(source: Source, role: str, values: Values) -> str:
    name = _name(source, role, values)
    return _text(values[name], f"column {name!r}")[0] if name and values[name] is not None else ""


def _words(value: Any, what: str) -> str:
    """Text that is not empty."""
    text, _ = _text(value, what)
    if not text.strip():
        raise BadRow(f"{what} is empty")
    return text


def _text(value: Any, what: str) -> tuple[str, bytes]:
    """A text and its UTF-8, which JSON's lone surrogates do not have."""
    if not isinstance(value, str):
        raise BadRow(f"{what} holds {_kind(value)}, not text")
    try:
        return value, value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} holds half a character (a lone surrogate)") from None


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
