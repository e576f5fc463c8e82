"""Measures tokenizers: ways of merging, equality with sentencepiece, step 1 by the size of its sample, speed of tokenizing.

    python -m benchmarks.tokenizer merge --base CHATGLM3.model --corpora DIR [--candidates FILE.model]
    python -m benchmarks.tokenizer equality --tokenizer CHATGLM3.model --corpora DIR
    python -m benchmarks.tokenizer training --base CHATGLM3.model --corpora DIR
    python -m benchmarks.tokenizer throughput --tokenizer DIR_OR_FILE.model --corpora DIR        Linux only

`--corpora` holds ja_*, zh_* and en_*.train.* to learn from or to tokenize, ja_*, zh_* and en_*.test.* to measure on, and
dialogues.jsonl.

What is compared runs in turn; a ratio is the median over the pairs. Files lie in the page cache. benchmarks/README.md says
what is computed how.
"""

import argparse
import itertools
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.common import NUM_NEW_TOKENS, Values, add_options, print_results, run_process, save_results, seconds_of
from llmtuner.console import UserError, print0, progress, run_cli
from llmtuner.data.converter import to_messages
from llmtuner.data.readers import read_rows, read_texts
from llmtuner.data.sources import FILE_TYPES, DatasetAttr, get_dataset_attr
from llmtuner.data.tokenize import load_tokenized_dataset
from llmtuner.hparams import DataArguments
from llmtuner.tokenizer import chatglm3, encoding, merge_vocab
from llmtuner.tokenizer.comparison import compare
from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
from llmtuner.tokenizer.sentencepiece_bpe import interleave_by_bytes, split_sentences, train_bpe
from llmtuner.tokenizer.vocab import SentencePieceVocab, Vocab, read_vocab
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

JAPANESE = WRITING_SYSTEMS["japanese"]
SETS, PROPORTIONS = ("ja_wiki", "ja_aozora"), (0.8, 0.2)  # as in step 1's mix
ROW_GROUP_BYTES = 4_000_000  # of the large corpora of `training`
SLOW_SAMPLE_BYTES = 1_000_000
REPEATED_DIALOGUES = 20  # 0.4 MB would be read before the clock has ticked
DATASETS = {"ja": "ja_*.train.parquet", "zh": "zh_*.train.parquet", "en": "en_wiki.train.parquet"}  # of `throughput`


def texts(directory: Path, pattern: str) -> Iterator[str]:
    """The documents of all files that match."""
    files = tuple(str(file) for file in sorted(directory.glob(pattern)) if file.suffix in FILE_TYPES)
    return read_texts(DatasetAttr(name=pattern, files=files, columns={"prompt": "text"}))


def lines_of(documents: Iterable[str]) -> Iterator[str]:
    return (line for text in documents for line in text.splitlines() if line.strip())


def num_bytes(documents: Iterable[str]) -> int:
    """UTF-8 bytes."""
    return sum(len(text.encode()) for text in documents)


def measure_merge(options: argparse.Namespace) -> None:
    """Ways of merging Japanese tokens into ChatGLM3's tokenizer."""
    base, corpora = SentencePieceVocab.read(options.base), options.corpora
    merges, seconds, pairs = merge_all(base, options)
    ja = {file.name.split(".")[0]: list(texts(corpora, file.name)) for file in sorted(corpora.glob("ja_*.test.*"))}
    others = {language: list(lines_of(texts(corpora, f"{language}_*.test.*"))) for language in ("zh", "en")}
    stdlib = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:400]
    others["code"] = list(lines_of(file.read_text(encoding="utf-8", errors="ignore") for file in stdlib))
    results = {}
    for name, merged in merges.items():
        unreachable = len(merge_vocab.unreachable_tokens(base, merged))
        result: Values = {"added": merged.first_new_id - base.first_new_id, "unreachable": unreachable}
        result["ja"] = {file: round(compare(base, merged, documents).token_ratio, 4) for file, documents in ja.items()}
        for language, lines in others.items():
            ids = (vocab.encode(lines) for vocab in (base, merged))
            changed = [line for line, old, new in zip(lines, *ids, strict=True) if old != new]
            beyond_quotes = sum(not quotes_japanese(line) for line in changed)
            result[language] = {"lines": len(lines), "changed": len(changed), "beyond_quotes": beyond_quotes}
        results[name] = result
    print_results(f"ways of merging; seconds to learn: {seconds}", results)
    relative = {}
    for ours, theirs in (pair for pair in pairs if results[pair[0]]["added"] == results[pair[1]]["added"]):
        ratios = {file: round(ratio / results[theirs]["ja"][file], 4) for file, ratio in results[ours]["ja"].items()}
        relative[f"{ours} / {theirs}"] = ratios
    print_results("Japanese tokens, ours / theirs", relative)
    arguments = {"sample_mb": options.sample_mb, "vocab_size": options.vocab_size}
    save_results(options.output, {"arguments": arguments, "seconds": seconds, "merges": results, "relative": relative})


