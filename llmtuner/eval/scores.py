"""Scores of benchmark tasks as table rows; imports nothing of the harness that measured them."""

from collections.abc import Mapping
from typing import Any

from llmtuner.console import format_table


def score_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric of {task: {metric, metric_stderr, n, few_shot}}: task, metric, score, error, n, few_shot."""
    return [
        {
            "task": task,
            "metric": metric,
            "score": score,
            "error": scores.get(f"{metric}_stderr"),
            "n": scores.get("n"),
            "few_shot": scores.get("few_shot"),
        }
        for task, scores in tasks.items()
        for metric, score in scores.items()
        if metric not in ("n", "few_shot") and not metric.endswith("_stderr")
    ]


def format_scores(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """`score_rows` as a table."""
    rows = []
    for row in score_rows(tasks):
        error = "" if row["error"] is None else f"{row['error']:.4f}"
        rows.append([row["task"], row["metric"], f"{row['score']:.4f}", error, f"{row['n']:,}", str(row["few_shot"])])
    return format_table(["task", "metric", "score", "±", "documents", "few-shot"], rows)
