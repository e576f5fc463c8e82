"""Converted ChatGLM checkpoints have the original logits, bits and tokenizer; damaged ones are rejected."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmtuner.console import UserError
from llmtuner.files import MARKER
from llmtuner.tokenizer.chatglm3 import NORMAL, read_sentencepiece
from llmtuner.weights import lazy_checkpoint
from llmtuner.weights.convert_chatglm import check_tokenizer, convert_chatglm, glm_config_args, open_chatglm
from llmtuner.weights.lazy_checkpoint import open_checkpoint
from tests.checkpoints import CONFIG, TINY, assert_rejected, bits, publish, publish_extended, weights
from tests.helpers import ROOT
from tests.tokenizers import merge_as_published, save_model

GOLDEN = ROOT / "tests" / "fixtures" / "tiny_chatglm3_logits.npz"
EMBEDDINGS = "transformer.embedding.word_embeddings.weight"
FIRST_FUSED = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
QUERIES, KEYS = 4 * 16, 2 * 16  # heads x kv_channels, groups x kv_channels


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items() if value.dtype.kind in "if"}


# ------------------------------------------------------------------------------------- logits of the original code
@pytest.fixture(scope="module")
def model(glm):
    return AutoModelForCausalLM.from_pretrained(glm).eval()


def inputs_of(golden, case):
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: golden[f"{case}.{name}"] for name in names if f"{case}.{name}" in golden}


@pytest.mark.parametrize("case", ["leftpad", "plain40", "batch2", "batch2_leftpad", "long250"])
def test_logits_of_the_original(model, golden, case):
    inputs, expected = inputs_of(golden, case), golden[f"{case}.logits"]
    with torch.no_grad():
        logits = model(**inputs).logits[:, -expected.shape[1] :]
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, -expected.shape[1] :].bool()
    assert (logits - expected)[seen].abs().max() < 2e-5


@pytest.mark.parametrize(("case", "prompt"), [("generate", None), ("generate_leftpad", "batch2_leftpad")])
def test_greedy_tokens_of_the_original(model, golden, case, prompt):
    """Greedy decoding is unaffected by the default sampling of generation_config.json."""
    assert model.generation_config.do_sample
    inputs = inputs_of(golden, prompt) if prompt else {"input_ids": golden["generate.prompt"]}
    inputs.pop("position_ids", None)
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ids, golden[f"{case}.greedy"])


def test_loss_and_gradients_of_the_original(glm, golden):
    model = AutoModelForCausalLM.from_pretrained(glm).train()
    labels = golden["loss.labels"]
    logits = model(**inputs_of(golden, "batch2")).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss.value"].item(), rel=1e-6)

    squares: dict[str, float] = {}
    to_original = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "model.layers": "transformer.encoder.layers",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "self_attn.q_proj": "self_attention.query_key_value",
        "self_attn.k_proj": "self_attention.query_key_value",
        "self_attn.v_proj": "self_attention.query_key_value",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    for name, parameter in model.named_parameters():
        for part, original in to_original.items():
            name = name.replace(part, original)
        squares[name] = squares.get(name, 0.0) + float(parameter.grad.double().square().sum())
    names = np.load(GOLDEN)["loss.grad_names"].tolist()
    assert squares.keys() == set(names)
    assert [squares[name] ** 0.5 for name in names] == pytest.approx(golden["loss.grad_norms"].tolist(), rel=1e-5)


# --------------------------------------------------------------------------------------------- every layout, every dtype
def save_three_shards(tensors, directory, stem, ending, save):
    """Saves tensors alternately in three files with an index."""
    places = {name: f"{stem}-{1 + number % 3:05}-of-00003.{ending}" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save({name: tensor for name, tensor in tensors.items() if places[name] == file}, directory / file)
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def legacy_save(tensors, file):
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


LAYOUTS = {
    "safetensors in shards": lambda tensors, to: save_three_shards(tensors, to, "model", "safetensors", save_file),
    "bin": lambda tensors, to: torch.save(tensors, to / "pytorch_model.bin"),
    "bin before zip": lambda tensors, to: legacy_save(tensors, to / "pytorch_model.bin"),
    "bin in shards": lambda tensors, to: save_three_shards(tensors, to, "pytorch_model", "bin", torch.save),
    "bin before zip, in shards": lambda tensors, to: save_three_shards(
        tensors, to, "pytorch_model", "bin", legacy_save
    ),
    "safetensors beside a damaged bin": lambda tensors, to: (
        save_file(tensors, to / "model.safetensors"),
        (to / "pytorch_model.bin").write_bytes(b"damaged"),
    ),
    "parameters": lambda tensors, to: torch.save(
        {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, to / "pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes(glm, tmp_path, layout, monkeypatch):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS[layout](weights(), source)
    monkeypatch.setattr(lazy_checkpoint, "CHUNK_BYTES", 5_000)  # a tensor in many chunks
    convert_chatglm(source, tmp_path / "glm")
    for file in glm.iterdir():
        if file.name != MARKER:  # names the source
            assert (tmp_path / "glm" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, None])
def test_weights_keep_bits_and_dtype(tmp_path, dtype):
    """Regardless of config.json; None is a checkpoint whose norms and biases have a wider dtype than the rest."""
    tensors = {
        name: tensor.to(dtype or (torch.float16 if tensor.dim() == 2 else torch.float32))
        for name, tensor in weights().items()
    }
    convert_chatglm(publish(tmp_path / "published", tensors, torch_dtype="float16"), tmp_path / "glm")
    written = load_file(tmp_path / "glm" / "model.safetensors")
    read = 0
    for layer in range(3):
        for kind in ("weight", "bias"):
            fused = tensors[f"transformer.encoder.layers.{layer}.self_attention.query_key_value.{kind}"]
            parts = [written[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            assert [len(part) for part in parts] == [QUERIES, KEYS, KEYS]
            assert torch.equal(bits(torch.cat(parts)), bits(fused))
            read += 3
        for original, name in [
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ]:
            before = tensors[f"transformer.encoder.layers.{layer}.{original}.weight"]
            after = written[f"model.layers.{layer}.{name}.weight"]
            assert after.dtype == before.dtype
            assert torch.equal(bits(before), bits(after))
            read += 1
    assert torch.equal(bits(tensors[EMBEDDINGS]), bits(written["model.embed_tokens.weight"]))
    assert torch.equal(bits(tensors["transformer.output_layer.weight"]), bits(written["lm_head.weight"]))
    assert torch.equal(bits(tensors["transformer.encoder.final_layernorm.weight"]), bits(written["model.norm.weight"]))
    assert len(written) == read + 3
    assert AutoConfig.from_pretrained(tmp_path / "glm").dtype == (dtype or torch.float16)


def test_without_query_groups_the_fused_matrix_is_per_head(tmp_path):
    """Without multi_query_attention the original reads its fused matrix as [heads, (query, key, value), kv_channels]."""
    generator = torch.Generator().manual_seed(0)
    tensors = weights()
    for layer in range(3):
        prefix = f"transformer.encoder.layers.{layer}.self_attention.query_key_value"
        tensors[f"{prefix}.weight"] = torch.randn(3 * QUERIES, 64, generator=generator)
        tensors[f"{prefix}.bias"] = torch.randn(3 * QUERIES, generator=generator)
    convert_chatglm(publish(tmp_path / "published", tensors, multi_query_attention=False), tmp_path / "glm")
    written = load_file(tmp_path / "glm" / "model.safetensors")
    for kind in ("weight", "bias"):
        fused = tensors[FIRST_FUSED.replace("weight", kind)].unflatten(0, (4, 3, 16))
        for number, letter in enumerate("qkv"):
            part = written[f"model.layers.0.self_attn.{letter}_proj.{kind}"]
            assert torch.equal(part, fused[:, number].flatten(0, 1))
    assert AutoConfig.from_pretrained(tmp_path / "glm").num_key_value_heads == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "glm")


def test_model_without_biases(tmp_path):
    tensors = {name: tensor for name, tensor in weights().items() if not name.endswith(".bias")}
    convert_chatglm(publish(tmp_path / "published", tensors, add_qkv_bias=None), tmp_path / "glm")
    assert not AutoConfig.from_pretrained(tmp_path / "glm").attention_bias
    assert not [name for name in load_file(tmp_path / "glm" / "model.safetensors") if name.endswith(".bias")]


# ---------------------------------------------------------------------------------------------------------- long context
def rotation_of(directory, position):
    rotary = AutoModelForCausalLM.from_pretrained(directory).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.tensor([[position]]))
    return cos[0, 0, :4], sin[0, 0, :4]


def rotation_in_the_original(position, base_factor=1.0, position_divisor=1.0):
    """ChatGLM's rotary cache for kv_channels 16, half of which are rotated in pairs."""
    theta = 1.0 / ((10_000 * base_factor) ** (torch.arange(0, 8, 2, dtype=torch.float) / 8))
    angles = torch.tensor(position / position_divisor, dtype=torch.float) * theta
    return torch.cos(angles), torch.sin(angles)


