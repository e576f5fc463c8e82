"""ChatGLM's published checkpoints become Glm's, and embeddings grow, from disk to disk; bad ones are refused whole."""

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import constants
import pipeline
from llmtuner.console import UserError
from llmtuner.files import MARKER
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.fast import NORMAL, read_sentencepiece
from llmtuner.weights import lazy_checkpoint
from llmtuner.weights.convert_chatglm import check_tokenizer, convert_chatglm, glm_config_args, open_chatglm
from llmtuner.weights.embedding_init import NewTokens, find_new_tokens, init_new_embeddings, median_norm
from llmtuner.weights.lazy_checkpoint import LazyTensor, concatenate, in_memory, open_checkpoint, write_checkpoint
from llmtuner.weights.resize_embeddings import EMBEDDING_WEIGHTS, resize_token_embeddings, rows_equal

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny_chatglm3"
GOLDEN = ROOT / "tests" / "fixtures" / "tiny_chatglm3_logits.npz"
EMBEDDINGS = "transformer.embedding.word_embeddings.weight"
FIRST_FUSED = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
CONFIG = json.loads((TINY / "config.json").read_text())
QUERIES, KEYS = 4 * 16, 2 * 16  # heads x kv_channels, groups x kv_channels


def weights() -> dict[str, torch.Tensor]:
    return load_file(TINY / "model.safetensors")


def publish(directory, tensors=None, tokenizer=None, **changes):
    """A published checkpoint with the given tensors and changes in config.json; None takes an entry out."""
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is not False:
        save_file(weights() if tensors is None else tensors, directory / "model.safetensors")
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        shutil.copyfile(tokenizer / "tokenizer.model", directory / "tokenizer.model")
    return directory


def refused(source, room, *parts, overwrite=False):
    """Converting into an empty room is an `UserError` whose message holds all parts, and leaves nothing behind."""
    room.mkdir(exist_ok=True)
    with pytest.raises(UserError) as error:
        convert_chatglm(source, room / "glm", overwrite)
    for part in parts:
        assert str(part) in str(error.value)
    assert not list(room.iterdir())


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "glm"
    convert_chatglm(TINY, directory)
    return directory


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDEN).items() if value.dtype.kind in "if"}


# ------------------------------------------------------------------------------------- the numbers of the original code
@pytest.fixture(scope="module")
def model(glm):
    return AutoModelForCausalLM.from_pretrained(glm).eval()


def of_case(golden, case):
    names = ("input_ids", "attention_mask", "position_ids")
    return {name: golden[f"{case}.{name}"] for name in names if f"{case}.{name}" in golden}


@pytest.mark.parametrize("case", ["leftpad", "plain40", "batch2", "batch2_leftpad", "long250"])
def test_logits_of_the_original(model, golden, case):
    inputs, wanted = of_case(golden, case), golden[f"{case}.logits"]
    with torch.no_grad():
        logits = model(**inputs).logits[:, -wanted.shape[1] :]
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[:, -wanted.shape[1] :].bool()
    assert (logits - wanted)[seen].abs().max() < 2e-5


@pytest.mark.parametrize(("case", "prompt"), [("generate", None), ("generate_leftpad", "batch2_leftpad")])
def test_greedy_tokens_of_the_original(model, golden, case, prompt):
    """Greedy answers do not care about the sampling that generation_config.json asks for by default."""
    assert model.generation_config.do_sample
    inputs = of_case(golden, prompt) if prompt else {"input_ids": golden["generate.prompt"]}
    inputs.pop("position_ids", None)
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ids, golden[f"{case}.greedy"])


