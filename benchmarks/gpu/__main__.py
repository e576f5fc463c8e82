"""Measures steps of ChatGLM3-6B in its full size on one GPU, and runs the paths that only a GPU takes.

    python -m benchmarks.gpu --minutes 10            everything; then update_readme puts it into docs/gpu.md
    python -m benchmarks.gpu --parts layer steps     some parts again; the others keep their results
    python -m benchmarks.gpu --device cpu --tiny     every part in miniature without a GPU: shows that it runs

Offline: weights are random and made on the GPU, documents are drawn with lengths like those of step 5. On a GPU each part
runs in a process of its own, which gets its share of the minutes that are left. What fails is recorded with its error, what
does not fit is skipped, and the rest goes on.
"""

import argparse
import os
import subprocess
import sys
import time

import torch

from benchmarks import common
from benchmarks.common import ROOT
from benchmarks.gpu import parts, paths
from benchmarks.gpu.measuring import Part
from llmtuner.console import UserError, print0, run_cli
from llmtuner.files import atomic_write_json
from llmtuner.train.process import ALLOCATOR_VARIABLES

# In this order; share of the time, and function.
PARTS = {
    "machine": (2, parts.measure_machine),
    "baseline": (5, parts.measure_baseline),
    "layer": (8, parts.measure_layer),
    "steps": (16, parts.measure_steps),
    "numerics": (6, parts.measure_numerics),
    "paths": (12, paths.measure_paths),
    "embeddings": (6, parts.measure_embeddings),
    "compile": (6, parts.measure_compile),
}
GRACE = 15  # seconds after its time in which a part may finish its latest case


def main(arguments: list[str] | None = None) -> None:
    parser = common.make_parser(__doc__, "gpu.json")
    parser.add_argument("--minutes", type=float, default=10, help="after which no other case starts (default: 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a miniature shape and short windows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.run:  # a process of `run_parts`
        return Part(options.run, options.output, "cuda", options.tiny, float(input())).run(PARTS[options.run][1])
    if options.device == "cpu" and not options.tiny:
        raise UserError("the full size is for a GPU. Without one, add --tiny.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU. Without one: --device cpu --tiny.")
    if options.parts == list(PARTS):
        options.output.unlink(missing_ok=True)  # no figures of two machines in one file
    run_parts(options.parts, options)
    print0(f"\nresults: {options.output}")
    return None


def run_parts(names: list[str], options: argparse.Namespace) -> None:
    """Runs parts one after another, each with its share of the time that is left.

    On a GPU in processes of their own: an illegal memory access ends one part only, and memory is free again afterwards. The
    next process starts while a part runs, and imports meanwhile what it needs.
    """
    deadline = time.monotonic() + 60 * options.minutes
    waiting = start_process(names[0], options) if options.device == "cuda" else None
    for number, name in enumerate(names):
        shares = [PARTS[later][0] for later in names[number:]]
        seconds = max(0.0, (deadline - time.monotonic()) * shares[0] / sum(shares))
        if waiting is None:
            Part(name, options.output, options.device, options.tiny, seconds).run(PARTS[name][1])
            continue
        process, waiting = waiting, start_process(names[number + 1], options) if names[number + 1 :] else None
        try:
            process.communicate(f"{seconds}\n", timeout=seconds + GRACE)
            error = f"its process exited with code {process.returncode}" if process.returncode else None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            error = f"stopped {GRACE} seconds after its {seconds:.0f} seconds"
        if error:
            results = common.read_results(options.output)
            section = {"results": {}, **results.get(name, {}), "error": error}
            atomic_write_json(options.output, {**results, name: section})


def start_process(name: str, options: argparse.Namespace) -> subprocess.Popen:
    """Starts the process of a part, with the trainer's allocator; it reads the number of its seconds from standard input."""
    environ = {ALLOCATOR_VARIABLES[0]: "expandable_segments:True", **os.environ}
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--output", str(options.output.resolve())]
    command += ["--tiny"] * options.tiny
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, text=True)


if __name__ == "__main__":
    run_cli(main)
