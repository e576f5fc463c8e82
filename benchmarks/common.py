"""What the benchmarks share: options, the work directory, settings of the steps, timing, medians, tables and results files."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from llmtuner.console import UserError, format_table, print0, print_header
from llmtuner.files import atomic_write_json
from llmtuner.report.environment import environment

# torch is imported by none of this: a child process's peak memory includes what its parent held when it forked.

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WARMUP_STEPS = 3  # first steps of a run, which are not timed
# ChatGLM3-6B with its embeddings resized for Japanese, under GlmConfig's names.
CHATGLM3_6B: dict[str, Any] = dict(vocab_size=78_592, hidden_size=4_096, intermediate_size=13_696, num_hidden_layers=28)
CHATGLM3_6B |= dict(num_attention_heads=32, num_key_value_heads=2, head_dim=128)
NUM_NEW_TOKENS, LORA_RANK = 13_756, 64  # of that model
# Settings of a run that is timed, or evaluated afterwards by the benchmark itself.
TRAIN_ONLY = dict(eval_strategy="no", eval_on_start=False, save_strategy="no", plot_loss=False)
Values = dict[str, Any]  # settings, or measured values, by name


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


OPTIONS = {
    "work_dir": (Path, "directory of a finished `make demo` (default: as for the steps)"),
    "corpora": (Path, "directory of texts and dialogues.jsonl (default: the miniature's own)"),
    "steps": (positive, f"optimizer steps of each run, the first {WARMUP_STEPS} of them not timed"),
    "repeats": (positive, "rounds; everything runs once per round"),
}


def add_options(parser: argparse.ArgumentParser, results: str, **defaults: Any) -> None:
    """Adds `--output`, by default `results` under `RESULTS`, and those `OPTIONS` that have a default; `...` is required."""
    for name, default in defaults.items():
        kind, text = OPTIONS[name]
        more = {"required": True} if default is ... else {"default": default}
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text, **more)  # type: ignore[arg-type]
    parser.add_argument("--output", type=Path, default=RESULTS / results, help="JSON file (default: %(default)s)")


def make_parser(description: str | None, results: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with a module's docstring as its help and the options of `add_options`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, results, **defaults)
    return parser


def use_work_dir(work_dir: Path | None, *needs: str) -> None:
    """Points `constants` at a work directory; call it before anything imports `constants`.

    Args:
        work_dir: None means the default one of the steps.
        needs: names of `constants` whose paths must exist.

    Raises:
        UserError: if a step that makes one of them has not finished, or PROFILE is not the miniature's.
    """
    if work_dir:
        os.environ["WORK_DIR"] = str(work_dir.resolve())
    import constants
    import pipeline

    if constants.PROFILE_NAME != "mini":
        raise UserError("this benchmark runs on the miniature. Leave PROFILE unset.")
    pipeline.require_artifacts(*(getattr(constants, name) for name in needs))
    pipeline.require_corpus()


def step_settings(stage: str, profile: str = "mini") -> Values:
    """The settings with which step 5 ("pt") or step 6 ("sft") trains; call it after `use_work_dir`."""
    if stage == "pt":
        import step5_train_pt_single_gpu as step
    else:
        import step6_train_sft_single_gpu as step  # type: ignore[no-redef]
    return {**step.SETTINGS, **step.BY_PROFILE[profile]}


def read_results(file: Path) -> Values:
    """What earlier calls have written; empty if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def save_results(file: Path, results: Values, section: str | None = None) -> None:
    """Writes results with versions, machine and commit; with a `section`, those of other sections stay."""
    results = {**environment(), **results}
    atomic_write_json(file, {**read_results(file), section: results} if section else results)
    print0(f"\nresults: {file}")


