"""Exports a Glm model with ChatGLM3's tokenizer as one GGUF file for llama.cpp, whose own converter lacks this tokenizer."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from llmtuner.console import Timer, UserError, progress
from llmtuner.data.template import Template
from llmtuner.files import translate_disk_errors
from llmtuner.tokenizer.chatglm3 import (
    CONTROL,
    ESCAPE,
    NORMAL,
    check_sentencepiece_spec,
    read_sentencepiece,
    special_token_ids,
)
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.weights.lazy_checkpoint import DTYPE_NAMES, LazyTensor, single_threaded
from llmtuner.weights.resize_embeddings import open_model

ARCHITECTURE = "chatglm"  # llama.cpp's name of Glm
UNUSED_TOKEN_TYPE = 5  # the other token types have the same numbers as in sentencepiece
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
# llama.cpp finds special tokens by name, even inside words, and its merges can form them: "sop" in "philosophy", "eop" in
# "people". Names are not part of the model, so these two are renamed to what no word contains.
SAFE_TOKEN_NAMES = {"sop": "<sop>", "eop": "<eop>"}


def export_gguf(source: Path, destination: Path) -> str:
    """Exports a model directory as one file for llama.cpp; matrices stay bit-identical, vectors become fp32.

    Args:
        source: a Glm checkpoint, or ChatGLM3 as originally released, with its tokenizer.model.
        destination: the file, which appears complete or not at all. Memory holds one tensor at a time.

    Returns:
        lines for the terminal: settings that llama.cpp does not have, and what was written

    Raises:
        UserError: if the package gguf is missing, the file exists or cannot be written, the model is incomplete, or
            llama.cpp would compute or tokenize differently.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("the package gguf is missing. Install it: pip install gguf") from error
    timer = Timer()
    if destination.exists():
        raise UserError(f"{destination} exists. Move it away, or write to another file.")
    checkpoint = open_model(source)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    writer: Any = gguf.GGUFWriter(partial, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.resolve().name)
    writer.add_file_type(FILE_TYPES[_ggml_type(checkpoint.tensors[0])])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_model_metadata(writer, checkpoint.config, gguf.RopeScalingType.LINEAR, source)
    _add_tokenizer_metadata(writer, build_vocabulary(source / "tokenizer.model", checkpoint.config.vocab_size), source)
    notes = _add_sampling_metadata(writer, checkpoint.generation_config, checkpoint.config.max_position_embeddings)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.CHATGLM, checkpoint.config.num_hidden_layers)
    for tensor in checkpoint.tensors:
        name, kind = names.get_name(tensor.name, try_suffixes=(".weight", ".bias")), _ggml_type(tensor)
        size = tensor.nbytes // tensor.dtype.itemsize * (4 if kind == "F32" else 2)
        writer.add_tensor_info(name, tensor.shape, None, size, raw_dtype=gguf.GGMLQuantizationType[kind])
    try:
        _write_file(writer, checkpoint.tensors, destination)
        partial.replace(destination)
    finally:
        partial.unlink(missing_ok=True)
    size_gb = destination.stat().st_size / 1e9
    done = f"{len(checkpoint.tensors)} tensors, {size_gb:.3f} GB, {timer.seconds()} s, in {destination}"
    return "\n".join([*notes, done])


def _write_file(writer: Any, tensors: list[LazyTensor], destination: Path) -> None:
    with translate_disk_errors(destination), single_threaded():
        destination.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in progress(tensors, destination.name, unit="tensor"):
            values = tensor.read_rows(0, tensor.shape[0])
            values = values.float() if _ggml_type(tensor) == "F32" else values
            writer.write_tensor_data(values.contiguous().flatten().view(torch.uint8).numpy())
        writer.close()


