"""Checks: what a run's metrics prove."""

import copy

import pytest

from llmtuner.report.checks import percent, run_checks
from tests.reports import METRICS, MODELS, STEPS, changed


def test_a_run_that_keeps_every_promise():
    made = run_checks(METRICS)
    assert all(check.passed for check in made)
    count = {step.name: sum(check.step == step.name for check in made) for step in STEPS}
    assert count == {"step1": 1, "step2": 5, "step3": 2, "step4": 2, "step5": 3, "step6": 2, "step7": 5}
    assert len({(check.step, check.text) for check in made}) == len(made)


@pytest.mark.parametrize(
    ("path", "value", "step", "figure"),
    [
        ("step1/skipped", 1, "step1", "1 skipped"),
        ("step2/special_ids_kept", False, "step2", "moved"),
        ("step2/unreachable_tokens", 3, "step2", "3 unreachable tokens"),
        ("step2/changed_texts/zh", 7, "step2", "7 of 96 changed"),
        ("step2/changed_texts/en", 7, "step2", "7 of 95 changed"),
        ("step2/token_ratio/ja", 1.0, "step2", "100% of before"),
        ("step3/old_rows_identical", False, "step3", "changed"),
        ("step3/old_logits_max_diff", 1.1e-6, "step3", "largest difference 1e-06"),
        ("step3/old_logits_max_diff", float("nan"), "step3", "largest difference nan"),
        ("step4/zh/identical", 59, "step4", "59 of 60 identical"),
        ("step4/en/identical", 49, "step4", "49 of 50 identical"),
        ("step5/bits_per_byte/after/ja", 3.6648, "step5", "3.665 → 3.665 bits per byte"),
        ("step5/data/aozora_ja/ratio", 0.3499, "step5", "at most 1 points off (aozora_ja)"),
        ("step5/padding_ratio", 0.05, "step5", "5% padding"),
        ("step6/padding_ratio", 0.05, "step6", "5% padding"),
        ("step6/eval_loss/last", 1.9952, "step6", "held-out loss 1.995 → 1.995"),
        ("step7/accuracy/chat/zh", 0.9499, "step7", "100% → 95% correct"),
        ("step7/accuracy/chat/en", 0.9449, "step7", "99.5% → 94.5% correct"),
        ("step7/accuracy/chat/ja", 0.5, "step7", "0% → 50% correct"),
        ("step7/language_confusion/chat/ja/response_pass_rate", 0.9499, "step7", "99.9% → 95% of answers"),
        ("step7/generation/candidates/penalty/repeated_4gram_ratio", 0.2001, "step7", "20% repeated, greedy 20%"),
    ],
)
def test_a_promise_that_is_missed(path, value, step, figure):
    missed = [check for check in run_checks(changed(path, value)) if not check.passed]
    assert [(check.step, check.figure) for check in missed] == [(step, figure)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("step7/accuracy/chat/zh", 0.95),
        ("step7/language_confusion/chat/ja/response_pass_rate", 0.95),
        ("step7/accuracy/chat/en", 0.945),
        ("step7/accuracy/chat/ja", 0.505),
        ("step2/token_ratio/ja", 0.999),
    ],
)
def test_a_promise_that_is_just_kept(path, value):
    assert all(check.passed for check in run_checks(changed(path, value)))


@pytest.mark.parametrize(
    ("path", "fewer"),
    [
        ("step1", 1), ("step2/changed_texts", 2), ("step2/texts", 0), ("step3/old_logits_max_diff", 1), ("step4/en", 1),
        ("step5/data", 1), ("step5/bits_per_byte/before", 1), ("step6", 2), ("step6/eval_loss", 0), ("step7/accuracy", 3),
        ("step7/accuracy/base", 2),
        ("step7/language_confusion", 1), ("step7/language_confusion/base", 0),
        ("step7/language_confusion/chat/ja/response_pass_rate", 1),
        ("step7/generation", 1), ("step7/generation/candidates/greedy", 0),
    ],
)  # fmt: skip
def test_what_was_not_measured_is_not_claimed(path, fewer):
    assert len(run_checks(METRICS)) - len(run_checks(changed(path, None))) == fewer


def test_answers_that_nobody_knows_are_not_claimed():
    metrics = copy.deepcopy(METRICS)
    metrics["step7"]["accuracy"] = {model: dict.fromkeys(("zh", "en", "ja")) for model in MODELS}
    metrics["step6"]["eval_loss"] = {"first": None, "last": None}
    made = run_checks(metrics)
    assert len(run_checks(METRICS)) - len(made) == 3
    assert "training loss 2.035 → 0.175" in [check.figure for check in made]


def test_greedy_is_known_without_its_candidate():
    metrics = changed("step7/generation/candidates/greedy", None)
    assert [check.passed for check in run_checks(metrics)][-1] is False  # free answers, greedy: 0.1845
    metrics["step7"]["free_answers"]["chat"]["repeated_4gram_ratio"] = 0.3
    assert [check.passed for check in run_checks(metrics)][-1] is True


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100%"), (1.0, "100%"), (0.9999, "99.9%"), (0.9996, "99.9%"), (0.995, "99.5%"), (0.0004, "0.04%"), (0, "0%")],
)
def test_100_percent_is_all(share, text):
    assert percent(share) == text
