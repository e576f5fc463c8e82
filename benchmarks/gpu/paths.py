"""The part of the GPU benchmark that runs the trainer itself, where it takes a path that a CPU does not take."""

import importlib.util
import json
import math
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import scaling
from benchmarks.common import ROOT, Values
from benchmarks.gpu.measuring import Part
from benchmarks.training import random_model
from llmtuner.eval.bits_per_byte import bpb_by_language
from llmtuner.eval.generation import generate_answers
from llmtuner.model.loading import load_for_evaluation
from llmtuner.train.callbacks import peak_memory_gb
from llmtuner.train.tuner import run_exp
from llmtuner.weights.merge_lora import merge_adapter

BASE = ROOT / "mini" / "base"
STEPS = 6


def measure_paths(part: Part) -> None:
    """Runs at two layers of full width and 8,192 rows; in miniature, at those of the miniature's base."""
    paths = {
        "evaluation alone": evaluate_alone,
        "training, then evaluation": train_then_evaluate,
        "generation": generate,
        "DDP, one process": train_in_one_process,
        "ZeRO-2, one process": partial(train_in_one_process, deepspeed=str(ROOT / "ds_config_zero2.json")),
        "checkpoint and resume": stop_and_resume,
        "fp16": train_in_fp16,
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shape = dict(num_hidden_layers=2, vocab_size=8_192)
        model = BASE if part.tiny else random_model(directory / "model", BASE, part.device, **shape)
        settings = scaling.small_run(directory, model)
        settings |= dict(
            val_size=0.02, max_eval_samples=8, max_steps=STEPS, bf16=True, logging_steps=1, report_to="none"
        )
        settings |= dict(cutoff_len=64 if part.tiny else 1_024, use_cpu=part.device == "cpu")
        for number, (path, function) in enumerate(paths.items()):
            output_dir = directory / f"run{number}"
            part.measure(path, partial(function, {**settings, "output_dir": str(output_dir)}, output_dir))


def evaluate_alone(settings: Values, _: Path) -> Values:
    return run_exp({**settings, "do_train": False, "do_eval": True})


def train_then_evaluate(settings: Values, output_dir: Path) -> Values:
    """Trains, merges and evaluates as step 5 does; what training leaves in the GPU's memory, and the peak of evaluation."""
    metrics = run_exp({**settings, "eval_strategy": "steps", "eval_steps": STEPS, "eval_on_start": True})
    values: Values = {"eval_loss": metrics["eval_loss"]["last"], "training_peak_gb": peak_memory_gb()}
    if torch.cuda.is_available():
        values["left_gb"] = torch.cuda.memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    merged = output_dir.with_name("merged")
    merge_adapter(Path(settings["model_name_or_path"]), output_dir, merged)
    model, tokenizer = load_for_evaluation(merged)
    texts = {"zh": ["从前有一座山，山上住着一位木匠。"] * 16}
    bits = bpb_by_language(model, tokenizer, texts, settings["cutoff_len"], "after")["zh"]
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    return values | {"weights_gb": weights, "evaluation_peak_gb": peak_memory_gb(), "bits_per_byte": finite(bits)}


def generate(settings: Values, _: Path) -> Values:
    model, tokenizer = load_for_evaluation(settings["model_name_or_path"])
    generated = generate_answers(model, tokenizer, ["从前有一座山？", "小镇？"] * 8, max_new_tokens=16)
    return {"answers": len(generated.answers), "tokens_per_second": generated.tokens_per_second}


def train_in_one_process(settings: Values, output_dir: Path, **changes: str) -> Values:
    """Trains under torchrun in a single process, on a GPU with NCCL."""
    if "deepspeed" in changes and not importlib.util.find_spec("deepspeed"):
        return {"skipped": "DeepSpeed is not installed"}
    variables = {"DS_ACCELERATOR": "cpu"} if settings["use_cpu"] else {}
    done = scaling.launch({**settings, **changes}, 1, **variables)
    return {"loss": finite(losses_of(output_dir)[STEPS]), "process_seconds": done.seconds}


def stop_and_resume(settings: Values, output_dir: Path) -> Values:
    """The largest difference between losses of a run, and of the same run resumed from a checkpoint in its middle."""
    settings = {**settings, "save_strategy": "steps", "save_steps": STEPS // 2, "additional_target": []}
    curves = []
    for _ in range(2):
        run_exp(settings)
        curves.append(losses_of(output_dir))
        shutil.rmtree(output_dir / f"checkpoint-{STEPS}")
    first, second = curves
    return {"largest_difference": max(abs(first[step] - second[step]) for step in first)}


def train_in_fp16(settings: Values, output_dir: Path) -> Values:
    run_exp({**settings, "bf16": False, "fp16": True})
    return {"loss": finite(losses_of(output_dir)[STEPS])}


def losses_of(output_dir: Path) -> dict[int, float]:
    """The logged loss of each step."""
    log = map(json.loads, (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in log if "loss" in line}


def finite(value: Any) -> float:
    """A number that is neither infinite nor NaN."""
    if not math.isfinite(value):
        raise ArithmeticError(f"it is {value}")
    return value
