"""Writes the values of results/*.json into the tables of the benchmarks' pages; what was not measured says so.

    python -m benchmarks.update_readme

A table follows a line `<!-- name -->`, up to the next empty line, and is rewritten; the prose around it is left alone.
"""

import re
from collections.abc import Callable
from statistics import fmean

from benchmarks import common, extend_tokenizers, ladder, ladder_values, memory_budget, real_text, scaling
from benchmarks.common import Values, markdown_table, read_results
from benchmarks.gpu import tables as gpu
from llmtuner.console import UserError, print0, run_cli

PAGES = ("benchmarks/README.md", "benchmarks/scaling.md", "docs/gpu.md", "docs/memory.md", "docs/evidence.md")
MISSING = "**not measured**"
MARKER = re.compile(r"(?m)^<!-- ([\w, -]+) -->\n(?:(?!\n).*\n)*")


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
    name, _, part = marker[1].partition(" ")
    known = {*TABLES, *(key.partition(" ")[0] for key in COLUMNS)}
    if name not in known:
        raise UserError(f"a page asks for the table {marker[1]!r}. Known: {', '.join(sorted(known))}.")
    measured = read_results(common.RESULTS / f"{name}.json")
    try:
        if name in TABLES:
            text = TABLES[name](measured, part)
        else:
            text = make_table(find_results(measured, part), COLUMNS.get(name) or COLUMNS[f"{name} {part}"])
    except KeyError:
        text = MISSING
    return f"<!-- {marker[1]} -->\n{text}\n"


def find_results(measured: Values, part: str) -> dict[str, Values]:
    """The results of a section or with a name: one line of a table each."""
    results = measured.get(part, measured)["results"]
    if isinstance(results, list):  # of a job each
        return {result["job"]: result for result in results}
    results = results if not part or part in measured else results[part]
    for values in results.values():  # what a table shows of values that hold several
        if "data_fraction" in values:
            phases = ("data", "forward", "backward", "optimizer")
            values["parts"] = " / ".join(f"{values[f'{phase}_fraction']:.0%}" for phase in phases)
        if "against_all" in values:
            values["per_character"] = values["tokens_per_character"]["all"]
            values |= {f"more_{name}": ratio - 1 for name, ratio in values["against_all"].items()}
    return results


def make_table(results: dict[str, Values], columns: str) -> str:
    """A table with a line per result.

    Args:
        columns: "header=key:format" of each column, an underscore in a header being a space, after a header of the names.
            A missing value is an empty cell, a column without values is left out; a ratio without a format is shown with
            its range over the rounds.
    """
    first, *specs = columns.split()
    keys = {key for values in results.values() for key in values}
    specs = [spec for spec in specs if spec.partition("=")[2].partition(":")[0] in keys]
    lines = []
    for name, values in results.items():
        cells = [name]
        for key, _, form in (spec.partition("=")[2].partition(":") for spec in specs):
            if f"{key}_per_round" in values and not form:
                rounds = values[f"{key}_per_round"]
                spread = f"**{values[key]:.2f}** ({min(rounds):.2f} to {max(rounds):.2f})"
                cells.append("" if name == "ours" else spread)
            else:
                cells.append(format(values[key], form) if key in values else "")
        lines.append(cells)
    headers = [header.partition("=")[0].replace("_", " ") for header in (first, *specs)]
    return markdown_table([headers[0].strip("- "), *headers[1:]], lines)