def merge_all(
    base: SentencePieceVocab, options: argparse.Namespace
) -> tuple[dict[str, Vocab], dict[str, float], list[tuple[str, str]]]:
    """Merged models by name, seconds to learn, and pairs (ours, theirs) to compare."""
    merges: dict[str, Vocab] = {}
    seconds: dict[str, float] = {}

    def japanese() -> Iterator[str]:
        streams = {name: texts(options.corpora, f"{name}.train.*") for name in SETS}
        proportions = dict(zip(SETS, PROPORTIONS, strict=True))
        return (text for _, text in interleave_by_bytes(streams, proportions, int(options.sample_mb * 1e6)))

    def chinese() -> Iterator[str]:
        return texts(options.corpora, "zh_*.train.*")

    def learn(start: Vocab, count: int) -> list[str]:
        corpus = segment_corpus(start, lines_of(japanese()), JAPANESE)
        return list(train_continued_bpe(corpus, count, JAPANESE, chinese()))

    def added(name: str) -> int:
        return merges[name].first_new_id - base.first_new_id

    def filtered(candidates: Vocab) -> Vocab:
        accepted = merge_vocab.filter_candidates(base, candidates, JAPANESE, chinese()).accepted
        return merge_vocab.merge_reachable(base, accepted)[0]

    original = {"original": False, "original, base's rules": True}
    for name, chatglm3_spec in original.items():
        with tempfile.TemporaryDirectory() as scratch:
            file, start = Path(scratch) / "candidates.model", time.perf_counter()
            sentences = (sentence for text in japanese() for sentence in split_sentences(text))
            train_bpe(sentences, file, options.vocab_size, chatglm3_spec=chatglm3_spec)
            seconds[name] = round(time.perf_counter() - start, 1)
            merges[name] = merge_vocab.merge_as_original(base, read_vocab(file))
            if chatglm3_spec:
                merges["the same pieces, filtered, below"] = filtered(read_vocab(file))
    # Ours with as many tokens as each of theirs.
    pairs = [(f"continued BPE, as many as {name}", name) for name in original]
    start = time.perf_counter()
    pieces = learn(base, max(map(added, original)))
    seconds["continued BPE"] = round(time.perf_counter() - start, 1)
    for ours, theirs in pairs:
        merges[ours] = merge_vocab.merge_reachable(base, pieces[: added(theirs)])[0]
    if options.candidates:
        candidates, seed = read_vocab(options.candidates), "seed list"
        merges[f"{seed}, original"] = merge_vocab.merge_as_original(base, candidates)
        merges[f"{seed}, filtered, below"] = kept = filtered(candidates)
        pieces = kept.tokens[base.first_new_id :]
        pieces += learn(base.append(pieces, after_special=False), added(f"{seed}, original") - len(pieces))
        merges[f"{seed}, filtered, filled up by continued BPE"] = merge_vocab.merge_reachable(base, pieces)[0]
        pairs.append((f"{seed}, filtered, filled up by continued BPE", f"{seed}, original"))
    return merges, seconds, pairs


def quotes_japanese(line: str) -> bool:
    """Whether a line has a kana, or a Han character outside GB 2312 (Japanese or traditional script)."""
    shared = JAPANESE.shared_run_pattern.findall(line)
    return bool(JAPANESE.exclusive_pattern.search(line)) or any(map(JAPANESE.has_uncommon, shared))


