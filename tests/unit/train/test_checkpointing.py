"""Checkpoints: a stopped run resumes as if it had never stopped, and damaged or foreign checkpoints are refused."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.files import MARKER
from llmtuner.train import checkpointing
from llmtuner.train.tuner import run_exp
from tests.training import ended_at, log_of, losses_of

pytestmark = pytest.mark.slow  # whole runs, stopped and resumed


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_stopped_run_goes_on_as_if_it_never_had(saving_run, tmp_path, monkeypatch, capsys, logging_steps):
    """SIGTERM in the middle of an epoch, of a logging interval and between two saves; then Ctrl-C; then to the end."""
    saving_run |= {"logging_steps": logging_steps, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run_exp({**saving_run, "output_dir": str(tmp_path / "whole")})
    stopped = {**saving_run, "output_dir": str(tmp_path / "stopped")}
    for step, number, code in ((4, signal.SIGTERM, 143), (9, signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            ended_at(patch, step, number)
            with pytest.raises(TrainingInterrupted, match=f"checkpoint-{step + 1}") as end:
                run_exp(stopped)
        assert end.value.exit_code == code
        assert "same command resumes" in str(end.value)
        assert not (tmp_path / "stopped" / "adapter_config.json").exists()
    run_exp(stopped)
    assert f"resuming from {tmp_path}/stopped/checkpoint-10" in capsys.readouterr().out
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(saving_run, tmp_path, capsys):
    out = tmp_path / "adapter"
    metrics = run_exp(saving_run)
    assert [path.name for path in checkpointing.list_checkpoints(out)] == [
        "checkpoint-14",
        "checkpoint-12",
        "checkpoint-8",
        "checkpoint-4",
    ]
    wanted = log_of(out)
    assert run_exp(saving_run)["eval_loss"] == metrics["eval_loss"]  # it has finished: nothing is trained again
    assert log_of(out) == wanted
    with (out / "checkpoint-14" / "optimizer.pt").open("r+b") as file:  # same size, another byte
        file.seek(2_000)
        byte = file.read(1)
        file.seek(2_000)
        file.write(bytes([byte[0] ^ 1]))
    os.truncate(out / "checkpoint-12" / "adapter_model.safetensors", 1_000)
    (out / "checkpoint-8" / checkpointing.CHECKSUM_FILE).unlink()
    again = run_exp(saving_run)
    output = capsys.readouterr().out
    assert "checkpoint-14 failed verification (optimizer.pt does not match its checksum" in output
    assert "checkpoint-12 failed verification (adapter_model.safetensors has 1,000 of" in output
    assert "checkpoint-8 failed verification (checksums.json cannot be read" in output
    assert "resuming from" in output
    assert "checkpoint-4" in output
    assert log_of(out) == wanted
    assert again["eval_loss"] == metrics["eval_loss"]
    assert not checkpointing.verify_checkpoint(out / "checkpoint-14")


def test_named_checkpoint_is_resumed_or_rejected(saving_run, tmp_path, capsys):
    first = tmp_path / "adapter"
    run_exp(saving_run)
    second = {**saving_run, "output_dir": str(tmp_path / "second")}
    run_exp({**second, "resume_from_checkpoint": str(first / "checkpoint-8")})
    assert f"resuming from {first}/checkpoint-8" in capsys.readouterr().out
    assert log_of(tmp_path / "second") == log_of(first)
    with pytest.raises(UserError, match="nowhere cannot be resumed:"):
        run_exp({**second, "overwrite_output_dir": False, "resume_from_checkpoint": str(tmp_path / "nowhere")})


def test_limit_of_checkpoints_and_starting_anew(saving_run, tmp_path):
    out = tmp_path / "adapter"
    run_exp({**saving_run, "save_total_limit": 2})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-14", "checkpoint-12"]
    with pytest.raises(UserError, match=r"learning_rate: 0\.005 -> 0\.001"):
        run_exp({**saving_run, "learning_rate": 1e-3})
    with (tmp_path / "documents.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"text": "又一条河。"}\n')
    with pytest.raises(UserError, match="data set documents: "):
        run_exp(saving_run)
    run_exp({**saving_run, "learning_rate": 1e-3, "overwrite_output_dir": True, "max_steps": 5, "save_total_limit": 2})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-5", "checkpoint-4"]
    assert len(losses_of(out)) == 5


def test_checkpoint_of_weights_alone_is_not_resumed(saving_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "adapter"
    saving_run |= {"save_only_model": True, "plot_loss": False}
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted, match=r"checkpoint-6.*weights only, and the run cannot be resumed"):
            run_exp(saving_run)
    assert "a run that stops early cannot be resumed" in capsys.readouterr().out
    for changed in (saving_run, {**saving_run, "save_only_model": False}):
        with pytest.raises(
            UserError, match=f"checkpoint-6 cannot be resumed.*adapter_name_or_path: {out}/checkpoint-6"
        ):
            run_exp(changed)
    assert len(losses_of(out)) == 6  # and nothing was touched
    named = {"adapter_name_or_path": str(out / "checkpoint-6"), "output_dir": str(tmp_path / "second")}
    finished = {**saving_run, **named, "max_steps": 4}
    metrics = run_exp(finished)  # as the message says
    assert log_of(tmp_path / "second")[1]["learning_rate"] == saving_run["learning_rate"]
    assert run_exp(finished)["eval_loss"] == metrics["eval_loss"]  # a finished run needs no optimizer
    early = {**saving_run, "learning_rate": 0.0, "early_stopping_steps": 1, "output_dir": str(tmp_path / "early")}
    assert run_exp(early)["steps"] < 14
    assert run_exp(early)["steps"] < 14  # nor does one that has stopped early
    full = {**saving_run, "finetuning_type": "full", "additional_target": [], "output_dir": str(tmp_path / "full")}
    run_exp({**full, "max_steps": 6})
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be resumed.*set model_name_or_path"):
        run_exp({**full, "max_steps": 6, "resume_from_checkpoint": str(tmp_path / "full" / "checkpoint-4")})


def test_changed_intervals_take_effect_on_resume(saving_run, tmp_path, monkeypatch):
    out = tmp_path / "adapter"
    saving_run |= {"eval_on_start": False, "plot_loss": False}
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp({**saving_run, "save_steps": 4, "eval_steps": 5, "logging_steps": 1})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-6", "checkpoint-4"]
    assert [line["step"] for line in log_of(out) if "eval_loss" in line] == [5]
    changed = {"save_steps": 5, "eval_steps": 4, "logging_steps": 3, "save_total_limit": 2}
    with monkeypatch.context() as patch:
        ended_at(patch, 12, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp({**saving_run, **changed})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-13", "checkpoint-10"]
    assert [line["step"] for line in log_of(out) if "eval_loss" in line] == [5, 8, 12]
    assert [line["step"] for line in log_of(out) if "loss" in line] == [1, 2, 3, 4, 5, 6, 9, 12]
    strategies = {"save_strategy": "no", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    run_exp({**saving_run, **strategies})
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-13", "checkpoint-10"]
    assert json.loads((out / "training_args.json").read_text())["logging_strategy"] == "epoch"


def test_full_disk_while_saving_keeps_what_is_older(saving_run, tmp_path, monkeypatch):
    import errno

    save = torch.save

    def full(content, file, *args, **kwargs):
        save(content, file, *args, **kwargs)
        if Path(file).parent.name == "checkpoint-8" and Path(file).name == "scheduler.pt":
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"disk filled up.*checkpoint-8") as error:
            run_exp({**saving_run, "save_total_limit": 1})
    assert "checkpoint-4 is unchanged" in str(error.value)
    out = tmp_path / "adapter"
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["checkpoint-4"]
    run_exp(saving_run)
    assert len(losses_of(out)) == 14


def test_output_that_cannot_be_written_is_refused(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to.*Set output_dir"):
        run_exp({**tiny_run, "output_dir": str(tmp_path / "file" / "adapter")})


# ------------------------------------------------------------------------------------------------ an earlier run's files
def test_settings_data_and_model_are_checked_before_anything_is_deleted(saving_run, tmp_path):
    out = tmp_path / "adapter"
    run_exp(saving_run)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = {**saving_run, "overwrite_output_dir": True}
    (tmp_path / "broken").mkdir()
    for wrong in (
        {"learing_rate": 1e-4},
        {"dataset": "nowhere"},
        {"model_name_or_path": str(tmp_path / "broken")},
        {"additional_target": "no_such_module"},
    ):
        with pytest.raises(UserError):
            run_exp({**again, **wrong})
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_changed_model_is_not_resumed_on(saving_run, tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    run = {**saving_run, "model_name_or_path": str(model)}
    run_exp(run)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match="model checksum: "):
        run_exp(run)


def test_output_dir_of_another_program_is_left_alone(tiny_run, tmp_path):
    out = tmp_path / "adapter"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-500" / "adapter_model.safetensors").write_bytes(b"another trainer's")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no run of this project wrote, such as checkpoint-500"):
            run_exp({**tiny_run, "overwrite_output_dir": overwrite})
    assert [str(path.relative_to(out)) for path in out.rglob("*")] == [
        "checkpoint-500",
        "checkpoint-500/adapter_model.safetensors",
    ]
    (out / "checkpoint-500").rename(tmp_path / "elsewhere")
    (out / "model.safetensors").write_bytes(b"a merged model of our own")
    (out / MARKER).write_text(json.dumps({"made_by": "llmtuner", "files": ["model.safetensors"]}))
    with pytest.raises(UserError, match=r"wrote, such as model\.safetensors"):
        run_exp({**tiny_run, "overwrite_output_dir": True})
    (out / "model.safetensors").unlink()
    (out / MARKER).unlink()
    (out / "notes.txt").write_text("mine")  # of no name that a run uses
    run_exp({**tiny_run, "max_steps": 1})
    assert (out / "notes.txt").read_text() == "mine"


def test_interrupted_run_that_overwrites_says_how_to_resume(saving_run, tmp_path, monkeypatch):
    run_exp(saving_run)
    with monkeypatch.context() as patch:
        ended_at(patch, 5, signal.SIGINT)
        with pytest.raises(TrainingInterrupted, match="again without overwrite_output_dir"):
            run_exp({**saving_run, "overwrite_output_dir": True})
    run_exp(saving_run)
    assert len(losses_of(tmp_path / "adapter")) == 14


def test_checkpoint_just_saved_is_kept_beside_newer_ones(tmp_path):
    """They are of a run that an older checkpoint, which was named, has started again."""
    for step in (9, 5):
        staged = tmp_path / checkpointing.TMP_DIR / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        checkpointing.commit_checkpoint(tmp_path, step, limit=1)
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-5"]
