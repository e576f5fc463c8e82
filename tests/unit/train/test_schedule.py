"""Where the learning rate of a schedule is constant, against the schedules of transformers themselves."""

import pytest
import torch
from transformers import get_scheduler

from llmtuner.console import UserError
from llmtuner.train.schedule import WSD, constant_steps, scheduler_kwargs


@pytest.mark.parametrize("num_warmup_steps", [0, 3])
@pytest.mark.parametrize(
    ("scheduler", "given"),
    [
        (WSD, {}),
        (WSD, {"num_decay_steps": 7, "min_lr_ratio": 0.1}),
        (WSD, {"num_stable_steps": 4, "num_decay_steps": 2}),
        ("constant", {}),
        ("constant_with_warmup", {}),
    ],
)
def test_rate_is_at_its_peak_after_these_steps_and_for_the_next_one(scheduler, given, num_warmup_steps):
    """A checkpoint after step k is followed by a step with the rate of index k."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kwargs = scheduler_kwargs(scheduler, given, 20)
    schedule = get_scheduler(scheduler, optimizer, num_warmup_steps, 20, scheduler_specific_kwargs=kwargs)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = constant_steps(scheduler, given, num_warmup_steps, 20)
    assert all(rates[step] == 1 for step in found if step < 20)
    assert found[0] == 0 or rates[found[0] - 1] < 1
    assert found[-1] == 20 or rates[found[-1] + 1] < 1


def test_a_fifth_is_decay_unless_it_is_set():
    assert constant_steps(WSD, {}, 5, 100) == range(5, 81)
    assert constant_steps(WSD, {"num_decay_steps": 10}, 5, 100) == range(5, 91)
    assert scheduler_kwargs("cosine", {"num_cycles": 2}, 100) == {"num_cycles": 2}


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "inverse_sqrt", "cosine_with_restarts"])
def test_other_schedules_are_never_constant(scheduler):
    assert not constant_steps(scheduler, {}, 5, 100)


@pytest.mark.parametrize("value", [0.1, -1, "10"])
def test_decay_that_is_no_number_of_steps_is_refused(value):
    with pytest.raises(UserError, match=r"num_decay_steps is .*; it is a number of steps, not a ratio"):
        constant_steps(WSD, {"num_decay_steps": value}, 0, 20)


def test_decay_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="of 20 steps 15 are warm-up and 10 are decay"):
        constant_steps(WSD, {"num_decay_steps": 10}, 15, 20)
