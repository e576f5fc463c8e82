"""Scores of benchmark tasks as table rows, and what of them is kept; imports nothing of the harness that measured them."""

from collections.abc import Mapping
from typing import Any

import numpy

from llmtuner.console import format_table

NOT_METRICS = ("n", "few_shot", "truncated")
NOTES_OF_METRICS = ("_stderr", "_interval", "_chance")
NUM_RESAMPLES = 10_000


def score_rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric of what `evaluate_tasks` returns.

    Returns:
        task, metric, score, error (standard error), interval (95 %), chance (what guessing or always the same answer scores), n (questions),
        truncated (questions whose beginning did not fit), few_shot. None is what was not measured.
    """
    return [
        {
            "task": task,
            "metric": metric,
            "score": score,
            "error": scores.get(f"{metric}_stderr"),
            "interval": scores.get(f"{metric}_interval"),
            "chance": scores.get(f"{metric}_chance"),
            **{name: scores.get(name) for name in NOT_METRICS},
        }
        for task, scores in tasks.items()
        for metric, score in scores.items()
        if metric not in NOT_METRICS and not metric.endswith(NOTES_OF_METRICS)
    ]


def is_no_better_than_chance(row: Mapping[str, Any]) -> bool:
    """Whether a row of `score_rows` may be no more than chance: chance lies in its interval, or above it."""
    return bool(row["chance"] and row["interval"] and row["chance"] >= row["interval"][0])


def format_scores(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """`score_rows` as a table, and a line that names those no better than chance."""
    rows, score = score_rows(tasks), "{:.4f}".format
    table = format_table(
        ["task", "metric", "score", "±", "95 % interval", "chance", "questions", "truncated", "few-shot"],
        [
            [
                row["task"],
                row["metric"],
                score(row["score"]),
                "" if row["error"] is None else score(row["error"]),
                " - ".join(map(score, row["interval"] or ())),
                "" if row["chance"] is None else score(row["chance"]),
                *("" if row[name] is None else f"{row[name]:,}" for name in ("n", "truncated", "few_shot")),
            ]
            for row in rows
        ],
    )
    guesses = list(dict.fromkeys(row["task"] for row in rows if is_no_better_than_chance(row)))
    return table + (f"\nNo better than chance: {', '.join(guesses)}." if guesses else "")


def paired_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What of a score is lost between two results of `run_suite`, question by question.

    Only tasks whose questions and number of examples are the same in both, and metrics that are shares of right answers.

    Returns:
        task, metric, n, before, after, lost (percent of `before`, negative if gained) and interval (95 % bootstrap over
        questions (Efron 1979), each with its answers before and after). None if `before` is, or may be, zero or no better
        than chance: what is not there cannot be lost.
    """
    rows = []
    chance = {
        (row["task"], row["metric"]) for row in score_rows(before.get("tasks", {})) if is_no_better_than_chance(row)
    }
    for task, questions in after.get("questions", {}).items():
        others = before.get("questions", {}).get(task, {})
        few_shot = [result["tasks"][task]["few_shot"] for result in (before, after) if task in result.get("tasks", {})]
        if others.get("digest") == questions["digest"] and len(set(few_shot)) == 1:
            rows += [
                {"task": task, "metric": metric, **lost_percent(others["correct"][metric], marks)}
                for metric, marks in questions["correct"].items()
                if metric in others["correct"]
            ]
    return [row | {"lost": None, "interval": None} if (row["task"], row["metric"]) in chance else row for row in rows]


def lost_percent(before: str, after: str, seed: int = 0) -> dict[str, Any]:
    """n, before, after, lost and interval of `paired_rows`, from right (1) and wrong (0) answers to the same questions."""
    n = len(before)
    kinds = [
        sum(pair == kind for pair in zip(before, after, strict=True)) for kind in (("1", "1"), ("1", "0"), ("0", "1"))
    ]
    # Resampling n pairs with replacement is a draw of how often each kind of pair occurs.
    drawn = numpy.random.default_rng(seed).multinomial(
        n, [*(kind / n for kind in kinds), 1 - sum(kinds) / n], NUM_RESAMPLES
    )
    sums = drawn[:, 0] + drawn[:, 1], drawn[:, 0] + drawn[:, 2]
    lost, interval = None, None
    if "1" in before:
        lost = 100 * (1 - after.count("1") / before.count("1"))
        if sums[0].min() > 0:
            interval = tuple(map(float, numpy.quantile(100 * (1 - sums[1] / sums[0]), [0.025, 0.975])))
    return {"n": n, "before": before.count("1") / n, "after": after.count("1") / n, "lost": lost, "interval": interval}


def format_paired(rows: list[dict[str, Any]], before: str, after: str) -> str:
    """`paired_rows` as a table with the two models' names; "–" where there was nothing to lose."""
    cells = []
    for row in rows:
        interval = "" if row["interval"] is None else "{:.1f} % - {:.1f} %".format(*row["interval"])
        lost = "–" if row["lost"] is None else f"{row['lost']:.1f} %"
        scores = [f"{row[name]:.4f}" for name in ("before", "after")]
        cells.append([row["task"], row["metric"], f"{row['n']:,}", *scores, lost, interval])
    return format_table(["task", "metric", "questions", before, after, "lost", "95 % interval"], cells)
