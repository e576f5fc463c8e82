"""dataset_info.json -> rows: finds a data set's files (or the hub's) and reads them as streams, whatever their kind."""

import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llmtuner.console import UserError, print0
from llmtuner.files import checksum

FILE_TYPES = (".parquet", ".jsonl", ".json", ".csv", ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of all kinds but parquet, which compresses by itself
SUPPORTED_FILES = f"{', '.join(FILE_TYPES)}; all but parquet also with {' or '.join(COMPRESSIONS)}"
FORMATTINGS = ("alpaca", "sharegpt")
# What one document of a .txt file is; names and default are those of Hugging Face's text loader.
SAMPLE_BY = {"line": "a line", "paragraph": "a block of lines between blank ones", "document": "a whole file"}
MAX_UNREADABLE_RATIO = 0.05  # share of a corpus's rows that `read_texts` leaves out because they cannot be read
MAX_CSV_ROW_CHARS = 1 << 26  # characters; a longer row is taken for an unclosed quote, so that memory stays bounded
HUB_TIMEOUT_SECONDS = 10  # seconds
# What LLaMA-Factory takes where an entry says nothing else.
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
KNOWN_COLUMNS = (*DEFAULT_COLUMNS, "history", "system", "tools")
VALUE_TYPES: dict[type, str] = {int: "a whole number above 0", dict: "an object of the form {KEY: VALUE}", str: "text"}
# Hubs that are not asked, and a checksum that LLaMA-Factory does not insist on: they may stand beside a place to read.
IGNORED_KEYS = ("ms_hub_url", "om_hub_url", "file_sha1")


@dataclass(frozen=True)
class DatasetAttr:
    """One entry of `dataset_info.json`, with LLaMA-Factory's keys, and where its rows were found."""

    name: str
    files: tuple[str, ...]
    """Local files; empty when the rows come from the hub."""
    search_path: str = ""
    """Where local files would be: directory and pattern."""
    hf_hub_url: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    """Directory inside the hub's data set."""
    num_samples: int | None = None
    """At most this many rows are used."""
    formatting: str = "alpaca"
    """`alpaca` (columns prompt, query, response, history) or `sharegpt` (a list of messages); both: system, tools."""
    columns: dict[str, Any] = field(default_factory=dict)
    """role of a column -> its name in the files, or a list of names of which the first that exists is taken."""
    tags: dict[str, str] = field(default_factory=dict)
    """Names used inside sharegpt messages, where they are not `DEFAULT_TAGS`."""
    row_filter: dict[str, Any] = field(default_factory=dict)
    """Only rows with these column values are used."""
    sample_by: str = "line"
    """What one document of a .txt file is: `line`, `paragraph` (lines between blank lines) or `document` (the file)."""

    def column_names(self, role: str) -> list[str]:
        """Names that the column with this role may have; none if the rows have no such column."""
        if role not in self._names:
            configured = self.columns.get(role)
            if not configured and (not self.columns or role == "messages"):
                configured = DEFAULT_COLUMNS.get(role)
            self._names[role] = configured if isinstance(configured, list) else [configured] if configured else []
        return self._names[role]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """What `column_names` has answered: it is asked five times for each row."""
        return {}

    def resolve_column(self, role: str, available: Any) -> str:
        """The name of the column that plays `role`, given the names there are.

        Raises:
            UserError: if none of the configured names is there.
        """
        names = self.column_names(role)
        for name in names:
            if name in available:
                return name
        if not names:
            raise UserError(
                f"data set {self.name}: `columns` in dataset_info.json names no column for {role!r}; "
                f"{self.describe_locations()} has {', '.join(map(repr, available))}."
            )
        raise UserError(
            f"data set {self.name}: {self.describe_locations()} has no column {' or '.join(map(repr, names))}; "
            f"it has {', '.join(map(repr, available))}. Rename it, or name it under `columns` in dataset_info.json."
        )

    def locations(self) -> tuple[str, ...]:
        """What `Row.file` counts in."""
        return self.files or (f"hub data set {self.hf_hub_url}",)

    def describe_locations(self) -> str:
        return ", ".join(self.locations())

    def describe_sample_by(self) -> str:
        """Says what one document of the .txt files is; empty if there are none."""
        if not any(file_type(file) == ".txt" for file in self.files):
            return ""
        return f"one document of a .txt file is {SAMPLE_BY[self.sample_by]} (sample_by: {', '.join(SAMPLE_BY)})"

    def matches_filter(self, values: dict[str, Any]) -> bool:
        """Whether a row has the values that `row_filter` asks for."""
        return not self.row_filter or all(
            _equal(values.get(column), wanted) for column, wanted in self.row_filter.items()
        )

    def fingerprint(self) -> str:
        """Changes with a file's path, size, date or content (of files above 16 MiB a sample), or the way it is read."""
        files = [Path(file) for file in self.files]
        if not files and self.hf_hub_url and Path(self.hf_hub_url).is_dir():
            files = sorted(path for path in Path(self.hf_hub_url).rglob("*") if path.is_file())
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns, checksum(file)) for file in files]
        return hashlib.sha256(json.dumps([stats, repr(self)], sort_keys=True).encode()).hexdigest()[:16]