def measure_equality(options: argparse.Namespace) -> None:
    """Ids of the fast tokenizer against those of its sentencepiece model, both with as many threads as there are cores."""
    fast_tokenizer = chatglm3.build_fast_tokenizer(options.tokenizer)
    processor = chatglm3.to_processor(chatglm3.read_sentencepiece(options.tokenizer))
    encoders = {
        "fast": lambda some: encoding.encode_fast(fast_tokenizer, some),
        "sentencepiece": lambda some: encoding.encode_sentencepiece(processor, some),
    }
    files = [file for file in options.corpora.iterdir() if file.suffix in FILE_TYPES and "dialogues" not in file.name]
    results: dict[str, Values] = {}
    for file in progress(sorted(files), "comparing", unit=" files"):
        size, seconds = 0.0, dict.fromkeys(encoders, 0.0)
        counts = {"lines": 0, "documents": 0, "differing": 0}
        documents = texts(file.parent, file.name)
        while batch := list(itertools.islice(documents, 4_096)):
            for kind, some in (("documents", batch), ("lines", [line for text in batch for line in text.splitlines()])):
                size += num_bytes(some) / 1e6
                ids = {}
                for name, encode in encoders.items():
                    start = time.perf_counter()
                    ids[name] = encode(some)
                    seconds[name] += time.perf_counter() - start
                counts[kind] += len(some)
                counts["differing"] += sum(a != b for a, b in zip(*ids.values(), strict=True))
        results[file.name] = counts | {f"{name}_mb_per_second": size / spent for name, spent in seconds.items()}
    totals = {key: sum(result[key] for result in results.values()) for key in ("lines", "documents", "differing")}
    print_results("the fast tokenizer against sentencepiece", {**results, "all": totals})
    save_results(options.output, {"tokenizer": options.tokenizer.name, **totals})


def measure_training(options: argparse.Namespace) -> None:
    """Time, memory and tokens per character of step 1 by the size of its sample."""
    if options.learn:  # this is the process of one sample
        print(json.dumps(learn_sample(options.base, options.corpora, options.learn)))
        return
    available = sum(num_bytes(texts(options.corpora, f"{name}.train.*")) for name in SETS)
    sizes = [size for size in (int(mb * 1e6) for mb in options.samples) if size < available]
    samples: dict[str, Values] = {}
    for size in [*sizes, available]:
        command = [sys.executable, "-m", "benchmarks.tokenizer", "training", "--base", options.base.resolve()]
        done = run_process([*command, "--corpora", options.corpora.resolve(), "--learn", size])
        name = f"{size / 1e6:.1f} MB, {size / available:.0%}"
        samples[name] = {**json.loads(done.stdout.splitlines()[-1]), **done.usage()}
    best = list(samples.values())[-1]["tokens_per_character"]
    for sample in samples.values():
        per_character = sample["tokens_per_character"]
        sample["against_all"] = {file: round(value / best[file], 4) for file, value in per_character.items()}
    print_results("samples", samples)
    enough = next(name for name, sample in samples.items() if sample["against_all"]["all"] <= 1.01)
    print0(f"\nthe smallest sample that costs at most 1 % on all files together: {enough}\n")
    large = {f"{mb:g} MB": run_step1(options, int(mb * 1e6)) for mb in options.large}
    print_results("step 1 by the size of its corpus", large)
    results = {"samples": samples, "smallest_within_1_percent": enough, "step1": large}
    save_results(options.output, {"results": results})


def learn_sample(base_file: Path, corpora: Path, size: int) -> Values:
    """Learns from a sample of `size` bytes and encodes the test files."""
    base = read_vocab(base_file)
    streams = {name: texts(corpora, f"{name}.train.*") for name in SETS}
    proportions = {name: num_bytes(texts(corpora, f"{name}.train.*")) for name in SETS}
    sample = (text for _, text in interleave_by_bytes(streams, proportions, size))
    corpus = segment_corpus(base, lines_of(sample), JAPANESE)
    pieces = list(train_continued_bpe(corpus, NUM_NEW_TOKENS, JAPANESE, texts(corpora, "zh_*.train.*")))
    merged = merge_vocab.merge_reachable(base, pieces)[0]
    tokens, characters = {"all": 0}, {"all": 0}
    for file in sorted(corpora.glob("ja_*.test.*")):
        name, held_out = file.name.split(".")[0], list(texts(corpora, file.name))
        tokens[name], characters[name] = sum(map(len, merged.encode(held_out))), sum(map(len, held_out))
    tokens["all"], characters["all"] = sum(tokens.values()), sum(characters.values())
    per_character = {name: round(tokens[name] / characters[name], 5) for name in tokens}
    return {"pieces": len(pieces), "tokens_per_character": per_character}


