"""Costs of steps 5 and 6: throughput, every optimization on and off, packing, embeddings, a second start on a cached dataset.

    python -m benchmarks.training throughput --work-dir runs/mini                      the miniature
    python -m benchmarks.training throughput --work-dir runs/mini --size chatglm3-6b   full size, random weights: for a GPU
    python -m benchmarks.training ablation_step_time --work-dir runs/mini              step by step in one process
    python -m benchmarks.training ablation_loss --work-dir runs/mini                   the loss curve of all of step 5
    python -m benchmarks.training precision --work-dir runs/mini                       losses in bf16 against fp32
    python -m benchmarks.training packing --work-dir runs/mini --corpora DIR           against padding
    python -m benchmarks.training embeddings --work-dir runs/mini                      trained beside LoRA or not
    python -m benchmarks.training second_start --work-dir runs/mini --corpora DIR      once token ids are cached

`make demo` must have finished in the work directory, at least its step 3 (`second_start`, `packing`, `embeddings`: step 5).
What is compared runs in turn, A B C ... A B C ...; a ratio is the median over the rounds, in which the seed is the same.
Evaluation and saving are never timed. Files may lie in the page cache. benchmarks/README.md says what is computed how.
"""

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks import common
from benchmarks.common import Values, print_results, run_in_turn, run_process, save_results, step_settings
from llmtuner.console import UserError, print0, run_cli
from llmtuner.data.loader import get_dataset, load_tokenized_datasets
from llmtuner.data.packing import PackedDataCollator, pack_best_fit
from llmtuner.data.readers import read_rows
from llmtuner.data.sources import get_dataset_attr
from llmtuner.files import atomic_write_json
from llmtuner.hparams import ATTN_IMPLEMENTATIONS, FinetuningArguments, get_train_args
from llmtuner.model.adapters import init_adapter
from llmtuner.model.fused import apply_fused_ops
from llmtuner.model.loading import default_attention, load_model
from llmtuner.tokenizer.encoding import copy_tokenizer, load_tokenizer
from llmtuner.train import workflow
from llmtuner.train.callbacks import peak_memory_gb
from llmtuner.train.flops import flops_per_token, measure_peak_flops
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp

ALL_OFF: Values = dict(flash_attn="sdpa", fused_ops=False, chunked_loss=False)
ABLATIONS: dict[str, Values] = {
    "sdpa attention with a mask": dict(flash_attn="sdpa"),
    "eager attention": dict(flash_attn="disabled"),
    "no fused ops": dict(fused_ops=False),
    "no chunked loss": dict(chunked_loss=False),
    "all off": ALL_OFF,
}
LORA_ONLY: Values = dict(additional_target=[], embedding_learning_rate=None)
VARIANTS: dict[str, Values] = {
    "default": {},
    **ABLATIONS,
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "torch.compile": dict(torch_compile=True),
    "new tokens only": dict(train_new_tokens_only=True),
    "LoRA only": LORA_ONLY,
}
EVALUATE_LATER = dict(val_size=0.02, max_eval_samples=10**9)  # all of it is evaluated after a run
NUM_BATCHES = 4  # of ablation_step_time, all different
WINDOW, SEQUENCES = 1024, 2  # of long dialogues: as many tokens a step as the miniature's 8 sequences of 256
NUM_DRAWN, MEDIAN_BYTES, SIGMA = 3_000, 400, 1.0  # answers of lognormal length, made of the miniature's own
PARTS = ("data", "forward", "backward", "clipping", "optimizer")  # the output layer's gradients are made in the forward
COUNTS = (
    "seconds",
    "tokens",
    "padding",
    "target_tokens",
    "loss",
)  # of a step, by the trainer's meter; tokens with padding


