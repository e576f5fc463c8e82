"""Training in two processes: the same result as one, stopping together, failing together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llmtuner.console import UserError
from llmtuner.data.packing import PackedDataset
from llmtuner.train import checkpointing, resume
from llmtuner.train.tuner import run_exp
from tests.helpers import ROOT
from tests.scripts import START, environment_with, fork_server, free_port
from tests.tiny_models import tiny_model
from tests.training import log_of, losses_of

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
    environment = environment_with(DS_ACCELERATOR="cpu", PYTHONPATH=f"{ROOT}{os.pathsep}{START}")
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


def test_run_is_made_longer_under_zero2(saving_run, tmp_path):
    """DeepSpeed saves the schedule itself: what it loads from a shorter run must not bring back that run's decay."""
    settings = {**saving_run, "per_device_train_batch_size": 2, "plot_loss": False, "eval_on_start": False}
    settings |= {
        "lr_scheduler_type": "warmup_stable_decay",
        "max_steps": 10,
        "save_total_limit": 1,
        "eval_steps": 1_000,
    }
    train(settings, tmp_path / "longer")
    said = train({**settings, "max_steps": 15}, tmp_path / "longer")
    assert f"resuming from {tmp_path}/longer/checkpoint-8, where" in said
    rates = [line["learning_rate"] for line in log_of(tmp_path / "longer") if "learning_rate" in line]
    assert [rate == rates[0] for rate in rates] == [True] * 13 + [False] * 2


def test_checkpoint_of_weights_alone_is_not_resumed_under_deepspeed(saving_run, tmp_path):
    out = tmp_path / "shared"
    settings = {**saving_run, "per_device_train_batch_size": 2, "max_steps": 6, "save_only_model": True}
    train({**settings, "plot_loss": False}, out)
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be resumed: it was saved with save_only_model: true"):
        resume.check_resumable(out / "checkpoint-4")
    (out / "checkpoint-4" / "global_step4").mkdir()  # where DeepSpeed keeps the optimizer's state
    resume.check_resumable(out / "checkpoint-4")


def test_ddp_learns_what_one_process_does_also_from_batches_without_targets(tiny_run, tmp_path, monkeypatch):
    """In a step one rank has a micro-batch without a target: its parameters have gradients of 0, and nobody waits for them."""
    settings = {**tiny_run, "plot_loss": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    settings |= {"train_sampling_strategy": "sequential"}
    patch = """
from llmtuner.data.packing import PackedDataset

def without_targets(self, number):
    sequence = original(self, number)
    if number in (4, 7, 10):
        sequence["labels"][:] = -100
    return sequence

original = PackedDataset.__getitem__
"""
    script = tmp_path / "train.py"
    run = f"""{patch}
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp

def training_step(self, model, *args, **kwargs):
    print(type(model).__name__, model.find_unused_parameters, model.gradient_as_bucket_view)
    return original_step(self, model, *args, **kwargs)

original_step, PackedTrainer.training_step = PackedTrainer.training_step, training_step
PackedDataset.__getitem__ = without_targets
run_exp({settings!r})
"""
    script.write_text(run, encoding="utf-8")
    codes, output, errors = in_two_processes([script], tmp_path)
    assert codes == [0, 0], output[-2000:] + errors[-10000:]
    assert output.count("DistributedDataParallel False True\n") == 2 * 2 * 6
    names = {}
    exec(patch, names)
    monkeypatch.setattr(PackedDataset, "__getitem__", names["without_targets"])
    run_exp({**settings, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "one")})
    wanted = log_of(tmp_path / "one")
    assert len([line for line in wanted if "loss" in line]) == 6
    for own, line in zip(log_of(tmp_path / "adapter"), wanted, strict=True):
        assert own == pytest.approx(line, abs=1e-5)


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_machines_without_a_common_directory_save_no_checkpoints(saving_run, tmp_path, save_strategy):
    """Two processes with directories of their own: the part of the second would never come into the checkpoint."""
    settings = {**saving_run, "plot_loss": False, "per_device_train_batch_size": 2, "save_strategy": save_strategy}
    settings |= {"max_steps": 6, "deepspeed": str(ROOT / "ds_config_zero2.json")}
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import os
from llmtuner.console import run_cli
from llmtuner.train.tuner import run_exp

