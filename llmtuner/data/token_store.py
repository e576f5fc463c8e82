"""Token ids and labels of a data set, read in place from the Arrow file that examples.py makes."""

import bisect
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import pyarrow

from llmtuner.data.template import Ids

SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),  # empty for documents, whose labels are their ids
        ("bytes", pyarrow.int32()),  # UTF-8, of the text or of all contents
        ("hash", pyarrow.uint64()),  # of the text, or of the messages as JSON
        ("file", pyarrow.int32()),
        ("line", pyarrow.int64()),
    ]
)


class TokenStore:
    """Rows of token ids in an Arrow file that is mapped, not read: a row is a view into the file.

    Another process gets the path and maps the file itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = numpy.cumsum([0] + [batch.num_rows for batch in batches]).tolist()
        self._lists = {
            name: [_offsets_and_values(batch[name]) for batch in batches] for name in ("input_ids", "labels")
        }
        self._numbers = {name: [batch[name].to_numpy() for batch in batches] for name in SCHEMA.names[2:]}

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def lengths(self) -> numpy.ndarray:
        """Tokens of each row, int64."""
        parts = [numpy.diff(offsets) for offsets, _ in self._lists["input_ids"]]
        return numpy.concatenate([numpy.zeros(0, numpy.int64), *parts]).astype(numpy.int64)

    def ids(self, row: int) -> Ids:
        """Token ids of a row: int32, a view that cannot be written to."""
        return self._view("input_ids", row)

    def labels(self, row: int) -> Ids:
        """Labels of a row, aligned with its ids; none for a document."""
        return self._view("labels", row)

    def column(self, name: str) -> numpy.ndarray:
        """`bytes`, `hash`, `file` or `line` of all rows."""
        empty = numpy.zeros(0, SCHEMA.field(name).type.to_pandas_dtype())
        return numpy.concatenate([empty, *self._numbers[name]])

    def _view(self, name: str, row: int) -> Ids:
        batch, place = self.locate(row)
        offsets, values = self._lists[name][batch]
        return values[offsets[place] : offsets[place + 1]]

    def locate(self, row: int) -> tuple[int, int]:
        """The record batch of a row and its place there.

        Raises:
            IndexError: if there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        batch = bisect.bisect_right(self._starts, row) - 1
        return batch, row - self._starts[batch]

    def value(self, name: str, row: int) -> int:
        """`bytes`, `hash`, `file` or `line` of one row."""
        batch, place = self.locate(row)
        return int(self._numbers[name][batch][place])


def _offsets_and_values(lists: pyarrow.ListArray) -> tuple[numpy.ndarray, numpy.ndarray]:
    return lists.offsets.to_numpy(), lists.values.to_numpy()


@dataclass(frozen=True)
class TokenizedDataset:
    """One tokenized data set, read in place from disk."""

    name: str
    store: TokenStore
    locations: tuple[str, ...]
    """Files (or the hub's data set) that the column `file` counts in."""
    counts: dict[str, int]
    """Rows read, filtered (by row_filter), rejected, empty, kept, duplicates (kept too); tokens and bytes of those kept."""
    directory: Path
    """Holds tokens.arrow, metadata.json, invalid_rows.jsonl."""

    def __len__(self) -> int:
        return len(self.store)

    def source_of(self, row: int) -> str:
        """Where a row was read, such as `ja_wiki.train.jsonl, line 17`."""
        return f"{self.locations[self.store.value('file', row)]}, line {self.store.value('line', row)}"

    def split(self, val_size: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Row numbers, int64, of what is trained on and what is held out; rows of the same text stay together.

        Args:
            val_size: below 1 a share of the texts, chosen as `is_validation` does; from 1 the number of rows (those of the
                smallest hash, and their duplicates); 0 holds none out.
        """
        hashes = self.store.column("hash")
        if val_size < 1:
            held_out = hashes < numpy.uint64(math.ceil(val_size * 2**64))
        else:
            last = min(int(val_size), len(hashes)) - 1
            held_out = hashes <= numpy.partition(hashes, last)[last]
        return numpy.flatnonzero(~held_out), numpy.flatnonzero(held_out)