@dataclass
class FinishedProcess:
    """What a process printed and used; `peak_mb` is its largest resident set."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_mb: float

    def usage(self) -> Values:
        return {"seconds": round(self.seconds, 1), "peak_mb": round(self.peak_mb)}


def run_process(command: Iterable[object], sync: bool = False, **variables: object) -> FinishedProcess:
    """Runs a command from the repository root.

    Args:
        sync: let the clock stop only when everything written is on the disk.
        variables: environment variables set beside the present ones.

    Raises:
        UserError: if it fails, with the end of what it printed.
    """
    words = list(map(str, command))
    environ = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        if sync:
            os.sync()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        stderr.seek(0)
        printed = stdout.read()
        if process.returncode:
            end = f"{printed[-1_000:]}\n{stderr.read()[-3_000:]}"
            raise UserError(f"{' '.join(words)} exited with code {process.returncode}:\n{end}")
    return FinishedProcess(printed, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def run_step(script: str, work: Path, texts: Path, *arguments: str, **variables: str) -> None:
    """Runs a step script as a user starts it; one that has finished in this WORK_DIR ends at once.

    Args:
        texts: its CORPUS_DIR.
        variables: environment variables; by default PROFILE is the miniature's.

    Raises:
        UserError: if it fails; it has said why itself.
    """
    print_header(f"{work.name}: {script} {' '.join(arguments)}")
    environ = {name: value for name, value in os.environ.items() if name not in ("BASE_MODEL_DIR", "OVERWRITE")}
    environ |= {"PROFILE": "mini", "WORK_DIR": str(work), "CORPUS_DIR": str(texts), "SKIP_COMPLETED": "1"}
    environ |= {"HF_HUB_OFFLINE": "1", **variables}  # the texts are those of this directory, or none
    command = [sys.executable, str(ROOT / script), *arguments]
    if subprocess.run(command, env=environ, stdin=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} failed in {work}; its message is above. The same command resumes there.")


def seconds_of(function: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_in_turn(
    variants: Iterable[str],
    repeats: int,
    run: Callable[[str, int], Values],
    compare: Callable[[list[Values]], None] | None = None,
) -> dict[str, Values]:
    """Runs all variants once per round, A B C ... A B C ...; returns the medians of each.

    Args:
        run: measures a variant in a round, both given.
        compare: adds to the values of one round what relates them to one another, such as ratios.
    """
    runs: dict[str, list[Values]] = {name: [] for name in variants}
    for number in range(repeats):
        for name, rounds in runs.items():
            print0(f"round {number + 1} of {repeats}: {name}")
            rounds.append(run(name, number))
        if compare:
            compare([rounds[-1] for rounds in runs.values()])
    return {name: medians(rounds) for name, rounds in runs.items()}


def medians(rounds: list[Values]) -> Values:
    """The median of each value; of ratios and speedups also `..._per_round`."""
    values: Values = {key: round(median(values[key] for values in rounds), 6) for key in rounds[0]}
    spread = [key for key in values if key.endswith(("ratio", "speedup")) and key != "padding_ratio"]
    return values | {f"{key}_per_round": [round(values[key], 6) for values in rounds] for key in spread}


def print_results(title: str, results: dict[str, Values]) -> None:
    """Prints numbers and texts of measured values, also of nested ones, as a table: the longer side downwards."""

    def flatten(values: Values, prefix: str = "") -> Iterator[tuple[str, str]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key} ")
            elif isinstance(value, float):
                yield prefix + key, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
            elif isinstance(value, int | str):
                yield prefix + key, f"{value:,}" if type(value) is int else str(value)

    flat = {name: dict(flatten(values)) for name, values in results.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    lines = [["", *(key.replace("_", " ") for key in keys)]]
    lines += [[name, *(values.get(key, "") for key in keys)] for name, values in flat.items()]
    if len(keys) > max(len(results), 8):
        lines = [list(line) for line in zip(*lines, strict=True)]
    print_header(title)
    print0(format_table(lines[0], lines[1:]))


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, all columns but the first right-aligned."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
