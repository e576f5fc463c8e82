"""Tokenized datasets on disk: flat, memory-mapped token ids and an index of the documents in them."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from llmtuner.data.readers import Row
from llmtuner.data.template import Ids

IDS_FILE, LABELS_FILE, INDEX_FILE = "input_ids.bin", "labels.bin", "index.bin"
INDEX_ENTRY = numpy.dtype(
    [
        ("end", "<i8"),  # tokens up to the end of the document
        ("hash", "<u8"),  # of the text, or of the messages as JSON
        ("line", "<i8"),
        ("file", "<i4"),
        ("bytes", "<i4"),  # UTF-8, of the text or of all contents
    ]
)


class TokenStoreWriter(ExitStack):
    """Appends documents to a TokenStore; memory does not grow with its size. To be closed, or used in a `with` statement."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._files = [
            self.enter_context((directory / name).open("wb")) for name in (IDS_FILE, LABELS_FILE, INDEX_FILE)
        ]
        self.num_tokens = 0

    def append(self, rows: list[Row], input_ids: list[Ids], labels: Iterable[Ids]) -> None:
        """Appends one document or dialogue for each row.

        Args:
            labels: none at all for documents, whose labels are their ids.
        """
        index = numpy.empty(len(rows), INDEX_ENTRY)
        index["end"] = self.num_tokens + numpy.cumsum([len(ids) for ids in input_ids])
        index["hash"] = [row.hash for row in rows]
        index["line"] = [row.line for row in rows]
        index["file"] = [row.file for row in rows]
        index["bytes"] = [row.num_bytes for row in rows]
        self.num_tokens = int(index["end"][-1])
        for file, arrays in zip(self._files, (input_ids, labels, [index]), strict=True):
            file.writelines(array.data for array in arrays)


class TokenStore:
    """Token ids and labels of documents, memory-mapped: a document is a view into a file.

    Three flat files, little-endian: all ids and all labels (int32, no labels for documents), and an index entry for each
    document. Another process gets the path and maps the files itself.

    Raises:
        ValueError: if the files do not belong together.
        OSError: if one cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._index = _map(directory / INDEX_FILE, INDEX_ENTRY)
        self._ids, self._labels = (_map(directory / name, numpy.dtype("<i4")) for name in (IDS_FILE, LABELS_FILE))
        num_tokens = int(self._index["end"][-1]) if len(self._index) else 0
        if len(self._ids) != num_tokens or len(self._labels) not in (0, num_tokens):
            raise ValueError(f"{len(self._ids):,} ids and {len(self._labels):,} labels, not {num_tokens:,}")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.directory,)

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def offsets(self) -> numpy.ndarray:
        """int64 [documents + 1]: where each document begins, and the end of the last."""
        return numpy.concatenate([[0], self._index["end"]])

    @property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each document, int64."""
        return numpy.diff(self.offsets)

    def ids(self, row: int) -> Ids:
        """Token ids of a document: int32, read-only.

        Raises:
            IndexError: if there is no such row.
        """
        return self._ids[self._span(row)]

    def labels(self, row: int) -> Ids:
        """Labels of a dialogue, aligned with its ids; empty for a document."""
        return self._labels[self._span(row)]

    def column(self, name: str) -> numpy.ndarray:
        """`bytes`, `hash`, `file` or `line` of all documents, memory-mapped."""
        return self._index[name]

    def _span(self, row: int) -> slice:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return slice(self.offsets[row], self.offsets[row + 1])


def _map(file: Path, dtype: numpy.dtype) -> numpy.ndarray:
    size = file.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{file.name} has {size:,} bytes")
    # Plain arrays are sliced faster than numpy.memmap; empty files cannot be mapped.
    return numpy.memmap(file, dtype, "r").view(numpy.ndarray) if size else numpy.zeros(0, dtype)


@dataclass(frozen=True)
class TokenizedDataset:
    """One tokenized dataset on disk."""

    name: str
    store: TokenStore
    locations: tuple[str, ...]
    """Files (or the hub dataset) that the column `file` refers to."""
    counts: dict[str, int]
    """Rows: `read`, `filtered` (by row_filter), `invalid`, `empty`, `kept`, `duplicates` (kept as well); of those kept,
    `tokens` and `bytes`."""
    directory: Path
    """Contains the store, metadata.json and invalid_rows.jsonl."""

    def __len__(self) -> int:
        return len(self.store)

    def source_of(self, row: int) -> str:
        """Where a row was read, such as `ja_wiki.train.jsonl, line 17`."""
        return f"{self.locations[self.store.column('file')[row]]}, line {self.store.column('line')[row]}"

    def split(self, val_size: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Splits the rows into those to train on and those held out; rows with the same text stay together.

        Args:
            val_size: below 1 a ratio of the texts, chosen as by `is_validation`; from 1 a number of rows (those with the
                smallest hashes, and their duplicates); 0 holds out none.

        Returns:
            Row indices, int64, in order.
        """
        hashes = self.store.column("hash")
        if val_size < 1:
            held_out = hashes < numpy.uint64(math.ceil(val_size * 2**64))
        else:
            last = min(int(val_size), len(hashes)) - 1
            held_out = hashes <= numpy.partition(hashes, last)[last]
        return numpy.flatnonzero(~held_out), numpy.flatnonzero(held_out)