class TimedTrainer(PackedTrainer):
    """Keeps the `COUNTS` of each step and the seconds of its `PARTS`; needs logging_steps 1 and no accumulation."""

    latest: "TimedTrainer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        TimedTrainer.latest = self
        self.steps: list[Values] = []
        self.parts: Any = Counter()  # seconds since the last step
        methods = ((self, "get_batch_samples"), (self, "compute_loss"), (self.accelerator, "backward"))
        for part, (owner, name) in zip(PARTS, (*methods, (self, "_clip_grad_norm")), strict=False):
            setattr(owner, name, self._timed(part, getattr(owner, name)))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.step = self._timed("optimizer", optimizer.step)  # type: ignore[method-assign]
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.meter.update_elapsed()
            self.steps.append({**{name: getattr(self.meter, name) for name in COUNTS}, **self.parts})
            self.steps[-1]["gradient_norm"] = float(logs["grad_norm"])
            self.parts.clear()
        super().log(logs, start_time)

    def _timed(self, part: str, method: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            result = method(*args, **kwargs)
            self.parts[part] += clock() - start
            return result

        return timed


def clock() -> float:
    """Seconds, once a GPU has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_job(file: Path) -> None:
    """Trains and measures; `losses` and `num_target_tokens` are those of each step."""
    job = common.read_results(file)
    settings = job["settings"]
    timing = dict(save_strategy="no", plot_loss=False, logging_steps=1, eval_on_start=False)
    timing |= dict(eval_steps=settings["max_steps"], data_seed=settings["seed"])
    with mock.patch.object(workflow, "PackedTrainer", TimedTrainer), tempfile.TemporaryDirectory() as directory:
        metrics = run_exp({**settings, **timing, "output_dir": directory})
    trainer: Any = TimedTrainer.latest
    steps = {name: numpy.array([step[name] for step in trainer.steps]) for name in trainer.steps[0]}
    sums = {name: float(values[common.WARMUP_STEPS :].sum()) for name, values in steps.items()}
    count, seconds = len(trainer.steps) - common.WARMUP_STEPS, sums["seconds"]
    parts = {part: sums[part] for part in PARTS}
    parts["other"] = seconds - sum(parts.values())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    losses, norms = steps["loss"], steps["gradient_norm"]
    padding_ratio = sums["padding"] / sums["tokens"]
    flop = flops_per_token(trainer.model, trainer.train_dataset.dataset.pack_index.lengths)
    peak = measure_peak_flops(trainer.args.device, torch.bfloat16 if trainer.args.bf16 else torch.float32)
    result = {
        "seconds_per_step": seconds / count,
        **{f"{part}_seconds": spent / count for part, spent in parts.items()},
        "tokens_per_second": sums["tokens"] / seconds,
        "target_tokens_per_second": sums["target_tokens"] / seconds,
        "padding_ratio": padding_ratio,
        "batch_size": settings["per_device_train_batch_size"],
        "trainable_parameters": metrics["trainable_parameters"],
        "optimizer_state_bytes": sum(value.nbytes for value in states if torch.is_tensor(value)),
        "target_tokens": steps["target_tokens"].sum(),
        "eval_loss": metrics["eval_loss"]["last"],
        **{"first_loss": losses[0], "last_loss": losses[-5:].mean(), "first_norm": norms[0], "last_norm": norms[-1]},
        **{"peak_memory_gb": peak_memory_gb(), "flop_per_token": flop, "peak_flop_per_second": peak},
        "utilization": flop * sums["tokens"] / seconds * (1 - padding_ratio) / peak,
        **{f"{part}_fraction": spent / seconds for part, spent in parts.items()},
    }
    curves = {"losses": losses.tolist(), "num_target_tokens": steps["target_tokens"].tolist()}
    atomic_write_json(Path(job["result"]), {name: float(value) for name, value in result.items()} | curves)


def train_in_turn(
    settings: Values, variants: dict[str, Values], options: argparse.Namespace, rate: str, scratch: Path
) -> dict[str, Values]:
    """Trains each variant in turn, in processes of their own; `ratio` is that of `rate` to the first variant's."""

    def run(name: str, number: int) -> Values:
        run_settings = {**settings, "seed": 42 + number, "max_steps": options.steps, **variants[name]}
        job = {"settings": run_settings, "result": str(scratch / "result.json")}
        atomic_write_json(scratch / "job.json", job)
        run_process([sys.executable, "-m", "benchmarks.training", "job", scratch / "job.json"])
        return common.read_results(scratch / "result.json")

    def compare(together: list[Values]) -> None:
        tokens = min(values["target_tokens"] for values in together)
        for values in together:
            values["ratio"] = values[rate] / together[0][rate]
            # In nats per target token, over the second half of as many target tokens in all variants.
            losses, counts = values.pop("losses"), numpy.array(values.pop("num_target_tokens"))
            ends, bounds = counts.cumsum(), (tokens / 2, tokens)
            weights = numpy.clip(ends, *bounds) - numpy.clip(ends - counts, *bounds)
            values["train_loss*"] = float(numpy.average(losses, weights=weights))

    return run_in_turn(variants, options.repeats, run, compare)


def measure_throughput(options: argparse.Namespace, scratch: Path) -> None:
    """Every variant of both stages; each run is a process of its own."""
    import constants

    full_size = options.size != "mini"
    if full_size and not torch.cuda.is_available() and options.layers > 2:
        raise UserError("the full size is for a GPU. Without one, shorten it: --layers 1.")
    shape = dict(num_hidden_layers=options.layers)
    model = random_model(scratch / "model", constants.ZERO_DIR, **shape) if full_size else constants.ZERO_DIR
    for stage in options.stages:
        for window in options.windows or [1024 if full_size else 256]:
            tokens = options.tokens or (16_384 if full_size else 2_048)
            accumulation = max(1, tokens // (4 * window)) if full_size else 1
            batch_size = max(1, tokens // window // accumulation)
            settings = step_settings(stage, options.size) | dict(model_name_or_path=str(model), cutoff_len=window)
            settings |= dict(gradient_accumulation_steps=accumulation, per_device_train_batch_size=batch_size)
            settings |= dict(val_size=0.02, max_eval_samples=8, cache_dir=str(constants.CACHE_DIR))
            variants = {name: VARIANTS[name] for name in options.variants}
            results = train_in_turn(settings, variants, options, "tokens_per_second", scratch)
            name = f"{stage}, {options.size}, windows of {window:,}"
            print_results(f"{name}; ratio: of tokens/s to the first line", results)
            layers = {"layers": options.layers} if full_size else {}
            save_results(options.output, {**layers, "results": results}, name)


def random_model(directory: Path, base: Path, device: str = "cpu", **shape: int) -> Path:
    """Writes a model of ChatGLM3-6B's shape, with changes, with random weights in bf16 and the tokenizer of `base`."""
    from transformers import AutoConfig, GlmForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.update({**common.CHATGLM3_6B, "max_position_embeddings": 8192, **shape})
    torch.manual_seed(0)
    with torch.device(device):
        GlmForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    copy_tokenizer(base, directory)
    return directory


def fastest(function: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of several calls."""
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        function()
        best = min(best, clock() - start)
    return best


def measure_ablation_step_time(options: argparse.Namespace, _: Path) -> None:
    """One step with each variant in turn, on the same batches with the same, unchanged weights; in fp32."""
    results: dict[str, dict[str, Values]] = {}
    variants = {"all on": {}, **ABLATIONS}
    for window in options.windows or [256, 1024]:
        batches = first_batches(window, options.tokens or 2_048)
        steps = {name: training_step(settings) for name, settings in variants.items()}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for number in tqdm(range(options.steps), f"windows of {window}", unit=" steps"):
            for name, step in steps.items():
                runs[name].append(step(batches[number % NUM_BATCHES]))
        results[f"{window:,}"] = {}
        for name, run in runs.items():
            pairs = list(zip(runs["all on"], run, strict=True))[common.WARMUP_STEPS :]
            ratio = median(on[1] / step[1] for on, step in pairs)
            milliseconds = 1e3 * median(step[1] for _, step in pairs)
            results[f"{window:,}"][name] = {"ratio": ratio, "milliseconds": milliseconds, "loss": run[0][0]}
        print_results(f"windows of {window:,}", results[f"{window:,}"])
    save_results(options.output, {"results": results})


def first_batches(window: int, tokens: int) -> list[Values]:
    """The first `NUM_BATCHES` of step 5, of `tokens` each."""
    import constants

    with tempfile.TemporaryDirectory() as scratch:
        settings = {**step_settings("pt"), "cutoff_len": window, "output_dir": scratch}
        train_args = get_train_args(settings)
    tokenizer = load_tokenizer(constants.ZERO_DIR)
    sequences = get_dataset("pt", train_args.data, train_args.training.seed, tokenizer).train
    size, collate = tokens // window, PackedDataCollator(tokenizer.pad_token_id)
    return [collate([sequences[batch * size + row] for row in range(size)]) for batch in range(NUM_BATCHES)]


def training_step(settings: Values) -> Callable[[Values], tuple[float, float]]:
    """A function that computes loss and gradients of a batch and returns the loss and the seconds that it took."""
    import constants

    attention = ATTN_IMPLEMENTATIONS[settings.get("flash_attn", "auto")] or default_attention(constants.ZERO_DIR)
    settings = {name: value for name, value in settings.items() if name != "flash_attn"}
    finetuning = FinetuningArguments(lora_rank=32, additional_target=["embed_tokens", "lm_head"], **settings)
    model = init_adapter(load_model(constants.ZERO_DIR, torch.float32, attention), finetuning).train()
    if finetuning.fused_ops:
        apply_fused_ops(model)
    compute_loss = loss_function(model, finetuning)

    def step(batch: Values) -> tuple[float, float]:
        start = time.perf_counter()
        loss, num_target_tokens = compute_loss(batch)
        (loss / num_target_tokens).backward()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return float(loss.detach() / num_target_tokens), seconds

    return step


def loss_function(model: Any, finetuning: FinetuningArguments) -> Callable[[Values], tuple[torch.Tensor, int]]:
    """The trainer's own loss of a batch, summed over target tokens, and their number, without a Trainer around it."""
    attention = model.config._attn_implementation
    trainer: Any = SimpleNamespace(model=model, finetuning_args=finetuning, attention=attention)
    return lambda batch: PackedTrainer._compute_loss_sum(trainer, model, batch)


def measure_ablation_loss(options: argparse.Namespace, scratch: Path) -> None:
    """The whole of step 5 twice on the same batches; in fp32 on a CPU only the order of additions differs."""
    settings = {**step_settings("pt"), "bf16": False, "save_strategy": "no", "plot_loss": False, "logging_steps": 1}
    if options.steps:
        settings["max_steps"] = options.steps
    curves = {}
    for name, changes in {"on": {}, "off": ALL_OFF}.items():
        print0(f"all optimizations {name}")
        curves[name] = loss_curve({**settings, **changes}, scratch)
    on, off = (numpy.array(curve["loss"]) for curve in curves.values())
    difference = numpy.abs(on - off) / off
    for step in numpy.linspace(0, len(on) - 1, 10, dtype=int):
        largest = difference[: step + 1].max()
        print0(f"step {step + 1:,}: {on[step]:.4f} / {off[step]:.4f}, largest relative difference so far {largest:.1e}")
    for key in ("eval_loss", "tokens_per_second"):
        print0(f"{key}: { ({name: curve[key] for name, curve in curves.items()}) }")
    save_results(options.output, {"max_relative_difference": float(difference.max()), "curves": curves})
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        steps = range(1, len(curve["loss"]) + 1)
        axes.plot(steps, curve["loss"], style, linewidth=1.2, label=f"all optimizations {name}")
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="Step 5 on the miniature")
    axes.legend(frameon=False)
    figure.savefig(options.output.with_suffix(".png"), dpi=120)


def loss_curve(settings: Values, scratch: Path) -> Values:
    """Training and eval losses of a run, and the median of its throughput."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    atomic_write_json(directory / "settings.json", {**settings, "output_dir": str(directory / "run")})
    run_process([sys.executable, "-m", "llmtuner", "train", directory / "settings.json"])
    lines = (directory / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    steps = [line for line in log if "loss" in line]
    return {
        "loss": [line["loss"] for line in steps],
        "eval_loss": [line["eval_loss"] for line in log if "eval_loss" in line],
        "tokens_per_second": float(numpy.median([line["tokens_per_second"] for line in steps])),
    }


def measure_precision(options: argparse.Namespace, scratch: Path) -> None:
    """How far losses in bf16 are from those of fp32, with each optimization alone; a mean over seeds."""
    quiet = dict(save_strategy="no", plot_loss=False, logging_steps=1, eval_strategy="no", eval_on_start=False)
    settings = {**step_settings("pt"), **quiet, "max_steps": options.steps}
    alone = {name: {key: value for key, value in ALL_OFF.items() if key != name} for name in ALL_OFF}
    variants = {"plain autocast": ALL_OFF, **alone, "all on": {}}
    results: dict[str, Values] = {name: {"largest": [], "mean": [], "bias": []} for name in variants}
    for seed in tqdm(range(42, 42 + options.repeats), unit="seed"):
        exact = numpy.array(loss_curve({**settings, **ALL_OFF, "bf16": False, "seed": seed}, scratch)["loss"])
        for name, changes in variants.items():
            errors = numpy.array(loss_curve({**settings, **changes, "seed": seed}, scratch)["loss"]) - exact
            found = {"largest": numpy.abs(errors).max(), "mean": numpy.abs(errors).mean(), "bias": errors.mean()}
            for key, value in found.items():
                results[name][key].append(float(value))
    means = {name: {key: float(numpy.mean(values)) for key, values in found.items()} for name, found in results.items()}
    print_results(f"loss in bf16 - loss in fp32 over {options.steps} steps", means)
    save_results(options.output, {"steps": options.steps, "repeats": options.repeats, "results": results})


def measure_packing(options: argparse.Namespace, scratch: Path) -> Values:
    """Packed against padded, one dialogue per row, as many dialogues a step on average; on two kinds of dialogues."""
    what, varied = varied_dialogues(options.corpora, scratch)
    step6 = step_settings("sft") | EVALUATE_LATER
    results: Values = {}
    for name, settings in (("the miniature's sets", step6), (what, {**step6, **varied})):
        data_args = get_train_args({**settings, "output_dir": str(scratch)}).data
        pool, trained, _ = load_tokenized_datasets(data_args, "sft", load_tokenizer(settings["model_name_or_path"]))
        segments = pack_best_fit(numpy.concatenate(trained), pool, data_args.cutoff_len)
        per_sequence = len(segments.doc_ids) / (int(segments.sequence_ids[-1]) + 1)
        dialogues = round(settings["per_device_train_batch_size"] * per_sequence)
        variants = {"padded": dict(packing=False, per_device_train_batch_size=dialogues), "packed": {}}
        measured = train_in_turn(settings, variants, options, "target_tokens_per_second", scratch)
        lengths = {f"p{percent}": int(numpy.percentile(pool.lengths, percent)) for percent in (10, 50, 90, 99, 100)}
        results[name] = {"cutoff_len": data_args.cutoff_len, "dialogue_tokens": lengths, **measured}
        title = f"{name}: {dialogues} dialogues a step, {data_args.cutoff_len} tokens, lengths {lengths}"
        print_results(title, measured)
    print0("* of the second half of as many target tokens in both")
    return results


def varied_dialogues(corpora: Path | None, scratch: Path) -> tuple[str, Values]:
    """Dialogues whose lengths vary widely: what they are, and the settings of a run on them."""
    import constants

    atomic_write_json(scratch / "dataset_info.json", {"dialogues": {"file_name": "dialogues.jsonl"}})
    settings: Values = dict(dataset=["dialogues"], dataset_dir=str(scratch), cache_dir=str(scratch / "cache"))
    settings |= dict(corpus_dir=str(scratch), cutoff_len=WINDOW, per_device_train_batch_size=SEQUENCES)
    if corpora and (corpora / "dialogues.jsonl").is_file():
        return "dialogues.jsonl", {**settings, "corpus_dir": str(corpora)}
    print0("--corpora has no dialogues.jsonl: dialogues are made of the miniature's answers.")
    source = get_dataset_attr("dolly_ja", constants.DATASET_INFO, constants.CORPUS_DIR)
    rows, draw = [row.values for row in read_rows(source)], random.Random(0)
    with (scratch / "dialogues.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(NUM_DRAWN):
            answer, size = "", draw.lognormvariate(math.log(MEDIAN_BYTES), SIGMA)
            while len(answer.encode()) < size:
                answer += draw.choice(rows)["output"]
            lines.write(json.dumps({"instruction": draw.choice(rows)["instruction"], "output": answer}) + "\n")
    return f"answers of lognormal length, median {MEDIAN_BYTES} bytes, sigma {SIGMA}", settings


def measure_embeddings(options: argparse.Namespace, scratch: Path) -> Values:
    """LoRA with both embedding matrices, or their new rows, against LoRA only, on the same batches."""
    variants = {"LoRA": LORA_ONLY, "LoRA + new tokens": dict(train_new_tokens_only=True), "LoRA + embeddings": {}}
    settings = step_settings("sft") | EVALUATE_LATER
    results = train_in_turn(settings, variants, options, "seconds_per_step", scratch)
    print_results("embeddings beside LoRA", results)
    return results


def measure_second_start(options: argparse.Namespace, scratch: Path) -> Values:
    """Seconds until step 5's dataset is ready to be packed, and from its start to its first step: first and again."""
    import constants

    base = {**step_settings("pt"), **common.TRAIN_ONLY, "max_steps": 1}
    base["model_name_or_path"] = str(constants.PT_MERGED_DIR)
    tokenizer, corpora = load_tokenizer(constants.PT_MERGED_DIR), {"the miniature's texts": constants.CORPUS_DIR}
    if options.corpora:
        corpora["texts of --corpora"] = options.corpora.resolve()

    def run(name: str, number: int) -> Values:
        directory, values = scratch / f"{name} {number}", {}
        for when in ("first", "again"):
            settings = {**base, "corpus_dir": str(corpora[name]), "output_dir": str(directory / when)}
            data_args = get_train_args({**settings, "cache_dir": str(directory / "data")}).data
            start = time.perf_counter()
            pool, *_ = load_tokenized_datasets(data_args, "pt", tokenizer)
            values[f"data_{when}"] = time.perf_counter() - start
            atomic_write_json(directory / "training_args.json", {**settings, "cache_dir": str(directory / "process")})
            start = time.time()
            run_process([sys.executable, "-m", "llmtuner", "train", directory / "training_args.json"])
            # trainer_log.jsonl is last written when the only step has been made.
            values[f"step_1_{when}"] = (directory / when / "trainer_log.jsonl").stat().st_mtime - start
        values |= {f"{what}_ratio": values[f"{what}_again"] / values[f"{what}_first"] for what in ("data", "step_1")}
        shutil.rmtree(directory)  # token ids of all rounds would fill a small disk
        return {"tokens": int(pool.lengths.sum()), **values}

    results = run_in_turn(corpora, options.repeats, run)
    print_results("a second start with cached token ids (seconds)", results)
    return results


def main() -> None:
    if sys.argv[1:2] == ["job"]:  # a process of `train_in_turn`
        return run_job(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(measure: Callable, needs: str, results: str, **defaults: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(measure.__name__.removeprefix("measure_"), help=measure.__doc__)
        common.add_options(command, f"{results}.json", work_dir=None, **defaults)
        command.set_defaults(measure=measure, needs=needs)
        return command

    throughput = add(measure_throughput, "ZERO_DIR", "train_throughput", steps=20, repeats=3)
    throughput.add_argument("--size", choices=("mini", "chatglm3-6b"), default="mini")
    throughput.add_argument("--layers", type=int, default=28, help="of the full size")
    throughput.add_argument("--stages", nargs="+", choices=("pt", "sft"), default=["pt", "sft"])
    throughput.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for command in (throughput, add(measure_ablation_step_time, "ZERO_DIR", "ablation_step_time", steps=40)):
        command.add_argument("--windows", type=int, nargs="+", help="tokens in a sequence (default: the profile's)")
        command.add_argument("--tokens", type=int, help="of a step (default: 2,048, of the full size 16,384)")
    add(measure_ablation_loss, "ZERO_DIR", "ablation_loss", steps=None)
    add(measure_precision, "ZERO_DIR", "precision", steps=20, repeats=3)
    add(measure_packing, "PT_MERGED_DIR", "training_costs", steps=60, repeats=5, corpora=None)
    add(measure_embeddings, "PT_MERGED_DIR", "training_costs", steps=60, repeats=5)
    add(measure_second_start, "PT_MERGED_DIR", "training_costs", steps=60, repeats=5, corpora=None)
    options = parser.parse_args()
    if options.steps is not None and options.steps <= common.WARMUP_STEPS:
        raise UserError(f"nothing would be timed. Give more than {common.WARMUP_STEPS} --steps.")
    common.use_work_dir(options.work_dir, options.needs)
    with tempfile.TemporaryDirectory() as scratch:
        results = options.measure(options, Path(scratch))
    if results:  # of training_costs.json
        rounds = {"steps": options.steps, "repeats": options.repeats}
        save_results(options.output, {**rounds, "results": results}, options.measure.__name__.removeprefix("measure_"))
    return None


if __name__ == "__main__":
    run_cli(main)