class Row(NamedTuple):
    """One row and where it came from."""

    file: int
    """Position in `DatasetAttr.locations()`."""
    line: int
    """From 1: the line on which a row of jsonl, csv or txt begins, else the number of the row."""
    values: dict[str, Any]
    error: str = ""
    """Why the row cannot be read; `values` are empty then."""


def get_dataset_attr(name: str, dataset_info: Path, corpus_dir: Path) -> DatasetAttr:
    """Looks a data set up: files in `corpus_dir` first, then the hub.

    `REMOTE:ORG/NAME`, or `ORG/NAME` where the directory of `dataset_info` is called ONLINE, is a data set of the hub
    with LLaMA-Factory's default columns; it needs no entry.

    Raises:
        UserError: if the name is unknown, its entry cannot be followed, there is neither a file nor a hub id, or
            `corpus_dir` holds no file of any entry, for then the hub is not asked.
    """
    if name.startswith("REMOTE:") or str(dataset_info.parent) == "ONLINE":
        return DatasetAttr(name=name, files=(), hf_hub_url=name.removeprefix("REMOTE:"))
    entries = _read_dataset_info(dataset_info)
    if name not in entries:
        import difflib

        near = difflib.get_close_matches(name, entries, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(entries)}."
        raise UserError(f"data set {name!r} is not described in {dataset_info}.{hint}")
    entry = _validate_entry(entries[name], f"{dataset_info}: entry {name!r}")
    pattern = entry.pop("file_name", None)
    files, skipped = _local_files(corpus_dir, pattern) if pattern else ((), "")
    place, where_else = f"{corpus_dir}/{pattern}", "corpus_dir (in the steps: CORPUS_DIR)"
    if not files and not entry.get("hf_hub_url"):
        raise UserError(
            f"data set {name}: no file {place} (of kind {SUPPORTED_FILES}).{skipped} "
            f"Put it there, or change {where_else} or {dataset_info}."
        )
    if not files and pattern and not _contains_any_dataset(corpus_dir, entries, dataset_info):
        raise UserError(  # the wrong directory was set
            f"data set {name}: no file {place}, nor one of any other data set in {dataset_info}.{skipped} Put files there, "
            f"or set {where_else} to another directory. The hub is read where no directory is set, and for data sets that "
            "are missing beside others."
        )
    if skipped:
        _print_once(f"data set {name}: {place}:{skipped} Kinds that are read: {SUPPORTED_FILES}.")
    if pattern and not files:
        _print_once(f"data set {name}: no file {place}; reading {entry['hf_hub_url']} from the hub")
    return DatasetAttr(name=name, files=files, search_path=f"{corpus_dir}/{pattern}" if pattern else "", **entry)


@cache
def _print_once(message: str) -> None:
    """Prints what concerns a data set once, however often it is looked up."""
    print0(message)


def _contains_any_dataset(corpus_dir: Path, entries: dict[str, Any], dataset_info: Path) -> bool:
    """False if a directory was named for texts, beside that of `dataset_info`, and holds no file of any entry."""
    if not corpus_dir.is_dir() or corpus_dir.resolve() == dataset_info.parent.resolve():
        return True
    names = [entry.get("file_name") for entry in entries.values() if isinstance(entry, dict)]
    return any(_local_files(corpus_dir, name)[0] for name in names if isinstance(name, str))