def test_loss_and_gradients_of_the_original(glm, golden):
    model = AutoModelForCausalLM.from_pretrained(glm).train()
    labels = golden["loss.labels"]
    logits = model(**of_case(golden, "batch2")).logits
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
def three_shards(tensors, directory, stem, ending, save):
    """Tensors in three files, mixed, with their index."""
    places = {name: f"{stem}-{1 + number % 3:05}-of-00003.{ending}" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save({name: tensor for name, tensor in tensors.items() if places[name] == file}, directory / file)
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def legacy_save(tensors, file):
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


LAYOUTS = {
    "safetensors in shards": lambda tensors, to: three_shards(tensors, to, "model", "safetensors", save_file),
    "bin": lambda tensors, to: torch.save(tensors, to / "pytorch_model.bin"),
    "bin before zip": lambda tensors, to: legacy_save(tensors, to / "pytorch_model.bin"),
    "bin in shards": lambda tensors, to: three_shards(tensors, to, "pytorch_model", "bin", torch.save),
    "bin before zip, in shards": lambda tensors, to: three_shards(tensors, to, "pytorch_model", "bin", legacy_save),
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
    """Whatever config.json says; None is a checkpoint in which norms and biases are wider than the rest."""
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


def test_heads_without_groups_lie_head_by_head(tmp_path):
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
    """ChatGLM's rotary cache for kv_channels 16: half of them are rotated, in pairs."""
    theta = 1.0 / ((10_000 * base_factor) ** (torch.arange(0, 8, 2, dtype=torch.float) / 8))
    angles = torch.tensor(position / position_divisor, dtype=torch.float) * theta
    return torch.cos(angles), torch.sin(angles)


@pytest.mark.parametrize(
    ("name", "ratio", "original", "said"),
    [
        ("THUDM/chatglm3-6b", None, {}, "chatglm3-6b: 3 layers"),
        ("THUDM/chatglm3-6b-32k", 50, {"base_factor": 50}, "rope base 500,000"),
        ("THUDM/chatglm3-6b-128k", 500, {"base_factor": 500}, "rope base 5,000,000"),
        ("THUDM/chatglm2-6b-32k", 16, {"position_divisor": 16}, "positions divided by 16"),
    ],
)
def test_rotary_embedding_of_the_long_variants(tmp_path, capsys, name, ratio, original, said):
    changes = {"_name_or_path": name, "rope_ratio": ratio, "seq_length": 32_768}
    convert_chatglm(publish(tmp_path / "published", **changes), tmp_path / "glm")
    for position in (1, 30_000):
        for found, wanted in zip(
            rotation_of(tmp_path / "glm", position), rotation_in_the_original(position, **original), strict=True
        ):
            assert torch.allclose(found, wanted, atol=1e-5 if position == 1 else 5e-3)
    far = rotation_in_the_original(30_000, **original)[0]
    assert ratio is None or (far - rotation_in_the_original(30_000)[0]).abs().max() > 0.1
    assert AutoConfig.from_pretrained(tmp_path / "glm").max_position_embeddings == 32_768
    output = capsys.readouterr().out
    assert said in output
    assert ("chat template is ChatGLM3's" in output) == ("chatglm2" in name)


@pytest.mark.parametrize("name", [None, "my-model", "chatglm2-to-chatglm3"])
def test_rope_ratio_of_an_unknown_model(tmp_path, name):
    source = publish(tmp_path / "published", _name_or_path=name, rope_ratio=16)
    refused(
        source, tmp_path / "room", "rope_ratio is 16", "multiplies the rope base", "divides the positions", "Set it"
    )


# ------------------------------------------------------------------------------------------------- tokenizer and answers
def test_tokenizer_and_ends_of_an_answer(tmp_path, tiny_tokenizer_dir):
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


def test_the_licence_of_weights_goes_where_they_go(tmp_path):
    from llmtuner.weights.resize_embeddings import open_model

    source = publish(tmp_path / "published")
    (source / "MODEL_LICENSE").write_text("terms")
    convert_chatglm(source, tmp_path / "converted")
    assert (tmp_path / "converted" / "MODEL_LICENSE").read_text() == "terms"
    (tmp_path / "merged").mkdir()
    open_model(tmp_path / "converted").write(tmp_path / "merged")  # as growing and merging do
    assert (tmp_path / "merged" / "MODEL_LICENSE").read_text() == "terms"
    assert not (tmp_path / "merged" / "LICENSE").exists()


def test_without_tokenizer_the_weights_alone(glm, tmp_path, capsys):
    convert_chatglm(publish(tmp_path / "published"), tmp_path / "glm")
    assert "no tokenizer.model" in capsys.readouterr().out
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
        (add_pieces, "609 ids, the embeddings have 512 rows"),
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
    refused(source, tmp_path / "room", source / "tokenizer.model", part)
    with pytest.raises(UserError, match=part):  # growing writes no tokenizer, and asks all the same
        open_chatglm(source)


def test_tokenizer_of_a_smaller_model(tiny_tokenizer_dir):
    model_file = tiny_tokenizer_dir / "tokenizer.model"
    assert check_tokenizer(model_file, 409 + 255)["[MASK]"] == 400
    with pytest.raises(UserError, match="409 ids, the embeddings have 665 rows"):
        check_tokenizer(model_file, 409 + 256)


# ------------------------------------------------------------------------------------------------ configurations refused
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
    refused(publish(tmp_path / "published", **changes), tmp_path / "room", tmp_path / "published", *parts)


def test_what_configurations_leave_out():
    """The original's own defaults; dropout and precision of the residual change nothing that weights mean."""
    unsaid = ["rmsnorm", "post_layer_norm", "original_rope", "add_bias_linear", "layernorm_epsilon", "rope_ratio"]
    short = {name: value for name, value in CONFIG.items() if name not in unsaid}
    assert glm_config_args({**short, "hidden_dropout": 0.1}, TINY) == glm_config_args(CONFIG, TINY)
    assert glm_config_args({**CONFIG, "multi_query_group_num": 1}, TINY)["num_key_value_heads"] == 1
    assert glm_config_args({**CONFIG, "layernorm_epsilon": 1e-6}, TINY)["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("content", "part"), [(None, "cannot read"), ("{", "not valid JSON"), ("[]", "no JSON object")]
)
def test_configuration_that_cannot_be_read(tmp_path, content, part):
    source = publish(tmp_path / "published")
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    refused(source, tmp_path / "room", source / "config.json", part)


# -------------------------------------------------------------------------------------------------------- weights refused
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
        ("transformer.encoder.layers.3.input_layernorm.weight", torch.ones(64), ["1 left over", "layers.3"]),
        (FIRST_FUSED, torch.ones(127, 64), ["1 of another shape", "[127, 64] instead of [128, 64]"]),
        (EMBEDDINGS, torch.ones(512, 64, dtype=torch.int8), ["is quantized", "precision", "I8"]),
        ("transformer.prefix_encoder.embedding.weight", torch.ones(8, 64), ["P-Tuning"]),
    ],
)
def test_weights_that_are_not_the_configurations(tmp_path, name, tensor, parts):
    tensors = with_tensor(name, tensor)
    refused(publish(tmp_path / "published", tensors), tmp_path / "room", tmp_path / "published", *parts)


def test_all_differences_are_listed_at_once(tmp_path):
    tensors = with_tensor(EMBEDDINGS, None) | {"stranger": torch.ones(1), FIRST_FUSED: torch.ones(2, 2)}
    refused(
        publish(tmp_path / "published", tensors), tmp_path / "room", "1 missing", "1 left over", "1 of another shape"
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_that_are_none(tmp_path, number, dtype):
    source = publish(tmp_path / "published", with_number(number, dtype))
    refused(source, tmp_path / "room", "NaN or infinity", EMBEDDINGS, source / "model.safetensors")


@pytest.mark.parametrize("layout", ["safetensors in shards", "bin in shards"])
def test_shard_that_is_missing(tmp_path, layout):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS[layout](weights(), source)
    next(source.glob("*-00002-of-*")).unlink()
    refused(source, tmp_path / "room", "index.json", "not there", "-00002-of-00003")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "safetensors beside a damaged bin"])
