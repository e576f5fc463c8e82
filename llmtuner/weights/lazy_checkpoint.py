"""Checkpoints on disk, tensor by tensor: reading what a directory holds and writing safetensors as a stream.

A checkpoint is first a plan: names, shapes and dtypes, known without reading a weight. Everything that can be wrong with
them is found before anything is written, and memory never holds more than a few megabytes of the weights.
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
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from llmtuner.console import UserError, progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

CHUNK_BYTES = 2**23
MAX_SHARD_BYTES = 2_000_000_000
# Weights are floating-point numbers; integers would be those of a quantized checkpoint.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory: what is known of it, and how to read some of its rows."""

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
        """The part [start, stop) along dimension 0, under a name of its own if one is given."""

        def read_rows(first: int, end: int) -> torch.Tensor:
            return self.read_rows(start + first, start + end)

        shape = (stop - start, *self.shape[1:])
        return LazyTensor(name or self.name, shape, self.dtype, read_rows, self.source)

    def chunks(self) -> Iterator[torch.Tensor]:
        """All rows in order, about `CHUNK_BYTES` at a time."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield self.read_rows(start, min(start + step, self.shape[0]))


def in_memory(name: str, tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is in memory already, as part of a plan."""
    return LazyTensor(name, tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop], name)


