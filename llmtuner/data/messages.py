"""Rows -> documents and messages: every row either gives text that can be trained on, or says why it cannot."""

from typing import Any

from llmtuner.data.sources import DEFAULT_TAGS, Source
from llmtuner.data.template import Message

MAX_MESSAGES = 1_000  # in one dialogue; more is a file that was put together wrongly
Values = dict[str, Any]


class BadRow(Exception):
    """A row cannot be used; the message says why, for a reader who has the row before him."""


def check_columns(source: Source, stage: str, values: Values) -> None:
    """Makes sure, by a data set's first row, that its columns are named rightly.

    Raises:
        InputError: names the column that is configured and those that exist.
    """
    if stage == "pt":
        needed = ["prompt"]
    elif source.formatting == "sharegpt":
        needed = ["messages"]
    else:
        needed = ["prompt", "response"]
    for role in [
        *needed,
        *(role for role in ("query", "history", "system") if stage == "sft" and role in source.columns),
    ]:
        source.column(role, list(values))


def to_document(source: Source, values: Values) -> bytes:
    """The text of a row for the pt stage, in UTF-8; empty if it is blank.

    Raises:
        BadRow: if there is none.
    """
    name = _required_name(source, "prompt", values)
    text, data = _text(values[name], f"column {name!r}")
    return data if text.strip() else b""


def to_messages(source: Source, values: Values) -> list[Message]:
    """A dialogue: perhaps a system message, then a question or observation and an answer in turn, an answer last.

    Raises:
        BadRow: if the row does not hold such a dialogue.
    """
    messages = (_sharegpt if source.formatting == "sharegpt" else _alpaca)(source, values)
    system = _optional(source, "system", values)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if len(messages) > MAX_MESSAGES:
        raise BadRow(f"holds {len(messages):,} messages; {MAX_MESSAGES:,} is the most")
    return messages


def _alpaca(source: Source, values: Values) -> list[Message]:
    question, answer = _required(source, "prompt", values), _required(source, "response", values)
    query = _optional(source, "query", values)
    turns = [*_history(source, values), (f"{question}\n{query}" if query else question, answer)]
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
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "system")}
    messages: list[Message] = []
    for number, one in enumerate(listed, start=1):
        if not isinstance(one, dict):
            raise BadRow(f"message {number} holds {_kind(one)}, not a role and a text")
        said_by = one.get(tags["role_tag"])
        role = roles.get(said_by) if isinstance(said_by, str) else None
        if role is None:
            raise BadRow(f"message {number} has the unknown role {said_by!r}")
        last = messages[-1]["role"] if messages else ""
        if role == "system" and messages:
            raise BadRow(f"message {number} is from system, which may only speak first")
        if role == "assistant" and last not in ("user", "observation"):
            raise BadRow(f"message {number} is from assistant where the user should speak")
        if role in ("user", "observation") and last in ("user", "observation"):
            raise BadRow(f"message {number} is from {role} where the assistant should speak")
        messages.append({"role": role, "content": _words(one.get(tags["content_tag"]), f"message {number}")})
    if messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's")
    return messages


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
