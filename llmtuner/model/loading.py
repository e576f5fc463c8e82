"""Loads models and tokenizers from local directories: safetensors only, no remote code."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmtuner.console import UserError
from llmtuner.model.attention import VARLEN, register_varlen
from llmtuner.model.model_dir import check_not_quantized, check_weight_files, is_original_chatglm, read_json
from llmtuner.tokenizer.fast import load_tokenizer

# What libraries would print and nobody could act on: bars for reading one file, peft's call of an old name, and
# DeepSpeed's surprise (it is imported with the Trainer) at a machine without a GPU.
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    directory: Path | str, dtype: torch.dtype | str = "auto", attention: str | None = None
) -> PreTrainedModel:
    """A causal language model, in evaluation mode on the CPU; `dtype` "auto" keeps that of its files.

    `attention` is transformers' name of a kernel; by default its fused one.

    Raises:
        UserError: if the directory does not hold a complete, readable model.
    """
    path = Path(directory)
    _read_config(path)
    check_weight_files(path)
    if attention == VARLEN:
        register_varlen()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # a damaged config.json, generation_config.json or safetensors raises almost anything
        raise UserError(f"the model in {path} cannot be loaded: {error}. Make or fetch it again.") from error
    return model.eval()


def default_attention(directory: Path | str) -> str | None:
    """transformers' name of the attention kernel that trains a model's packed batches fastest on this machine.

    None lets transformers choose: some models of other families have no sdpa.
    """
    is_glm = _read_config(directory).model_type == "glm"
    if torch.cuda.is_available():
        return "sdpa" if is_glm else None
    return VARLEN if is_glm else "eager"


def _read_config(directory: Path | str) -> Any:
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory} is not a model directory: it has no config.json.")
    _refuse_remote_code(Path(directory))
    try:
        return AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(
            f"{directory} is not a model directory that can be used: {error}. Make or fetch it again."
        ) from error


def _refuse_remote_code(directory: Path) -> None:
    """Names the way out for a model that only code of its own directory can load (`auto_map`); that code is never run."""
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in CONFIG_MAPPING:
        published = f"Convert it once: python -m llmtuner convert {directory} OUT_DIR, and name OUT_DIR."
        raise UserError(
            f"{directory} needs code of its own (model_type {kind!r}, which transformers does not know), and no code of a "
            f"model directory is run. {published if is_original_chatglm(config) else 'Choose a model that transformers knows.'}"
        )


@dataclass(frozen=True)
class EvalPlacement:
    """Where and in which precision a model is evaluated, and what that needs."""

    device: torch.device
    dtype: torch.dtype | str
    needed: int
    """Bytes for its weights."""
    free: int
    """Bytes that are free there now."""

    def __str__(self) -> str:
        where = "GPU" if self.device.type == "cuda" else "CPU"
        precision = "the precision of its files" if self.dtype == "auto" else str(self.dtype).removeprefix("torch.")
        needed = f"{self.needed / 1e9:.1f} GB" if self.needed >= 1e9 else f"{self.needed / 1e6:.0f} MB"
        text = f"{needed} of memory on the {where}, in {precision}; {self.free / 1e9:.1f} GB are free"
        return text + (" - too little: it may be stopped" if self.needed > self.free else "")


def choose_placement(directory: Path | str) -> EvalPlacement:
    """On a GPU a model keeps the precision of its files; on a CPU fp32 is fastest, and bf16 needs half the memory.

    fp16, in which ChatGLM3 is published, is slow on most CPUs, so it is not used there.

    Raises:
        UserError: if the directory holds no model, or a file of its weights is missing or damaged.
    """
    check_weight_files(Path(directory))
    numbers = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) // 2
    config = _read_config(directory)
    if config.dtype == torch.float32:
        numbers //= 2
    where = device()
    if where.type == "cuda":
        stored = 4 if config.dtype == torch.float32 else 2
        return EvalPlacement(where, "auto", numbers * stored, torch.cuda.mem_get_info()[0])
    free = psutil.virtual_memory().available
    dtype, size = (torch.float32, 4) if numbers * 4 < 0.8 * free else (torch.bfloat16, 2)
    return EvalPlacement(where, dtype, numbers * size, free)


def load_for_evaluation(directory: Path | str) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer where and in the precision in which they are evaluated fastest (`choose_placement`)."""
    plan = choose_placement(directory)
    model, tokenizer = load_model(directory, plan.dtype), load_tokenizer(directory)
    check_vocab_size(model, tokenizer, directory)
    return model.to(plan.device), tokenizer  # type: ignore[arg-type]


def check_vocab_and_context(directory: Path | str, tokenizer: Any, length: int) -> None:
    """Makes sure, before weights are loaded, that a model has a row for every id and room for `length` tokens.

    Raises:
        UserError: if it has not, is no model or a quantized one, or a file of its weights is missing or damaged.
    """
    config = _read_config(directory)
    check_weight_files(Path(directory))
    check_not_quantized(Path(directory))
    _check_vocab_size(config.vocab_size, tokenizer, directory)
    most = getattr(config, "max_position_embeddings", None)  # not every model counts positions
    if most is not None and length > most:
        raise UserError(f"cutoff_len is {length:,}, but {directory} reads at most {most:,} tokens. Make it smaller.")


def check_vocab_size(model: PreTrainedModel, tokenizer: Any, directory: Path | str) -> None:
    """Makes sure that every id of the tokenizer has an embedding row.

    Raises:
        UserError: if the tokenizer is larger than the embeddings.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    _check_vocab_size(rows, tokenizer, directory)


def _check_vocab_size(rows: int, tokenizer: Any, directory: Path | str) -> None:
    if len(tokenizer) > rows:
        raise UserError(
            f"{directory}: the tokenizer has {len(tokenizer):,} ids, the embeddings only {rows:,} rows. "
            "Grow the model first (step3_resize_model.py)."
        )
