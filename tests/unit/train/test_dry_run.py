"""A dry run measures what a run takes, stops for what would stop the run, and leaves nothing but tokenized data."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.train import dry_run as module
from llmtuner.train.callbacks import ThroughputMeter
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.training import SFT


@pytest.fixture
def settings(tiny_run, monkeypatch):
    monkeypatch.setattr(module, "TIMED_SECONDS", 0)
    changed = {"dry_run": True, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, "max_steps": 20}
    return {**tiny_run, **changed, "price_per_hour": 2}


def left_in(directory):
    return sorted(path.name for path in directory.rglob("*") if "cache" not in path.parts)


def test_the_checkpoint_from_before_the_decay_needs_disk_too(settings):
    assert run_exp({**settings, "lr_scheduler_type": "warmup_stable_decay"})["checkpoints_kept"] == 3


def test_a_dry_run_measures_the_run_and_leaves_only_data(settings, tmp_path, capsys):
    before = left_in(tmp_path)
    plan = run_exp(settings, {"ja": ["柳樹の下で。"]})
    assert left_in(tmp_path) == before  # not even output_dir
    assert (plan["steps"], plan["sequences"], plan["saves"], plan["checkpoints_kept"]) == (20, 22, 5, 2)
    assert plan["evaluations"] == 5  # at the start, after steps 6, 12, 18 and 20
    low, mean, high = plan["hours"]
    assert 0 < low < mean < high
    assert plan["cost"] == [2 * low, 2 * mean, 2 * high]
    measured = 20 * plan["step_seconds"][1] + 5 * plan["eval_seconds"] + 5 * plan["save_seconds"]
    assert mean * 3600 == pytest.approx(measured + plan["startup_seconds"])
    assert plan["resume_difference"] == 0
    assert plan["merged_gb"] > plan["adapter_gb"] > 0
    assert plan["minutes_lost"] == pytest.approx(4 * plan["step_seconds"][1] / 60)
    output = capsys.readouterr().out
    assert "\nsteps        20 of 4 sequences\n" in output
    assert "resumed from one, the loss differs by 0e+00" in output
    assert "\nready; the dry run took" in output
    # The run itself finds the data ready, and makes the steps that were announced.
    metrics = run_exp({**settings, "dry_run": False, "max_steps": 2, "eval_strategy": "no", "eval_on_start": False})
    assert metrics["steps"] == 2


def test_a_dry_run_of_a_run_that_was_interrupted_counts_what_is_left(settings, tmp_path):
    run = {**settings, **SFT, "dry_run": False, "eval_strategy": "no", "eval_on_start": False, "max_steps": 4}
    run_exp(run)
    settings |= {**SFT, "eval_strategy": "no", "eval_on_start": False, "max_steps": 4, "overwrite_output_dir": True}
    assert run_exp(settings)["steps_done"] == 0
    before = left_in(tmp_path)
    plan = run_exp({**settings, "overwrite_output_dir": False})
    assert (plan["steps_done"], plan["saves"]) == (4, 0)
    assert left_in(tmp_path) == before


def test_an_interrupted_dry_run_leaves_nothing(settings, tmp_path, monkeypatch):
    before, original = left_in(tmp_path), PackedTrainer.training_step

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", interrupted)
    with pytest.raises(TrainingInterrupted, match="the dry run was stopped"):
        run_exp(settings)
    assert left_in(tmp_path) == before
    # What a killed one left is removed by the next run, but nothing that has no marker of a run.
    leftover = tmp_path / "adapter" / ".dry_run"
    (leftover / "checkpoint-1").mkdir(parents=True)
    module.remove_dry_run(tmp_path / "adapter")
    assert leftover.is_dir()
    module.prepare_output_dir(leftover, overwrite=False)
    module.remove_dry_run(tmp_path / "adapter")
    assert not leftover.exists()


def test_what_would_stop_the_run_stops_the_dry_run(settings, monkeypatch):
    usage = SimpleNamespace(free=10**6)
    monkeypatch.setattr(module, "shutil", SimpleNamespace(disk_usage=lambda path: usage, rmtree=shutil.rmtree))
    with pytest.raises(UserError, match=r"not ready:\n  - the run needs [\d]+ MB of disk, and 1 MB are free"):
        run_exp(settings)
    monkeypatch.setattr(module, "shutil", shutil)
    load = ThroughputMeter.load.__func__

    def without_the_first_step(cls, checkpoint):
        meter = load(cls, checkpoint)
        meter.loss = 0.0
        return meter

    monkeypatch.setattr(ThroughputMeter, "load", classmethod(without_the_first_step))
    with pytest.raises(UserError, match="a run that is resumed learns something else"):
        run_exp(settings)
    with pytest.raises(UserError, match="do_train is false"):
        run_exp({**settings, "do_train": False, "do_eval": True})
