"""Reads and writes checkpoints tensor by tensor, with a few megabytes of the weights in memory at a time.

A checkpoint is opened as a list of `LazyTensor`s: names, shapes and dtypes, without the values. Everything that can be
wrong with these is found before anything is written.
"""

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import torch

from llmtuner.console import UserError, progress
from llmtuner.model.model_dir import DTYPES, abbreviate, check_not_quantized, read_json, read_safetensors_header

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

CHUNK_BYTES = 2**23
MAX_SHARD_BYTES = 2_000_000_000
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
EmbeddingKind = Literal["input", "output", "tied"]
LICENSE_FILES = ("MODEL_LICENSE", "LICENSE")  # derived weights keep the licence of the original


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory, and a function that reads some of its rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], torch.Tensor]
    """(start, stop) -> the rows [start, stop) along dimension 0"""
    source: str
    """Where it is read from, for error messages."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slice_rows(self, start: int, stop: int, name: str | None = None) -> "LazyTensor":
        """The rows [start, stop) along dimension 0, optionally under another name."""

        def read_rows(first: int, end: int) -> torch.Tensor:
            return self.read_rows(start + first, start + end)

        shape = (stop - start, *self.shape[1:])
        return LazyTensor(name or self.name, shape, self.dtype, read_rows, self.source)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yields all rows in order, about `CHUNK_BYTES` at a time."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield self.read_rows(start, min(start + step, self.shape[0]))


def in_memory(name: str, tensor: torch.Tensor) -> LazyTensor:
    """Wraps a tensor that is already in memory."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop], name)


