"""From which checkpoint a run goes on: a longer or shorter one, where the learning rate is constant."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.train import checkpointing
from llmtuner.train.tuner import run_exp
from tests.training import ended_at, log_of, losses_of

pytestmark = pytest.mark.slow  # whole runs, made longer


@pytest.fixture
def wsd_run(saving_run, tmp_path):
    """Of 14 steps, of which the last three decay; only the newest checkpoint is kept."""
    return {
        **saving_run,
        **dict(lr_scheduler_type="warmup_stable_decay", warmup_steps=2, save_steps=5, save_total_limit=1),
        "output_dir": str(tmp_path / "run"),
    }


def checkpoints_of(settings):
    return [path.name for path in checkpointing.list_checkpoints(Path(settings["output_dir"]))]


@pytest.mark.parametrize("longer", [{"max_steps": 22}, {"max_steps": -1, "num_train_epochs": 2.5}])
def test_finished_run_is_made_longer_as_if_it_had_been_so_from_the_beginning(wsd_run, tmp_path, capsys, longer):
    run_exp(wsd_run)
    assert checkpoints_of(wsd_run) == ["checkpoint-14", "checkpoint-11"]
    run_exp({**wsd_run, **longer})
    total = log_of(tmp_path / "run")[-1]["step"]
    said = f"resuming from {tmp_path}/run/checkpoint-11, where a run of 14 steps had a constant learning rate"
    assert f"{said}: this one makes {total}" in capsys.readouterr().out
    assert total > 14
    run_exp({**wsd_run, **longer, "output_dir": str(tmp_path / "whole")})
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert checkpoints_of(wsd_run)[0] == f"checkpoint-{total}"


def test_finished_run_at_a_constant_rate_goes_on_from_its_end(wsd_run, tmp_path, capsys):
    constant = {**wsd_run, "lr_scheduler_type": "constant_with_warmup", "eval_steps": 7}
    run_exp(constant)
    run_exp({**constant, "max_steps": 22})
    assert f"resuming from {tmp_path}/run/checkpoint-14, where" in capsys.readouterr().out
    run_exp({**constant, "max_steps": 22, "output_dir": str(tmp_path / "whole")})
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert log_of(tmp_path / "run")[-1]["step"] == 22


def test_longer_run_that_is_stopped_goes_on_from_its_own_checkpoint(wsd_run, tmp_path, monkeypatch, capsys):
    """checkpoint-14, with the rate of the shorter run decayed, is newer than what the longer one saves first."""
    run_exp(wsd_run)
    longer = {**wsd_run, "max_steps": 22}
    with monkeypatch.context() as patch:
        ended_at(patch, 12, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(longer)
    assert checkpoints_of(longer)[0] == "checkpoint-13"
    run_exp(longer)
    assert f"resuming from {tmp_path}/run/checkpoint-13\n" in capsys.readouterr().out
    run_exp({**longer, "output_dir": str(tmp_path / "whole")})
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overwrite", "hint"),
    [
        (False, "Run it again without resume_from_checkpoint to resume"),
        (True, r"without overwrite_output_dir \(steps: OVERWRITE=1\) and resume_from_checkpoint to resume"),
    ],
)
def test_longer_run_from_a_named_checkpoint_says_how_it_goes_on(wsd_run, tmp_path, monkeypatch, overwrite, hint):
    """As the steps have it: a finished one wants OVERWRITE=1, which does not start over from a checkpoint that is named."""
    run_exp(wsd_run)
    named = str(tmp_path / "run" / "checkpoint-11")
    longer = {**wsd_run, "max_steps": 22, "resume_from_checkpoint": named, "overwrite_output_dir": overwrite}
    with monkeypatch.context() as patch:
        ended_at(patch, 12, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted, match=hint):
            run_exp(longer)
    run_exp({**wsd_run, "max_steps": 22})
    run_exp({**wsd_run, "max_steps": 22, "output_dir": str(tmp_path / "whole")})
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_run_is_ended_early_with_a_decay_of_its_own(wsd_run, tmp_path, monkeypatch):
    """A run without an end in sight, at a constant rate, is stopped, and decays in as many steps as one likes."""
    endless = {**wsd_run, "lr_scheduler_type": "constant_with_warmup", "max_steps": 500}
    with monkeypatch.context() as patch:
        ended_at(patch, 7, signal.SIGINT)
        with pytest.raises(TrainingInterrupted):
            run_exp(endless)
    run_exp({**wsd_run, "max_steps": 12, "lr_scheduler_kwargs": {"num_decay_steps": 4}})
    rates = {line["step"]: line["learning_rate"] for line in log_of(tmp_path / "run") if "learning_rate" in line}
    peak = rates[8]
    assert rates[9] == peak
    assert [rates[step] < peak for step in (10, 11, 12)] == [True] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 22, "learning_rate": 1e-3}, "other settings:\n  - learning_rate"),
        ({"max_steps": 4}, "no such checkpoint here"),  # would have decayed before step 11
        ({"max_steps": 100, "warmup_steps": 0.2}, "other settings"),
        ({"max_steps": 22, "lr_scheduler_type": "cosine"}, "no such checkpoint here"),
    ],
)
def test_finished_run_is_not_made_into_another_one(wsd_run, tmp_path, changes, message):
    run_exp(wsd_run)
    with pytest.raises(UserError, match=message):
        run_exp({**wsd_run, **changes})
    assert checkpoints_of(wsd_run) == ["checkpoint-14", "checkpoint-11"]


def test_checkpoints_of_another_run_are_not_deleted_beside_one_that_goes_on(wsd_run, tmp_path):
    """Only what the longer run makes again is deleted, not what was trained with other settings or is damaged."""
    run_exp(wsd_run)
    run, other, damaged = (tmp_path / name for name in ("run", "run/checkpoint-90", "run/checkpoint-91"))
    for copied in (other, damaged):
        shutil.copytree(run / "checkpoint-14", copied)
    settings = json.loads((other / "training_args.json").read_text())
    (other / "training_args.json").write_text(json.dumps({**settings, "learning_rate": 1}))
    (damaged / "training_args.json").write_text("{")
    checkpointing.delete_superseded(run, 11, {**settings, "max_steps": 22})
    assert checkpoints_of(wsd_run) == ["checkpoint-91", "checkpoint-90", "checkpoint-11"]


def test_other_schedules_are_not_made_longer(saving_run):
    run_exp(saving_run)
    with pytest.raises(UserError, match=r"max_steps: 14 -> 22\nA run can be made longer .* warmup_stable_decay"):
        run_exp({**saving_run, "max_steps": 22})
