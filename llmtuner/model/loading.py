"""Loads models and tokenizers from local directories: safetensors only, no remote code."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmtuner.console import InputError
from llmtuner.tokenizer.fast import build_fast_tokenizer

# What libraries would print and nobody could act on: bars for reading one file, peft's call of an old name, and
# DeepSpeed's surprise (it is imported with the Trainer) at a machine without a GPU.
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(directory: Path | str) -> Any:
    """The fast tokenizer of a model directory; made from `tokenizer.model` where there is no `tokenizer.json`.

    Raises:
        InputError: if the directory has neither.
    """
    path = Path(directory)
    if (path / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if (path / "tokenizer.model").is_file():
        return build_fast_tokenizer(path / "tokenizer.model")
    raise InputError(f"{path} has no tokenizer.json or tokenizer.model. A model directory holds its tokenizer too.")


def load_model(
    directory: Path | str, dtype: torch.dtype | str = "auto", attention: str | None = None
) -> PreTrainedModel:
    """A causal language model, in evaluation mode on the CPU; `dtype` "auto" keeps that of its files.

    `attention` is transformers' name of a kernel; by default its fused one.

    Raises:
        InputError: if the directory does not hold a complete, readable model.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model directory: it has no config.json.")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the model in {path} cannot be loaded: {error}. Make or fetch it again.") from error
    return model.eval()


def load_for_evaluation(directory: Path | str) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer where they are evaluated fastest: in its own dtype on a GPU, in fp32 on a CPU if small."""
    small = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) < 2e9
    dtype: torch.dtype | str = torch.float32 if device().type == "cpu" and small else "auto"
    model, tokenizer = load_model(directory, dtype), load_tokenizer(directory)
    check_rows(model, tokenizer, directory)
    return model.to(device()), tokenizer  # type: ignore[arg-type]


def check_rows(model: PreTrainedModel, tokenizer: Any, directory: Path | str) -> None:
    """Makes sure that every id of the tokenizer has an embedding row.

    Raises:
        InputError: if the tokenizer is larger than the embeddings.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"{directory}: the tokenizer has {len(tokenizer):,} ids, the embeddings only {rows:,} rows. "
            "Grow the model first (step3_resize_model.py)."
        )
