"""Resizes the input and output embeddings of a checkpoint for the tokens that a merged tokenizer adds.

The checkpoint is copied from disk to disk, tensor by tensor: memory holds one embedding matrix. The values of new rows come
from embedding_init.py. Padding rows are copies of the row of `<unk>`, which is never a target.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llmtuner.console import UserError
from llmtuner.model.model_dir import APPENDED_ROWS, is_original_chatglm, read_json
from llmtuner.weights.convert_chatglm import open_chatglm
from llmtuner.weights.embedding_init import NewTokens, init_new_embeddings
from llmtuner.weights.lazy_checkpoint import (
    LazyCheckpoint,
    LazyTensor,
    WriteStats,
    check_tensors,
    concatenate,
    in_memory,
    open_checkpoint,
    single_threaded,
)

EMBEDDING_WEIGHTS: dict[str, Literal["input", "output"]] = {
    "model.embed_tokens.weight": "input",
    "lm_head.weight": "output",
}
InitFunction = Callable[[torch.Tensor, Literal["input", "output"]], torch.Tensor]
"""(matrix [old rows, width] in the checkpoint's dtype, which matrix it is) -> new rows [new tokens, width] in fp32"""


@dataclass(frozen=True)
class ResizeResult:
    """Embedding rows before and after `resize_token_embeddings`, and what was written."""

    old_vocab_size: int
    vocab_size: int
    stats: WriteStats


def open_model(directory: Path) -> LazyCheckpoint:
    """Opens a model directory with untied embeddings: a Glm checkpoint, or ChatGLM as originally released.

    Raises:
        UserError: if the model is incomplete or its embeddings are tied.
    """
    if is_original_chatglm(read_json(directory / "config.json")):
        return open_chatglm(directory)

    # Takes seconds: a published checkpoint with an invalid config.json is rejected before.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # names and shapes only
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        generation_config = (
            GenerationConfig.from_pretrained(str(directory), local_files_only=True)
            if (directory / "generation_config.json").is_file()
            else GenerationConfig.from_model_config(config)
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"the model in {directory} cannot be read: {error}. Create or download it again.") from error
    tensors = open_checkpoint(directory)
    if config.tie_word_embeddings or not EMBEDDING_WEIGHTS.keys() <= tensors.keys():
        raise UserError(
            f"{directory} has tied embeddings. Resizing and merging need separate {' and '.join(EMBEDDING_WEIGHTS)}, as in "
            "ChatGLM3 and Glm."
        )
    check_tensors(directory, tensors, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    return LazyCheckpoint(config, generation_config, list(tensors.values()), directory)


def resize_token_embeddings(
    source: Path, destination: Path, new: NewTokens, pad_to_multiple_of: int, init_fn: InitFunction | None = None
) -> ResizeResult:
    """Writes the model of `source` with rows for the new tokens into `destination`, an existing directory.

    Rows below `new.first_id` and all other tensors stay bit-identical. Then come the new rows and copies of the row of
    `<unk>` up to a multiple of `pad_to_multiple_of`. config.json records where the new rows lie (`APPENDED_ROWS`).

    Args:
        source: a Glm checkpoint, or ChatGLM3 as originally released.
        init_fn: initialises the new rows of either matrix; by default with the mean of the base tokens' rows.

    Raises:
        UserError: if `source` is no such checkpoint or has fewer rows than its tokenizer has ids; as `write_checkpoint`.
    """
    base = open_model(source)
    old_vocab_size = base.config.vocab_size
    if old_vocab_size < new.first_id:
        raise UserError(
            f"{source} has {old_vocab_size:,} embedding rows, but its tokenizer has {new.first_id:,} ids. "
            "Download weights and tokenizer.model from the same source."
        )
    vocab_size = -(-max(new.end, old_vocab_size) // pad_to_multiple_of) * pad_to_multiple_of
    init_fn = init_fn or (lambda matrix, _: init_new_embeddings(matrix, new, "mean"))
    tensors = [
        _resize_matrix(tensor, new, vocab_size, init_fn) if tensor.name in EMBEDDING_WEIGHTS else tensor
        for tensor in base.tensors
    ]
    base.config.update({"vocab_size": vocab_size, APPENDED_ROWS: [new.first_id, new.end]})
    return ResizeResult(old_vocab_size, vocab_size, replace(base, tensors=tensors).write(destination))


def _resize_matrix(old: LazyTensor, new: NewTokens, vocab_size: int, init_fn: InitFunction) -> LazyTensor:
    rows = init_fn(old.read_rows(0, old.shape[0]), EMBEDDING_WEIGHTS[old.name]).to(old.dtype)
    if rows.shape != (len(new.base_ids), *old.shape[1:]):
        raise ValueError(
            f"init_fn returned {list(rows.shape)} for {len(new.base_ids)} new tokens of width {old.shape[1]}"
        )
    unk_row = old.read_rows(new.unk_id, new.unk_id + 1)
    padding = in_memory(old.name, unk_row.expand(vocab_size - new.end, -1))
    return concatenate(old.name, [old.slice_rows(0, new.first_id), in_memory(old.name, rows), padding])


@single_threaded()
def rows_equal(source: Path, resized: Path, num_rows: int) -> bool:
    """Whether the first `num_rows` rows of both embedding matrices are bit-identical in two checkpoints on disk.

    Raises:
        UserError: if one of them cannot be read.
    """
    before, after = {tensor.name: tensor for tensor in open_model(source).tensors}, open_checkpoint(resized)
    return all(
        torch.equal(old.view(torch.uint8), new.view(torch.uint8))
        for name in EMBEDDING_WEIGHTS
        for old, new in zip(
            before[name].slice_rows(0, num_rows).chunks(), after[name].slice_rows(0, num_rows).chunks(), strict=True
        )
    )