@pytest.mark.parametrize(
    ("name", "ratio", "original", "described"),
    [
        ("THUDM/chatglm3-6b", None, {}, "chatglm3-6b: 3 layers"),
        ("THUDM/chatglm3-6b-32k", 50, {"base_factor": 50}, "rope base 500,000"),
        ("THUDM/chatglm3-6b-128k", 500, {"base_factor": 500}, "rope base 5,000,000"),
        ("THUDM/chatglm2-6b-32k", 16, {"position_divisor": 16}, "positions divided by 16"),
    ],
)
def test_rotary_embedding_of_the_long_variants(tmp_path, name, ratio, original, described):
    changes = {"_name_or_path": name, "rope_ratio": ratio, "seq_length": 32_768}
    output = convert_chatglm(publish(tmp_path / "published", **changes), tmp_path / "glm")
    for position in (1, 30_000):
        for found, expected in zip(
            rotation_of(tmp_path / "glm", position), rotation_in_the_original(position, **original), strict=True
        ):
            assert torch.allclose(found, expected, atol=1e-5 if position == 1 else 5e-3)
    far = rotation_in_the_original(30_000, **original)[0]
    assert ratio is None or (far - rotation_in_the_original(30_000)[0]).abs().max() > 0.1
    assert AutoConfig.from_pretrained(tmp_path / "glm").max_position_embeddings == 32_768
    assert described in output
    assert ("chat template is ChatGLM3's" in output) == ("chatglm2" in name)


