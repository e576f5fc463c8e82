"""A dry run: does once, in small, all that a run will do, and prints what the run will take."""

import copy
import math
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llmtuner.console import TrainingInterrupted, UserError, is_rank_zero, print0, print_header
from llmtuner.data.loader import DatasetModule
from llmtuner.hparams import TrainArgs
from llmtuner.report.environment import device_name
from llmtuner.train.callbacks import GracefulStopSignal, peak_memory_gb
from llmtuner.train.checkpointing import (
    DRY_RUN_DIR,
    check_shared,
    checkpoint_step,
    prepare_output_dir,
    remove_dry_run,
    verify_checkpoint,
)
from llmtuner.train.memory import MemoryEstimate
from llmtuner.train.process import release_memory
from llmtuner.train.resume import find_resume_checkpoint
from llmtuner.train.schedule import WSD
from llmtuner.train.self_check import SelfCheckCallback
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.workflow import (
    build_trainer,
    global_batch_size,
    load_data,
    planned_steps,
    prepare_model,
    run_fingerprint,
)

TIMED_SECONDS, MIN_TIMED_STEPS, MAX_TIMED_STEPS = 4, 2, 50
RESUME_TOLERANCE = (
    1e-3  # of the loss of the step after a checkpoint, relative: kernels on GPUs may sum in another order
)


@dataclass
class Trial(TrainerCallback):
    """Makes a few steps of a run, and measures them.

    Args:
        trainer: makes the steps.
        num_steps: how many; None: one, with a checkpoint, then as many as `TIMED_SECONDS` hold.
    """

    trainer: PackedTrainer
    num_steps: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    loss_sums: dict[int, float] = field(default_factory=dict)
    """Step -> sum of the losses of all steps up to it."""
    save_seconds: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loss_sums[state.global_step] = (
            self.trainer.meter.loss
        )  # the sum is on the CPU: the step's products are done
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_end = time.perf_counter()
        self.step_seconds.append(self.step_end - self.begin)
        self.begin = self.step_end
        control.should_save = self.num_steps is None and len(self.step_seconds) == 1
        control.should_training_stop = self._is_done()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = time.perf_counter()
        self.save_seconds = self.begin - self.step_end

    def _is_done(self) -> bool:
        """Tells whether enough steps have been made; all ranks follow the clock of rank 0."""
        if self.trainer.should_stop or self.num_steps is not None:
            return self.trainer.should_stop or len(self.step_seconds) >= (self.num_steps or 0)
        timed = self.step_seconds[1:]
        is_done = [len(timed) >= MIN_TIMED_STEPS and (sum(timed) >= TIMED_SECONDS or len(timed) >= MAX_TIMED_STEPS)]
        if self.trainer.args.world_size > 1:
            broadcast_object_list(is_done)
        return is_done[0]


def dry_run(
    args: TrainArgs,
    restart: Callable[[], TrainArgs],
    texts: dict[str, list[str]],
    merged_bytes: Callable[[Path, Path], int],
) -> dict[str, Any]:
    """Checks everything that a run needs, measures its parts, and prints one table; only tokenized data are kept.

    On the real model and data: the self-check, a checkpoint after the first step, timed steps, an evaluation; then, as after
    a restart, the model again, resumed from the checkpoint; then the plan of the merge.

    Args:
        args: of the run, whose process has joined the others.
        restart: joins them again, as a second start of the run does, and returns its arguments.
        texts: as of `run_exp`.
        merged_bytes: (base, adapter) -> bytes of the merged model; raises if they do not go together.

    Returns:
        the figures of the table.

    Raises:
        UserError: for what would stop the run: data, model, memory, disk, a checkpoint that cannot be resumed.
        TrainingInterrupted: on Ctrl-C.
    """
    start = time.perf_counter()
    if not args.training.do_train:
        raise UserError("dry_run measures training, and do_train is false. Leave one of them out.")
    tokenizer, dataset, _ = load_data(args, args.finetuning.stage)
    output_dir = Path(args.training.output_dir or ".")
    settings = run_fingerprint(args, dataset.train)
    checkpoint = find_resume_checkpoint(args, settings, planned_steps(args.training, dataset.train))
    if args.training.world_size > 1:
        check_shared(output_dir, checkpoint)
    try:
        if is_rank_zero():
            prepare_output_dir(output_dir / DRY_RUN_DIR, overwrite=False)
        figures, first_checkpoint = _first_start(args, tokenizer, dataset, texts, settings)
        _second_start(restart(), tokenizer, dataset, settings, first_checkpoint, figures)
        base = Path(args.model.model_name_or_path)
        figures["merged_gb"] = (merged_bytes(base, first_checkpoint) if is_rank_zero() else 0) / 1e9
        figures["startup_seconds"] = figures.pop("first_step_at") - start
    finally:
        if is_rank_zero():
            remove_dry_run(output_dir)
    plan = _plan(args, dataset, figures, checkpoint_step(checkpoint) if checkpoint else 0)
    print_header("dry run: what this run will take")
    print0("\n".join(f"{name:<12} {text}" for name, text in _table(args, plan).items()))
    if problems := _problems(args, plan):
        raise UserError("not ready:\n  - " + "\n  - ".join(problems))
    print0(f"\nready; the dry run took {time.perf_counter() - start:.0f} s and left only the tokenized data")
    return plan


