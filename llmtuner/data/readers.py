"""Reads the rows of a dataset's files, or of the hub, one by one: parquet, JSON, JSON lines, CSV and plain text."""

import csv
import io
import json
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from llmtuner.console import UserError
from llmtuner.data.sources import COMPRESSIONS, DatasetAttr, file_type, print_once

MAX_UNREADABLE_RATIO = 0.05  # of a corpus's rows, which `read_texts` skips
MAX_CSV_ROW_CHARS = 1 << 26  # a longer row is taken for an unclosed quote, which bounds the memory
HUB_TIMEOUT_SECONDS = 10


@dataclass(slots=True)
class Row:
    """One row: where it was read, its values, and after conversion the document or dialogue that it holds."""

    line: int
    """From 1: the line on which a row of jsonl, csv or txt begins, else the number of the row."""
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why the row cannot be read; `values` are empty then."""
    file: int = 0
    """Index into `DatasetAttr.locations`."""
    content: Any = None
    """A document in UTF-8, or the messages of a dialogue."""
    num_bytes: int = 0
    """UTF-8 bytes of the text, or of all contents."""
    hash: int = 0
    """Of the text, or of the messages as JSON."""

    def set_content(self, content: "bytes | list[dict[str, Any]]") -> None:
        """Sets the document or dialogue, and the number of its bytes."""
        self.content = content
        texts = [content] if isinstance(content, bytes) else [message["content"].encode() for message in content]
        self.num_bytes = sum(map(len, texts))


def read_rows(dataset_attr: DatasetAttr) -> Iterator[Row]:
    """Yields the rows of a dataset, including those with an error; memory does not grow with the dataset.

    Raises:
        UserError: if a file cannot be read, is not UTF-8, or is damaged as a whole; if the dataset is not on the hub or the
            hub cannot be reached; if there is no row.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".parquet": _read_parquet,
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".txt": partial(_read_text, sample_by=dataset_attr.sample_by),
    }
    row = None
    for number, location in enumerate(dataset_attr.locations):
        rows = readers[file_type(location)](Path(location)) if dataset_attr.files else _read_hub(dataset_attr)
        try:
            for row in rows:
                row.file = number
                yield row
        except OSError as error:
            raise UserError(f"cannot read {location}: {error.strerror or error}.") from error
    if row is None:
        raise UserError(
            f"dataset {dataset_attr.name}: {dataset_attr.describe_locations()} is empty. Put text into it, or leave it out "
            "of the mix."
        )


def read_texts(dataset_attr: DatasetAttr) -> Iterator[str]:
    """Yields the documents of a text corpus: its `prompt` column, without empty ones.

    Rows that cannot be read are skipped and reported in one line, up to `MAX_UNREADABLE_RATIO` of all.

    Raises:
        UserError: as `read_rows`; if more rows cannot be read; at the first row without the column or without text in it.
    """
    errors: list[str] = []
    number = 0
    if note := dataset_attr.describe_sample_by():
        print_once(f"dataset {dataset_attr.name}: {note}")

    def check_errors() -> None:
        if len(errors) > MAX_UNREADABLE_RATIO * number:
            raise UserError(
                f"dataset {dataset_attr.name}: {len(errors):,} of {number:,} rows cannot be read, more than "
                f"{MAX_UNREADABLE_RATIO:.0%}:\n  " + "\n  ".join(errors[:3])
            )

    for number, row in enumerate(read_rows(dataset_attr), start=1):
        location = f"{dataset_attr.locations[row.file]}, line {row.line},"
        if row.error:
            errors.append(f"{location} {row.error}")
            if number >= 1_000:
                check_errors()
            continue
        if not dataset_attr.matches_filter(row.values):
            continue
        column = dataset_attr.resolve_column("prompt", row.values)
        text = row.values[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"dataset {dataset_attr.name}: {location} holds no text in {column!r}.")
        if _encoding_error(text):
            error = f"{location} holds half a character (a lone surrogate) in {column!r}"
            raise UserError(f"dataset {dataset_attr.name}: {error}.")
        if text.strip():
            yield text
    check_errors()
    if errors:
        print_once(
            f"dataset {dataset_attr.name}: {len(errors):,} of {number:,} rows cannot be read, first: {errors[0]}"
        )


