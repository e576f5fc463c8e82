"""Step 1's learning against the share of the corpus that it reads: time, memory, tokens per character; and 1 GB of text.

    python -m benchmarks.tokenizer_training --base DIR/tokenizer.model --corpora DIR

Reads Japanese text in step 1's shares (encyclopedia and literature, 4 : 1), learns 13,756 pieces by continued BPE on each sample,
merges them and counts tokens of the ja_*.test files. Each sample is a process of its own, whose peak memory is reported. The
gigabyte is the corpus over and over, its lines shuffled anew each time: new text it is not, but step 1 reads and samples it as
it would.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtuner.console import InputError, run_script, say, table, write_json
from llmtuner.data.sources import find_source, read_texts
from llmtuner.report.environment import environment
from llmtuner.tokenizer.fast import read_model
from llmtuner.tokenizer.learning import learn_pieces, read_lines
from llmtuner.tokenizer.merging import merge_living, processor_of
from llmtuner.tokenizer.scripts import SCRIPTS
from llmtuner.tokenizer.training import mix_by_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tokenizer_training.json"
PIECES = 13_756
SHARES = {"ja_wiki": 0.8, "ja_aozora": 0.2}
SAMPLES = (1, 2, 5, 10, 20)  # MB
SETTING = 100  # MB, of step 1


def main() -> None:
    parser = argparse.ArgumentParser(description="step 1 against the size of its sample")
    parser.add_argument("--base", type=Path, required=True, help="ChatGLM3's tokenizer.model")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--samples", type=float, nargs="+", default=SAMPLES, help="MB")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the large corpus; 0 leaves it out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return run_job(json.loads(options.job.read_text(encoding="utf-8")))
    base = dict(base=str(options.base), test=str(options.corpora))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for sample in options.samples:
            job = {**base, "corpora": str(options.corpora), "bytes": int(sample * 1e6)}
            results[f"{sample:g} MB"] = in_a_process(job, Path(scratch))
        if options.gigabytes:
            enlarge(options.corpora, Path(scratch), int(options.gigabytes * 1e9))
            job = {**base, "corpora": scratch, "bytes": int(SETTING * 1e6)}
            results[f"{SETTING} MB of {options.gigabytes:g} GB"] = in_a_process(job, Path(scratch))
    best = min(one["tokens_per_character"] for name, one in results.items() if " of " not in name)
    lines = []
    for name, one in results.items():
        one["against_best"] = round(one["tokens_per_character"] / best, 4)
        lines.append([name, f"{one['seconds']:.1f}", f"{one['peak_mb']:,.0f}"])
        lines[-1] += [f"{one['tokens_per_character']:.4f}", f"{one['against_best'] - 1:+.2%}"]
    say(table(["sample", "seconds", "peak MB", "tokens per character", "against the best"], lines))
    enough = next(name for name, one in results.items() if one["against_best"] <= 1.01)
    say(f"the smallest sample that costs at most 1 %: {enough}")
    write_json(options.output, {**environment(), "smallest_within_1_percent": enough, "results": results})
    return None


def in_a_process(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    write_json(scratch / "job.json", {**job, "result": str(scratch / "result.json")})
    words = ["--base", job["base"], "--corpora", job["corpora"], "--job", str(scratch / "job.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tokenizer_training", *words], cwd=ROOT, capture_output=True
    )
    if done.returncode:
        raise InputError(f"a sample failed: {done.stderr.decode()[-2000:]}")
    return json.loads((scratch / "result.json").read_text(encoding="utf-8"))


def run_job(job: dict[str, Any]) -> None:
    start = time.perf_counter()
    base, script = read_model(Path(job["base"])), SCRIPTS["japanese"]
    streams = {name: documents(job["corpora"], f"{name}.train.*") for name in SHARES}
    texts = mix_by_bytes(streams, SHARES, job["bytes"])
    lines = read_lines(base, (line for _, text in texts for line in text.splitlines() if line.strip()), script)
    pieces = list(learn_pieces(lines, PIECES, script, documents(job["test"], "zh_*.train.*")))
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    held_out = list(documents(job["test"], "ja_*.test.*"))
    tokens = sum(map(len, processor_of(merge_living(base, pieces)[0]).encode(held_out)))
    result = dict(seconds=round(seconds, 1), peak_mb=round(peak), pieces=len(pieces))
    write_json(Path(job["result"]), {**result, "tokens_per_character": tokens / sum(map(len, held_out))})


def documents(directory: str, pattern: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as scratch:
        info = Path(scratch) / "dataset_info.json"
        write_json(info, {"set": {"file_name": pattern, "columns": {"prompt": "text"}}})
        yield from read_texts(find_source("set", info, Path(directory)))


def enlarge(corpora: Path, directory: Path, size: int) -> None:
    """Writes the two Japanese sets as jsonl files of `size` bytes together, in step 1's shares."""
    draw = random.Random(0)
    for name, share in SHARES.items():
        texts, written = list(documents(str(corpora), f"{name}.train.*")), 0
        with (directory / f"{name}.train.jsonl").open("w", encoding="utf-8") as file:
            while written < size * share:
                lines = draw.choice(texts).splitlines()
                draw.shuffle(lines)
                text = "\n".join(lines)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())


if __name__ == "__main__":
    run_script(main)
