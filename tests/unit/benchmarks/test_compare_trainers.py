"""The comparison with other trainers: which runs take turns, in which precision, and what their ratios are."""

from argparse import Namespace

import pytest

from benchmarks import common, compare_trainers
from llmtuner.console import UserError

PEER = "LLaMA-Factory, no checkpointing"


def options(**changes):
    chosen = dict(only=None, fastest=True, baseline=None, precisions=["bf16", "fp32"], repeats=3)
    return Namespace(**{**chosen, **changes})


def runs_of(stage="pt", **changes):
    chosen = options(**changes)
    return compare_trainers.plan_runs(compare_trainers.choose_entries(stage, chosen), chosen.precisions)


def test_others_run_in_every_precision_and_ours_once_as_the_steps_do():
    runs = runs_of(only=[PEER])
    assert runs == {"ours": ("ours", "bf16"), f"{PEER}, bf16": (PEER, "bf16"), f"{PEER}, fp32": (PEER, "fp32")}
    without_bf16 = runs_of(only=[PEER], precisions=["fp32"])
    assert without_bf16 == {"ours": ("ours", "fp32"), f"{PEER}, fp32": (PEER, "fp32")}


def test_earlier_commit_takes_its_turn_after_ours():
    assert list(runs_of(baseline="abc", only=[PEER]))[:3] == ["ours", "ours at abc", f"{PEER}, bf16"]


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_fastest_settings_are_entries_of_every_other_trainer(stage):
    fastest = compare_trainers.choose_entries(stage, options())
    everything = compare_trainers.choose_entries(stage, options(fastest=False))
    assert {trainer for trainer, *_ in fastest.values()} == {trainer for trainer, *_ in everything.values()}
    assert len(fastest) == 4
    assert list(compare_trainers.choose_entries("pt", options(only=["TRL, no checkpointing, packed"]))) == ["ours"]
    with pytest.raises(UserError, match=r"--only 'Trainer' names no entry\. Known: 'LLaMA-Factory', "):
        compare_trainers.choose_entries("pt", options(only=["Trainer"]))


def test_best_ratio_is_to_the_faster_precision_of_the_same_round(tmp_path, monkeypatch):
    seconds = {  # of three rounds; bf16 is the faster one in the median, but not in the first round
        ("ours", True): [1.0, 1.0, 1.0],
        ("llamafactory", True): [3.0, 1.5, 2.0],
        ("llamafactory", False): [2.0, 4.0, 5.0],
    }
    taken = {key: iter(values) for key, values in seconds.items()}

    def run_trainer(trainer, job, *_):
        return {"seconds": next(taken[trainer, job["bf16"]]), "versions": {"torch": "2"}}

    rows = {"what": "rows", "packed": {"tokens": 600, "target_tokens": 300}}
    monkeypatch.setattr(compare_trainers, "prepare", lambda *_: ({}, rows))
    monkeypatch.setattr(compare_trainers, "run_trainer", run_trainer)
    chosen = options(only=[PEER], environments=tmp_path)
    measured = compare_trainers.compare("pt", chosen, tmp_path)
    assert measured["precision"] == "bf16"
    results = measured["results"]
    assert results[f"{PEER}, bf16"]["speedup_per_round"] == [3.0, 1.5, 2.0]
    assert results[f"{PEER}, bf16"]["best_speedup_per_round"] == [2.0, 1.5, 2.0]
    assert "best_speedup" not in results[f"{PEER}, fp32"]
    assert results["ours"]["tokens_per_second"] == 600


@pytest.mark.skipif(not (common.ROOT / ".git").exists(), reason="needs the repository's history")
def test_earlier_commit_is_written_out_with_its_files(tmp_path):
    compare_trainers.check_out("HEAD", tmp_path / "baseline")
    assert (tmp_path / "baseline" / "benchmarks" / "trainer_job.py").is_file()
    with pytest.raises(UserError, match="git archive"):
        compare_trainers.check_out("0" * 40, tmp_path / "other")
