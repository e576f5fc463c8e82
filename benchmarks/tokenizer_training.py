"""Step 1's learning against the size of its sample: time, memory, tokens per character; and step 1 on a large corpus.

    python -m benchmarks.tokenizer_training --base DIR/tokenizer.model --corpora DIR

Samples are drawn from encyclopedia and literature (ja_wiki, ja_aozora) in the shares that these have in the whole, so that
the largest is all there is and the others differ in size alone. Each learns 13,756 pieces by continued BPE, merges them
and splits the ja_*.test files, which it has not read. Then step 1 itself runs, with its own settings of profile
chatglm3-6b, on two large corpora of different size: their documents are drawn from the same texts again and again, each
with its lines shuffled, so their text is not new, but step 1 reads, samples and learns as it would. Every measurement is a
process of its own, alone; its peak memory is what the system counts (resident set).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from llmtuner.console import UserError, format_table, print0, run_cli
from llmtuner.data.readers import read_texts
from llmtuner.data.sources import DatasetAttr
from llmtuner.files import atomic_write_json
from llmtuner.report.environment import environment
from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
from llmtuner.tokenizer.fast import read_sentencepiece, to_processor
from llmtuner.tokenizer.merge_vocab import merge_reachable
from llmtuner.tokenizer.sentencepiece_bpe import interleave_by_bytes
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tokenizer_training.json"
PIECES = 13_756
SETS = ("ja_wiki", "ja_aozora")
LARGE_SHARES = (0.8, 0.2)  # of the sets in the large corpora, as in step 1's mix, which then finds enough of both
SAMPLES_MB = (1, 2, 5, 10, 20)
LARGE_MB = (150, 1_000)  # both more than the 100 MB that step 1 reads
BATCH_BYTES = 4_000_000  # of a row group of the large corpora


def main() -> None:
    parser = argparse.ArgumentParser(description="step 1 against the size of its sample")
    parser.add_argument("--base", type=Path, required=True, help="ChatGLM3's tokenizer.model")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--samples", type=float, nargs="+", default=SAMPLES_MB, metavar="MB")
    parser.add_argument("--large", type=float, nargs="*", default=LARGE_MB, metavar="MB", help="sizes; none: left out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--learn", type=int, help=argparse.SUPPRESS)  # bytes: this is the process of one sample
    options = parser.parse_args()
    if options.learn:
        print(json.dumps(learn(options.base, options.corpora, options.learn)))
        return
    whole = sum(size_of(options.corpora, name) for name in SETS)
    samples: dict[str, Any] = {}
    for size in [*(size for size in (int(mb * 1e6) for mb in options.samples) if size < whole), whole]:
        own = ["--base", str(options.base), "--corpora", str(options.corpora), "--learn", str(size)]
        out, cost = in_a_process([sys.executable, "-m", "benchmarks.tokenizer_training", *own], os.environ)
        samples[f"{size / 1e6:.1f} MB, {size / whole:.0%}"] = {**json.loads(out.splitlines()[-1]), **cost}
    best = list(samples.values())[-1]["tokens_per_character"]
    for one in samples.values():
        one["against_all"] = {file: round(value / best[file], 4) for file, value in one["tokens_per_character"].items()}
    lines = [
        [name, f"{one['seconds']:.1f}", f"{one['peak_mb']:,}", f"{one['pieces']:,}"]
        + [f"{value:.4f} ({one['against_all'][file] - 1:+.1%})" for file, value in one["tokens_per_character"].items()]
        for name, one in samples.items()
    ]
    print0(format_table(["sample", "seconds", "peak MB", "pieces", *best], lines))
    enough = next(name for name, one in samples.items() if one["against_all"]["all"] <= 1.01)
    print0(f"\nthe smallest sample that costs at most 1 % on all files together: {enough}\n")
    large = {f"{mb:g} MB": step1(options, int(mb * 1e6)) for mb in options.large}
    lines = [[name, *(f"{one[key]:,}" for key in ("read_mb", "seconds", "peak_mb"))] for name, one in large.items()]
    print0(format_table(["step 1 on a corpus of", "MB read", "seconds", "peak MB"], lines))
    results = {"samples": samples, "smallest_within_1_percent": enough, "step1": large}
    atomic_write_json(options.output, {**environment(), "results": results})


def in_a_process(command: list[str], variables: Any) -> tuple[str, dict[str, Any]]:
    """What a command prints, its wall time and the peak of its resident memory.

    Raises:
        UserError: if it fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=errors, text=True)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise UserError(f"{' '.join(command)} ended with code {process.returncode}: {errors.read()[-2_000:]}")
        return out.read(), {"seconds": round(seconds, 1), "peak_mb": round(used.ru_maxrss * 1024 / 1e6)}