settings = {settings!r}
settings["output_dir"] += os.environ["RANK"]
run_cli(lambda: run_exp(settings))
""",
        encoding="utf-8",
    )
    codes, _, errors = in_two_processes([script], tmp_path)
    written = {path.name for path in tmp_path.glob("adapter*/*")}
    if save_strategy == "no":
        assert codes == [0, 0], errors[-10000:]
        assert "adapter_model.safetensors" in written
    else:
        assert codes == [2, 2]
        assert f"cannot see {tmp_path}/adapter" in errors
        assert "Set output_dir (steps: WORK_DIR) to a directory that all machines share" in errors
        assert not written - {".lock", ".llmtuner.json"}
    assert not any(name.startswith(".probe") for name in written)


RUN_IN_BF16 = """
import accelerate, torch
from deepspeed.checkpoint import utils
from llmtuner.hparams import transformers_args
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp

def record(self, *args, **kwargs):
    loss = training_step(self, *args, **kwargs)
    if not self.accelerator.sync_gradients and self.is_deepspeed_enabled:
        sums = [tensor for group in self.optimizer.optimizer.averaged_gradients.values() for tensor in group or []]
        dtypes.update(tensor.dtype for tensor in sums)
    return loss

def forbid(*args, **kwargs):
    raise AssertionError("the complete model is copied")