@pytest.mark.parametrize("name", [None, "my-model", "chatglm2-to-chatglm3"])
def test_rope_ratio_of_an_unknown_model(tmp_path, name):
    source = publish(tmp_path / "published", _name_or_path=name, rope_ratio=16)
    assert_rejected(
        source, tmp_path / "out", "rope_ratio is 16", "multiplies the rope base", "divides the positions", "Set it"
    )


# ---------------------------------------------------------------------------------------------- tokenizer and generation
def test_tokenizer_and_end_of_turn_tokens(tmp_path, tiny_tokenizer_dir):
    source = publish(tmp_path / "published", tokenizer=tiny_tokenizer_dir)
    convert_chatglm(source, tmp_path / "glm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "glm")
    generation = json.loads((tmp_path / "glm" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, *tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])]
    assert generation["eos_token_id"] == [2, 406, 408]
    assert generation["pad_token_id"] == 0
    assert [generation[name] for name in ("do_sample", "temperature", "top_p")] == [True, 0.8, 0.8]
    assert AutoConfig.from_pretrained(tmp_path / "glm").eos_token_id == 2
    assert tokenizer.chat_template
    assert (tmp_path / "glm" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_the_licence_is_copied_with_the_weights(tmp_path):
    from llmtuner.weights.resize_embeddings import open_model

    source = publish(tmp_path / "published")
    (source / "MODEL_LICENSE").write_text("terms")
    convert_chatglm(source, tmp_path / "converted")
    assert (tmp_path / "converted" / "MODEL_LICENSE").read_text() == "terms"
    (tmp_path / "merged").mkdir()
    open_model(tmp_path / "converted").write(tmp_path / "merged")  # as resizing and merging do
    assert (tmp_path / "merged" / "MODEL_LICENSE").read_text() == "terms"
    assert not (tmp_path / "merged" / "LICENSE").exists()


def test_without_tokenizer_only_weights_are_converted(glm, tmp_path):
    assert "no tokenizer.model" in convert_chatglm(publish(tmp_path / "published"), tmp_path / "glm")
    names = {MARKER, "config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in glm.iterdir()} == names
    assert json.loads((glm / "generation_config.json").read_text())["eos_token_id"] == [2]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"do_sample": True, "temperature": 0.5, "top_k": 9}, {"do_sample": True, "temperature": 0.5, "top_k": 9}),
        ({"do_sample": False, "temperature": 0.5}, {"do_sample": False}),
        ({}, {"do_sample": False}),
    ],
)
def test_sampling_is_carried_over_and_nothing_else(tmp_path, given, kept):
    source = publish(tmp_path / "published")
    others = {"eos_token_id": 9, "max_length": 10, "repetition_penalty": 1.2, "num_beams": 4}
    (source / "generation_config.json").write_text(json.dumps({**others, **given}))
    convert_chatglm(source, tmp_path / "glm")
    written = json.loads((tmp_path / "glm" / "generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == {**kept, "eos_token_id": [2], "pad_token_id": 0}


def test_the_original_projects_layout(tmp_path, tiny_tokenizer_dir):
    """Its tokenizer has nine placeholders, and new tokens behind them that share a score."""
    base = read_sentencepiece(tiny_tokenizer_dir / "tokenizer.model")
    merged, size = merge_as_published(base, [*"いた", "いた", "たい"]), len(base.pieces)
    source = publish_extended(tmp_path / "published", save_model(merged, tmp_path), 448)
    output = convert_chatglm(source, tmp_path / "glm")
    assert len([line for line in output.splitlines() if "tokens share a score" in line]) == 1
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "glm"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "glm"),
    )
    assert len(tokenizer) == size + 9 + 4 <= model.config.vocab_size == 448
    assert tokenizer.convert_tokens_to_ids("<|user|>") == size + 6
    assert model.generation_config.eos_token_id == [2, size + 6, size + 8]
    assert tokenizer("いたい", add_special_tokens=False)["input_ids"][1:] == tokenizer.convert_tokens_to_ids(
        ["いた", "い"]
    )
    assert not (tmp_path / "glm" / "tokenizer.json").exists()
    assert_rejected(
        publish_extended(tmp_path / "other", save_model(merged, tmp_path), size + 12),
        tmp_path / "out",
        f"{size + 13:,} ids, but the embeddings have {size + 12:,} rows",
    )


