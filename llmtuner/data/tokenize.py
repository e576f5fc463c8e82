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

from llmtuner.console import UserError, print0
from llmtuner.data.converter import InvalidRow, check_columns, to_document, to_messages
from llmtuner.data.sources import DatasetAttr, Row, file_type, get_dataset_attr, read_rows, text_hash
from llmtuner.data.template import Ids, Message, Template
from llmtuner.data.token_store import SCHEMA, TokenizedDataset, TokenStore
from llmtuner.files import atomic_write_json
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.fast import PROCESSORS

if TYPE_CHECKING:
    from llmtuner.hparams import DataArguments

MAX_BATCH_BYTES = 1 << 22  # text handed to the tokenizer at once, enough for all threads; one document may be longer
MAX_BATCH_ROWS = 1_000
COLUMN_CHECK_ROWS = 1_000  # if none of them has a column that every row needs, its name is wrong
encode_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each row
CACHE_VERSION = 3  # counted up when what is stored changes


def load_tokenized_dataset(name: str, stage: str, tokenizer: Any, data_args: "DataArguments") -> TokenizedDataset:
    """Tokenized examples of one data set, memory-mapped from disk; made first where they are not there yet.

    Any number of processes may call it at once: one tokenizes, the others wait as long as that takes.

    Args:
        name: a data set in dataset_info.json.
        stage: `pt` (documents) or `sft` (dialogues).

    Raises:
        UserError: if the data set cannot be found or read, has too many unusable rows or no usable one, or was kept
            under `tokenized_path` by another tokenizer or other settings.
    """
    settings = _cache_settings(name, stage, tokenizer, data_args)
    plain = re.sub(r"[^\w.-]", "_", f"{name}-{stage}")  # safe for any file system
    source = None
    if data_args.tokenized_path:
        directory = Path(data_args.tokenized_path) / plain
    else:
        source = _find_dataset(name, data_args)
        content = json.dumps([settings, source.fingerprint()], sort_keys=True)
        directory = Path(data_args.cache_dir) / f"{plain}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not _is_cached(directory, data_args.overwrite_cache):
        with _lock(directory):
            if not _is_cached(directory, data_args.overwrite_cache):
                _tokenize_dataset(
                    directory, source or _find_dataset(name, data_args), stage, tokenizer, data_args, settings
                )
    examples = _open_cached(name, directory, settings)
    if message := _check_invalid_ratio(name, directory, examples.counts, data_args.max_invalid_ratio):
        print0(message)
    return examples


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Lets one process at a time into a directory; the lock of a process that died is free."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{directory}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write to {directory.parent} ({error.strerror or error}). Set cache_dir or tokenized_path to a "
            "directory that you may write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _find_dataset(name: str, data_args: "DataArguments") -> DatasetAttr:
    dataset_dir = Path(data_args.dataset_dir)
    return get_dataset_attr(name, dataset_dir / "dataset_info.json", Path(data_args.corpus_dir or dataset_dir))