def test_file_that_is_cut_off(tmp_path, layout):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS[layout](weights(), source)
    file = max(one for one in source.iterdir() if one.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    refused(source, tmp_path / "room", file, "damaged")


def test_file_that_shrinks_while_it_is_read(tmp_path):
    source = publish(tmp_path / "published")
    tensor = open_checkpoint(source)[FIRST_FUSED]
    os.truncate(source / "model.safetensors", 1_000)
    with pytest.raises(UserError, match="became shorter"):
        tensor.read_rows(0, 128)
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot read"):
        tensor.read_rows(0, 128)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda places: places.update({EMBEDDINGS: "model-00009-of-00003.safetensors"}), ["not there", "00009"]),
        (lambda places: places.update({"stranger": places[EMBEDDINGS]}), ["do not hold", "stranger"]),
        (lambda places: places.pop(EMBEDDINGS), ["places elsewhere or not at all", EMBEDDINGS]),
        (lambda places: places.update({EMBEDDINGS: places[FIRST_FUSED]}), ["places elsewhere", EMBEDDINGS]),
        (lambda places: places.update({EMBEDDINGS: "../model.safetensors"}), ["no weight_map", "beside it"]),
        (lambda places: places.update({EMBEDDINGS: 3}), ["no weight_map"]),
    ],
)
def test_index_that_does_not_fit(tmp_path, change, parts):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS["safetensors in shards"](weights(), source)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    refused(source, tmp_path / "room", *parts)