def _first_start(
    args: TrainArgs, tokenizer: Any, dataset: DatasetModule, texts: dict[str, list[str]], settings: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """Makes the first steps, a checkpoint and an evaluation; returns what was measured, and the checkpoint."""
    estimate: MemoryEstimate | None
    model, estimate = prepare_model(args)
    with GracefulStopSignal() as stop:
        trainer = _trial_trainer(args, model, tokenizer, dataset, texts, settings, stop)
        trial = Trial(trainer)
        trainer.add_callback(trial)
        trainer.train()
        _raise_if_stopped(trainer)
        target_tokens, (tokens, padding, _) = trainer.meter.target_tokens, trainer.flush_token_counts()
        evaluation = 0.0
        if trainer.eval_dataset is not None:
            begin = time.perf_counter()
            trainer.evaluate()
            evaluation = time.perf_counter() - begin
    step_begin = trial.step_end - sum(trial.step_seconds[1:])  # of the second step, but for the time of saving
    checkpoint = trainer.output_dir / "checkpoint-1"
    damage = [verify_checkpoint(checkpoint) if is_rank_zero() else ""]
    if args.training.world_size > 1:
        broadcast_object_list(damage)
    if damage[0]:
        raise UserError(f"a checkpoint in {trainer.output_dir} failed verification: {damage[0]}. Check the disk.")
    timed, utilization = trial.step_seconds[1:], trainer.utilization
    total_seconds = sum(trial.step_seconds) * args.training.world_size
    mean = statistics.mean(timed)
    figures = {
        "first_step_at": step_begin - trial.save_seconds - trial.step_seconds[0],
        "timed_steps": len(timed),
        "step_seconds": [min(timed), mean, max(timed)],
        "eval_seconds": evaluation,
        "save_seconds": trial.save_seconds,
        "checkpoint_gb": _size_gb(checkpoint),
        "adapter_gb": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) / 1e9,
        "target_ratio": target_tokens / max(tokens, 1),
        "padding_ratio": padding / max(tokens, 1),
        "peak_memory_gb": max(gather_object([peak_memory_gb()])),
        "estimate": estimate,
        "loss_sums": trial.loss_sums,
        "save_steps": trainer.state.save_steps if args.training.save_strategy == SaveStrategy.STEPS else 0,
    }
    if utilization:
        mfu = utilization.mfu(tokens - padding, target_tokens, total_seconds)
        figures["mfu"] = mfu * statistics.mean(trial.step_seconds) / mean  # of the timed steps
    trainer.accelerator.free_memory()
    return figures, checkpoint


def _second_start(
    args: TrainArgs,
    tokenizer: Any,
    dataset: DatasetModule,
    settings: dict[str, Any],
    checkpoint: Path,
    figures: dict[str, Any],
) -> None:
    """Loads the model again and repeats the second step from the checkpoint of the first.

    Raises:
        UserError: if that step has another loss than before.
    """
    release_memory()
    model, _ = prepare_model(args)
    with GracefulStopSignal() as stop:
        trainer = _trial_trainer(args, model, tokenizer, dataset, {}, settings, stop)
        trial = Trial(trainer, num_steps=1)
        trainer.add_callback(trial)
        trainer.resume_from_checkpoint(checkpoint, planned_steps(args.training, dataset.train))
        _raise_if_stopped(trainer)
    before, after = figures.pop("loss_sums")[2], trial.loss_sums[2]
    figures["resume_difference"] = abs(after - before)
    trainer.accelerator.free_memory()
    if not abs(after - before) <= RESUME_TOLERANCE * max(abs(before), 1):
        raise UserError(
            f"a run that is resumed learns something else: the losses of its first two steps sum to {before:.6f} without an "
            f"interruption, and to {after:.6f} with one after the first step. Report this with the settings of the run."
        )


