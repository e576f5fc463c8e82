"""What a run logs: throughput, tokens and losses."""

import json
import os
import signal

import pytest

from llmtuner.train.callbacks import GracefulStopSignal
from llmtuner.train.tuner import run_exp


def test_tokens_of_steps_without_a_line_count_too(tiny_run, tmp_path):
    every = run_exp({**tiny_run, "output_dir": str(tmp_path / "every")})
    few = run_exp({**tiny_run, "output_dir": str(tmp_path / "few"), "logging_steps": 4})
    assert few["tokens"] == every["tokens"] > 5 * 4 * 40
    assert few["padding_ratio"] == every["padding_ratio"]


def test_log_has_what_people_watch(tiny_run, tmp_path):
    run_exp(
        {
            **tiny_run,
            "report_to": "tensorboard",
            "embedding_learning_rate": 1e-3,
            "stage": "sft",
            "dataset": "dialogues",
        }
    )
    lines = [json.loads(line) for line in (tmp_path / "adapter" / "trainer_log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    wanted = {"grad_norm", "learning_rate", "embedding_learning_rate", "tokens_per_second", "target_tokens_per_second"}
    wanted |= {"padding_ratio", "data_wait_ratio", "peak_memory_gb", "eta_seconds", "epoch"}
    assert all(wanted <= line.keys() for line in steps)
    assert all(line["embedding_learning_rate"] == pytest.approx(line["learning_rate"] / 5) for line in steps)
    assert all(0 < line["data_wait_ratio"] < 0.5 for line in steps)
    for line in steps:  # of all gradients, before they are clipped
        squares = line["grad_norm_embeddings"] ** 2 + line["grad_norm_layers"] ** 2
        assert squares == pytest.approx(line["grad_norm"] ** 2, rel=1e-4)
    assert max(line["grad_norm"] for line in steps) > 1
    assert all(0 < line["target_tokens_per_second"] < line["tokens_per_second"] for line in steps)
    assert steps[-1]["eta_seconds"] == 0
    assert "initial_loss/dialogues" in lines[0]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (tmp_path / "adapter").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert [point.value for point in accumulator.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in steps], rel=1e-6
    )
    assert {"train/grad_norm", "train/tokens_per_second", "eval/loss"} <= set(accumulator.Tags()["scalars"])


def test_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
