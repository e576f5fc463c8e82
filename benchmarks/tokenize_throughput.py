"""Speed of preparing a data set, from its file to the tokens on disk, against the bare sentencepiece encoder.

    python -m benchmarks.tokenize_throughput --tokenizer DIR_OR_FILE.model --corpora DIR

`--tokenizer` is a directory that step 2 has written, or a sentencepiece model with ChatGLM3's rules. `--corpora` holds
ja_*, zh_* and en_wiki.train.parquet and dialogues.jsonl; the dialogues are few and are read many times over. The bare
encoder gets the same texts ready in memory and the same number of threads; its ids are thrown away. With one thread the
process is confined to one core, so that nothing is had for free from another. The slow path is transformers' tokenizer in
Python over the same sentencepiece model, text by text, on a sample. What is compared runs in turn; a ratio is the median
over the pairs. Files lie in the page cache. Linux only.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from llmtuner.console import UserError, format_table, print0, run_cli
from llmtuner.data.converter import to_messages
from llmtuner.data.readers import read_rows, read_texts
from llmtuner.data.sources import get_dataset_attr
from llmtuner.data.tokenize import load_tokenized_dataset
from llmtuner.files import atomic_write_json
from llmtuner.hparams import DataArguments
from llmtuner.report.environment import environment
from llmtuner.tokenizer.fast import PROCESSORS, load_tokenizer, save_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "tokenize_throughput.json"
SAMPLE_BYTES = 1_000_000  # for the slow path
SETS = {
    "ja": ("pt", "ja_*.train.parquet"),
    "zh": ("pt", "zh_*.train.parquet"),
    "en": ("pt", "en_wiki.train.parquet"),
    "dialogues": ("sft", "dialogues.jsonl"),
}
DIALOGUES_TIMES = 20  # 0.4 MB would be read before the clock has ticked


def main() -> None:
    parser = argparse.ArgumentParser(description="preparation against the bare encoder")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.tokenizer
        if directory.is_file():
            save_tokenizer(options.tokenizer, directory := Path(scratch))
        tokenizer: Any = load_tokenizer(directory)
        if not PROCESSORS.get(tokenizer):
            raise UserError(f"{directory} holds no tokenizer.model, by which corpora are encoded.")
        slow, what = slow_tokenizer(directory / "tokenizer.model")
        many = Path(scratch) / "dialogues.jsonl"
        many.write_bytes((options.corpora / many.name).read_bytes() * DIALOGUES_TIMES)
        results = measure(options, {**SETS, "dialogues": ("sft", str(many))}, tokenizer, slow)
    columns = ["mb", "bare_mb_per_second", "ours_mb_per_second", "ratio", "slow_mb_per_second", "slow_ratio"]
    lines = [[name, *(f"{one[key]:,.2f}" if key in one else "" for key in columns)] for name, one in results.items()]
    print0(format_table(["", "MB", "bare, MB/s", "ours, MB/s", "time / bare", "slow, MB/s", "slow / bare"], lines))
    print0(f"slow: {what}")
    before = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    found = {f"{len(tokenizer):,} tokens": {**environment(), "slow": what, "results": results}}
    atomic_write_json(options.output, before | found)


def measure(options: argparse.Namespace, sets: dict[str, tuple[str, str]], tokenizer: Any, slow: Any) -> dict[str, Any]:
    """Speeds and ratios of each set, by one thread and by two."""
    prepare("sft", Path(sets["dialogues"][1]), tokenizer, 1)()  # what the first one of a process imports
    results: dict[str, Any] = {}
    cores = sorted(os.sched_getaffinity(0))
    for name, (stage, file) in sets.items():
        texts = texts_of(stage, options.corpora / file)
        size = sum(len(text.encode()) for text in texts)
        for threads in (1, 2):
            confine(cores[:threads])
            pairs = []
            for _ in range(options.repeats):
                bare = seconds(bare_encoder(tokenizer, texts, threads))
                pairs.append((bare, seconds(prepare(stage, options.corpora / file, tokenizer, threads))))
            results[f"{name}, {threads} thread{'s' * (threads > 1)}"] = {
                "mb": round(size / 1e6, 2),
                "bare_mb_per_second": round(size / 1e6 / median(bare for bare, _ in pairs), 3),
                "ours_mb_per_second": round(size / 1e6 / median(own for _, own in pairs), 3),
                "ratio": round(median(own / bare for bare, own in pairs), 3),
                "ratios": [round(own / bare, 3) for bare, own in pairs],
            }
            if threads == 1:
                results[f"{name}, 1 thread"] |= against_slow(slow, tokenizer, texts, options.repeats)
    return results


def confine(cores: list[int]) -> None:
    """Lets all threads of this process, and those to come, run on some cores only."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def texts_of(stage: str, file: Path) -> list[str]:
    """What the preparation hands to the encoder."""
    with tempfile.TemporaryDirectory() as scratch:
        source = get_dataset_attr("set", describe(Path(scratch), stage, file), file.parent)
        if stage == "pt":
            return list(read_texts(source))
        return [message["content"] for row in read_rows(source) for message in to_messages(source, row.values)]


def describe(directory: Path, stage: str, file: Path) -> Path:
    columns = {"columns": {"prompt": "text"}} if stage == "pt" else {}
    path = directory / "dataset_info.json"
    path.write_text(json.dumps({"set": {"file_name": file.name, **columns}}), encoding="utf-8")
    return path


def bare_encoder(tokenizer: Any, texts: list[str], threads: int) -> Callable[[], Any]:
    return lambda: PROCESSORS[tokenizer].encode(texts, num_threads=threads, out_type="numpy")


def prepare(stage: str, file: Path, tokenizer: Any, threads: int) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            describe(Path(scratch), stage, file)
            own = dict(dataset_dir=scratch, corpus_dir=str(file.parent), cache_dir=f"{scratch}/cache")
            load_tokenized_dataset("set", stage, tokenizer, DataArguments(**own, preprocessing_num_workers=threads))

    return run


def slow_tokenizer(model: Path) -> tuple[Any, str]:
    """transformers' own tokenizer in Python around a sentencepiece model, and its name."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class Slow(SentencePieceBackend):
        vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
        model_input_names = ["input_ids"]  # noqa: RUF012

    slow = Slow(vocab_file=str(model), unk_token="<unk>", bos_token=None, eos_token="</s>")
    return slow, "transformers.tokenization_utils_sentencepiece.SentencePieceBackend"


def against_slow(slow: Any, tokenizer: Any, texts: list[str], repeats: int) -> dict[str, float]:
    sample, size = [], 0
    for text in texts:
        if size >= SAMPLE_BYTES:
            break
        sample.append(text)
        size += len(text.encode())
    pairs = [
        (
            seconds(bare_encoder(tokenizer, sample, 1)),
            seconds(lambda: [slow(text, add_special_tokens=False)["input_ids"] for text in sample]),
        )
        for _ in range(repeats)
    ]
    return {
        "slow_mb_per_second": round(size / 1e6 / median(own for _, own in pairs), 3),
        "slow_ratio": round(median(own / bare for bare, own in pairs), 2),
    }


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_cli(main)