utils.clone_tensors_for_torch_save = forbid
transformers_args.cpu_supports_bf16 = lambda: True
training_step, dtypes = PackedTrainer.training_step, set()
PackedTrainer.training_step = record
print(run_exp(SETTINGS))
print("gradients are summed in", dtypes)
"""


@pytest.fixture
def bf16_run(saving_run):
    """Settings of a run in bf16 whose step is two micro-batches of one sequence in each of two processes."""
    settings = {**saving_run, "bf16": True, "plot_loss": False, "eval_steps": 4, "lora_dropout": 0.0}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 8}
    return {**settings, "deepspeed": str(ROOT / "ds_config_zero2.json")}


def run_in_bf16(settings, directory):
    script = directory / "train.py"
    script.write_text(RUN_IN_BF16.replace("SETTINGS", repr(settings)), encoding="utf-8")
    codes, output, errors = in_two_processes([script], directory)
    assert codes == [0, 0], output[-2000:] + errors[-10000:]
    return output


def test_zero2_in_bf16_trains_and_saves_fp32_weights(bf16_run, tmp_path):
    """The model has bf16 copies of them. Gradients are summed in fp32, and nothing that is frozen is saved or copied."""
    out = tmp_path / "adapter"
    output = run_in_bf16(bf16_run, tmp_path)
    assert output.count("gradients are summed in {torch.float32}") == 2
    adapter, last = (load_file(folder / "adapter_model.safetensors") for folder in (out, out / "checkpoint-8"))
    assert len(adapter) > 10
    for name, weight in adapter.items():
        assert torch.equal(weight, last[name])
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, weight.bfloat16().float()), f"{name} is rounded to bf16"
    state = torch.load(out / "checkpoint-8" / "global_step8" / "mp_rank_00_model_states.pt", weights_only=False)
    assert len(state["module"]) == len(adapter)
    size = sum(file.stat().st_size for file in (out / "checkpoint-8").glob("global_step8/*"))
    trained = sum(weight.numel() for weight in adapter.values())
    assert size < 14 * trained + 200_000  # bf16 weights; fp32 weights and two moments of Adam; DeepSpeed's own records


def test_zero2_in_bf16_saves_a_complete_model_where_no_adapter_is_trained(bf16_run, tiny_model_dir, tmp_path):
    run_in_bf16({**bf16_run, "finetuning_type": "freeze", "max_steps": 4}, tmp_path)
    base = load_file(tiny_model_dir / "model.safetensors")
    saved = load_file(tmp_path / "adapter" / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == base.keys()
    trained = load_file(tmp_path / "adapter" / "model.safetensors")
    assert trained.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    for name, weight in saved.items():
        assert (weight.dtype == torch.float32) == (name in trained)
        assert torch.equal(weight, trained[name] if name in trained else base[name].bfloat16()), name


def test_zero2_in_bf16_is_resumed_exactly(bf16_run, tmp_path):
    bf16_run |= {"sample_steps": 4, "sample_prompts": ["小镇"]}  # answered by rank 0 alone, and by no other
    run_in_bf16(bf16_run, tmp_path)
    out, log = tmp_path / "adapter", log_of(tmp_path / "adapter")
    samples = (out / "samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in samples.splitlines()] == [0, 4, 8]
    adapter = load_file(out / "adapter_model.safetensors")
    shutil.rmtree(out / "checkpoint-8")
    output = run_in_bf16(bf16_run, tmp_path)
    assert f"resuming from {out}/checkpoint-4" in output
    assert log_of(out) == log
    assert (out / "samples.jsonl").read_text(encoding="utf-8") == samples
    assert all(
        torch.equal(tensor, adapter[name]) for name, tensor in load_file(out / "adapter_model.safetensors").items()
    )


def test_zero2_in_bf16_learns_what_one_process_does(bf16_run, tmp_path, monkeypatch):
    monkeypatch.setattr("llmtuner.hparams.transformers_args.cpu_supports_bf16", lambda: True)
    settings = {**bf16_run, "max_steps": 20, "save_strategy": "no"}
    run_in_bf16({**settings, "output_dir": str(tmp_path / "two")}, tmp_path)
    one = {**settings, "deepspeed": None, "per_device_train_batch_size": 2}
    run_exp({**one, "output_dir": str(tmp_path / "one")})
    run_exp({**one, "output_dir": str(tmp_path / "exact"), "bf16": False})
    two, one, exact = (torch.tensor(losses_of(tmp_path / name)) for name in ("two", "one", "exact"))
    assert len(exact) == 20
    assert exact[-1] < exact[0] - 0.3
    assert float((two - one).abs().max()) < 2e-3
    assert float((two - exact).abs().max()) < float((one - exact).abs().max()) + 1e-3


def test_tied_embeddings_learn_under_zero2_what_they_do_in_one_process(tiny_run, tmp_path):
    model = tiny_model(tmp_path / "tied", "qwen3")
    settings = {**tiny_run, "model_name_or_path": str(model), "embedding_learning_rate": 2e-3}
    run_exp({**settings, "output_dir": str(tmp_path / "once")})
    train({**settings, "per_device_train_batch_size": 2}, tmp_path / "shared")
    for own, line in zip(log_of(tmp_path / "shared"), log_of(tmp_path / "once"), strict=True):
        assert own == pytest.approx(line, abs=1e-5)


def test_tied_embeddings_stay_one_matrix_under_zero2_in_bf16(bf16_run, tmp_path):
    """Which is saved once, in fp32, and resumed exactly."""
    model = tiny_model(tmp_path / "tied", "qwen3")
    settings = {**bf16_run, "model_name_or_path": str(model), "finetuning_type": "full", "additional_target": []}
    run_in_bf16(settings, tmp_path)
    out = tmp_path / "adapter"
    trained, last = (load_file(folder / "model.safetensors") for folder in (out, out / "checkpoint-8"))
    assert trained.keys() == last.keys() == load_file(model / "model.safetensors").keys()
    assert {weight.dtype for weight in last.values()} == {torch.float32}
    log = log_of(out)
    shutil.rmtree(out / "checkpoint-8")
    run_in_bf16(settings, tmp_path)
    assert log_of(out) == log
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)


def test_a_dry_run_and_the_best_checkpoint_under_zero(bf16_run, tmp_path):
    """The dry run leaves nothing; the run loads the best checkpoint, whose weights are saved in fp32, on both ranks."""
    settings = {
        **bf16_run,
        "max_steps": 6,
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 6,
        "save_total_limit": 1,
    }
    # The learning rate rises until the loss does: the second evaluation after a step is the best.
    settings |= {"eval_strategy": "steps", "load_best_model_at_end": True, "save_minutes": 60}
    settings |= {"learning_rate": 1.0, "warmup_steps": 6, "lr_scheduler_type": "constant_with_warmup"}
    out = tmp_path / "run"
    output = train({**settings, "dry_run": True}, out)
    assert "ready; the dry run took" in output
    assert "resumed from one, the loss differs by 0e+00" in output
    assert [path.name for path in out.iterdir()] == ["settings.yaml"]
    output = train(settings, out)
    assert "best checkpoint: step 4 of 6, eval_loss" in output
    assert [path.name for path in checkpointing.list_checkpoints(out)] == ["checkpoint-6", "checkpoint-4"]
    saved, best, last = (
        load_file(directory / "adapter_model.safetensors")
        for directory in (out, out / "checkpoint-4", out / "checkpoint-6")
    )
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


def test_evaluation_alone_needs_no_deepspeed(bf16_run, tmp_path):
    """Its engine casts the weights when it makes the optimizer, so nothing would be in one precision."""
    settings = {**bf16_run, "do_train": False, "do_eval": True, "eval_on_start": False}
    output = run_in_bf16(settings, tmp_path)
    assert output.count("'eval_loss': 6.") == 2


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


MEMORY_OF_ZERO = """
import contextlib
from types import SimpleNamespace

