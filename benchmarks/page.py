"""Puts the figures of results/*.json into the tables of benchmarks/README.md; what was not measured says so.

    python -m benchmarks.page

A table follows a line `<!-- name -->`, up to the next empty line, and is written anew; the prose around it is left alone.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scaling import table
from llmtuner.console import InputError, run_script, say

HERE = Path(__file__).resolve().parent
MISSING = "**not measured**"
PLACE = re.compile(r"(?m)^<!-- ([\w -]+) -->\n(?:(?!\n).*\n)*")


def main() -> None:
    page = HERE / "README.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(PLACE.sub(fill, before), encoding="utf-8")
    say(f"{len(PLACE.findall(before))} tables of {page} are as in {HERE / 'results'}")


def fill(place: re.Match) -> str:
    """A table's marker and the table."""
    name = place[1]
    benchmark, _, part = name.partition(" ")
    if benchmark not in TABLES:
        raise InputError(f"README.md asks for the table {name!r}. Known: {', '.join(TABLES)}.")
    file = HERE / "results" / f"{benchmark}.json"
    measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    try:
        text = TABLES[benchmark](measured, part)
    except KeyError:
        text = MISSING
    return f"<!-- {name} -->\n{text}\n"


def peers(measured: Any, job: str) -> str:
    """`job`: pt, pt-1024, sft."""
    losses = dict(held_out_loss=".3f", first_loss=".3f", last_loss=".3f", first_norm=".2f", last_norm=".2f")
    columns = dict(tokens_per_second=",.0f", trained_tokens_per_second=",.0f", memory_gb=".2f", **losses)
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
        ratio = f"**{one['ours_ratio']:.2f}** ({spread(one['ours_ratio of each'])})" if name != "ours" else ""
        lines.append([name, ratio, *cells(one, columns)])
    return table(["", f"ours / theirs, {measured[job]['repeats']} rounds", *header], lines)


def throughput(measured: Any, run: str) -> str:
    """`run`: stage, size and window, as in `pt mini 256`."""
    stage, size, window = run.split()
    columns = dict(tokens_per_second=",.0f", trained_tokens_per_second=",.0f", utilisation=".0%", memory_gb=".2f")
    columns |= dict(first_loss=".3f", last_loss=".3f", first_norm=".2f", last_norm=".2f")
    shares = [f"{part}_share" for part in ("data", "forward", "backward", "optimizer")]
    header = ["times as fast", "tokens/s", "trained", "utilisation", "GB", "first loss", "last 5", "first norm", "last"]
    lines = []
    for name, one in measured[f"{stage}, {size}, windows of {int(window):,}"]["results"].items():
        ratio = f"{one['ratio']:.2f} ({spread(one['ratio of each'])})"
        lines.append([name, ratio, *cells(one, columns), " / ".join(f"{one[share]:.0%}" for share in shares)])
    return table(["", *header, "data / forward / backward / optimizer"], lines)


def levers(measured: Any, window: str) -> str:
    columns = dict(ratio=".2f", milliseconds=".0f", loss=".5f")
    lines = [[name, *cells(one, columns)] for name, one in measured["results"][f"{int(window):,}"].items()]
    return table([f"windows of {int(window):,}", "times as fast", "ms a step", "first loss"], lines)


def preparation(measured: Any, tokens: str) -> str:
    """`tokens`: how many the tokenizer knows."""
    columns = dict(mb=".1f", bare_mb_per_second=".1f", ours_mb_per_second=".1f")
    lines = []
    for name, one in measured[f"{int(tokens):,} tokens"]["results"].items():
        ratio = f"**{one['ratio']:.2f}** ({spread(one['ratios'])})"
        lines.append([name, *cells(one, columns), ratio, f"{one['slow_ratio']:.1f}" if "slow_ratio" in one else ""])
    return table(["", "MB", "bare, MB/s", "ours, MB/s", "our time / bare", "slow path's time / bare"], lines)


def step1(measured: Any, part: str) -> str:
    """`part`: samples, corpora."""
    if part == "corpora":
        columns = dict(read_mb=",.0f", seconds=".0f", peak_mb=",.0f", pieces=",.0f")
        lines = [[name, *cells(one, columns)] for name, one in measured["results"]["step1"].items()]
        return table(["corpus", "learned from, MB", "seconds", "peak MB", "pieces"], lines)
    lines = [
        [name, f"{one['seconds']:.0f}", f"{one['peak_mb']:,}", f"{one['tokens_per_character']['all']:.4f}"]
        + [f"{value - 1:+.1%}" for value in one["against_all"].values()]
        for name, one in measured["results"]["samples"].items()
    ]
    sets = [f"against all: {name}" for name in next(iter(measured["results"]["samples"].values()))["against_all"]]
    return table(["sample", "seconds", "peak MB", "tokens per character", *sets], lines)


def answers(measured: Any, _: str) -> str:
    columns = dict(tokens_per_second=",.0f", ratio=".1f", other_answers=".0f")
    lines = [[name, *cells(one, columns)] for name, one in measured["results"].items()]
    return table(["", "tokens/s", "times as fast", "other answers of 128"], lines)


def embeddings(measured: Any, _: str) -> str:
    columns = dict(seconds_per_step=".3f", trainable_parameters=",.0f", eval_loss=".3f")
    lines = [
        [name, f"**{one['ratio']:.2f}** ({spread(one['ratio of each'])})", *cells(one, columns)]
        for name, one in measured["embeddings"]["results"].items()
    ]
    return table(["", "time against LoRA", "seconds a step", "trained numbers", "held-out loss"], lines)


def cells(values: Any, columns: dict[str, str]) -> list[str]:
    return [format(values[key], form) for key, form in columns.items()]


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


TABLES: dict[str, Callable[[Any, str], str]] = {
    "peers": peers,
    "train_throughput": throughput,
    "levers": levers,
    "tokenize_throughput": preparation,
    "tokenizer_training": step1,
    "generate_throughput": answers,
    "training_costs": embeddings,
}

if __name__ == "__main__":
    run_script(main)
