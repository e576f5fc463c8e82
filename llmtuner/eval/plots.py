"""Figures: the loss of a training run."""

from pathlib import Path
from typing import Any


def plot_losses(log_history: list[dict[str, Any]], directory: Path) -> None:
    """Draws `training_loss.png` and `eval_loss.png` from a Trainer's log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for key, name, title in (("loss", "training_loss", "training loss"), ("eval_loss", "eval_loss", "eval loss")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
        axes.plot(steps, losses, marker="o" if len(points) < 40 else None, markersize=3, linewidth=1.5)
        axes.set(
            xlabel="step", ylabel=f"{title} (nats per token)", title=f"{title}: {losses[0]:.3f} → {losses[-1]:.3f}"
        )
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(directory / f"{name}.png")
        pyplot.close(figure)
