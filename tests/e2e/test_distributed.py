"""Training in two processes: the same result as one, stopping together, failing together."""

import signal
import subprocess
import sys
import time

import pytest
import yaml

from llmtuner.console import UserError
from llmtuner.train import checkpointing
from llmtuner.train.tuner import run_exp
from tests.helpers import ROOT
from tests.scripts import environment_with, fork_server, free_port
from tests.training import log_of

pytestmark = pytest.mark.distributed


def write_settings(settings, directory):
    """A settings file of a run under ZeRO-2; returns the words of its command."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {**settings, "deepspeed": str(ROOT / "ds_config_zero2.json"), "output_dir": str(directory)}
    (directory / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["-m", "llmtuner", "train", str(directory / "settings.yaml")]


def in_two_processes(words, directory):
    """Runs a script in two processes on the CPU, with the variables that torchrun sets; returns codes, outputs and errors."""
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    group |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ROOT}
    server = fork_server("deepspeed")
    ranks = [server.start(words, directory, environment_with(RANK=rank, LOCAL_RANK=rank, **group)) for rank in (0, 1)]
    outputs = [rank.communicate() for rank in ranks]
    codes, errors = [rank.returncode for rank in ranks], "".join(error for _, error in outputs)
    return codes, "".join(output for output, _ in outputs), errors


def train(settings, directory):
    codes, output, errors = in_two_processes(write_settings(settings, directory), directory)
    assert codes == [0, 0], output[-2000:] + errors[-10000:]
    return output


def test_batch_accumulated_or_shared_by_processes_learns_the_same(tiny_run, tmp_path):
    """Four sequences at once, one by one, and under ZeRO-2 in two processes: the same losses over 24 steps in fp32."""
    settings = {**tiny_run, "stage": "sft", "dataset": "dialogues", "max_steps": 24, "embedding_learning_rate": 2e-3}
    settings |= {"eval_steps": 12, "plot_loss": False}

    def cut(size, accumulation):
        return {**settings, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}

    run_exp({**cut(4, 1), "output_dir": str(tmp_path / "once")})
    run_exp({**cut(1, 4), "output_dir": str(tmp_path / "accumulated")})
    train(cut(1, 2), tmp_path / "shared")
    wanted = log_of(tmp_path / "once")
    assert len([line for line in wanted if "loss" in line]) == 24
    for other in ("accumulated", "shared"):
        for own, line in zip(log_of(tmp_path / other), wanted, strict=True):
            assert own == pytest.approx(line, abs=1e-5), other


def test_two_processes_stop_together_and_go_on(saving_run, tmp_path):
    """SIGTERM to torchrun under ZeRO-2: both processes save at the same step, and the next start resumes from there."""
    settings = {
        **saving_run,
        "max_steps": 120,
        "per_device_train_batch_size": 2,
        "save_steps": 1_000,
        "plot_loss": False,
    }
    settings |= {"eval_steps": 1_000, "eval_on_start": False}
    train(settings, tmp_path / "whole")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command = [*torchrun, *write_settings(settings, tmp_path / "stopped")]
    environment = environment_with(DS_ACCELERATOR="cpu", PYTHONPATH=ROOT)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(command, env=environment, cwd=tmp_path, **streams)
    log = tmp_path / "stopped" / "trainer_log.jsonl"
    while started.poll() is None and not (log.exists() and log.read_text().count("loss") > 5):
        time.sleep(0.02)
    started.send_signal(signal.SIGTERM)
    output, _ = started.communicate(timeout=300)
    [saved] = checkpointing.list_checkpoints(tmp_path / "stopped")
    assert started.returncode != 0
    assert 5 < checkpointing.checkpoint_step(saved) < 120
    assert f"{saved}. The same command resumes" in output
    assert f"resuming from {saved}" in train(settings, tmp_path / "stopped")
    one, other = (log_of(tmp_path / name) for name in ("whole", "stopped"))
    assert len([line for line in one if "loss" in line]) == 120
    for own, line in zip(other, one, strict=True):
        assert own == pytest.approx(line, abs=1e-6)


def test_checkpoint_of_weights_alone_is_not_resumed_under_deepspeed(saving_run, tmp_path):
    out = tmp_path / "shared"
    settings = {**saving_run, "per_device_train_batch_size": 2, "max_steps": 6, "save_only_model": True}
    train({**settings, "plot_loss": False}, out)
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be resumed: it was saved with save_only_model: true"):
        checkpointing.check_resumable(out / "checkpoint-4")
    (out / "checkpoint-4" / "global_step4").mkdir()  # where DeepSpeed keeps the optimizer's state
    checkpointing.check_resumable(out / "checkpoint-4")


def test_nothing_of_a_run_is_left_in_memory_under_deepspeed(tiny_run, tmp_path):
    """The hooks of its engine would keep the model alive in each process."""
    settings = {**tiny_run, "deepspeed": str(ROOT / "ds_config_zero2.json"), "per_device_train_batch_size": 1}
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import weakref
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp

def watched(self, dataset):
    references.extend(map(weakref.ref, (self.model_wrapped, self.optimizer, *self.model.parameters())))
    return evaluate_loss(self, dataset)

references, evaluate_loss = [], PackedTrainer.evaluate_loss
PackedTrainer.evaluate_loss = watched
run_exp({settings!r})
print("left of", len(references) > 20, sum(reference() is not None for reference in references))
""",
        encoding="utf-8",
    )
    codes, output, errors = in_two_processes([script], tmp_path)
    assert codes == [0, 0], errors[-10000:]
    assert output.count("left of True 0") == 2


def test_all_processes_end_if_one_refuses(tiny_run, tmp_path):
    """Under ZeRO-2 in two processes; a rank that waited for the other would run into the time limit."""
    settings = {**tiny_run, "deepspeed": str(ROOT / "ds_config_zero2.json"), "per_device_train_batch_size": 1}
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os
from llmtuner.console import run_cli
from llmtuner.train import self_check
from llmtuner.train.tuner import run_exp

if os.environ["RANK"] == "1":
    logits = self_check._logits
    self_check._logits = lambda *args, **options: logits(*args, **options) * 1.5
run_cli(lambda: run_exp({settings!r}))
""",
        encoding="utf-8",
    )
    codes, _, errors = in_two_processes([script], tmp_path)
    assert 0 not in codes
    assert "error: self-check" in errors
    assert "from the model's own logits" in errors
    assert (
        not (tmp_path / "adapter" / "trainer_log.jsonl").exists()
        or "loss" not in (tmp_path / "adapter" / "trainer_log.jsonl").read_text()
    )
