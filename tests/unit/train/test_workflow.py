"""What a run prepares: data sets, mixture, order, precision and gradient checkpointing."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data.loader import get_dataset
from llmtuner.data.template import Template
from llmtuner.hparams import get_train_args
from llmtuner.hparams.transformers_args import GRADIENT_CHECKPOINTING
from llmtuner.model.adapters import init_adapter
from llmtuner.model.attention import VARLEN
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.train import memory, workflow
from llmtuner.train.memory import StepEstimator
from llmtuner.train.step_settings import MEMORY_FRACTION, StepSettings
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.training import NO_FIGURES, SFT, STAGES, ended_at, log_of


def tiny_estimator(settings):
    """The estimator of a tiny run, whose settings leave everything open."""
    args = get_train_args(settings)
    model = init_adapter(load_model(settings["model_name_or_path"], attention=VARLEN), args.finetuning)
    apply_fused_ops(model)
    return StepEstimator(model, args)


@pytest.fixture
def short(monkeypatch):
    """Makes the GPU so small that a step of a run fits with this micro-batch and gradient checkpointing at most."""

    def set_memory(settings, batch_size, checkpointing):
        total = tiny_estimator(settings).estimate(batch_size, checkpointing).total
        monkeypatch.setattr(workflow, "free_memory", lambda: int(total / MEMORY_FRACTION) + 1)

    return set_memory


@pytest.mark.parametrize(
    ("fits", "disabled", "chosen"),
    [(None, None, False), (False, None, False), (True, None, True), (False, False, True)],
)
def test_gradient_checkpointing_is_on_where_memory_is_short(
    tiny_run, tmp_path, monkeypatch, capsys, short, fits, disabled, chosen
):
    seen = []
    original = PackedTrainer.train

    def train(self, *args, **kwargs):
        seen.append(
            (self.args.gradient_checkpointing, original(self, *args, **kwargs), self.model.is_gradient_checkpointing)
        )

    if fits is not None:
        short(tiny_run, 4, fits)
    monkeypatch.setattr(PackedTrainer, "train", train)
    how = {} if disabled is None else {"disable_gradient_checkpointing": disabled}
    metrics = run_exp({**tiny_run, **how})
    assert [(asked, on) for asked, _, on in seen] == [(chosen, chosen)]
    output = capsys.readouterr().out
    assert ("estimated step memory: 0.0 GB (weights 0.0, " in output) == (fits is not None)
    if fits is not None:
        assert f"micro-batch 4 x 1, gradient checkpointing {'on' if chosen else 'off'}\n" in output
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]


def test_smaller_micro_batches_of_the_same_global_batch_learn_the_same(tiny_run, tmp_path, monkeypatch, capsys, short):
    settings = {**tiny_run, "plot_loss": False, "eval_on_start": False, "save_strategy": "no"}
    run_exp({**settings, "output_dir": str(tmp_path / "large")})
    short(tiny_run, 2, False)
    run_exp({**settings, "output_dir": str(tmp_path / "small"), "auto_find_batch_size": True})
    saved = json.loads((tmp_path / "small" / "training_args.json").read_text())
    assert (saved["per_device_train_batch_size"], saved["gradient_accumulation_steps"]) == (2, 2)
    assert not saved["auto_find_batch_size"]  # of Trainer, which would shrink the global batch
    assert "micro-batch 2 x 2, gradient checkpointing off" in capsys.readouterr().out
    for line, wanted in zip(log_of(tmp_path / "small"), log_of(tmp_path / "large"), strict=True):
        assert line == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_a_run_is_resumed_with_the_micro_batches_that_fit_now(saving_run, tmp_path, monkeypatch, short):
    settings = {**saving_run, "plot_loss": False, "lora_dropout": 0.0}
    run_exp({**settings, "output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(settings)
    short(settings, 2, False)
    run_exp({**settings, "auto_find_batch_size": True})
    saved = json.loads((tmp_path / "adapter" / "training_args.json").read_text())
    assert (saved["per_device_train_batch_size"], saved["gradient_accumulation_steps"]) == (2, 2)
    for line, wanted in zip(log_of(tmp_path / "adapter"), log_of(tmp_path / "whole"), strict=True):
        assert line == pytest.approx(wanted, abs=1e-5)


def test_a_run_that_would_not_fit_is_refused_before_anything_of_an_earlier_one_is_deleted(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(workflow, "free_memory", lambda: 10**5)
    monkeypatch.setattr(PackedTrainer, "train", None)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(
        UserError, match=r"a step with micro-batch 4 x 1, gradient checkpointing on needs about .*train on a la"
    ):
        run_exp({**tiny_run, "overwrite_output_dir": True})


def test_little_memory_left_is_a_warning(tiny_run, monkeypatch, capsys):
    total = tiny_estimator(tiny_run).estimate(4, True).total
    monkeypatch.setattr(workflow, "free_memory", lambda: int(total * 1.01))
    run_exp({**tiny_run, "max_steps": 1, "plot_loss": False})
    assert "warning: little of the GPU's memory is left" in capsys.readouterr().out


def test_a_model_that_fake_tensors_cannot_follow_recomputes_activations(tiny_run, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("depends on values")

    monkeypatch.setattr(workflow, "free_memory", lambda: 10**12)
    monkeypatch.setattr(memory, "follow_micro_batch", fail)
    run_exp({**tiny_run, "max_steps": 1, "plot_loss": False})
    assert "cannot be estimated for this model (RuntimeError: depends on values)" in capsys.readouterr().out
    saved = json.loads((Path(tiny_run["output_dir"]) / "training_args.json").read_text())
    assert saved[GRADIENT_CHECKPOINTING] is True


def test_all_processes_decide_by_the_smallest_gpu(tiny_run, monkeypatch):
    args = get_train_args(tiny_run)
    model = init_adapter(load_model(tiny_run["model_name_or_path"]), args.finetuning)
    seen = []

    def choose(estimator, available):
        seen.append((estimator.processes, available))
        return StepSettings(4, 1, False), estimator.estimate(4, False)

    monkeypatch.setattr(workflow, "free_memory", lambda: 10**9)
    monkeypatch.setattr(workflow, "gather_object", lambda values: [*values, 10**8])
    monkeypatch.setattr(workflow, "choose_step_settings", choose)
    monkeypatch.setattr(type(args.training), "world_size", 2)
    workflow.fit_into_memory(model, args)
    assert seen == [(2, 10**8)]


def test_deepspeed_gets_the_micro_batch_that_was_chosen(monkeypatch):
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    config["zero_optimization"] = {"stage": 2}
    training = get_train_args(
        {"model_name_or_path": "a", "dataset": "b", "output_dir": "c", "deepspeed": config}
    ).training
    training.per_device_train_batch_size, training.gradient_accumulation_steps = 4, 2
    workflow._apply_step_settings(training, StepSettings(1, 8, True))
    assert training.deepspeed_plugin.deepspeed_config.items() >= {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8
    }.items()  # fmt: skip
    assert training.deepspeed == config


def test_lengths_of_what_is_trained_on(tiny_run, tmp_path):
    for number in range(3):
        (tmp_path / "documents.jsonl").open("a").write(json.dumps({"text": "river " * 40 * (number + 1)}) + "\n")
    lengths = run_exp({**tiny_run, "val_size": 0.05})["lengths"]
    assert lengths["edges"] == [2**power for power in range(4, 4 + len(lengths["edges"]))]
    assert len(lengths["counts"]) == len(lengths["edges"]) - 1
    assert sum(lengths["counts"]) in range(57, 63)
    assert lengths["counts"][-1] >= 1  # the long ones, uncut


def test_tokenized_once_and_again_when_the_text_changes(tiny_run, tmp_path):
    def cached():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/input_ids.bin")}

    run_exp({**tiny_run, "output_dir": str(tmp_path / "one")})
    before = cached()
    run_exp({**tiny_run, "output_dir": str(tmp_path / "two")})
    assert cached() == before
    with (tmp_path / "documents.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"text": "又一条河。"}\n')
    run_exp({**tiny_run, "output_dir": str(tmp_path / "three")})
    assert len(cached()) == len(before) + 1


def test_rows_whose_text_another_data_set_holds_out_are_counted(tiny_run, tmp_path, capsys):
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["copy"] = info["documents"]
    info["part"] = {**info["documents"], "num_samples": 25}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    run = {**tiny_run, "val_size": 0, "eval_dataset": "part", "max_steps": 1, "plot_loss": False}
    metrics = run_exp({**run, "dataset": "documents,copy"})
    assert [metrics["data"][name]["held_out_elsewhere"] for name in ("documents", "copy")] == [25, 25]
    output = capsys.readouterr().out
    assert "held out elsewhere" in output
    assert "50 rows are not trained on: the same text is held out of another dataset" in output
    with pytest.raises(UserError, match=r"dataset documents: all 60 rows.* are also held out"):
        run_exp({**run, "eval_dataset": "copy", "output_dir": str(tmp_path / "none")})
    run_exp({**tiny_run, "output_dir": str(tmp_path / "share"), "max_steps": 1, "plot_loss": False})
    assert "held out" not in capsys.readouterr().out


def test_run_of_which_every_dialogue_is_dropped_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtuner.train.workflow.load_model", None)
    (tmp_path / "dialogues.jsonl").write_text(
        "".join(
            json.dumps({"instruction": f"{number} " + "river " * 60, "output": "yes"}) + "\n" for number in range(9)
        ),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"dataset dialogues: all .* dialogues are dropped"):
        run_exp({**tiny_run, "stage": "sft", "dataset": "dialogues", "cutoff_len": 40})


def test_eval_dataset_and_unusable_rows(tiny_run, tmp_path):
    with (tmp_path / "dialogues.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"instruction": "第？", "output": null}\n')
    settings = {**tiny_run, "dataset": "dialogues", "stage": "sft", "eval_dataset": "others", "val_size": 0}
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["others"] = {**info["dialogues"], "num_samples": 7}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    metrics = run_exp(settings)
    assert metrics["data"].keys() == {"dialogues"}
    assert metrics["data"]["dialogues"]["invalid"] == 1
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]
    [rejected] = [json.loads(line) for line in (tmp_path / "adapter" / "invalid_rows.jsonl").open(encoding="utf-8")]
    assert rejected["line"] == 61
    assert rejected["file"].endswith("dialogues.jsonl")


@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_a_model_with_another_tokenizer_is_refused(tiny_run, tiny_model_dir, tmp_path, monkeypatch, stage, dataset):
    """A text that becomes a prefix of ids 0 would be trained on without a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    other = tmp_path / "other"
    other.mkdir()
    for file in ("config.json", "model.safetensors"):
        (other / file).symlink_to(tiny_model_dir / file)
    backend = Tokenizer(WordLevel({"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 3}))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(other)
    monkeypatch.setattr("llmtuner.train.workflow.load_model", None)  # refused before that
    run = {**tiny_run, "model_name_or_path": str(other), "stage": stage, "dataset": dataset}
    with pytest.raises(UserError, match=r"chatglm3 template: it has no special token \[gMASK\], sop, <\|system\|>"):
        run_exp({**run, "template": "chatglm3"})
    if stage == "sft":
        with pytest.raises(UserError, match="has no chat template, so it has no form for dialogues"):
            run_exp(run)


def test_tokenizer_larger_than_the_model_is_refused_before_it_is_loaded(
    tiny_run, tiny_model_dir, tmp_path, monkeypatch
):

    small = tmp_path / "small"
    shutil.copytree(tiny_model_dir, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    monkeypatch.setattr("llmtuner.train.workflow.load_model", None)
    with pytest.raises(UserError, match="only 320 rows"):
        run_exp({**tiny_run, "model_name_or_path": str(small)})


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_frozen_weights_are_held_as_they_are_multiplied(precision, dtype):
    from llmtuner.train.workflow import compute_dtype

    assert compute_dtype(SimpleNamespace(bf16=precision == "bf16", fp16=precision == "fp16")) == dtype


@pytest.mark.slow
def test_settings_say_what_the_estimate_of_memory_decided(saving_run, tmp_path, monkeypatch, capsys, short):
    """And another GPU, for which it decides otherwise, may go on with the run."""
    out = tmp_path / "adapter"

    def recomputes(directory):
        return json.loads((directory / "training_args.json").read_text())[GRADIENT_CHECKPOINTING]

    saving_run["plot_loss"] = False
    with monkeypatch.context() as patch:
        short(saving_run, 4, True)
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(saving_run)
    assert recomputes(out / "checkpoint-4") is recomputes(out / "checkpoint-6") is True
    monkeypatch.setattr("llmtuner.train.workflow.free_memory", lambda: 10**15)
    run_exp(saving_run)
    assert f"resuming from {out}/checkpoint-6" in capsys.readouterr().out
    assert recomputes(out / "checkpoint-6") is True
    assert recomputes(out / "checkpoint-8") is recomputes(out) is False
    short(saving_run, 4, True)
    run_exp({**saving_run, "output_dir": str(tmp_path / "short")})
    assert recomputes(tmp_path / "short") is True


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
        args = get_train_args(settings | changed)
        train = get_dataset("sft", args.data, args.training.seed, tokenizer).train
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
    compute_loss = PackedTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        seen.extend(doc_id for sequence in inputs["doc_ids"] for doc_id in sequence.tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "compute_loss", record)
    settings = {**tiny_run, **NO_FIGURES, "stage": stage, "dataset": dataset, "eval_strategy": "no", "val_size": 0}
    settings |= {"max_steps": -1, "num_train_epochs": 1}
    run_exp({**settings, "disable_shuffling": True})
    rows = list(dict.fromkeys(seen))  # a document may go on in the next sequence
    assert rows == list(range(60))
    seen.clear()
    run_exp({**settings, "output_dir": settings["output_dir"] + "2"})
    assert sorted(set(seen)) == list(range(60))
    assert list(dict.fromkeys(seen)) != list(range(60))