def damage_tokenizer(directory, change):
    proto = read_sentencepiece(directory / "tokenizer.model")
    change(proto)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())


def add_pieces(proto):
    lowest = min(piece.score for piece in proto.pieces)
    for number in range(200):
        proto.pieces.add(piece=chr(0xAC00 + number), score=lowest - 1 - number, type=NORMAL)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (add_pieces, "609 ids, but the embeddings have 512 rows"),
        (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"x"), "it normalizes text"),
        (lambda proto: setattr(proto.trainer_spec, "byte_fallback", False), "no byte fallback"),
        (None, "not a sentencepiece model"),
    ],
)
def test_tokenizer_that_cannot_be_used(tmp_path, tiny_tokenizer_dir, change, part):
    source = publish(tmp_path / "published", tokenizer=tiny_tokenizer_dir)
    if change:
        damage_tokenizer(source, change)
    else:
        (source / "tokenizer.model").write_bytes(b"\x0a\xff no model")
    assert_rejected(source, tmp_path / "out", source / "tokenizer.model", part)
    with pytest.raises(UserError, match=part):  # resizing writes no tokenizer, but checks it too
        open_chatglm(source)


def test_tokenizer_of_a_smaller_model(tiny_tokenizer_dir):
    model_file = tiny_tokenizer_dir / "tokenizer.model"
    assert check_tokenizer(model_file, 409 + 255)["[MASK]"] == 400
    with pytest.raises(UserError, match="409 ids, but the embeddings have 665 rows"):
        check_tokenizer(model_file, 409 + 256)


