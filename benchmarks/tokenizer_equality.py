"""Encodes every line and every document of a corpus by a fast tokenizer and by its sentencepiece model, and compares.

    python benchmarks/tokenizer_equality.py --tokenizer DIR/tokenizer.model --corpora DIR

Prints how many lines and documents differ (0 is the only good answer) and how fast each engine is, both with as many
threads as there are cores.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmtuner.console import format_table, print0, progress, run_cli
from llmtuner.data.readers import read_texts
from llmtuner.data.sources import FILE_TYPES, DatasetAttr
from llmtuner.files import atomic_write_json
from llmtuner.tokenizer.fast import (
    build_fast_tokenizer,
    encode_fast,
    encode_sentencepiece,
    read_sentencepiece,
    to_processor,
)

BATCH = 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description="compare a fast tokenizer with its sentencepiece model")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "tokenizer_equality.json")
    options = parser.parse_args()
    fast, processor = build_fast_tokenizer(options.tokenizer), to_processor(read_sentencepiece(options.tokenizer))
    files = sorted(
        file for file in options.corpora.iterdir() if file.suffix in FILE_TYPES and "dialogues" not in file.name
    )
    rows, totals = [], {"lines": 0, "documents": 0, "differing": 0}
    for file in progress(files, "comparing", unit=" files"):
        megabytes = 0.0
        seconds = {"fast": 0.0, "sentencepiece": 0.0}
        counts = {"lines": 0, "documents": 0, "differing": 0}
        texts = read_texts(DatasetAttr(name=file.name, files=(str(file),), columns={"prompt": "text"}))
        for batch in batched(texts):
            lines = [line for text in batch for line in text.splitlines()]
            for kind, some in (("documents", batch), ("lines", lines)):
                megabytes += sum(len(text.encode()) for text in some) / 1e6
                ids = {
                    "fast": timed(lambda some=some: encode_fast(fast, some), seconds, "fast"),
                    "sentencepiece": timed(
                        lambda some=some: encode_sentencepiece(processor, some), seconds, "sentencepiece"
                    ),
                }
                counts[kind] += len(some)
                counts["differing"] += sum(a != b for a, b in zip(*ids.values(), strict=True))
        speeds = [f"{megabytes / spent:.1f}" for spent in seconds.values()]
        rows.append([file.name, *(f"{count:,}" for count in counts.values()), *speeds])
        totals = {key: totals[key] + counts[key] for key in totals}
    rows.append(["all", *(f"{count:,}" for count in totals.values()), "", ""])
    print0(format_table(["file", "lines", "documents", "differing", "fast MB/s", "sentencepiece MB/s"], rows))
    atomic_write_json(options.output, {"tokenizer": options.tokenizer.name, **totals})


def batched(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, BATCH)):
        yield batch


def timed(work: Callable[[], list[list[int]]], seconds: dict[str, float], name: str) -> list[list[int]]:
    start = time.perf_counter()
    result = work()
    seconds[name] += time.perf_counter() - start
    return result


if __name__ == "__main__":
    run_cli(main)