def concatenate(name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
    """Concatenates tensors of the same width and dtype along dimension 0."""

    def read_rows(start: int, stop: int) -> torch.Tensor:
        chunks, first = [], 0
        for part in parts:
            end = first + part.shape[0]
            if first < stop and start < end:
                chunks.append(part.read_rows(max(start, first) - first, min(stop, end) - first))
            first = end
        return torch.cat(chunks)

    num_rows = sum(part.shape[0] for part in parts)
    return LazyTensor(name, (num_rows, *parts[0].shape[1:]), parts[0].dtype, read_rows, parts[0].source)


def tensors_equal(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are bit-identical."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    chunks = zip(a.chunks(), b.chunks(), strict=True)
    return all(torch.equal(*(chunk.contiguous().view(torch.uint8) for chunk in pair)) for pair in chunks)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Limits torch to one thread: on chunks of a few megabytes more threads cost more time than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------- reading
def open_checkpoint(directory: Path) -> dict[str, LazyTensor]:
    """Opens all tensors of a model directory: one file or shards with an index, safetensors or else PyTorch's .bin.

    Raises:
        UserError: if there are no weights, files are missing or damaged, the weights are quantized, or the shards do not
            match the index.
    """
    check_not_quantized(directory)
    in_memory_files: dict[Path, dict[str, torch.Tensor]] = {}
    for file_name, open_file in (
        ("model.safetensors", open_safetensors),
        ("pytorch_model.bin", partial(_open_pytorch_file, in_memory_files=in_memory_files)),
    ):
        if (directory / file_name).is_file():
            return open_file(directory / file_name)
        index = directory / f"{file_name}.index.json"
        if index.is_file():
            return _open_shards(index, open_file)
    raise UserError(
        f"{directory} has no weights: no model.safetensors, pytorch_model.bin, or index (.index.json) of shards. "
        "Download the complete checkpoint."
    )


def _open_shards(index: Path, open_file: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Opens the tensors of all shards and checks every one against the index."""
    directory = index.parent
    weight_map = read_json(index).get("weight_map")
    # A shard lies beside its index: a path could lead out of the directory.
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise UserError(f"{index} has no weight_map from tensors to files beside it. Download it again.")
    missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if missing:
        raise UserError(f"{index} lists files that are missing: {abbreviate(missing)}. Download them.")
    stem, suffix = index.name.removesuffix(".index.json").split(".")
    present = {file.name for file in directory.glob(f"{stem}-*-of-*.{suffix}")}
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(present | set(weight_map.values())):
        found = open_file(directory / file)
        if unexpected := [name for name in found if weight_map.get(name) != file]:
            raise UserError(
                f"{directory / file} contains tensors that {index.name} assigns to another file or does not list: "
                f"{abbreviate(unexpected)}. Download the checkpoint again into an empty directory."
            )
        tensors |= found
    if absent := [name for name in weight_map if name not in tensors]:
        raise UserError(f"{index} lists tensors that are not in its files: {abbreviate(absent)}. Download them again.")
    return tensors


def open_safetensors(file: Path) -> dict[str, LazyTensor]:
    """Opens the tensors of one safetensors file.

    Rows are read from the file, not memory-mapped: mapped pages would count as memory of this process.

    Raises:
        UserError: if the file is missing or damaged, or holds anything but floating-point numbers.
    """
    header, header_bytes = read_safetensors_header(file)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise _not_weights_error(file, name, entry["dtype"])
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        first_byte = 8 + header_bytes + entry["data_offsets"][0]
        read_rows = partial(_read_rows, file, first_byte, shape[1:], dtype)
        tensors[name] = LazyTensor(name, shape, dtype, read_rows, f"{name} in {file}")
    return tensors


def _read_rows(
    file: Path, first_byte: int, row_shape: tuple[int, ...], dtype: torch.dtype, start: int, stop: int
) -> torch.Tensor:
    rows = torch.empty((stop - start, *row_shape), dtype=dtype)
    row_bytes = math.prod(row_shape) * dtype.itemsize
    try:
        with file.open("rb") as opened:
            opened.seek(first_byte + start * row_bytes)
            read = opened.readinto(_as_bytes(rows))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror or error}).") from error
    if read != rows.nbytes:
        raise UserError(f"{file} was truncated while it was being read. Download it again.")
    return rows


def _open_pytorch_file(file: Path, in_memory_files: dict[Path, dict[str, torch.Tensor]]) -> dict[str, LazyTensor]:
    """Opens the tensors of one PyTorch file; `in_memory_files` holds at most one file that cannot be memory-mapped."""

    def read_rows(name: str, start: int, stop: int) -> torch.Tensor:
        return _load_pytorch_file(file, in_memory_files)[name][start:stop]

    tensors = {}
    for name, tensor in _load_pytorch_file(file, in_memory_files).items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise _not_weights_error(file, name, str(getattr(tensor, "dtype", type(tensor).__name__)))
        shape = tuple(tensor.shape)
        tensors[name] = LazyTensor(name, shape, tensor.dtype, partial(read_rows, name), f"{name} in {file}")
    return tensors


def _load_pytorch_file(file: Path, in_memory_files: dict[Path, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Memory-maps a PyTorch file, again at each call so that only the pages in use stay in memory.

    Files written before PyTorch 1.6 are not zip archives and cannot be mapped: they are kept in `in_memory_files`.
    """
    if file in in_memory_files:
        return in_memory_files[file]
    in_memory_files.clear()
    try:
        is_zip = zipfile.is_zipfile(file)
        content = torch.load(file, weights_only=True, mmap=is_zip, map_location="cpu")
    except Exception as error:  # a damaged pickle raises almost anything
        # PyTorch's own message suggests loading the file with its code: it is not repeated here.
        raise UserError(
            f"{file} is damaged or holds more than tensors, such as code, and is not loaded. Download it again, "
            "as safetensors if available."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a dict of tensors. Download the checkpoint again.")
    if not is_zip:
        in_memory_files[file] = content
    return content


def _not_weights_error(file: Path, name: str, kind: str) -> UserError:
    return UserError(
        f"{file}: {name} is {kind}, not a tensor of floating-point weights. "
        "If the checkpoint is quantized, download the one in full precision."
    )


def check_tensors(directory: Path, tensors: dict[str, LazyTensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Makes sure that a checkpoint has exactly the tensors that its config.json implies.

    Args:
        expected: tensor name -> shape

    Raises:
        UserError: lists missing and unexpected tensors and mismatched shapes.
    """
    mismatched = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": mismatched,
    }
    problems = [f"{len(names)} {what}: {abbreviate(names)}" for what, names in found.items() if names]
    if problems:
        raise UserError(
            f"the weights in {directory} do not match its config.json: {'; '.join(problems)}. "
            "Download both again from the same source."
        )


# ------------------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class WriteStats:
    """Size of a written checkpoint."""

    num_tensors: int
    nbytes: int
    num_files: int

    def __str__(self) -> str:
        files = f"{self.num_files} file{'s' * (self.num_files > 1)}"
        return f"{self.num_tensors} tensors, {self.nbytes / 1e9:.3f} GB in {files}"


@dataclass(frozen=True)
class LazyCheckpoint:
    """A model that is not in memory: its configuration, and its tensors under transformers' names."""

    config: "PreTrainedConfig"
    generation_config: "GenerationConfig"
    tensors: list[LazyTensor]
    source: Path
    """The directory that it is read from."""
    embeddings: dict[str, EmbeddingKind]
    """The names of both embedding matrices, or of the only one that serves as input and output ("tied")."""
    alias: str | None = None
    """The name by which transformers knows a tied matrix as the output layer's; no tensor has it."""

    def write(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> WriteStats:
        """Writes the model, and the licence file of its source, into an existing directory.

        Raises:
            UserError: as `write_checkpoint`.
        """
        self.config.save_pretrained(directory)
        self.generation_config.save_pretrained(directory)
        for name in LICENSE_FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, directory / name)
        return write_checkpoint(self.tensors, directory, max_shard_bytes)


def write_checkpoint(
    tensors: Sequence[LazyTensor], directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> WriteStats:
    """Writes model.safetensors, or numbered shards with an index, as transformers names them.

    The safetensors library needs all tensors of a file in memory at once; this writer needs a few megabytes.

    Raises:
        UserError: if the disk is too small, a tensor contains NaN or infinity, or a tensor changed since it was opened.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(directory).free
    if total > free:
        raise UserError(
            f"the weights need {total / 1e9:.3f} GB, but {directory.parent} has {free / 1e9:.3f} GB free. "
            "Free some space or write to another disk."
        )
    shards = _split_into_shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    with single_threaded():
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= {tensor.name: name for tensor in shard}
            with (directory / name).open("wb") as file:
                file.write(_build_header(shard))
                for tensor in progress(shard, name, unit="tensor"):
                    _write_tensor(file, tensor)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return WriteStats(len(tensors), total, len(shards))


def _split_into_shards(tensors: Sequence[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    """Splits tensors into files in order; only a single tensor that is larger makes a larger file."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    # Wide dtypes first, as the library writes them: every tensor then begins at a multiple of its item size, which
    # programs that memory-map the file may rely on.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _build_header(tensors: Sequence[LazyTensor]) -> bytes:
    """The header of a safetensors file: its length in 8 bytes, then JSON padded with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.nbytes]
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, tensor: LazyTensor) -> None:
    num_rows = 0
    for chunk in tensor.chunks():
        if chunk.dtype != tensor.dtype or chunk.shape[1:] != tensor.shape[1:]:
            raise UserError(f"{tensor.source} changed since it was opened. Do not modify the files meanwhile.")
        smallest, largest = torch.aminmax(chunk)  # NaN propagates; unlike isfinite it makes no copy
        if not (smallest.isfinite() and largest.isfinite()):
            raise UserError(f"{tensor.source} contains NaN or infinity. The checkpoint is damaged: download it again.")
        file.write(_as_bytes(chunk.contiguous()))
        num_rows += chunk.shape[0]
    if num_rows != tensor.shape[0]:
        raise UserError(f"{tensor.source} has {num_rows} rows, not {tensor.shape[0]} as when it was opened.")


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data  # as bytes, since numpy has no bfloat16