def _trial_trainer(
    args: TrainArgs,
    model: torch.nn.Module,
    tokenizer: Any,
    dataset: DatasetModule,
    texts: dict[str, list[str]],
    settings: dict[str, Any],
    stop: GracefulStopSignal,
) -> PackedTrainer:
    """Makes the trainer of the run, which saves, evaluates and logs only when it is told to, in a directory of its own."""
    training = copy.copy(args.training)
    training.output_dir = str(Path(training.output_dir or ".") / DRY_RUN_DIR)
    training.eval_strategy, training.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    training.logging_strategy, training.logging_first_step = IntervalStrategy.NO, False
    training.eval_on_start, training.report_to, training.resume_from_checkpoint = False, [], None
    finetuning = replace(
        args.finetuning,
        metric_for_best_model=None,
        load_best_model_at_end=False,
        early_stopping_steps=None,
        save_minutes=None,
    )
    trial_args = replace(args, training=training, finetuning=finetuning)
    trainer = build_trainer(trial_args, model, tokenizer, dataset, settings, texts, stop)
    trainer.add_callback(SelfCheckCallback(trainer, tokenizer, args.data.packing and args.data.neat_packing))
    return trainer


def _raise_if_stopped(trainer: PackedTrainer) -> None:
    if trainer.should_stop:
        raise TrainingInterrupted(
            "the dry run was stopped and left only the tokenized data.", trainer.stop_signal.received
        )


