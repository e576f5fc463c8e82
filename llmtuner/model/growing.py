"""Grows the input and output embeddings of a checkpoint for the pieces that a merged tokenizer adds.

The checkpoint is copied from disk to disk, tensor by tensor: of the weights, memory holds one embedding matrix.

By default a new row is the mean of the rows of the native pieces that spelled the new piece until now: its bytes or
sub-pieces (the common strong baseline, e.g. SambaLingo, arXiv 2404.05829). For output rows this has a useful
consequence: the new logit is the mean of native logits, so, but for the rounding of stored rows, it never exceeds the
greatest of them, and greedy answers stay what they were. Step 4 measures whether they did.
Rows of padding are copies of `<unk>`'s, which is never a target, so they stay inert for the same reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from llmtuner.console import InputError
from llmtuner.model.chatglm import is_published, open_published
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
NewRows = Callable[[torch.Tensor, Literal["input", "output"]], torch.Tensor]
"""(matrix [old rows, width] in the checkpoint's dtype, which of the two it is) -> new rows [new, width] in fp32"""


@dataclass(frozen=True)
class NewPieces:
    """Which ids are new, and which native ids spell each of them."""

    first_id: int
    spellings: list[list[int]]
    unknown_id: int

    @property
    def end(self) -> int:
        return self.first_id + len(self.spellings)


@dataclass(frozen=True)
class Grown:
    """What `grow_checkpoint` did: embedding rows before and after, and what was written."""

    old_rows: int
    rows: int
    written: Written


def find_new_pieces(base_tokenizer: Path, merged_tokenizer: Path) -> NewPieces:
    """Compares two sentencepiece models; new pieces stand behind the base's and the special tokens.

    Raises:
        InputError: if the second does not continue the first.
    """
    import sentencepiece

    from llmtuner.tokenizer.fast import SPECIAL_TOKENS

    base = sentencepiece.SentencePieceProcessor(model_file=str(base_tokenizer))
    merged = sentencepiece.SentencePieceProcessor(model_file=str(merged_tokenizer))
    size = base.get_piece_size()
    if any(base.id_to_piece(i) != merged.id_to_piece(i) for i in range(size)):
        raise InputError(
            f"{merged_tokenizer} does not begin with the pieces of {base_tokenizer}. Merge again with this base."
        )
    first_id = size + len(SPECIAL_TOKENS)
    newline = base.encode("\n")  # [▁, newline]: what follows is spelled as inside a text
    spellings = []
    for new_id in range(first_id, merged.get_piece_size()):
        text = merged.id_to_piece(new_id).replace("▁", " ")
        spellings.append(base.encode("\n" + text)[len(newline) :])
    return NewPieces(first_id, spellings, base.unk_id())


@one_thread()
def mean_rows(matrix: torch.Tensor, new: NewPieces) -> torch.Tensor:
    """For each new piece the mean, formed in fp32, of the rows of the pieces that spell it.

    Args:
        matrix: [old rows, width], any floating-point dtype.

    Returns:
        [new, width] in fp32
    """
    rows = torch.zeros(len(new.spellings), matrix.shape[1])
    for start in range(0, len(rows), 512):  # a call of torch for each piece would take a minute on busy cores
        spellings = new.spellings[start : start + 512]
        lengths = torch.tensor([len(spelling) for spelling in spellings])
        ids = torch.tensor([native for spelling in spellings for native in spelling])
        into = torch.arange(start, start + len(spellings)).repeat_interleave(lengths)
        rows.index_add_(0, into, matrix[ids].float())
        rows[start : start + 512] /= lengths[:, None]
    return rows


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
            "Growing needs both matrices, as in ChatGLM3 and Glm."
        )
    check_tensors(directory, tensors, {name: tuple(value.shape) for name, value in model.state_dict().items()})
    return Checkpoint(config, generation, list(tensors.values()))


def grow_checkpoint(
    source: Path, destination: Path, new: NewPieces, multiple: int, new_rows: NewRows | None = None
) -> Grown:
    """Writes the model of `source` into `destination`, a directory that exists, with rows for the new pieces.

    Rows below `new.first_id` and all other tensors keep every bit. Then come the new rows and, up to a multiple of
    `multiple`, copies of the row of `<unk>`.

    Args:
        source: a Glm checkpoint, or ChatGLM3 as published.
        new_rows: makes the new rows of either matrix; `mean_rows` by default.

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
    make_rows = new_rows or (lambda matrix, _: mean_rows(matrix, new))
    tensors = [_grow(one, new, rows, make_rows) if one.name in MATRICES else one for one in base.tensors]
    base.config.vocab_size = rows
    return Grown(old_rows, rows, replace(base, tensors=tensors).write(destination))


def _grow(old: LazyTensor, new: NewPieces, rows: int, new_rows: NewRows) -> LazyTensor:
    made = new_rows(old.read_rows(0, old.shape[0]), MATRICES[old.name]).to(old.dtype)
    if made.shape != (len(new.spellings), *old.shape[1:]):
        raise ValueError(f"new_rows made {list(made.shape)} for {len(new.spellings)} new pieces, {old.shape[1]} wide")
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
