"""What is trained, how it is saved among a run's other files, and the merge: the same logits, in bounded memory."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtuner.console import UserError
from llmtuner.files import MARKER, translate_disk_errors
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import init_adapter, save_adapter
from llmtuner.model.loading import load_model
from llmtuner.outputs import atomic_directory
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.weights import merge_lora
from llmtuner.weights.embedding_init import NewTokens
from llmtuner.weights.lazy_checkpoint import LazyCheckpoint, open_checkpoint
from llmtuner.weights.merge_lora import copy_tokenizer, merge_adapter
from llmtuner.weights.resize_embeddings import resize_token_embeddings

BOTH = ["embed_tokens", "lm_head"]
KINDS = {
    "lora": dict(lora_rank=4),
    "one layer's kind": dict(lora_rank=4, lora_target=["q_proj"], lora_alpha=3),
    "rslora": dict(lora_rank=4, use_rslora=True),
    "dora": dict(lora_rank=4, use_dora=True),
    "embeddings": dict(lora_rank=4, additional_target=BOTH),
    "norms": dict(lora_rank=4, additional_target=["input_layernorm", "o_proj"]),
    "new rows": dict(lora_rank=4, additional_target=BOTH, embedding_rows="new"),
    "dora, new rows of one matrix": dict(
        lora_rank=4, use_dora=True, additional_target=["lm_head"], embedding_rows="new"
    ),
    "freeze": dict(finetuning_type="freeze", additional_target=["lm_head", "norm"]),
    "full": dict(finetuning_type="full"),
}
IDS = torch.randint(10, 300, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def grown_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with 64 rows more, of which 60 are new pieces', as step 3 writes it."""
    directory = tmp_path_factory.mktemp("grown") / "model"
    rows = load_model(tiny_model_dir).config.vocab_size
    new = NewTokens(rows, [[5 + number, 9] for number in range(60)], unk_id=0)
    with atomic_directory(directory) as partial:
        copy_tokenizer(tiny_model_dir, partial)
        resize_token_embeddings(tiny_model_dir, partial, new, 64)
    return directory


def test_frozen_originals_of_what_is_trained_in_full_are_freed(grown_dir):
    whole = sum(one.nbytes for one in load_model(grown_dir, torch.float32).parameters())
    alone = sum(one.nbytes for one in prepare(grown_dir, lora_rank=4).parameters())
    both = prepare(grown_dir, lora_rank=4, additional_target=BOTH)
    assert sum(one.nbytes for one in both.parameters()) == alone > whole
    assert not [name for name, _ in both.named_parameters() if "original_module" in name]