def test_shard_that_the_index_does_not_name(tmp_path):
    source = publish(tmp_path / "published", tensors=False)
    LAYOUTS["safetensors in shards"](weights(), source)
    save_file({"left": torch.ones(2)}, source / "model-00004-of-00004.safetensors")
    refused(source, tmp_path / "room", "model-00004-of-00004.safetensors", "not at all: left")


def test_directory_without_weights(tmp_path):
    refused(publish(tmp_path / "published", tensors=False), tmp_path / "room", "holds no weights", "published")
    refused(tmp_path / "nowhere", tmp_path / "room", "nowhere does not exist")


class Code:
    """A pickle that runs a command when it is loaded."""

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
    refused(source, tmp_path / "room", source / "pytorch_model.bin", "is not loaded")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "part"),
    [([1, 2], "no tensors by name"), ({"epoch": 3}, "epoch is int"), ({"a": torch.ones(2).to_sparse()}, "a is ")],
)
def test_pickle_of_something_else(tmp_path, content, part):
    source = publish(tmp_path / "published", tensors=False)
    torch.save(content, source / "pytorch_model.bin")
    refused(source, tmp_path / "room", source / "pytorch_model.bin", part)


# ----------------------------------------------------------------------------------------------------------------- writing
def test_shards_load_in_transformers(glm, tmp_path, monkeypatch):
    source = open_checkpoint(glm)
    written = write_checkpoint(list(source.values()), tmp_path, max_shard_bytes=100_000)
    assert written.num_files == len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.nbytes == sum(tensor.nbytes for tensor in source.values())
    sizes = [file.stat().st_size for file in sorted(tmp_path.glob("*.safetensors"))]
    assert all(before + after > 100_000 for before, after in pairwise(sizes))  # filled in turn
    assert all(file.stat().st_size < 100_000 + 2_000 for file in tmp_path.glob("model-0000[2-4]*"))
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.glob("*")} == {0o666 & ~umask}
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(glm / name, tmp_path / name)
    weights_of = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights_of[name], tensor) for name, tensor in load_file(glm / "model.safetensors").items())
    assert list(open_checkpoint(tmp_path)) == list(source)


def test_dtypes_of_one_file_are_aligned(tmp_path):
    """Three halves before a double would put it at a place that is no multiple of 8."""
    tensors = {"half": torch.ones(3).half(), "double": torch.ones(3).double(), "single": torch.ones(3)}
    write_checkpoint([in_memory(name, tensor) for name, tensor in tensors.items()], tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(content[name], tensor) and content[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    file = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + header_bytes])
    assert header_bytes % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "read_rows",
    [
        lambda start, stop: torch.ones(stop - start, 2, dtype=torch.float16),
        lambda start, stop: torch.ones(stop - start, 3),
        lambda start, stop: torch.ones(stop - start - 1, 2),
        lambda start, stop: torch.ones(stop - start + 1, 2),
    ],
)
def test_never_more_or_less_than_planned(tmp_path, read_rows):
    with pytest.raises(UserError, match="somewhere"):
        write_checkpoint([LazyTensor("a", (4, 2), torch.float32, read_rows, "a somewhere")], tmp_path)


def test_concatenated_rows():
    whole = torch.arange(24.0).view(8, 3)
    parts = [
        in_memory("a", whole[:3]),
        in_memory("a", whole[3:3]),
        in_memory("a", whole[3:7]),
        in_memory("a", whole[7:]),
    ]
    joined = concatenate("all", parts)
    assert (joined.name, joined.shape) == ("all", (8, 3))
    for start in range(8):
        for stop in range(start + 1, 9):
            assert torch.equal(joined.read_rows(start, stop), whole[start:stop])


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(lazy_checkpoint.shutil, "disk_usage", lambda path: usage(0, 0, 700_000))
    monkeypatch.setattr(lazy_checkpoint, "_write_tensor", None)
    refused(publish(tmp_path / "published"), tmp_path / "room", "need 0.001 GB", "0.001 GB free")
    monkeypatch.undo()
    monkeypatch.setattr(lazy_checkpoint.shutil, "disk_usage", lambda path: usage(0, 0, 800_000))
    convert_chatglm(TINY, tmp_path / "glm")


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        convert_chatglm(TINY, tmp_path / "file" / "glm")


