"""What a model or adapter directory holds: its JSON files, and whether its weight files are complete and not quantized."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtuner.console import UserError
from llmtuner.files import read_json as read_json

# safetensors' names of the dtypes that weights may have; integer weights are those of a quantized checkpoint.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
APPENDED_ROWS = "appended_rows"
"""Key of config.json: [first, end), the embedding rows that step 3 appended for new tokens, without padding rows."""
MERGED_ADAPTER = "merged_adapter"
"""Key of adapter_config.json: the adapter that create_new_adapter had merged into the base before training."""


def is_original_chatglm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of ChatGLM as originally released, which transformers alone cannot load."""
    return config.get("model_type") == "chatglm"


def read_safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a safetensors file without its tensors.

    Returns:
        tensor name -> {"dtype", "shape", "data_offsets"}, and the length of the header in bytes

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt"):  # the library validates header, offsets and file size
            pass
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or truncated ({error}). Download or create it again.") from error
    header.pop("__metadata__", None)
    return header, header_bytes


def check_weight_files(directory: Path) -> None:
    """Reads the headers of a model's safetensors files, so that a damaged file is found before anything slow is done.

    Raises:
        UserError: if there is none, one that the index lists is missing, or one is damaged or truncated.
    """
    index = directory / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map") if index.is_file() else None
    if isinstance(weight_map, dict):
        files = set(weight_map.values())
    else:
        files = {file.name for file in directory.glob("model*.safetensors")}
    if not files:
        raise UserError(
            f"{directory} has no *.safetensors weights; other formats are not loaded. Download the model as safetensors."
        )
    if missing := sorted(name for name in files if not (directory / name).is_file()):
        raise UserError(f"{index} lists files that are missing: {abbreviate(missing)}. Download them.")
    for name in sorted(files):
        read_safetensors_header(directory / name)


def check_not_quantized(directory: Path) -> None:
    """Makes sure that a model's weights are floating-point numbers, which can be trained, resized and merged.

    Raises:
        UserError: if config.json or the weights show that the model is quantized.
    """
    config = directory / "config.json"
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    reason = None
    if quantization:
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else quantization
        reason = f"config.json has a quantization_config ({method})"
    for file in sorted(directory.glob("model*.safetensors")):
        for name, entry in read_safetensors_header(file)[0].items():
            # Masks and position ids may be integers, weights may not.
            if name.endswith("weight") and entry["dtype"] not in DTYPES:
                reason = reason or f"{name} in {file.name} is {entry['dtype']}"
    if reason:
        raise UserError(
            f"the model in {directory} is quantized: {reason}. Quantized weights cannot be trained, resized or merged. "
            "Use the checkpoint in full or half precision."
        )


def adapter_checksum(adapter: Path) -> str:
    """SHA-256 of a LoRA adapter's weights.

    Raises:
        UserError: if the directory has none.
    """
    file = adapter / "adapter_model.safetensors"
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{adapter} is not a LoRA adapter: cannot read {file.name} ({error.strerror}).") from error


def abbreviate(names: Sequence[str], count: int = 3) -> str:
    """Lists the first names and counts the rest, for messages."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