# ------------------------------------------------------------------------------------------------ rejected configurations
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "llama"}, ["'llama'", "not 'chatglm'"]),
        ({"model_type": "glm"}, ["'glm'", "not 'chatglm'"]),
        ({"position_encoding_2d": True, "num_layers": None}, ["first generation"]),
        ({"inner_hidden_size": 16_384}, ["first generation"]),
        ({"quantization_bit": 4}, ["quantized", "full precision"]),
        ({"quantization_config": {"bits": 8}}, ["quantized", "full precision"]),
        ({"pre_seq_len": 128}, ["P-Tuning"]),
        ({"rmsnorm": False, "post_layer_norm": False}, ["rmsnorm is False", "post_layer_norm is False"]),
        ({"original_rope": False}, ["original_rope is False"]),
        ({"add_bias_linear": True}, ["add_bias_linear is True"]),
        (
            {"apply_residual_connection_post_layernorm": True, "num_layers": None, "ffn_hidden_size": 0},
            ["apply_residual_connection_post_layernorm is True", "num_layers is missing", "ffn_hidden_size is 0"],
        ),
        ({"hidden_size": "64"}, ["hidden_size is '64'"]),
        ({"multi_query_group_num": 3}, ["does not divide"]),
        ({"kv_channels": 18}, ["kv_channels is 18"]),
        ({"rope_ratio": 0}, ["rope_ratio is 0"]),
        ({"layernorm_epsilon": "small"}, ["layernorm_epsilon is 'small'"]),
        ({"attention_dropout": 1.5}, ["attention_dropout is 1.5"]),
    ],
)
def test_configuration_that_glm_would_compute_differently(tmp_path, changes, parts):
    assert_rejected(publish(tmp_path / "published", **changes), tmp_path / "out", tmp_path / "published", *parts)


def test_defaults_of_omitted_settings():
    """The original's defaults; dropout and precision of the residual do not change the meaning of the weights."""
    omitted = ["rmsnorm", "post_layer_norm", "original_rope", "add_bias_linear", "layernorm_epsilon", "rope_ratio"]
    short = {name: value for name, value in CONFIG.items() if name not in omitted}
    assert glm_config_args({**short, "hidden_dropout": 0.1}, TINY) == glm_config_args(CONFIG, TINY)
    assert glm_config_args({**CONFIG, "multi_query_group_num": 1}, TINY)["num_key_value_heads"] == 1
    assert glm_config_args({**CONFIG, "layernorm_epsilon": 1e-6}, TINY)["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("content", "part"), [(None, "cannot read"), ("{", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_configuration_that_cannot_be_read(tmp_path, content, part):
    source = publish(tmp_path / "published")
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    assert_rejected(source, tmp_path / "out", source / "config.json", part)


# ------------------------------------------------------------------------------------------------------- rejected weights
def with_tensor(name, tensor):
    tensors = weights()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return tensors


def with_number(number, dtype=torch.float32):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    tensors[EMBEDDINGS][511, 63] = number
    return tensors


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        (EMBEDDINGS, None, ["1 missing", EMBEDDINGS]),
        ("transformer.encoder.layers.3.input_layernorm.weight", torch.ones(64), ["1 unexpected", "layers.3"]),
        (FIRST_FUSED, torch.ones(127, 64), ["1 of another shape", "[127, 64] instead of [128, 64]"]),
        (EMBEDDINGS, torch.ones(512, 64, dtype=torch.int8), ["is quantized", "precision", "I8"]),
        ("transformer.prefix_encoder.embedding.weight", torch.ones(8, 64), ["P-Tuning"]),
    ],
)
def test_weights_that_are_not_the_configurations(tmp_path, name, tensor, parts):
    tensors = with_tensor(name, tensor)
    assert_rejected(publish(tmp_path / "published", tensors), tmp_path / "out", tmp_path / "published", *parts)


def test_all_differences_are_listed_at_once(tmp_path):
    tensors = with_tensor(EMBEDDINGS, None) | {"stranger": torch.ones(1), FIRST_FUSED: torch.ones(2, 2)}
    assert_rejected(
        publish(tmp_path / "published", tensors), tmp_path / "out", "1 missing", "1 unexpected", "1 of another shape"
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_rejected(tmp_path, number, dtype):
    source = publish(tmp_path / "published", with_number(number, dtype))
    assert_rejected(source, tmp_path / "out", "NaN or infinity", EMBEDDINGS, source / "model.safetensors")


@pytest.mark.parametrize("layout", ["safetensors in shards", "bin in shards"])
def test_shard_that_is_missing(tmp_path, layout):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS[layout](weights(), source)
    next(source.glob("*-00002-of-*")).unlink()
    assert_rejected(source, tmp_path / "out", "index.json", "are missing", "-00002-of-00003")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "safetensors beside a damaged bin"])