def _read_dataset_info(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if str(path).startswith("REMOTE:"):
            raise UserError(
                f"dataset_dir {path.parent}: a dataset_info.json on the hub is not read. Download it and set dataset_dir "
                "to its directory, or set dataset to REMOTE:ORG/NAME for a single data set of the hub."
            ) from error
        raise UserError(
            f"{path} does not exist. It describes the data sets; set dataset_dir to its directory."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} is not a JSON object of the form {{NAME: {{KEY: VALUE}}}}.")
    return entries


def _validate_entry(entry: Any, place: str) -> dict[str, Any]:
    """A copy of an entry with those keys that can be honoured; keys set to nothing go.

    Raises:
        UserError: names the entry and the key that cannot be honoured.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{place} is not a JSON object of the form {{KEY: VALUE}}.")
    entry = {key: value for key, value in entry.items() if value not in (None, False, "")}
    has_place = "hf_hub_url" in entry or "file_name" in entry
    for key in IGNORED_KEYS if has_place else ():
        entry.pop(key, None)
    known = {"file_name", *DatasetAttr.__dataclass_fields__} - {"name", "files", "search_path"}
    for inside, keys in (("", known), ("columns", set(KNOWN_COLUMNS)), ("tags", set(DEFAULT_TAGS))):
        given = entry.get(inside, {}) if inside else entry
        for key in given if isinstance(given, dict) else ():
            if key not in keys and given[key]:
                where = f"key {key!r}" + (f" under `{inside}`" if inside else "")
                raise UserError(f"{place} has the {where}, which cannot be honoured. Known: {', '.join(sorted(keys))}.")
    if not has_place:
        raise UserError(f"{place} names neither file_name nor hf_hub_url: there is nothing to read.")
    for key, value in entry.items():
        kind: type = int if key == "num_samples" else dict if key in ("columns", "tags", "row_filter") else str
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            raise UserError(f"{place}: {key} is {value!r}; it must be {VALUE_TYPES[kind]}.")
    for key, known_values in (("formatting", FORMATTINGS), ("sample_by", tuple(SAMPLE_BY))):
        if entry.get(key, known_values[0]) not in known_values:
            raise UserError(f"{place}: {key} {entry[key]!r} is unknown; use {' or '.join(known_values)}.")
    return entry


def _local_files(corpus_dir: Path, file_name: str) -> tuple[tuple[str, ...], str]:
    """Files that a file, a directory or a pattern names, in order of their names; and a sentence on those of other kinds."""
    place = corpus_dir / file_name
    if place.is_dir():
        found = [str(path) for path in place.iterdir() if not path.name.startswith(".")]
    elif place.is_file():
        found = [str(place)]
    else:
        found = glob.glob(os.path.join(glob.escape(str(corpus_dir)), file_name), recursive=True)
    found.sort()
    others = [os.path.basename(path) for path in found if file_type(path) not in FILE_TYPES and os.path.isfile(path)]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5:,} more" if others[5:] else "")
    files = tuple(path for path in found if file_type(path) in FILE_TYPES)
    return files, f" Not read, being of another kind: {listed}." if others else ""


def file_type(path: str | Path) -> str:
    """Suffix of a file in lower case, without that of a compression: `.jsonl` for `A.JSONL.gz`."""
    name, last = os.path.splitext(str(path).lower())
    kind = os.path.splitext(name)[1]
    return kind if last in COMPRESSIONS and kind != ".parquet" else last


def read_rows(source: DatasetAttr) -> Iterator[Row]:
    """Yields the rows of a source one by one, those that cannot be read too; memory does not grow with its size.

    Raises:
        UserError: if a file cannot be read, is not UTF-8, is damaged as a whole, or if there is no row.
    """
    empty = True
    for row in _read_files(source) if source.files else _read_hub(source):
        empty = False
        yield row
    if empty:
        raise UserError(
            f"data set {source.name}: {source.describe_locations()} is empty. Put text into it, or leave it out of the mix."
        )


def _equal(value: Any, wanted: Any) -> bool:
    return value == wanted or str(value) == str(wanted)  # csv knows only text


def read_texts(source: DatasetAttr) -> Iterator[str]:
    """Yields the documents of a text corpus: its `prompt` column, empty ones left out.

    Rows that cannot be read are left out as well and reported in one line, up to `MAX_UNREADABLE_RATIO` of all.

    Raises:
        UserError: as `read_rows`; if more rows cannot be read; at the first row that lacks the column or holds no text
            in it.
    """
    problems: list[str] = []
    number = 0
    if note := source.describe_sample_by():
        _print_once(f"data set {source.name}: {note}")

    def check() -> None:
        if len(problems) > MAX_UNREADABLE_RATIO * number:
            raise UserError(
                f"data set {source.name}: {len(problems):,} of {number:,} rows cannot be read, more than "
                f"{MAX_UNREADABLE_RATIO:.0%}:\n  " + "\n  ".join(problems[:3])
            )

    for number, row in enumerate(read_rows(source), start=1):
        place = f"{source.locations()[row.file]}, line {row.line},"
        if row.error:
            problems.append(f"{place} {row.error}")
            if number >= 1_000:
                check()
            continue
        if not source.matches_filter(row.values):
            continue
        column = source.resolve_column("prompt", row.values)
        text = row.values[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise UserError(f"data set {source.name}: {place} holds no text in {column!r}.")
        if has_lone_surrogate(text):
            raise UserError(f"data set {source.name}: {place} holds half a character (a lone surrogate) in {column!r}.")
        if text.strip():
            yield text
    check()
    if problems:
        _print_once(
            f"data set {source.name}: {len(problems):,} of {number:,} rows cannot be read, first: {problems[0]}"
        )


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds a lone surrogate, which JSON can say but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_files(source: DatasetAttr) -> Iterator[Row]:
    readers = {
        ".parquet": _read_parquet,
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".txt": lambda file: _read_text(file, source.sample_by),
    }
    for number, file in enumerate(map(Path, source.files)):
        try:
            for line, values in readers[file_type(file)](file):
                yield Row(number, line, {}, values) if isinstance(values, str) else Row(number, line, values)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}.") from error


# Each reader yields the line (or number) of a row and its values, or a string: why they cannot be read.
NumberedRows = Iterator[tuple[int, dict[str, Any] | str]]


def _open_text(file: Path, newline: str | None = None) -> TextIO:
    """Opens a text file, compressed or not; a byte that is not UTF-8 becomes a lone surrogate, see `_encoding_error`."""
    binary: Any = None
    if compression := COMPRESSIONS.get(file.suffix.lower()):
        import pyarrow

        binary = pyarrow.input_stream(str(file), compression=compression)
    return io.TextIOWrapper(binary or file.open("rb"), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _encoding_error(text: str) -> str:
    """Says which byte of a text from `_open_text` is not UTF-8; empty if all are."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = f"byte 0x{ord(text[error.start]) - 0xDC00:02x} at character {error.start + 1}"
        return f"is not UTF-8 text ({byte}; a file in another encoding: iconv -f ENCODING -t UTF-8)"
    return ""


def _read_parquet(file: Path) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    def rows(batch: pyarrow.RecordBatch) -> list[dict[str, Any] | str]:
        try:
            return batch.to_pylist()
        except UnicodeDecodeError as error:
            if len(batch) == 1:
                return [f"is not UTF-8 text ({error})"]
            return [values for place in range(len(batch)) for values in rows(batch.slice(place, 1))]

    try:
        # Read in pieces: a file may be a single row group. One column holds nearly all of a row, so more threads would
        # only take cores from the tokenizer.
        content = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        batches = content.iter_batches(batch_size=256, use_threads=False)
        yield from enumerate((values for batch in batches for values in rows(batch)), start=1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not a readable parquet file: {error}. Fetch or make it again.") from error


def _read_json_lines(file: Path) -> NumberedRows:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if problem := _encoding_error(line):
                yield number, problem
            elif line.strip():
                try:
                    yield number, _check_object(json.loads(line))
                except json.JSONDecodeError as error:
                    yield number, f"is not valid JSON: {error.msg} at character {error.pos + 1}"
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
                    yield number, f"is not usable JSON: {error}"


def _check_object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"is not a JSON object but {type(value).__name__}"


def _read_json(file: Path) -> NumberedRows:
    """Reads one array of objects, piece by piece, or JSON lines under the name .json."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    size = 1 << 20
    with _open_text(file) as stream:
        buffer = stream.read(size).lstrip()
        if not buffer.startswith("["):
            yield from _read_json_lines(file)
            return
        number, place = 0, 1
        while True:
            place = between.match(buffer, place).end()  # type: ignore[union-attr]  # it matches nothing too
            if buffer.startswith("]", place):
                break
            start = place
            try:
                value, place = decoder.raw_decode(buffer, place)
            except (ValueError, RecursionError) as error:
                more = stream.read(max(size, len(buffer) - place))
                if not more:
                    problem = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(
                        f"{file}, behind row {number}, is not valid JSON near {buffer[place : place + 60]!r}: {problem}."
                    ) from error
                buffer, place = buffer[place:] + more, 0
                continue
            number += 1
            yield number, _encoding_error(buffer[start:place]) or _check_object(value)
        behind = buffer[place + 1 :].strip()
        while not behind and (more := stream.read(size)):
            behind = more.strip()
        if behind:
            raise UserError(
                f"{file}: more text stands behind the array of {number:,} rows: {behind[:60]!r}. A .json file holds one "
                "array of objects, or one object a line; put everything into one of these forms."
            )


class _CsvLines:
    """Lines of a CSV file, of which those that a broken row has swallowed can be given back."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.returned: deque[str] = deque()
        self.row: list[str] = []
        """Lines of the row that is being read."""
        self.number = 0
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
        """Number of the line on which the next row begins, from 1."""
        self.number += len(self.row)
        self.row, self.size = [], 0
        return self.number + 1

    def give_back(self) -> None:
        """Keeps the first line of the row; the others will be read again."""
        self.returned.extendleft(reversed(self.row[1:]))
        del self.row[1:]


def _read_csv(file: Path) -> NumberedRows:
    """A quote that is not closed costs the row in which it was opened: the lines behind it are read as rows of their own."""
    csv.field_size_limit(sys.maxsize)  # a document is longer than the 128 kB that are usual
    with _open_text(file, newline="") as stream:
        lines = _CsvLines(stream)
        header: list[str] | None = None
        reader = csv.reader(lines, strict=True)
        broken = False  # between an unclosed quote and the next row that has all its cells
        while True:
            line, problem = lines.begin_row(), ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                reader = csv.reader(lines, strict=True)
                # Text behind a closing quote is read as part of its cell, but only within one line: over several, the
                # closing quote is one that should have opened another cell. A quote that is still open takes in the "\n".
                rows = list(csv.reader([*lines.row, "\n"])) if len(lines.row) == 1 else []
                if len(rows) == 2:
                    cells = rows[0]
                else:
                    more = f" (it would take in {len(lines.row) - 1:,} more lines)" if lines.row[1:] else ""
                    problem = f"opens a quote that is not closed{more}"
                    cells, broken = [], True
                    lines.give_back()
            problem = problem or _encoding_error("".join(cells))
            if header is None:
                if problem:
                    raise UserError(f"{file}, line {line}: the header {problem}. Mend it.")
                header = cells
            elif problem:
                yield line, problem
            elif len(cells) > len(header):
                yield line, f"has {len(cells)} cells where the header has {len(header)}"
            elif cells and broken and len(cells) < len(header):
                yield line, f"has {len(cells)} cells where the header has {len(header)}, behind an unclosed quote"
            elif cells:
                broken = False
                yield line, dict.fromkeys(header) | dict(zip(header, cells, strict=False))


def _read_text(file: Path, sample_by: str) -> NumberedRows:
    """Documents of a plain text file: lines, blocks of lines between blank ones, or all of it; see `SAMPLE_BY`."""
    block: list[str] = []
    first = number = 0
    with _open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            blank = not line.strip()
            if block and (sample_by == "line" or (sample_by == "paragraph" and blank)):
                yield first, _as_document(block)
                block = []
            if not blank or (block and sample_by == "document"):
                first = first if block else number
                block.append(line)
    if block:
        yield first, _as_document(block)


def _as_document(lines: list[str]) -> dict[str, Any] | str:
    text = "".join(lines).rstrip("\n")
    return _encoding_error(text) or {"text": text}


def _read_hub(source: DatasetAttr) -> Iterator[Row]:
    import huggingface_hub
    from datasets import load_dataset

    try:
        if not huggingface_hub.is_offline_mode() and not Path(str(source.hf_hub_url)).exists():
            # Without a network, load_dataset would try again for half a minute.
            huggingface_hub.HfApi().dataset_info(str(source.hf_hub_url), timeout=HUB_TIMEOUT_SECONDS)
        rows = load_dataset(
            source.hf_hub_url, name=source.subset, data_dir=source.folder, split=source.split, streaming=True
        )
        for number, values in enumerate(rows, start=1):
            yield Row(0, number, values)
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        missing = f"there is no file {source.search_path}, and " if source.search_path else ""
        local = ", or put a file of that name into corpus_dir (in the steps: CORPUS_DIR)" if missing else ""
        raise UserError(
            f"data set {source.name}: {missing}the hub data set {source.hf_hub_url} cannot be loaded "
            f"({type(error).__name__}: {error}). Check its name, the network and HF_HUB_OFFLINE{local}."
        ) from error


def text_hash(data: bytes) -> int:
    """A number from 0 to below 2**64 that depends on a document's UTF-8 alone."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def is_validation(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share: decided by its text alone, so every step decides alike."""
    return text_hash(text.encode()) < share * 2**64
