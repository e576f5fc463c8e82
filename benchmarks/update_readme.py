"""Puts the figures of results/*.json into the tables of benchmarks/README.md; what was not measured says so.

    python -m benchmarks.update_readme

A table follows a line `<!-- name -->`, up to the next empty line, and is written anew; the prose around it is left alone.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scaling import markdown_table
from llmtuner.console import UserError, print0, run_cli

HERE = Path(__file__).resolve().parent
MISSING = "**not measured**"
MARKER = re.compile(r"(?m)^<!-- ([\w -]+) -->\n(?:(?!\n).*\n)*")


def main() -> None:
    page = HERE / "README.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(MARKER.sub(fill, before), encoding="utf-8")
    print0(f"{len(MARKER.findall(before))} tables of {page} are as in {HERE / 'results'}")


def fill(place: re.Match) -> str:
    """A table's marker and the table."""
    name = place[1]
    benchmark, _, part = name.partition(" ")
    if benchmark not in TABLES:
        raise UserError(f"README.md asks for the table {name!r}. Known: {', '.join(TABLES)}.")
    file = HERE / "results" / f"{benchmark}.json"
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    try:
        text = TABLES[benchmark](measured, part)
    except KeyError:
        text = MISSING
    return f"<!-- {name} -->\n{text}\n"


def compare_trainers(measured: Any, job: str) -> str:
    """`job`: pt, pt-1024, sft."""
    losses = dict(held_out_loss=".3f", first_loss=".3f", last_loss=".3f", first_norm=".2f", last_norm=".2f")
    columns = dict(tokens_per_second=",.0f", target_tokens_per_second=",.0f", peak_memory_gb=".2f", **losses)
    header = [
        "tokens/s",
        "trained tokens/s",
        "GB",
        "held-out loss",
        "first loss",
        "last 5",
        "first gradient norm",
        "last",
    ]
    lines = []
    for name, one in measured[job]["results"].items():
        ratio = f"**{one['speedup']:.2f}** ({spread(one['speedup_per_round'])})" if name != "ours" else ""
        lines.append([name, ratio, *cells(one, columns)])
    return markdown_table(["", f"ours / theirs, {measured[job]['repeats']} rounds", *header], lines)


def throughput(measured: Any, run: str) -> str:
    """`run`: stage, size and window, as in `pt mini 256`."""
    stage, size, window = run.split()
    columns = dict(tokens_per_second=",.0f", target_tokens_per_second=",.0f", utilisation=".0%", peak_memory_gb=".2f")
    columns |= dict(first_loss=".3f", last_loss=".3f", first_norm=".2f", last_norm=".2f")
    shares = [f"{part}_fraction" for part in ("data", "forward", "backward", "optimizer")]
    header = ["times as fast", "tokens/s", "trained", "utilisation", "GB", "first loss", "last 5", "first norm", "last"]
    lines = []
    for name, one in measured[f"{stage}, {size}, windows of {int(window):,}"]["results"].items():
        ratio = f"{one['ratio']:.2f} ({spread(one['ratio_per_round'])})"
        lines.append([name, ratio, *cells(one, columns), " / ".join(f"{one[share]:.0%}" for share in shares)])
    return markdown_table(["", *header, "data / forward / backward / optimizer"], lines)


def ablation_step_time(measured: Any, window: str) -> str:
    columns = dict(ratio=".2f", milliseconds=".0f", loss=".5f")
    lines = [[name, *cells(one, columns)] for name, one in measured["results"][f"{int(window):,}"].items()]
    return markdown_table([f"windows of {int(window):,}", "times as fast", "ms a step", "first loss"], lines)


def preparation(measured: Any, tokens: str) -> str:
    """`tokens`: how many the tokenizer knows."""
    columns = dict(mb=".1f", bare_mb_per_second=".1f", ours_mb_per_second=".1f")
    lines = []
    for name, one in measured[f"{int(tokens):,} tokens"]["results"].items():
        ratio = f"**{one['ratio']:.2f}** ({spread(one['ratios'])})"
        lines.append([name, *cells(one, columns), ratio, f"{one['slow_ratio']:.1f}" if "slow_ratio" in one else ""])
    return markdown_table(["", "MB", "bare, MB/s", "ours, MB/s", "our time / bare", "slow path's time / bare"], lines)


def step1(measured: Any, part: str) -> str:
    """`part`: samples, corpora."""
    if part == "corpora":
        columns = dict(read_mb=",.0f", seconds=".0f", peak_mb=",.0f", pieces=",.0f")
        lines = [[name, *cells(one, columns)] for name, one in measured["results"]["step1"].items()]
        return markdown_table(["corpus", "learned from, MB", "seconds", "peak MB", "pieces"], lines)
    lines = [
        [name, f"{one['seconds']:.0f}", f"{one['peak_mb']:,}", f"{one['tokens_per_character']['all']:.4f}"]
        + [f"{value - 1:+.1%}" for value in one["against_all"].values()]
        for name, one in measured["results"]["samples"].items()
    ]
    sets = [f"against all: {name}" for name in next(iter(measured["results"]["samples"].values()))["against_all"]]
    return markdown_table(["sample", "seconds", "peak MB", "tokens per character", *sets], lines)


def answers(measured: Any, _: str) -> str:
    columns = dict(tokens_per_second=",.0f", ratio=".1f", changed_answers=".0f")
    lines = [[name, *cells(one, columns)] for name, one in measured["results"].items()]
    return markdown_table(["", "tokens/s", "times as fast", "other answers of 128"], lines)


def embeddings(measured: Any, _: str) -> str:
    columns = dict(seconds_per_step=".3f", trainable_parameters=",.0f", eval_loss=".3f")
    lines = [
        [name, f"**{one['ratio']:.2f}** ({spread(one['ratio_per_round'])})", *cells(one, columns)]
        for name, one in measured["embeddings"]["results"].items()
    ]
    return markdown_table(["", "time against LoRA", "seconds a step", "trained numbers", "held-out loss"], lines)


def cells(values: Any, columns: dict[str, str]) -> list[str]:
    return [format(values[key], form) for key, form in columns.items()]


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


TABLES: dict[str, Callable[[Any, str], str]] = {
    "compare_trainers": compare_trainers,
    "train_throughput": throughput,
    "ablation_step_time": ablation_step_time,
    "tokenize_throughput": preparation,
    "tokenizer_training": step1,
    "generate_throughput": answers,
    "training_costs": embeddings,
}

if __name__ == "__main__":
    run_cli(main)
