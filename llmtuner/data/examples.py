"""Rows -> token ids and labels in an Arrow file (tokens.py): made once, by one process, whatever the number of runs."""

import gc
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import psutil
import pyarrow
from filelock import FileLock
from tqdm import tqdm

from llmtuner.console import InputError, say, write_json
from llmtuner.data.messages import BadRow, check_columns, to_document, to_messages
from llmtuner.data.sources import Row, Source, file_kind, find_source, read_rows, text_hash
from llmtuner.data.template import Ids, Message, Template
from llmtuner.data.tokens import SCHEMA, Examples, TokenTable
from llmtuner.outputs import atomic_directory

if TYPE_CHECKING:
    from llmtuner.hparams import DataArguments

BATCH_BYTES = 1 << 22  # text handed to the tokenizer at once, enough for all threads; one document may be longer
BATCH_ROWS = 1_000
ROWS_THAT_SHOW_COLUMNS = 1_000  # if none of them has a column that every row needs, its name is wrong
AS_JSON = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each row
FORMAT = 3  # counted up when what is stored changes


def load_examples(name: str, stage: str, tokenizer: Any, data_args: "DataArguments") -> Examples:
    """Tokenized examples of one data set, memory-mapped from disk; made first where they are not there yet.

    Any number of processes may call it at once: one tokenizes, the others wait as long as that takes.

    Args:
        name: a data set in dataset_info.json.
        stage: `pt` (documents) or `sft` (dialogues).

    Raises:
        InputError: if the data set cannot be found or read, has too many unusable rows or no usable one, or was kept
            under `tokenized_path` by another tokenizer or other settings.
    """
    settings = _settings(name, stage, tokenizer, data_args)
    plain = re.sub(r"[^\w.-]", "_", f"{name}-{stage}")  # safe for any file system
    source = None
    if data_args.tokenized_path:
        directory = Path(data_args.tokenized_path) / plain
    else:
        source = _find(name, data_args)
        content = json.dumps([settings, source.fingerprint()], sort_keys=True)
        directory = Path(data_args.cache_dir) / f"{plain}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not _is_made(directory, data_args.overwrite_cache):
        with _locked(directory):
            if not _is_made(directory, data_args.overwrite_cache):
                _make(directory, source or _find(name, data_args), stage, tokenizer, data_args, settings)
    examples = _open(name, directory, settings)
    if unusable := _check(name, directory, examples.counts, data_args.max_rejected):
        say(unusable)
    return examples


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time into a directory; the lock of a process that died is free."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{directory}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"cannot write to {directory.parent} ({error.strerror or error}). Set cache_dir or tokenized_path to a "
            "directory that you may write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _find(name: str, data_args: "DataArguments") -> Source:
    dataset_dir = Path(data_args.dataset_dir)
    return find_source(name, dataset_dir / "dataset_info.json", Path(data_args.corpus_dir or dataset_dir))


def _settings(name: str, stage: str, tokenizer: Any, data_args: "DataArguments") -> dict[str, Any]:
    """Everything but the rows that the stored ids and labels depend on."""
    settings: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "stage": stage,
        "max_samples": data_args.max_samples,
    }
    if stage == "sft":
        for setting in ("template", "mask_history", "train_on_prompt"):
            settings[setting] = getattr(data_args, setting)
        if data_args.default_system:  # left out where it is not set: what was tokenized before it existed stays valid
            settings["default_system"] = data_args.default_system
    return settings | {"tokenizer": _fingerprint(tokenizer)}


def _fingerprint(tokenizer: Any) -> str:
    """Changes when a tokenizer would give other ids.

    sentencepiece's model is at hand in bytes, where it encodes: the fast tokenizer takes ten times as long to describe.
    """
    backend, processor = tokenizer.backend_tokenizer, getattr(tokenizer, "sentencepiece", None)
    if processor:
        special = Template.of(tokenizer), backend.get_added_tokens_decoder()
        content = processor.serialized_model_proto() + repr(special).encode()
    else:
        content = backend.to_str().encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _is_made(directory: Path, overwrite: bool) -> bool:
    """Whether a data set is there. One that shall be overwritten is, once it is younger than this process.

    All processes of a run start before any of them tokenizes, so what one has made is not made again by the next.
    """
    try:
        made = (directory / "about.json").stat().st_mtime
    except OSError:  # it may go between any two lines, while another process makes it again
        return False
    return not overwrite or made >= psutil.Process().create_time()


