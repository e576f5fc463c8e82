"""Merged adapters have the same logits, are rounded once, and need bounded memory."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtuner.console import UserError
from llmtuner.files import MARKER
from llmtuner.model.loading import load_model
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.encoding import TOKENIZER_FILES, copy_tokenizer, load_tokenizer
from llmtuner.weights import merge_lora
from llmtuner.weights.lazy_checkpoint import LazyCheckpoint
from llmtuner.weights.merge_lora import merge_adapter
from tests.helpers import ROOT
from tests.unit.adapters import IDS, KINDS, largest_file, prepare, stored, train, trained_run


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_dtype(source, destination, dtype, shards=False):
    """The same model in another precision, in one file or several."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(destination, max_shard_size="60KB" if shards else "1GB")
    copy_tokenizer(source, destination)
    assert len(list(destination.glob("*.safetensors"))) > 1 or not shards
    return destination


# ---------------------------------------------------------------------------------------------------------------- merge
LARGEST = {}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_computes_what_was_trained(grown_dir, tmp_path, kind):
    check_merge(grown_dir, tmp_path, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_computes_what_was_trained_in_other_families(grown_family_dir, tmp_path, kind):
    check_merge(grown_family_dir, tmp_path, kind)


def check_merge(grown_dir, tmp_path, kind):
    model = trained_run(grown_dir, tmp_path / "run", **KINDS[kind])
    merge_adapter(grown_dir, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected, base = logits(model), logits(load_model(grown_dir))
    is_tied = load_model(grown_dir).config.tie_word_embeddings
    if is_tied and kind == "embeddings":  # peft would have the matrix twice in the file: it must not take half of it
        with pytest.raises(KeyError, match="lm_head"):
            PeftModel.from_pretrained(load_model(grown_dir), str(tmp_path / "run"))
    elif isinstance(model, PeftModel):
        again = PeftModel.from_pretrained(load_model(grown_dir), str(tmp_path / "run")).eval()
        assert torch.equal(logits(again), expected)
    LARGEST[kind] = float((logits(merged) - expected).abs().max() / expected.abs().max())
    assert LARGEST[kind] < 1e-5
    assert float((base - expected).abs().max() / expected.abs().max()) > 1e-2
    assert merged.config.tie_word_embeddings == is_tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == is_tied

    touched = {weight_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    after = stored(tmp_path / "merged")
    assert {name for name, tensor in stored(grown_dir).items() if not torch.equal(tensor, after[name])} == touched


def weight_of(name):
    """The base's tensor that a parameter of peft's changes."""
    layer, part = re.fullmatch(
        r"(?:base_model\.model\.)?(.*?)(\.lora_.*|\.token_adapter.*|\.modules_to_save\.default\.\w+|\.(?:weight|bias))",
        name,
    ).groups()
    return layer + (".bias" if part.endswith(".bias") else ".weight")


@pytest.mark.parametrize("kind", ["lora", "dora", "new rows", "freeze", "full"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_rounds_once_and_keeps_the_precision(grown_dir, tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr("llmtuner.weights.lazy_checkpoint.CHUNK_BYTES", 200)  # a few rows
    base = in_dtype(grown_dir, tmp_path / "base", dtype, shards=True)
    model = trained_run(base, tmp_path / "run", **KINDS[kind])  # in fp32
    merge_adapter(base, tmp_path / "run", tmp_path / "merged")
    exact = (model.merge_and_unload() if isinstance(model, PeftModel) else model).state_dict()
    before = stored(base)
    for name, tensor in stored(tmp_path / "merged").items():
        assert tensor.dtype == dtype
        expected = exact[name].to(dtype)
        # the two sums may round to neighbours
        assert torch.allclose(tensor.float(), expected.float(), rtol=2**-7 if dtype == torch.bfloat16 else 2**-10)
        assert (tensor == expected).float().mean() > 0.99
        if torch.equal(exact[name], before[name].float()):
            assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16))


def test_checkpoint_of_a_run_without_lora_leaves_frozen_tensors_alone(grown_dir, tmp_path):
    """Such a checkpoint holds them in the compute dtype."""
    model = train(prepare(grown_dir, dtype=torch.bfloat16, **KINDS["freeze"]))
    model.save_pretrained(tmp_path / "checkpoint-5")  # as Trainer does
    merge_adapter(grown_dir, tmp_path / "checkpoint-5", tmp_path / "merged")
    before, after = stored(grown_dir), stored(tmp_path / "merged")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "lm_head.weight",
        "model.norm.weight",
    }
    model.bfloat16().save_pretrained(tmp_path / "all-bf16")
    merge_adapter(grown_dir, tmp_path / "all-bf16", tmp_path / "merged-bf16")
    assert torch.equal(stored(tmp_path / "merged-bf16")["lm_head.weight"], model.lm_head.weight.float())


def test_merge_writes_shards_and_a_complete_model_directory(tiny_model_dir, tmp_path, monkeypatch):
    trained_run(tiny_model_dir, tmp_path / "run", **KINDS["lora"])
    sizes = []
    write = LazyCheckpoint.write
    monkeypatch.setattr(LazyCheckpoint, "write", lambda self, to, size: [sizes.append(size), write(self, to, 60_000)])
    merge_adapter(tiny_model_dir, tmp_path / "run", tmp_path / "merged", 3)
    assert sizes == [3_000_000_000]
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 1
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {file.name for file in tiny_model_dir.iterdir()} - {"model.safetensors"} <= files
    settings = [
        json.loads((directory / "generation_config.json").read_text())
        for directory in (tiny_model_dir, tmp_path / "merged")
    ]
    assert settings[0] == settings[1]
    assert len(load_tokenizer(tmp_path / "merged")) == len(load_tokenizer(tiny_model_dir))


@pytest.mark.slow
def test_merged_model_loads_without_this_project(tiny_model_dir, tmp_path):
    trained_run(tiny_model_dir, tmp_path / "run", **KINDS["embeddings"])
    merge_adapter(tiny_model_dir, tmp_path / "run", tmp_path / "merged")
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; d = sys.argv[1];"
        "m = AutoModelForCausalLM.from_pretrained(d); t = AutoTokenizer.from_pretrained(d);"
        "ids = t.apply_chat_template([{'role': 'user', 'content': '小镇'}], add_generation_prompt=True, return_tensors='pt', return_dict=True);"
        "print(t.decode(m.generate(**ids, max_new_tokens=2)[0]));"
        "assert not {'llmtuner', 'peft'} & sys.modules.keys()"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "merged")], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "小镇" in result.stdout


def published(glm_dir, destination):
    """The same model in ChatGLM3's original format: other names, and fused queries, keys and values."""
    model = load_model(glm_dir)
    config = model.config
    destination.mkdir()
    fused = "transformer.encoder.layers.{}.self_attention.query_key_value.{}"
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, glm in parts_of_names().items():
            name = name.replace(glm, old)
        if "_proj" not in name:
            tensors[name] = tensor.contiguous()
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            tensors[fused.format(number, kind)] = torch.cat(parts).detach()
    save_file(tensors, destination / "model.safetensors")
    settings = dict(
        model_type="chatglm",
        padded_vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        seq_length=config.max_position_embeddings,
        multi_query_attention=True,
        multi_query_group_num=config.num_key_value_heads,
        add_qkv_bias=True,
        layernorm_epsilon=config.rms_norm_eps,
    )
    (destination / "config.json").write_text(json.dumps(settings))
    (destination / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["remote.Code", null]}}')
    shutil.copyfile(glm_dir / "tokenizer.model", destination / "tokenizer.model")
    return destination


