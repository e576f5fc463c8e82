"""Grows the input and output embeddings of a checkpoint for the pieces that a merged tokenizer adds.

The checkpoint is copied from disk to disk, tensor by tensor: of the weights, memory holds one embedding matrix.

Where new rows come from is another room (initialising.py). Rows of padding are copies of `<unk>`'s, which is never a
target, so they stay inert.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llmtuner.console import InputError
from llmtuner.model.chatglm import is_published, open_published
from llmtuner.model.initialising import NewPieces, new_rows
from llmtuner.model.shards import (
    Checkpoint,
    LazyTensor,
    Written,
    check_tensors,
    concatenate,
    in_memory,
    one_thread,
    open_checkpoint,
    read_json,
)

MATRICES: dict[str, Literal["input", "output"]] = {"model.embed_tokens.weight": "input", "lm_head.weight": "output"}
APPENDED_ROWS = "appended_rows"
"""Key of config.json: [first, end), the rows that were appended for new pieces, padding not counted."""
NewRows = Callable[[torch.Tensor, Literal["input", "output"]], torch.Tensor]
"""(matrix [old rows, width] in the checkpoint's dtype, which of the two it is) -> new rows [new, width] in fp32"""


@dataclass(frozen=True)
class Grown:
    """What `grow_checkpoint` did: embedding rows before and after, and what was written."""

    old_rows: int
    rows: int
    written: Written


def open_base(directory: Path) -> Checkpoint:
    """The plan of a model directory with input and output embeddings of their own: Glm's, or ChatGLM's as published.

    Raises:
        InputError: if it holds no complete model, or one whose two matrices are the same.
    """
    if is_published(read_json(directory / "config.json")):
        return open_published(directory)

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
        raise InputError(f"the model in {directory} cannot be read: {error}. Make or fetch it again.") from error
    tensors = open_checkpoint(directory)
    if config.tie_word_embeddings or not MATRICES.keys() <= tensors.keys():
        raise InputError(
            f"{directory} has no {' and '.join(MATRICES)} of their own (tied embeddings). "
            "Growing and merging need both matrices, as in ChatGLM3 and Glm."
        )
    check_tensors(directory, tensors, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    return Checkpoint(config, generation, list(tensors.values()), directory)


def grow_checkpoint(
    source: Path, destination: Path, new: NewPieces, multiple: int, make_rows: NewRows | None = None
) -> Grown:
    """Writes the model of `source` into `destination`, a directory that exists, with rows for the new pieces.

    Rows below `new.first_id` and all other tensors keep every bit. Then come the new rows and, up to a multiple of
    `multiple`, copies of the row of `<unk>`. The grown config.json says where the new rows lie (`APPENDED_ROWS`).

    Args:
        source: a Glm checkpoint, or ChatGLM3 as published.
        make_rows: makes the new rows of either matrix; means of the native pieces' rows by default.

    Raises:
        InputError: if `source` is no such checkpoint or has fewer rows than its tokenizer has ids; and as
            `write_checkpoint`.
    """
    base = open_base(source)
    old_rows = base.config.vocab_size
    if old_rows < new.first_id:
        raise InputError(
            f"{source} has {old_rows:,} embedding rows, its tokenizer {new.first_id:,} ids. "
            "Fetch weights and tokenizer.model from one place."
        )
    rows = -(-max(new.end, old_rows) // multiple) * multiple
    make = make_rows or (lambda matrix, _: new_rows(matrix, new, "mean"))
    tensors = [_grow(one, new, rows, make) if one.name in MATRICES else one for one in base.tensors]
    base.config.vocab_size = rows
    setattr(base.config, APPENDED_ROWS, [new.first_id, new.end])
    return Grown(old_rows, rows, replace(base, tensors=tensors).write(destination))


def _grow(old: LazyTensor, new: NewPieces, rows: int, make_rows: NewRows) -> LazyTensor:
    made = make_rows(old.read_rows(0, old.shape[0]), MATRICES[old.name]).to(old.dtype)
    if made.shape != (len(new.spellings), *old.shape[1:]):
        raise ValueError(f"make_rows made {list(made.shape)} for {len(new.spellings)} new pieces, {old.shape[1]} wide")
    unknown = old.read_rows(new.unknown_id, new.unknown_id + 1)
    padding = in_memory(old.name, unknown.expand(rows - new.end, -1))
    return concatenate(old.name, [old.rows(0, new.first_id), in_memory(old.name, made), padding])


@one_thread()
def same_rows(source: Path, grown: Path, rows: int) -> bool:
    """Whether the first `rows` rows of both matrices are the same, bit by bit, in two checkpoints on disk.

    Raises:
        InputError: if one of them cannot be read.
    """
    before, after = {one.name: one for one in open_base(source).tensors}, open_checkpoint(grown)
    return all(
        torch.equal(old.view(torch.uint8), now.view(torch.uint8))
        for name in MATRICES
        for old, now in zip(before[name].rows(0, rows).chunks(), after[name].rows(0, rows).chunks(), strict=True)
    )
