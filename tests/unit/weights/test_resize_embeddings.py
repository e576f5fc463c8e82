"""Resizing embeddings keeps every old bit and the logits of the base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    PhiConfig,
    PhiForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
)

import constants
import pipeline
from llmtuner.console import UserError
from llmtuner.files import MARKER
from llmtuner.model.model_dir import read_json
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.weights import lazy_checkpoint
from llmtuner.weights.convert_chatglm import convert_chatglm
from llmtuner.weights.embedding_init import NewTokens, init_new_embeddings
from llmtuner.weights.resize_embeddings import resize_token_embeddings, rows_equal
from tests.checkpoints import bits, publish, weights
from tests.helpers import TEXTS
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def model(glm):
    return AutoModelForCausalLM.from_pretrained(glm).eval()


# ---------------------------------------------------------------------------------------------------------------- resizing
FIRST, UNKNOWN = 409, 0
EMBEDDING_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")
NEW = NewTokens(FIRST, [[5, 9], [7], *([[11, 12, number] for number in range(20, 180)])], UNKNOWN, range(3, 400))


def resize(source, destination, new=NEW, **options):
    with atomic_directory(destination) as partial:
        return resize_token_embeddings(source, partial, new, 64, **options)


@pytest.fixture
def published(tmp_path, tiny_tokenizer_dir):
    return publish(tmp_path / "published", tokenizer=tiny_tokenizer_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_resizing_keeps_old_rows_bit_identical(tmp_path, tiny_tokenizer_dir, dtype, monkeypatch):
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    source = publish(tmp_path / "published", tensors, tokenizer=tiny_tokenizer_dir)
    convert_chatglm(source, tmp_path / "glm")
    monkeypatch.setattr(lazy_checkpoint, "CHUNK_BYTES", 100)  # less than a row
    result = resize(tmp_path / "glm", tmp_path / "zero")
    assert (result.old_vocab_size, result.vocab_size) == (512, 576)
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

    resize(source, tmp_path / "zero-of-published")  # without converting first
    files = {file.name for file in (tmp_path / "zero").iterdir()} - {MARKER}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    for name in files:
        assert (tmp_path / "zero" / name).read_bytes() == (tmp_path / "zero-of-published" / name).read_bytes()


def test_resized_model_has_the_logits_of_its_base(glm, model, tmp_path):
    resize(glm, tmp_path / "zero")
    zero = AutoModelForCausalLM.from_pretrained(tmp_path / "zero").eval()
    assert not zero.config.tie_word_embeddings
    ids = torch.randint(3, FIRST, (4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = model(input_ids=ids).logits, zero(input_ids=ids).logits
    assert torch.equal(before[..., :FIRST], after[..., :FIRST])
    # A mean of base-vocabulary logits can equal the largest of them, but not exceed it.
    assert (after.max(dim=-1).values <= after[..., :FIRST].max(dim=-1).values + 1e-5).all()


def test_new_rows_come_from_init_fn(glm, tmp_path):
    seen = []

    def init_fn(matrix, which):
        seen.append((which, tuple(matrix.shape), matrix.dtype))
        return torch.full((len(NEW.base_ids), 64), {"input": 1.0, "output": 2.0}[which])

    resize(glm, tmp_path / "zero", init_fn=init_fn)
    assert sorted(seen) == [("input", (512, 64), torch.float32), ("output", (512, 64), torch.float32)]
    after = load_file(tmp_path / "zero" / "model.safetensors")
    assert (after["model.embed_tokens.weight"][FIRST : NEW.end] == 1).all()
    assert (after["lm_head.weight"][FIRST : NEW.end] == 2).all()
    with pytest.raises(ValueError, match="162 new tokens"):
        resize(glm, tmp_path / "wrong", init_fn=lambda matrix, which: torch.ones(3, 64))
    with pytest.raises(UserError, match="NaN or infinity"):
        resize(glm, tmp_path / "wrong", init_fn=lambda matrix, which: torch.full((162, 64), float("nan")))
    assert not (tmp_path / "wrong").exists()


def test_rows_equal_detects_one_bit(glm, tmp_path):
    resize(glm, tmp_path / "zero")
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
        (lambda to: edit_config(to, tie_word_embeddings=True), "two different matrices"),
        (lambda to: without(to, "lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda to: without(to, "model.norm.weight"), "1 missing: model.norm.weight"),
        (lambda to: edit_config(to, vocab_size=640), "of another shape"),
        (lambda to: edit_config(to, hidden_size="wide"), "that can be used"),
        (lambda to: edit_config(to, model_type="unheard-of"), "that can be used"),
        (lambda to: (to / "config.json").unlink(), "cannot read"),
    ],
)
def test_base_that_cannot_be_resized(glm, tmp_path, damage, part):
    shutil.copytree(glm, tmp_path / "glm")
    damage(tmp_path / "glm")
    with pytest.raises(UserError, match=part):
        resize(tmp_path / "glm", tmp_path / "zero")
    assert not (tmp_path / "zero").exists()


def without(directory, name):
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors")


def test_base_with_fewer_rows_than_ids(glm, tmp_path):
    with pytest.raises(UserError, match="512 embedding rows, but its tokenizer has 513 ids"):
        resize(glm, tmp_path / "zero", NewTokens(513, [[5]], 0, range(3, 504)))


def test_base_without_generation_config(glm, tmp_path):
    shutil.copytree(glm, tmp_path / "glm")
    (tmp_path / "glm" / "generation_config.json").unlink()
    resize(tmp_path / "glm", tmp_path / "zero")
    assert json.loads((tmp_path / "zero" / "generation_config.json").read_text())["eos_token_id"] == 2


# --------------------------------------------------------------------------------------------------------------- the steps
def test_base_as_published_is_for_step_3_only(published, monkeypatch):
    monkeypatch.setattr(constants, "BASE_MODEL_DIR", published)
    assert pipeline.require_base_model(original_chatglm=True) == published
    assert pipeline.require_base_model(weights=False) == published
    with pytest.raises(UserError, match=f"python -m llmtuner convert {published}"):
        pipeline.require_base_model()
    (published / "model.safetensors").rename(published / "pytorch_model.bin")
    assert pipeline.require_base_model(original_chatglm=True) == published
    (published / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        pipeline.require_base_model(original_chatglm=True)
    (published / "model.safetensors").write_bytes(b"")
    (published / "config.json").write_text("")
    with pytest.raises(UserError, match="not valid JSON"):
        pipeline.require_base_model()


# ------------------------------------------------------------------------------------------------------- other families
def new_tokens(directory):
    """As many new tokens as the tiny models' tokenizers might get, each spelled by two or three of 410 ordinary ones."""
    first = len(load_tokenizer(directory))
    return NewTokens(first, [[300 + number, 290, 5][: 2 + number % 2] for number in range(100)], None, range(410))


