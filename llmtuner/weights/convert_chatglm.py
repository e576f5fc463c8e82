"""Converts ChatGLM2's and ChatGLM3's original checkpoints to transformers' own Glm, which has the same architecture.

Only tensor and config names differ, and queries, keys and values of a layer are one matrix. No code of the checkpoint is
executed: a config.json that Glm would compute differently is rejected.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtuner.console import Timer, UserError
from llmtuner.files import checksum
from llmtuner.model.model_dir import is_original_chatglm, read_json
from llmtuner.outputs import atomic_directory, check_destination
from llmtuner.tokenizer.chatglm3 import check_sentencepiece_spec, read_sentencepiece, save_tokenizer, special_token_ids
from llmtuner.weights.lazy_checkpoint import (
    LazyCheckpoint,
    LazyTensor,
    check_tensors,
    concatenate,
    open_checkpoint,
)

SIZE_KEYS = {  # ChatGLM's name -> Glm's
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
}
# What Glm implements, and ChatGLM's default where its configuration says nothing. `hidden_dropout` and
# `fp32_residual_connection` are not checked: they change training and rounding, not the meaning of the weights.
REQUIRED_VALUES = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}
FIRST_GENERATION_KEYS = ("position_encoding_2d", "inner_hidden_size")
ROPE_THETA = 10_000.0

WORD_EMBEDDINGS = "transformer.embedding.word_embeddings.weight"
FINAL_NORM = "transformer.encoder.final_layernorm.weight"
OUTPUT_LAYER = "transformer.output_layer.weight"
QUERY_KEY_VALUE = "query_key_value"
CHATGLM_TO_GLM = {  # part of a tensor's name in ChatGLM -> in Glm
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "self_attention.query_key_value": "self_attn.{}_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
ROPE_BUFFER = "transformer.rotary_pos_emb.inv_freq"  # a buffer in some checkpoints; Glm computes it

MAX_PADDING_ROWS = 255  # the original embeddings have 226 rows without an id; many more belong to another model
DEFAULT_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.8}  # the defaults of ChatGLM3's own chat()
TIED_SCORES = (
    "tokens share a score, which a tokenizer.json cannot express: transformers encodes by tokenizer.model itself, as a slow "
    "tokenizer (docs/chatglm3-6b.md, The original project's models)"
)
EOS_TOKEN_ID, PAD_TOKEN_ID = 2, 0  # </s> and <unk>


# ------------------------------------------------------------------------------------------------------ configuration
def glm_config_args(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Returns the arguments of `GlmConfig` for ChatGLM's config.json.

    Args:
        directory: where config.json lies, for error messages.

    Raises:
        UserError: lists everything that is missing or that Glm would compute differently.
    """
    if not is_original_chatglm(config):
        raise UserError(
            f"{directory} has a model of type {config.get('model_type')!r}, not 'chatglm'. Convert the directory of "
            "ChatGLM3-6B as originally released."
        )
    if any(name in config for name in FIRST_GENERATION_KEYS):
        raise UserError(
            f"{directory} has ChatGLM-6B of the first generation, which has another architecture. "
            "Download ChatGLM3-6B or ChatGLM2-6B."
        )
    problems, rope = _incompatibilities(config), {}
    try:
        rope = rope_parameters(config)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError(f"Glm cannot represent the model of {directory / 'config.json'}: {'; '.join(problems)}.")
    return {
        **{glm_name: config[name] for name, glm_name in SIZE_KEYS.items()},
        "num_key_value_heads": _num_key_value_heads(config),
        "rms_norm_eps": float(config.get("layernorm_epsilon", 1e-5)),
        "attention_bias": bool(config.get("add_qkv_bias", False)),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "hidden_act": "silu",
        "rope_parameters": rope,
        "use_cache": bool(config.get("use_cache", True)),
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "tie_word_embeddings": False,
        "architectures": ["GlmForCausalLM"],
    }


