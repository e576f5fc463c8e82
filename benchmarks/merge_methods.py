"""Merges Japanese pieces into ChatGLM3's tokenizer in several ways, and shows what each does to ja, zh, en and code.

    python benchmarks/merge_methods.py --base DIR/tokenizer.model --corpora DIR [--candidates FILE.model] [--sample-mb MB]

`--corpora` holds ja_wiki.train.*, ja_aozora.train.*, zh_*.train.* to learn from and ja_*.test.*, zh_*.test.*, en_*.test.*
to measure on; code is Python's own standard library. `--candidates` is the piece list of another Japanese tokenizer.
Japanese is counted by documents, relative to the base tokenizer. A changed line is one whose ids differ; "beyond quotes"
are those among them without any character that Chinese and English do not write: these must be 0.
"""

import argparse
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmtuner.console import format_table, print0, run_cli
from llmtuner.data.readers import read_texts
from llmtuner.data.sources import FILE_TYPES, DatasetAttr
from llmtuner.files import atomic_write_json
from llmtuner.tokenizer.comparison import compare
from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
from llmtuner.tokenizer.fast import SPECIAL_TOKENS, encode_sentencepiece, read_sentencepiece, to_processor
from llmtuner.tokenizer.merge_vocab import (
    filter_candidates,
    merge_as_original,
    merge_reachable,
    merge_vocab,
    unreachable_tokens,
)
from llmtuner.tokenizer.sentencepiece_bpe import interleave_by_bytes, split_sentences, train_bpe
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

SCRIPT = WRITING_SYSTEMS["japanese"]
CODE_FILES = 400
SEED = "seed list"


