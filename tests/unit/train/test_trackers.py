"""Trackers are read back by their own libraries, and none of them can end a run."""

import importlib.util
import json
import os
import struct
from pathlib import Path

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llmtuner.console import UserError
from llmtuner.hparams import get_train_args
from llmtuner.train.tuner import run_exp

TRACKERS = [name for name in ("tensorboard", "wandb", "mlflow", "trackio") if importlib.util.find_spec(name)]


def tensorboard_series(output_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = output_dir.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    names = accumulator.Tags()["scalars"]
    return {name: [(point.step, point.value) for point in accumulator.Scalars(name)] for name in names}


def wandb_records(file):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    data, start, record = file.read_bytes(), 7, b""
    while start + 7 < len(data):
        if (left := 32_768 - start % 32_768) < 7:  # too little for a header: the next block
            start += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, start)
        record += data[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (1, 4):  # complete, or its last part
            yield record
            record = b""


def wandb_series(output_dir):
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = (output_dir / "wandb").glob("offline-run-*/*.wandb")
    series = {}
    for data in wandb_records(file):
        record = Record.FromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            series.setdefault(name, []).append((row["train/global_step"], value))
    return series


def mlflow_series(output_dir):
    from mlflow import MlflowClient

    client = MlflowClient((output_dir / "mlruns").as_uri())
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def trackio_series(_):
    from trackio.sqlite_storage import SQLiteStorage

    [run] = SQLiteStorage.get_runs("huggingface")
    series = {}
    for row in SQLiteStorage.get_logs("huggingface", run):
        for name, value in row.items():
            series.setdefault(name, []).append((row["train/global_step"], value))
    return series


def test_trackers_hold_what_the_log_holds(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    run_exp({**tiny_run, "report_to": TRACKERS, "plot_loss": False})
    assert {**before, **os.environ} == {**os.environ, **before}
    output_dir = Path(tiny_run["output_dir"])
    log = [json.loads(line) for line in (output_dir / "trainer_log.jsonl").read_text().splitlines()]
    for tracker in TRACKERS:
        series = globals()[f"{tracker}_series"](output_dir)
        for name in ("loss", "grad_norm", "mfu", "tokens_per_second", "eval_loss"):
            expected = [(line["step"], line[name]) for line in log if name in line]
            prefixed = (
                name if tracker == "mlflow" else name.replace("eval_", "eval/") if "eval" in name else f"train/{name}"
            )
            assert len(expected) == (2 if name == "eval_loss" else 6)
            assert [step for step, _ in series[prefixed]] == [step for step, _ in expected], (tracker, name)
            values = [value for _, value in series[prefixed]]
            assert values == pytest.approx([value for _, value in expected], rel=1e-6), (tracker, name)
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("wandb", "mlruns", "mlflow.db")]


class Failing(TrainerCallback):
    """A tracker whose server is down from the third line of the log on."""

    lines = 0

    def on_log(self, args, state, control, **_):
        self.lines += 1
        if self.lines == 3:
            raise ConnectionError("the server\nis down")
        assert self.lines < 3, "it is not asked again"


def test_tracker_that_fails_is_switched_off(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr(Failing, "__module__", "transformers.integrations.failing")
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Failing)
    assert run_exp({**tiny_run, "report_to": "tensorboard", "plot_loss": False})["steps"] == 6
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        "warning: Failing failed and is switched off (ConnectionError: the server); the run goes on, and trainer_log.jsonl "
        "has all lines"
    ]


@pytest.mark.skipif("wandb" not in TRACKERS, reason="wandb is not installed: pip install -r requirements-optional.txt")
def test_wandb_without_an_account_is_refused_before_data_is_read(tiny_run, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=r"wandb knows no account.*WANDB_MODE=offline"):
        run_exp({**tiny_run, "report_to": "wandb"})
    assert not (tmp_path / "cache").exists()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert get_train_args({**tiny_run, "report_to": "wandb"}).training.report_to == ["wandb"]