def _open(name: str, directory: Path, settings: dict[str, Any]) -> Examples:
    try:
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        table = TokenTable(directory / "examples.arrow")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"data set {name}: {directory} is damaged ({error}). Delete it and start again.") from error
    changed = [
        f"{key} was {about['settings'].get(key)}, now {settings.get(key)}"
        for key in settings | about["settings"]
        if about["settings"].get(key) != settings.get(key)
    ]
    if changed:
        raise InputError(
            f"data set {name}: {directory} was made with other settings ({'; '.join(changed)}). Set overwrite_cache: true "
            "to make it again, or name another tokenized_path."
        )
    for note in about.get("notes", []):
        say(f"{name}: {note}")
    return Examples(name, table, tuple(about["places"]), about["counts"], directory)


def _check(name: str, directory: Path, counts: dict[str, int], max_rejected: float) -> str:
    """One line on how many rows cannot be used; empty if all can.

    Raises:
        InputError: if there are more than `max_rejected`, a share of those that `keep_rows` let through, or if none is kept.
    """
    rejected, of = counts["rejected"], counts["read"] - counts["filtered"]
    with (directory / "rejected.jsonl").open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in itertools.islice(lines, 3)]
    reasons = [f"{entry['file']}, line {entry['line']}: {entry['reason']}" for entry in entries]
    if rejected > max_rejected * of:
        raise InputError(
            f"data set {name}: {rejected:,} of {of:,} rows ({rejected / of:.2%}) cannot be used, more than max_rejected "
            f"({max_rejected:.2%}) allows:\n  " + "\n  ".join(reasons) + "\nMend them, or raise max_rejected."
        )
    if not counts["kept"]:
        raise InputError(
            f"data set {name}: no row is left of {counts['read']:,}: {counts['filtered']:,} filtered away by keep_rows, "
            f"{rejected:,} unusable, {counts['empty']:,} empty. Put text into it, or leave it out of the mix."
        )
    return (
        f"{name}: {of:,} rows, {rejected:,} of them unusable ({rejected / of:.2%}), first: {reasons[0]}"
        if rejected
        else ""
    )


# ---------------------------------------------------------------------------------------------------------- tokenizing
class Usable(NamedTuple):
    """A row that can be trained on."""

    content: bytes | list[Message]
    """A document in UTF-8, or a dialogue."""
    size: int
    hash: int
    file: int
    line: int


def _make(
    directory: Path, source: Source, stage: str, tokenizer: Any, data_args: "DataArguments", settings: dict[str, Any]
) -> None:
    """Tokenizes a data set into `directory`, which appears whole or not at all."""
    template = Template.of(tokenizer)
    threads = data_args.preprocessing_num_workers
    counts: Counter[str] = Counter(
        dict.fromkeys(["read", "filtered", "rejected", "empty", "kept", "tokens", "bytes"], 0)
    )

    columns: dict[str, None] = {}

    def encode(contents: list[Any]) -> list[tuple[Ids, Ids]]:
        if stage == "pt":
            return [(ids, ids[:0]) for ids in template.documents(tokenizer, contents, threads)]
        return template.dialogues(
            tokenizer, contents, data_args.mask_history, data_args.train_on_prompt, threads=threads
        )

    with atomic_directory(directory, replace=True) as partial, _old_objects_left_alone():
        with (partial / "rejected.jsonl").open("w", encoding="utf-8") as rejected:

            def reject(row: Row, reason: str) -> None:
                counts["rejected"] += 1
                entry = {"data_set": source.name, "file": source.places()[row.file], "line": row.line, "reason": reason}
                rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")

            limit = min(data_args.max_samples or sys.maxsize, source.num_samples or sys.maxsize)
            rows = itertools.islice(_filtered(source, counts), limit)
            usable = _usable(rows, source, stage, counts, reject, columns, data_args.default_system)
            with (
                pyarrow.OSFile(str(partial / "examples.arrow"), "wb") as file,
                pyarrow.ipc.new_file(file, SCHEMA) as writer,
            ):
                shown = tqdm(usable, f"tokenize {source.name}", unit=" rows", mininterval=0.5)
                for batch, encoded in _one_ahead(encode, _batches(shown)):
                    record_batch = _record_batch(batch, encoded)
                    counts["kept"] += len(batch)
                    counts["bytes"] += sum(row.size for row in batch)
                    counts["tokens"] += len(record_batch["input_ids"].values)
                    writer.write_batch(record_batch)
        if columns:
            check_columns(source, stage, columns, complete=counts["read"] - counts["filtered"] < limit)
        _check(source.name, partial, counts, data_args.max_rejected)
        notes = []
        if stage == "sft" and (tools := source.names("tools")) and not columns.keys() & {*tools}:
            notes.append(f"no row has a column {' or '.join(map(repr, tools))}: no tools are trained")
        table = TokenTable(partial / "examples.arrow")
        hashes = table.column("hash")
        counts["duplicates"] = len(hashes) - len(numpy.unique(hashes))
        if texts := [number for number, file in enumerate(source.files) if file_kind(file) == ".txt"]:
            count = numpy.isin(table.column("file"), texts).sum()
            notes.append(f"{source.sample_note()}: {count:,} documents from {len(texts):,} files")
        about = {"settings": settings, "places": source.places(), "counts": counts, "notes": notes}
        write_json(partial / "about.json", about)


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Python's collector looks at what is made from here on, not at the libraries' half a million objects again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _filtered(source: Source, counts: Counter[str]) -> Iterator[Row]:
    for row in read_rows(source):
        counts["read"] += 1
        if row.problem or source.keeps(row.values):
            yield row
        else:
            counts["filtered"] += 1