def _incompatibilities(config: Mapping[str, Any]) -> list[str]:
    """Lists what is missing in a config.json, is invalid, or differs from what Glm implements."""
    num_groups = _num_key_value_heads(config)
    sizes = {name: config[name] for name in SIZE_KEYS if name in config} | {"multi_query_group_num": num_groups}
    problems = [f"{name} is missing" for name in SIZE_KEYS if name not in config]
    problems += [
        f"{name} is {size!r}, not a positive number" for name, size in sizes.items() if not _is_positive_int(size)
    ]
    if not problems and config["num_attention_heads"] % num_groups:
        problems.append("multi_query_group_num does not divide num_attention_heads")
    if not problems and config["kv_channels"] % 4:
        problems.append(f"kv_channels is {config['kv_channels']}, half of which cannot be rotated in pairs")
    problems += [
        f"{name} is {config[name]!r}, not a number in [0, 1)"
        for name in ("layernorm_epsilon", "attention_dropout")
        if not (_is_number(config.get(name, 0)) and 0 <= config.get(name, 0) < 1)
    ]
    problems += [
        f"{name} is {config[name]!r}, Glm supports only {value!r}"
        for name, value in REQUIRED_VALUES.items()
        if config.get(name, value) != value
    ]
    if config.get("quantization_bit") or config.get("quantization_config"):
        problems.append("its weights are quantized (download the checkpoint in full precision)")
    if config.get("pre_seq_len"):
        problems.append(f"pre_seq_len is {config['pre_seq_len']}: Glm has no prefix (P-Tuning)")
    return problems


def _num_key_value_heads(config: Mapping[str, Any]) -> Any:
    name = "multi_query_group_num" if config.get("multi_query_attention", False) else "num_attention_heads"
    return config.get(name, 1)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Glm's `rope_parameters` for ChatGLM's `rope_ratio`, which each generation interprets differently.

    ChatGLM3 (6B-32k, 6B-128k) multiplies the base by it, ChatGLM2 (6B-32k) divides the positions by it. Only the name
    in the configuration tells them apart.

    Raises:
        UserError: if the ratio is not a positive number, or is not 1 and the name fits neither or both.
    """
    ratio, name = config.get("rope_ratio", 1), str(config.get("_name_or_path", "")).lower()
    common = {"rope_theta": ROPE_THETA, "partial_rotary_factor": 0.5}
    if not (_is_number(ratio) and ratio > 0):
        raise UserError(f"rope_ratio is {ratio!r}, not a positive number")
    if ratio == 1:
        return {"rope_type": "default", **common}
    if ("chatglm2" in name) == ("chatglm3" in name):
        raise UserError(
            f"rope_ratio is {ratio}: ChatGLM3 multiplies the rope base by it, ChatGLM2 divides the positions by it, and "
            f"_name_or_path ({config.get('_name_or_path')!r}) does not tell which model this is. Set it to chatglm2 or "
            "chatglm3"
        )
    if "chatglm3" in name:
        return {"rope_type": "default", **common, "rope_theta": ROPE_THETA * ratio}
    return {"rope_type": "linear", "factor": float(ratio), **common}


def describe_model(config: Mapping[str, Any]) -> str:
    """One line about an original checkpoint that can be converted: name, sizes and rotary embedding."""
    rope = rope_parameters(config)
    name = Path(str(config.get("_name_or_path") or "a ChatGLM model without a name")).name
    positions = f"rope base {rope['rope_theta']:,.0f}"
    if rope["rope_type"] == "linear":
        positions += f", positions divided by {rope['factor']:g}"
    return (
        f"{name}: {config['num_layers']} layers, hidden size {config['hidden_size']:,}, "
        f"{config['padded_vocab_size']:,} embedding rows, {config['seq_length']:,} positions, {positions}"
    )


# ------------------------------------------------------------------------------------------------------------- tensors
def chatglm_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor of an original checkpoint; `settings` are those of `glm_config_args`."""
    width, inner, rows = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    queries = settings["num_attention_heads"] * settings["head_dim"]
    fused = queries + 2 * settings["num_key_value_heads"] * settings["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        f"self_attention.{QUERY_KEY_VALUE}.weight": (fused, width),
        f"self_attention.{QUERY_KEY_VALUE}.bias": (fused,),
        "self_attention.dense.weight": (width, queries),
        "post_attention_layernorm.weight": (width,),
        "mlp.dense_h_to_4h.weight": (2 * inner, width),
        "mlp.dense_4h_to_h.weight": (width, inner),
    }
    if not settings["attention_bias"]:
        del layer[f"self_attention.{QUERY_KEY_VALUE}.bias"]
    layers = {
        f"transformer.encoder.layers.{number}.{name}": shape
        for number in range(settings["num_hidden_layers"])
        for name, shape in layer.items()
    }
    return {WORD_EMBEDDINGS: (rows, width), **layers, FINAL_NORM: (width,), OUTPUT_LAYER: (rows, width)}


