"""Comparison of an interrupted run with an uninterrupted one: it sees every difference."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import crash_resume
from benchmarks.crash_resume import compare_logs, compare_weights, read_log

STEPS = 20


@pytest.fixture
def log():
    lines = [{"step": 0, "eval_loss": 6.5}]
    for step in range(1, STEPS + 1):
        lines.append({"step": step, "loss": 6 - step / 10, "grad_norm": 1.5, "learning_rate": 1e-3})
    return lines + [{"step": STEPS, "eval_loss": 4.0}]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda log: log.pop(7), "killed has step 7 0 times"),
        (lambda log: log.pop(STEPS), "killed has step 20 0 times"),
        (lambda log: log.insert(7, log[7]), "killed has step 7 2 times"),
        (lambda log: log.insert(7, log.pop(8)), "not in order"),
        (lambda log: log.insert(-1, {**log[-2], "step": STEPS + 1}), "killed has step 21 1 times"),
        (lambda log: log[7].update(loss=log[7]["loss"] + 1e-5), "step 7: loss is"),
        (lambda log: log[7].update(grad_norm=float("nan")), "step 7: grad_norm is"),
        (lambda log: log[7].update(learning_rate=2e-3), "step 7: learning_rate is"),
        (lambda log: log[7].pop("grad_norm"), "other keys"),
        (lambda log: log[-1].update(eval_loss=3.9), "step 20: eval_loss is"),
        (lambda log: log.pop(), "22 and 21 lines"),
    ],
)
@pytest.mark.parametrize("tolerance", crash_resume.TOLERANCE.values())
def test_logs_that_differ(log, spoil, problem, tolerance):
    spoilt = [dict(line) for line in log]
    assert compare_logs(log, spoilt, STEPS, tolerance) == (0, [])
    spoil(spoilt)
    assert any(problem in one for one in compare_logs(log, spoilt, STEPS, tolerance)[1])


def test_logs_that_lack_the_same_step(log):
    log.pop(7)
    problems = [f"the run {name} has step 7 0 times in its log instead of 1" for name in ("left alone", "killed")]
    assert compare_logs(log, log, STEPS, 0) == (0, problems)


def test_difference_that_is_allowed(log):
    other = [dict(line) for line in log]
    other[7]["loss"] += 5e-7
    assert compare_logs(log, other, STEPS, 1e-6) == (pytest.approx(5e-7), [])
    assert compare_logs(log, other, STEPS, 0)[1]


def test_log_is_read_without_clock_and_torn_line(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text(
        '{"step": 1, "loss": 6.5, "tokens_per_second": 10.0}\n{"step": 1, "train_runtime": 3.0}\n{"step": 2, "lo'
    )
    assert read_log(tmp_path / "trainer_log.jsonl") == [{"step": 1, "loss": 6.5}]
    assert read_log(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda weights: weights["a"][1].add_(1e-5), "a differs by 1e-05"),
        (lambda weights: weights["a"][1].fill_(float("nan")), "a differs by nan"),
        (lambda weights: weights.pop("b"), "b is not in both"),
        (lambda weights: weights.update(b=torch.ones(1)), "b is not in both"),
        (lambda weights: weights.update(b=weights["b"].half()), "b is not in both"),
    ],
)
def test_weights_that_differ(tmp_path, spoil, problem):
    weights = {"a": torch.ones(3, 2), "b": torch.zeros(2)}
    for name in ("whole", "same", "spoilt"):
        if name == "spoilt":
            spoil(weights)
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "adapter_model.safetensors")
    assert compare_weights(tmp_path / "whole", tmp_path / "same", 0) == (0, [])
    [found] = compare_weights(tmp_path / "whole", tmp_path / "spoilt", 1e-6)[1]
    assert problem in found