def test_other_families_are_resized_tied_or_not(family_dir, tmp_path):
    new = new_tokens(family_dir)
    kinds = {}

    def init_fn(matrix, kind):
        kinds[kind] = len(matrix)
        return init_new_embeddings(matrix, new, "mean")

    result = resize(family_dir, tmp_path / "zero", new, init_fn=init_fn)
    is_tied = read_json(family_dir / "config.json")["tie_word_embeddings"]
    assert kinds == ({"tied": 512} if is_tied else {"input": new.first_id, "output": new.first_id})
    assert result.vocab_size == 576
    config = read_json(tmp_path / "zero" / "config.json")
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (576, is_tied)
    assert config["appended_rows"] == [new.first_id, new.end]
    before, after = (load_file(directory / "model.safetensors") for directory in (family_dir, tmp_path / "zero"))
    assert before.keys() == after.keys()
    assert ("lm_head.weight" in after) == (not is_tied)
    for name, old in before.items():
        if name in EMBEDDING_WEIGHTS:
            assert torch.equal(bits(old[: new.first_id]), bits(after[name][: new.first_id]))
            assert torch.equal(after[name][new.first_id], (old[300] + old[290]) / 2)
            assert torch.allclose(after[name][new.end :], old[:410].mean(dim=0))  # there is no <unk>
        else:
            assert torch.equal(bits(old), bits(after[name]))
    assert rows_equal(family_dir, tmp_path / "zero", new.first_id)


def test_greedy_answers_of_other_families_stay(family_dir, tmp_path):
    new = new_tokens(family_dir)
    resize(family_dir, tmp_path / "zero", new)
    tokenizer = load_tokenizer(family_dir)
    answers = {}
    for directory in (family_dir, tmp_path / "zero"):
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
        options = dict(do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=0)
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in dict.fromkeys(TEXTS)]
        answers[directory] = [model.generate(ids, **options)[0].tolist() for ids in prompts]
    assert answers[family_dir] == answers[tmp_path / "zero"]
    assert len({tuple(answer[-20:]) for answer in answers[family_dir]}) == len(answers[family_dir])


def test_a_tied_matrix_that_lies_under_both_names(tmp_path):
    """As some published checkpoints have it; transformers then compares the two."""
    base = tiny_model(tmp_path / "base", "qwen3")
    new = new_tokens(base)
    resize(base, tmp_path / "expected", new)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    resize(base, tmp_path / "both", new)
    del weights["model.embed_tokens.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    resize(base, tmp_path / "as-output", new)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for name in ("both", "as-output"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_experts_in_files_with_other_names_than_the_models_stay(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in load_file(tmp_path / "base" / "model.safetensors")
    resize(tmp_path / "base", tmp_path / "zero", NewTokens(60, [[5, 6]] * 10, None, range(60)))
    zero = AutoModelForCausalLM.from_pretrained(tmp_path / "zero").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits[..., :60], zero(ids).logits[..., :60], atol=1e-6)


def save_bias(directory):
    PhiForCausalLM(
        PhiConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(directory)


def save_encoder_decoder(directory):
    T5Config(vocab_size=64, d_model=16, num_layers=1).save_pretrained(directory)


def save_encoder(directory):
    CLIPConfig().save_pretrained(directory)


def save_remote_code(directory):
    directory.mkdir()
    content = {"model_type": "novel", "auto_map": {"AutoConfig": "configuration_novel.NovelConfig"}}
    (directory / "config.json").write_text(json.dumps(content))


def save_pickle(directory):
    tiny_model(directory, "llama")
    (directory / "model.safetensors").rename(directory / "weights.bin")


@pytest.mark.parametrize(
    ("save", "part"),
    [
        (save_bias, r"has a bias \(lm_head.bias\), which is not supported"),
        (save_encoder_decoder, "an encoder-decoder model"),
        (save_encoder, "no causal language model"),
        (save_remote_code, "needs code from its own directory"),
        (save_pickle, "has no weights"),
    ],
)
def test_model_of_a_kind_that_cannot_be_resized(tmp_path, save, part):
    save(tmp_path / "base")
    with pytest.raises(UserError, match=part):
        resize(tmp_path / "base", tmp_path / "zero", NewTokens(60, [[5, 6]], None, range(60)))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_other_families_with_fewer_rows_than_ids(tmp_path, kind):
    base = tiny_model(tmp_path / "base", kind)
    rows = read_json(base / "config.json")["vocab_size"]
    with pytest.raises(UserError, match=f"has {rows} embedding rows, but its tokenizer has {rows + 1} ids"):
        resize(base, tmp_path / "zero", NewTokens(rows + 1, [[5]], None, range(410)))
