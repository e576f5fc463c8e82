"""Writes the values of results/*.json into the tables of the benchmarks' pages; what was not measured says so.

    python -m benchmarks.update_readme

A table follows a line `<!-- name -->`, up to the next empty line, and is rewritten; the prose around it is left alone.
"""

import re
from collections.abc import Callable

from benchmarks import common, memory_budget, scaling
from benchmarks.common import Values, markdown_table, read_results
from llmtuner.console import UserError, print0, run_cli

PAGES = ("benchmarks/README.md", "benchmarks/scaling.md", "docs/memory.md")
MISSING = "**not measured**"
MARKER = re.compile(r"(?m)^<!-- ([\w -]+) -->\n(?:(?!\n).*\n)*")


def main() -> None:
    for name in PAGES:
        before = (common.ROOT / name).read_text(encoding="utf-8")
        (common.ROOT / name).write_text(MARKER.sub(fill, before), encoding="utf-8")
        print0(f"{len(MARKER.findall(before))} tables of {name} are as in {common.RESULTS}")


def fill(marker: re.Match) -> str:
    """A table's marker and the table.

    Raises:
        UserError: if no such table is known.
    """
    name = marker[1]
    benchmark, _, part = name.partition(" ")
    if benchmark not in TABLES:
        raise UserError(f"a page asks for the table {name!r}. Known: {', '.join(TABLES)}.")
    try:
        text = TABLES[benchmark](read_results(common.RESULTS / f"{benchmark}.json"), part)
    except KeyError:
        text = MISSING
    return f"<!-- {name} -->\n{text}\n"


SPEEDS = "tokens/s=tokens_per_second:,.0f target_tokens/s=target_tokens_per_second:,.0f "
LOSSES = "first_loss=first_loss:.3f last_5=last_loss:.3f first_norm=first_norm:.2f last=last_norm:.2f"


def make_table(first: str, results: dict[str, Values], columns: str, ratio: str = "", key: str = "ratio") -> str:
    """A table with a line per result.

    Args:
        columns: "header=key:format" of each column, an underscore in a header being a space; a missing value is an empty cell.
        ratio: header of a column before them: the median of a ratio under `key`, and its range over the rounds.
    """
    specs = [re.fullmatch(r"(.+)=(\w+):?(.*)", column).groups() for column in columns.split()]  # type: ignore[union-attr]
    lines = []
    for name, values in results.items():
        cells = [format(values[column], form) if column in values else "" for _, column, form in specs]
        if ratio:
            rounds = values[f"{key}_per_round"]
            spread = f"**{values[key]:.2f}** ({min(rounds):.2f} to {max(rounds):.2f})"
            cells.insert(0, "" if name == "ours" else spread)
        lines.append([name, *cells])
    headers = [header.replace("_", " ") for header, *_ in specs]
    return markdown_table([first, *([ratio] if ratio else []), *headers], lines)


def compare_trainers(measured: Values, job: str) -> str:
    """`job`: pt, pt-1024, sft."""
    columns = f"{SPEEDS} GB=peak_memory_gb:.2f held-out_loss=held_out_loss:.3f {LOSSES}"
    rounds = measured[job]["repeats"]
    return make_table("", measured[job]["results"], columns, f"ours / theirs, {rounds} rounds", "speedup")


def train_throughput(measured: Values, run: str) -> str:
    """`run`: stage, size and window, as in `pt mini 256`."""
    stage, size, window = run.split()
    results = measured[f"{stage}, {size}, windows of {int(window):,}"]["results"]
    parts = ("data", "forward", "backward", "optimizer")
    for values in results.values():
        values["parts"] = " / ".join(f"{values[f'{part}_fraction']:.0%}" for part in parts)
    columns = f"{SPEEDS} utilization=utilization:.0% GB=peak_memory_gb:.2f {LOSSES} {'_/_'.join(parts)}=parts"
    return make_table("", results, columns, "times as fast")


def ablation_step_time(measured: Values, window: str) -> str:
    columns = "times_as_fast=ratio:.2f ms_per_step=milliseconds:.0f first_loss=loss:.5f"
    return make_table(f"windows of {int(window):,}", measured["results"][f"{int(window):,}"], columns)


def tokenize_throughput(measured: Values, vocab_size: str) -> str:
    columns = (
        "MB=mb:.1f bare,_MB/s=bare_mb_per_second:.1f ours,_MB/s=ours_mb_per_second:.1f slow_path_/_bare=slow_ratio:.1f"
    )
    return make_table("", measured[f"{int(vocab_size):,} tokens"]["results"], columns, "time / bare")


def tokenizer_training(measured: Values, part: str) -> str:
    """`part`: samples, corpora."""
    results, columns = measured["results"], "seconds=seconds:.0f peak_MB=peak_mb:,.0f "
    if part == "corpora":
        return make_table("corpus", results["step1"], f"learned_from,_MB=read_mb:,.0f {columns} tokens=pieces:,.0f")
    for sample in results["samples"].values():
        sample["per_character"] = sample["tokens_per_character"]["all"]
        sample |= {f"more_{name}": ratio - 1 for name, ratio in sample["against_all"].items()}
    columns += "tokens_per_character=per_character:.4f "
    columns += " ".join(
        f"against_all_data:_{name.removeprefix('ja_')}=more_{name}:+.1%" for name in sample["against_all"]
    )
    return make_table("sample", results["samples"], columns)


def generate_throughput(measured: Values, _: str) -> str:
    columns = "tokens/s=tokens_per_second:,.0f times_as_fast=ratio:.1f changed_answers_of_128=changed_answers:.0f"
    return make_table("", measured["results"], columns)


def training_costs(measured: Values, part: str) -> str:
    columns = (
        "seconds_per_step=seconds_per_step:.3f trained_parameters=trainable_parameters:,.0f held-out_loss=eval_loss:.3f"
    )
    return make_table("", measured[part]["results"], columns, "time against LoRA")


def full_size_checkpoint(measured: Values, _: str) -> str:
    columns = "GB=gigabytes:.1f seconds=seconds:.0f seconds_per_GB=seconds_per_gigabyte:.1f peak_MB=peak_megabytes:,.0f"
    return make_table("job", {result["job"]: result for result in measured["results"]}, columns)


TABLES: dict[str, Callable[[Values, str], str]] = {
    **{"compare_trainers": compare_trainers, "train_throughput": train_throughput, "training_costs": training_costs},
    **{"ablation_step_time": ablation_step_time, "generate_throughput": generate_throughput},
    **{"full_size_checkpoint": full_size_checkpoint},
    **{"tokenize_throughput": tokenize_throughput, "tokenizer_training": tokenizer_training},
    **{"scaling": scaling.tables, "memory_budget": memory_budget.tables},
}

if __name__ == "__main__":
    run_cli(main)
