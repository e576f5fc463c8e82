"""dataset_info.json -> rows: finds a data set's files (or the hub's) and reads them as streams, whatever their kind."""

import csv
import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llmtuner.console import InputError

FILE_KINDS = (".parquet", ".jsonl", ".json", ".csv", ".txt")
FORMATTINGS = ("alpaca", "sharegpt")
# What LLaMA-Factory takes where an entry says nothing else.
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "system_tag": "system",
}
KNOWN_COLUMNS = (*DEFAULT_COLUMNS, "history", "system")
KINDS: dict[type, str] = {int: "a whole number above 0", dict: "an object of the form {KEY: VALUE}", str: "text"}
# Hubs that are not asked, and a checksum that LLaMA-Factory does not insist on: they may stand beside a place to read.
PASSED_OVER = ("ms_hub_url", "om_hub_url", "file_sha1")


@dataclass(frozen=True)
class Source:
    """One entry of `dataset_info.json`, with LLaMA-Factory's keys, and where its rows were found."""

    name: str
    files: tuple[str, ...]
    """Local files; empty when the rows come from the hub."""
    looked_for: str = ""
    """Where local files would be: directory and pattern."""
    hf_hub_url: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    """Directory inside the hub's data set."""
    num_samples: int | None = None
    """At most this many rows are used."""
    formatting: str = "alpaca"
    """`alpaca` (columns prompt, query, response, system, history) or `sharegpt` (a list of messages)."""
    columns: dict[str, Any] = field(default_factory=dict)
    """role of a column -> its name in the files, or a list of names of which the first that exists is taken."""
    tags: dict[str, str] = field(default_factory=dict)
    """Names used inside sharegpt messages, where they are not `DEFAULT_TAGS`."""
    keep_rows: dict[str, Any] = field(default_factory=dict)
    """Only rows with these column values are used."""

    def names(self, role: str) -> list[str]:
        """Names that the column with this role may have; none if the rows have no such column."""
        if role not in self._names:
            configured = self.columns.get(role)
            if not configured and (not self.columns or role == "messages"):
                configured = DEFAULT_COLUMNS.get(role)
            self._names[role] = configured if isinstance(configured, list) else [configured] if configured else []
        return self._names[role]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """What `names` has answered: it is asked five times for each row."""
        return {}

    def column(self, role: str, available: Any) -> str:
        """The name of the column that plays `role`, given the names there are.

        Raises:
            InputError: if none of the configured names is there.
        """
        names = self.names(role)
        for name in names:
            if name in available:
                return name
        if not names:
            raise InputError(
                f"data set {self.name}: `columns` in dataset_info.json names no column for {role!r}; "
                f"{self.where()} has {', '.join(map(repr, available))}."
            )
        raise InputError(
            f"data set {self.name}: {self.where()} has no column {' or '.join(map(repr, names))}; "
            f"it has {', '.join(map(repr, available))}. Rename it, or name it under `columns` in dataset_info.json."
        )

    def places(self) -> tuple[str, ...]:
        """What `Row.file` counts in."""
        return self.files or (f"hub data set {self.hf_hub_url}",)

    def where(self) -> str:
        return ", ".join(self.places())

    def keeps(self, values: dict[str, Any]) -> bool:
        """Whether a row has the values that `keep_rows` asks for."""
        return not self.keep_rows or all(
            _equal(values.get(column), wanted) for column, wanted in self.keep_rows.items()
        )

    def fingerprint(self) -> str:
        """Changes when a file's path, size or date changes, or the way it is read."""
        files = [Path(file) for file in self.files]
        if not files and self.hf_hub_url and Path(self.hf_hub_url).is_dir():
            files = sorted(path for path in Path(self.hf_hub_url).rglob("*") if path.is_file())
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps([stats, repr(self)], sort_keys=True).encode()).hexdigest()[:16]


class Row(NamedTuple):
    """One row and where it came from."""

    file: int
    """Position in `Source.places()`."""
    line: int
    """From 1: the line on which a row of jsonl, csv or txt begins, else the number of the row."""
    values: dict[str, Any]
    problem: str = ""
    """Why the row cannot be read; `values` are empty then."""


