"""Which recipe of step 5 is best at equal tokens: everything at once, one part after the other, and two variations.

    python -m benchmarks.recipes --work-dir DIR --corpora TEXTS     real text, in files named as in data/dataset_info.json
    python -m benchmarks.recipes --work-dir DIR                     the miniature's own texts
    python -m benchmarks.recipes --work-dir DIR --corpora TEXTS --recipes joint staged --seeds 42 43 --max_steps 600

The step scripts run as a user starts them: steps 1 to 3 once, then step 5 for each recipe and seed in a WORK_DIR of its own.
Runs that have finished in DIR are not repeated, so after a change name another one. Bits per byte of held-out text compare
the recipes; eval losses do so only where documents are packed alike, which those of `no_neat_packing` are not.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

from safetensors import safe_open

from benchmarks.common import ROOT, Values, make_parser, print_results, read_results, save_results
from llmtuner.console import UserError, print_header, run_cli
from llmtuner.eval.language import LANGUAGES
from llmtuner.outputs import atomic_directory
from llmtuner.train.checkpointing import list_checkpoints

STEP5 = "step5_train_pt_single_gpu.py"
RECIPES = {
    "joint": "",
    "staged": "--staged",
    "no_neat_packing": "--neat_packing false",
    "new_rows": "--train_new_tokens_only",
}
TOLERANCE = 0.01  # by which the tokens of two runs may differ


def main() -> None:
    parser = make_parser(__doc__, "recipes.json", work_dir=..., corpora=None)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--max_steps", type=int, default=600, help="of each run; an even number, at least 4")
    options = parser.parse_args()
    if (steps := options.max_steps) < 4 or steps % 2:
        parser.error("--max_steps is an even number of at least 4: each stage of `staged` takes half of them")
    corpus = options.corpora.resolve().name if options.corpora else "miniature"
    directory = options.work_dir.resolve() / corpus
    base = directory / "base"
    texts = options.corpora.resolve() if options.corpora else base / "corpus"
    for script in ("step1_train_tokenizer.py", "step2_merge_tokenizer.py", "step3_resize_model.py"):
        run_step(script, base, texts)
    # One step and no more, so that the texts are tokenized before the clock of any recipe starts.
    run_step(STEP5, base, texts, "--max_steps", "1", "--max_eval_samples", "1")
    runs = []
    for seed in options.seeds:
        for recipe in options.recipes:
            work = directory / f"{recipe}-{seed}-{steps}"
            if not work.exists():
                with atomic_directory(work, replace=True) as partial:
                    shutil.copytree(base, partial, ignore=shutil.ignore_patterns("step5*"), dirs_exist_ok=True)
            arguments = f"--max_steps {steps} --eval_steps {steps // 4} --seed {seed} {RECIPES[recipe]}".split()
            run_step(STEP5, work, texts, *arguments)
            runs.append({"recipe": recipe, "seed": seed, **measurements(work)})
    show(runs)
    tokens = [run["tokens"] for run in runs]
    if max(tokens) > (1 + TOLERANCE) * min(tokens):
        raise UserError(f"the runs trained on {min(tokens):,} to {max(tokens):,} tokens, not equally many.")
    save_results(options.output, {"max_steps": steps, "runs": runs}, corpus)


def run_step(script: str, work: Path, texts: Path, *arguments: str) -> None:
    """Runs a step script with the miniature's profile; one that has finished in this WORK_DIR ends at once.

    Raises:
        UserError: if it fails; it has said why itself.
    """
    print_header(f"{work.name}: {script} {' '.join(arguments)}")
    environ = {name: value for name, value in os.environ.items() if name not in ("BASE_MODEL_DIR", "OVERWRITE")}
    environ |= {"PROFILE": "mini", "WORK_DIR": str(work), "CORPUS_DIR": str(texts), "SKIP_COMPLETED": "1"}
    environ["HF_HUB_OFFLINE"] = "1"  # the texts are those of this directory, or none
    command = [sys.executable, str(ROOT / script), *arguments]
    if subprocess.run(command, env=environ, stdin=subprocess.DEVNULL).returncode:
        raise UserError(f"{script} failed in {work}; its message is above. The same command resumes there.")


def measurements(work: Path) -> Values:
    """What a finished step 5 measured; what counts per run is taken from both runs of `staged`."""
    metrics = read_results(work / "metrics" / "step5.json")
    adapters = [path for name in ("embeddings", "pt") if (path := work / f"step5_{name}_adapter").is_dir()]
    logs = [line for path in adapters for line in (path / "trainer_log.jsonl").read_text("utf-8").splitlines()]
    eval_losses = [entry["eval_loss"] for entry in map(json.loads, logs) if "eval_loss" in entry]
    meters = [read_results(list_checkpoints(path)[0] / "throughput.json") for path in adapters]
    # The last steps may have no line in the log; the meter counts them apart.
    tokens = sum(meter["total_tokens"] + meter["tokens"] for meter in meters)
    return {
        "bits_per_byte": metrics["bits_per_byte"],
        "eval_loss": {"first": round(eval_losses[0], 4), "last": round(eval_losses[-1], 4)},
        "tokens": tokens,
        "seconds": metrics["seconds"],
        "tokens_per_second": round(tokens / sum(meter["total_seconds"] for meter in meters), 1),
        "trainable_parameters": max([metrics["trainable_parameters"], *map(num_parameters, adapters[:-1])]),
    }


def num_parameters(adapter: Path) -> int:
    """Parameters that a run without LoRA trained."""
    with safe_open(adapter / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def show(runs: list[Values]) -> None:
    """Prints every run, and the means over seeds."""
    print_results("each run", {f"{run['recipe']}, seed {run['seed']}": run for run in runs})
    means = {"before": runs[0]["bits_per_byte"]["before"]}
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        after = [run["bits_per_byte"]["after"] for run in runs if run["recipe"] == recipe]
        means[recipe] = {language: mean(bits[language] for bits in after) for language in LANGUAGES}
    print_results("bits per byte of held-out text, mean over seeds (lower is better)", means)


if __name__ == "__main__":
    run_cli(main)
