"""Confidence intervals: against published values, and against how often they contain the truth."""

import numpy
import pytest

from llmtuner.eval.intervals import paired_difference, seed_difference, unpaired_difference, wilson_interval


def test_wilson_interval():
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)  # Newcombe 1998, table I, method 3
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


def test_differences_of_one_sided_results_stay_within_bounds():
    for difference in (paired_difference, unpaired_difference):
        change, low, high = difference([0] * 10, [1] * 10)
        assert (change, high) == (1.0, 1.0)
        assert 0 < low < 1
        change, low, high = difference([1] * 30, [1] * 30)
        assert change == 0
        assert low == -high < 0  # 30 of 30 twice is no proof that nothing was lost


def test_intervals_contain_the_truth_about_19_times_in_20():
    """A model answers 80 % of the questions, another one 5 % of these no longer and 15 % of the others newly."""
    random = numpy.random.default_rng(0)
    truth = 0.2 * 0.15 - 0.8 * 0.05
    hits = {paired_difference: [], unpaired_difference: []}
    for _ in range(1500):
        before = random.random(120) < 0.8
        after = numpy.where(random.random(120) < numpy.where(before, 0.05, 0.15), ~before, before)
        for difference, contained in hits.items():
            _, low, high = difference(before.astype(float).tolist(), after.astype(float).tolist())
            contained.append(low <= truth <= high)
    assert 0.93 < numpy.mean(hits[paired_difference]) < 0.98
    assert numpy.mean(hits[unpaired_difference]) > 0.99  # it does not know that the answers go together


def test_difference_over_seeds_is_welchs():
    change, low, high = seed_difference([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])  # R: t.test, df 2.94, which is taken as 2
    assert change == 4.0
    assert (low, high) == pytest.approx((4 - 4.303 * (5 / 3) ** 0.5, 4 + 4.303 * (5 / 3) ** 0.5))
    assert seed_difference([1.0], [2.0, 3.0]) is None
    assert seed_difference([1.0, 1.0], [2.0, 2.0]) == (1.0, 1.0, 1.0)