def original_claims(_: Values, part: str) -> str:
    """What the original project reports beside what this project measured of the same, from several files of results."""
    staged, tuned, costs, demo, merged = (
        read_results(common.RESULTS / f"{name}.json")
        for name in ("real_text", "sft_recipes", "training_costs", "demo", "merge_methods")
    )
    recipes = staged["recipes"]
    behind = real_text.format_difference(recipes["staged"]["ja"]["difference"])
    held_out = {
        name: real_text.interval([run["eval_loss"] for run in tuned["runs"] if run["recipe"] == name])
        for name in ("lora", "lora_2_epochs", "lora_embeddings")
    }
    losses = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in held_out.values()]
    twice = [run for run in tuned["runs"] if run["recipe"] == "lora_2_epochs"]
    before, after = (
        fmean(run[f"train_loss_{where}"] for run in twice) for where in ("before_epoch_2", "after_epoch_1")
    )
    packed = [cases["packed"]["ratio"] for cases in costs["packing"]["results"].values()]
    generation = demo["step7"]["generation"]
    repeated = [
        f"{generation['candidates'][name]['repeated_4gram_ratio']:.0%}" for name in ("greedy", generation["chosen"])
    ]
    original = merged["merges"]["original"]
    changed = [original[code]["changed"] / original[code]["lines"] for code in ("zh", "en")]
    lines = [
        ["embeddings first, then LoRA, is far from converged (3.2); together 2.7", "`real_text`",
         f"Japanese {recipes['staged']['ja']['mean']:.3f} bits per byte against {recipes['default']['ja']['mean']:.3f}: {behind}"],
        ["instructions, held-out loss: LoRA 1.78, two epochs 1.72, with embeddings 1.68", "`sft_recipes`",
         f"{losses[0]}, {losses[1]}, {losses[2]}: the same order"],
        ["the training loss falls off a cliff where the second epoch begins", "`sft_recipes`",
         f"no cliff: from {before:.3f} over the last tenth of the first epoch to {after:.3f} over the first of the second"],
        ["training the embeddings doubles the time", "`training embeddings`",
         f"{costs['embeddings']['results']['LoRA + embeddings']['ratio']:.2f} times the time"],
        ["dialogues are padded one by one, the GPUs 55 % loaded", "`training packing`",
         f"packed: {packed[0]:.1f} and {packed[1]:.1f} times as many target tokens per second"],
        ["the model repeats itself", "`demo_results`",
         f"{repeated[0]} of the 4-grams of its greedy answers are repetitions, {repeated[1]} with the settings that step 7 chooses"],
        ["the tokenization of Chinese is unchanged", "`tokenizer merge`",
         f"by the original's merge {changed[0]:.0%} of Chinese and {changed[1]:.0%} of English lines change"],
    ]  # fmt: skip
    return common.markdown_table(["the original says", "measured by", "at small scale we see"], lines).replace(
        "---:", "---"
    )


SPEEDS = "tokens/s=tokens_per_second:,.0f target_tokens/s=target_tokens_per_second:,.0f "
LOSSES = "first_loss=first_loss:.3f last_5=last_loss:.3f first_norm=first_norm:.2f last=last_norm:.2f "
TIMES = "seconds=seconds:.0f peak_MB=peak_mb:,.0f "
PEERS = (
    "- ours_/_theirs=speedup ours_/_theirs_at_best=best_speedup "
    f"{SPEEDS} GB=peak_memory_gb:.2f held-out_loss=held_out_loss:.3f {LOSSES}"
)
# The first word is the header of the names; "-" is none.
COLUMNS = {
    "compare_trainers": PEERS,
    "compare_trainers_bf16": PEERS,
    "train_throughput": f"- times_as_fast=ratio {SPEEDS} utilization=utilization:.0% GB=peak_memory_gb:.2f {LOSSES}"
    "data_/_forward_/_backward_/_optimizer=parts",
    "ablation_step_time": "- times_as_fast=ratio:.2f ms_per_step=milliseconds:.0f first_loss=loss:.5f",
    "traffic": "- elementwise_GB=elementwise_gb:.2f of_all_off=elementwise_gb_fraction:.0% "
    "forward=elementwise_forward_gb:.2f backward=elementwise_backward_gb:.2f kernels=kernels:.0f kept_MB=kept_mb:,.0f "
    "of_all_off=kept_mb_fraction:.0% attention_GB=attention_gb:.2f products_GB=product_gb:.2f "
    "outside_the_layers,_GB=elementwise_outside_gb:.0f",
    "training_costs": "- time_against_LoRA=ratio seconds_per_step=seconds_per_step:.3f "
    "trained_parameters=trainable_parameters:,.0f held-out_loss=eval_loss:.3f",
    "full_size_checkpoint": "job GB=gigabytes:.1f seconds=seconds:.0f seconds_per_GB=seconds_per_gigabyte:.1f "
    "peak_MB=peak_megabytes:,.0f",
    "generate_throughput": "- tokens/s=tokens_per_second:,.0f times_as_fast=ratio:.1f "
    "changed_answers_of_128=changed_answers:.0f",
    "tokenize_throughput": "- time_/_bare=ratio MB=mb:.1f bare,_MB/s=bare_mb_per_second:.1f "
    "ours,_MB/s=ours_mb_per_second:.1f slow_path_/_bare=slow_ratio:.1f",
    "tokenizer_training step1": f"corpus learned_from,_MB=read_mb:,.0f {TIMES} tokens=pieces:,.0f",
    "tokenizer_training samples": f"sample {TIMES} tokens_per_character=per_character:.4f against_all_data=more_all:+.1% "
    "literature=more_ja_aozora:+.1% travel_guides=more_ja_guides:+.1% encyclopedia=more_ja_wiki:+.1%",
}
TABLES: dict[str, Callable[[Values, str], str]] = {
    "extend_tokenizers": extend_tokenizers.tables,
    "scaling": scaling.tables,
    "memory_budget": memory_budget.tables,
    "gpu": gpu.tables,
    "real_text": real_text.tables,
    "real_text_2": real_text.tables,  # on a second base
    "ladder": ladder.tables,
    "ladder_values": ladder_values.tables,
    "original_claims": original_claims,
}

if __name__ == "__main__":
    run_cli(main)
