"""Rows -> token ids and labels, tokenized once and kept on disk under a fingerprint of data, tokenizer and settings."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset

from llmtuner.console import InputError, progress, say, whole_directory
from llmtuner.data.sources import Source, is_held_out, read_rows, read_texts
from llmtuner.data.template import Message, Template

BATCH = 1_000  # rows handed to the tokenizer at once
FORMAT = 1  # counted up when what is stored changes
SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("held_out", pyarrow.bool_()),
    ]
)
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}


def load_examples(
    source: Source, stage: str, tokenizer: Any, cache_dir: Path, val_size: float, max_samples: int | None = None
) -> Dataset:
    """Tokenized examples of one data set, memory-mapped from disk.

    Returns:
        rows of `input_ids`, `labels` (-100 where not trained; empty for documents, whose labels are their ids) and
        `held_out` (whether the row belongs to the validation share, decided by a hash of its text).
    """
    settings = [FORMAT, stage, val_size, max_samples, source.fingerprint(), _tokenizer_fingerprint(tokenizer)]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    directory = cache_dir / f"{source.name}-{stage}-{fingerprint}"
    if not directory.is_dir():
        encode = _encode_documents if stage == "pt" else _encode_dialogues
        with whole_directory(directory) as partial:
            _write(partial / "examples.arrow", encode(source, tokenizer, val_size, max_samples))
    return Dataset.from_file(str(directory / "examples.arrow"))


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _write(path: Path, batches: Iterator[list[tuple[list[int], list[int], bool]]]) -> None:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batches:
            columns = [[row[place] for row in batch] for place in range(len(SCHEMA))]
            writer.write_batch(pyarrow.record_batch(columns, schema=SCHEMA))


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    stream = iter(items)
    while batch := list(itertools.islice(stream, BATCH)):
        yield batch


def _encode_documents(
    source: Source, tokenizer: Any, val_size: float, max_samples: int | None
) -> Iterator[list[tuple[list[int], list[int], bool]]]:
    template = Template.of(tokenizer)
    texts = itertools.islice(read_texts(source), max_samples)
    for batch in _batched(progress(texts, f"tokenize {source.name}", unit=" documents")):
        encoded = template.documents(tokenizer, batch)
        yield [(ids, [], is_held_out(text, val_size)) for text, ids in zip(batch, encoded, strict=True)]


def _encode_dialogues(
    source: Source, tokenizer: Any, val_size: float, max_samples: int | None
) -> Iterator[list[tuple[list[int], list[int], bool]]]:
    template = Template.of(tokenizer)
    to_messages = message_reader(source)
    rows = itertools.islice(read_rows(source), max_samples)
    rejected = 0
    for batch in _batched(progress(rows, f"tokenize {source.name}", unit=" dialogues")):
        read = [to_messages(row) for row in batch]
        dialogues = [messages for messages in read if messages]
        rejected += len(read) - len(dialogues)
        encoded = template.dialogues(tokenizer, dialogues)
        yield [
            (ids, labels, is_held_out(json.dumps(messages, ensure_ascii=False), val_size))
            for messages, (ids, labels) in zip(dialogues, encoded, strict=True)
        ]
    if rejected:
        say(f"{source.name}: {rejected:,} rows without a question or an answer left out")


def message_reader(source: Source) -> Callable[[dict[str, Any]], list[Message]]:
    """How rows of this data set become messages; an unusable row becomes an empty list."""
    if source.formatting == "alpaca":
        return lambda row: _alpaca_messages(source, row)
    if source.formatting == "sharegpt":
        return lambda row: _sharegpt_messages(source, row)
    raise InputError(f"data set {source.name}: formatting {source.formatting!r} is unknown; use alpaca or sharegpt.")


def _alpaca_messages(source: Source, row: dict[str, Any]) -> list[Message]:
    prompt = row[source.column("prompt", row)]
    response = row[source.column("response", row)]
    query = row.get(source.columns.get("query", "")) or ""
    if not (_is_text(prompt) and _is_text(response)):
        return []
    question = f"{prompt}\n{query}" if query else prompt
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def _sharegpt_messages(source: Source, row: dict[str, Any]) -> list[Message]:
    tags = {**SHAREGPT_TAGS, **source.tags}
    roles = {tags["user_tag"]: "user", tags["assistant_tag"]: "assistant", tags["system_tag"]: "system"}
    messages: list[Message] = []
    for message in row[source.column("messages", row)] or []:
        role, content = roles.get(message.get(tags["role_tag"])), message.get(tags["content_tag"])
        if role is None or not _is_text(content):
            return []
        messages.append({"role": role, "content": content})
    turns = [message["role"] for message in messages if message["role"] != "system"]
    alternating = turns == ["user", "assistant"] * (len(turns) // 2)
    return messages if turns and alternating else []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