def main() -> None:
    parser = argparse.ArgumentParser(description="compare ways of merging Japanese pieces")
    parser.add_argument("--base", type=Path, required=True, help="ChatGLM3's tokenizer.model")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--candidates", type=Path, help="a sentencepiece model whose pieces are merged too")
    parser.add_argument("--sample-mb", type=float, default=1e6, help="Japanese text to learn from, at most")
    parser.add_argument("--vocab-size", type=int, default=20_000, help="of sentencepiece models")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "merge_methods.json")
    options = parser.parse_args()
    corpora = options.corpora

    def japanese() -> Iterator[str]:
        streams = {name: texts(corpora, f"ja_{name}.train.*") for name in ("wiki", "aozora")}
        for _, text in interleave_by_bytes(streams, {"wiki": 0.8, "aozora": 0.2}, int(options.sample_mb * 1e6)):
            yield text

    def chinese() -> Iterator[str]:
        return texts(corpora, "zh_*.train.*")

    base = read_sentencepiece(options.base)
    native = len(base.pieces) + len(SPECIAL_TOKENS)
    merges: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def learned(start: Any, count: int) -> list[str]:
        lines = segment_corpus(
            start, (line for text in japanese() for line in text.splitlines() if line.strip()), SCRIPT
        )
        return list(train_continued_bpe(lines, count, SCRIPT, chinese()))

    with tempfile.TemporaryDirectory() as scratch:
        for name, chatglm3_spec in (("original", False), ("original, base's rules", True)):
            file, start = Path(scratch) / "candidates.model", time.perf_counter()
            train_bpe(
                (s for text in japanese() for s in split_sentences(text)),
                file,
                options.vocab_size,
                chatglm3_spec=chatglm3_spec,
            )
            seconds[name] = round(time.perf_counter() - start, 1)
            merges[name] = merge_as_original(base, read_sentencepiece(file))
            if chatglm3_spec:
                chosen = filter_candidates(base, read_sentencepiece(file), SCRIPT, chinese()).accepted
                merges["the same pieces, filtered, below"] = merge_reachable(base, chosen)[0]

    def added(name: str) -> int:
        return len(merges[name].pieces) - native

    # Ours with as many pieces as each of theirs.
    pairs = [(f"continued BPE, as many as {name}", name) for name in ("original", "original, base's rules")]
    start = time.perf_counter()
    pieces = learned(base, max(added(theirs) for _, theirs in pairs))
    seconds["continued BPE"] = round(time.perf_counter() - start, 1)
    for ours, theirs in pairs:
        merges[ours] = merge_reachable(base, pieces[: added(theirs)])[0]
    if options.candidates:
        candidates = read_sentencepiece(options.candidates)
        merges[f"{SEED}, original"] = merge_as_original(base, candidates)
        chosen = filter_candidates(base, candidates, SCRIPT, chinese()).accepted
        merges[f"{SEED}, filtered, below"] = living = merge_reachable(base, chosen)[0]
        kept = [piece.piece for piece in living.pieces[native:]]
        more = learned(merge_vocab(base, kept, placeholders=False), added(f"{SEED}, original") - len(kept))
        merges[f"{SEED}, filtered, filled up by continued BPE"] = merge_reachable(base, kept + more)[0]
        pairs.append((f"{SEED}, filtered, filled up by continued BPE", f"{SEED}, original"))

    ja = {file.name.split(".")[0]: list(read(file)) for file in sorted(corpora.glob("ja_*.test.*"))}
    others = {
        language: [
            line for text in texts(corpora, f"{language}_*.test.*") for line in text.splitlines() if line.strip()
        ]
        for language in ("zh", "en")
    }
    others["code"] = code_lines()
    rows, results = [], {}
    before = to_processor(base)
    for name, merged in merges.items():
        after = to_processor(merged)
        result: dict[str, Any] = {"added": len(merged.pieces) - native, "dead": len(unreachable_tokens(base, merged))}
        result["ja"] = {file: round(compare(before, after, documents).token_ratio, 4) for file, documents in ja.items()}
        for language, lines in others.items():
            changed = [line for line, old, new in split_by_both(before, after, lines) if old != new]
            result[language] = {
                "lines": len(lines),
                "changed": len(changed),
                "beyond_quotes": sum(not quotes_japanese(line) for line in changed),
            }
        results[name] = result
        rows.append(
            [name, f"{result['added']:,}", *(f"{ratio:.4f}" for ratio in result["ja"].values())]
            + [f"{result[lang]['changed']:,} / {result[lang]['beyond_quotes']:,}" for lang in others]
            + [f"{result['dead']}"]
        )
    counts = [f"{language} of {len(lines):,}" for language, lines in others.items()]
    print0(format_table(["merge", "added", *ja, *counts, "dead"], rows))
    print0("\nzh, en, code: changed lines / changed lines beyond quotes")
    print0(f"seconds to learn: {seconds}")
    relative = {
        f"{ours} / {theirs}": {
            file: round(results[ours]["ja"][file] / results[theirs]["ja"][file], 4) for file in results[ours]["ja"]
        }
        for ours, theirs in pairs
        if added(ours) == added(theirs)
    }
    print0("")
    print0(
        format_table(
            ["Japanese tokens, ours / theirs", *ja], [[key, *map(str, row.values())] for key, row in relative.items()]
        )
    )
    atomic_write_json(
        options.output,
        {
            "python": platform.python_version(),
            "arguments": {"sample_mb": options.sample_mb, "vocab_size": options.vocab_size},
            "seconds": seconds,
            "merges": results,
            "relative": relative,
        },
    )


def texts(directory: Path, pattern: str) -> Iterator[str]:
    for file in sorted(directory.glob(pattern)):
        if file.suffix in FILE_TYPES:
            yield from read(file)


def read(file: Path) -> Iterator[str]:
    return read_texts(DatasetAttr(name=file.name, files=(str(file),), columns={"prompt": "text"}))


def code_lines() -> list[str]:
    """Lines of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:CODE_FILES]
    return [
        line
        for file in files
        for line in file.read_text(encoding="utf-8", errors="ignore").splitlines()
        if line.strip()
    ]


def split_by_both(before: Any, after: Any, lines: list[str]) -> Iterator[tuple[str, list[int], list[int]]]:
    return zip(lines, encode_sentencepiece(before, lines), encode_sentencepiece(after, lines), strict=True)


def quotes_japanese(line: str) -> bool:
    """Whether a line holds a kana, or a Han character outside GB 2312 (Japanese or traditional script)."""
    return bool(SCRIPT.exclusive_pattern.search(line)) or any(
        map(SCRIPT.has_uncommon, SCRIPT.shared_run_pattern.findall(line))
    )


if __name__ == "__main__":
    run_cli(main)
