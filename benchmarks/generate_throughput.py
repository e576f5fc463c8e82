"""Tokens per second of answers, by how many are written at once, as step 7 writes them.

    python -m benchmarks.generate_throughput --work-dir runs/mini --model runs/mini/chat_model

Greedy answers to questions of the miniature's instruction sets. Batch sizes take turns; a ratio is the median over the rounds.
Which answers differ from those written one at a time (rounding decides near ties) is counted.
"""

import argparse
import os
from pathlib import Path
from statistics import median
from typing import Any

from llmtuner.console import format_table, print0, run_cli
from llmtuner.data.readers import read_rows
from llmtuner.data.sources import get_dataset_attr
from llmtuner.eval.generation import generate_answers
from llmtuner.files import atomic_write_json
from llmtuner.model.loading import load_for_evaluation
from llmtuner.report.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "generate_throughput.json"
SIZES = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description="tokens per second of answers")
    parser.add_argument("--work-dir", type=Path, help="whose corpus is asked (default: as for the steps)")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.work_dir:
        os.environ["WORK_DIR"] = str(options.work_dir.resolve())
    import constants
    import pipeline

    source = get_dataset_attr("dolly_ja", constants.DATASET_INFO, pipeline.require_corpus())
    questions = [row.values["instruction"] for row, _ in zip(read_rows(source), range(options.questions), strict=False)]
    model, tokenizer = load_for_evaluation(options.model)
    runs: dict[int, list[Any]] = {size: [] for size in SIZES}
    for _ in range(options.repeats):
        for size, own in runs.items():
            own.append(generate_answers(model, tokenizer, questions, batch_size=size))
    alone, results = runs[1], {}
    for size, own in runs.items():
        results[f"{size} at once"] = {
            "tokens_per_second": median(one.tokens_per_second for one in own),
            "ratio": round(median(a.seconds / b.seconds for a, b in zip(alone, own, strict=True)), 3),
            "changed_answers": sum(a != b for a, b in zip(alone[0].texts, own[0].texts, strict=True)),
        }
    lines = [[name, *(f"{value:,}" for value in one.values())] for name, one in results.items()]
    print0(
        format_table(["", "tokens/s", "times as fast as one at a time", f"other answers of {len(questions)}"], lines)
    )
    atomic_write_json(options.output, {**environment(), "results": results})


if __name__ == "__main__":
    run_cli(main)
