"""Chooses micro-batch and gradient checkpointing of a step that fits into a GPU's memory, or says what would fit."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainingArguments

from llmtuner.console import UserError
from llmtuner.hparams import EMBEDDING_MODULES, TrainArgs
from llmtuner.model.model_dir import APPENDED_ROWS
from llmtuner.train.memory import (
    MemoryEstimate,
    StepEstimator,
    make_skeleton,
    sequences_per_step,
    state_bytes_per_parameter,
)

MEMORY_FRACTION = 0.9  # of a GPU's memory; the rest is left to fragmentation and to the kernels' own buffers


def free_memory() -> int | None:
    """Returns the bytes of the GPU that this process can use beside its tensors, or None without a GPU.

    A CPU's memory is seldom what is short.
    """
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


@dataclass(frozen=True)
class StepSettings:
    """Settings that change memory and speed of a step, but not what is learned."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool

    def changes(self, training_args: TrainingArguments) -> dict[str, Any]:
        """Returns those that differ from a run's."""
        return {name: value for name, value in vars(self).items() if (getattr(training_args, name) or False) != value}

    def __str__(self) -> str:
        size = f"micro-batch {self.per_device_train_batch_size} x {self.gradient_accumulation_steps}"
        return f"{size}, gradient checkpointing {'on' if self.gradient_checkpointing else 'off'}"


def choose_step_settings(estimator: StepEstimator, available: int) -> tuple[StepSettings, MemoryEstimate]:
    """Returns `find_step_settings`.

    Raises:
        UserError: if no step fits; it names settings with which one would.
    """
    if found := find_step_settings(estimator, available):
        return found
    settings, estimate = _smallest(estimator)
    proposals = list(_propose(estimator, available))
    advice = "\n  - ".join(["This would fit:", *proposals])
    if not proposals:
        advice = "Smaller micro-batches and an 8-bit optimizer would not be enough: train on a larger GPU."
    raise UserError(
        f"a step with {settings} needs about {estimate}, more than the {available / 1e9:.1f} GB that a GPU has for it. {advice}"
    )


def find_step_settings(estimator: StepEstimator, available: int) -> tuple[StepSettings, MemoryEstimate] | None:
    """Finds the settings of a step that fits into memory, among those that the run's settings leave open.

    Without a setting that says which, activations are kept if that fits, else recomputed. With `auto_find_batch_size`
    micro-batches are halved before that, and their number doubled: recomputing repeats half of a LoRA step's products, and
    smaller micro-batches cost less.

    Args:
        available: bytes of a GPU for all of it, the model's weights included. A step that needs more than
            `MEMORY_FRACTION` of it is chosen only where none needs less.
    """
    if fitting := _first_fitting(estimator, *_open_choices(estimator), MEMORY_FRACTION * available):
        return fitting
    smallest, estimate = _smallest(estimator)
    return (smallest, estimate) if estimate.total <= available else None


def _open_choices(estimator: StepEstimator) -> tuple[list[int], tuple[bool, ...]]:
    """Returns micro-batch sizes and whether to recompute, as far as the settings leave both open, in order of preference."""
    training, fixed = estimator.args.training, estimator.args.model.disable_gradient_checkpointing is not None
    sizes = batch_sizes(training) if training.auto_find_batch_size else [training.per_device_train_batch_size]
    return sizes, (bool(training.gradient_checkpointing),) if fixed else (False, True)


def _smallest(estimator: StepEstimator) -> tuple[StepSettings, MemoryEstimate]:
    sizes, checkpointing = _open_choices(estimator)
    return _with_estimate(estimator, sizes[-1], checkpointing[-1])


def batch_sizes(training_args: TrainingArguments) -> list[int]:
    """Returns micro-batch sizes of the same global batch: that of the settings, and its halves."""
    sizes = [training_args.per_device_train_batch_size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def _with_estimate(estimator: StepEstimator, size: int, checkpointing: bool) -> tuple[StepSettings, MemoryEstimate]:
    settings = StepSettings(size, sequences_per_step(estimator.args.training) // size, checkpointing)
    return settings, estimator.estimate(size, checkpointing)


def _first_fitting(
    estimator: StepEstimator, sizes: list[int], checkpointing: Iterable[bool], budget: float
) -> tuple[StepSettings, MemoryEstimate] | None:
    """Returns the first settings that fit, largest micro-batch first."""
    for recompute in checkpointing:
        if estimator.estimate(sizes[-1], recompute).total <= budget:
            for size in sizes:
                settings, estimate = _with_estimate(estimator, size, recompute)
                if estimate.total <= budget:
                    return settings, estimate
    return None


def _propose(estimator: StepEstimator, available: int) -> Iterator[str]:
    """Yields settings with which a step fits, as lines of a message: first those with which the same is learned."""
    args, model, optim = estimator.args, estimator.model, "adamw_8bit"
    variants: list[tuple[dict[str, Any], StepEstimator]] = [({}, estimator)]
    if _can_train_new_tokens_only(model, args):
        finetuning = replace(args.finetuning, train_new_tokens_only=True)
        skeleton = make_skeleton(model.config, finetuning, estimator.dtype)
        fewer = StepEstimator(skeleton, replace(args, finetuning=finetuning), estimator.processes)
        variants.append(({"train_new_tokens_only": True}, fewer))
    if state_bytes_per_parameter(args.training) > 3:
        variants += [({"optim": optim, **changes}, variant.variant(optim)) for changes, variant in variants]
    choices = (batch_sizes(args.training), (False, True))
    for changes, variant in sorted(variants, key=lambda variant: "train_new_tokens_only" in variant[0]):
        budgets = (MEMORY_FRACTION * available, available)
        if fitting := next(filter(None, (_first_fitting(variant, *choices, budget) for budget in budgets)), None):
            settings, estimate = fitting
            named = {**changes, **settings.changes(args.training)}
            text = ", ".join(f"{name}: {str(value).lower()}" for name, value in named.items())
            yield f"{text} ({estimate.total / 1e9:.1f} GB)"


def _can_train_new_tokens_only(model: Any, args: TrainArgs) -> bool:
    """Whether `train_new_tokens_only` would change a run: embeddings are trained in full, and step 3 appended rows."""
    finetuning = args.finetuning
    trains_embeddings = not {*EMBEDDING_MODULES}.isdisjoint(finetuning.additional_target)
    is_new_lora = finetuning.finetuning_type == "lora" and args.model.adapter_name_or_path is None
    has_appended = getattr(model.config, APPENDED_ROWS, None) is not None
    return is_new_lora and trains_embeddings and has_appended and not finetuning.train_new_tokens_only
