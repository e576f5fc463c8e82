"""Self-check before the first step: the loss is that of the model's own logits, and documents do not see each other."""

import math
import time
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from llmtuner.console import UserError, print0
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.train.trainer import PackedTrainer, run_model

LENGTHS = 8, 7  # tokens of documents A and B; cutoff_len is at least 8
# Accepted as rounding: of the loss, relative to it; of the logits of B, in their standard deviations. Of tiny models of 13
# families, those that pass differ by at most 3e-7 in fp32 and fp16 and 4e-5 in bf16, and by 0 in the logits. The closest of
# those that fail, fresh weights of 0.02 included, are Granite (3e-3) and Bloom (0.04). As a whole bf16 moves a loss by 1e-3.
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
        tokenizer: the model's; the check draws from its ordinary ids.
        packed: whether the documents of a sequence must not see each other (`packing` and `neat_packing`).
    """

    def __init__(self, trainer: PackedTrainer, tokenizer: Any, packed: bool) -> None:
        self.trainer, self.packed = trainer, packed
        self.ids = numpy.setdiff1d(numpy.arange(len(tokenizer)), tokenizer.all_special_ids)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run()

    def run(self) -> None:
        self_check(self.trainer, self.ids, self.packed)


def self_check(trainer: PackedTrainer, ids: numpy.ndarray, packed: bool) -> None:
    """Compares what is about to be trained with what the model itself computes, on two documents of random ids.

    The model computes as in training (adapters, fused layers, autocast) but without dropout; gradients and random states
    are left alone.

    - Loss: as `compute_loss` forms it, with gradients on, where LoRA layers are fused; against cross-entropy over the
      logits of a plain forward pass with gradients off, where they are peft's own.
    - Isolation: how far the logits of document B change when document A is replaced, in their standard deviations.
      Without packing, A and B are two sequences of one batch, and B is padded.

    All ranks check, and all stop if one of them finds a problem.

    Raises:
        UserError: names what differs, by how much, and the setting that helps.
    """
    start = time.perf_counter()
    found = ""
    problems: list[str] = []
    model, training = trainer.model, trainer.model.training
    failing, remedy = "a forward pass", "Set flash_attn: disabled"
    model.eval()
    try:
        a, b, other = (numpy.random.default_rng(seed).choice(ids, LENGTHS[seed % 2]) for seed in range(3))
        batch, changed = (_batch(trainer, first, b, packed) for first in (a, other))
        logits, changed_logits = _logits(trainer, batch), _logits(trainer, changed)
        own = _mean_loss(logits, batch)
        if not math.isfinite(own):
            failing, remedy = "computing logits", "Check the model's weights; instead of fp16 set bf16: true"
            raise ArithmeticError("they are not finite")
        of_b = slice(LENGTHS[0], sum(LENGTHS))  # of the flattened batch, packed or not: A is the longest
        moved = float((logits[of_b] - changed_logits[of_b]).abs().max() / logits[of_b].std())
        loss_tolerance, moved_tolerance = TOLERANCES[_precision(trainer)]
        if not moved <= moved_tolerance:  # or is not a number
            problems.append(
                f"the logits of a document change by {moved:.2g} standard deviations when another document changes. "
                + (PACKED_REMEDY if packed else "Set flash_attn: disabled")
            )

        failing, remedy = "computing the loss", CHUNKED_REMEDY if trainer.finetuning_args.chunked_loss else FUSED_REMEDY
        with trainer.compute_loss_context_manager():
            summed, count = trainer._compute_loss_sum(model, batch)
        loss = float(summed.detach() / count)
        difference = abs(loss - own) / max(own, 1)
        if not difference <= loss_tolerance:
            fused = _mean_loss(_logits(trainer, batch, gradients=True), batch)
            at_fault = CHUNKED_REMEDY if abs(fused - own) <= loss_tolerance * max(own, 1) else FUSED_REMEDY
            problems.append(f"the loss is {loss:.4f}, but {own:.4f} from the model's own logits. {at_fault}")
        found = f"loss {loss:.4f}, within {difference:.0e} of the model's own; documents isolated within {moved:.0e}"
    except UserError as error:  # it says what to do
        problems.append(str(error).rstrip("."))
    except Exception as error:  # of whatever kind: the other ranks wait for this one
        problems.append(f"{failing} fails with {type(error).__name__}: {error}. {remedy}")
    finally:
        model.train(training)
    if problems := gather_object(problems):
        raise UserError("self-check of the model: " + "; ".join(dict.fromkeys(problems)) + ".")
    print0(f"self-check: {found}; {1000 * (time.perf_counter() - start):.0f} ms")


def _precision(trainer: PackedTrainer) -> torch.dtype:
    """The precision of the model's matrix products. accelerate puts autocast into `model.forward`, where nobody else sees it."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    return mixed or next(trainer.model.parameters()).dtype


def _batch(trainer: PackedTrainer, a: numpy.ndarray, b: numpy.ndarray, packed: bool) -> dict[str, Any]:
    """Two documents as a batch of the trainer: one sequence, or one each."""
    parts: list[Any] = [
        {
            "input_ids": ids,
            "labels": numpy.where(numpy.arange(len(ids)) > 0, ids, IGNORE_INDEX),
            "position_ids": numpy.arange(len(ids)),
            "doc_ids": numpy.zeros(0, dtype=numpy.int64),
        }
        for ids in (a, b)
    ]
    joined = [{name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}]
    return trainer._prepare_inputs(trainer.data_collator(joined if packed else parts))


def _logits(trainer: PackedTrainer, batch: dict[str, Any], gradients: bool = False) -> torch.Tensor:
    """The model's own logits in fp32, [sequences * tokens, vocabulary]; LoRA layers are fused only with gradients on."""
    attention = getattr(trainer.model.config, "_attn_implementation", "")
    with torch.set_grad_enabled(gradients), trainer.compute_loss_context_manager():
        return run_model(trainer.model, attention, batch).logits.flatten(0, 1).detach().float()


def _mean_loss(logits: torch.Tensor, batch: dict[str, Any]) -> float:
    return float(cross_entropy(logits[batch["loss_indices"]], batch["labels"].flatten()[batch["loss_indices"] + 1]))
