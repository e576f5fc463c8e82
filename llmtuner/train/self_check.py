"""Checks before the first step that the loss equals that of the model's own logits, and that documents are isolated."""

import math
import time
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from llmtuner.console import UserError, print0
from llmtuner.data.packing import PackedSequence
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.train.trainer import PackedTrainer, forward_packed

LENGTHS = 8, 7  # tokens of documents A and B; cutoff_len is at least 8
REPETITIONS = 8  # of a comparison of losses that exceeds the tolerance
# Accepted rounding: of the loss, relative; of the logits of B, in their standard deviations. Among tiny models of 13 families,
# those that pass differ by at most 3e-7 in fp32 and fp16 and 4e-5 in bf16, and by 0 in the logits. The closest of those that
# fail, with fresh weights of 0.02 too, are Granite (3e-3) and Bloom (0.04). bf16 itself moves a loss by 1e-3: see `_recheck`.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.float16: (5e-4, 1e-2), torch.bfloat16: (2e-3, 3e-2)}
PACKED_REMEDY = "This model does not separate packed documents. Set packing: false (one document per sequence)"
CHUNKED_REMEDY = (
    "This model's output layer is more than one matrix product (it may cap, scale or project, or have a bias). "
    "Set chunked_loss: false, which takes the loss from the model's own logits"
)
FUSED_REMEDY = "Set fused_ops: false"


class SelfCheckCallback(TrainerCallback):
    """Runs the self-check at every start, once the model has been prepared for its devices.

    Args:
        tokenizer: the model's; the check samples from its ordinary ids.
        packed: whether the documents of a sequence must be isolated (`packing` and `neat_packing`).
    """

    def __init__(self, trainer: PackedTrainer, tokenizer: Any, packed: bool) -> None:
        self.trainer, self.packed = trainer, packed
        self.ids = numpy.setdiff1d(numpy.arange(len(tokenizer)), tokenizer.all_special_ids)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run()

    def run(self) -> None:
        self_check(self.trainer, self.ids, self.packed)


def self_check(trainer: PackedTrainer, ids: numpy.ndarray, packed: bool) -> None:
    """Compares the trainer's loss with that of the model itself, on two documents of random ids.

    The model computes as in training (adapters, fused operations, autocast) but without dropout; gradients and random
    states are left alone.

    - Loss: as `compute_loss` computes it, with gradients on, where LoRA layers are fused; against the cross-entropy over
      the logits of a plain forward pass with gradients off, where they are peft's own.
    - Isolation: how far the logits of document B change when document A is replaced, in their standard deviations.
      Without packing, A and B are two sequences of one batch, and B is padded.

    All ranks check, and all stop if one of them finds a problem.

    Raises:
        UserError: names what differs, by how much, and the setting that helps.
    """
    start = time.perf_counter()
    result = ""
    doubtful: bool | None = None  # not known, if a pass fails
    problems: list[str] = []
    model, training = trainer.model, trainer.model.training
    stage, remedy = "a forward pass", "Set flash_attn: disabled"
    model.eval()
    try:
        a, b, other = (_document(ids, seed) for seed in range(3))
        batch, changed = (_batch(trainer, first, b, packed) for first in (a, other))
        logits, changed_logits = _logits(trainer, batch), _logits(trainer, changed)
        reference = _mean_loss(logits, batch)
        if not math.isfinite(reference):
            stage, remedy = "computing logits", "Check the model's weights; instead of fp16 set bf16: true"
            raise ArithmeticError("they are not finite")
        of_b = slice(LENGTHS[0], sum(LENGTHS))  # of the flattened batch, packed or not: A is the longest
        shift = float((logits[of_b] - changed_logits[of_b]).abs().max() / logits[of_b].std())
        loss_tolerance, shift_tolerance = TOLERANCES[trainer.matmul_dtype]
        if not shift <= shift_tolerance:  # NaN fails too
            problems.append(
                f"the logits of a document change by {shift:.2g} standard deviations when another document changes. "
                + (PACKED_REMEDY if packed else "Set flash_attn: disabled")
            )

        stage, remedy = "computing the loss", CHUNKED_REMEDY if trainer.finetuning_args.chunked_loss else FUSED_REMEDY
        loss, difference = _compare_losses(trainer, batch, reference)
        doubtful = not difference <= loss_tolerance
        result = f"loss {loss:.4f}, within {difference:.0e} of the model's own; documents isolated within {shift:.0e}"
    except UserError as error:  # it says what to do
        problems.append(str(error).rstrip("."))
    except Exception as error:  # of whatever kind: the other ranks wait for this one
        problems.append(f"{stage} fails with {type(error).__name__}: {error}. {remedy}")
    findings = gather_object([(problems, doubtful)])
    problems = [problem for one, _ in findings for problem in one]
    doubts = [doubt for _, doubt in findings]
    if None not in doubts and any(doubts):
        # All processes repeat the comparison, or none: their forward passes may wait for each other.
        found: list[str] = []
        try:
            if not _recheck(trainer, ids, packed) <= loss_tolerance:
                fused_loss = _mean_loss(_logits(trainer, batch, gradients=True), batch)
                is_fused_equal = abs(fused_loss - reference) <= loss_tolerance * max(reference, 1)
                cause = CHUNKED_REMEDY if is_fused_equal else FUSED_REMEDY
                found.append(f"the loss is {loss:.4f}, but {reference:.4f} from the model's own logits. {cause}")
        except Exception as error:
            found.append(f"{stage} fails with {type(error).__name__}: {error}. {remedy}")
        problems += gather_object(found)
    model.train(training)
    if problems:
        raise UserError("self-check of the model: " + "; ".join(dict.fromkeys(problems)) + ".")
    print0(f"self-check: {result}; {1000 * (time.perf_counter() - start):.0f} ms")


