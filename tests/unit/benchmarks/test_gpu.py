"""The GPU benchmark in miniature on a CPU: every part runs, fails alone, and fills its tables."""

import json
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch

from benchmarks import common, scaling
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import measuring, paths, tables
from benchmarks.gpu.measuring import ALL_ON, STACK, Part, Trainee, packed_batch
from benchmarks.training import ALL_OFF
from llmtuner.train.tuner import run_exp

SKIPPED = {
    *(f"flex, {lora}, {size}" for lora in ("peft", "fused") for size in ("4 x 32", "1 x 128")),
    "one card of 24 GB",
    "fp8",
}


def run(output, *arguments):
    command.main(["--device", "cpu", "--tiny", "--output", str(output), *arguments])
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_fills_its_tables(tmp_path, monkeypatch):
    launched = []

    def in_this_process(settings, processes, **variables):
        launched.append((processes, bool(settings.pop("deepspeed", None)), variables))
        run_exp(settings)
        return common.FinishedProcess("", 1.0, 1.0, 1.0)

    monkeypatch.setattr(scaling, "launch", in_this_process)
    results = run(tmp_path / "gpu.json")
    assert launched == [(1, deepspeed, {"DS_ACCELERATOR": "cpu"}) for deepspeed in (False, True)]
    assert list(results) == list(command.PARTS)
    assert not [name for name, section in results.items() if "error" in section]
    cases = {
        f"{part}: {case}": values for part, section in results.items() for case, values in section["results"].items()
    }
    assert not {case: values["error"] for case, values in cases.items() if "error" in values}
    assert {case.partition(": ")[2] for case, values in cases.items() if "skipped" in values} == SKIPPED

    steps = {case: values for case, values in results["steps"]["results"].items() if case != "kernels"}
    assert len(steps) == len(STACK) * 4
    assert all(values["tokens_per_second"] > 0 < values["utilization"] for values in steps.values())
    kernels = results["baseline"]["results"]["kernels"]["kernels"]
    assert kernels[0]["milliseconds"] >= kernels[-1]["milliseconds"] > 0
    assert len(kernels) == 40
    assert "estimated_gb" in results["baseline"]["results"]["all off, 4 x 32, kept"]
    losses = results["numerics"]["results"]
    assert losses["fp32"]["losses"][-1] < losses["fp32"]["losses"][0] - 0.05
    assert 0 < losses["plain autocast"]["largest_difference"] < 0.01
    assert results["paths"]["results"]["checkpoint and resume"]["largest_difference"] < 1e-4

    full_size = json.loads(json.dumps(results).replace("4 x 32,", "4 x 1,024,").replace("1 x 128,", "1 x 4,096,"))
    full_size["layer"]["results"] = {
        case.replace("4 x 32", "4 x 1,024").replace("1 x 128", "1 x 4,096"): values
        for case, values in full_size["layer"]["results"].items()
    }
    full_size["machine"]["results"]["environment"]["gpu"] = "a GPU"
    full_size["paths"]["results"]["training, then evaluation"]["left_gb"] = 0.0
    for name in tables.TABLES:
        table = tables.tables(full_size, name)
        assert tables.NOT_MEASURED not in table
        assert "failed" not in table


def test_failing_parts_and_cases_are_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail():
        raise ValueError("first line\nsecond line")

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def cases(part):
        part.measure("fails", fail)
        part.measure("does not fit", no_memory)
        part.measure("works", lambda: {"value": 1})
        part.seconds = 0
        part.measure("too late", lambda: {"value": 2})

    monkeypatch.setattr(command, "PARTS", {"broken": (1, lambda part: fail()), "cases": (1, cases)})
    results = run(tmp_path / "gpu.json")
    assert results["broken"]["error"] == "ValueError: first line"
    assert results["cases"]["results"] == {
        "fails": {"error": "ValueError: first line"},
        "does not fit": {"skipped": "out of memory"},
        "works": {"value": 1},
        "too late": {"skipped": "out of time"},
    }
    assert "error" not in results["cases"]


def test_processes_of_parts_that_crash_or_hang_do_not_end_the_run(tmp_path, monkeypatch):
    output = tmp_path / "gpu.json"
    works = "from pathlib import Path; Path('{}').write_text('{{\"works\": {{\"results\": {{\"seconds\": ' + input() + '}}}}}}')"
    scripts = {
        "works": works.format(output),
        "crashes": "import os; input(); os.abort()",
        "hangs": "import time; time.sleep(60)",
    }

    def start(name, options):
        return subprocess.Popen([sys.executable, "-c", scripts[name]], stdin=subprocess.PIPE, text=True)

    monkeypatch.setattr(command, "start_process", start)
    monkeypatch.setattr(command, "GRACE", 1)
    monkeypatch.setattr(command, "PARTS", {name: (share, None) for name, share in zip(scripts, (8, 1, 1), strict=True)})
    command.run_parts(list(scripts), Namespace(device="cuda", minutes=0.05, output=output, tiny=True))
    results = json.loads(output.read_text())
    assert results["works"]["results"]["seconds"] == pytest.approx(3 * 0.8, abs=0.1)
    assert results["crashes"]["error"] == "its process exited with code -6"
    assert results["hangs"]["error"].startswith("stopped 1 seconds after its")


