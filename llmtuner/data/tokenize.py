"""Tokenizes a dataset into a TokenStore on disk: once, by one process, however many processes and runs use it."""

import gc
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy
import psutil
from filelock import FileLock
from tqdm import tqdm

from llmtuner.aliases import TOKENS_FILE
from llmtuner.console import UserError, print0
from llmtuner.data.bridges import CodeSwitcher
from llmtuner.data.chat_template import ChatTemplate, get_template
from llmtuner.data.converter import InvalidRow, check_columns, check_stage, convert_row, holds_dialogues
from llmtuner.data.readers import Row, read_rows
from llmtuner.data.sources import DatasetAttr, file_type, get_dataset_attr
from llmtuner.data.template import Ids, Template
from llmtuner.data.token_store import TokenizedDataset, TokenStore, TokenStoreWriter
from llmtuner.files import atomic_write_json
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.encoding import PROCESSORS

if TYPE_CHECKING:
    from llmtuner.hparams import DataArguments

MAX_BATCH_BYTES = 1 << 22  # text that is tokenized at once, enough for all threads; one document may be longer
MAX_BATCH_ROWS = 1_000
COLUMN_CHECK_ROWS = 1_000  # if none of them has a column that every row needs, its name is wrong
CACHE_VERSION = 4  # incremented when what is stored changes
METADATA_FILE, INVALID_ROWS_FILE = "metadata.json", "invalid_rows.jsonl"
Encoded = tuple[list[Ids], list[Ids]]  # ids of each document or dialogue, and labels of each dialogue


def load_tokenized_dataset(name: str, stage: str, tokenizer: Any, data_args: "DataArguments") -> TokenizedDataset:
    """Loads a tokenized dataset, memory-mapped from disk; tokenizes it first if it is not cached.

    Any number of processes may call this at once: one tokenizes, the others wait.

    Args:
        name: a dataset in dataset_info.json.
        stage: `pt` (documents) or `sft` (dialogues).

    Raises:
        UserError: if the dataset cannot be found or read, has too many invalid rows or no valid one, or was tokenized into
            `tokenized_path` by another version or tokenizer, or with other settings.
    """
    settings = _cache_settings(name, stage, tokenizer, data_args)
    safe_name = re.sub(r"[^\w.-]", "_", f"{name}-{stage}")  # for any file system
    dataset_attr = None
    if data_args.tokenized_path:
        directory = Path(data_args.tokenized_path) / safe_name
    else:
        dataset_attr = _find_dataset(name, stage, data_args)
        of_dialogues = stage == "pt" and holds_dialogues(dataset_attr)
        parts = [
            settings,
            dataset_attr.fingerprint(),
            *([_dialogue_settings(tokenizer, data_args)] if of_dialogues else []),
        ]
        content = json.dumps(parts, sort_keys=True)
        directory = Path(data_args.cache_dir) / f"{safe_name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not _is_cached(name, directory, data_args.overwrite_cache):
        with _lock(directory):
            if not _is_cached(name, directory, data_args.overwrite_cache):
                dataset_attr = dataset_attr or _find_dataset(name, stage, data_args)
                _tokenize_dataset(directory, dataset_attr, stage, tokenizer, data_args, settings)
    dataset, notes = _open_cached(name, directory, settings)
    for note in [*notes, *_check_invalid_ratio(dataset, data_args.max_invalid_ratio)]:
        print0(f"{name}: {note}")
    return dataset


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Admits one process at a time to a directory; the lock of a process that died is free."""
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


def _find_dataset(name: str, stage: str, data_args: "DataArguments") -> DatasetAttr:
    dataset_dir = Path(data_args.dataset_dir)
    info, corpus_dir = dataset_dir / "dataset_info.json", Path(data_args.corpus_dir or dataset_dir)
    dataset_attr = get_dataset_attr(name, info, corpus_dir)
    check_stage(dataset_attr, stage)
    return dataset_attr


def _cache_settings(name: str, stage: str, tokenizer: Any, data_args: "DataArguments") -> dict[str, Any]:
    """Everything except the rows that the stored ids and labels depend on."""
    settings = {
        "cache_version": CACHE_VERSION,
        "name": name,
        "stage": stage,
        "max_samples": data_args.max_samples,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
    }
    template = _get_template(tokenizer, data_args)
    if stage == "sft":
        settings |= _dialogue_settings(tokenizer, data_args)
    elif isinstance(template, ChatTemplate):
        settings["document_tokens"] = [*template.prefix, template.document_end]
    return settings


def _dialogue_settings(tokenizer: Any, data_args: "DataArguments") -> dict[str, Any]:
    names = ("mask_history", "train_on_prompt", "default_system")
    fingerprint = _get_template(tokenizer, data_args).fingerprint
    return {"template": fingerprint, **{setting: getattr(data_args, setting) for setting in names}}


def _get_template(tokenizer: Any, data_args: "DataArguments") -> Template | ChatTemplate:
    return get_template(tokenizer, data_args.template, data_args.document_end_token)


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes if a tokenizer would give other ids.

    A tokenizer that encodes by sentencepiece has its model at hand in bytes; to serialize the fast tokenizer takes ten
    times as long.
    """
    backend, processor = tokenizer.backend_tokenizer, PROCESSORS.get(tokenizer)
    if processor:
        special = Template.from_tokenizer(tokenizer), backend.get_added_tokens_decoder()
        content = processor.serialized_model_proto() + repr(special).encode()
    else:
        content = backend.to_str().encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _is_cached(name: str, directory: Path, overwrite: bool) -> bool:
    """Whether a dataset is there. With `overwrite`, it must be younger than this process.

    All processes of a run start before any of them tokenizes, so what one has tokenized is not tokenized by the next.
    """
    try:
        modified = (directory / METADATA_FILE).stat().st_mtime
    except OSError:  # it may disappear at any time, while another process tokenizes again
        if not overwrite and (directory / TOKENS_FILE).exists():
            raise UserError(
                f"dataset {name}: {directory} was made by an earlier version, whose format is no longer read. Set "
                "overwrite_cache: true to tokenize it again, or name another tokenized_path."
            ) from None
        return False
    return not overwrite or modified >= psutil.Process().create_time()


