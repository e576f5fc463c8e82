"""A run that diverges stops, with the checkpoint from before; one that only jumps goes on."""

import json
import signal
from pathlib import Path

import pytest

from llmtuner.console import TrainingInterrupted, UserError
from llmtuner.report.status import format_status
from llmtuner.train.divergence import DivergenceMonitor
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.training import ended_at


def observe(monitor, losses):
    """Number of values until a monitor calls it a divergence; None if it does not."""
    for count, loss in enumerate(losses, 1):
        monitor.streak = [*monitor.streak, {}] if monitor.is_high("loss", loss) else []
        if monitor.has_diverged():
            return count
    return None


@pytest.mark.parametrize(
    ("losses", "stops_at"),
    [
        ([2.0] * 5 + [9.0] * 4, 9),
        ([2.0] * 5 + [9.0] * 3 + [2.0] + [9.0] * 3, None),  # never four in a row
        ([2.05, 1.67, 3.56] + [9.58, 21.25, 10.94, 10.12], 7),  # step 6 of the miniature at 50 times its learning rate
        ([8.0 * 0.9**step for step in range(100)], None),
        ([0.5] * 200 + [1.4] * 200, None),  # below the factor
        ([0.5] * 200 + [1.6] * 200, 204),  # the median does not follow
        ([2.0] * 5 + [float("inf")] * 9, None),  # for others to judge
    ],
)
def test_divergence_is_a_streak_above_the_running_median(losses, stops_at):
    assert observe(DivergenceMonitor(3.0, 4), losses) == stops_at
    assert observe(DivergenceMonitor(3.0, 0), losses) is None


def test_state_survives_a_checkpoint(tmp_path):
    losses = [2.0] * 5 + [9.0] * 2
    monitor, resumed = DivergenceMonitor(3.0, 4), DivergenceMonitor(3.0, 4)
    assert observe(monitor, losses) is None
    monitor.save(tmp_path)
    resumed.load(tmp_path)
    assert observe(resumed, [9.0, 9.0]) == 2


def raised(monkeypatch, first, last, factor=10):
    """The losses of some steps, at least, are higher by a factor."""
    original = PackedTrainer._compute_loss_sum

    def scaled(self, model, inputs):
        loss, count = original(self, model, inputs)
        return loss * (factor if model.training and first <= self.state.global_step + 1 <= last else 1), count

    monkeypatch.setattr(PackedTrainer, "_compute_loss_sum", scaled)


@pytest.fixture
def long_run(saving_run):
    return {**saving_run, "eval_on_start": False, "divergence_steps": 3, "save_total_limit": 1, "plot_loss": False}


def test_diverged_run_stops_with_the_checkpoint_from_before(long_run, monkeypatch):
    raised(monkeypatch, 7, 14)
    output_dir = Path(long_run["output_dir"])
    with monkeypatch.context() as patch:  # in the middle of the streak, in whose state the run goes on
        ended_at(patch, 7, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            run_exp(long_run)
    with pytest.raises(UserError, match="diverged, so step 9 was not made: in 3 steps in a row, from 7,") as error:
        run_exp(long_run)
    assert "documents.jsonl, line" in str(error.value)
    status = json.loads((output_dir / "status.json").read_text())
    assert status == {"state": "diverged", "step": 8, "max_steps": 14, "message": str(error.value)}
    assert f"diverged in step 9 of 14\n  {error.value}" in format_status(output_dir)


def test_no_checkpoint_is_saved_of_a_diverging_state(long_run, monkeypatch):
    raised(monkeypatch, 7, 14)
    with pytest.raises(UserError, match=r"checkpoint-4 is from before: start over"):
        run_exp(long_run)  # step 8 is one that saves
    assert [path.name for path in Path(long_run["output_dir"]).glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_jump_postpones_a_checkpoint_and_no_more(long_run, monkeypatch, tmp_path):
    raised(monkeypatch, 7, 8)
    saved = run_exp({**long_run, "output_dir": str(tmp_path / "jump"), "save_total_limit": 9})
    assert saved["steps"] == 14
    checkpoints = sorted(int(path.name[11:]) for path in (tmp_path / "jump").glob("checkpoint-*"))
    assert checkpoints == [4, 9, 12, 14]  # 9 instead of 8
    assert "jump: finished after step 14 of 14" in format_status(tmp_path / "jump")
