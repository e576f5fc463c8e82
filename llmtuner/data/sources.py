"""dataset_info.json -> rows: finds a data set's files (or the hub's) and reads them as streams, whatever their kind."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtuner.console import InputError

FILE_KINDS = (".parquet", ".jsonl", ".json", ".csv", ".txt")


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
    formatting: str = "alpaca"
    """`alpaca` (columns prompt, query, response, system, history) or `sharegpt` (a list of messages)."""
    columns: dict[str, Any] = field(default_factory=dict)
    """role of a column -> its name in the files, or a list of names of which the first that exists is taken."""
    tags: dict[str, str] = field(default_factory=dict)
    """Names used inside sharegpt messages: role_tag, content_tag, user_tag, assistant_tag, system_tag."""
    keep_rows: dict[str, Any] = field(default_factory=dict)
    """Only rows with these column values are read."""

    def column(self, role: str, available: Any) -> str:
        """The name of the column that plays `role`, given the names there are.

        Raises:
            InputError: if none of the configured names is there.
        """
        configured = self.columns.get(role, role)
        names = configured if isinstance(configured, list) else [configured]
        for name in names:
            if name in available:
                return name
        raise InputError(
            f"data set {self.name}: {self.where()} has no column {' or '.join(map(repr, names))}; "
            f"it has {', '.join(map(repr, available))}. Rename it, or name it under `columns` in dataset_info.json."
        )

    def where(self) -> str:
        return ", ".join(self.files) if self.files else f"hub data set {self.hf_hub_url}"

    def fingerprint(self) -> str:
        """Changes when a file's path, size or date changes, or the way it is read."""
        stats = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps([stats, repr(self)], sort_keys=True).encode()).hexdigest()[:16]


def find_source(name: str, dataset_info: Path, corpus_dir: Path) -> Source:
    """Looks a data set up: files in `corpus_dir` first, then the hub.

    Raises:
        InputError: if the name is unknown, or there is neither a file nor a hub id.
    """
    entries = _read_dataset_info(dataset_info)
    if name not in entries:
        import difflib

        near = difflib.get_close_matches(name, entries, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(entries)}."
        raise InputError(f"data set {name!r} is not described in {dataset_info}.{hint}")
    entry = dict(entries[name])
    pattern = entry.pop("file_name", None)
    files: tuple[str, ...] = ()
    if pattern:
        files = tuple(sorted(str(path) for path in corpus_dir.glob(pattern) if path.suffix in FILE_KINDS))
    if not files and not entry.get("hf_hub_url"):
        raise InputError(
            f"data set {name}: no file {corpus_dir}/{pattern} (of kind {', '.join(FILE_KINDS)}). "
            f"Put it there, or change CORPUS_DIR or {dataset_info}."
        )
    try:
        return Source(name=name, files=files, looked_for=f"{corpus_dir}/{pattern}" if pattern else "", **entry)
    except TypeError as error:
        raise InputError(f"{dataset_info}: entry {name!r} has an unknown key ({error}).") from error


def _read_dataset_info(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist. It describes the data sets; set dataset_dir to its directory."
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error


def read_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Yields the rows of a source one by one; memory does not grow with its size.

    Raises:
        InputError: if a file cannot be read, is not UTF-8, is damaged, or has no row.
    """
    count = 0
    for row in _rows_of_files(source) if source.files else _rows_of_hub(source):
        count += 1
        if all(_equal(row.get(column), wanted) for column, wanted in source.keep_rows.items()):
            yield row
    if count == 0:
        raise InputError(
            f"data set {source.name}: {source.where()} is empty. Put text into it, or leave it out of the mix."
        )


def _equal(value: Any, wanted: Any) -> bool:
    return value == wanted or str(value) == str(wanted)  # csv knows only text


def read_texts(source: Source) -> Iterator[str]:
    """Yields the documents of a text corpus: its `prompt` column, empty ones left out.

    Raises:
        InputError: as `read_rows`; also if the column is missing or holds something else than text.
    """
    column = None
    for number, row in enumerate(read_rows(source), start=1):
        if column is None or column not in row:
            column = source.column("prompt", list(row))
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(f"data set {source.name}: row {number} of {source.where()} holds no text in {column!r}.")
        if text.strip():
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise InputError(
                    f"data set {source.name}: row {number} of {source.where()} holds half a character (a lone surrogate)."
                )
            yield text


def _rows_of_files(source: Source) -> Iterator[dict[str, Any]]:
    readers = {
        ".parquet": _read_parquet,
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".txt": _read_text,
    }
    for file in map(Path, source.files):
        try:
            yield from readers[file.suffix](file)
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not UTF-8 text ({error}). Convert it: iconv -f ENCODING -t UTF-8.") from error
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}.") from error


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} is not a readable parquet file: {error}. Fetch or make it again.") from error


def _read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{file}, line {number}, is not valid JSON: {error}.") from error


def _read_json(file: Path) -> Iterator[dict[str, Any]]:
    """Reads one array of objects, piece by piece, or JSON lines under the name .json."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8") as stream:
        buffer = stream.read(1 << 20).lstrip()
        if not buffer.startswith("["):
            yield from _read_json_lines(file)
            return
        buffer = buffer[1:]
        while True:
            buffer = buffer.lstrip(" \t\r\n,")
            if buffer.startswith("]"):
                return
            try:
                row, end = decoder.raw_decode(buffer)
            except json.JSONDecodeError as error:
                more = stream.read(max(1 << 20, len(buffer)))
                if not more:
                    raise InputError(f"{file} is not valid JSON near {buffer[:60]!r}: {error.msg}.") from error
                buffer += more
                continue
            buffer = buffer[end:]
            yield row


def _read_csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)


def _read_text(file: Path) -> Iterator[dict[str, Any]]:
    """A plain text file is one document per block of lines, blocks being separated by an empty line."""
    block: list[str] = []
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                block.append(line.rstrip("\n"))
            elif block:
                yield {"text": "\n".join(block)}
                block = []
    if block:
        yield {"text": "\n".join(block)}


def _rows_of_hub(source: Source) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.hf_hub_url, name=source.subset, split=source.split, streaming=True)
    except Exception as error:  # the hub client raises many kinds: offline, not found, gated
        raise InputError(
            f"data set {source.name}: there is no file {source.looked_for}, and the hub data set {source.hf_hub_url} cannot "
            f"be loaded ({type(error).__name__}: {error}). Check the network, or put a file of that name into CORPUS_DIR."
        ) from error
    yield from rows


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share: decided by its text alone, so every step decides alike."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
