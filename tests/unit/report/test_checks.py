"""Checks: what a run's metrics prove."""

import copy

import pytest

from llmtuner.report.checks import percent, run_checks
from tests.reports import LOG, METRICS, MODELS, STEPS, changed

LOGS = {"step5": LOG, "step6": LOG}
GRADES = {"ja": {"base": [False] * 9, "chat": [True] * 8 + [False]}}


def test_a_run_that_keeps_every_promise():
    made = run_checks(METRICS, LOGS, GRADES)
    assert all(check.passed for check in made)
    assert all(check.limit for check in made)
    count = {step.name: sum(check.step == step.name for check in made) for step in STEPS}
    assert count == {"step1": 0, "step2": 5, "step3": 1, "step4": 2, "step5": 6, "step6": 2, "step7": 6}
    assert len({(check.step, check.text) for check in made}) == len(made)


@pytest.mark.parametrize(
    ("path", "value", "step", "figure"),
    [
        ("step2/special_ids_kept", False, "step2", "moved"),
        ("step2/unreachable_tokens", 3, "step2", "3 unreachable tokens"),
        ("step2/changed_texts/zh", 7, "step2", "7 of 96 changed"),
        ("step2/changed_texts/en", 7, "step2", "7 of 95 changed"),
        ("step2/token_ratio/ja", 0.801, "step2", "80.1% of before"),
        ("step3/old_logits_max_diff", 1.1e-6, "step3", "largest difference 1e-06"),
        ("step3/old_logits_max_diff", float("nan"), "step3", "largest difference nan"),
        ("step4/zh/identical", 59, "step4", "59 of 60 identical"),
        ("step4/en/identical", 49, "step4", "49 of 50 identical"),
        ("step5/bits_per_byte/after/ja", 13.9787, "step5", "13.979 → 13.979 bits per byte"),
        ("step5/bits_per_byte/after/zh", 0.6223, "step5", "0.610 → 0.622 bits per byte"),
        ("step5/bits_per_byte/after/en", 0.65, "step5", "0.630 → 0.650 bits per byte"),
        ("step5/data/aozora_ja/ratio", 0.3499, "step5", "1 points off (aozora_ja)"),
        ("step5/padding_ratio", 0.05, "step5", "5% padding"),
        ("step6/padding_ratio", 0.05, "step6", "5% padding"),
        ("step7/accuracy/chat/zh", 0.9499, "step7", "100% → 95% correct"),
        ("step7/accuracy/chat/en", 0.9449, "step7", "99.5% → 94.5% correct"),
        ("step7/accuracy/chat/ja", 0.0, "step7", "0% → 0% correct"),
        ("step7/language_confusion/chat/ja/response_pass_rate", 0.9499, "step7", "99.9% → 95% of answers"),
        ("step7/generation/candidates/penalty/repeated_4gram_ratio", 0.2001, "step7", "20% of 4-grams repeated"),
        ("step7/generation/candidates/penalty/finished_ratio", 0.89, "step7", "89% finished"),
    ],
)
def test_a_promise_that_is_missed(path, value, step, figure):
    missed = [check for check in run_checks(changed(path, value), LOGS) if not check.passed]
    assert [(check.step, check.figure) for check in missed] == [(step, figure)]


def test_held_out_loss_that_rises_again_is_overfitting():
    def held_out(*losses, settings=None, **metrics):
        log = [{"step": 100 * number, "eval_loss": loss} for number, loss in enumerate(losses)]
        (check,) = (
            one for one in run_checks({"step6": metrics}, {"step6": log}, None, settings) if "Held-out" in one.text
        )
        return check.passed, check.figure

    assert held_out(2.0, 1.0, 1.02) == (True, "2.000 → 1.020, lowest 1.000")
    assert held_out(2.0, 1.0, 1.03) == (False, "2.000 → 1.030, lowest 1.000")
    assert held_out(2.0, 2.01) == (False, "2.000 → 2.010, lowest 2.000")
    assert not held_out(2.0, 1.0, 1.5, best={"step": 100})[0]
    assert held_out(2.0, 1.0, 1.5, best={"step": 100}, settings={"step6": {"load_best_model_at_end": True}})[0]
    assert run_checks({"step6": {}}, {"step6": [{"step": 0, "eval_loss": 2.0}]}) == []


def test_japanese_has_to_be_better_beyond_chance():
    def learned(*correct_by_chat):
        grades = {"ja": {"base": [False] * 5, "chat": list(correct_by_chat)}}
        metrics = {"step7": {"accuracy": {"base": {"ja": 0}, "chat": {"ja": sum(correct_by_chat) / 5}}}}
        (check,) = run_checks(metrics, grades=grades)
        return check.passed, check.figure

    assert learned(True, False, False, False, False) == (False, "0% → 20% correct of 5, +20.0 points (−33.0 to +61.6)")
    assert learned(True, True, True, True, True)[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("step7/accuracy/chat/zh", 0.95),
        ("step7/language_confusion/chat/ja/response_pass_rate", 0.95),
        ("step7/accuracy/chat/en", 0.945),
        ("step7/accuracy/chat/ja", 0.505),
        ("step2/token_ratio/ja", 0.8),
    ],
)
def test_a_promise_that_is_just_kept(path, value):
    assert all(check.passed for check in run_checks(changed(path, value), LOGS))


@pytest.mark.parametrize(
    ("path", "fewer"),
    [
        ("step1", 0), ("step2/changed_texts", 2), ("step2/texts", 0), ("step3/old_logits_max_diff", 1), ("step4/en", 1),
        ("step5/data", 1), ("step5/bits_per_byte/after/zh", 1), ("step4/bits_per_byte/base/en", 1), ("step6", 1),
        ("step7/accuracy", 3), ("step7/accuracy/base", 3),
        ("step7/language_confusion", 1), ("step7/language_confusion/base", 0),
        ("step7/language_confusion/chat/ja/response_pass_rate", 1),
        ("step7/generation", 2), ("step7/generation/candidates/greedy", 0),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_not_claimed(path, fewer):
    assert len(run_checks(METRICS)) - len(run_checks(changed(path, None))) == fewer


def test_answers_that_nobody_knows_are_not_claimed():
    metrics = copy.deepcopy(METRICS)
    metrics["step7"]["accuracy"] = {model: dict.fromkeys(("zh", "en", "ja")) for model in MODELS}
    assert len(run_checks(METRICS)) - len(run_checks(metrics)) == 3


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100%"), (1.0, "100%"), (0.9999, "99.9%"), (0.9996, "99.9%"), (0.995, "99.5%"), (0.0004, "0.04%"), (0, "0%")],
)
def test_100_percent_is_all(share, text):
    assert percent(share) == text
