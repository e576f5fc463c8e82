"""What the benchmarks share: rounds and medians, processes that are measured, results files that keep other sections."""

import json
import sys

import pytest

from benchmarks import common
from llmtuner.console import UserError


def test_variants_take_turns_and_ratios_are_of_one_round():
    seconds = {"a": [1.0, 2.0, 4.0], "b": [2.0, 8.0, 12.0]}
    order = []

    def run(name, number):
        order.append(f"{name}{number}")
        return {"seconds": seconds[name][number], "padding_ratio": 0.5}

    def compare(together):
        for values in together:
            values["ratio"] = values["seconds"] / together[0]["seconds"]

    results = common.run_in_turn(seconds, 3, run, compare)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]
    # The median of the ratios is not the ratio of the medians, which is 4.
    expected = {"seconds": 8.0, "padding_ratio": 0.5, "ratio": 3.0, "ratio_per_round": [2.0, 4.0, 3.0]}
    assert results["b"] == expected


def test_process_is_measured_and_sees_variables():
    size = 60_000_000
    done = common.run_process(
        [sys.executable, "-c", f"import os; x = b'x' * {size}; print(os.environ['WORD'])"], WORD=7
    )
    assert done.stdout == "7\n"
    assert done.peak_mb > size / 1e6
    assert done.cpu_seconds > 0
    assert done.seconds > 0


def test_failed_process_is_an_error_with_the_end_of_its_output():
    with pytest.raises(UserError, match=r"exited with code 3:\nsaid\n"):
        common.run_process([sys.executable, "-c", "print('said'); raise SystemExit(3)"])


def test_results_keep_other_sections_and_name_their_environment(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"first": "of an earlier call", "second": "old"}')
    common.save_results(file, {"value": 1}, "second")
    saved = json.loads(file.read_text())
    assert saved["first"] == "of an earlier call"
    assert saved["second"]["value"] == 1
    assert {"versions", "machine"} <= saved["second"].keys()


def test_counts_of_steps_and_rounds_are_positive():
    parser = common.make_parser("text", "results.json", repeats=5)
    assert parser.parse_args([]).repeats == 5
    with pytest.raises(SystemExit):
        parser.parse_args(["--repeats", "0"])
