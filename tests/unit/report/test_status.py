"""Where a run stands, read from its files: states, trend, warnings, and a lock that another process holds."""

import json
import os
import subprocess
import sys

import pytest

from llmtuner.console import UserError
from llmtuner.locks import file_lock
from llmtuner.report.status import format_status
from llmtuner.train.run_status import write_run_status
from tests.helpers import ROOT


def lines_of(losses, **values):
    return [
        {"step": 10 * number, "loss": loss, "eta_seconds": 4000 - 60 * number, **values}
        for number, loss in enumerate(losses, 1)
    ]


def write_run(directory, log=(), checkpoints=(), torn=""):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + torn)
    for step in checkpoints:
        (directory / f"checkpoint-{step}").mkdir()
        (directory / f"checkpoint-{step}" / "checksums.json").write_text("{}")
        (directory / f"checkpoint-{step}" / "trainer_state.json").write_text('{"max_steps": 400}')
    return directory


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", lines_of([4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.2]), [50], torn='{"step": 80, "lo')


def warnings_of(log, directory, now=None):
    write_run(directory, log)
    with file_lock(directory / ".lock", "the run"):
        return [line for line in format_status(directory, now).splitlines() if line.startswith("  warning: ")]


def test_run_of_another_process_is_running_until_that_dies(run):
    (run / "checkpoint-60").mkdir()  # incomplete
    os.utime(run / "checkpoint-50" / "checksums.json", (1000, 1000))
    code = (
        "import sys; from pathlib import Path; from llmtuner.locks import file_lock\n"
        f"with file_lock(Path({str(run / '.lock')!r}), 'the run'): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "locked\n"
        command = [sys.executable, "-X", "importtime", "-m", "llmtuner", "status", str(run)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        holder.kill()
    head, loss, checkpoint = result.stdout.splitlines()
    assert f"running (process {holder.pid} on " in head
    assert "step 70 of 400 (18%), about 60 minutes left" in head
    assert loss == "  loss 1.2 at step 70, falling (-52% from the mean since step 10)"
    assert checkpoint.startswith("  last checkpoint: checkpoint-50, ")
    for heavy in ("torch", "transformers", "numpy", "matplotlib"):
        assert f"| {heavy}\n" not in result.stderr
    assert "killed, or ended by an error, at step 70 of 400 or later; the same command resumes" in format_status(run)


def test_states_that_a_run_has_written(run):
    write_run_status(run, "finished", 400, 400)
    assert "finished after step 400 of 400" in format_status(run)
    write_run_status(run, "interrupted", 70, 400)
    assert "stopped as asked at step 70 of 400" in format_status(run)
    write_run_status(run, "diverged", 70, 400, "look at these documents")
    assert "diverged in step 71 of 400\n  look at these documents" in format_status(run)


def test_healthy_run_has_no_warnings(tmp_path):
    bits = [{"step": 0, "eval_bits_per_byte_ja": 3.0}, {"step": 70, "eval_bits_per_byte_ja": 1.0}]
    log = [bits[0], *lines_of([4.0, 3.5, 3.0, 2.5, 2.0, 2.1, 2.2], padding_ratio=0.01, data_wait_ratio=0.01), bits[1]]
    assert warnings_of(log, tmp_path) == []


def test_warnings(tmp_path):
    steady = [2.0] * 10
    worse = [{"step": step, "eval_bits_per_byte_zh": value} for step, value in ((0, 0.6), (50, 0.5), (100, 0.58))]
    cases = {
        "above the mean of those before (2)": lines_of([*steady, 2.4, 2.5, 2.6]),
        "zh got worse: 0.580, at best 0.500, at first 0.600": [*lines_of(steady), *worse],
        "30% of the tokens are padding": lines_of(steady, padding_ratio=0.3),
        "40% of the time the device waits for batches": lines_of(steady, data_wait_ratio=0.4),
    }
    for number, (text, log) in enumerate(cases.items()):
        [warning] = warnings_of(log, tmp_path / str(number))
        assert text in warning
    later = (tmp_path / "0" / "trainer_log.jsonl").stat().st_mtime + 1000
    assert any("no new line for 17 minutes" in line for line in warnings_of(lines_of(steady), tmp_path / "0", later))


def test_work_dir_lists_steps_and_runs(run, tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "step1.json").write_text("{}")
    text = format_status(tmp_path)
    assert text.startswith("finished steps: step1\n")
    assert "run: killed" in text
    with pytest.raises(UserError, match="holds no run yet"):
        format_status(tmp_path / "metrics")
    with pytest.raises(UserError, match="is not a directory"):
        format_status(tmp_path / "missing")
