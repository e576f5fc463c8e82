"""Converts rows to documents and dialogues: every row either yields text to train on, or the reason why it is invalid."""

import json
import keyword
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from llmtuner.console import UserError
from llmtuner.data.bridges import by_language, glossary_documents, parallel_document
from llmtuner.data.held_out import never_held_out, text_hash
from llmtuner.data.readers import Row
from llmtuner.data.sources import DEFAULT_TAGS, TRANSLATIONS, DatasetAttr
from llmtuner.data.template import Message

# ChatGLM3's own introduction of the tools of a dialogue.
TOOL_SYSTEM_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
MAX_MESSAGES = 1_000  # in one dialogue; more is a file that was put together wrongly
Values = dict[str, Any]
_encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would create an encoder for each row


class InvalidRow(Exception):
    """A row cannot be used; the message says why, for a reader who has the row in front of them."""


def check_stage(dataset_attr: DatasetAttr, stage: str) -> None:
    """Checks that a dataset holds what a stage trains on.

    Raises:
        UserError: if it holds translations and the stage trains on dialogues.
    """
    if stage == "sft" and dataset_attr.formatting in TRANSLATIONS:
        raise UserError(
            f"dataset {dataset_attr.name}: formatting {dataset_attr.formatting} makes documents, which stage pt trains on; "
            "stage sft needs dialogues. Move it to the data of step 5, or leave it out."
        )


def holds_dialogues(dataset_attr: DatasetAttr) -> bool:
    """Whether a dataset in the mix of stage pt has answers: then its rows are dialogues, in the format of stage sft."""
    return dataset_attr.formatting == "sharegpt" or "response" in dataset_attr.columns


def check_columns(dataset_attr: DatasetAttr, stage: str, columns: Collection[str], complete: bool = False) -> None:
    """Checks that dataset_info.json names no column that does not exist; a single row may lack any.

    Args:
        columns: names of the columns that at least one of the rows so far has.
        complete: these are all rows. Then optional columns that are named must exist too, except for `tools`: datasets with
            and without tools may share an entry's form.

    Raises:
        UserError: names the configured column and those that exist.
    """
    if dataset_attr.formatting in TRANSLATIONS:
        _check_languages(dataset_attr, columns, complete)
        return
    if stage == "pt" and not holds_dialogues(dataset_attr):
        roles = ["prompt"]
    elif dataset_attr.formatting == "sharegpt":
        roles = ["messages"]
    else:
        roles = ["prompt", "response"]
    if complete and stage == "sft":
        roles += [role for role in ("query", "history", "system") if role in dataset_attr.columns]
    for role in roles:
        dataset_attr.resolve_column(role, columns)


def _check_languages(dataset_attr: DatasetAttr, columns: Collection[str], complete: bool) -> None:
    languages = dataset_attr.column_names["translations"]
    missing = [language for language in languages if language not in columns]
    if "translation" not in columns and len(languages) - len(missing) < (len(languages) if complete else 2):
        raise UserError(
            f"dataset {dataset_attr.name}: {dataset_attr.describe_locations()} has no column "
            f"{' or '.join(map(repr, missing))}; it has {', '.join(map(repr, columns))}. Rename it, or correct "
            "`translations` under `columns` in dataset_info.json."
        )


def convert_row(
    row: Row,
    dataset_attr: DatasetAttr,
    stage: str,
    default_system: str | None = None,
    calls_as_json: bool = False,
) -> list[Row]:
    """Sets `content`, `num_bytes` and `hash` of a row; the content of a blank document is empty.

    Returns:
        The row; of translations a row for each document made of it, none if it says the same in all languages.

    Raises:
        InvalidRow: if the row holds no document (`pt`) or dialogue (`sft`; `pt`, if the dataset has answers).
    """
    if stage == "pt" and dataset_attr.formatting in TRANSLATIONS:
        return _convert_translations(row, dataset_attr)
    if stage == "pt" and not holds_dialogues(dataset_attr):
        value, what = _require_column(dataset_attr, "prompt", row.values)
        encoded = _encode_utf8(value, what)
        row.set_content(encoded if value.strip() else b"")
    else:
        row.set_content(to_messages(dataset_attr, row.values, default_system, calls_as_json))
        encoded = _encode_json(row.content).encode()
    row.hash = text_hash(encoded)
    return [row]


