"""What a run prepares: data sets, mixture, order, precision and gradient checkpointing."""

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.data.loader import get_dataset
from llmtuner.data.template import Template
from llmtuner.hparams import get_train_args
from llmtuner.hparams.transformers_args import GRADIENT_CHECKPOINTING
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train import workflow
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.training import NO_FIGURES, SFT, STAGES, ended_at


@pytest.mark.parametrize(
    ("free", "disabled", "chosen"),
    [(None, None, False), (10**12, None, False), (10**5, None, True), (10**5, True, False), (10**12, False, True)],
)
def test_gradient_checkpointing_is_on_where_memory_is_short(
    tiny_run, tmp_path, monkeypatch, capsys, free, disabled, chosen
):
    seen = []
    original = PackedTrainer.train

    def train(self, *args, **kwargs):
        seen.append(
            (self.args.gradient_checkpointing, original(self, *args, **kwargs), self.model.is_gradient_checkpointing)
        )

    monkeypatch.setattr(workflow, "free_memory", lambda: free)
    monkeypatch.setattr(PackedTrainer, "train", train)
    how = {} if disabled is None else {"disable_gradient_checkpointing": disabled}
    metrics = run_exp({**tiny_run, **how})
    assert [(asked, on) for asked, _, on in seen] == [(chosen, chosen)]
    assert ("gradient checkpointing on" in capsys.readouterr().out) == (chosen and disabled is None)
    assert metrics["eval_loss"]["last"] < metrics["eval_loss"]["first"]


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
    with pytest.raises(UserError, match=r"chatglm3 template: it has no special token \[gMASK\], sop, <\|system\|>"):
        run_exp({**tiny_run, "model_name_or_path": str(other), "stage": stage, "dataset": dataset})


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
def test_settings_say_what_the_estimate_of_memory_decided(saving_run, tmp_path, monkeypatch, capsys):
    """And another GPU, for which it decides otherwise, may go on with the run."""
    out = tmp_path / "adapter"

    def recomputes(directory):
        return json.loads((directory / "training_args.json").read_text())[GRADIENT_CHECKPOINTING]

    saving_run["plot_loss"] = False
    with monkeypatch.context() as patch:
        patch.setattr("llmtuner.train.workflow.free_memory", lambda: 1)
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(saving_run)
    assert recomputes(out / "checkpoint-4") is recomputes(out / "checkpoint-6") is True
    monkeypatch.setattr("llmtuner.train.workflow.free_memory", lambda: 10**15)
    run_exp(saving_run)
    assert f"resuming from {out}/checkpoint-6" in capsys.readouterr().out
    assert recomputes(out / "checkpoint-6") is True
    assert recomputes(out / "checkpoint-8") is recomputes(out) is False
    monkeypatch.setattr("llmtuner.train.workflow.free_memory", lambda: 1)
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
