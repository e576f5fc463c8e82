"""Which recipe of step 5 is best at equal tokens: everything at once, one part after the other, and two variations.

    python -m benchmarks.recipes --work-dir DIR --corpora TEXTS     real text, in files named as in data/dataset_info.json
    python -m benchmarks.recipes --work-dir DIR                     the miniature's own world
    python -m benchmarks.recipes --work-dir DIR --corpora TEXTS --recipes joint staged --seeds 42 43 --max_steps 600

The step scripts run as a user starts them: steps 1 to 3 once, then step 5 for each recipe and seed in a WORK_DIR of its own.
Runs that have finished in DIR are not made again, so after a change name another one. Bits per byte of held-out text
compare the recipes; eval losses do so only where documents are packed alike, which those of `no_neat_packing` are not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from safetensors import safe_open

from benchmarks.full_size_checkpoint import environment
from llmtuner.console import UserError, format_table, print0, print_header, run_cli
from llmtuner.eval.language import LANGUAGES
from llmtuner.files import atomic_write_json
from llmtuner.outputs import atomic_directory
from llmtuner.train.checkpointing import list_checkpoints

ROOT = Path(__file__).resolve().parent.parent
STEP5 = "step5_train_pt_single_gpu.py"
RECIPES = {
    "joint": "",
    "staged": "--staged",
    "no_neat_packing": "--neat_packing false",
    "new_rows": "--train_new_tokens_only",
}
TOLERANCE = 0.01  # by which the tokens of two runs may differ


def main() -> None:
    parser = argparse.ArgumentParser(description="compare recipes of continued pretraining at equal tokens")
    parser.add_argument("--work-dir", type=Path, required=True, help="for everything that the runs make")
    parser.add_argument("--corpora", type=Path, help="directory of texts; default: the miniature's own world")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--max_steps", type=int, default=600, help="of each run; an even number, at least 4")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "recipes.json")
    options = parser.parse_args()
    if (steps := options.max_steps) < 4 or steps % 2:
        parser.error("--max_steps is an even number from 4 up: both halves of `staged` make half of them")
    corpus = options.corpora.resolve().name if options.corpora else "miniature"
    directory = options.work_dir.resolve() / corpus
    base = directory / "base"
    texts = options.corpora.resolve() if options.corpora else base / "corpus"
    for script in ("step1_train_tokenizer.py", "step2_merge_tokenizer.py", "step3_resize_model.py"):
        start(script, base, texts)
    # One step and no more, so that the texts are tokenized before the clock of any recipe starts.
    start(STEP5, base, texts, "--max_steps", "1", "--max_eval_samples", "1")
    runs = []
    for seed in options.seeds:
        for recipe in options.recipes:
            work = directory / f"{recipe}-{seed}-{steps}"
            if not work.exists():
                with atomic_directory(work, replace=True) as partial:
                    shutil.copytree(base, partial, ignore=shutil.ignore_patterns("step5*"), dirs_exist_ok=True)
            words = f"--max_steps {steps} --eval_steps {steps // 4} --seed {seed} {RECIPES[recipe]}".split()
            start(STEP5, work, texts, *words)
            runs.append({"recipe": recipe, "seed": seed, **measured(work)})

    show(runs)
    tokens = [run["tokens"] for run in runs]
    if max(tokens) > (1 + TOLERANCE) * min(tokens):
        raise UserError(f"the runs trained {min(tokens):,} to {max(tokens):,} tokens, not equally many.")
    results = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    results[corpus] = {**surroundings(), "max_steps": steps, "runs": runs}
    atomic_write_json(options.output, results)
    print0(f"\nfigures in {options.output}")


def start(script: str, work: Path, texts: Path, *words: str) -> None:
    """Runs a step script with the miniature's profile; one that has finished in this WORK_DIR ends at once.

    Raises:
        UserError: if it fails; it has said why itself.
    """
    print_header(f"{work.name}: {script} {' '.join(words)}")
    environment = {name: value for name, value in os.environ.items() if name not in ("BASE_MODEL_DIR", "OVERWRITE")}
    environment |= {"PROFILE": "mini", "WORK_DIR": str(work), "CORPUS_DIR": str(texts), "SKIP_COMPLETED": "1"}
    environment["HF_HUB_OFFLINE"] = "1"  # the texts are those of this directory, or none
    command = [sys.executable, str(ROOT / script), *words]
    if subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} failed in {work}; its message stands above. The same command goes on from there.")


def measured(work: Path) -> dict[str, Any]:
    """What a finished step 5 measured; what counts by run is taken from both runs of `staged`."""
    metrics = json.loads((work / "metrics" / "step5.json").read_text(encoding="utf-8"))
    adapters = [path for name in ("embeddings", "pt") if (path := work / f"step5_{name}_adapter").is_dir()]
    logs = [
        json.loads(line) for one in adapters for line in (one / "trainer_log.jsonl").read_text("utf-8").splitlines()
    ]
    eval_losses = [line["eval_loss"] for line in logs if "eval_loss" in line]
    meters = [
        json.loads((list_checkpoints(one)[0] / "throughput.json").read_text(encoding="utf-8")) for one in adapters
    ]
    # The last steps may have no line in the log; the meter counts them apart.
    tokens = sum(meter["total_tokens"] + meter["tokens"] for meter in meters)
    return {
        "bits_per_byte": metrics["bits_per_byte"],
        "eval_loss": {"first": round(eval_losses[0], 4), "last": round(eval_losses[-1], 4)},
        "tokens": tokens,
        "seconds": metrics["seconds"],
        "tokens_per_second": round(tokens / sum(meter["total_seconds"] for meter in meters), 1),
        "trainable_parameters": max([metrics["trainable_parameters"], *map(parameters, adapters[:-1])]),
    }


def parameters(adapter: Path) -> int:
    """How many numbers a run without LoRA trained."""
    with safe_open(adapter / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def surroundings() -> dict[str, Any]:
    """Versions, machine and commit that figures belong to."""
    import torch

    gpu = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return {**environment(), **gpu, "threads": torch.get_num_threads(), "peft": version("peft"), "commit": commit}


def show(runs: list[dict[str, Any]]) -> None:
    """Prints every run, and the means over seeds."""
    print_header("each run: bits per byte of held-out text after training, and what it took")
    rows = []
    for run in runs:
        bits, loss = run["bits_per_byte"]["after"], run["eval_loss"]
        own = [str(run["seed"]), *(f"{bits[one]:.4f}" for one in LANGUAGES), f"{loss['first']} -> {loss['last']}"]
        own += [f"{run['tokens']:,}", f"{run['seconds']:.0f}", f"{run['tokens_per_second']:,.0f}"]
        rows.append([run["recipe"], *own, f"{run['trainable_parameters']:,}"])
    print0(
        format_table(
            ["recipe", "seed", *LANGUAGES, "eval loss", "tokens", "seconds", "tokens/s", "trained at once"], rows
        )
    )
    print_header("bits per byte, mean over seeds (lower is better)")
    means = {"before": [runs[0]["bits_per_byte"]["before"][one] for one in LANGUAGES]}
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        after = [run["bits_per_byte"]["after"] for run in runs if run["recipe"] == recipe]
        means[recipe] = [mean(bits[one] for bits in after) for one in LANGUAGES]
    print0(
        format_table(
            ["recipe", *LANGUAGES], [[name, *(f"{value:.4f}" for value in own)] for name, own in means.items()]
        )
    )


if __name__ == "__main__":
    run_cli(main)