def _convert_translations(row: Row, dataset_attr: DatasetAttr) -> list[Row]:
    values = by_language(row.values)
    texts = {
        language: _text(values[language], f"column {language!r}").strip()
        for language in dataset_attr.column_names["translations"]
        if not _is_blank(values.get(language))
    }
    if len(texts) < 2:
        known = ", ".join(dataset_attr.column_names["translations"])
        raise InvalidRow(f"has text in {' and '.join(texts) or 'none'} of {known}; two languages are the minimum")
    distinct = list(dict.fromkeys(texts.values()))
    if len(distinct) < 2:
        return []
    number = text_hash("\n".join(distinct).encode())
    if dataset_attr.formatting == "parallel":
        documents = {parallel_document(distinct, number): number}
    else:
        # A glossary is what is to be learned, not a sample by which to measure.
        glossary = glossary_documents(distinct, number)
        documents = {document: never_held_out(text_hash(document.encode())) for document in glossary}
    contents = [(document.encode(), document_hash) for document, document_hash in documents.items()]
    return [replace(row, content=content, num_bytes=len(content), hash=number) for content, number in contents]


def to_messages(
    dataset_attr: DatasetAttr, values: Values, default_system: str | None = None, calls_as_json: bool = False
) -> list[Message]:
    """The dialogue in a row: an optional system message, then questions or observations and answers in turn, an answer last.

    An answer that calls a tool has the tool's name under `metadata`. A row with tools gets ChatGLM3's system message for
    tools, after the row's own system message if it has one. `default_system` is used for rows without one.

    Args:
        calls_as_json: the system message has the tools as a list in JSON under `tools`, and the content of a call is its
            arguments in JSON, for templates that form them.

    Raises:
        InvalidRow: if the row does not hold such a dialogue.
    """
    if dataset_attr.formatting == "sharegpt":
        messages = _sharegpt(dataset_attr, values, calls_as_json)
    else:
        messages = _alpaca(dataset_attr, values)
    system = _optional_text(dataset_attr, "system", values)
    if messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    system = system if system.strip() else default_system or ""
    tools = _tools(dataset_attr, values)
    if tools and calls_as_json:
        messages = [{"role": "system", "content": system, "tools": tools}, *messages]
        system = ""
    elif tools:
        system = "\n".join([*([system] if system.strip() else []), TOOL_SYSTEM_PROMPT, tools])
    if system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    if len(messages) > MAX_MESSAGES:
        raise InvalidRow(f"holds {len(messages):,} messages; {MAX_MESSAGES:,} is the maximum")
    return messages


def _alpaca(dataset_attr: DatasetAttr, values: Values) -> list[Message]:
    query = _optional_text(dataset_attr, "query", values)
    if query.strip() and not _optional_text(dataset_attr, "prompt", values).strip():
        question = query
    else:
        question = _nonempty_text(*_require_column(dataset_attr, "prompt", values))
        question = f"{question}\n{query}" if query else question
    turns = [
        *_history(dataset_attr, values),
        (question, _nonempty_text(*_require_column(dataset_attr, "response", values))),
    ]
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _history(dataset_attr: DatasetAttr, values: Values) -> list[tuple[str, str]]:
    pairs, what = _find_column(dataset_attr, "history", values)
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InvalidRow(f"{what} is not a list of pairs [question, answer]")
    return [
        (_nonempty_text(question, f"question {n} of {what}"), _nonempty_text(answer, f"answer {n} of {what}"))
        for n, (question, answer) in enumerate(pairs, start=1)
    ]


