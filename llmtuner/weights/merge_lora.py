"""Merges an adapter into its base model, from disk to disk: memory holds a few megabytes of the weights.

An adapter is a directory of one of two kinds: LoRA (adapter_config.json, adapter_model.safetensors, as peft writes them) or
fully trained tensors under the base's names (config.json, model.safetensors).
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtuner.console import UserError
from llmtuner.files import checksum
from llmtuner.model.model_dir import MERGED_ADAPTER, adapter_checksum, read_json
from llmtuner.outputs import atomic_directory, check_destination, finish_publishing
from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer
from llmtuner.weights.lazy_checkpoint import (
    LazyCheckpoint,
    LazyTensor,
    open_checkpoint,
    open_safetensors,
    tensors_equal,
)
from llmtuner.weights.resize_embeddings import open_model

PEFT_PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
TRAINABLE_TOKENS = ".token_adapter.trainable_tokens_delta"
# Each of these settings changes the formula of the merge, or the base, from what is implemented here.
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
    """Merges an adapter into its base and saves a plain model with tokenizer, which loads without peft.

    Without an adapter the base is saved unchanged, such as the output of finetuning_type full.

    Sums are computed in fp32 and stored in the base's dtype. If the adapter was trained on a resized model and holds all
    embedding matrices, the base is resized to match, and the adapter's tokenizer is saved.

    Args:
        base: as of `open_model`.
        max_shard_gb: maximum size of a file, in GB.
        overwrite: whether an earlier result in `destination` may be replaced.

    Raises:
        UserError: as `atomic_directory`; if the adapter does not match this base, is incomplete, or has settings that
            cannot be merged.
    """
    for source in (base, adapter) if adapter else (base,):
        if source.resolve().is_relative_to(destination.resolve()):
            raise UserError(f"writing {destination} would delete {source}. Write to a separate directory.")
    check_destination(destination, overwrite)
    if adapter:
        finish_publishing(adapter)
    checkpoint, tokenizer = plan_merge(base, adapter)
    adapter = adapter or base
    made_from = {str(base): checksum(base), str(adapter): checksum(adapter)}
    with atomic_directory(destination, replace=overwrite, made_from=made_from) as partial:
        checkpoint.write(partial, max_shard_gb * 10**9)
        copy_tokenizer(tokenizer, partial)


def plan_merge(base: Path, adapter: Path | None) -> tuple[LazyCheckpoint, Path]:
    """Returns the merged model, of which nothing has been computed yet, and the directory of its tokenizer.

    Raises:
        UserError: if the adapter does not match this base, is incomplete, or has settings that cannot be merged.
    """
    checkpoint = open_model(base)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    for part in _adapter_chain(adapter) if adapter else ():
        read_weights = _lora_weights if (part / "adapter_config.json").is_file() else _full_weights
        merged = read_weights(part, _with_alias(tensors, checkpoint))
        _drop_alias(part, merged, checkpoint)
        for name, tensor in merged.items():
            _check_shape(part, tensors[name], tensor, name in checkpoint.embeddings)
        tensors |= merged
    adapter = adapter or base
    vocab_size = _merged_vocab_size([tensors[name].shape[0] for name in checkpoint.embeddings], adapter)
    has_tokenizer = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = adapter if has_tokenizer else base
    num_ids = len(load_tokenizer(tokenizer))
    if num_ids > vocab_size or (vocab_size > checkpoint.config.vocab_size and not has_tokenizer):
        raise UserError(
            f"the tokenizer in {tokenizer} has {num_ids:,} ids, the model {vocab_size:,} embedding rows: the adapter "
            f"{adapter} was trained on a resized model. Resize the base first (step3_resize_model.py), or use the resized "
            "model as base."
        )
    checkpoint.config.vocab_size = vocab_size
    return replace(checkpoint, tensors=list(tensors.values())), tokenizer


# ------------------------------------------------------------------------------------------------------- merged tensors
def _adapter_chain(adapter: Path) -> list[Path]:
    """The adapters to merge, in order: first the one that was merged into the base before this one was trained."""
    config = read_json(adapter / "adapter_config.json") if (adapter / "adapter_config.json").is_file() else {}
    if not config.get(MERGED_ADAPTER):
        return [adapter]
    earlier = Path(config[MERGED_ADAPTER]["path"])
    trained_on = f"{adapter} was trained on its base with the adapter {earlier} merged into it (create_new_adapter)"
    if not (earlier / "adapter_model.safetensors").is_file():
        raise UserError(f"{trained_on}, and that is missing. Put it back.")
    if adapter_checksum(earlier) != config[MERGED_ADAPTER]["sha256"]:
        raise UserError(f"{trained_on}, and that has changed since. Restore it, or train again.")
    return [earlier, adapter]


def _full_weights(adapter: Path, base: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The base's tensors that a run without LoRA trained."""
    if not (adapter / "config.json").is_file():
        checkpoints = sorted(adapter.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        hint = (
            f"; an interrupted run has only checkpoints: resume it, or merge {checkpoints[-1]}" if checkpoints else ""
        )
        raise UserError(f"{adapter} has no trained adapter (adapter_config.json or config.json){hint}.")
    tensors = open_checkpoint(adapter)
    # A checkpoint of a run also holds frozen tensors, in the compute dtype; trained ones are in fp32.
    in_fp32 = {name: tensor for name, tensor in tensors.items() if tensor.dtype.itemsize == 4}
    return {name: _replace_tensor(adapter, base, name, tensor) for name, tensor in (in_fp32 or tensors).items()}


def _lora_weights(adapter: Path, base: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The base's tensors that a LoRA adapter changes, and those that it holds in full or in some rows."""
    config = _read_lora_config(adapter)
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{adapter} has an adapter_config.json, but no {file.name}. Create or download it again.")
    merged: dict[str, LazyTensor] = {}
    layers: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    for key, tensor in open_safetensors(file).items():
        name = key.removeprefix(PEFT_PREFIX)
        suffix = next((part for part in (LORA_A, LORA_B, MAGNITUDE, TRAINABLE_TOKENS) if name.endswith(part)), None)
        if suffix is None:
            merged[name] = _replace_tensor(adapter, base, name, tensor)
        else:
            layers[name.removesuffix(suffix)][suffix] = tensor
    required = {LORA_A, LORA_B, MAGNITUDE} if config.get("use_dora") else {LORA_A, LORA_B}
    for layer, parts in layers.items():
        weight = _base_tensor(adapter, base, f"{layer}.weight", next(iter(parts.values())))
        if parts.keys() == {TRAINABLE_TOKENS}:
            indices = config.get("trainable_token_indices")
            merged[weight.name] = _apply_token_rows(adapter, weight, parts[TRAINABLE_TOKENS], indices)
        elif parts.keys() == required:
            merged[weight.name] = _apply_lora(adapter, weight, parts, config)
        else:
            raise _mismatch_error(adapter, f"{layer} has {', '.join(parts)}, not {', '.join(sorted(required))}")
    return merged


def _read_lora_config(adapter: Path) -> dict[str, Any]:
    """Reads adapter_config.json and rejects settings that this merge does not implement."""
    file = adapter / "adapter_config.json"
    config = read_json(file)
    unsupported = [key for key in UNSUPPORTED_KEYS if config.get(key)]
    unsupported += [key for key, values in SUPPORTED_VALUES.items() if config.get(key, values[0]) not in values]
    if unsupported:
        settings = ", ".join(f"{key} {config[key]!r}" for key in unsupported)
        raise UserError(f"{file}: {settings} is not supported. Merge it with the program that trained it.")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise UserError(
                f"{file}: {key} is {config.get(key)!r}, not a positive number. Create or download it again."
            )
    return config


def _base_tensor(adapter: Path, base: dict[str, LazyTensor], name: str, part: LazyTensor) -> LazyTensor:
    if name not in base:
        raise UserError(
            f"{part.source} matches no tensor of the model. Merge {adapter} into the model that it was trained on."
        )
    return base[name]


def _replace_tensor(adapter: Path, base: dict[str, LazyTensor], name: str, new: LazyTensor) -> LazyTensor:
    """A fully trained tensor, in the base's dtype."""
    dtype = _base_tensor(adapter, base, name, new).dtype
    return LazyTensor(name, new.shape, dtype, lambda start, stop: new.read_rows(start, stop).to(dtype), new.source)


def _apply_token_rows(adapter: Path, old: LazyTensor, new: LazyTensor, indices: Any) -> LazyTensor:
    """A matrix [rows, width] of which only some rows were trained: new [len(row_ids), width]."""
    layer = old.name.removesuffix(".weight")
    by_layer = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    row_ids = next((rows for name, rows in by_layer.items() if f".{layer}".endswith(f".{name}")), None)
    if not isinstance(row_ids, list) or new.shape != (len(row_ids), *old.shape[1:]):
        raise _mismatch_error(
            adapter, f"its rows of {layer} are {list(new.shape)}, which does not match trainable_token_indices"
        )
    outside = [row for row in row_ids if not (isinstance(row, int) and 0 <= row < old.shape[0])]
    if outside:
        reason = f"it trained row {outside[0]} of {layer}, which has {old.shape[0]} rows; resize the base first"
        raise _mismatch_error(adapter, f"{reason} (step3_resize_model.py)")

    def read_rows(start: int, stop: int) -> Any:
        rows = old.read_rows(start, stop).clone()
        for index, row in enumerate(row_ids):
            if start <= row < stop:
                rows[row - start] = new.read_rows(index, index + 1)[0].to(rows.dtype)
        return rows

    return replace(old, read_rows=read_rows, source=f"{old.source} with {new.source}")


def _apply_lora(adapter: Path, old: LazyTensor, parts: dict[str, LazyTensor], config: dict[str, Any]) -> LazyTensor:
    """W + s B A, for weights W [out, in], A [r, in], B [out, r]; DoRA scales each row to the norm `magnitude` [out]."""
    lora_a, lora_b, magnitude = parts[LORA_A], parts[LORA_B], parts.get(MAGNITUDE)
    layer, rank = old.name.removesuffix(".weight"), config["r"]
    outputs, inputs = old.shape[0], old.shape[-1]
    expected = {LORA_A: (rank, inputs), LORA_B: (outputs, rank), MAGNITUDE: (outputs,)}
    for suffix, part in parts.items():
        if part.shape != expected[suffix] or len(old.shape) != 2:
            raise _mismatch_error(
                adapter,
                f"{suffix.split('.')[1]} of {layer} is {list(part.shape)}, not {list(expected[suffix])}: the layer has "
                f"{inputs} inputs and {outputs} outputs, the adapter rank {rank}",
            )
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)

    def read_rows(start: int, stop: int) -> Any:
        weight = old.read_rows(start, stop).float()
        weight.addmm_(lora_b.read_rows(start, stop).float(), lora_a.read_rows(0, rank).float(), alpha=scale)
        if magnitude is not None:
            weight *= (magnitude.read_rows(start, stop).float() / weight.norm(dim=1)).unsqueeze(1)
        return weight.to(old.dtype)

    return replace(old, read_rows=read_rows, source=f"{old.source} with {lora_a.source}")


def _with_alias(tensors: dict[str, LazyTensor], checkpoint: LazyCheckpoint) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, of which a tied matrix is found under both of its names."""
    alias = checkpoint.alias
    return {**tensors, alias: replace(tensors[next(iter(checkpoint.embeddings))], name=alias)} if alias else tensors


def _drop_alias(adapter: Path, merged: dict[str, LazyTensor], checkpoint: LazyCheckpoint) -> None:
    """Drops what an adapter holds of a tied matrix as the output layer's, if it is what it holds as the input's."""
    alias, matrix = checkpoint.alias, next(iter(checkpoint.embeddings))
    if alias in merged and not (matrix in merged and tensors_equal(merged[matrix], merged.pop(alias))):
        raise _mismatch_error(
            adapter, f"it trained {alias} apart from {matrix}, which are one matrix in the model (tie_word_embeddings)"
        )


def _check_shape(adapter: Path, old: LazyTensor, new: LazyTensor, is_embedding: bool) -> None:
    """Makes sure that a tensor keeps its shape; only embedding matrices may get more rows."""
    resized = is_embedding and new.shape[0] > old.shape[0]
    if new.shape != old.shape and not (resized and new.shape[1:] == old.shape[1:]):
        raise _mismatch_error(adapter, f"{old.name} is {list(new.shape)}, the model's {list(old.shape)}")


def _merged_vocab_size(num_rows: list[int], adapter: Path) -> int:
    input_rows, output_rows = num_rows[0], num_rows[-1]
    if input_rows != output_rows:
        reason = f"{input_rows:,} input and {output_rows:,} output embedding rows; resize the base first"
        raise _mismatch_error(adapter, f"{reason} (step3_resize_model.py)")
    return input_rows


def _mismatch_error(adapter: Path, reason: str) -> UserError:
    return UserError(
        f"the adapter {adapter} does not match the model: {reason}. Merge it into the model that it was trained on."
    )
