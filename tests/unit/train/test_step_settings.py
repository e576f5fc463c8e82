"""Micro-batch and gradient checkpointing are chosen so that a step fits, or the refusal names what would."""

import pytest
import torch

from benchmarks.memory_budget import CARDS, EMBEDDINGS
from benchmarks.memory_budget import make_estimator as make_chatglm3
from llmtuner.console import UserError
from llmtuner.train import step_settings
from llmtuner.train.memory import MemoryEstimate, StepEstimator, make_skeleton
from llmtuner.train.step_settings import choose_step_settings
from tests.helpers import ROOT
from tests.unit.train.test_memory import BOTH, make_args, make_config, make_estimator


class FakeEstimator(StepEstimator):
    """Needs 10 bytes, and 8 for each sequence of a micro-batch, or 2 if activations are recomputed."""

    def __init__(self, **settings):
        self.args, self.processes, self.model = make_args(**settings), 1, None

    def estimate(self, batch_size, checkpointing):
        return MemoryEstimate(10, 0, 0, 0, batch_size * (2 if checkpointing else 8), 0)


@pytest.fixture(autouse=True)
def all_of_the_memory(monkeypatch):
    monkeypatch.setattr(step_settings, "MEMORY_FRACTION", 1.0)


AUTO = {"auto_find_batch_size": True}


@pytest.mark.parametrize(
    ("settings", "available", "chosen"),
    [
        ({}, 42, (4, 2, False)),
        ({}, 41, (4, 2, True)),
        (AUTO, 42, (4, 2, False)),
        (AUTO, 41, (2, 4, False)),
        (AUTO, 18, (1, 8, False)),
        (AUTO, 17, (2, 4, True)),
        (AUTO, 12, (1, 8, True)),
        ({"disable_gradient_checkpointing": True}, 42, (4, 2, False)),
        ({"gradient_checkpointing": True}, 100, (4, 2, True)),
        ({**AUTO, "gradient_checkpointing": True}, 100, (4, 2, True)),
        ({**AUTO, "disable_gradient_checkpointing": True}, 20, (1, 8, False)),
        ({**AUTO, "per_device_train_batch_size": 6}, 40, (3, 4, False)),
    ],
)
def test_the_first_settings_that_fit_are_chosen(settings, available, chosen):
    found, estimate = choose_step_settings(FakeEstimator(**settings), available)
    assert tuple(vars(found).values()) == chosen
    assert estimate.total <= available


def test_a_step_that_just_fits_is_chosen_only_if_no_other_does(monkeypatch):
    monkeypatch.setattr(step_settings, "MEMORY_FRACTION", 0.9)
    assert choose_step_settings(FakeEstimator(), 18)[1].total == 18
    assert choose_step_settings(FakeEstimator(**AUTO), 18)[1].total == 14


def test_a_step_that_does_not_fit_is_refused_with_settings_that_would(monkeypatch):
    monkeypatch.setattr(step_settings, "_can_train_new_tokens_only", lambda model, args: False)
    estimator = FakeEstimator()
    with pytest.raises(UserError) as refusal:
        choose_step_settings(estimator, 17)
    first, second, *others = str(refusal.value).splitlines()
    assert first.startswith("a step with micro-batch 4 x 2, gradient checkpointing on needs about 0.0 GB (")
    assert "This would fit:" in first
    wanted = "per_device_train_batch_size: 2, gradient_accumulation_steps: 4, gradient_checkpointing: true (0.0 GB)"
    assert second == f"  - {wanted}"
    assert others == [f"  - optim: adamw_8bit, {wanted}"]
    with pytest.raises(UserError, match="train on a larger GPU"):
        choose_step_settings(estimator, 11)


def test_training_new_tokens_only_is_proposed_where_it_would_help():
    estimator = make_estimator()
    large = estimator.estimate(4, True).total
    skeleton = make_skeleton(make_config(1), make_args(**BOTH, train_new_tokens_only=True).finetuning, torch.bfloat16)
    small = StepEstimator(skeleton, make_args(**BOTH, train_new_tokens_only=True)).estimate(4, True).total
    with pytest.raises(UserError) as refusal:
        choose_step_settings(estimator, (2 * small + large) // 3)
    assert "\n  - train_new_tokens_only: true" in str(refusal.value)
    with pytest.raises(UserError) as refusal:
        choose_step_settings(make_estimator(additional_target=[]), 1)
    assert "train_new_tokens_only" not in str(refusal.value)


@pytest.mark.slow
def test_the_settings_of_chatglm3_fit_four_cards_of_24_gb():
    """Of the full width and depth, with DeepSpeed's configuration and the settings of step 5."""
    estimator = make_chatglm3(EMBEDDINGS, deepspeed=str(ROOT / "ds_config_zero2.json")).variant(processes=4)
    settings, estimate = choose_step_settings(estimator, int(0.9 * CARDS["24 GB"]))
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 16
    assert estimate.total < 0.9 * CARDS["24 GB"]
    assert 12e9 < estimate.weights < 14e9
