"""Settings that pretraining and instruction tuning share with LLaMA-Factory, each in a run of a few steps."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from test_train import log_of, losses_of

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data.packing import next_fit
from llmtuner.data.template import Template
from llmtuner.hparams import get_train_args
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train import workflow
from llmtuner.train.trainer import EarlyStopping, PackedTrainer
from llmtuner.train.tuner import export_model, run_exp
from llmtuner.weights.merge_lora import merge_adapter

NO_FIGURES = {"plot_loss": False, "eval_on_start": False}
SFT = {"stage": "sft", "dataset": "dialogues"}


# ------------------------------------------------------------------------------------------------- eval_on_each_dataset
def with_second_dataset(tiny_run, tmp_path):
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    info["short"] = {"file_name": "short.jsonl", "columns": {"prompt": "text"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    lines = "".join(json.dumps({"text": f"{number}: 柳絮"}) + "\n" for number in range(40))
    (tmp_path / "short.jsonl").write_text(lines, encoding="utf-8")
    return {**tiny_run, "dataset": "documents,short"}


def test_each_dataset_has_an_eval_loss_and_together_they_make_eval_loss(tiny_run, tmp_path):
    settings = with_second_dataset(tiny_run, tmp_path) | {"eval_on_each_dataset": True}
    run_exp(settings)
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "trainer_log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "eval_loss" in line]
    assert len(lines) == 2
    _, data, training, _ = get_train_args(settings)
    _, held_out = workflow.get_pt_dataset(data, training.seed, load_tokenizer(tiny_run["model_name_or_path"]))
    counts = [
        sum(int((part[number]["labels"][1:] != -100).sum()) for number in range(len(part)))
        for part in (held_out.select_dataset(0), held_out.select_dataset(1), held_out)
    ]
    for line in lines:
        losses = [line["eval_documents_loss"], line["eval_short_loss"]]
        assert losses[0] != pytest.approx(losses[1], abs=0.05)
        # Targets after a boundary within a sequence are none, so the counts of the parts sum to that of the whole.
        assert numpy.average(losses, weights=counts[:2]) == pytest.approx(line["eval_loss"], rel=1e-5)
    alone = run_exp({**settings, "do_train": False, "do_eval": True}).keys()
    assert alone == {"eval_loss", "eval_documents_loss", "eval_short_loss", "data"}


# ------------------------------------------------------------------------------------------------------- early stopping
def test_early_stopping_counts_evaluations_without_improvement():
    def due(*losses, patience=2):
        return EarlyStopping(patience).is_due([{"eval_loss": loss} for loss in losses] + [{"loss": 0.1}])

    assert not due()
    assert not due(3.0, 2.0, 2.5)
    assert due(3.0, 2.0, 2.5, 2.0)
    assert not due(3.0, 2.5, 2.6, 2.4)
    assert due(3.0, 2.0, float("nan"), float("nan"))
    assert not due(float("nan"), 2.0)
    assert not due(1.0, 2.0, 3.0, patience=None)


def with_eval_losses(monkeypatch, losses):
    """Lets the evaluations of a run find these losses."""
    given = iter(losses)
    monkeypatch.setattr(PackedTrainer, "evaluate_loss", lambda self, dataset: next(given))


def test_a_run_that_stops_early_is_finished_and_stays_so(tiny_run, tmp_path, monkeypatch, capsys):
    settings = {**tiny_run, **NO_FIGURES, "max_steps": 9, "eval_steps": 1, "early_stopping_steps": 2}
    with_eval_losses(monkeypatch, [3.0, 2.0, 2.5, 2.5, 0.0])
    metrics = run_exp(settings)
    assert metrics["steps"] == 4
    assert "finished early, after step 4: eval_loss has not improved for 2 evaluations" in capsys.readouterr().out
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with_eval_losses(monkeypatch, [])  # nothing is evaluated or trained again
    again = run_exp(settings)
    assert again["steps"] == 4
    assert again["eval_loss"] == metrics["eval_loss"]
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name])


def test_patience_is_the_same_after_a_restart(tiny_run, monkeypatch):
    settings = {**tiny_run, **NO_FIGURES, "max_steps": 9, "eval_steps": 1, "early_stopping_steps": 3}
    with_eval_losses(monkeypatch, [2.0, 2.5])
    stop_after_two(monkeypatch)
    with pytest.raises(TrainingInterrupted):
        run_exp(settings)
    monkeypatch.undo()
    with_eval_losses(monkeypatch, [2.5, 2.5, 0.0])
    assert run_exp(settings)["steps"] == 4  # the third evaluation without improvement, one of them before the restart


def stop_after_two(monkeypatch):
    watch = PackedTrainer._watch

    def watched(self, *args):
        watch(self, *args)
        self.should_stop = self.state.global_step == 1  # the second step is being made

    monkeypatch.setattr(PackedTrainer, "_watch", watched)


# ------------------------------------------------------------------------------------------------------- default_system
def test_default_system_begins_dialogues_that_have_none(tiny_run, tmp_path):
    rows = [{"q": "柳树？", "a": "柳絮", "s": "一座山"}, {"q": "柳树？", "a": "柳絮"}]
    (tmp_path / "own.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"prompt": "q", "response": "a", "system": "s"}
    info = {"own": {"file_name": "own.json", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    settings = {**tiny_run, "stage": "sft", "dataset": "own", "packing": False, "val_size": 0, "eval_strategy": "no"}
    settings |= {"eval_on_start": False, "disable_shuffling": True}
    tokenizer = load_tokenizer(tiny_run["model_name_or_path"])

    def ids(**changed):
        _, data, training, _ = get_train_args(settings | changed)
        train = workflow.get_sft_dataset(data, training.seed, tokenizer)[0]
        return [train[number]["input_ids"].tolist() for number in range(len(train))]

    template = Template.from_tokenizer(tokenizer)

    def dialogue(*messages):
        messages = [{"role": role, "content": content} for role, content in messages]
        return template.encode_dialogues(tokenizer, [messages])[0][0].tolist()

    turns = ("user", "柳树？"), ("assistant", "柳絮")
    own = dialogue(("system", "一座山"), *turns)
    assert ids() == [own, dialogue(*turns)]
    assert ids(default_system="河边") == [own, dialogue(("system", "河边"), *turns)]  # the cache notices
    assert ids(default_system="小镇") == [own, dialogue(("system", "小镇"), *turns)]
    assert ids(default_system="") == [own, dialogue(*turns)]


def test_tokenized_path_with_another_default_system_is_refused(tiny_run, tmp_path):
    settings = {**tiny_run, **SFT, **NO_FIGURES, "max_steps": 1, "tokenized_path": str(tmp_path / "kept")}
    settings |= {"eval_strategy": "no"}
    run_exp(settings | {"default_system": "河边"})
    with pytest.raises(UserError, match="default_system was 河边, now None"):
        run_exp(settings | {"output_dir": str(tmp_path / "other")})


# ----------------------------------------------------------------------------------------------------- disable_shuffling
@pytest.mark.parametrize(("stage", "dataset"), [("pt", "documents"), ("sft", "dialogues")])
def test_without_shuffling_rows_are_trained_in_the_order_of_the_file(tiny_run, monkeypatch, stage, dataset):
    seen = []
    watch = PackedTrainer._watch

    def watched(self, loss, inputs, trained):
        seen.extend(row for documents in inputs["doc_ids"] for row in documents.tolist())
        watch(self, loss, inputs, trained)

    monkeypatch.setattr(PackedTrainer, "_watch", watched)
    settings = {**tiny_run, **NO_FIGURES, "stage": stage, "dataset": dataset, "eval_strategy": "no", "val_size": 0}
    settings |= {"max_steps": -1, "num_train_epochs": 1}
    run_exp({**settings, "disable_shuffling": True})
    rows = list(dict.fromkeys(seen))  # a document may go on in the next sequence
    assert rows == list(range(60))
    seen.clear()
    run_exp({**settings, "output_dir": settings["output_dir"] + "2"})
    assert sorted(set(seen)) == list(range(60))
    assert list(dict.fromkeys(seen)) != list(range(60))


def test_next_fit_closes_a_sequence_where_the_next_dialogue_does_not_fit():
    assert next_fit(numpy.array([3, 5, 1, 8, 2, 6, 1]), 8).tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert next_fit(numpy.array([], dtype=numpy.int64), 8).tolist() == []


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


# ---------------------------------------------------------------------------------------------------------------- LoRA+
def test_loraplus_sets_the_rate_of_the_b_matrices_beside_that_of_the_embeddings(tiny_run, monkeypatch):
    optimizers = []
    create = PackedTrainer.create_optimizer

    def created(self, *args, **kwargs):
        optimizer = create(self, *args, **kwargs)
        optimizers.append((optimizer, {id(parameter): name for name, parameter in self.model.named_parameters()}))
        return optimizer

    monkeypatch.setattr(PackedTrainer, "create_optimizer", created)
    settings = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "max_steps": 2, "lr_scheduler_type": "constant"}
    settings |= {"learning_rate": 1e-3, "embedding_learning_rate": 1e-4}
    run_exp({**settings, "loraplus_lr_ratio": 16})
    rates = {
        names[id(parameter)]: group["lr"]
        for optimizer, names in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    kinds = {
        kind: {rate for name, rate in rates.items() if kind in name}
        for kind in ("lora_A", "lora_B", "embed_tokens", "lm_head")
    }
    assert kinds == {"lora_A": {1e-3}, "lora_B": {16e-3}, "embed_tokens": {1e-4}, "lm_head": {1e-4}}
    log = log_of(settings["output_dir"])
    assert [line["learning_rate"] for line in log if "loss" in line] == [1e-3, 1e-3]


def test_loraplus_changes_what_is_learned(tiny_run):
    settings = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "additional_target": None}
    run_exp(settings)
    run_exp({**settings, "loraplus_lr_ratio": 16, "output_dir": settings["output_dir"] + "2"})
    plain, plus = losses_of(settings["output_dir"]), losses_of(settings["output_dir"] + "2")
    assert plain[0] == plus[0]
    assert plus[-1] != pytest.approx(plain[-1], abs=1e-3)


# --------------------------------------------------------------------------------------------------- create_new_adapter
@pytest.mark.parametrize("earlier", [{}, {"use_dora": True, "additional_target": None}], ids=["embeddings", "dora"])
def test_a_new_adapter_is_merged_after_the_one_it_was_trained_on(tiny_run, tiny_model_dir, tmp_path, earlier):
    first, second = str(tmp_path / "adapter"), str(tmp_path / "second")
    plain = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "max_steps": 3, "learning_rate": 0.02}
    run_exp(plain | earlier)
    settings = {
        **plain,
        **SFT,
        "additional_target": None,
        "lora_rank": 2,
        "output_dir": second,
        "save_strategy": "steps",
    }
    settings |= {"adapter_name_or_path": first, "create_new_adapter": True, "save_steps": 3}
    run_exp(settings)
    base = {"model_name_or_path": str(tiny_model_dir)}
    export_model({**base, "adapter_name_or_path": first, "export_dir": str(tmp_path / "merged")})
    # The same run on the exported model: its first loss shows that the same weights were there.
    step_by_step = {**settings, "model_name_or_path": str(tmp_path / "merged"), "output_dir": str(tmp_path / "third")}
    del step_by_step["adapter_name_or_path"], step_by_step["create_new_adapter"]
    run_exp(step_by_step)
    assert losses_of(second) == pytest.approx(losses_of(tmp_path / "third"), rel=1e-4)
    for adapter, name in ((second, "both"), (f"{second}/checkpoint-3", "of the checkpoint")):
        export_model({**base, "adapter_name_or_path": adapter, "export_dir": str(tmp_path / name)})
    merge_adapter(tmp_path / "merged", tmp_path / "third", tmp_path / "one by one")
    wanted = load_model(tmp_path / "one by one").state_dict()
    for name in ("both", "of the checkpoint"):
        for key, tensor in load_model(tmp_path / name).state_dict().items():
            assert torch.allclose(tensor, wanted[key], atol=2e-4), (name, key)
    assert not torch.allclose(wanted["model.layers.0.mlp.down_proj.weight"], load_model(tmp_path / "merged").state_dict()["model.layers.0.mlp.down_proj.weight"], atol=2e-4)  # fmt: skip


def test_the_adapter_below_must_be_there_unchanged(tiny_run, tiny_model_dir, tmp_path):
    first, second = tmp_path / "adapter", tmp_path / "second"
    plain = {**tiny_run, **NO_FIGURES, "eval_strategy": "no", "max_steps": 1, "additional_target": None}
    run_exp(plain)
    on_it = {**plain, "adapter_name_or_path": str(first), "output_dir": str(second), "create_new_adapter": True}
    run_exp({**on_it, "lora_rank": 2, "save_strategy": "steps", "save_steps": 1})
    weights = first / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + b"x")
    with pytest.raises(UserError, match="merged adapter: sha256"):  # a checkpoint on another base is not resumed
        run_exp({**on_it, "lora_rank": 2, "max_steps": 1, "save_strategy": "steps", "save_steps": 1})
    weights.write_bytes(sound)
    with pytest.raises(UserError, match="nothing holds no LoRA adapter"):
        run_exp({**on_it, "adapter_name_or_path": str(tmp_path / "nothing"), "output_dir": str(tmp_path / "third")})
    with pytest.raises(UserError, match=r"was itself trained with create_new_adapter.*Export it"):
        run_exp({**on_it, "adapter_name_or_path": str(second), "output_dir": str(tmp_path / "third")})
    export = {"model_name_or_path": str(tiny_model_dir), "adapter_name_or_path": str(second)}
    for content, problem in ((weights.read_bytes()[:-1] + b"x", "has changed since"), (None, "no longer there")):
        if content is None:
            weights.unlink()
        else:
            weights.write_bytes(content)
        with pytest.raises(UserError, match=problem):
            export_model({**export, "export_dir": str(tmp_path / "merged")})
    assert not (tmp_path / "merged").exists()


# --------------------------------------------------------------------------------------------------------------- export
def test_an_export_without_adapter_writes_the_model_as_it_is(tiny_model_dir, tmp_path):
    export_model({"model_name_or_path": str(tiny_model_dir), "export_dir": str(tmp_path / "exported")})
    before, after = (load_model(Path(directory)).state_dict() for directory in (tiny_model_dir, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(load_tokenizer(tmp_path / "exported")) == len(load_tokenizer(tiny_model_dir))
