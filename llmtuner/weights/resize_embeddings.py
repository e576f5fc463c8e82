"""Grows the input and output embeddings of a checkpoint for the pieces that a merged tokenizer adds.

The checkpoint is copied from disk to disk, tensor by tensor: of the weights, memory holds one embedding matrix.

Where new rows come from is another room (embedding_init.py). Rows of padding are copies of `<unk>`'s, which is never a
target, so they stay inert.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llmtuner.console import UserError
from llmtuner.weights.convert_chatglm import is_original_chatglm, open_chatglm
from llmtuner.weights.embedding_init import NewTokens, init_new_embeddings
from llmtuner.weights.lazy_checkpoint import (
    LazyCheckpoint,
    LazyTensor,
    WriteStats,
    check_tensors,
    concatenate,
    in_memory,
    open_checkpoint,
    read_json,
    single_threaded,
)

EMBEDDING_WEIGHTS: dict[str, Literal["input", "output"]] = {
    "model.embed_tokens.weight": "input",
    "lm_head.weight": "output",
}
APPENDED_ROWS = "appended_rows"
"""Key of config.json: [first, end), the rows that were appended for new pieces, padding not counted."""
InitFunction = Callable[[torch.Tensor, Literal["input", "output"]], torch.Tensor]
"""(matrix [old rows, width] in the checkpoint's dtype, which of the two it is) -> new rows [new, width] in fp32"""


@dataclass(frozen=True)
class ResizeResult:
    """What `resize_token_embeddings` did: embedding rows before and after, and what was written."""

    old_vocab_size: int
    vocab_size: int
    stats: WriteStats


def open_model(directory: Path) -> LazyCheckpoint:
    """The plan of a model directory with input and output embeddings of their own: Glm's, or ChatGLM's as published.

    Raises:
        UserError: if it holds no complete model, or one whose two matrices are the same.
    """
    if is_original_chatglm(read_json(directory / "config.json")):
        return open_chatglm(directory)

    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # names and shapes only
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        generation = (
            GenerationConfig.from_pretrained(str(directory), local_files_only=True)
            if (directory / "generation_config.json").is_file()
            else GenerationConfig.from_model_config(config)
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"the model in {directory} cannot be read: {error}. Make or fetch it again.") from error
    tensors = open_checkpoint(directory)
    if config.tie_word_embeddings or not EMBEDDING_WEIGHTS.keys() <= tensors.keys():
        raise UserError(
            f"{directory} has no {' and '.join(EMBEDDING_WEIGHTS)} of their own (tied embeddings). "
            "Growing and merging need both matrices, as in ChatGLM3 and Glm."
        )
    check_tensors(directory, tensors, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    return LazyCheckpoint(config, generation, list(tensors.values()), directory)


def resize_token_embeddings(
    source: Path, destination: Path, new: NewTokens, multiple: int, init_fn: InitFunction | None = None
) -> ResizeResult:
    """Writes the model of `source` into `destination`, a directory that exists, with rows for the new pieces.

    Rows below `new.first_id` and all other tensors keep every bit. Then come the new rows and, up to a multiple of
    `multiple`, copies of the row of `<unk>`. The grown config.json says where the new rows lie (`APPENDED_ROWS`).

    Args:
        source: a Glm checkpoint, or ChatGLM3 as published.
        init_fn: makes the new rows of either matrix; means of the native pieces' rows by default.

    Raises:
        UserError: if `source` is no such checkpoint or has fewer rows than its tokenizer has ids; and as
            `write_checkpoint`.
    """
    base = open_model(source)
    old_rows = base.config.vocab_size
    if old_rows < new.first_id:
        raise UserError(
            f"{source} has {old_rows:,} embedding rows, its tokenizer {new.first_id:,} ids. "
            "Fetch weights and tokenizer.model from one place."
        )
    rows = -(-max(new.end, old_rows) // multiple) * multiple
    make = init_fn or (lambda matrix, _: init_new_embeddings(matrix, new, "mean"))
    tensors = [_resize_matrix(one, new, rows, make) if one.name in EMBEDDING_WEIGHTS else one for one in base.tensors]
    base.config.vocab_size = rows
    setattr(base.config, APPENDED_ROWS, [new.first_id, new.end])
    return ResizeResult(old_rows, rows, replace(base, tensors=tensors).write(destination))


def _resize_matrix(old: LazyTensor, new: NewTokens, rows: int, init_fn: InitFunction) -> LazyTensor:
    made = init_fn(old.read_rows(0, old.shape[0]), EMBEDDING_WEIGHTS[old.name]).to(old.dtype)
    if made.shape != (len(new.base_ids), *old.shape[1:]):
        raise ValueError(f"init_fn made {list(made.shape)} for {len(new.base_ids)} new pieces, {old.shape[1]} wide")
    unknown = old.read_rows(new.unk_id, new.unk_id + 1)
    padding = in_memory(old.name, unknown.expand(rows - new.end, -1))
    return concatenate(old.name, [old.slice_rows(0, new.first_id), in_memory(old.name, made), padding])


@single_threaded()
def rows_equal(source: Path, grown: Path, rows: int) -> bool:
    """Whether the first `rows` rows of both matrices are the same, bit by bit, in two checkpoints on disk.

    Raises:
        UserError: if one of them cannot be read.
    """
    before, after = {one.name: one for one in open_model(source).tensors}, open_checkpoint(grown)
    return all(
        torch.equal(old.view(torch.uint8), now.view(torch.uint8))
        for name in EMBEDDING_WEIGHTS
        for old, now in zip(
            before[name].slice_rows(0, rows).chunks(), after[name].slice_rows(0, rows).chunks(), strict=True
        )
    )