def parts_of_names():
    from llmtuner.weights.convert_chatglm import CHATGLM_TO_GLM

    return {old: glm for old, glm in CHATGLM_TO_GLM.items() if "{}" not in glm}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_base_as_published(tiny_model_dir, tmp_path, with_tokenizer):
    base = published(tiny_model_dir, tmp_path / "published")
    model = trained_run(tiny_model_dir, tmp_path / "run", **KINDS["embeddings"])
    if not with_tokenizer:  # then that of the base
        for name in TOKENIZER_FILES:
            (tmp_path / "run" / name).unlink(missing_ok=True)
    merge_adapter(base, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    assert "auto_map" not in (tmp_path / "merged" / "tokenizer_config.json").read_text()
    assert len(load_tokenizer(tmp_path / "merged")) == len(load_tokenizer(tiny_model_dir))


@pytest.mark.parametrize("form", ["lora", "full", "published"])
def test_base_is_resized_if_the_adapter_has_more_rows(tiny_model_dir, grown_dir, tmp_path, form):
    model = trained_run(grown_dir, tmp_path / "run", **KINDS["full" if form == "full" else "embeddings"])
    base = published(tiny_model_dir, tmp_path / "published") if form == "published" else tiny_model_dir
    merge_adapter(base, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (
        merged.config.vocab_size
        == load_model(grown_dir).config.vocab_size
        > load_model(tiny_model_dir).config.vocab_size
    )
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer.json").read_bytes()


def test_adapters_that_need_a_resized_base(tiny_model_dir, grown_dir, tmp_path, monkeypatch):
    def assert_rejected(match, base=tiny_model_dir):
        with pytest.raises(UserError, match=match):
            merge_adapter(base, tmp_path / "run", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    trained_run(grown_dir, tmp_path / "run", lora_rank=4, additional_target=["lm_head"])
    assert_rejected(r"resize the base first \(step3_resize_model.py\)")
    trained_run(grown_dir, tmp_path / "run", **KINDS["new rows"])
    assert_rejected(r"it trained row \d+ of .*resize the base first")
    trained_run(tiny_model_dir, tmp_path / "run", **KINDS["embeddings"])
    assert_rejected(r"is \[\d+, 32\], the model's \[\d+, 32\]", grown_dir)  # fewer rows
    trained_run(grown_dir, tmp_path / "run", **KINDS["embeddings"])
    for name in TOKENIZER_FILES:
        (tmp_path / "run" / name).unlink(missing_ok=True)
    assert_rejected("Resize the base first")  # the tokenizer of the new rows is missing
    trained_run(tiny_model_dir, tmp_path / "run", **KINDS["lora"])
    monkeypatch.setattr(
        merge_lora, "load_tokenizer", lambda directory: range(400 if directory == tiny_model_dir else 5000)
    )
    assert_rejected("has 5,000 ids, the model .* embedding rows: .*Resize the base first")


# -------------------------------------------------------------------------------------------------------- rejected merges
@pytest.fixture(scope="module")
def lora_run(tiny_model_dir, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    trained_run(tiny_model_dir, run, lora_rank=4, use_dora=True, additional_target=["norm"])
    return run


@pytest.fixture
def run(lora_run, tmp_path):
    return shutil.copytree(lora_run, tmp_path / "run")


def refuse(base, adapter, destination, match):
    with pytest.raises(UserError, match=match):
        merge_adapter(base, adapter, destination)
    assert not destination.exists()
    assert not list(destination.parent.glob("*.partial"))


Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: {**t, "base_model.model.lm_head.lora_embedding_A": torch.ones(4, 32)},
            "lora_embedding_A .* matches no",
        ),
        (
            lambda t: {**t, "base_model.model.model.x.lora_A.weight": torch.ones(4, 32)},
            r"x.lora_A.weight .* matches no",
        ),
        (lambda t: {**t, "something": torch.ones(1)}, "something .* matches no tensor"),
        (lambda t: {**t, Q + "lora_A.weight": torch.ones(4, 64)}, r"lora_A of .*q_proj is \[4, 64\].* has 32 inputs"),
        (lambda t: {**t, Q + "lora_B.weight": torch.ones(64, 4)}, r"lora_B of .*q_proj is \[64, 4\], not \[32, 4\]"),
        (lambda t: {**t, Q + "lora_A.weight": torch.ones(5, 32)}, r"lora_A of .* the adapter rank 4"),
        (lambda t: {**t, Q + "lora_magnitude_vector": torch.ones(31)}, "lora_magnitude_vector of .*q_proj"),
        (lambda t: {name: v for name, v in t.items() if name != Q + "lora_B.weight"}, "not .*lora_B"),
        (lambda t: {name: v for name, v in t.items() if name != Q + "lora_magnitude_vector"}, "not .*magnitude"),
        (
            lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(31)},
            r"norm.weight is \[31\], the model's \[32\]",
        ),
        (lambda t: {**t, "base_model.model.model.norm.lora_A.weight": torch.ones(4, 32)}, "model.norm has .lora_A"),
        (
            lambda t: {
                **t,
                "base_model.model.model.norm.lora_A.weight": torch.ones(4, 32),
                "base_model.model.model.norm.lora_B.weight": torch.ones(32, 4),
                "base_model.model.model.norm.lora_magnitude_vector": torch.ones(32),
            },
            "lora_A of model.norm",
        ),
        (
            lambda t: {**t, "base_model.model.lm_head" + merge_lora.TRAINABLE_TOKENS: torch.ones(2, 32)},
            "trainable_token_indices",
        ),
        (lambda t: {**t, Q + "lora_B.weight": torch.full((32, 4), torch.nan)}, "q_proj.* contains NaN"),
        (lambda t: {**t, Q + "lora_B.weight": torch.ones(32, 4, dtype=torch.int8)}, "not a tensor of floating-point"),
    ],
)
def test_tensors_that_do_not_match(tiny_model_dir, run, tmp_path, change, match):
    save_file(change(load_file(run / "adapter_model.safetensors")), run / "adapter_model.safetensors")
    refuse(tiny_model_dir, run, tmp_path / "merged", match)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("r", None),
        ("lora_alpha", "high"),
        *((key, {"q_proj": 8}) for key in merge_lora.UNSUPPORTED_KEYS),
    ],
)
def test_unsupported_adapter_settings(tiny_model_dir, run, tmp_path, key, value):
    file = run / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: value}))
    refuse(tiny_model_dir, run, tmp_path / "merged", f"{re.escape(str(file))}: {key}")