def _sharegpt(dataset_attr: DatasetAttr, values: Values, calls_as_json: bool) -> list[Message]:
    listed, what = _require_column(dataset_attr, "messages", values)
    if not isinstance(listed, list):
        raise InvalidRow(f"{what} holds {_type_name(listed)}, not a list of messages")
    if not listed:
        raise InvalidRow("holds no message")
    tags = {**DEFAULT_TAGS, **dataset_attr.tags}
    roles = {tags[f"{role}_tag"]: role for role in ("user", "assistant", "observation", "function", "system")}
    messages: list[Message] = []
    for number, message in enumerate(listed, start=1):
        if not isinstance(message, dict):
            raise InvalidRow(f"message {number} holds {_type_name(message)}, not a role and a text")
        tag = message.get(tags["role_tag"])
        role = roles.get(tag) if isinstance(tag, str) else None
        if role is None:
            raise InvalidRow(f"message {number} has the unknown role {tag!r}")
        last = messages[-1]["role"] if messages else ""
        text = message.get(tags["content_tag"])
        if role == "system" and number > 1:
            raise InvalidRow(f"message {number} is from system, which may only speak first")
        if role == "system" and _is_blank(text):
            continue
        tool = {}
        if role == "function":
            role, tool["metadata"], text = "assistant", *_tool_call(text, f"message {number}", calls_as_json)
        if role == "assistant" and last not in ("user", "observation"):
            raise InvalidRow(f"message {number} is from assistant where the user should speak")
        if role in ("user", "observation") and last in ("user", "observation"):
            raise InvalidRow(f"message {number} is from {role} where the assistant should speak")
        messages.append({"role": role, **tool, "content": _nonempty_text(text, f"message {number}")})
    if not messages or messages[-1]["role"] != "assistant":
        raise InvalidRow("the last message is not the assistant's")
    return messages


def _tools(dataset_attr: DatasetAttr, values: Values) -> str:
    """The tools of a row, as ChatGLM3 lists them; empty if there are none."""
    value, what = _find_column(dataset_attr, "tools", values)
    if _is_blank(value):
        return ""
    tools = _parse_json(value, what)
    if not isinstance(tools, list):
        raise InvalidRow(f"{what} is not a list of tools")
    # OpenAI wraps each description: {"type": "function", "function": {...}}
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in tools]
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
            raise InvalidRow(f"tool {number} of {what} is not an object with a name")
    return _text(json.dumps(tools, ensure_ascii=False, indent=4), what) if tools else ""


def _tool_call(value: Any, what: str, as_json: bool) -> tuple[str, str]:
    """Converts a call `{"name": NAME, "arguments": {KEY: VALUE}}` to the name, and the arguments or ChatGLM3's Python."""
    call = _parse_json(value, what)
    if isinstance(call, list) and len(call) > 1:
        raise InvalidRow(f"{what} calls {len(call)} tools at once; one message calls one")
    call = call[0] if isinstance(call, list) and call else call
    name = call.get("name") if isinstance(call, dict) else None
    arguments = _parse_json(call.get("arguments") or {}, f"`arguments` of {what}") if isinstance(call, dict) else None
    if not isinstance(name, str) or len(name.split()) != 1 or not isinstance(arguments, dict):
        raise InvalidRow(f'{what} is not a call of the form {{"name": NAME, "arguments": {{KEY: VALUE}}}}')
    if as_json:
        return name.strip(), _encode_json(arguments)
    if all(key.isidentifier() and not keyword.iskeyword(key) for key in arguments):
        keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    else:
        keywords = f"**{arguments!r}"
    return name.strip(), f"```python\ntool_call({keywords})\n```"


def _parse_json(value: Any, what: str) -> Any:
    """Parses a value that is text; other values are returned as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"{what} is not valid JSON: {error}") from None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _find_column(dataset_attr: DatasetAttr, role: str, values: Values) -> tuple[Any, str]:
    """The value of a column and what to call it in messages; None if there is no such column."""
    for name in dataset_attr.column_names[role]:
        if name in values:
            return values[name], f"column {name!r}"
    return None, ""


def _require_column(dataset_attr: DatasetAttr, role: str, values: Values) -> tuple[Any, str]:
    value, what = _find_column(dataset_attr, role, values)
    if not what:
        raise InvalidRow(f"has no column {' or '.join(map(repr, dataset_attr.column_names[role]))}")
    return value, what


def _optional_text(dataset_attr: DatasetAttr, role: str, values: Values) -> str:
    value, what = _find_column(dataset_attr, role, values)
    return "" if value is None else _text(value, what)


def _nonempty_text(value: Any, what: str) -> str:
    if not _text(value, what).strip():
        raise InvalidRow(f"{what} is empty")
    return value


def _text(value: Any, what: str) -> str:
    _encode_utf8(value, what)
    return value


def _encode_utf8(value: Any, what: str) -> bytes:
    if not isinstance(value, str):
        raise InvalidRow(f"{what} holds {_type_name(value)}, not text")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InvalidRow(f"{what} holds half a character (a lone surrogate)") from None


def _type_name(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