def convert_tensors(tensors: dict[str, LazyTensor], settings: Mapping[str, Any], per_head: bool) -> list[LazyTensor]:
    """Renames and splits an original checkpoint's tensors into Glm's, in model order; `per_head` as in `split_qkv`."""
    converted = []
    for name in chatglm_shapes(settings):
        glm_name = name
        for part, glm_part in CHATGLM_TO_GLM.items():
            glm_name = glm_name.replace(part, glm_part)
        if QUERY_KEY_VALUE in name:
            converted += split_qkv(tensors[name], glm_name, settings, per_head)
        else:
            converted.append(replace(tensors[name], name=glm_name))
    return converted


def split_qkv(fused: LazyTensor, glm_name: str, settings: Mapping[str, Any], per_head: bool) -> list[LazyTensor]:
    """Splits the fused queries, keys and values of a layer: weights [rows, width] or biases [rows].

    The rows are all queries, then all keys, then all values; with `per_head` (without `multi_query_attention`) the query,
    the key and the value of one head after the other.
    """
    size, heads = settings["head_dim"], settings["num_attention_heads"]
    names = [glm_name.format(letter) for letter in "qkv"]
    if per_head:
        return [
            concatenate(
                name,
                [fused.slice_rows(start, start + size) for start in range(part * size, 3 * heads * size, 3 * size)],
            )
            for part, name in enumerate(names)
        ]
    keys = heads * size
    values = keys + settings["num_key_value_heads"] * size
    bounds = [(0, keys), (keys, values), (values, fused.shape[0])]
    return [fused.slice_rows(start, stop, name) for name, (start, stop) in zip(names, bounds, strict=True)]


# ------------------------------------------------------------------------------------------ tokenizer and generation
def check_tokenizer(model_file: Path, num_rows: int) -> dict[str, int]:
    """Makes sure that a tokenizer follows ChatGLM3's spec and fits embeddings of `num_rows` rows.

    Returns:
        special token -> id

    Raises:
        UserError: if it is unreadable, follows another spec, or has more ids than rows or far fewer.
    """
    proto = read_sentencepiece(model_file)
    check_sentencepiece_spec(proto, model_file, allow_ties=True)
    specials = special_token_ids(proto)
    num_ids = max(len(proto.pieces), *(index + 1 for index in specials.values()))
    if not 0 <= num_rows - num_ids <= MAX_PADDING_ROWS:
        raise UserError(
            f"the tokenizer {model_file} has {num_ids:,} ids, but the embeddings have {num_rows:,} rows. "
            "It belongs to another model: download tokenizer.model and weights from the same source."
        )
    return specials