def concatenate(name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
    """The rows of several tensors of one width and dtype below each other."""

    def read_rows(start: int, stop: int) -> torch.Tensor:
        pieces, first = [], 0
        for part in parts:
            end = first + part.shape[0]
            if first < stop and start < end:
                pieces.append(part.read_rows(max(start, first) - first, min(stop, end) - first))
            first = end
        return torch.cat(pieces)

    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(name, (rows, *parts[0].shape[1:]), parts[0].dtype, read_rows, parts[0].source)


# ------------------------------------------------------------------------------------------------------------- reading
def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object. Fetch it again.")
    return content


def open_checkpoint(directory: Path) -> dict[str, LazyTensor]:
    """All tensors of a model directory by name: one file or shards with an index; safetensors, or else PyTorch's .bin.

    Raises:
        UserError: if there are no weights, files are missing or damaged, the weights are quantized, or the shards are not what
            the index says.
    """
    check_not_quantized(directory)
    pickles: dict[Path, dict[str, torch.Tensor]] = {}
    for file_name, open_file in (
        ("model.safetensors", open_safetensors),
        ("pytorch_model.bin", partial(_open_pytorch_file, loaded=pickles)),
    ):
        if (directory / file_name).is_file():
            return open_file(directory / file_name)
        index = directory / f"{file_name}.index.json"
        if index.is_file():
            return _open_shards(index, open_file)
    raise UserError(
        f"{directory} holds no weights: no model.safetensors, pytorch_model.bin, or index (.index.json) of shards. "
        "Fetch the whole checkpoint."
    )


def check_weight_files(directory: Path) -> None:
    """Reads the headers of a model's safetensors files, so that a damaged one is named before anything heavy is done.

    Raises:
        UserError: if a file that the index names is missing, or one is damaged or cut off.
    """
    index = directory / "model.safetensors.index.json"
    named = read_json(index).get("weight_map") if index.is_file() else None
    files = (
        set(named.values()) if isinstance(named, dict) else {file.name for file in directory.glob("model*.safetensors")}
    )
    if missing := sorted(name for name in files if not (directory / name).is_file()):
        raise UserError(f"{index} names files that are not there: {_list_names(missing)}. Fetch them.")
    for name in sorted(files):
        _read_header(directory / name)


def check_not_quantized(directory: Path) -> None:
    """Makes sure that a model's weights are numbers that can be trained, grown or merged.

    Raises:
        UserError: if config.json or the weights say that it is quantized.
    """
    config = directory / "config.json"
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    reason = f"config.json has a quantization_config ({_quant_method(quantization)})" if quantization else None
    for file in sorted(directory.glob("model*.safetensors")):
        for name, entry in _read_header(file)[0].items():
            # Masks and positions may be integers, weights may not.
            if name.endswith("weight") and entry["dtype"] not in DTYPES:
                reason = reason or f"{name} in {file.name} is {entry['dtype']}"
    if reason:
        raise UserError(
            f"the model in {directory} is quantized: {reason}. Its weights are codes, not numbers that can be trained, "
            "grown or merged. Take the checkpoint in full or half precision."
        )


def _quant_method(quantization: Any) -> str:
    return str(
        quantization.get("quant_method", "of an unnamed method") if isinstance(quantization, dict) else quantization
    )


def _open_shards(index: Path, open_file: Callable[[Path], dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The tensors of all shards, once index and shards are known to agree about every one of them."""
    directory = index.parent
    places = read_json(index).get("weight_map")
    # A shard lies beside its index: a path could lead out of the directory.
    if not isinstance(places, dict) or not all(
        isinstance(one, str) and Path(one).name == one for one in places.values()
    ):
        raise UserError(f"{index} has no weight_map from tensors to files beside it. Fetch it again.")
    missing = sorted({file for file in places.values() if not (directory / file).is_file()})
    if missing:
        raise UserError(f"{index} names files that are not there: {_list_names(missing)}. Fetch them.")
    stem, ending = index.name.removesuffix(".index.json").split(".")
    present = {file.name for file in directory.glob(f"{stem}-*-of-*.{ending}")}
    tensors: dict[str, LazyTensor] = {}
    for file in sorted(present | set(places.values())):
        found = open_file(directory / file)
        strangers = [name for name in found if places.get(name) != file]
        if strangers:
            raise UserError(
                f"{directory / file} holds tensors that {index.name} places elsewhere or not at all: "
                f"{_list_names(strangers)}. Fetch the checkpoint again into an empty directory."
            )
        tensors |= found
    absent = [name for name in places if name not in tensors]
    if absent:
        raise UserError(f"{index} names tensors that its files do not hold: {_list_names(absent)}. Fetch them again.")
    return tensors


def open_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file.

    Rows are read from the file, not mapped into memory: mapped pages would count as memory of this process.

    Raises:
        UserError: if it is missing or damaged, or holds anything but floating-point numbers.
    """
    header, header_bytes = _read_header(file)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise _not_weights_error(file, name, entry["dtype"])
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        first_byte = 8 + header_bytes + entry["data_offsets"][0]
        read_rows = partial(_read_rows, file, first_byte, shape[1:], dtype)
        tensors[name] = LazyTensor(name, shape, dtype, read_rows, f"{name} in {file}")
    return tensors


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file by tensor, and the bytes that they take."""
    try:
        with safe_open(file, framework="pt"):  # the library judges header, offsets and length
            pass
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or cut off ({error}). Fetch or make it again.") from error
    header.pop("__metadata__", None)
    return header, header_bytes


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
        raise UserError(f"{file} became shorter while it was read. Fetch it again.")
    return rows


def _open_pytorch_file(file: Path, loaded: dict[Path, dict[str, torch.Tensor]]) -> dict[str, LazyTensor]:
    """The tensors of one PyTorch file; `loaded` keeps at most one file that has to be held in memory as a whole."""

    def read_rows(name: str, start: int, stop: int) -> torch.Tensor:
        return _load_pytorch_file(file, loaded)[name][start:stop]

    content = _load_pytorch_file(file, loaded)
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise _not_weights_error(file, name, str(getattr(tensor, "dtype", type(tensor).__name__)))
        shape = tuple(tensor.shape)
        tensors[name] = LazyTensor(name, shape, tensor.dtype, partial(read_rows, name), f"{name} in {file}")
    return tensors


def _load_pytorch_file(file: Path, loaded: dict[Path, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What a PyTorch file holds: mapped anew at each call, so that memory holds only what is used, or kept in `loaded`.

    Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
    """
    if file in loaded:
        return loaded[file]
    loaded.clear()
    try:
        mapped = zipfile.is_zipfile(file)
        content = torch.load(file, weights_only=True, mmap=mapped, map_location="cpu")
    except Exception as error:  # a damaged pickle raises almost anything
        # PyTorch's own message proposes to load the file with the code in it: it is not passed on.
        raise UserError(
            f"{file} is damaged or holds more than tensors, such as code, and is not loaded. Fetch it again, "
            "as safetensors if there is a choice."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no tensors by name. Fetch the checkpoint again.")
    if not mapped:
        loaded[file] = content
    return content


def _not_weights_error(file: Path, name: str, kind: str) -> UserError:
    return UserError(
        f"{file}: {name} is {kind}, not a tensor of floating-point weights. "
        "If the checkpoint is quantized, fetch the one in full precision."
    )


def check_tensors(directory: Path, tensors: dict[str, LazyTensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Makes sure that a checkpoint holds exactly the tensors that its config.json promises.

    Raises:
        UserError: lists what is missing, left over or of another shape.
    """
    missing = [name for name in expected if name not in tensors]
    left_over = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    found = (("missing", missing), ("left over", left_over), ("of another shape", misshapen))
    problems = [f"{len(names)} {what}: {_list_names(names)}" for what, names in found if names]
    if problems:
        raise UserError(
            f"the weights in {directory} are not those of its config.json: {'; '.join(problems)}. "
            "Fetch both again from one place."
        )


def _list_names(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ------------------------------------------------------------------------------------------------------------- writing
@dataclass(frozen=True)
class WriteStats:
    """What was written."""

    num_tensors: int
    nbytes: int
    num_files: int

    def __str__(self) -> str:
        return f"{self.num_tensors} tensors, {self.nbytes / 1e9:.3f} GB in {self.num_files} file{'s' * (self.num_files > 1)}"


LICENSE_FILES = ("MODEL_LICENSE", "LICENSE")  # weights that descend from others stay under theirs


@dataclass(frozen=True)
class LazyCheckpoint:
    """A model that is not in memory: its configuration, and its tensors under transformers' names."""

    config: "PreTrainedConfig"
    generation_config: "GenerationConfig"
    tensors: list[LazyTensor]
    source: Path
    """The directory that it comes from."""

    def write(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> WriteStats:
        """Writes the model, and the licence that lies beside its source, into a directory that exists.

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
    """Writes safetensors files under transformers' names: model.safetensors, or numbered shards with an index.

    The safetensors library wants all tensors of a file in memory at once; this writer holds a few megabytes.

    Raises:
        UserError: if the disk is too small, a tensor holds NaN or infinity, or one is not what was planned.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(directory).free
    if total > free:
        raise UserError(
            f"the weights need {total / 1e9:.3f} GB, but {directory.parent} has {free / 1e9:.3f} GB free. "
            "Make room or write to another disk."
        )
    shards = _split_into_shards(tensors, max_shard_bytes)
    places: dict[str, str] = {}
    with single_threaded():
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            places |= {tensor.name: name for tensor in shard}
            with (directory / name).open("wb") as file:
                file.write(_build_header(shard))
                for tensor in progress(shard, name, unit="tensor"):
                    _write_tensor(file, tensor)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return WriteStats(len(tensors), total, len(shards))


@contextmanager
def single_threaded() -> Iterator[None]:
    """Keeps torch to one thread: looking at a few megabytes takes far less time than waiting for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _split_into_shards(tensors: Sequence[LazyTensor], max_shard_bytes: int) -> list[list[LazyTensor]]:
    """The tensors in order, cut into files; only a tensor that is larger alone makes a file larger."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    # Wide dtypes first, as the library writes them: so every tensor begins at a multiple of its item size, which
    # programs that map the file into memory may count on.
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _build_header(tensors: Sequence[LazyTensor]) -> bytes:
    """The beginning of a safetensors file: length of the JSON text in 8 bytes, and that text, filled up with blanks."""
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
    rows = 0
    for chunk in tensor.chunks():
        if chunk.dtype != tensor.dtype or chunk.shape[1:] != tensor.shape[1:]:
            raise UserError(f"{tensor.source} is not what it was when it was opened. Leave the files alone meanwhile.")
        smallest, largest = torch.aminmax(chunk)  # NaN passes through; unlike isfinite it makes no copy
        if not (smallest.isfinite() and largest.isfinite()):
            raise UserError(f"{tensor.source} holds NaN or infinity. The checkpoint is damaged: fetch it again.")
        file.write(_as_bytes(chunk.contiguous()))
        rows += chunk.shape[0]
    if rows != tensor.shape[0]:
        raise UserError(f"{tensor.source} has {rows} rows, not {tensor.shape[0]} as when it was opened.")


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data  # as bytes, since numpy has no bfloat16