def find_source(name: str, dataset_info: Path, corpus_dir: Path) -> Source:
    """Looks a data set up: files in `corpus_dir` first, then the hub.

    Raises:
        InputError: if the name is unknown, its entry cannot be followed, or there is neither a file nor a hub id.
    """
    entries = _read_dataset_info(dataset_info)
    if name not in entries:
        import difflib

        near = difflib.get_close_matches(name, entries, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(entries)}."
        raise InputError(f"data set {name!r} is not described in {dataset_info}.{hint}")
    entry = _known_keys(entries[name], f"{dataset_info}: entry {name!r}")
    pattern = entry.pop("file_name", None)
    files = _local_files(corpus_dir, pattern) if pattern else ()
    if not files and not entry.get("hf_hub_url"):
        raise InputError(
            f"data set {name}: no file {corpus_dir}/{pattern} (of kind {', '.join(FILE_KINDS)}). "
            f"Put it there, or change corpus_dir (in the steps: CORPUS_DIR) or {dataset_info}."
        )
    return Source(name=name, files=files, looked_for=f"{corpus_dir}/{pattern}" if pattern else "", **entry)


def _read_dataset_info(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist. It describes the data sets; set dataset_dir to its directory."
        ) from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} is not a JSON object of the form {{NAME: {{KEY: VALUE}}}}.")
    return entries


def _known_keys(entry: Any, place: str) -> dict[str, Any]:
    """A copy of an entry with those keys that can be honoured; keys set to nothing go.

    Raises:
        InputError: names the entry and the key that cannot be honoured.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{place} is not a JSON object of the form {{KEY: VALUE}}.")
    entry = {key: value for key, value in entry.items() if value not in (None, False, "")}
    has_place = "hf_hub_url" in entry or "file_name" in entry
    for key in PASSED_OVER if has_place else ():
        entry.pop(key, None)
    known = {"file_name", *Source.__dataclass_fields__} - {"name", "files", "looked_for"}
    for inside, keys in (("", known), ("columns", set(KNOWN_COLUMNS)), ("tags", set(DEFAULT_TAGS))):
        given = entry.get(inside, {}) if inside else entry
        for key in given if isinstance(given, dict) else ():
            if key not in keys and given[key]:
                where = f"key {key!r}" + (f" under `{inside}`" if inside else "")
                raise InputError(
                    f"{place} has the {where}, which cannot be honoured. Known: {', '.join(sorted(keys))}."
                )
    if not has_place:
        raise InputError(f"{place} names neither file_name nor hf_hub_url: there is nothing to read.")
    for key, value in entry.items():
        kind: type = int if key == "num_samples" else dict if key in ("columns", "tags", "keep_rows") else str
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            raise InputError(f"{place}: {key} is {value!r}; it must be {KINDS[kind]}.")
    if entry.get("formatting", "alpaca") not in FORMATTINGS:
        raise InputError(f"{place}: formatting {entry['formatting']!r} is unknown; use {' or '.join(FORMATTINGS)}.")
    return entry


def _local_files(corpus_dir: Path, file_name: str) -> tuple[str, ...]:
    """Files that a file, a directory or a pattern names, in order of their names."""
    place = corpus_dir / file_name
    if place.is_dir():
        found = [str(path) for path in place.iterdir()]
    elif place.is_file():
        found = [str(place)]
    else:
        found = glob.glob(os.path.join(glob.escape(str(corpus_dir)), file_name), recursive=True)
    return tuple(sorted(path for path in found if Path(path).suffix in FILE_KINDS))


def read_rows(source: Source) -> Iterator[Row]:
    """Yields the rows of a source one by one, those that cannot be read too; memory does not grow with its size.

    Raises:
        InputError: if a file cannot be read, is not UTF-8, is damaged as a whole, or if there is no row.
    """
    empty = True
    for row in _rows_of_files(source) if source.files else _rows_of_hub(source):
        empty = False
        yield row
    if empty:
        raise InputError(
            f"data set {source.name}: {source.where()} is empty. Put text into it, or leave it out of the mix."
        )


def _equal(value: Any, wanted: Any) -> bool:
    return value == wanted or str(value) == str(wanted)  # csv knows only text


def read_texts(source: Source) -> Iterator[str]:
    """Yields the documents of a text corpus: its `prompt` column, empty ones left out.

    Raises:
        InputError: as `read_rows`; also at the first row that cannot be read, lacks the column or holds no text in it.
    """
    for row in read_rows(source):
        place = f"data set {source.name}: {source.places()[row.file]}, line {row.line},"
        if row.problem:
            raise InputError(f"{place} {row.problem}.")
        if not source.keeps(row.values):
            continue
        column = source.column("prompt", row.values)
        text = row.values[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(f"{place} holds no text in {column!r}.")
        if has_half_character(text):
            raise InputError(f"{place} holds half a character (a lone surrogate) in {column!r}.")
        if text.strip():
            yield text


def has_half_character(text: str) -> bool:
    """Whether a text holds a lone surrogate, which JSON can say but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _rows_of_files(source: Source) -> Iterator[Row]:
    readers = {
        ".parquet": _read_parquet,
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".txt": _read_text,
    }
    for number, file in enumerate(map(Path, source.files)):
        try:
            for line, values in readers[file.suffix](file):
                yield Row(number, line, {}, values) if isinstance(values, str) else Row(number, line, values)
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text ({error}). Convert it: iconv -f ENCODING -t UTF-8.") from error
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}.") from error


