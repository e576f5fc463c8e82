"""A run that is killed with SIGKILL and restarted again and again, against the same run left alone: same curve, same weights?

    python -m benchmarks.crash_resume
    python -m benchmarks.crash_resume --processes 2

The run is step 5 in small: the miniature, its texts in three languages, LoRA with dropout and both embedding matrices, fp32,
on the CPU. With one process nothing may differ; with two, under torchrun with ZeRO-2, at most 1e-6.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from safetensors.torch import load_file

from benchmarks.common import ROOT, Values, free_port, make_parser, print_results, save_results
from llmtuner.console import Timer, UserError, print0, run_cli
from llmtuner.train.checkpointing import TMP_DIR, checkpoint_step, valid_checkpoints
from mini.world import write_world

SETTINGS: Values = dict(
    max_samples=200,  # so that an epoch ends within the run
    lora_dropout=0.1,  # draws random numbers in every step
)
SETTINGS |= dict(stage="pt", dataset=["wikipedia_zh", "wikitext_en", "wikipedia_ja"], dataset_dir=str(ROOT / "data"))
SETTINGS |= dict(val_size=0.1, cutoff_len=128, additional_target=["embed_tokens", "lm_head"])
SETTINGS |= dict(learning_rate=2e-3, embedding_learning_rate=1e-3, lr_scheduler_type="cosine", warmup_ratio=0.05)
SETTINGS |= dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1, use_cpu=True)
SETTINGS |= dict(eval_strategy="steps", eval_on_start=True, eval_steps=10, max_eval_samples=16)
SETTINGS |= dict(save_strategy="steps", save_steps=5, save_total_limit=2, report_to="none")
# Keys of a log line that do not depend on the clock.
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "embedding_learning_rate", "eval_loss")
TOLERANCE = {1: 0.0, 2: 1e-6}  # by number of processes
KILLED_AT_STARTUP = 0.3  # of the kills
PROBLEMS_SHOWN = 10
MAX_ATTEMPTS = 4
POLL = 0.002  # seconds
OUTPUT_TAIL = 3_000  # characters of a failed run's output


@dataclass
class Run:
    """One output directory and the command that trains into it, however often."""

    directory: Path
    processes: int
    settings: Values

    def __post_init__(self) -> None:
        self.directory.mkdir()
        self.output, self.log = self.directory / "adapter", self.directory / "adapter" / "trainer_log.jsonl"
        settings = {**self.settings, "output_dir": str(self.output), "cache_dir": str(self.directory / "cache")}
        if self.processes > 1:
            settings["deepspeed"] = str(ROOT / "ds_config_zero2.json")
        (self.directory / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    def start(self) -> "psutil.Popen":
        """Starts the training in processes of its own."""
        command = [sys.executable, "-m"]
        if self.processes > 1:
            launcher = ["--nproc_per_node", str(self.processes), "--master_port", str(free_port())]
            command += ["torch.distributed.run", *launcher, "-m"]
        command += ["llmtuner", "train", str(self.directory / "settings.yaml")]
        variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        # What a killed process leaves in TMPDIR is deleted with the rest.
        variables |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.directory)}
        with (self.directory / "output.txt").open("w") as output:
            streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            environ = {**os.environ, **variables}
            return psutil.Popen(command, env=environ, cwd=self.directory, start_new_session=True, **streams)

    def check(self, process: "psutil.Popen") -> None:
        """Makes sure that a process that ended by itself had finished.

        Raises:
            UserError: with the end of what it printed.
        """
        if process.wait():
            printed = (self.directory / "output.txt").read_text(encoding="utf-8", errors="replace")
            raise UserError(f"the training failed by itself. It ended with:\n{printed[-OUTPUT_TAIL:]}")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__, "crash_resume.json")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, choices=list(TOLERANCE), default=1)
    parser.add_argument("--steps", type=int, default=100, help="doubled until all kills come before the end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--model", type=Path, default=ROOT / "mini" / "base")
    options = parser.parse_args(arguments)
    timer, moments = Timer(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="crash-resume-") as scratch:
        directory = Path(scratch)
        write_world(directory / "corpus")
        settings = {**SETTINGS, "corpus_dir": str(directory / "corpus"), "max_steps": options.steps}
        settings["model_name_or_path"] = str(options.model.resolve())
        for _ in range(MAX_ATTEMPTS):
            whole, killed = (Run(directory / name, options.processes, settings) for name in ("whole", "killed"))
            startup, training = time_uninterrupted(whole)
            print0(f"{settings['max_steps']} steps, left alone: {startup:.1f} s to start, {training:.1f} s of training")
            kills = kill_repeatedly(killed, options.kills, startup, training, moments)
            if len(kills) == options.kills:
                break
            print0(f"it ended after {len(kills)} of {options.kills} kills: again with twice the steps")
            settings["max_steps"] *= 2
            shutil.rmtree(whole.directory)
            shutil.rmtree(killed.directory)
        else:
            raise UserError(f"none of {MAX_ATTEMPTS} runs was killed {options.kills} times. Give more --steps.")
        tolerance = TOLERANCE[options.processes]
        in_log, problems = compare_logs(read_log(whole.log), read_log(killed.log), settings["max_steps"], tolerance)
        in_weights, moved = compare_weights(whole.output, killed.output, tolerance)
    problems += moved
    shown = [{**kill, "resumed_from": kill["resumed_from"] or "the beginning"} for kill in kills]
    print_results("kills", {str(number): kill for number, kill in enumerate(shown, start=1)})
    result = {
        "arguments": {"kills": options.kills, "steps": settings["max_steps"], "seed": options.seed},
        "startup_seconds": round(startup, 2),
        "training_seconds": round(training, 2),
        "kills": kills,
        "largest_difference": {"log": in_log, "weights": in_weights},
        "problems": problems,
        "seconds": timer.seconds(),
    }
    save_results(options.output, result, f"{options.processes} processes")
    for problem in problems[:PROBLEMS_SHOWN]:
        print0(f"- {problem}")
    print0(
        f"\n{'FAILED' if problems else 'passed'}: {len(kills)} kills, {sum(not kill['training'] for kill in kills)} of them "
        f"at startup, {sum(kill['saving'] for kill in kills)} while saving; largest difference {in_log:.1e} in the log of "
        f"{settings['max_steps']} steps, {in_weights:.1e} in the weights (allowed: {tolerance:g}); {len(problems)} problems"
    )
    if problems:
        raise SystemExit(1)


def time_uninterrupted(run: Run) -> tuple[float, float]:
    """Trains without a kill; returns seconds until the training began, and from then to the last line of its log."""
    start = time.perf_counter()
    process = run.start()
    try:
        began = wait_for_change(process, run.log, None)
        startup = time.perf_counter() - start
        run.check(process)
    finally:
        kill(process)
    ended = mtime(run.log)
    if began is None or ended is None:
        raise UserError("the training ended without a log.")
    return startup, (ended - began) / 1e9


def kill_repeatedly(run: Run, count: int, startup: float, training: float, moments: random.Random) -> list[Values]:
    """Kills `count` starts of a run at random moments, and lets the next one finish; fewer if one finished before.

    Args:
        startup: seconds that the run takes to start.
        training: seconds that its training takes; a start trains for 2 / (count + 2) of it at most.

    Returns:
        of each kill the step of the checkpoint that was found, seconds since the start, whether training had begun,
        the last step in the log, and whether a checkpoint was being saved.
    """
    kills: list[Values] = []
    for _ in range(count):
        checkpoint = next(valid_checkpoints(run.output), None)
        log, staging = mtime(run.log), mtime(run.output / TMP_DIR)
        start = time.perf_counter()
        process = run.start()
        try:
            if moments.random() < KILLED_AT_STARTUP:
                wait(process, moments.uniform(0, startup))
            elif wait_for_change(process, run.log, log):
                wait(process, moments.uniform(0, 2 * training / (count + 2)))
        finally:
            kill(process)
        if process.returncode != -signal.SIGKILL:
            run.check(process)
            return kills
        kill_values: Values = {"resumed_from": checkpoint_step(checkpoint) if checkpoint else None}
        kill_values |= {"seconds": round(time.perf_counter() - start, 2), "training": mtime(run.log) != log}
        kill_values |= {"step": max((int(line["step"]) for line in read_log(run.log)), default=0)}
        kills.append(kill_values | {"saving": mtime(run.output / TMP_DIR) not in (None, staging)})
    process = run.start()
    try:
        run.check(process)
    finally:
        kill(process)
    return kills


def mtime(path: Path) -> int | None:
    """When a file or directory was last changed, in ns; None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def wait_for_change(process: "psutil.Popen", path: Path, before: int | None) -> int | None:
    """Waits until a file is written, and returns its new mtime; None if the process ends without that."""
    while (now := mtime(path)) == before:
        if process.poll() is not None:
            return None
        time.sleep(POLL)
    return now