def generation_config_args(directory: Path, specials: Mapping[str, int]) -> dict[str, Any]:
    """Returns the arguments of `GenerationConfig`: end-of-turn ids and default sampling.

    Only the sampling of an existing generation_config.json is kept; a length limit or a penalty would change greedy answers
    as well.
    """
    sampling: dict[str, Any] = dict(DEFAULT_SAMPLING)
    if (directory / "generation_config.json").is_file():
        original = read_json(directory / "generation_config.json")
        names = ("temperature", "top_p", "top_k") if original.get("do_sample") else ()
        sampling = {"do_sample": bool(names), **{name: original[name] for name in names if name in original}}
    end_of_turn = [specials[token] for token in ("<|user|>", "<|observation|>") if token in specials]
    return {**sampling, "eos_token_id": [EOS_TOKEN_ID, *end_of_turn], "pad_token_id": PAD_TOKEN_ID}


# ---------------------------------------------------------------------------------------------------------- conversion
def open_chatglm(directory: Path) -> LazyCheckpoint:
    """Opens an original checkpoint as the equivalent Glm checkpoint; no weight is read.

    Raises:
        UserError: if configuration, weights or tokenizer cannot be converted or do not match.
    """
    config = read_json(directory / "config.json")
    settings = glm_config_args(config, directory)
    tensors = open_checkpoint(directory)
    if any(name.startswith("transformer.prefix_encoder.") for name in tensors):
        raise UserError(
            f"the weights in {directory} have a prefix (P-Tuning), which Glm does not support. "
            "Download the model without it, or train a LoRA adapter instead."
        )
    tensors.pop(ROPE_BUFFER, None)
    check_tensors(directory, tensors, chatglm_shapes(settings))
    tokenizer = directory / "tokenizer.model"
    specials = check_tokenizer(tokenizer, settings["vocab_size"]) if tokenizer.is_file() else {}

    from transformers import GenerationConfig, GlmConfig

    return LazyCheckpoint(
        GlmConfig(**settings, dtype=tensors[WORD_EMBEDDINGS].dtype),
        GenerationConfig(**generation_config_args(directory, specials)),
        convert_tensors(tensors, settings, per_head=not config.get("multi_query_attention", False)),
        directory,
        {"model.embed_tokens.weight": "input", "lm_head.weight": "output"},
    )


def convert_chatglm(source: Path, destination: Path, overwrite: bool = False) -> str:
    """Converts an original ChatGLM2 or ChatGLM3 checkpoint to a directory that transformers loads as Glm.

    Weights keep their dtype and every bit. The configuration is written beside them and, if the source has a
    tokenizer.model, the fast tokenizer and chat template. Memory holds a few megabytes of the weights at a time.

    Returns:
        lines for the terminal: the model, what the user should know of the result, and what was written

    Raises:
        UserError: as `open_chatglm` and `atomic_directory`; if one directory contains the other.
    """
    timer = Timer()
    source, destination = source.expanduser().resolve(), destination.expanduser().resolve()
    if not source.is_dir():
        raise UserError(f"the checkpoint directory {source} does not exist.")
    if destination.is_relative_to(source) or source.is_relative_to(destination):
        raise UserError(f"one of {destination} and {source} contains the other. Write to a separate directory.")
    check_destination(destination, overwrite)
    checkpoint = open_chatglm(source)
    config = read_json(source / "config.json")
    lines = [describe_model(config)]
    made_from = {str(source): checksum(source)}
    with atomic_directory(destination, replace=overwrite, made_from=made_from) as partial:
        if (source / "tokenizer.model").is_file():
            save_tokenizer(source / "tokenizer.model", partial)
            if not (partial / "tokenizer.json").is_file():
                lines.append(TIED_SCORES)
        else:
            lines.append(f"{source} has no tokenizer.model: only the weights are converted.")
        stats = checkpoint.write(partial)
    if "chatglm2" in str(config.get("_name_or_path")).lower():
        lines.append("The chat template is ChatGLM3's; ChatGLM2 was trained with another chat format.")
    return "\n".join([*lines, f"converted: {stats}, {timer.seconds()} s, in {destination}"])