# ------------------------------------------------------------------------------------------------------------- readers
def _open_text(file: Path, newline: str | None = None) -> TextIO:
    """Opens a text file, compressed or not; bytes that are not UTF-8 become lone surrogates, see `_encoding_error`."""
    binary: Any = None
    if compression := COMPRESSIONS.get(file.suffix.lower()):
        import pyarrow

        binary = pyarrow.input_stream(str(file), compression=compression)
    return io.TextIOWrapper(binary or file.open("rb"), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _encoding_error(text: str) -> str:
    """Names the first byte of a text from `_open_text` that is not UTF-8; empty if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = f"byte 0x{ord(text[error.start]) - 0xDC00:02x} at character {error.start + 1}"
        return f"is not UTF-8 text ({byte}; a file in another encoding: iconv -f ENCODING -t UTF-8)"
    return ""


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    def to_values(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | str]:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError as error:
            if len(batch) == 1:
                return [f"is not UTF-8 text ({error})"]
            return [values for i in range(len(batch)) for values in to_values(batch.slice(i, 1))]

    try:
        # Read in small batches: a file may be a single row group. One column holds nearly all of a row, so more threads
        # would only take cores from the tokenizer.
        parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        batches = parquet.iter_batches(batch_size=256, use_threads=False)
        for number, values in enumerate((values for batch in batches for values in to_values(batch)), start=1):
            yield Row(number, error=values) if isinstance(values, str) else Row(number, values)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not a readable parquet file: {error}. Download or create it again.") from error


def _read_json_lines(file: Path) -> Iterator[Row]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if encoding_error := _encoding_error(line):
                yield Row(number, error=encoding_error)
            elif line.strip():
                try:
                    yield _object_row(number, json.loads(line))
                except json.JSONDecodeError as error:
                    yield Row(number, error=f"is not valid JSON: {error.msg} at character {error.pos + 1}")
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
                    yield Row(number, error=f"is not usable JSON: {error}")


def _object_row(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, error=f"is not a JSON object but {type(value).__name__}")


def _read_json(file: Path) -> Iterator[Row]:
    """Reads one array of objects, incrementally, or JSON lines in a file named .json."""
    decoder = json.JSONDecoder()
    separators = re.compile(r"[\s,]*")
    size = 1 << 20
    with _open_text(file) as stream:
        buffer = stream.read(size).lstrip()
        if not buffer.startswith("["):
            yield from _read_json_lines(file)
            return
        number, position = 0, 1
        while True:
            start = separators.match(buffer, position).end()  # type: ignore[union-attr]  # it matches nothing too
            if buffer.startswith("]", start):
                break
            try:
                value, position = decoder.raw_decode(buffer, start)
            except (ValueError, RecursionError) as error:
                more = stream.read(max(size, len(buffer) - start))
                if not more:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(
                        f"{file}, after row {number}, is not valid JSON near {buffer[start : start + 60]!r}: {reason}."
                    ) from error
                buffer, position = buffer[start:] + more, 0
                continue
            number += 1
            encoding_error = _encoding_error(buffer[start:position])
            yield Row(number, error=encoding_error) if encoding_error else _object_row(number, value)
        rest = buffer[start + 1 :].strip()
        while not rest and (more := stream.read(size)):
            rest = more.strip()
        if rest:
            raise UserError(
                f"{file}: more text follows the array of {number:,} rows: {rest[:60]!r}. A .json file holds one array of "
                "objects, or one object per line; put everything into one of these forms."
            )


class _CsvLines:
    """Lines of a CSV file for csv.reader; lines that an invalid row has consumed can be put back."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.returned: deque[str] = deque()
        self.row: list[str] = []
        """Lines of the row that is being read."""
        self.num_lines = 0
        """Lines before that row."""
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.returned.popleft() if self.returned else next(self.stream)
        self.row.append(line)
        self.size += len(line)
        if self.size > MAX_CSV_ROW_CHARS and len(self.row) > 1:
            raise csv.Error("row too long")
        return line

    def begin_row(self) -> int:
        """Begins the next row and returns its line number, from 1."""
        self.num_lines += len(self.row)
        self.row, self.size = [], 0
        return self.num_lines + 1

    def put_back(self) -> None:
        """Keeps the first line of the row; the others will be read again."""
        self.returned.extendleft(reversed(self.row[1:]))
        del self.row[1:]


def _read_csv(file: Path) -> Iterator[Row]:
    """Reads rows of CSV. An unclosed quote costs only the row in which it was opened: the lines after it are read again."""
    csv.field_size_limit(sys.maxsize)  # a document is longer than the default of 128 kB
    with _open_text(file, newline="") as stream:
        lines = _CsvLines(stream)
        header: list[str] | None = None
        reader = csv.reader(lines, strict=True)
        after_unclosed = False  # until the next row that has all its cells
        while True:
            line, error = lines.begin_row(), ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                reader = csv.reader(lines, strict=True)
                # Text after a closing quote is read as part of its cell, but only within one line: over several, the
                # closing quote is one that should have opened another cell. A quote that is still open takes in the "\n".
                rows = list(csv.reader([*lines.row, "\n"])) if len(lines.row) == 1 else []
                if len(rows) == 2:
                    cells = rows[0]
                else:
                    more = f" (it would take in {len(lines.row) - 1:,} more lines)" if lines.row[1:] else ""
                    error = f"opens a quote that is not closed{more}"
                    cells, after_unclosed = [], True
                    lines.put_back()
            error = error or _encoding_error("".join(cells))
            if header is None:
                if error:
                    raise UserError(f"{file}, line {line}: the header {error}. Correct it.")
                header = cells
            elif error:
                yield Row(line, error=error)
            elif len(cells) > len(header):
                yield Row(line, error=f"has {len(cells)} cells where the header has {len(header)}")
            elif cells and after_unclosed and len(cells) < len(header):
                cell_counts = f"has {len(cells)} cells where the header has {len(header)}"
                yield Row(line, error=f"{cell_counts}, after an unclosed quote")
            elif cells:
                after_unclosed = False
                yield Row(line, dict.fromkeys(header) | dict(zip(header, cells, strict=False)))


def _read_text(file: Path, sample_by: str) -> Iterator[Row]:
    """Reads documents of a plain text file: lines, blocks of lines between blank ones, or all of it; see `SAMPLE_BY`."""
    block: list[str] = []
    first = 0
    with _open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            blank = not line.strip()
            if block and (sample_by == "line" or (sample_by == "paragraph" and blank)):
                yield _text_row(first, block)
                block = []
            if not blank or (block and sample_by == "document"):
                first = first if block else number
                block.append(line)
    if block:
        yield _text_row(first, block)


def _text_row(line: int, block: list[str]) -> Row:
    text = "".join(block).rstrip("\n")
    error = _encoding_error(text)
    return Row(line, error=error) if error else Row(line, {"text": text})


def _read_hub(dataset_attr: DatasetAttr) -> Iterator[Row]:
    import huggingface_hub
    from datasets import load_dataset

    url = str(dataset_attr.hf_hub_url)
    try:
        if not huggingface_hub.is_offline_mode() and not Path(url).exists():
            # Without a network, load_dataset would retry for half a minute.
            huggingface_hub.HfApi().dataset_info(url, timeout=HUB_TIMEOUT_SECONDS)
        split, subset, folder = dataset_attr.split, dataset_attr.subset, dataset_attr.folder
        rows = load_dataset(url, name=subset, data_dir=folder, split=split, streaming=True)
        for number, values in enumerate(rows, start=1):
            yield Row(number, values)
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        searched = dataset_attr.search_path
        missing = f"there is no file {searched}, and " if searched else ""
        local = ", or put a file of that name into corpus_dir (in the steps: CORPUS_DIR)" if searched else ""
        raise UserError(
            f"dataset {dataset_attr.name}: {missing}the hub dataset {url} cannot be loaded "
            f"({type(error).__name__}: {error}). Check its name, the network and HF_HUB_OFFLINE{local}."
        ) from error