def wait(process: "psutil.Popen", seconds: float) -> None:
    """Waits for some time, or for the end of the process."""
    end = time.perf_counter() + seconds
    while process.poll() is None and (left := end - time.perf_counter()) > 0:
        time.sleep(min(left, POLL))


def kill(process: "psutil.Popen") -> None:
    """SIGKILL to a process and all its descendants; torchrun puts each of its workers into a session of its own."""
    if process.poll() is not None:
        return
    process.suspend()  # starts no more of them
    everything = [*process.children(recursive=True), process]
    for running in everything:
        try:
            running.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(everything)  # none may still write when the next start reads


def read_log(file: Path) -> list[dict[str, float]]:
    """The lines of a log that hold a loss or an eval loss, `COMPARED` keys only; empty if there is no file.

    A last line that a kill cut short is left out.
    """
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        if line.endswith("\n"):
            entry = json.loads(line)
            if "loss" in entry or "eval_loss" in entry:
                lines.append({name: entry[name] for name in COMPARED if name in entry})
    return lines


def compare_logs(
    whole: list[dict[str, float]], killed: list[dict[str, float]], steps: int, tolerance: float
) -> tuple[float, list[str]]:
    """The largest difference between the values of two logs, and what is wrong; nothing if they are the same."""
    problems, largest = [], 0.0
    for name, log in (("left alone", whole), ("killed", killed)):
        logged = [int(line["step"]) for line in log if "loss" in line]
        counts = Counter(logged)
        for step in sorted({*range(1, steps + 1), *logged}):
            expected = int(1 <= step <= steps)
            if counts[step] != expected:
                problems.append(f"the run {name} has step {step} {counts[step]} times in its log instead of {expected}")
        if logged != sorted(logged):
            problems.append(f"the steps of the run {name} are not in order")
    if len(whole) != len(killed):
        problems.append(f"the logs have {len(whole)} and {len(killed)} lines")
    for line, other in zip(whole, killed, strict=False):
        if line.keys() != other.keys() or line["step"] != other["step"]:
            problems.append(f"a line of step {line['step']} is one of step {other['step']}, or has other keys")
            break  # nothing below lines up
        for name, value in line.items():
            difference = abs(value - other[name])
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
            if not difference <= tolerance:
                problems.append(f"step {line['step']}: {name} is {value} and {other[name]}")
    return largest, problems


def compare_weights(whole: Path, killed: Path, tolerance: float) -> tuple[float, list[str]]:
    """The largest difference between the weights in two adapters' directories, and what is wrong."""
    first, second = (load_file(directory / "adapter_model.safetensors") for directory in (whole, killed))
    problems, largest = [], 0.0
    for name in sorted({*first, *second}):
        weight, other = first.get(name), second.get(name)
        if weight is None or other is None or (weight.shape, weight.dtype) != (other.shape, other.dtype):
            problems.append(f"{name} is not in both adapters, or has another shape or dtype")
            continue
        difference = float((weight.double() - other.double()).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        if not difference <= tolerance:
            problems.append(f"{name} differs by {difference:.3g}")
    return largest, problems


if __name__ == "__main__":
    run_cli(main)