def _size_gb(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e9


def _plan(args: TrainArgs, dataset: DatasetModule, figures: dict[str, Any], steps_done: int) -> dict[str, Any]:
    """Computes what the run will take from what was measured."""
    training, train = args.training, dataset.train
    per_epoch = -(-len(train) // global_batch_size(training))
    steps = planned_steps(training, train)
    left, tokens = steps - steps_done, round(train.num_tokens * steps / per_epoch)
    evaluations, saves = _num_evaluations(training, left, steps, per_epoch, steps_done), 0
    if training.save_strategy != SaveStrategy.NO:
        interval = figures["save_steps"] or per_epoch
        interval = math.ceil(interval * steps) if interval < 1 else interval
        saves = -(-left // interval)
        if minutes := args.finetuning.save_minutes:
            saves = max(saves, int(left * figures["step_seconds"][1] / (60 * minutes)))
    hours = [
        (
            figures["startup_seconds"]
            + left * seconds
            + evaluations * figures["eval_seconds"]
            + saves * figures["save_seconds"]
        )
        / 3600
        for seconds in figures["step_seconds"]
    ]
    price = args.finetuning.price_per_hour
    kept = min(saves, training.save_total_limit or saves) + (1 if saves else 0)  # one more while it is being written
    kept += bool(args.finetuning.metric_for_best_model or args.finetuning.load_best_model_at_end)
    kept += bool(saves) and training.lr_scheduler_type == WSD  # the one from before the decay
    disk = kept * figures["checkpoint_gb"] + figures["adapter_gb"] + figures["merged_gb"]
    lost = interval * figures["step_seconds"][1] / 60 if saves else 60 * hours[1]
    lost = min(lost, args.finetuning.save_minutes or math.inf)
    output_dir = Path(training.output_dir or ".")
    return {
        **figures,
        "documents": len(set(train.pack_index.doc_ids.tolist())),
        "sequences": len(train),
        "steps": steps,
        "steps_done": steps_done,
        "tokens": tokens,
        "target_tokens": round(tokens * figures["target_ratio"]),
        "tokens_per_second": tokens / steps / figures["step_seconds"][1],
        "evaluations": evaluations,
        "saves": saves,
        "checkpoints_kept": kept,
        "hours": hours,
        "cost": [price * training.world_size * value for value in hours] if price is not None else None,
        "disk_gb": disk,
        "free_gb": shutil.disk_usage(output_dir if output_dir.exists() else output_dir.parent).free / 1e9,
        "minutes_lost": lost,
        "device_gb": _device_gb(),
    }


def _num_evaluations(training: Any, left: int, steps: int, per_epoch: int, steps_done: int) -> int:
    """Returns how many evaluations a run makes from here on."""
    if training.eval_strategy == IntervalStrategy.NO:
        return 0
    interval = (
        (training.eval_steps or training.logging_steps)
        if training.eval_strategy == IntervalStrategy.STEPS
        else per_epoch
    )
    interval = math.ceil(interval * steps) if interval < 1 else interval
    return math.ceil(left / interval) + (training.eval_on_start and not steps_done)


def _device_gb() -> float:
    """Returns the memory of the GPU, or of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
    return resource.getpagesize() * os.sysconf("SC_PHYS_PAGES") / 1e9


def _table(args: TrainArgs, plan: dict[str, Any]) -> dict[str, str]:
    """Puts the figures into words: name of a row -> text."""
    training, estimate = args.training, plan["estimate"]
    fastest, mean, slowest = plan["step_seconds"]
    processes = training.world_size
    return {
        "device": f"{processes} x {device_name()}" if processes > 1 else device_name(),
        "documents": f"{plan['documents']:,} in {plan['sequences']:,} sequences of up to {args.data.cutoff_len:,} tokens",
        "steps": f"{plan['steps']:,} of {global_batch_size(training):,} sequences"
        + (f", {plan['steps_done']:,} of them done" if plan["steps_done"] else ""),
        "tokens": f"{plan['tokens']:,}, about {plan['target_tokens']:,} of them targets; {plan['padding_ratio']:.1%} padding",
        "memory": f"{plan['peak_memory_gb']:.1f} GB at most, of {plan['device_gb']:.1f} GB"
        + (f"; estimated {estimate.total / 1e9:.1f} GB" if estimate else ""),
        "a step": f"{mean:.3g} s ({fastest:.3g} to {slowest:.3g} s, {plan['timed_steps']} steps)",
        "speed": f"{plan['tokens_per_second']:,.0f} tokens/s" + (f", MFU {plan['mfu']:.0%}" if "mfu" in plan else ""),
        "time": f"{_duration(plan['hours'][1])} ({_duration(plan['hours'][0])} to {_duration(plan['hours'][2])})"
        f", with {plan['evaluations']} evaluations of {plan['eval_seconds']:.3g} s",
        "cost": "set --price_per_hour"
        if plan["cost"] is None
        else "{1:,.2f} ({0:,.2f} to {2:,.2f})".format(*plan["cost"]),
        "checkpoints": f"{plan['saves']} of {_gigabytes(plan['checkpoint_gb'])}, {plan['save_seconds']:.2g} s each; resumed from "
        f"one, the loss differs by {plan['resume_difference']:.0e}",
        "disk": f"{_gigabytes(plan['disk_gb'])} at most ({plan['checkpoints_kept']} checkpoints, adapter, merged model), of "
        f"{_gigabytes(plan['free_gb'])} free",
        "killed": f"loses at most {_duration(plan['minutes_lost'] / 60)}",
        "log": _describe_log(args),
    }


def _describe_log(args: TrainArgs) -> str:
    trackers = [name for name in args.training.report_to or [] if name != "none"]
    log = Path(args.training.output_dir or ".") / "trainer_log.jsonl"
    return f"{', '.join([str(log), *trackers])}, every {args.training.logging_steps:g} steps"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _gigabytes(size: float) -> str:
    return f"{size:,.1f} GB" if size >= 1 else f"{1000 * size:,.0f} MB"


def _problems(args: TrainArgs, plan: dict[str, Any]) -> list[str]:
    """Returns what would stop the run later, and what to change."""
    problems = []
    if plan["disk_gb"] > plan["free_gb"]:
        hint = "Free some, or write to another disk (output_dir; steps: WORK_DIR)"
        if plan["checkpoints_kept"] > 2:
            hint += f"; save_total_limit: 1 would need {plan['checkpoint_gb'] * (plan['checkpoints_kept'] - 2):,.1f} GB less"
        problems.append(
            f"the run needs {_gigabytes(plan['disk_gb'])} of disk, and {_gigabytes(plan['free_gb'])} are free. {hint}."
        )
    return problems
