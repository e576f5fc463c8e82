"""Adapters: which parameters are trained in which precision, and how they are saved among a run's other files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtuner.console import UserError
from llmtuner.hparams import FinetuningArguments
from llmtuner.model.adapters import embedding_parameters, init_adapter, save_adapter
from llmtuner.model.loading import load_model
from llmtuner.model.model_dir import read_json
from llmtuner.train.tuner import export_model, run_exp
from llmtuner.weights.merge_lora import merge_adapter
from tests.training import NO_FIGURES, SFT
from tests.unit.adapters import BOTH, IDS, KINDS, largest_file, prepare, stored, train, trained_run


def test_frozen_originals_of_what_is_trained_in_full_are_freed(grown_dir):
    whole = sum(parameter.nbytes for parameter in load_model(grown_dir, torch.float32).parameters())
    alone = sum(parameter.nbytes for parameter in prepare(grown_dir, lora_rank=4).parameters())
    both = prepare(grown_dir, lora_rank=4, additional_target=BOTH)
    assert sum(parameter.nbytes for parameter in both.parameters()) == alone > whole
    assert not [name for name, _ in both.named_parameters() if "original_module" in name]


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


@pytest.mark.parametrize("kind", ["embeddings", "new rows", "full"])
def test_a_tied_matrix_is_trained_once_by_both_of_its_uses(grown_family_dir, tmp_path, kind):
    """Against transformers' own model, which is untied for comparison: the gradients of both matrices add up."""
    model, plain = prepare(grown_family_dir, **KINDS[kind]), load_model(grown_family_dir)
    if plain.config.tie_word_embeddings:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    ids = IDS % 60 + plain.config.appended_rows[0]
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    expected = [plain.model.embed_tokens.weight.grad, plain.lm_head.weight.grad]
    if plain.config.tie_word_embeddings:
        expected = [sum(expected)]
    if kind == "new rows":
        expected = [gradient[slice(*plain.config.appended_rows)] for gradient in expected]
    embeddings = embedding_parameters(model)
    found = [p.grad for p in model.parameters() if id(p) in embeddings and p.requires_grad]
    assert len(found) == len(expected)
    for gradient, wanted in zip(found, expected, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-6)
    save_adapter(model, tmp_path / "run", grown_family_dir)
    names = load_file(next((tmp_path / "run").glob("*model.safetensors")))
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == len(expected)


@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], BOTH])
@pytest.mark.parametrize("settings", [{}, {"train_new_tokens_only": True}, {"finetuning_type": "freeze"}])
def test_either_name_of_a_tied_matrix_trains_it(family_dir, grown_family_dir, target, settings):
    def trained(**settings):
        model = prepare(grown_family_dir, lora_rank=4, **settings)
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    alone = 0 if "finetuning_type" in settings else trained()
    rows = 60 if "train_new_tokens_only" in settings else 512
    matrices = 1 if read_json(family_dir / "config.json")["tie_word_embeddings"] else len(target)
    assert trained(additional_target=target, **settings) - alone == matrices * rows * 32


@pytest.mark.parametrize("family_dir", ["qwen3"], indirect=True)
def test_an_adapter_that_trained_a_tied_matrix_apart_is_refused(family_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(family_dir), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=BOTH))
    train(model).save_pretrained(str(tmp_path / "run"), save_embedding_layers=False)
    with pytest.raises(UserError, match=r"trained input and output embeddings apart"):
        prepare(family_dir, tmp_path / "run", lora_rank=4)
    with pytest.raises(UserError, match=r"trained lm_head\.weight apart from model\.embed_tokens\.weight"):
        merge_adapter(family_dir, tmp_path / "run", tmp_path / "merged")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    matrix = "base_model.model.model.embed_tokens.weight"
    save_file(
        {**weights, "base_model.model.lm_head.weight": weights[matrix].clone()},
        tmp_path / "run" / "adapter_model.safetensors",
    )
    merge_adapter(family_dir, tmp_path / "run", tmp_path / "merged")  # as peft's `ensure_weight_tying` leaves it
    assert torch.equal(stored(tmp_path / "merged")["model.embed_tokens.weight"], weights[matrix])


def test_new_rows_need_a_model_that_step_3_has_grown(tiny_model_dir):
    with pytest.raises(UserError, match="was not resized by step 3"):
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