def build_vocabulary(model_file: Path, num_rows: int) -> list[tuple[str, float, int]]:
    """Returns (name, score, type) of a token for each embedding row, as llama.cpp's sentencepiece tokenizer needs them.

    Raises:
        UserError: if the tokenizer does not follow ChatGLM3's spec, has more ids than the model has rows, or
            llama.cpp would merge ordinary text into a special token.
    """
    proto = read_sentencepiece(model_file)
    check_sentencepiece_spec(proto, model_file, allow_ties=True)  # llama.cpp, too, merges the leftmost pair first
    tokens = {index: (piece.piece, piece.score, piece.type) for index, piece in enumerate(proto.pieces)}
    tokens |= {
        index: (SAFE_TOKEN_NAMES.get(name, name), 0.0, CONTROL) for name, index in special_token_ids(proto).items()
    }
    if len(tokens) > num_rows:
        raise UserError(
            f"{model_file} has {len(tokens):,} ids, but the model has only {num_rows:,} rows. They do not match."
        )
    vocabulary = [tokens.get(row, (f"[PAD{row}]", 0.0, UNUSED_TOKEN_TYPE)) for row in range(num_rows)]
    pieces = {name for name, _, kind in vocabulary if kind == NORMAL}
    unsafe = [
        name for name, _, kind in vocabulary if kind != NORMAL and (name in pieces or _can_be_merged(name, pieces))
    ]
    if unsafe:
        raise UserError(
            f"llama.cpp would read {', '.join(unsafe[:5])} out of ordinary text, since {model_file} has pieces that merge "
            "into it. Merge again with step2_merge_tokenizer.py, without these pieces."
        )
    return vocabulary


def _can_be_merged(name: str, pieces: set[str]) -> bool:
    """Whether two adjacent tokens, each a piece or a single character, can form a name."""
    cuts = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
    return any(all(len(part) == 1 or part in pieces for part in parts) for parts in cuts)


def _ggml_type(tensor: LazyTensor) -> str:
    """The type in the file: llama.cpp supports biases and norms in fp32 only, and no fp64."""
    name = DTYPE_NAMES[tensor.dtype]
    return name if len(tensor.shape) > 1 and name in FILE_TYPES else "F32"


def _add_model_metadata(writer: Any, config: Any, linear: Any, source: Path) -> None:
    if config.model_type != "glm":
        raise UserError(f"{source} has a model of type {config.model_type!r}, not glm. Use llama.cpp's own converter.")
    rope = config.rope_parameters
    if config.num_attention_heads * config.head_dim != config.hidden_size or config.hidden_act != "silu":
        raise UserError(f"llama.cpp does not support the heads or the activation of {source}: it cannot be exported.")
    if rope["rope_type"] not in ("default", "linear"):
        raise UserError(f"{source} has rope_type {rope['rope_type']!r}, which is not supported.")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(linear)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_tokenizer_metadata(writer: Any, tokens: list[tuple[str, float, int]], source: Path) -> None:
    tokenizer = load_tokenizer(source)
    template = Template.from_tokenizer(tokenizer)
    names, scores, kinds = zip(*tokens, strict=True)
    writer.add_tokenizer_model("llama")  # merges pieces in the order of their scores
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(True)
    writer.add_add_bos_token(False)  # the chat template begins with [gMASK]<sop>
    writer.add_add_eos_token(False)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_eos_token_id(template.eos)
    writer.add_eot_token_id(template.roles["user"])
    writer.add_eom_token_id(template.roles["observation"])
    # llama.cpp cannot remove characters from text, so a space keeps a message's "<|user|>" from being read as a role.
    writer.add_chat_template(re.sub(r"\b(sop|eop)\b", r"<\1>", tokenizer.chat_template.replace(ESCAPE, " ")))


def _add_sampling_metadata(writer: Any, generation_config: Any, context_length: int) -> list[str]:
    """Stores llama.cpp's sampling defaults: those of transformers, whose own default for top_k is 50.

    Returns:
        a line for each setting that llama.cpp does not have
    """

    def value(name: str, default: float) -> float:
        chosen = getattr(generation_config, name)
        return default if chosen is None else chosen

    writer.add_sampling_temp(float(value("temperature", 1.0)) if generation_config.do_sample else 0.0)
    writer.add_sampling_top_k(int(value("top_k", 50)))
    writer.add_sampling_top_p(float(value("top_p", 1.0)))
    writer.add_sampling_min_p(float(value("min_p", 0.0)))
    writer.add_sampling_penalty_last_n(context_length)  # llama.cpp's default penalises only the last 64 tokens
    writer.add_sampling_penalty_repeat(float(value("repetition_penalty", 1.0)))
    if not value("no_repeat_ngram_size", 0):
        return []
    return ["llama.cpp has no no_repeat_ngram_size: its answers may repeat more often than transformers'."]
