"""The loss curve of the whole of step 5 on the miniature, with all levers of speed on and with none.

    python -m benchmarks.ablation_loss --work-dir runs/mini

Step 3 must have finished in the work directory. Both runs see the same batches. On a CPU in fp32 the
levers change the order of additions alone, so curves part as rounding grows, not at once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy

from benchmarks.common import use_work_dir
from benchmarks.train_throughput import PLAIN
from llmtuner.console import UserError, format_table, print0, run_cli
from llmtuner.files import atomic_write_json
from llmtuner.report.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ablation_loss.json"
RUNS: dict[str, dict[str, Any]] = {"on": {}, "off": PLAIN}
LINES = 10  # of the table


def main() -> None:
    parser = argparse.ArgumentParser(description="loss of step 5 with all levers on and off")
    parser.add_argument("--work-dir", type=Path, help="where steps 1 to 3 have run (default: as for the steps)")
    parser.add_argument("--steps", type=int, help="of each run (default: all of step 5)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    use_work_dir(options.work_dir)
    from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS

    settings = {**SETTINGS, **BY_PROFILE["mini"], "save_strategy": "no", "plot_loss": False, "logging_steps": 1}
    if options.steps:
        settings["max_steps"] = options.steps
    curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, own in RUNS.items():
            print0(f"levers {name}")
            curves[name] = curve({**settings, **own, "output_dir": f"{scratch}/{name}"})
    on, off = (numpy.array(one["loss"]) for one in curves.values())
    apart = numpy.abs(on - off) / off
    tenths = [range(len(on))[part] for part in numpy.linspace(0, len(on) - 1, LINES, dtype=int)]
    lines = [
        [f"{step + 1:,}", f"{on[step]:.4f}", f"{off[step]:.4f}", f"{apart[: step + 1].max():.1e}"] for step in tenths
    ]
    print0(format_table(["step", "levers on", "levers off", "furthest apart so far"], lines))
    ends = {name: one["eval_loss"][-1] for name, one in curves.items()}
    speeds = {name: one["tokens_per_second"] for name, one in curves.items()}
    print0(f"held-out loss at the end: {ends}; tokens/s: {speeds}")
    draw(curves, options.output.with_suffix(".png"))
    atomic_write_json(
        options.output, {**environment(), "max_relative_difference": float(apart.max()), "curves": curves}
    )


def curve(settings: dict[str, Any]) -> dict[str, Any]:
    """Losses of all steps, held-out losses, and tokens/s of a run, which is a process of its own."""
    directory = Path(settings["output_dir"])
    atomic_write_json(file := directory.with_suffix(".json"), settings)
    done = subprocess.run([sys.executable, "-m", "llmtuner", "train", str(file)], cwd=ROOT)
    if done.returncode:
        raise UserError("the run failed; its message stands above.")
    with (directory / "trainer_log.jsonl").open(encoding="utf-8") as lines:
        log = [json.loads(line) for line in lines]
    steps = [line for line in log if "loss" in line]
    return {
        "loss": [line["loss"] for line in steps],
        "eval_loss": [line["eval_loss"] for line in log if "eval_loss" in line],
        "tokens_per_second": float(numpy.median([line["tokens_per_second"] for line in steps])),
    }


def draw(curves: dict[str, dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, one), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(one["loss"]) + 1), one["loss"], style, linewidth=1.2, label=f"all levers {name}")
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Step 5 on the miniature")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    run_cli(main)
