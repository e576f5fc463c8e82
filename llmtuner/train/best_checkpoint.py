"""The best evaluation of a run: by one figure of the log, among those that keep what the model knew before."""

import math
from typing import Any

from llmtuner.console import UserError
from llmtuner.hparams import FinetuningArguments, TrainArgs

BITS_PER_BYTE = "eval_bits_per_byte_"


def best_metric(finetuning_args: FinetuningArguments) -> str | None:
    """Returns the name in the log of the figure by which a run's best checkpoint is chosen; None if none is."""
    if not (finetuning_args.metric_for_best_model or finetuning_args.load_best_model_at_end):
        return None
    metric = finetuning_args.metric_for_best_model or "eval_loss"
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def check_metric(args: TrainArgs, languages: list[str]) -> None:
    """Makes sure that `metric_for_best_model` will be logged, and `max_retention_loss` has figures to compare.

    Args:
        languages: those whose bits per byte are logged.

    Raises:
        UserError: names the figures that this run logs.
    """
    metric = best_metric(args.finetuning)
    if metric is None:
        return
    logged = ["eval_loss", *(BITS_PER_BYTE + language for language in languages)]
    if args.data.eval_on_each_dataset:
        logged += [f"eval_{dataset}_loss" for dataset in args.data.dataset]
    if metric not in logged:
        raise UserError(f"metric_for_best_model: {metric} is not logged by this run. It logs {', '.join(logged)}.")
    if args.finetuning.max_retention_loss is not None and not _others({name: 0.0 for name in logged}, metric):
        raise UserError(
            f"max_retention_loss compares other languages or data sets with {metric}, and this run logs none. Set "
            f"metric_for_best_model to the bits per byte of a language ({BITS_PER_BYTE}ja), or eval_on_each_dataset: true "
            "and metric_for_best_model to the loss of a data set."
        )


def find_best(
    history: list[dict[str, Any]], metric: str, max_retention_loss: float | None = None
) -> dict[str, Any] | None:
    """Returns the log entry of the evaluation with the lowest `metric`, the earlier of equals.

    It depends on the log alone, which checkpoints hold: a resumed run goes on with the same best.

    Args:
        history: the log of a run.
        max_retention_loss: by how much figures of the same kind (bits per byte of other languages, losses of other data
            sets) may have risen since the first evaluation, as a ratio; None: by any amount.
    """
    evaluations = [entry for entry in history if math.isfinite(entry.get(metric, math.inf))]
    if max_retention_loss is not None:
        start = evaluations[0] if evaluations else {}
        evaluations = [entry for entry in evaluations if retention_loss(entry, start, metric) <= max_retention_loss]
    return min(evaluations, key=lambda entry: entry[metric], default=None)


def retention_loss(entry: dict[str, Any], start: dict[str, Any], metric: str) -> float:
    """Returns by how much the figure of the same kind as `metric` that grew most has grown, as a ratio."""
    others = _others(start, metric)
    return max((entry.get(name, math.inf) / before - 1 for name, before in others.items()), default=0.0)


def _others(entry: dict[str, Any], metric: str) -> dict[str, float]:
    """Returns the figures of an evaluation that are of the same kind as a metric, without itself and the mixed loss."""
    if metric.startswith(BITS_PER_BYTE):
        return {name: value for name, value in entry.items() if name.startswith(BITS_PER_BYTE) and name != metric}
    is_loss = metric != "eval_loss"
    return {
        name: value
        for name, value in entry.items()
        if is_loss and name.startswith("eval_") and name.endswith("_loss") and name not in ("eval_loss", metric)
    }
