"""Loads models and tokenizers from local directories: safetensors only, no remote code."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from llmtuner.console import UserError, llmtuner_command
from llmtuner.model.attention import VARLEN, flash_varlen_available, register_varlen
from llmtuner.model.model_dir import check_not_quantized, check_weight_files, is_original_chatglm, read_json
from llmtuner.tokenizer.encoding import load_tokenizer

PLAIN_ATTENTION = ("glm", "llama", "mistral", "qwen2", "qwen3")
"""model_type of models whose attention is softmax(q k) v and nothing more, as the tests show."""


def device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    directory: Path | str,
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Loads a causal language model onto a device, tensor by tensor, in evaluation mode.

    Args:
        dtype: "auto" keeps that of its files.
        attention: transformers' name of an attention implementation; None for its default.

    Raises:
        UserError: if the directory does not hold a complete, readable model.
    """
    path = Path(directory)
    read_config(path)
    check_weight_files(path)
    if attention == VARLEN:
        register_varlen()
    try:
        with _no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=dtype,
                attn_implementation=attention,
                device_map={"": torch.device(device)},  # without it host memory would hold all weights first
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:  # a damaged config.json, generation_config.json or safetensors raises almost anything
        raise UserError(f"the model in {path} cannot be loaded: {error}. Make or fetch it again.") from error
    return model.eval()


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hides transformers' progress bar, which counts the tensors of one file."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def default_attention(directory: Path | str) -> str | None:
    """Returns the attention implementation that is fastest for packed batches of a model on this machine.

    None lets transformers choose: some models of other families do not support sdpa.
    """
    config = read_config(directory)
    is_plain = config.model_type in PLAIN_ATTENTION and not getattr(config, "sliding_window", None)
    if torch.cuda.is_available():
        return (VARLEN if flash_varlen_available() else "sdpa") if is_plain else None
    return VARLEN if is_plain else "eager"


def read_config(directory: Path | str) -> Any:
    """Reads the configuration of a causal language model that transformers knows.

    Raises:
        UserError: if there is none, it is damaged, needs remote code, or is that of another kind of model.
    """
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory} is not a model directory: it has no config.json.")
    _refuse_remote_code(Path(directory))
    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file raises almost anything
        raise UserError(
            f"{directory} is not a model directory that can be used: {error}. Make or fetch it again."
        ) from error
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "no causal language"
        raise UserError(
            f"{directory} holds {kind} model (model_type {config.model_type!r}). Choose one that continues a text "
            "(transformers' AutoModelForCausalLM), such as Llama, Qwen or GLM."
        )
    return config


def _refuse_remote_code(directory: Path) -> None:
    """Rejects a model that only code in its own directory can load (`auto_map`), and says what to do; no such code is run."""
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in CONFIG_MAPPING:
        convert = f"Convert it once: {llmtuner_command()} convert {directory} OUT_DIR, and name OUT_DIR."
        raise UserError(
            f"{directory} needs code from its own directory (model_type {kind!r}, which transformers does not know), and such code "
            f"is never run. {convert if is_original_chatglm(config) else 'Choose a model that transformers knows.'}"
        )


@dataclass(frozen=True)
class EvalPlacement:
    """Device and dtype for the evaluation of a model, and the memory it needs."""

    device: torch.device
    dtype: torch.dtype | str
    needed: int
    """Bytes of its weights."""
    free: int
    """Free bytes on that device."""

    def __str__(self) -> str:
        where = "GPU" if self.device.type == "cuda" else "CPU"
        precision = "the precision of its files" if self.dtype == "auto" else str(self.dtype).removeprefix("torch.")
        needed = f"{self.needed / 1e9:.1f} GB" if self.needed >= 1e9 else f"{self.needed / 1e6:.0f} MB"
        text = f"{needed} of memory on the {where}, in {precision}; {self.free / 1e9:.1f} GB are free"
        return text + (" - too little: the system may end the process" if self.needed > self.free else "")


def choose_placement(directory: Path | str) -> EvalPlacement:
    """Chooses device and dtype for the evaluation of a model.

    On a GPU a model keeps the dtype of its files. On a CPU fp32 is fastest, and bf16 needs half the memory; fp16, the
    dtype of ChatGLM3's files, is slow on most CPUs.

    Raises:
        UserError: if the directory holds no model, or a file of its weights is missing or damaged.
    """
    config = read_config(directory)
    check_weight_files(Path(directory))
    stored_bytes = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    num_parameters = stored_bytes // (4 if config.dtype == torch.float32 else 2)
    target = device()
    if target.type == "cuda":
        return EvalPlacement(target, "auto", stored_bytes, torch.cuda.mem_get_info()[0])
    free = psutil.virtual_memory().available
    dtype = torch.float32 if num_parameters * 4 < 0.8 * free else torch.bfloat16
    return EvalPlacement(target, dtype, num_parameters * dtype.itemsize, free)


def load_for_evaluation(directory: Path | str) -> tuple[PreTrainedModel, Any]:
    """Loads a model and its tokenizer for evaluation (`choose_placement`)."""
    placement = choose_placement(directory)
    model, tokenizer = load_model(directory, placement.dtype, device=placement.device), load_tokenizer(directory)
    check_vocab_size(model, tokenizer, directory)
    return model, tokenizer


def check_vocab_and_context(directory: Path | str, tokenizer: Any, context_length: int) -> None:
    """Makes sure, before weights are loaded, that a model has an embedding for every id and a sufficient context length.

    Raises:
        UserError: if it has not, is not a model or is quantized, or a file of its weights is missing or damaged.
    """
    config = read_config(directory)
    check_weight_files(Path(directory))
    check_not_quantized(Path(directory))
    _check_vocab_size(config.vocab_size, tokenizer, directory)
    limit = getattr(config, "max_position_embeddings", None)  # not every model has one
    if limit is not None and context_length > limit:
        raise UserError(
            f"cutoff_len is {context_length:,}, but {directory} reads at most {limit:,} tokens. Make it smaller."
        )


def check_vocab_size(model: PreTrainedModel, tokenizer: Any, directory: Path | str) -> None:
    """Makes sure that every id of the tokenizer has an embedding row.

    Raises:
        UserError: if the tokenizer is larger than the embeddings.
    """
    embeddings: Any = model.get_input_embeddings()
    _check_vocab_size(embeddings.weight.shape[0], tokenizer, directory)


def _check_vocab_size(vocab_size: int, tokenizer: Any, directory: Path | str) -> None:
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {len(tokenizer):,} ids, the embeddings only {vocab_size:,} rows. "
            "Resize the model first (step3_resize_model.py)."
        )
