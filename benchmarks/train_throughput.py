"""Throughput, utilisation, memory and share of each part of steps 5 and 6, with each lever on and off.

    python -m benchmarks.train_throughput --work-dir runs/mini                        the miniature
    python -m benchmarks.train_throughput --work-dir runs/mini --size chatglm3-6b     its full size, random weights: for a GPU
    python -m benchmarks.train_throughput --work-dir runs/mini --size chatglm3-6b --layers 1 --steps 6    the same, cut short

Step 3 must have finished in the work directory; its texts and its tokenizer are used for both sizes. Each run is a process of
its own; they take turns, A B C ... A B C ...; medians over the rounds. The first steps of a run are not timed.

Model FLOP of a trained token: 4 for each frozen number of a linear layer (forward, and backward to its input), 6 for each of
LoRA and of a trained output layer (4 if it is frozen), 12 * layers * width of all heads * the mean number of tokens that a
token sees. What is computed a second time (gradient checkpointing) does not count. Utilisation is that of the fastest matrix
product measured in the same process and precision, 2,048 or, on a GPU, 8,192 on a side.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.common import use_work_dir
from benchmarks.training_costs import PARTS, UNTIMED, TimedTrainer, Values, clock, medians, show, train
from llmtuner.console import UserError, print0, run_cli
from llmtuner.files import atomic_write_json
from llmtuner.report.environment import environment
from llmtuner.tokenizer.fast import copy_tokenizer
from llmtuner.train.callbacks import peak_memory_gb

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "train_throughput.json"
PLAIN = dict(flash_attn="sdpa", fused_ops=False, chunked_loss=False)
ABLATIONS: dict[str, Values] = {
    "attention with a mask (sdpa)": dict(flash_attn="sdpa"),
    "attention in plain products": dict(flash_attn="disabled"),
    "layers not fused": dict(fused_ops=False),
    "loss not chunked": dict(chunked_loss=False),
    "none of these": PLAIN,
}
VARIANTS: dict[str, Values] = {
    "as it is": {},
    **ABLATIONS,
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "torch.compile": dict(torch_compile=True),
    "new rows only": dict(train_new_tokens_only=True),
    "LoRA alone": dict(additional_target=[], embedding_learning_rate=None),
}
FULL_SIZE = dict(hidden_size=4096, intermediate_size=13696, num_attention_heads=32, num_key_value_heads=2, head_dim=128)


def main() -> None:
    parser = argparse.ArgumentParser(description="throughput of steps 5 and 6")
    parser.add_argument("--work-dir", type=Path, help="where steps 1 to 3 have run (default: as for the steps)")
    parser.add_argument("--size", choices=("mini", "chatglm3-6b"), default="mini")
    parser.add_argument("--layers", type=int, default=28, help="of the full size")
    parser.add_argument("--windows", type=int, nargs="+", help="tokens in a sequence (default: the profile's)")
    parser.add_argument("--tokens", type=int, help="of a step (default: 2,048, of the full size 16,384)")
    parser.add_argument("--stages", nargs="+", choices=("pt", "sft"), default=["pt", "sft"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=20, help=f"of each run; the first {UNTIMED} are not timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return run_job(options.job)
    use_work_dir(options.work_dir)
    import constants

    if options.size != "mini" and not torch.cuda.is_available() and options.layers > 2:
        raise UserError("the full size is for a GPU. Without one, shorten it: --layers 1.")
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        model = constants.ZERO_DIR
        if options.size != "mini":
            model = random_model(options.layers, Path(scratch) / "model")
        for stage in options.stages:
            for window in options.windows or [256 if options.size == "mini" else 1024]:
                name = f"{stage}, {options.size}, windows of {window:,}"
                results = measure(stage, model, window, options, Path(scratch))
                columns = dict(tokens_per_second=",.0f", target_tokens_per_second=",.0f", ratio=".3f")
                columns |= dict(utilisation=".1%", peak_memory_gb=".2f", first_loss=".3f", last_loss=".3f")
                columns |= dict(first_norm=".2f", last_norm=".2f")
                columns |= {f"{part}_fraction": ".1%" for part in (*PARTS, "other")}
                show(name, results, columns)
                layers = {} if options.size == "mini" else {"layers": options.layers}
                before[name] = {**environment(), **layers, "results": results}
    atomic_write_json(options.output, before)
    print0(f"\nratio: of tokens/s to the first line; figures in {options.output}")
    return None


def random_model(layers: int, directory: Path) -> Path:
    """ChatGLM3-6B's shape, grown to 78,592 rows, with random weights in bf16, and the miniature's tokenizer."""
    from transformers import AutoConfig, GlmForCausalLM

    import constants

    config = AutoConfig.from_pretrained(constants.ZERO_DIR)
    config.update({**FULL_SIZE, "num_hidden_layers": layers, "vocab_size": 78_592, "max_position_embeddings": 8192})
    torch.manual_seed(0)
    GlmForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    copy_tokenizer(constants.ZERO_DIR, directory)
    return directory


def measure(stage: str, model: Path, window: int, options: argparse.Namespace, scratch: Path) -> dict[str, Values]:
    import constants

    if stage == "pt":
        from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS
    else:
        from step6_train_sft_single_gpu import BY_PROFILE, SETTINGS  # type: ignore[assignment]
    tokens = options.tokens or (2_048 if options.size == "mini" else 16_384)
    settings = {**SETTINGS, **BY_PROFILE["mini" if options.size == "mini" else "chatglm3-6b"]}
    accumulation = 1 if options.size == "mini" else max(1, tokens // (4 * window))
    settings |= dict(model_name_or_path=str(model), cutoff_len=window, gradient_accumulation_steps=accumulation)
    settings |= dict(per_device_train_batch_size=max(1, tokens // window // accumulation), max_steps=options.steps)
    settings |= dict(val_size=0.02, cache_dir=str(constants.CACHE_DIR))
    runs: dict[str, list[Values]] = {name: [] for name in options.variants}
    for seed in range(42, 42 + options.repeats):
        for name, own in runs.items():
            print0(f"{stage}, seed {seed}: {name}")
            job = {"settings": {**settings, "seed": seed, **VARIANTS[name]}, "result": str(scratch / "result.json")}
            atomic_write_json(scratch / "job.json", job)
            command = [sys.executable, "-m", "benchmarks.train_throughput", "--job", str(scratch / "job.json")]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{name} failed:\n{done.stdout[-500:]}\n{done.stderr[-3000:]}")
            own.append(json.loads((scratch / "result.json").read_text(encoding="utf-8")))
            first = runs[options.variants[0]][-1]
            own[-1]["ratio"] = own[-1]["tokens_per_second"] / first["tokens_per_second"]
    return {name: medians(own) for name, own in runs.items()}


def run_job(file: Path) -> None:
    job = json.loads(file.read_text(encoding="utf-8"))
    result = train(job["settings"], max_eval_samples=8)
    losses, trainer = result.pop("losses"), TimedTrainer.latest
    result.pop("trained")
    norms = [step["gradient_norm"] for step in trainer.steps]
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    peak = product_peak(dtype, trainer.args.device)
    flop = model_flop(trainer)
    result |= dict(first_loss=losses[0], last_loss=losses[-5:].mean(), first_norm=norms[0], last_norm=norms[-1])
    result |= dict(peak_memory_gb=peak_memory_gb(), flop_per_token=flop, peak_flop_per_second=peak)
    result["utilisation"] = flop * result["tokens_per_second"] * (1 - result["padding_ratio"]) / peak
    parts = {name: result[f"{name}_seconds"] for name in (*PARTS, "other")}
    result |= {f"{name}_fraction": value / result["seconds_per_step"] for name, value in parts.items()}
    atomic_write_json(Path(job["result"]), {name: float(value) for name, value in result.items()})


def model_flop(trainer: Any) -> float:
    """Of one token, as the head of this file says."""
    flop = 0.0
    for name, parameter in trainer.model.named_parameters():
        if parameter.ndim == 2 and "embed_tokens" not in name and not name.endswith("original_module.weight"):
            flop += parameter.numel() * (6 if parameter.requires_grad else 4)
    segments = trainer.train_dataset.dataset.pack_index
    lengths = segments.lengths
    seen = float(numpy.sum(lengths * (lengths + 1) / 2) / lengths.sum())
    config = trainer.model.config
    return flop + 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen


def product_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of a large matrix product, the fastest of ten."""
    side = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = clock()
        one @ other
        best = min(best, clock() - start)
    return 2 * side**3 / best


if __name__ == "__main__":
    run_cli(main)