def _cache_settings(name: str, stage: str, tokenizer: Any, data_args: "DataArguments") -> dict[str, Any]:
    """Everything but the rows that the stored ids and labels depend on."""
    settings: dict[str, Any] = {
        "cache_version": CACHE_VERSION,
        "name": name,
        "stage": stage,
        "max_samples": data_args.max_samples,
    }
    if stage == "sft":
        for setting in ("template", "mask_history", "train_on_prompt"):
            settings[setting] = getattr(data_args, setting)
        if data_args.default_system:  # left out where it is not set: what was tokenized before it existed stays valid
            settings["default_system"] = data_args.default_system
    return settings | {"tokenizer": _tokenizer_fingerprint(tokenizer)}


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes when a tokenizer would give other ids.

    sentencepiece's model is at hand in bytes, where it encodes: the fast tokenizer takes ten times as long to describe.
    """
    backend, processor = tokenizer.backend_tokenizer, PROCESSORS.get(tokenizer)
    if processor:
        special = Template.from_tokenizer(tokenizer), backend.get_added_tokens_decoder()
        content = processor.serialized_model_proto() + repr(special).encode()
    else:
        content = backend.to_str().encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _is_cached(directory: Path, overwrite: bool) -> bool:
    """Whether a data set is there. One that shall be overwritten is, once it is younger than this process.

    All processes of a run start before any of them tokenizes, so what one has made is not made again by the next.
    """
    try:
        made = (directory / "metadata.json").stat().st_mtime
    except OSError:  # it may go between any two lines, while another process makes it again
        return False
    return not overwrite or made >= psutil.Process().create_time()


def _open_cached(name: str, directory: Path, settings: dict[str, Any]) -> TokenizedDataset:
    try:
        metadata = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))
        table = TokenStore(directory / "tokens.arrow")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"data set {name}: {directory} is damaged ({error}). Delete it and start again.") from error
    changed = [
        f"{key} was {metadata['settings'].get(key)}, now {settings.get(key)}"
        for key in settings | metadata["settings"]
        if metadata["settings"].get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"data set {name}: {directory} was made with other settings ({'; '.join(changed)}). Set overwrite_cache: true "
            "to make it again, or name another tokenized_path."
        )
    for note in metadata.get("notes", []):
        print0(f"{name}: {note}")
    return TokenizedDataset(name, table, tuple(metadata["locations"]), metadata["counts"], directory)


def _check_invalid_ratio(name: str, directory: Path, counts: dict[str, int], max_invalid_ratio: float) -> str:
    """One line on how many rows cannot be used; empty if all can.

    Raises:
        UserError: if there are more than `max_invalid_ratio`, a share of those that `row_filter` let through, or if none is kept.
    """
    num_invalid, of = counts["invalid"], counts["read"] - counts["filtered"]
    with (directory / "invalid_rows.jsonl").open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in itertools.islice(lines, 3)]
    reasons = [f"{entry['file']}, line {entry['line']}: {entry['reason']}" for entry in entries]
    if num_invalid > max_invalid_ratio * of:
        raise UserError(
            f"data set {name}: {num_invalid:,} of {of:,} rows ({num_invalid / of:.2%}) cannot be used, more than max_invalid_ratio "
            f"({max_invalid_ratio:.2%}) allows:\n  " + "\n  ".join(reasons) + "\nMend them, or raise max_invalid_ratio."
        )
    if not counts["kept"]:
        raise UserError(
            f"data set {name}: no row is left of {counts['read']:,}: {counts['filtered']:,} filtered away by row_filter, "
            f"{num_invalid:,} unusable, {counts['empty']:,} empty. Put text into it, or leave it out of the mix."
        )
    return (
        f"{name}: {of:,} rows, {num_invalid:,} of them unusable ({num_invalid / of:.2%}), first: {reasons[0]}"
        if num_invalid
        else ""
    )


# ---------------------------------------------------------------------------------------------------------- tokenizing
class ValidRow(NamedTuple):
    """A row that can be trained on."""

    content: bytes | list[Message]
    """A document in UTF-8, or a dialogue."""
    size: int
    hash: int
    file: int
    line: int


def _tokenize_dataset(
    directory: Path,
    source: DatasetAttr,
    stage: str,
    tokenizer: Any,
    data_args: "DataArguments",
    settings: dict[str, Any],
) -> None:
    """Tokenizes a data set into `directory`, which appears whole or not at all."""
    template = Template.from_tokenizer(tokenizer)
    threads = data_args.preprocessing_num_workers
    counts: Counter[str] = Counter(
        dict.fromkeys(["read", "filtered", "invalid", "empty", "kept", "tokens", "bytes"], 0)
    )

    columns: dict[str, None] = {}

    def encode(contents: list[Any]) -> list[tuple[Ids, Ids]]:
        if stage == "pt":
            return [(ids, ids[:0]) for ids in template.encode_documents(tokenizer, contents, threads)]
        return template.encode_dialogues(
            tokenizer, contents, data_args.mask_history, data_args.train_on_prompt, threads=threads
        )

    with atomic_directory(directory, replace=True) as partial, _gc_frozen():
        with (partial / "invalid_rows.jsonl").open("w", encoding="utf-8") as rejected:

            def reject(row: Row, reason: str) -> None:
                counts["invalid"] += 1
                entry = {
                    "data_set": source.name,
                    "file": source.locations()[row.file],
                    "line": row.line,
                    "reason": reason,
                }
                rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")

            limit = min(data_args.max_samples or sys.maxsize, source.num_samples or sys.maxsize)
            rows = itertools.islice(_filter_rows(source, counts), limit)
            usable = _valid_rows(rows, source, stage, counts, reject, columns, data_args.default_system)
            with (
                pyarrow.OSFile(str(partial / "tokens.arrow"), "wb") as file,
                pyarrow.ipc.new_file(file, SCHEMA) as writer,
            ):
                shown = tqdm(usable, f"tokenize {source.name}", unit=" rows", mininterval=0.5)
                for batch, encoded in _prefetch_encode(encode, _batches(shown)):
                    record_batch = _record_batch(batch, encoded)
                    counts["kept"] += len(batch)
                    counts["bytes"] += sum(row.size for row in batch)
                    counts["tokens"] += len(record_batch["input_ids"].values)
                    writer.write_batch(record_batch)
        if columns:
            check_columns(source, stage, columns, complete=counts["read"] - counts["filtered"] < limit)
        _check_invalid_ratio(source.name, partial, counts, data_args.max_invalid_ratio)
        notes = []
        if stage == "sft" and (tools := source.column_names("tools")) and not columns.keys() & {*tools}:
            notes.append(f"no row has a column {' or '.join(map(repr, tools))}: no tools are trained")
        table = TokenStore(partial / "tokens.arrow")
        hashes = table.column("hash")
        counts["duplicates"] = len(hashes) - len(numpy.unique(hashes))
        if texts := [number for number, file in enumerate(source.files) if file_type(file) == ".txt"]:
            count = numpy.isin(table.column("file"), texts).sum()
            notes.append(f"{source.describe_sample_by()}: {count:,} documents from {len(texts):,} files")
        metadata = {"settings": settings, "locations": source.locations(), "counts": counts, "notes": notes}
        atomic_write_json(partial / "metadata.json", metadata)


@contextmanager
def _gc_frozen() -> Iterator[None]:
    """Python's collector looks at what is made from here on, not at the libraries' half a million objects again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _filter_rows(source: DatasetAttr, counts: Counter[str]) -> Iterator[Row]:
    for row in read_rows(source):
        counts["read"] += 1
        if row.error or source.matches_filter(row.values):
            yield row
        else:
            counts["filtered"] += 1