# Each reader yields the line (or number) of a row and its values, or a string: why they cannot be read.
Numbered = Iterator[tuple[int, dict[str, Any] | str]]


def _read_parquet(file: Path) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        # Read in pieces: a file may be a single row group. One column holds nearly all of a row, so more threads would
        # only take cores from the tokenizer.
        content = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        batches = content.iter_batches(batch_size=256, use_threads=False)
        yield from enumerate((values for batch in batches for values in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} is not a readable parquet file: {error}. Fetch or make it again.") from error


def _read_json_lines(file: Path) -> Numbered:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, _as_object(json.loads(line))
                except json.JSONDecodeError as error:
                    yield number, f"is not valid JSON: {error.msg} at character {error.pos + 1}"
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
                    yield number, f"is not usable JSON: {error}"


def _as_object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"is not a JSON object but {type(value).__name__}"


def _read_json(file: Path) -> Numbered:
    """Reads one array of objects, piece by piece, or JSON lines under the name .json."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    size = 1 << 20
    with file.open(encoding="utf-8-sig") as stream:
        buffer = stream.read(size).lstrip()
        if not buffer.startswith("["):
            yield from _read_json_lines(file)
            return
        number, place = 0, 1
        while True:
            place = between.match(buffer, place).end()  # type: ignore[union-attr]  # it matches nothing too
            if buffer.startswith("]", place):
                return
            try:
                value, place = decoder.raw_decode(buffer, place)
            except (ValueError, RecursionError) as error:
                more = stream.read(max(size, len(buffer) - place))
                if not more:
                    problem = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise InputError(
                        f"{file}, behind row {number}, is not valid JSON near {buffer[place : place + 60]!r}: {problem}."
                    ) from error
                buffer, place = buffer[place:] + more, 0
                continue
            number += 1
            yield number, _as_object(value)


def _read_csv(file: Path) -> Numbered:
    csv.field_size_limit(sys.maxsize)  # a document is longer than the 128 kB that are usual
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) > len(header):
                    yield line, f"has {len(cells)} cells where the header has {len(header)}"
                elif cells:
                    yield line, dict.fromkeys(header) | dict(zip(header, cells, strict=False))
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}, is not valid CSV: {error}.") from error


def _read_text(file: Path) -> Numbered:
    """A plain text file is one document per block of lines, blocks being separated by an empty line."""
    block: list[str] = []
    number = 0
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                block.append(line.rstrip("\n"))
            elif block:
                yield number - len(block), {"text": "\n".join(block)}
                block = []
    if block:
        yield number - len(block) + 1, {"text": "\n".join(block)}


def _rows_of_hub(source: Source) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(
            source.hf_hub_url, name=source.subset, data_dir=source.folder, split=source.split, streaming=True
        )
        for number, values in enumerate(rows, start=1):
            yield Row(0, number, values)
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        missing = f"there is no file {source.looked_for}, and " if source.looked_for else ""
        raise InputError(
            f"data set {source.name}: {missing}the hub data set {source.hf_hub_url} cannot be loaded "
            f"({type(error).__name__}: {error}). Check the network, or put a file of that name into corpus_dir "
            "(in the steps: CORPUS_DIR)."
        ) from error


def text_hash(data: bytes) -> int:
    """A number from 0 to below 2**64 that depends on a document's UTF-8 alone."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share: decided by its text alone, so every step decides alike."""
    return text_hash(text.encode()) < share * 2**64