def _compare_losses(trainer: PackedTrainer, batch: dict[str, Any], reference: float) -> tuple[float, float]:
    """The loss as the trainer computes it, and its difference to `reference`, relative."""
    with trainer.compute_loss_context_manager():
        loss_sum, num_target_tokens = trainer._compute_loss_sum(trainer.model, batch)
    loss = float(loss_sum.detach() / num_target_tokens)
    return loss, abs(loss - reference) / max(reference, 1)


def _recheck(trainer: PackedTrainer, ids: numpy.ndarray, packed: bool) -> float:
    """The root mean square of the differences between losses on further documents.

    Random ids are what a trained model expects least, and in bf16 the rounding of so large a loss exceeds the tolerance now and
    then. Over several documents that comes to its standard deviation, less than half of the tolerance; an error does not
    become smaller.
    """
    differences = []
    for seed in range(3, 3 + 2 * REPETITIONS, 2):
        batch = _batch(trainer, _document(ids, seed + 1), _document(ids, seed), packed)
        reference = _mean_loss(_logits(trainer, batch), batch)
        differences.append(_compare_losses(trainer, batch, reference)[1])
    return math.sqrt(sum(difference**2 for difference in differences) / REPETITIONS)


def _document(ids: numpy.ndarray, seed: int) -> numpy.ndarray:
    """Random ids: A's with an even seed, B's with an odd one."""
    return numpy.random.default_rng(seed).choice(ids, LENGTHS[seed % 2])


def _batch(trainer: PackedTrainer, a: numpy.ndarray, b: numpy.ndarray, packed: bool) -> dict[str, Any]:
    """Makes a batch of two documents: one sequence of both, or one of each."""
    sequences: list[PackedSequence] = [
        {
            "input_ids": ids,
            "labels": numpy.where(numpy.arange(len(ids)) > 0, ids, IGNORE_INDEX),
            "position_ids": numpy.arange(len(ids)),
            "doc_ids": numpy.zeros(0, dtype=numpy.int64),
        }
        for ids in (a, b)
    ]
    if packed:
        sequences = [{name: numpy.concatenate([part[name] for part in sequences]) for name in sequences[0]}]
    return trainer._prepare_inputs(trainer.data_collator(sequences))


def _logits(trainer: PackedTrainer, batch: dict[str, Any], gradients: bool = False) -> torch.Tensor:
    """Returns the model's own logits in fp32, [sequences * tokens, vocabulary]; LoRA is fused only with gradients on."""
    with torch.set_grad_enabled(gradients), trainer.compute_loss_context_manager():
        return forward_packed(trainer.model, trainer.attention, batch).logits.flatten(0, 1).detach().float()


def _mean_loss(logits: torch.Tensor, batch: dict[str, Any]) -> float:
    indices = batch["loss_indices"]
    return float(cross_entropy(logits[indices], batch["labels"].flatten()[indices + 1]))