def _valid_rows(
    rows: Iterable[Row],
    source: DatasetAttr,
    stage: str,
    counts: Counter[str],
    reject: Callable[[Row, str], None],
    columns: dict[str, None],
    default_system: str | None,
) -> Iterator[ValidRow]:
    """Rows that can be trained on; fills `columns` with the names that the rows have."""
    number = 0
    for row in rows:
        if row.error:
            reject(row, row.error)
            continue
        if row.values.keys() - columns.keys():
            columns |= dict.fromkeys(row.values)
        number += 1
        if number == COLUMN_CHECK_ROWS:
            check_columns(source, stage, columns)
        try:
            if stage == "pt":
                data = to_document(source, row.values)
                if not data:
                    counts["empty"] += 1
                    continue
                yield ValidRow(data, len(data), text_hash(data), row.file, row.line)
            else:
                messages = to_messages(source, row.values, default_system)
                size = sum(len(message["content"].encode()) for message in messages)
                data = encode_json(messages).encode()
                yield ValidRow(messages, size, text_hash(data), row.file, row.line)
        except InvalidRow as error:
            reject(row, str(error))


def _batches(rows: Iterable[ValidRow]) -> Iterator[list[ValidRow]]:
    batch: list[ValidRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size
        if size >= MAX_BATCH_BYTES or len(batch) == MAX_BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prefetch_encode(
    encode: Callable[[list[Any]], list[tuple[Ids, Ids]]], batches: Iterable[list[ValidRow]]
) -> Iterator[tuple[list[ValidRow], list[tuple[Ids, Ids]]]]:
    """Encodes each batch while the next one is read and the last one written: sentencepiece lets Python go on meanwhile."""
    with ThreadPoolExecutor(1) as encoder:
        before: tuple[list[ValidRow], Future] | None = None
        for batch in batches:
            now = batch, encoder.submit(encode, [row.content for row in batch])
            if before:
                yield before[0], before[1].result()
            before = now
        if before:
            yield before[0], before[1].result()


def _record_batch(rows: list[ValidRow], encoded: list[tuple[Ids, Ids]]) -> pyarrow.RecordBatch:
    columns = [_list_array([ids for ids, _ in encoded]), _list_array([labels for _, labels in encoded])]
    numbers = zip(*(row[1:] for row in rows), strict=True)
    columns += [pyarrow.array(values, kind) for values, kind in zip(numbers, SCHEMA.types[2:], strict=True)]
    return pyarrow.record_batch(columns, schema=SCHEMA)


def _list_array(rows: list[Ids]) -> pyarrow.ListArray:
    offsets = numpy.cumsum([0, *map(len, rows)], dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(offsets, numpy.concatenate(rows))