def test_truncated_file(tmp_path, layout):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS[layout](weights(), source)
    file = max(path for path in source.iterdir() if path.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    assert_rejected(source, tmp_path / "out", file, "damaged")


def test_file_that_is_truncated_while_it_is_read(tmp_path):
    source = publish(tmp_path / "published")
    tensor = open_checkpoint(source)[FIRST_FUSED]
    os.truncate(source / "model.safetensors", 1_000)
    with pytest.raises(UserError, match="was truncated"):
        tensor.read_rows(0, 128)
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read"):
        tensor.read_rows(0, 128)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda weight_map: weight_map.update({EMBEDDINGS: "model-00009-of-00003.safetensors"}),
            ["are missing", "00009"],
        ),
        (lambda weight_map: weight_map.update({"stranger": weight_map[EMBEDDINGS]}), ["not in its files", "stranger"]),
        (lambda weight_map: weight_map.pop(EMBEDDINGS), ["assigns to another file or does not list", EMBEDDINGS]),
        (
            lambda weight_map: weight_map.update({EMBEDDINGS: weight_map[FIRST_FUSED]}),
            ["assigns to another file", EMBEDDINGS],
        ),
        (lambda weight_map: weight_map.update({EMBEDDINGS: "../model.safetensors"}), ["no weight_map", "beside it"]),
        (lambda weight_map: weight_map.update({EMBEDDINGS: 3}), ["no weight_map"]),
    ],
)
def test_index_that_does_not_match(tmp_path, change, parts):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS["safetensors in shards"](weights(), source)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    assert_rejected(source, tmp_path / "out", *parts)


def test_shard_that_the_index_does_not_list(tmp_path):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS["safetensors in shards"](weights(), source)
    save_file({"left": torch.ones(2)}, source / "model-00004-of-00004.safetensors")
    assert_rejected(source, tmp_path / "out", "model-00004-of-00004.safetensors", "does not list: left")


def test_directory_without_weights(tmp_path):
    assert_rejected(publish(tmp_path / "published", tensors=False), tmp_path / "out", "has no weights", "published")
    assert_rejected(tmp_path / "nowhere", tmp_path / "out", "nowhere does not exist")


class Code:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "save", [torch.save, legacy_save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_pickle_is_not_run(tmp_path, save):
    source = publish(tmp_path / "published", tensors=False)
    save({**weights(), "code": Code(tmp_path / "marker")}, source / "pytorch_model.bin")
    assert_rejected(source, tmp_path / "out", source / "pytorch_model.bin", "is not loaded")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [([1, 2], "not a dict of tensors"), ({"epoch": 3}, "epoch is int"), ({"a": torch.ones(2).to_sparse()}, "a is ")],
)
def test_pickle_of_something_else(tmp_path, content, part):
    source = publish(tmp_path / "published", tensors=False)
    torch.save(content, source / "pytorch_model.bin")
    assert_rejected(source, tmp_path / "out", source / "pytorch_model.bin", part)


def test_existing_destinations(glm, tmp_path):
    source = publish(tmp_path / "published")
    old = tmp_path / "old"
    shutil.copytree(glm, old)
    (old / "config.json").write_text("older")
    with pytest.raises(UserError, match="OVERWRITE=1"):
        convert_chatglm(source, old)
    damaged = publish(tmp_path / "damaged", with_number(float("nan")))
    with pytest.raises(UserError, match="NaN"):
        convert_chatglm(damaged, old, overwrite=True)
    assert (old / "config.json").read_text() == "older"
    convert_chatglm(source, old, overwrite=True)
    assert (old / "config.json").read_bytes() == (glm / "config.json").read_bytes()
    for foreign in (old, tmp_path / "photos"):
        foreign.mkdir(exist_ok=True)
        (foreign / "note").write_text("mine")
        with pytest.raises(UserError, match=r"did not make \(note\)"):
            convert_chatglm(source, foreign, overwrite=True)
        assert (foreign / "note").read_text() == "mine"
    for inside in (source, source / "glm", tmp_path):
        with pytest.raises(UserError, match="contains the other"):
            convert_chatglm(source, inside, overwrite=True)
    assert sorted(file.name for file in source.iterdir()) == ["config.json", "model.safetensors"]