def test_adapter_with_lora_of_the_output_layer_is_not_trained_further(tiny_model_dir, tmp_path):
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
    check_continued(grown_dir, tmp_path, kind, capsys)


@pytest.mark.parametrize("kind", ["embeddings", "new rows"])
def test_training_of_other_families_goes_on_from_an_adapter(grown_family_dir, tmp_path, kind, capsys):
    check_continued(grown_family_dir, tmp_path, kind, capsys)


def check_continued(grown_dir, tmp_path, kind, capsys):
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


@pytest.mark.parametrize("kind", ["embeddings", "new rows"])
def test_a_new_adapter_on_a_merged_one_of_other_families(grown_family_dir, tmp_path, monkeypatch, kind):
    check_new_adapter_on_merged(grown_family_dir, tmp_path, monkeypatch, kind)


def test_a_new_adapter_on_a_merged_one_starts_as_on_the_exported_model(grown_dir, tmp_path, monkeypatch):
    check_new_adapter_on_merged(grown_dir, tmp_path, monkeypatch, "embeddings")


def check_new_adapter_on_merged(grown_dir, tmp_path, monkeypatch, kind):
    first, merged = tmp_path / "first", tmp_path / "merged"
    trained_run(grown_dir, first, **KINDS[kind])
    merge_adapter(grown_dir, first, merged)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # none of which is touched
    torch.manual_seed(1)
    at_once = init_adapter(load_model(grown_dir), FinetuningArguments(**KINDS["lora"]), first, create_new=True)
    for (name, own), wanted in zip(
        at_once.named_parameters(), prepare(merged, **KINDS["lora"]).parameters(), strict=True
    ):
        torch.testing.assert_close(own, wanted, atol=0 if "lora" in name else 1e-5, rtol=0, msg=name)


def test_adapter_that_cannot_be_trained_further(tiny_model_dir, grown_dir, tmp_path):
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


# --------------------------------------------------------------------------------------------------------------- freeze
@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"freeze_trainable_layers": 1}, {"layers.1.self_attn", "layers.1.mlp", "layers.1.input_layernorm"}),
        ({"freeze_trainable_layers": -1, "freeze_trainable_modules": "mlp"}, {"layers.0.mlp"}),
        ({"freeze_trainable_modules": "self_attn,mlp"}, {f"layers.{n}.{m}" for n in (0, 1) for m in ("self_attn", "mlp")}),
        ({"freeze_trainable_layers": 9, "freeze_trainable_modules": "mlp"}, {"layers.0.mlp", "layers.1.mlp"}),
        (
            {"freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp", "freeze_extra_modules": "output_layer,norm"},
            {"layers.1.mlp", "lm_head", "norm"},
        ),
        ({"additional_target": "lm_head"}, {"lm_head"}),
        ({"additional_target": "lm_head", "freeze_trainable_layers": 1, "freeze_trainable_modules": "mlp"}, {"layers.1.mlp", "lm_head"}),
    ],
)  # fmt: skip
def test_freeze_trains_the_named_layers_alone(tiny_run, tiny_model_dir, tmp_path, settings, trained):
    plain = {**tiny_run, **NO_FIGURES, **SFT, "eval_strategy": "no", "additional_target": None}
    run_exp({**plain, "finetuning_type": "freeze", **settings})
    export = {"model_name_or_path": str(tiny_model_dir), "adapter_name_or_path": str(tmp_path / "adapter")}
    export_model({**export, "export_dir": str(tmp_path / "merged")})
    before, after = (load_model(directory).state_dict() for directory in (tiny_model_dir, tmp_path / "merged"))
    changed = {name.removeprefix("model.") for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for name in changed:
        assert any(name.startswith(f"{place}.") for place in trained) or "layernorm" in name
    for place in trained:
        assert any(name.startswith(f"{place}.") for name in changed), place


def test_modules_of_layers_that_are_not_there_are_named(tiny_run):
    settings = {**tiny_run, "additional_target": None, "finetuning_type": "freeze", "freeze_trainable_modules": "attn"}
    with pytest.raises(UserError, match="freeze_trainable_modules 'attn' matches no module; this model has: input_lay"):
        run_exp(settings)