def run_step1(options: argparse.Namespace, size: int) -> Values:
    """Runs step 1 on a corpus of `size` bytes of Japanese."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus, base, work = (Path(scratch) / name for name in ("corpus", "base", "work"))
        corpus.mkdir()
        base.mkdir()
        (base / "tokenizer.model").symlink_to(options.base.resolve())
        enlarged = tuple(f"{name}.train" for name in SETS)
        for file in options.corpora.iterdir():
            if file.name.startswith(("zh_", "ja_")) and not file.name.startswith(enlarged):
                (corpus / file.name).symlink_to(file.resolve())
        for name, proportion in zip(SETS, PROPORTIONS, strict=True):
            enlarge(options.corpora, name, corpus / f"{name}.train.parquet", int(size * proportion))
        variables = dict(PROFILE="chatglm3-6b", WORK_DIR=work, CORPUS_DIR=corpus, BASE_MODEL_DIR=base)
        done = run_process([sys.executable, "step1_train_tokenizer.py"], **variables)
        metrics = json.loads((work / "metrics" / "step1.json").read_text(encoding="utf-8"))
        return {**done.usage(), "read_mb": round(metrics["input_bytes"] / 1e6, 1), "pieces": metrics["new_pieces"]}


def enlarge(corpora: Path, name: str, file: Path, size: int) -> None:
    """Writes a parquet file of `size` bytes of text by drawing a set's documents again and again, their lines shuffled."""
    draw, documents, written = random.Random(0), list(texts(corpora, f"{name}.train.*")), 0
    schema = pyarrow.schema([("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while written < size:
            batch: list[str] = []
            end = min(written + ROW_GROUP_BYTES, size)
            while written < end:
                lines = draw.choice(documents).splitlines()
                draw.shuffle(lines)
                batch.append("\n".join(lines))
                written += len(batch[-1].encode())
            writer.write_batch(pyarrow.record_batch([pyarrow.array(batch)], schema=schema))


def measure_throughput(options: argparse.Namespace) -> None:
    """Speed from a file to token ids on disk, by one thread and by two, each thread on a core of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.tokenizer
        if directory.is_file():
            chatglm3.save_tokenizer(options.tokenizer, directory := Path(scratch))
        tokenizer: Any = encoding.load_tokenizer(directory)
        if not (processor := encoding.PROCESSORS.get(tokenizer)):
            raise UserError(f"{directory} has no tokenizer.model, which encodes corpora.")
        slow, slow_name = slow_tokenizer(directory / "tokenizer.model")
        corpus, dialogues = Path(scratch) / "corpus", "dialogues.jsonl"
        corpus.mkdir()
        for file in options.corpora.glob("*.parquet"):
            (corpus / file.name).symlink_to(file.resolve())
        (corpus / dialogues).write_bytes((options.corpora / dialogues).read_bytes() * REPEATED_DIALOGUES)
        info: Values = {name: {"file_name": file, "columns": {"prompt": "text"}} for name, file in DATASETS.items()}
        info_file = corpus / "dataset_info.json"
        info_file.write_text(json.dumps({**info, "dialogues": {"file_name": dialogues}}), encoding="utf-8")

        def tokenize(name: str, threads: int) -> None:
            directories = dict(dataset_dir=str(corpus), corpus_dir=str(corpus), preprocessing_num_workers=threads)
            with tempfile.TemporaryDirectory() as cache:
                arguments: Any = DataArguments(**directories, cache_dir=cache)  # type: ignore[arg-type]
                load_tokenized_dataset(name, "pt" if name in DATASETS else "sft", tokenizer, arguments)

        def encode(some: list[str], threads: int) -> Any:
            return processor.encode(some, num_threads=threads, out_type="numpy")

        def encode_slowly(some: list[str]) -> Any:
            return [slow(text, add_special_tokens=False)["input_ids"] for text in some]

        tokenize("dialogues", 1)  # pays for what the first call of a process imports
        results: dict[str, Values] = {}
        cores = sorted(os.sched_getaffinity(0))
        for name in (*DATASETS, "dialogues"):
            source = get_dataset_attr(name, info_file, corpus)
            if name in DATASETS:
                documents = list(read_texts(source))
            else:
                messages = (to_messages(source, row.values) for row in read_rows(source))
                documents = [message["content"] for dialogue in messages for message in dialogue]
            ends = itertools.accumulate(len(text.encode()) for text in documents)
            sample = documents[: 1 + sum(end < SLOW_SAMPLE_BYTES for end in ends)]
            for threads in (1, 2):
                for thread in os.listdir("/proc/self/task"):  # and those that they start
                    os.sched_setaffinity(int(thread), cores[:threads])
                bare, ours = partial(encode, documents, threads), partial(tokenize, name, threads)
                values = compare_speed(documents, options.repeats, bare=bare, ours=ours)
                if threads == 1:
                    bare, slowly = partial(encode, sample, 1), partial(encode_slowly, sample)
                    slower = compare_speed(sample, options.repeats, bare=bare, slow=slowly)
                    values |= {"slow_mb_per_second": slower["slow_mb_per_second"], "slow_ratio": slower["ratio"]}
                results[f"{name}, {threads} thread{'s' * (threads > 1)}"] = values
    print_results(f"ratio: time against the bare encoder; slow: {slow_name}", results)
    save_results(options.output, {"slow": slow_name, "results": results}, f"{len(tokenizer):,} tokens")


def compare_speed(documents: list[str], repeats: int, **functions: Callable[[], Any]) -> Values:
    """MB/s of two functions that run in turn on the same documents, and the second's time relative to the first's."""
    size = num_bytes(documents) / 1e6
    pairs = [tuple(map(seconds_of, functions.values())) for _ in range(repeats)]
    ratios = [round(second / first, 3) for first, second in pairs]
    speeds = zip(functions, zip(*pairs, strict=True), strict=True)
    values = {f"{name}_mb_per_second": round(size / median(seconds), 3) for name, seconds in speeds}
    return {"mb": round(size, 2), **values, "ratio": median(ratios), "ratio_per_round": ratios}


def slow_tokenizer(model: Path) -> tuple[Any, str]:
    """transformers' own tokenizer in Python around a sentencepiece model, and its name."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    class Slow(SentencePieceBackend):
        vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
        model_input_names = ["input_ids"]  # noqa: RUF012

    slow = Slow(vocab_file=str(model), unk_token="<unk>", bos_token=None, eos_token="</s>")
    return slow, f"{SentencePieceBackend.__module__}.{SentencePieceBackend.__qualname__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(measure: Callable, results: str, model: str, **defaults: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(measure.__name__.removeprefix("measure_"), help=measure.__doc__)
        add_options(command, results, corpora=..., **defaults)
        command.add_argument(f"--{model}", type=Path, required=True, help="ChatGLM3's tokenizer.model, or one like it")
        command.set_defaults(measure=measure)
        return command

    command = add(measure_merge, "merge_methods.json", "base")
    command.add_argument("--candidates", type=Path, help="a sentencepiece model whose tokens are merged too")
    command.add_argument("--sample-mb", type=float, default=1e6, help="Japanese text to learn from, at most")
    command.add_argument("--vocab-size", type=int, default=20_000, help="of sentencepiece models")
    add(measure_equality, "tokenizer_equality.json", "tokenizer")
    command = add(measure_training, "tokenizer_training.json", "base")
    command.add_argument("--samples", type=float, nargs="+", default=(1, 2, 5, 10, 20), metavar="MB")
    sizes = "sizes of the large corpora, more than the 100 MB that step 1 reads; none: left out"
    command.add_argument("--large", type=float, nargs="*", default=(150, 1_000), metavar="MB", help=sizes)
    command.add_argument("--learn", type=int, help=argparse.SUPPRESS)
    add(measure_throughput, "tokenize_throughput.json", "tokenizer", repeats=5)
    options = parser.parse_args()
    options.measure(options)


if __name__ == "__main__":
    run_cli(main)
