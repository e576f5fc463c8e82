"""Intervals of scores, their chance level, and what is lost from one model to another."""

import pytest

from llmtuner.eval.intervals import wilson_interval
from llmtuner.eval.scores import format_paired, format_scores, lost_percent, paired_rows, score_rows


@pytest.mark.parametrize(("right", "named"), [(20, True), (27, True), (32, False), (5, True)])
def test_scores_no_better_than_chance_are_named(right, named):
    scores = {"acc": right / 100, "acc_stderr": 0.04, "acc_interval": wilson_interval(right, 100), "acc_chance": 0.2}
    table = format_scores({"task": {**scores, "n": 100, "truncated": 3, "few_shot": 0}})
    assert ("No better than chance: task." in table) == named
    assert f"{right / 100:.4f}  0.0400" in table
    assert "0.2000        100          3         0" in table


def test_scores_of_earlier_versions():
    [row] = score_rows({"jnli": {"acc": 0.31, "acc_stderr": 0.066, "n": 50, "few_shot": 3}})
    assert (row["interval"], row["chance"], row["truncated"]) == (None, None, None)
    assert "0.3100  0.0660" in format_scores({"jnli": {"acc": 0.31, "acc_stderr": 0.066, "n": 50, "few_shot": 3}})


def test_lost_percent_is_paired():
    before = "1" * 80 + "0" * 20
    same_questions = lost_percent(before, "1" * 76 + "0" * 24)
    others = lost_percent(before, "0" * 4 + "1" * 56 + "0" * 20 + "1" * 20)
    assert same_questions["lost"] == pytest.approx(5)
    assert others["lost"] == pytest.approx(5)
    low, high = same_questions["interval"]
    # Four of 100 pairs differ: the standard error of the difference is 0.0196, of the loss 2.45 points.
    assert (low, high) == pytest.approx((5 - 1.96 * 2.45, 5 + 1.96 * 2.45), abs=1.2)
    assert others["interval"][1] - others["interval"][0] > 2 * (high - low)
    assert lost_percent("0000", "1000") == {"n": 4, "before": 0, "after": 0.25, "lost": None, "interval": None}
    assert lost_percent("1000", "1000")["interval"] is None  # a resample may have no right answer
    assert lost_percent("1111", "1111")["interval"] == (0, 0)


def test_only_the_same_questions_are_paired():
    def result(digest, marks, few_shot=0):
        return {
            "tasks": {"jnli": {"acc": 0.5, "n": 4, "few_shot": few_shot}},
            "questions": {"jnli": {"digest": digest, "correct": {"acc": marks}}},
        }

    [row] = paired_rows(result("a", "1110"), result("a", "1100"))
    assert row == {"task": "jnli", "metric": "acc", **lost_percent("1110", "1100")}
    assert "33.3 %" in format_paired([row], "base", "chat")
    assert paired_rows(result("a", "1110"), result("b", "1100")) == []
    assert paired_rows(result("a", "1110"), result("a", "1100", few_shot=3)) == []
    assert paired_rows({}, result("a", "1100")) == []
    guessing = result("a", "1110")
    guessing["tasks"]["jnli"] |= {"acc_interval": (0.3, 0.95), "acc_chance": 0.5}
    [row] = paired_rows(guessing, result("a", "1100"))
    assert (row["before"], row["after"], row["lost"], row["interval"]) == (0.75, 0.5, None, None)
