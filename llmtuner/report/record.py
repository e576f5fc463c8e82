"""What a training run took: wall time, cost, devices, memory, speed, gradient norms, and the checkpoint it kept."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MEASURES = (
    "Wall time", "Cost", "Devices", "Peak memory per device", "Steps", "Tokens", "Tokens per second",
    "Model FLOPs utilization", "Trainable parameters", "Gradient norm", "Best checkpoint",
)  # fmt: skip


def describe_training(
    metrics: Mapping[str, Any], log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What is known of `MEASURES`, as text; what an older or unfinished run lacks is left out.

    Args:
        metrics: of the step; empty for a run that has not finished, or outside of the steps.
        log: entries of its trainer_log.jsonl.
        settings: its training_args.json.
    """
    processes, device = metrics.get("processes") or settings.get("processes"), metrics.get("device")
    if device is None and settings.get("use_cpu"):
        device = "CPU"
    peak = metrics.get("peak_memory_gb") or max(_logged(log, "peak_memory_gb").values(), default=None)
    mfu = metrics.get("mfu") or (statistics.fmean(values) if (values := _logged(log, "mfu").values()) else None)
    norms, price, best = _logged(log, "grad_norm"), metrics.get("price_per_hour"), metrics.get("best") or {}
    steps = metrics.get("steps") or max((entry["step"] for entry in log if "loss" in entry), default=None)
    speed = metrics.get("tokens_per_second") or statistics.median(_logged(log, "tokens_per_second").values() or [0])
    saved = "this is" if settings.get("load_best_model_at_end") else "the last weights are"
    highest = max(norms, key=lambda step: norms[step], default=0)
    found = {
        "Wall time": duration(seconds) if (seconds := wall_seconds(metrics)) else "",
        "Cost": f"{cost:,.2f} at {price:g} per device and hour" if (cost := cost_of(metrics)) is not None else "",
        "Devices": f"{processes or 1} × {device}" if device else f"{processes}" if processes else "",
        "Peak memory per device": f"{peak:,.2f} GB" if peak else "",
        "Steps": f"{steps:,}" if steps else "",
        "Tokens": f"{metrics['tokens']:,}" if metrics.get("tokens") else "",
        "Tokens per second": f"{speed:,.0f}" if speed else "",
        "Model FLOPs utilization": f"{mfu:.1%}" if mfu else "",
        "Trainable parameters": f"{metrics['trainable_parameters']:,}" if metrics.get("trainable_parameters") else "",
        "Gradient norm": f"median {statistics.median(norms.values()):.3g}, highest {norms[highest]:.3g} at step {highest:,}"
        if norms
        else "",
        "Best checkpoint": f"step {best['step']:,}, {best['metric']} {best['value']:.4g} ({saved} saved)"
        if len(best) >= 3
        else "",
    }
    return {name: text for name, text in found.items() if text}


def wall_seconds(metrics: Mapping[str, Any]) -> float | None:
    """Seconds of training with evaluation and saving; of an older run, those of the complete step."""
    return metrics.get("wall_seconds") or metrics.get("seconds")


def cost_of(metrics: Mapping[str, Any]) -> float | None:
    """Price per device and hour, times devices and hours; None without a price."""
    price, seconds = metrics.get("price_per_hour"), wall_seconds(metrics)
    return None if price is None or seconds is None else price * (metrics.get("processes") or 1) * seconds / 3600


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    for size, name, smaller, smaller_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {name}" + (f" {rest} {smaller_name}" if rest else "")
    return f"{whole} s"


def _logged(log: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in log if isinstance(entry.get(name), int | float)}