def test_what_stands_at_the_destination(glm, tmp_path):
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
        with pytest.raises(UserError, match="lie in each other"):
            convert_chatglm(source, inside, overwrite=True)
    assert sorted(file.name for file in source.iterdir()) == ["config.json", "model.safetensors"]


def command(*words, preexec_fn=None, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    line = [sys.executable, "-m", "llmtuner", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=preexec_fn)


def test_command_line(tmp_path):
    source = publish(tmp_path / "published", quantization_bit=4)
    (tmp_path / "room").mkdir()
    for words, part in [(("convert", source, tmp_path / "room" / "glm"), "quantized"), (("convert",), "usage")]:
        result = command(*words)
        assert (result.returncode, result.stderr.count("error:")) == (2, 1)
        assert part in result.stderr
        assert "Traceback" not in result.stderr
    assert not list((tmp_path / "room").iterdir())


def test_doors_of_the_command_line(tmp_path, monkeypatch):
    from llmtuner.__main__ import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["llmtuner", *map(str, words)])
        main()

    call("convert", TINY, tmp_path / "glm")
    with pytest.raises(UserError, match="OVERWRITE=1"):
        call("convert", TINY, tmp_path / "glm")
    monkeypatch.setenv("OVERWRITE", "1")
    call("convert", TINY, tmp_path / "glm")
    for door in ("train", "export"):
        with pytest.raises(UserError, match="cannot read"):
            call(door, tmp_path / "missing.yaml")