def _open_cached(name: str, directory: Path, settings: dict[str, Any]) -> tuple[TokenizedDataset, list[str]]:
    """Opens a tokenized dataset; returns it, and notes for the user."""
    try:
        metadata = json.loads((directory / METADATA_FILE).read_text(encoding="utf-8"))
        store = TokenStore(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"dataset {name}: {directory} is damaged ({error}). Delete it and start again.") from error
    changed = [
        f"{key} was {metadata['settings'].get(key)}, now {settings.get(key)}"
        for key in settings | metadata["settings"]
        if metadata["settings"].get(key) != settings.get(key)
    ]
    if changed:
        raise UserError(
            f"dataset {name}: {directory} was made with other settings ({'; '.join(changed)}). Set overwrite_cache: true "
            "to tokenize it again, or name another tokenized_path."
        )
    dataset = TokenizedDataset(name, store, tuple(metadata["locations"]), metadata["counts"], directory)
    return dataset, metadata["notes"]


def _check_invalid_ratio(dataset: TokenizedDataset, max_invalid_ratio: float) -> list[str]:
    """Describes how many rows are invalid, in one line; none if all are valid.

    Raises:
        UserError: if more than `max_invalid_ratio` of the rows that pass the `row_filter` are invalid, or if none is kept.
    """
    counts = dataset.counts
    num_invalid, num_rows = counts["invalid"], counts["read"] - counts["filtered"]
    ratio = num_invalid / max(num_rows, 1)
    with (dataset.directory / INVALID_ROWS_FILE).open(encoding="utf-8") as lines:
        entries = [json.loads(line) for line in itertools.islice(lines, 3)]
    reasons = [f"{entry['file']}, line {entry['line']}: {entry['reason']}" for entry in entries]
    if ratio > max_invalid_ratio:
        listed = "\n  ".join(reasons)
        raise UserError(
            f"dataset {dataset.name}: {num_invalid:,} of {num_rows:,} rows ({ratio:.2%}) are invalid, more than "
            f"max_invalid_ratio ({max_invalid_ratio:.2%}) allows:\n  {listed}\nCorrect them, or raise max_invalid_ratio."
        )
    if not counts["kept"]:
        raise UserError(
            f"dataset {dataset.name}: no row is left of {counts['read']:,}: {counts['filtered']:,} excluded by row_filter, "
            f"{num_invalid:,} invalid, {counts['empty']:,} empty. Put text into it, or leave it out of the mix."
        )
    return [f"{num_rows:,} rows, {num_invalid:,} of them invalid ({ratio:.2%}), first: {reasons[0]}"] if entries else []


# ---------------------------------------------------------------------------------------------------------- tokenizing
def _tokenize_dataset(
    directory: Path,
    dataset_attr: DatasetAttr,
    stage: str,
    tokenizer: Any,
    data_args: "DataArguments",
    settings: dict[str, Any],
) -> None:
    """Tokenizes a dataset into `directory`, which appears complete or not at all."""
    template, threads = _get_template(tokenizer, data_args), data_args.preprocessing_num_workers

    def encode(rows: list[Row]) -> Encoded:
        contents = [row.content for row in rows]
        if stage == "pt" and not holds_dialogues(dataset_attr):
            return template.encode_documents(tokenizer, contents, threads), []
        masks = data_args.mask_history, data_args.train_on_prompt
        ids, labels = zip(*template.encode_dialogues(tokenizer, contents, *masks, threads), strict=True)
        return list(ids), list(labels) if stage == "sft" else []

    with atomic_directory(directory, replace=True) as partial, _gc_frozen():
        with (
            (partial / INVALID_ROWS_FILE).open("w", encoding="utf-8") as invalid_rows,
            TokenStoreWriter(partial) as writer,
            tqdm(desc=f"tokenize {dataset_attr.name}", unit=" rows", mininterval=0.5) as progress,
        ):
            reader = _BatchReader(dataset_attr, stage, data_args, invalid_rows, template.calls_as_json)
            for rows, (ids, labels) in _prefetch_encode(encode, reader.batches()):
                writer.append(rows, ids, labels)
                progress.update(len(rows))
        store, counts = TokenStore(partial), reader.counts
        hashes = store.column("hash")
        counts["duplicates"] = len(hashes) - len(numpy.unique(hashes))
        counts |= {"kept": len(store), "tokens": writer.num_tokens, "bytes": int(store.column("bytes").sum())}
        locations = dataset_attr.locations
        _check_invalid_ratio(
            TokenizedDataset(dataset_attr.name, store, locations, counts, partial), data_args.max_invalid_ratio
        )
        notes = []
        if stage == "sft" and (tools := dataset_attr.column_names["tools"]) and not reader.columns.keys() & {*tools}:
            notes.append(f"no row has a column {' or '.join(map(repr, tools))}: no tools are trained")
        if txt_files := [number for number, file in enumerate(dataset_attr.files) if file_type(file) == ".txt"]:
            num_documents = numpy.isin(store.column("file"), txt_files).sum()
            notes.append(
                f"{dataset_attr.describe_sample_by()}: {num_documents:,} documents from {len(txt_files):,} files"
            )
        if reader.switcher:
            notes.append(reader.switcher.describe())
        metadata = {"settings": settings, "locations": locations, "counts": counts, "notes": notes}
        atomic_write_json(partial / METADATA_FILE, metadata)