def _usable(
    rows: Iterable[Row],
    source: Source,
    stage: str,
    counts: Counter[str],
    reject: Callable[[Row, str], None],
    columns: dict[str, None],
    default_system: str | None,
) -> Iterator[Usable]:
    """Rows that can be trained on; fills `columns` with the names that the rows have."""
    number = 0
    for row in rows:
        if row.problem:
            reject(row, row.problem)
            continue
        if row.values.keys() - columns.keys():
            columns |= dict.fromkeys(row.values)
        number += 1
        if number == ROWS_THAT_SHOW_COLUMNS:
            check_columns(source, stage, columns)
        try:
            if stage == "pt":
                data = to_document(source, row.values)
                if not data:
                    counts["empty"] += 1
                    continue
                yield Usable(data, len(data), text_hash(data), row.file, row.line)
            else:
                messages = to_messages(source, row.values, default_system)
                size = sum(len(message["content"].encode()) for message in messages)
                data = AS_JSON(messages).encode()
                yield Usable(messages, size, text_hash(data), row.file, row.line)
        except BadRow as error:
            reject(row, str(error))


def _batches(rows: Iterable[Usable]) -> Iterator[list[Usable]]:
    batch: list[Usable] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size
        if size >= BATCH_BYTES or len(batch) == BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _one_ahead(
    encode: Callable[[list[Any]], list[tuple[Ids, Ids]]], batches: Iterable[list[Usable]]
) -> Iterator[tuple[list[Usable], list[tuple[Ids, Ids]]]]:
    """Encodes each batch while the next one is read and the last one written: sentencepiece lets Python go on meanwhile."""
    with ThreadPoolExecutor(1) as encoder:
        before: tuple[list[Usable], Future] | None = None
        for batch in batches:
            now = batch, encoder.submit(encode, [row.content for row in batch])
            if before:
                yield before[0], before[1].result()
            before = now
        if before:
            yield before[0], before[1].result()


def _record_batch(rows: list[Usable], encoded: list[tuple[Ids, Ids]]) -> pyarrow.RecordBatch:
    columns = [_lists([ids for ids, _ in encoded]), _lists([labels for _, labels in encoded])]
    numbers = zip(*(row[1:] for row in rows), strict=True)
    columns += [pyarrow.array(values, kind) for values, kind in zip(numbers, SCHEMA.types[2:], strict=True)]
    return pyarrow.record_batch(columns, schema=SCHEMA)


def _lists(rows: list[Ids]) -> pyarrow.ListArray:
    offsets = numpy.cumsum([0, *map(len, rows)], dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(offsets, numpy.concatenate(rows))