def test_disk_that_fills_up(tmp_path):
    """For real: the process may not write a file of more than 300 kB."""
    room = tmp_path / "room"
    room.mkdir()
    result = command(
        *("convert", TINY, room / "glm"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert result.returncode == 2, result.stderr
    assert "the disk filled up while writing" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(room.iterdir())


# ----------------------------------------------------------------------------------------------------------------- growing
FIRST, UNKNOWN = 409, 0
NEW = NewTokens(FIRST, [[5, 9], [7], *([[11, 12, number] for number in range(20, 180)])], UNKNOWN)


def grow(source, destination, new=NEW, **options):
    with atomic_directory(destination) as partial:
        return resize_token_embeddings(source, partial, new, 64, **options)


@pytest.fixture
def published(tmp_path, tiny_tokenizer_dir):
    return publish(tmp_path / "published", tokenizer=tiny_tokenizer_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_growing_keeps_every_old_bit(tmp_path, tiny_tokenizer_dir, dtype, monkeypatch):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    source = publish(tmp_path / "published", tensors, tokenizer=tiny_tokenizer_dir)
    convert_chatglm(source, tmp_path / "glm")
    monkeypatch.setattr(lazy_checkpoint, "CHUNK_BYTES", 100)  # less than a row
    grown = grow(tmp_path / "glm", tmp_path / "zero")
    assert (grown.old_vocab_size, grown.vocab_size) == (512, 576)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("glm", "zero"))
    assert before.keys() == after.keys()
    for name, old in before.items():
        now = after[name]
        assert now.dtype == dtype
        if name not in EMBEDDING_WEIGHTS:
            assert torch.equal(bits(old), bits(now))
            continue
        assert now.shape == (576, 64)
        assert torch.equal(bits(old[:FIRST]), bits(now[:FIRST]))
        assert torch.equal(now[FIRST], ((old[5].float() + old[9].float()) / 2).to(dtype))
        assert torch.equal(now[FIRST + 1], old[7])
        assert torch.allclose(now[NEW.end - 1].float(), old[NEW.base_ids[-1]].float().mean(dim=0), rtol=0.01)
        assert torch.equal(now[FIRST : NEW.end], init_new_embeddings(old, NEW, "mean").to(dtype))
        assert torch.equal(now[NEW.end :], old[UNKNOWN].expand(576 - NEW.end, -1))
        assert NEW.end < 576
    assert AutoConfig.from_pretrained(tmp_path / "zero").dtype == dtype

    grow(source, tmp_path / "zero-of-published")  # without converting first
    files = {file.name for file in (tmp_path / "zero").iterdir()} - {MARKER}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    for name in files:
        assert (tmp_path / "zero" / name).read_bytes() == (tmp_path / "zero-of-published" / name).read_bytes()


def test_grown_model_has_the_logits_of_its_base(glm, model, tmp_path):
    grow(glm, tmp_path / "zero")
    zero = AutoModelForCausalLM.from_pretrained(tmp_path / "zero").eval()
    assert not zero.config.tie_word_embeddings
    ids = torch.randint(3, FIRST, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, zero(input_ids=ids).logits
    assert torch.equal(before[..., :FIRST], after[..., :FIRST])
    # A mean of native logits can equal the greatest, but not pass it.
    assert (after.max(dim=-1).values <= after[..., :FIRST].max(dim=-1).values + 1e-5).all()


def test_rows_come_from_the_callers_function(glm, tmp_path):
    seen = []

    def init_fn(matrix, which):
        seen.append((which, tuple(matrix.shape), matrix.dtype))
        return torch.full((len(NEW.base_ids), 64), {"input": 1.0, "output": 2.0}[which])

    grow(glm, tmp_path / "zero", init_fn=init_fn)
    assert sorted(seen) == [("input", (512, 64), torch.float32), ("output", (512, 64), torch.float32)]
    after = load_file(tmp_path / "zero" / "model.safetensors")
    assert (after["model.embed_tokens.weight"][FIRST : NEW.end] == 1).all()
    assert (after["lm_head.weight"][FIRST : NEW.end] == 2).all()
    with pytest.raises(ValueError, match="162 new pieces"):
        grow(glm, tmp_path / "wrong", init_fn=lambda matrix, which: torch.ones(3, 64))
    with pytest.raises(UserError, match="NaN or infinity"):
        grow(glm, tmp_path / "wrong", init_fn=lambda matrix, which: torch.full((162, 64), float("nan")))
    assert not (tmp_path / "wrong").exists()


def test_same_rows_sees_one_bit(glm, tmp_path):
    grow(glm, tmp_path / "zero")
    assert rows_equal(glm, tmp_path / "zero", FIRST)
    tensors = load_file(tmp_path / "zero" / "model.safetensors")
    tensors["lm_head.weight"][FIRST - 1, 63] = torch.nextafter(
        tensors["lm_head.weight"][FIRST - 1, 63], torch.tensor(9.0)
    )
    save_file(tensors, tmp_path / "zero" / "model.safetensors")
    assert not rows_equal(glm, tmp_path / "zero", FIRST)
    assert rows_equal(glm, tmp_path / "zero", FIRST - 1)


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda to: edit_config(to, tie_word_embeddings=True), "tied embeddings"),
        (lambda to: without(to, "lm_head.weight"), "tied embeddings"),
        (lambda to: without(to, "model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda to: edit_config(to, vocab_size=640), "of another shape"),
        (lambda to: edit_config(to, hidden_size="wide"), "cannot be read"),
        (lambda to: edit_config(to, model_type="unheard-of"), "cannot be read"),
        (lambda to: (to / "config.json").unlink(), "cannot read"),
    ],
)
def test_base_that_cannot_grow(glm, tmp_path, damage, part):
    shutil.copytree(glm, tmp_path / "glm")
    damage(tmp_path / "glm")
    with pytest.raises(UserError, match=part):
        grow(tmp_path / "glm", tmp_path / "zero")
    assert not (tmp_path / "zero").exists()


def without(directory, name):
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors")


def test_base_with_fewer_rows_than_ids(glm, tmp_path):
    with pytest.raises(UserError, match="512 embedding rows, its tokenizer 513 ids"):
        grow(glm, tmp_path / "zero", NewTokens(513, [[5]], 0))


def test_base_without_generation_config(glm, tmp_path):
    shutil.copytree(glm, tmp_path / "glm")
    (tmp_path / "glm" / "generation_config.json").unlink()
    grow(tmp_path / "glm", tmp_path / "zero")
    assert json.loads((tmp_path / "zero" / "generation_config.json").read_text())["eos_token_id"] == 2


# --------------------------------------------------------------------------------------------------------------- the steps
def test_base_as_published_is_for_step_3_only(published, monkeypatch):
    monkeypatch.setattr(constants, "BASE_MODEL_DIR", published)
    assert pipeline.require_base_model(published=True) == published
    assert pipeline.require_base_model(weights=False) == published
    with pytest.raises(UserError, match=f"python -m llmtuner convert {published}"):
        pipeline.require_base_model()
    (published / "model.safetensors").rename(published / "pytorch_model.bin")
    assert pipeline.require_base_model(published=True) == published
    (published / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        pipeline.require_base_model(published=True)
    (published / "model.safetensors").write_bytes(b"")
    (published / "config.json").write_text("")
    with pytest.raises(UserError, match="not valid JSON"):
        pipeline.require_base_model()


def fill_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_step_3_on_a_published_checkpoint_loads_without_this_project(published, tmp_path, monkeypatch):
    import step3_resize_model as step3
    from llmtuner.tokenizer.fast import save_tokenizer
    from llmtuner.tokenizer.merge_vocab import merge_vocab
    from llmtuner.weights.embedding_init import METHODS

    assert sorted(step3.METHODS) == sorted(METHODS)
    merged = tmp_path / "work" / "step2_merged_tokenizer"
    merged.mkdir(parents=True)
    proto = merge_vocab(read_sentencepiece(published / "tokenizer.model"), ["ま", "す", "ます"])
    (tmp_path / "merged.model").write_bytes(proto.SerializeToString())
    save_tokenizer(tmp_path / "merged.model", merged)
    zero = tmp_path / "work" / "step3_zero"
    for name, value in {"BASE_MODEL_DIR": published, "MERGED_TOKENIZER_DIR": merged, "ZERO_DIR": zero}.items():
        monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(step3, name, value)
    monkeypatch.setattr(constants, "WORK_DIR", tmp_path / "work")
    monkeypatch.setattr(constants, "METRICS_DIR", tmp_path / "work" / "metrics")
    monkeypatch.setattr(
        sys, "argv", ["step3", "--init", "mean", "--norm-correction", "--init-output", "first_weighted"]
    )
    for where, instead, message in (
        ("lazy_checkpoint._write_tensor", fill_disk, "the disk filled up while writing"),
        ("resize_embeddings.rows_equal", lambda *_: False, "came back changed"),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(f"llmtuner.weights.{where}", instead)
            with pytest.raises(UserError, match=message):
                step3.main()
        assert [one.name for one in (tmp_path / "work").iterdir() if one.name != ".lock"] == [merged.name]
    step3.main()
    metrics = pipeline.load_metrics("step3")
    assert (metrics["old_rows"], metrics["new_rows"], metrics["old_rows_identical"]) == (512, 512, True)
    assert metrics["old_logits_max_diff"] is None
    assert metrics["init"] == {"input": "mean", "output": "first_weighted"}
    assert metrics["norm_correction"]
    rows = {
        one.name: one.read_rows(0, 512).float()
        for one in open_checkpoint(zero).values()
        if one.name in EMBEDDING_WEIGHTS
    }
    new = find_new_tokens(published / "tokenizer.model", merged / "tokenizer.model")
    embeddings, head = rows["model.embed_tokens.weight"], rows["lm_head.weight"]
    assert torch.allclose(embeddings[new.first_id : new.end].norm(dim=1), torch.tensor(median_norm(embeddings, new)))
    assert torch.allclose(
        head[new.first_id : new.end], init_new_embeddings(head, new, "first_weighted")
    )  # never scaled

    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; directory = sys.argv[1];"
        "model = AutoModelForCausalLM.from_pretrained(directory); tokenizer = AutoTokenizer.from_pretrained(directory);"
        "ids = tokenizer('ます', return_tensors='pt').input_ids; assert ids[0, -1] == 411, ids;"
        "model.generate(ids, max_new_tokens=4); assert 'llmtuner' not in sys.modules"
    )
    line = [sys.executable, "-I", "-c", code, str(zero)]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk filled up"), (errno.EACCES, "cannot write"), (errno.EBADF, None)]
)
def test_what_a_failed_write_says_and_leaves(tmp_path, number, message):
    with atomic_directory(tmp_path / "result") as older:
        (older / "older").touch()

    def fail_half_way():
        with atomic_directory(tmp_path / "result", replace=True) as partial:
            (partial / "half").touch()
            raise OSError(number, "no")

    with pytest.raises(UserError if message else OSError, match=message):
        fail_half_way()
    assert [str(one.relative_to(tmp_path)) for one in sorted(tmp_path.rglob("*"))] == [
        "result",
        f"result/{MARKER}",
        "result/older",
    ]
