"""Merges what was trained into its base model, from disk to disk: of the weights, memory holds a few megabytes.

A trained adapter is a directory of one of two kinds: LoRA (adapter_config.json, adapter_model.safetensors, as peft writes
them) or plain tensors under the base's names (config.json, model.safetensors).
"""

import hashlib
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtuner.console import UserError
from llmtuner.files import checksum
from llmtuner.outputs import atomic_directory, check_destination, finish_publishing
from llmtuner.tokenizer.fast import load_tokenizer, save_tokenizer
from llmtuner.weights.lazy_checkpoint import LazyTensor, open_checkpoint, open_safetensors, read_json
from llmtuner.weights.resize_embeddings import EMBEDDING_WEIGHTS, open_model

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    "special_tokens_map.json",
)
PEFT_PREFIX = "base_model.model."
MERGED_ADAPTER = "merged_adapter"  # key of adapter_config.json: which adapter create_new_adapter merged into the base
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TRAINABLE_TOKENS = ".token_adapter.trainable_tokens_delta"
# Whatever of this is set makes another sum than the one formed here, or another base than the one on disk.
UNSUPPORTED_KEYS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}


def merge_adapter(
    base: Path, adapter: Path | None, destination: Path, max_shard_gb: int = 2, overwrite: bool = False
) -> None:
    """Adds an adapter to its base and saves a plain model with tokenizer, loadable without peft.

    Without an adapter the base is written as it is, such as the output of finetuning_type full.

    Sums are formed in fp32 and stored in the base's dtype. If the adapter was trained on a grown model and holds both of
    its embedding matrices, the base grows to their size, and its tokenizer is the adapter's.

    Args:
        base: a Glm checkpoint, or ChatGLM3 as published.
        max_shard_gb: largest size of one file, in GB.
        overwrite: whether an older result in `destination` may be replaced.

    Raises:
        UserError: as `atomic_directory`; if the adapter does not belong to this base, says of itself what cannot be
            merged, or is not complete.
    """
    for source in (base, adapter) if adapter else (base,):
        if source.resolve().is_relative_to(destination.resolve()):
            raise UserError(f"writing {destination} would delete {source}. Write to a directory of its own.")
    check_destination(destination, overwrite)
    if adapter:
        finish_publishing(adapter)
    checkpoint = open_model(base)
    old = {tensor.name: tensor for tensor in checkpoint.tensors}
    merged: dict[str, LazyTensor] = {}
    for part in _adapter_chain(adapter) if adapter else ():
        trained = _lora_weights if (part / "adapter_config.json").is_file() else _full_weights
        below = old | merged
        changes = trained(part, below)
        for name, tensor in changes.items():
            _check_shape(part, below[name], tensor)
        merged |= changes
    adapter = adapter or base
    rows = _merged_vocab_size(merged, checkpoint.config.vocab_size, adapter)
    has_tokenizer = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = adapter if has_tokenizer else base
    ids = len(load_tokenizer(tokenizer))
    if ids > rows or (rows > checkpoint.config.vocab_size and not has_tokenizer):
        raise UserError(
            f"the tokenizer in {tokenizer} has {ids:,} ids, the model {rows:,} embedding rows: the adapter {adapter} was "
            "trained on a grown model. Grow the base first (step3_resize_model.py), or name the grown model as base."
        )
    checkpoint.config.vocab_size = rows
    tensors = [merged.get(tensor.name, tensor) for tensor in checkpoint.tensors]
    made_from = {str(base): checksum(base), str(adapter): checksum(adapter)}
    with atomic_directory(destination, replace=overwrite, made_from=made_from) as partial:
        replace(checkpoint, tensors=tensors).write(partial, max_shard_gb * 10**9)
        copy_tokenizer(tokenizer, partial)


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies the tokenizer of a model directory, if it has one; it is made from a lone tokenizer.model."""
    if (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file():
        save_tokenizer(source / "tokenizer.model", destination)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)


# ------------------------------------------------------------------------------------------------------- what has changed
def _adapter_chain(adapter: Path) -> list[Path]:
    """The adapters to merge, in order: first the one that was merged into the base before this one was trained."""
    config = read_json(adapter / "adapter_config.json") if (adapter / "adapter_config.json").is_file() else {}
    if not config.get(MERGED_ADAPTER):
        return [adapter]
    earlier = Path(config[MERGED_ADAPTER]["path"])
    if not (earlier / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{adapter} was trained on its base with the adapter {earlier} merged into it (create_new_adapter), and that "
            "is no longer there. Put it back."
        )
    if adapter_checksum(earlier) != config[MERGED_ADAPTER]["sha256"]:
        raise UserError(
            f"{adapter} was trained on its base with the adapter {earlier} merged into it (create_new_adapter), and that "
            "has changed since. Put the former one back, or train again."
        )
    return [earlier, adapter]


def adapter_checksum(adapter: Path) -> str:
    """The SHA-256 of a LoRA adapter's weights.

    Raises:
        UserError: if there are none.
    """
    file = adapter / "adapter_model.safetensors"
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{adapter} holds no LoRA adapter: cannot read {file.name} ({error.strerror}).") from error


def _full_weights(adapter: Path, old: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The base's tensors that a run without LoRA trained."""
    if not (adapter / "config.json").is_file():
        checkpoints = sorted(adapter.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = "; a run that was stopped has only checkpoints: go on with it, or merge " if checkpoints else ""
        raise UserError(
            f"{adapter} holds no trained adapter (adapter_config.json or config.json){hint}{''.join(map(str, checkpoints[-1:]))}."
        )
    tensors = open_checkpoint(adapter)
    # A checkpoint of a run holds frozen tensors too, in the precision in which they were computed with; trained ones are
    # in fp32.
    in_fp32 = {name: tensor for name, tensor in tensors.items() if tensor.dtype.itemsize == 4}
    return {name: _replace_tensor(adapter, old, name, tensor) for name, tensor in (in_fp32 or tensors).items()}


def _lora_weights(adapter: Path, old: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The base's tensors that a LoRA adapter changes, and those that it holds in full or in some rows."""
    config = _read_lora_config(adapter)
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{adapter} has an adapter_config.json, but no {file.name}. Make or fetch it again.")
    merged: dict[str, LazyTensor] = {}
    layers: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for key, tensor in open_safetensors(file).items():
        name = key.removeprefix(PEFT_PREFIX)
        ending = next((one for one in (LORA_A, LORA_B, MAGNITUDE, TRAINABLE_TOKENS) if name.endswith(one)), None)
        if ending is None:
            merged[name] = _replace_tensor(adapter, old, name, tensor)
        else:
            layers[name.removesuffix(ending)][ending] = tensor
    whole = {LORA_A, LORA_B, MAGNITUDE} if config.get("use_dora") else {LORA_A, LORA_B}
    for layer, parts in layers.items():
        weight = _base_tensor(adapter, old, f"{layer}.weight", next(iter(parts.values())))
        if parts.keys() == {TRAINABLE_TOKENS}:
            merged[weight.name] = _apply_token_rows(
                adapter, weight, parts[TRAINABLE_TOKENS], config.get("trainable_token_indices")
            )
        elif parts.keys() == whole:
            merged[weight.name] = _apply_lora(adapter, weight, parts, config)
        else:
            raise _mismatch_error(adapter, f"of {layer} it holds {', '.join(parts)}, not {', '.join(sorted(whole))}")
    return merged


def _read_lora_config(adapter: Path) -> dict[str, Any]:
    """What an adapter says of itself, once it is known that nothing in it needs another sum."""
    file = adapter / "adapter_config.json"
    config = read_json(file)
    unsupported = [key for key in UNSUPPORTED_KEYS if config.get(key)]
    unsupported += [key for key, values in SUPPORTED_VALUES.items() if config.get(key, values[0]) not in values]
    if unsupported:
        named = ", ".join(f"{key} {config[key]!r}" for key in unsupported)
        raise UserError(f"{file}: {named} cannot be merged here. Merge it with the program that trained it.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise UserError(f"{file}: {key} is {config.get(key)!r}, not a positive number. Make or fetch it again.")
    return config


def _base_tensor(adapter: Path, old: dict[str, LazyTensor], name: str, part: LazyTensor) -> LazyTensor:
    if name not in old:
        raise UserError(
            f"{part.source} belongs to no tensor of the model. Merge {adapter} into the model it was trained on."
        )
    return old[name]


def _replace_tensor(adapter: Path, old: dict[str, LazyTensor], name: str, new: LazyTensor) -> LazyTensor:
    """A tensor that was trained in full."""
    dtype = _base_tensor(adapter, old, name, new).dtype
    return LazyTensor(name, new.shape, dtype, lambda start, stop: new.read_rows(start, stop).to(dtype), new.source)


def _apply_token_rows(adapter: Path, old: LazyTensor, new: LazyTensor, indices: Any) -> LazyTensor:
    """A matrix [rows, width] of which only the rows `indices` were trained: new [len(indices), width]."""
    layer = old.name.removesuffix(".weight")
    named = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    places = next((rows for name, rows in named.items() if f".{layer}".endswith(f".{name}")), None)
    if not isinstance(places, list) or new.shape != (len(places), *old.shape[1:]):
        raise _mismatch_error(adapter, f"trained rows of {layer} are {list(new.shape)}, trainable_token_indices differ")
    outside = [row for row in places if not (isinstance(row, int) and 0 <= row < old.shape[0])]
    if outside:
        how = f"it trained row {outside[0]} of {layer}, which has {old.shape[0]}; grow the base first"
        raise _mismatch_error(adapter, f"{how} (step3_resize_model.py)")

    def read_rows(start: int, stop: int) -> Any:
        rows = old.read_rows(start, stop).clone()
        for number, row in enumerate(places):
            if start <= row < stop:
                rows[row - start] = new.read_rows(number, number + 1)[0].to(rows.dtype)
        return rows

    return replace(old, read_rows=read_rows, source=f"{old.source} with {new.source}")


def _apply_lora(adapter: Path, old: LazyTensor, parts: dict[str, LazyTensor], config: dict[str, Any]) -> LazyTensor:
    """W + s B A, for weights W [out, in], A [r, in], B [out, r]; DoRA scales each row to the length `magnitude` [out]."""
    down, up, magnitude = parts[LORA_A], parts[LORA_B], parts.get(MAGNITUDE)
    layer, rank = old.name.removesuffix(".weight"), config["r"]
    outputs, inputs = old.shape[0], old.shape[-1]
    expected = {LORA_A: (rank, inputs), LORA_B: (outputs, rank), MAGNITUDE: (outputs,)}
    for ending, part in parts.items():
        if part.shape != expected[ending] or len(old.shape) != 2:
            raise _mismatch_error(
                adapter,
                f"{ending.split('.')[1]} of {layer} is {list(part.shape)}, not {list(expected[ending])}: the layer has "
                f"{inputs} inputs and {outputs} outputs, the adapter rank {rank}",
            )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)

    def read_rows(start: int, stop: int) -> Any:
        weight = old.read_rows(start, stop).float()
        weight.addmm_(up.read_rows(start, stop).float(), down.read_rows(0, rank).float(), alpha=scale)
        if magnitude is not None:
            weight *= (magnitude.read_rows(start, stop).float() / weight.norm(dim=1)).unsqueeze(1)
        return weight.to(old.dtype)

    return replace(old, read_rows=read_rows, source=f"{old.source} with {down.source}")


def _check_shape(adapter: Path, old: LazyTensor, new: LazyTensor) -> None:
    """A tensor keeps its shape; only embedding matrices may have more rows."""
    grown = old.name in EMBEDDING_WEIGHTS and new.shape[0] > old.shape[0]
    if new.shape != old.shape and not (grown and new.shape[1:] == old.shape[1:]):
        raise _mismatch_error(adapter, f"{old.name} is {list(new.shape)}, the model's {list(old.shape)}")


def _merged_vocab_size(merged: dict[str, LazyTensor], old_rows: int, adapter: Path) -> int:
    """Embedding rows after the merge."""
    input_rows, output_rows = (merged[name].shape[0] if name in merged else old_rows for name in EMBEDDING_WEIGHTS)
    if input_rows != output_rows:
        raise _mismatch_error(
            adapter,
            f"{input_rows:,} input and {output_rows:,} output rows; grow the base first (step3_resize_model.py)",
        )
    return input_rows


def _mismatch_error(adapter: Path, how: str) -> UserError:
    return UserError(f"the adapter {adapter} does not fit the model: {how}. Merge it into the model it was trained on.")