def test_other_base_and_other_rank(tiny_model_dir, run, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refuse(base, run, tmp_path / "merged", "two different matrices")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    refuse(tiny_model_dir, run, tmp_path / "merged", "lora_magnitude_vector, not")


def test_directories_without_an_adapter(tiny_model_dir, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(tiny_model_dir, empty, tmp_path / "merged", r"has no trained adapter .*config.json\)\.$")
    for number, time in ((9, 1), (10, 2)):
        shutil.copytree(run, empty / f"checkpoint-{number}")
        os.utime(empty / f"checkpoint-{number}", (time, time))
    refuse(tiny_model_dir, empty, tmp_path / "merged", "merge .*checkpoint-10")
    merge_adapter(tiny_model_dir, empty / "checkpoint-10", tmp_path / "merged")
    (run / "adapter_model.safetensors").unlink()
    refuse(tiny_model_dir, run, tmp_path / "other", "no adapter_model.safetensors")


def test_destination_that_contains_a_source(tiny_model_dir, run, tmp_path):
    for destination in (run, run.parent, tiny_model_dir):
        with pytest.raises(UserError, match="would delete"):
            merge_adapter(tiny_model_dir, run, destination)
    assert (tiny_model_dir / "model.safetensors").is_file()
    assert (run / "adapter_config.json").is_file()


# ------------------------------------------------------------------------------------------------------ memory and disk
def test_merge_that_fills_the_disk(tiny_model_dir, run, tmp_path):
    with atomic_directory(tmp_path / "merged") as older:
        (older / "older").write_text("")
    with pytest.raises(UserError, match="the disk filled up while writing"), largest_file(50_000):
        merge_adapter(tiny_model_dir, run, tmp_path / "merged", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [MARKER, "older"]
    assert not list(tmp_path.glob("*.partial"))


MERGE = """
import sys
from pathlib import Path
import transformers, torch
from transformers import GlmConfig, GlmForCausalLM
from llmtuner.weights.merge_lora import merge_adapter

def peak():  # in kB, of this program alone: getrusage would count the one that started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

base, adapter, destination, small_base, small_adapter = map(Path, sys.argv[1:])
merge_adapter(small_base, small_adapter, destination)  # what the libraries need
before = peak()
merge_adapter(base, adapter, destination, overwrite=True)
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tiny_model_dir, run, tmp_path):
    """More than 200 MB of bf16, and an adapter that holds both embedding matrices in fp32."""
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        **{
            **load_model(tiny_model_dir).config.to_dict(),
            "hidden_size": 1024,
            "intermediate_size": 12288,
            "vocab_size": 16384,
        }
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in GlmForCausalLM(config).state_dict().items()}
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    layers = [name.removesuffix(".weight") for name, shape in shapes.items() if "_proj.weight" in name]
    copy_tokenizer(tiny_model_dir, tmp_path)
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    adapter = {
        merge_lora.PEFT_PREFIX + name: torch.ones(shapes[name])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for layer in layers:
        outputs, inputs = shapes[f"{layer}.weight"]
        adapter[merge_lora.PEFT_PREFIX + layer + merge_lora.LORA_A] = torch.ones(64, inputs)
        adapter[merge_lora.PEFT_PREFIX + layer + merge_lora.LORA_B] = torch.ones(outputs, 64)
    (tmp_path / "large").mkdir()
    save_file(adapter, tmp_path / "large" / "adapter_model.safetensors")
    (tmp_path / "large" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64, "lora_alpha": 128}')
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            MERGE,
            *map(str, (tmp_path, tmp_path / "large", tmp_path / "merged", tiny_model_dir, run)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    size, added = (tmp_path / "merged" / "model.safetensors").stat().st_size, int(result.stdout)
    print(f"merging {size / 1e6:.0f} MB took {added} MB of memory")
    assert size > 200_000_000
    assert 5 < added < 100
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
