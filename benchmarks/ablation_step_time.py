"""What each lever of speed brings: forward and backward pass of step 5, one step with each setting in turn, in one process.

    python -m benchmarks.ablation_step_time --work-dir runs/mini

Step 3 must have finished in the work directory. Processes differ in speed by more than a lever brings (train_throughput.py
shows it); steps that follow one another differ less. All settings compute the same batches with the same weights, which
are not changed; a ratio is the median over the steps. For a CPU, in fp32.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import use_work_dir
from benchmarks.train_throughput import ABLATIONS
from llmtuner.console import format_table, print0, run_cli
from llmtuner.data.loader import get_dataset
from llmtuner.data.packing import PackedDataCollator
from llmtuner.files import atomic_write_json
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, FinetuningArguments, get_train_args
from llmtuner.model.adapters import init_adapter
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.loading import default_attention, load_model
from llmtuner.report.environment import environment
from llmtuner.tokenizer.fast import load_tokenizer
from llmtuner.train.trainer import PackedTrainer

RESULTS = Path(__file__).resolve().parent / "results" / "ablation_step_time.json"
UNTIMED, BATCHES = 3, 4  # first steps; different batches
VARIANTS: dict[str, dict[str, Any]] = {"all levers": {}, **ABLATIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description="what each lever brings")
    parser.add_argument("--work-dir", type=Path, help="where steps 1 to 3 have run (default: as for the steps)")
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, default=2_048, help="of a step")
    parser.add_argument("--steps", type=int, default=40, help=f"with each setting; the first {UNTIMED} are not timed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    use_work_dir(options.work_dir)
    results = {}
    for window in options.windows:
        batches = batches_of(window, options.tokens)
        steps = {name: training_step(own) for name, own in VARIANTS.items()}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for number in tqdm(range(options.steps), f"windows of {window}", unit=" steps"):
            for name, step in steps.items():
                runs[name].append(step(batches[number % BATCHES]))
        first = runs["all levers"]
        results[f"{window:,}"] = {
            name: {
                "ratio": median(a[1] / b[1] for a, b in zip(first[UNTIMED:], own[UNTIMED:], strict=True)),
                "milliseconds": 1e3 * median(seconds for _, seconds in own[UNTIMED:]),
                "loss": own[0][0],
            }
            for name, own in runs.items()
        }
        lines = [
            [name, f"{one['ratio']:.3f}", f"{one['milliseconds']:.0f}", f"{one['loss']:.5f}"]
            for name, one in results[f"{window:,}"].items()
        ]
        print0(format_table([f"windows of {window:,}", "times as fast", "ms a step", "first loss"], lines))
    atomic_write_json(options.output, {**environment(), "results": results})


def batches_of(window: int, tokens: int) -> list[dict[str, Any]]:
    """Step 5's first batches."""
    import constants
    from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS

    with tempfile.TemporaryDirectory() as scratch:
        settings = {**SETTINGS, **BY_PROFILE["mini"], "cutoff_len": window, "output_dir": scratch}
        train_args = get_train_args(settings)
    tokenizer = load_tokenizer(constants.ZERO_DIR)
    sequences = get_dataset("pt", train_args.data, train_args.training.seed, tokenizer).train
    rows, collate = tokens // window, PackedDataCollator(tokenizer.pad_token_id)
    return [collate([sequences[batch * rows + row] for row in range(rows)]) for batch in range(BATCHES)]


def training_step(settings: dict[str, Any]) -> Any:
    """A function that computes loss and gradients of a batch and returns the loss and the seconds that it took."""
    import constants

    finetuning = FinetuningArguments(
        lora_rank=32,
        additional_target=["embed_tokens", "lm_head"],
        **{name: value for name, value in settings.items() if name != "flash_attn"},
    )
    attention = ATTN_IMPLEMENTATIONS[settings.get("flash_attn", "auto")] or default_attention(constants.ZERO_DIR)
    model = init_adapter(load_model(constants.ZERO_DIR, torch.float32, attention), finetuning).train()
    if finetuning.fused_ops:
        apply_fused_ops(model)
    trainer: Any = SimpleNamespace(model=model, finetuning_args=finetuning, hidden=None)

    def keep_hidden(_: Any, __: Any, outputs: Any) -> None:
        trainer.hidden = outputs.last_hidden_state

    model.get_base_model().base_model.register_forward_hook(keep_hidden)

    def step(batch: dict[str, Any]) -> tuple[float, float]:
        start = time.perf_counter()
        loss, trained = PackedTrainer._compute_loss_sum(trainer, model, batch)
        (loss / trained).backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return float(loss.detach() / trained), seconds

    return step


if __name__ == "__main__":
    run_cli(main)