def prepare(directory, adapter=None, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    return init_adapter(load_model(directory, dtype), FinetuningArguments(**settings), adapter)


def train(model):
    """Moves everything that is trained, without the steps."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def trained_run(base, run, **settings):
    model = train(prepare(base, **settings))
    save_adapter(model, run, base)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def stored(directory):
    return {name: tensor.read_rows(0, tensor.shape[0]) for name, tensor in open_checkpoint(directory).items()}


def in_dtype(source, destination, dtype, shards=False):
    """The same model in another precision, in one file or several."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(destination, max_shard_size="60KB" if shards else "1GB")
    copy_tokenizer(source, destination)
    assert len(list(destination.glob("*.safetensors"))) > 1 or not shards
    return destination


# ------------------------------------------------------------------------------------------------------ what is trained
def test_number_of_trained_parameters_and_their_precision(grown_dir):
    def trained(**settings):
        model = prepare(grown_dir, dtype=torch.bfloat16, **settings)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
        assert frozen == (set() if settings == KINDS["full"] else {torch.bfloat16})
        return sum(parameter.numel() for parameter in parameters)

    rows = load_model(grown_dir).config.vocab_size
    # inputs + outputs of q, k, v, o, gate and up, down
    layer = (32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + (32 + 128) + (64 + 32)
    lora = 2 * 4 * layer
    assert trained(**KINDS["lora"]) == trained(**KINDS["rslora"]) == lora
    assert trained(**KINDS["one layer's kind"]) == 2 * 4 * 64
    assert trained(**KINDS["dora"]) == lora + 2 * (32 + 16 + 16 + 32 + 128 + 32)
    assert trained(**KINDS["embeddings"]) == lora + 2 * rows * 32
    assert trained(**KINDS["new rows"]) == lora + 2 * 60 * 32
    assert trained(**KINDS["freeze"]) == rows * 32 + 32
    assert trained(**KINDS["full"]) == load_model(grown_dir).num_parameters()


def test_new_rows_alone_are_trained_and_have_state(grown_dir, tmp_path):
    model = prepare(grown_dir, **KINDS["new rows"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = IDS + load_model(grown_dir).config.appended_rows[0] - 290
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    state = sum(value.numel() for entry in optimizer.state.values() for value in entry.values() if value.dim())
    assert state == 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path / "run", grown_dir)
    merge_adapter(grown_dir, tmp_path / "run", tmp_path / "merged")
    before, after = stored(grown_dir), stored(tmp_path / "merged")
    first, end = load_model(tmp_path / "merged").config.appended_rows  # still known after the merge
    assert end - first == 60
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (before[name] != after[name]).any(dim=1)
        assert not changed[:first].any()
        assert not changed[end:].any()
        assert changed[first:end].any()
    assert (before["lm_head.weight"] != after["lm_head.weight"]).any(dim=1)[first:end].all()


def test_new_rows_need_a_model_that_step_3_has_grown(tiny_model_dir):
    with pytest.raises(UserError, match="was not grown by step 3"):
        prepare(tiny_model_dir, **KINDS["new rows"])


@pytest.mark.parametrize(
    "settings",
    [
        dict(lora_target=["q_proj", "w_pack"]),
        dict(additional_target=["w_pack"]),
        dict(lora_target=["input_layernorm"]),
        dict(lora_target=["embed_tokens"]),
        dict(lora_target=["lm_head", "down_proj"]),
        dict(lora_target=["o_proj"], additional_target=["o_proj"]),
        dict(finetuning_type="freeze", additional_target=["w_pack"]),
        dict(finetuning_type="freeze", additional_target=["layers"]),
    ],
)
def test_names_that_match_nothing_change_nothing(tiny_model_dir, settings):
    model = load_model(tiny_model_dir, torch.bfloat16)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        UserError,
        match=r"(matches no module; this model has: .*down_proj.*gate_up_proj|in one way|in full or not at all)",
    ):
        init_adapter(model, FinetuningArguments(**settings))
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in model.parameters())


def test_adapter_with_lora_of_the_output_layer_is_not_gone_on_from(tiny_model_dir, tmp_path):
    """The loss reads the output matrix itself, so such an adapter would be left as it is."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(tiny_model_dir), LoraConfig(r=4, target_modules=["lm_head"]))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(UserError, match="holds LoRA of lm_head"):
        prepare(tiny_model_dir, tmp_path, lora_rank=4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "embeddings", "new rows", "freeze"])
def test_gradients_are_the_same_with_checkpointing(grown_dir, kind, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = train(prepare(grown_dir, **KINDS[kind])).train()
        if checkpointing:  # as Trainer does
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["lora", "dora", "embeddings", "new rows"])
def test_training_goes_on_from_an_adapter(grown_dir, tmp_path, kind, capsys):
    first = trained_run(grown_dir, tmp_path / "run", **KINDS[kind])
    again = prepare(grown_dir, tmp_path / "run", dtype=torch.bfloat16, **KINDS[kind])
    assert "resuming from" in capsys.readouterr().out
    before, after = ({name: p for name, p in model.named_parameters() if p.requires_grad} for model in (first, again))
    assert before.keys() == after.keys()
    for name, parameter in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(parameter, after[name]), name
    save_adapter(train(again), tmp_path / "run", grown_dir)
    merge_adapter(grown_dir, tmp_path / "run", tmp_path / "merged")


def test_adapter_that_cannot_be_gone_on_from(tiny_model_dir, grown_dir, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        prepare(tiny_model_dir, run, lora_rank=4)
    trained_run(grown_dir, run, **KINDS["embeddings"])
    with pytest.raises(UserError, match="has rank 4, but lora_rank is 8"):
        prepare(grown_dir, run, lora_rank=8)
    with pytest.raises(UserError, match="finetuning_type is full"):
        prepare(grown_dir, run, finetuning_type="full")
    with pytest.raises(UserError, match="does not fit the model"):
        prepare(tiny_model_dir, run, lora_rank=4)
    weights = load_file(run / "adapter_model.safetensors")
    save_file({**weights, "more": torch.ones(1)}, run / "adapter_model.safetensors")
    with pytest.raises(UserError, match="only one of them has more"):
        prepare(grown_dir, run, lora_rank=4)
    (run / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="does not fit the model"):
        prepare(grown_dir, run, lora_rank=4)


# --------------------------------------------------------------------------------------------------------------- saving
def test_adapter_is_saved_among_the_files_of_its_run(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "log.json").write_text("[]")
    (run / "README.md").write_text("mine")
    trained_run(tiny_model_dir, run, **KINDS["lora"])
    tokenizer = {file.name for file in tiny_model_dir.iterdir()} - {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert {"tokenizer.json", "tokenizer.model", "chat_template.jinja"} <= tokenizer
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in run.iterdir()} == {"checkpoint-5", "log.json", "README.md"} | adapter | tokenizer
    assert (run / "README.md").read_text() == "mine"


def test_adapter_holds_what_was_trained_and_how(tiny_model_dir, tmp_path):
    for kind, rate in (("lora", 8), ("one layer's kind", 3)):
        trained_run(tiny_model_dir, tmp_path, **KINDS[kind], use_rslora=kind == "lora", lora_dropout=0.1)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        told = [config[key] for key in ("lora_alpha", "r", "use_rslora", "lora_dropout")]
        assert told == [rate, 4, kind == "lora", 0.1]
    trained_run(tiny_model_dir, tmp_path, **KINDS["freeze"])
    assert load_file(tmp_path / "model.safetensors").keys() == {"lm_head.weight", "model.norm.weight"}


def test_adapter_of_another_kind_does_not_stay(tiny_model_dir, tmp_path):
    run = tmp_path / "run"
    trained_run(tiny_model_dir, run, finetuning_type="full")
    load_model(run).save_pretrained(run, max_shard_size="60KB")
    assert list(run.glob("model-*-of-*"))
    kinds = {
        "lora": {"adapter_config.json", "adapter_model.safetensors"},
        "freeze": {"config.json", "generation_config.json", "model.safetensors"},
    }
    for kind in ("lora", "freeze", "lora"):
        trained_run(tiny_model_dir, run, **KINDS[kind])
        weights = {*run.glob("*.safetensors*"), *run.glob("*config.json")} - {run / "tokenizer_config.json"}
        assert {file.name for file in weights} - {"generation_config.json"} == kinds[kind] - {"generation_config.json"}
    assert (tiny_model_dir / "model.safetensors").is_file()
    with pytest.raises(UserError, match="Set another output_dir"):
        trained_run(tiny_model_dir, tiny_model_dir, **KINDS["lora"])
    assert (tiny_model_dir / "model.safetensors").is_file()


@contextmanager
def largest_file(size):
    """For real: no file of more than so many bytes can be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_older_adapter_outlives_a_full_disk(tiny_model_dir, tmp_path, kind):
    run = tmp_path / "run"
    trained_run(tiny_model_dir, run, **KINDS["freeze"])
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(UserError, match=f"the disk filled up while writing {run} "), largest_file(15_000):
        trained_run(tiny_model_dir, run, **KINDS[kind])
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_run_directory_that_cannot_be_written(tiny_model_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        trained_run(tiny_model_dir, tmp_path / "file" / "run", **KINDS["lora"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "filled up"),
        (OSError(errno.EACCES, "Permission denied"), "cannot write"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "filled up"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "filled up"),
        (RuntimeError("shapes differ"), None),
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (UserError("No space left on device"), None),
    ],
)
def test_errors_of_the_disk_and_others(tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    expected = (
        pytest.raises(UserError, match=message) if message else pytest.raises(type(error), match=str(error.args[-1]))
    )
    with expected as raised, translate_disk_errors(tmp_path / "not" / "there"):
        raise error
    assert (raised.value is error) == (message is None)
    monkeypatch.undo()  # with room on the disk a failed write of PyTorch is something else
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError), translate_disk_errors(tmp_path):
            raise error


# ---------------------------------------------------------------------------------------------------------------- merge
LARGEST = {}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_computes_what_was_trained(grown_dir, tmp_path, kind):
    model = trained_run(grown_dir, tmp_path / "run", **KINDS[kind])
    merge_adapter(grown_dir, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected, base = logits(model), logits(load_model(grown_dir))
    if isinstance(model, PeftModel):
        again = PeftModel.from_pretrained(load_model(grown_dir), str(tmp_path / "run")).eval()
        assert torch.equal(logits(again), expected)
    LARGEST[kind] = float((logits(merged) - expected).abs().max() / expected.abs().max())
    assert LARGEST[kind] < 1e-5
    assert float((base - expected).abs().max() / expected.abs().max()) > 1e-2
    assert not merged.config.tie_word_embeddings

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
    """In such a checkpoint they lie in the precision in which they were computed with."""
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


def test_merge_is_cut_into_files_and_has_all_that_belongs_to_a_model(tiny_model_dir, tmp_path, monkeypatch):
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
    """The same model as ChatGLM3 is published: other names, and queries, keys and values of a layer in one matrix."""
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
        for name in merge_lora.TOKENIZER_FILES:
            (tmp_path / "run" / name).unlink(missing_ok=True)
    merge_adapter(base, tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged), logits(model), atol=1e-4)
    assert "auto_map" not in (tmp_path / "merged" / "tokenizer_config.json").read_text()
    assert len(load_tokenizer(tmp_path / "merged")) == len(load_tokenizer(tiny_model_dir))


@pytest.mark.parametrize("form", ["lora", "full", "published"])
def test_base_grows_first_where_the_adapter_holds_more_rows(tiny_model_dir, grown_dir, tmp_path, form):
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


def test_growing_that_the_adapter_cannot_tell(tiny_model_dir, grown_dir, tmp_path, monkeypatch):
    def refused(match, base=tiny_model_dir):
        with pytest.raises(UserError, match=match):
            merge_adapter(base, tmp_path / "run", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    trained_run(grown_dir, tmp_path / "run", lora_rank=4, additional_target=["lm_head"])
    refused(r"grow the base first \(step3_resize_model.py\)")
    trained_run(grown_dir, tmp_path / "run", **KINDS["new rows"])
    refused(r"it trained row \d+ of .*grow the base first")
    trained_run(tiny_model_dir, tmp_path / "run", **KINDS["embeddings"])
    refused(r"is \[\d+, 32\], the model's \[\d+, 32\]", grown_dir)  # fewer rows
    trained_run(grown_dir, tmp_path / "run", **KINDS["embeddings"])
    for name in merge_lora.TOKENIZER_FILES:
        (tmp_path / "run" / name).unlink(missing_ok=True)
    refused("Grow the base first")  # whose tokenizer would it be?
    trained_run(tiny_model_dir, tmp_path / "run", **KINDS["lora"])
    monkeypatch.setattr(
        merge_lora, "load_tokenizer", lambda directory: range(400 if directory == tiny_model_dir else 5000)
    )
    refused("has 5,000 ids, the model .* embedding rows: .*Grow the base first")


# ------------------------------------------------------------------------------------------------- merges that are refused
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
            "lora_embedding_A .* belongs to no",
        ),
        (
            lambda t: {**t, "base_model.model.model.x.lora_A.weight": torch.ones(4, 32)},
            r"x.lora_A.weight .* belongs to no",
        ),
        (lambda t: {**t, "something": torch.ones(1)}, "something .* belongs to no tensor"),
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
        (lambda t: {**t, "base_model.model.model.norm.lora_A.weight": torch.ones(4, 32)}, "of model.norm it holds"),
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
        (lambda t: {**t, Q + "lora_B.weight": torch.full((32, 4), torch.nan)}, "q_proj.* holds NaN"),
        (lambda t: {**t, Q + "lora_B.weight": torch.ones(32, 4, dtype=torch.int8)}, "not a tensor of floating-point"),
    ],
)
def test_tensors_that_do_not_fit(tiny_model_dir, run, tmp_path, change, match):
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
def test_settings_of_an_adapter_that_cannot_be_merged(tiny_model_dir, run, tmp_path, key, value):
    file = run / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: value}))
    refuse(tiny_model_dir, run, tmp_path / "merged", f"{re.escape(str(file))}: {key}")


def test_other_base_and_other_rank(tiny_model_dir, run, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    refuse(base, run, tmp_path / "merged", "tied embeddings")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    refuse(tiny_model_dir, run, tmp_path / "merged", "lora_magnitude_vector, not")


def test_directories_without_an_adapter(tiny_model_dir, run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(tiny_model_dir, empty, tmp_path / "merged", r"holds no trained adapter .*config.json\)\.$")
    for number, time in ((9, 1), (10, 2)):
        shutil.copytree(run, empty / f"checkpoint-{number}")
        os.utime(empty / f"checkpoint-{number}", (time, time))
    refuse(tiny_model_dir, empty, tmp_path / "merged", "merge .*checkpoint-10")
    merge_adapter(tiny_model_dir, empty / "checkpoint-10", tmp_path / "merged")
    (run / "adapter_model.safetensors").unlink()
    refuse(tiny_model_dir, run, tmp_path / "other", "no adapter_model.safetensors")


def test_destination_that_holds_what_is_merged(tiny_model_dir, run, tmp_path):
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
    adapter = {merge_lora.PEFT_PREFIX + name: torch.ones(shapes[name]) for name in merge_lora.EMBEDDING_WEIGHTS}
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