import deepspeed
import numpy
import torch

from llmtuner.data.packing import PackedDataCollator
from llmtuner.train import memory
from llmtuner.train.trainer import PackedTrainer
from tests.unit.train.test_memory import make_args, make_model

deepspeed.init_distributed("gloo")
config = CONFIG
settings = dict(additional_target=["embed_tokens", "lm_head"], gradient_accumulation_steps=3, deepspeed=config)
args = make_args(per_device_train_batch_size=8, cutoff_len=64, **settings)
model = make_model(args.finetuning, attention="eager")
memory.as_on_a_gpu = lambda _: contextlib.nullcontext()  # what follows runs on a CPU
estimate = memory.StepEstimator(model, args, processes=2).estimate(8, checkpointing=False)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained), config=config)
trainer = SimpleNamespace(model=model, finetuning_args=args.finetuning, attention="eager")
sequence = dict.fromkeys(("input_ids", "labels", "position_ids"), numpy.arange(64)) | {"doc_ids": [0]}
batch = PackedDataCollator(0)([sequence] * 8)

def step():
    for micro_batch in range(3):
        engine.set_gradient_accumulation_boundary(micro_batch == 2)
        loss_sum, _ = PackedTrainer._compute_loss_sum(trainer, engine, batch)
        engine.backward(loss_sum)
        del loss_sum
    engine.step()

step()
zero = engine.optimizer
tensors = [*model.parameters(), *model.buffers(), *zero.single_partition_of_fp32_groups, *zero.bit16_groups_flat]
tensors += [tensor for state in zero.optimizer.state.values() for tensor in state.values()]
with memory.LiveTensors(tensors) as live:
    step()
print("estimate / peak:", estimate.total / max(live.peak.values()), "buckets", estimate.buckets)
"""


@pytest.mark.parametrize(("accumulated", "bucket", "to_all"), [(None, 10_000, True), ("fp32", 1_000_000, False)])
def test_the_estimate_of_a_step_under_zero_is_what_deepspeed_holds(tmp_path, accumulated, bucket, to_all):
    """Gradients smaller and larger than a bucket, two buckets in turn, in bf16."""
    zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": bucket}
    zero["use_multi_rank_bucket_allreduce"] = to_all
    config = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3, "bf16": {"enabled": True}}
    config |= {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    config |= {"data_types": {"grad_accum_dtype": accumulated}} if accumulated else {}
    script = tmp_path / "train.py"
    script.write_text(MEMORY_OF_ZERO.replace("CONFIG", repr(config)), encoding="utf-8")
    codes, output, errors = in_two_processes([script], tmp_path)
    assert codes == [0, 0], errors[-10000:]
    found = re.findall(r"estimate / peak: (\S+) buckets (\d+)", output)
    assert [int(buckets) for _, buckets in found] == [4_000_000 if bucket == 1_000_000 else 0] * 2
    assert [float(ratio) for ratio, _ in found] == pytest.approx([1, 1], abs=0.03)


def test_smaller_micro_batches_that_were_chosen_learn_the_same_under_zero(tiny_run, tmp_path):
    settings = {**tiny_run, "plot_loss": False, "deepspeed": str(ROOT / "ds_config_zero2.json")}
    train(settings, tmp_path / "large")
    script = tmp_path / "train.py"
    script.write_text(
        f"""
from llmtuner.train import workflow
from llmtuner.train.tuner import run_exp

workflow.free_memory = lambda: 10**10
workflow.choose_step_settings = lambda estimator, _: (workflow.StepSettings(2, 2, False), estimator.estimate(2, False))
run_exp({ {**settings, "output_dir": str(tmp_path / "small")}!r})
""",
        encoding="utf-8",
    )
    codes, output, errors = in_two_processes([script], tmp_path)
    assert codes == [0, 0], errors[-10000:]
    assert "buckets 0.8" in output  # two of 1e8 fp32 gradients
    assert "of 10.0 GB: micro-batch 2 x 2, gradient checkpointing off" in output
    for line, wanted in zip(log_of(tmp_path / "small"), log_of(tmp_path / "large"), strict=True):
        assert line == pytest.approx(wanted, abs=1e-5)