@contextmanager
def _gc_frozen() -> Iterator[None]:
    """Freezes existing objects (gc.freeze): otherwise every collection would visit half a million objects of libraries.

    If the process has frozen objects before, they stay frozen.
    """
    frozen_before = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()


class _BatchReader:
    """Reads, filters and converts rows; counts them, and lists those that are invalid."""

    def __init__(
        self,
        dataset_attr: DatasetAttr,
        stage: str,
        data_args: "DataArguments",
        invalid_rows: TextIO,
        calls_as_json: bool = False,
    ) -> None:
        self.dataset_attr, self.stage = dataset_attr, stage
        self.default_system, self.calls_as_json = data_args.default_system, calls_as_json
        self.limit = min(data_args.max_samples or sys.maxsize, dataset_attr.num_samples or sys.maxsize)
        self.invalid_rows = invalid_rows
        self.switcher = CodeSwitcher(dataset_attr.code_switch) if dataset_attr.code_switch else None
        self.counts = {"read": 0, "filtered": 0, "invalid": 0, "empty": 0}
        self.columns: dict[str, None] = {}
        """Columns that at least one row has, in order."""

    def batches(self) -> Iterator[list[Row]]:
        """Yields converted rows in batches of at most `MAX_BATCH_ROWS`, and of few more than `MAX_BATCH_BYTES`.

        Raises:
            UserError: as `read_rows` and `check_columns`.
        """
        counts, num_readable = self.counts, 0
        batch: list[Row] = []
        size = 0
        for row in read_rows(self.dataset_attr):
            counts["read"] += 1
            if not row.error and not self.dataset_attr.matches_filter(row.values):
                counts["filtered"] += 1
                continue
            if not row.error:
                self.columns |= dict.fromkeys(row.values)
                num_readable += 1
                if num_readable == COLUMN_CHECK_ROWS:
                    check_columns(self.dataset_attr, self.stage, self.columns)
            for converted in self._convert(row):
                batch.append(converted)
                size += converted.num_bytes
                if size >= MAX_BATCH_BYTES or len(batch) == MAX_BATCH_ROWS:
                    yield batch
                    batch, size = [], 0
            if counts["read"] - counts["filtered"] == self.limit:
                break
        if batch:
            yield batch
        if self.columns:
            complete = counts["read"] - counts["filtered"] < self.limit
            check_columns(self.dataset_attr, self.stage, self.columns, complete)

    def _convert(self, row: Row) -> list[Row]:
        """Converts a row; returns none if it is invalid or empty, and several if it is an entry of a glossary."""
        rows: list[Row] = []
        if not row.error:
            try:
                rows = convert_row(row, self.dataset_attr, self.stage, self.default_system, self.calls_as_json)
            except InvalidRow as error:
                row.error = str(error)
        if row.error:
            self.counts["invalid"] += 1
            file = self.dataset_attr.locations[row.file]
            entry = {"dataset": self.dataset_attr.name, "file": file, "line": row.line, "reason": row.error}
            self.invalid_rows.write(json.dumps(entry, ensure_ascii=False) + "\n")
            return []
        if not any(converted.content for converted in rows):
            self.counts["empty"] += 1
            return []
        if self.switcher:
            self.switcher(row)
        return rows


def _prefetch_encode(
    encode: Callable[[list[Row]], Encoded], batches: Iterable[list[Row]]
) -> Iterator[tuple[list[Row], Encoded]]:
    """Encodes each batch while the next is read and the previous one written: sentencepiece releases the GIL."""
    with ThreadPoolExecutor(1) as encoder:
        previous: tuple[list[Row], Future] | None = None
        for batch in batches:
            current = batch, encoder.submit(encode, batch)
            if previous:
                yield previous[0], previous[1].result()
            previous = current
        if previous:
            yield previous[0], previous[1].result()