def learn(base_file: Path, corpora: Path, size: int) -> dict[str, Any]:
    """Learns from a sample and splits the test files."""
    base, writing_system = read_sentencepiece(base_file), WRITING_SYSTEMS["japanese"]
    streams = {name: documents(corpora, f"{name}.train.*") for name in SETS}
    texts = interleave_by_bytes(streams, {name: size_of(corpora, name) for name in SETS}, size)
    lines = segment_corpus(
        base, (line for _, text in texts for line in text.splitlines() if line.strip()), writing_system
    )
    pieces = list(train_continued_bpe(lines, PIECES, writing_system, documents(corpora, "zh_*.train.*")))
    split = to_processor(merge_reachable(base, pieces)[0])
    tokens, characters = {"all": 0}, {"all": 0}
    for file in sorted(corpora.glob("ja_*.test.*")):
        name, held_out = file.name.split(".")[0], list(documents(corpora, file.name))
        tokens[name], characters[name] = sum(map(len, split.encode(held_out))), sum(map(len, held_out))
    tokens["all"], characters["all"] = sum(tokens.values()), sum(characters.values())
    return {
        "pieces": len(pieces),
        "tokens_per_character": {name: round(tokens[name] / characters[name], 5) for name in tokens},
    }


def documents(directory: Path, pattern: str) -> Iterator[str]:
    files = tuple(sorted(map(str, directory.glob(pattern))))
    return read_texts(DatasetAttr(name=pattern, files=files, columns={"prompt": "text"}))


def size_of(corpora: Path, name: str) -> int:
    """UTF-8 bytes of a set's training text."""
    return sum(len(text.encode()) for text in documents(corpora, f"{name}.train.*"))


def step1(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Runs step 1 on a corpus of `size` bytes of Japanese."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus, base, work = (Path(scratch) / name for name in ("corpus", "base", "work"))
        corpus.mkdir()
        base.mkdir()
        (base / "tokenizer.model").symlink_to(options.base.resolve())
        for file in options.corpora.iterdir():
            if file.name.startswith(("zh_", "ja_")) and not file.name.startswith(tuple(f"{one}.train" for one in SETS)):
                (corpus / file.name).symlink_to(file.resolve())
        for name, share in zip(SETS, LARGE_SHARES, strict=True):
            enlarge(options.corpora, name, corpus / f"{name}.train.parquet", int(size * share))
        variables = dict(PROFILE="chatglm3-6b", WORK_DIR=work, CORPUS_DIR=corpus, BASE_MODEL_DIR=base)
        environ = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        _, cost = in_a_process([sys.executable, "step1_train_tokenizer.py"], environ)
        measured = json.loads((work / "metrics" / "step1.json").read_text(encoding="utf-8"))
        return {**cost, "read_mb": round(measured["input_bytes"] / 1e6, 1), "pieces": measured["new_pieces"]}


def enlarge(corpora: Path, name: str, file: Path, size: int) -> None:
    """Writes a parquet file of `size` bytes of text by drawing a set's documents again and again, their lines shuffled."""
    draw, texts, written = random.Random(0), list(documents(corpora, f"{name}.train.*")), 0
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while written < size:
            batch: list[str] = []
            end = written + BATCH_BYTES
            while written < min(end, size):
                lines = draw.choice(texts).splitlines()
                draw.shuffle(lines)
                batch.append("\n".join(lines))
                written += len(batch[-1].encode())
            writer.write_batch(pyarrow.record_batch([pyarrow.array(batch)], schema=schema))


if __name__ == "__main__":
    run_cli(main)