def test_twin_shares_weights_and_computes_the_same_loss(tmp_path):
    part = Part("steps", tmp_path / "gpu.json", "cpu", True, 60)
    first = Trainee(part, ALL_OFF)
    twin = first.twin(ALL_ON)
    batch, lengths = packed_batch(part, *part.windows[1])
    assert lengths.sum() == batch["input_ids"].numel() == 128
    assert [id(parameter) for parameter in twin.model.parameters()] == [
        id(parameter) for parameter in first.model.parameters()
    ]
    assert twin.model.config._attn_implementation == "varlen"
    assert first.model.config._attn_implementation == "sdpa"
    assert twin.micro_batch(batch).item() == pytest.approx(first.micro_batch(batch).item(), abs=1e-3)


def test_kernels_are_those_of_the_gpu_without_operators_and_annotations(tmp_path, monkeypatch):
    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    rows = [("aten::mm", on_cpu, False, 9.0), ("Optimizer.step", on_gpu, True, 9.0)]
    rows += [("gemm", on_gpu, False, 2.0), ("softmax", on_gpu, False, 3.0), ("copy", on_gpu, False, 1.0)]
    names = ("key", "device_type", "is_user_annotation", "self_device_time_total")
    events = [Namespace(**dict(zip(names, row, strict=True)), count=1) for row in rows]
    profile = Namespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profile))
    part = Part("steps", tmp_path / "gpu.json", "cuda", True, 60)
    values = measuring.kernels(part, lambda: None, count=2)
    assert [kernel["kernel"] for kernel in values["kernels"]] == ["softmax", "gemm"]
    assert values["busy_milliseconds"] == pytest.approx(0.006)


def test_full_size_and_missing_gpu_are_refused(tmp_path):
    with pytest.raises(common.UserError, match="add --tiny"):
        command.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    if not torch.cuda.is_available():
        with pytest.raises(common.UserError, match="--device cpu --tiny"):
            command.main(["--output", str(tmp_path / "gpu.json")])


@pytest.mark.slow
@pytest.mark.distributed
def test_one_process_trains_under_torchrun(tmp_path):
    settings = {
        **scaling.small_run(tmp_path, paths.BASE),
        "max_steps": paths.STEPS,
        "logging_steps": 1,
        "use_cpu": True,
    }
    values = paths.train_in_one_process({**settings, "output_dir": str(tmp_path / "run")}, tmp_path / "run")
    assert 5 < values["loss"] < 9


def test_tables_without_results_say_so():
    for name in tables.TABLES:
        assert tables.NOT_MEASURED in tables.tables({}, name)


def test_computed_speed_is_that_of_products_and_elementwise_passes_in_turn(monkeypatch):
    monkeypatch.setattr(tables, "ADAM_BYTES", 0)
    monkeypatch.setattr(tables, "elementwise_bytes", lambda *_: 0.0)
    alone = tables.computed_speed("H100", "+ fused ops", 4_096, False)
    assert alone["utilization"] == pytest.approx(1)
    # Behind a mask attention computes the whole square, which is no useful work.
    assert 0.7 < tables.computed_speed("H100", "all off", 4_096, False)["utilization"] < 0.9
    seconds = 1 / alone["tokens_per_second"]
    monkeypatch.setattr(tables, "elementwise_bytes", lambda *_: seconds * 3.0e12)
    assert tables.computed_speed("H100", "+ fused ops", 4_096, False)["utilization"] == pytest.approx(0.5)


def test_recomputed_layers_move_the_bytes_of_their_forward_pass_again(tmp_path, monkeypatch):
    moved = {"elementwise_gb": 3.0, "elementwise_forward_gb": 1.0, "elementwise_outside_gb": 16.0}
    (tmp_path / "traffic.json").write_text(json.dumps({"batch_size": 2, "seq_len": 500, "results": {"all off": moved}}))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert tables.elementwise_bytes("all off", False) == (28 * 3 + 16) * 1e6
    assert tables.elementwise_bytes("all off", True) == (28 * 4 + 16) * 1e6
