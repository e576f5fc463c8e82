"""Resizes the input and output embeddings of a checkpoint for the tokens that a merged tokenizer adds.

The checkpoint is copied from disk to disk, tensor by tensor: memory holds one embedding matrix. The values of new rows come
from embedding_init.py. Padding rows are copies of the row of `<unk>`, which is never a target; where there is none, the mean
of the base-vocabulary rows, whose logit is never the largest.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmtuner.console import UserError
from llmtuner.model.model_dir import APPENDED_ROWS, is_original_chatglm, read_json
from llmtuner.weights.convert_chatglm import open_chatglm
from llmtuner.weights.embedding_init import NewTokens, base_mean, init_new_embeddings
from llmtuner.weights.lazy_checkpoint import (
    EmbeddingKind,
    LazyCheckpoint,
    LazyTensor,
    WriteStats,
    check_tensors,
    concatenate,
    in_memory,
    open_checkpoint,
    single_threaded,
    tensors_equal,
)

InitFunction = Callable[[torch.Tensor, EmbeddingKind], torch.Tensor]
"""(matrix [old rows, width] in the checkpoint's dtype, which matrix it is) -> new rows [new tokens, width] in fp32"""


@dataclass(frozen=True)
class ResizeResult:
    """Embedding rows before and after `resize_token_embeddings`, and what was written."""

    old_vocab_size: int
    vocab_size: int
    stats: WriteStats


def open_model(directory: Path) -> LazyCheckpoint:
    """Opens a model directory: a causal language model that transformers knows, or ChatGLM as originally released.

    Raises:
        UserError: if the model is incomplete, is of another kind, or its output layer has a bias.
    """
    if is_original_chatglm(read_json(directory / "config.json")):
        return open_chatglm(directory)

    # Takes seconds: a published checkpoint with an invalid config.json is rejected before.
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from llmtuner.model.loading import read_config

    config = read_config(directory)
    try:
        with torch.device("meta"):  # names and shapes only
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        generation_config = (
            GenerationConfig.from_pretrained(str(directory), local_files_only=True)
            if (directory / "generation_config.json").is_file()
            else GenerationConfig.from_model_config(config)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the model in {directory} cannot be read: {error}. Create or download it again.") from error
    embeddings, alias = _embedding_names(directory, model)
    tensors = open_checkpoint(directory)
    if alias in tensors:  # nothing but another copy
        copy, matrix = tensors.pop(alias), next(iter(embeddings))
        if matrix in tensors and not tensors_equal(copy, tensors[matrix]):
            raise UserError(
                f"config.json in {directory} ties input and output embeddings (tie_word_embeddings), but its weights hold two "
                f"different matrices, {matrix} and {alias}. Set tie_word_embeddings to false in it."
            )
        tensors.setdefault(matrix, replace(copy, name=matrix))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != alias}
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ())
    checked = {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected or not (ignored and re.search(ignored, name))
    }
    if get_checkpoint_conversion_mapping(config.model_type):  # files with other names than the model's, as of experts
        checked = {name: tensor for name, tensor in tensors.items() if name in embeddings}
        expected = {name: expected[name] for name in embeddings}
    check_tensors(directory, checked, expected)
    return LazyCheckpoint(config, generation_config, list(tensors.values()), directory, embeddings, alias)


def _embedding_names(directory: Path, model: Any) -> tuple[dict[str, EmbeddingKind], str | None]:
    """Returns the names of a model's embedding matrices, and the other name of one that is tied.

    Raises:
        UserError: if the model has no output layer of its own, or a bias in it.
    """
    modules = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head not in modules:
        raise UserError(
            f"{directory} has a model without an output layer that can be resized ({type(model).__name__})."
        )
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"the output layer of {directory} has a bias ({modules[head]}.bias), which is not supported: the bias of a new "
            "token decides how often it is chosen, and no mean of others keeps old answers. Choose a model without one."
        )
    names = [f"{modules[layer]}.weight" for layer in (model.get_input_embeddings(), head)]
    if head.weight is model.get_input_embeddings().weight:
        return {names[0]: "tied"}, names[1]
    return {names[0]: "input", names[1]: "output"}, None


def resize_token_embeddings(
    source: Path, destination: Path, new: NewTokens, pad_to_multiple_of: int, init_fn: InitFunction | None = None
) -> ResizeResult:
    """Writes the model of `source` with rows for the new tokens into `destination`, an existing directory.

    Rows below `new.first_id` and all other tensors stay bit-identical. Then come the new rows and padding rows up to a
    multiple of `pad_to_multiple_of`. config.json records where the new rows lie (`APPENDED_ROWS`).

    Args:
        source: as of `open_model`.
        init_fn: initialises the new rows of each matrix; by default with the mean of the base tokens' rows.

    Raises:
        UserError: as `open_model`; if the model has fewer rows than its tokenizer has ids; as `write_checkpoint`.
    """
    base = open_model(source)
    old_vocab_size = base.config.vocab_size
    if old_vocab_size < new.first_id:
        raise UserError(
            f"{source} has {old_vocab_size:,} embedding rows, but its tokenizer has {new.first_id:,} ids. "
            "Download weights and tokenizer from the same source."
        )
    vocab_size = -(-max(new.end, old_vocab_size) // pad_to_multiple_of) * pad_to_multiple_of
    init_fn = init_fn or (lambda matrix, _: init_new_embeddings(matrix, new, "mean"))
    tensors = [
        _resize_matrix(tensor, base.embeddings[tensor.name], new, vocab_size, init_fn)
        if tensor.name in base.embeddings
        else tensor
        for tensor in base.tensors
    ]
    base.config.update({"vocab_size": vocab_size, APPENDED_ROWS: [new.first_id, new.end]})
    return ResizeResult(old_vocab_size, vocab_size, replace(base, tensors=tensors).write(destination))


def _resize_matrix(
    old: LazyTensor, kind: EmbeddingKind, new: NewTokens, vocab_size: int, init_fn: InitFunction
) -> LazyTensor:
    matrix = old.read_rows(0, old.shape[0])
    rows = init_fn(matrix, kind).to(old.dtype)
    if rows.shape != (len(new.base_ids), *old.shape[1:]):
        raise ValueError(
            f"init_fn returned {list(rows.shape)} for {len(new.base_ids)} new tokens of width {old.shape[1]}"
        )
    padding_row = base_mean(matrix, new).to(old.dtype) if new.unk_id is None else matrix[new.unk_id].clone()
    padding = in_memory(old.name, padding_row.expand(vocab_size - new.end, -1))
    return concatenate(old.name, [old.slice_rows(0, new.first_id), in_memory(old.name, rows), padding])


@single_threaded()
def rows_equal(source: Path, resized: Path, num_rows: int) -> bool:
    """Whether the first `num_rows` rows of the embedding matrices are bit-identical in two checkpoints on disk.

    Raises:
        UserError: if one of them cannot be read.
    """
    base, after = open_model(source), open_checkpoint(resized)
    before = {tensor.name: tensor for tensor in base.tensors}
    return all(
        tensors_equal(before[name].slice_rows(0, num_rows), after[name].slice_rows(0, num_rows))
        for name in base.embeddings
    )
