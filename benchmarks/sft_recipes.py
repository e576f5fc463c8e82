"""The original project's three runs of instruction tuning, replayed on the miniature: what do an epoch and the embeddings add?

    python -m benchmarks.sft_recipes --work-dir runs/mini --output-dir DIR                   all three, three seeds
    python -m llmtuner compare DIR/lora-42 DIR/lora_2_epochs-42 DIR/lora_embeddings-42      the page that shows them

Its test losses were 1.78 (LoRA, one epoch), 1.72 (two epochs) and 1.68 (LoRA and embeddings, one epoch), and its training
loss fell off a cliff where the second epoch began. The runs start from the step 5 of a finished WORK_DIR, with the settings
of step 6. Runs that have finished in DIR are not repeated.
"""

import json
import shutil
from pathlib import Path
from statistics import mean

from benchmarks.common import Values, make_parser, print_results, read_results, run_step, save_results
from llmtuner.console import run_cli
from llmtuner.outputs import atomic_directory

STEP6 = "step6_train_sft_single_gpu.py"
RECIPES = {
    "lora": "--lora-only --num_train_epochs 1",
    "lora_2_epochs": "--lora-only --num_train_epochs 2",
    "lora_embeddings": "--num_train_epochs 1",
}
AROUND = 0.1  # of an epoch: what is compared before and after its end


def main() -> None:
    parser = make_parser(__doc__, "sft_recipes.json", work_dir=...)
    parser.add_argument("--output-dir", type=Path, required=True, help="for the WORK_DIRs of the runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    options = parser.parse_args()
    base, runs = options.work_dir.resolve(), []
    for seed in options.seeds:
        for recipe in options.recipes:
            work = options.output_dir.resolve() / f"{recipe}-{seed}"
            if not work.exists():
                ignored = shutil.ignore_patterns(
                    "step6*", "step7*", "chat_model", "report.html", "answers.jsonl", ".lock"
                )
                with atomic_directory(work, replace=True) as partial:
                    shutil.copytree(base, partial, ignore=ignored, dirs_exist_ok=True)
            run_step(STEP6, work, work / "corpus", "--seed", str(seed), *RECIPES[recipe].split())
            runs.append({"recipe": recipe, "seed": seed, **measurements(work)})
    print_results("each run", {f"{run['recipe']}, seed {run['seed']}": run for run in runs})
    figures = [name for name in runs[0] if name not in ("recipe", "seed")]
    means = {
        recipe: {
            name: mean(values)
            for name in figures
            if (values := [run[name] for run in runs if run["recipe"] == recipe and name in run])
        }
        for recipe in options.recipes
    }
    print_results("means over seeds", means)
    save_results(options.output, {"runs": runs, "means": means})


def measurements(work: Path) -> Values:
    """Losses of a finished step 6: of the validation set, and of training around the end of the first epoch."""
    metrics = read_results(work / "metrics" / "step6.json")
    log = [
        json.loads(line) for line in (work / "step6_sft_adapter" / "trainer_log.jsonl").read_text("utf-8").splitlines()
    ]
    losses = [(entry["epoch"], entry["loss"]) for entry in log if "loss" in entry]
    around = {
        "train_loss_before_epoch_2": [loss for epoch, loss in losses if 1 - AROUND <= epoch <= 1],
        "train_loss_after_epoch_1": [loss for epoch, loss in losses if 1 < epoch <= 1 + AROUND],
    }
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    return {
        "eval_loss": round(evaluations[-1], 4),
        "lowest_eval_loss": round(min(evaluations), 4),
        **({name: round(mean(values), 4) for name, values in around.items()} if all(around.values()) else {}),
        "bits_per_byte_ja": metrics["bits_per_byte"]["after"]["ja"],
        "trainable_parameters": metrics["trainable_parameters"],
    }


if __name__ == "__main__":
    run_cli(main)
