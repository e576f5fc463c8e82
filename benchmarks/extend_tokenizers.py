"""Ways of adding a language to the tokenizers of several bases: tokens saved, text of other languages changed, time, memory.

    python -m benchmarks.extend_tokenizers --bases DIR DIR ... --corpora DIR                           Japanese
    python -m benchmarks.extend_tokenizers --bases DIR --corpora DIR --languages ko km vi --count 2000
    python -m benchmarks.extend_tokenizers --bases DIR --corpora DIR --rival CHECKOUT    also taidopurason/tokenizer-extension

A base is a directory with a tokenizer.json, or with ChatGLM3's tokenizer.model. `--corpora` holds ja_*.train.*, ja_*.test.* and
so on; code is Python's standard library. All ways get the same text and add as many tokens:

    continued BPE        steps 1 and 2 of this project
    add_tokens           `tokenizer.add_tokens` with the tokens of a new BPE that the base does not have
    new BPE, appended    that BPE's merges and tokens behind those of the base
    tokenizer-extension  the code of arXiv 2512.03989, from a checkout (`--rival`)

A changed line is one of which the ids differ; those that quote the added language are counted apart.
"""

import argparse
import itertools
import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    NUM_NEW_TOKENS,
    Values,
    make_parser,
    markdown_table,
    print_results,
    run_process,
    save_results,
)
from benchmarks.tokenizer import lines_of, texts
from llmtuner.console import run_cli
from llmtuner.tokenizer.chatglm3 import SPACE, build_fast_tokenizer
from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
from llmtuner.tokenizer.merge_vocab import merge_reachable, new_candidates, unreachable_tokens
from llmtuner.tokenizer.sentencepiece_bpe import interleave_by_bytes, split_sentences, train_bpe
from llmtuner.tokenizer.vocab import JsonVocab, SentencePieceVocab, Vocab, read_vocab
from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS, WritingSystem

WRITTEN_IN = {"ja": "japanese", "ko": "korean", "th": "thai", "km": "khmer", "vi": "latin", "hi": "devanagari"}
OTHERS = ("zh", "en", "code")  # languages that must not change
METHODS = ("continued BPE", "add_tokens", "new BPE, appended", "tokenizer-extension")
MIX = {"ja_wiki": 0.8, "ja_aozora": 0.2}  # as in step 1; other languages: all their training files
STDLIB_FILES = 400
NEW_BPE_SIZE = 4  # tokens of a new BPE per token wanted: the base has many of them


def main() -> None:
    parser = make_parser(__doc__, "extend_tokenizers.json", corpora=...)
    parser.add_argument("--bases", type=Path, nargs="+", required=True, help="directories of tokenizers")
    parser.add_argument("--languages", nargs="+", choices=WRITTEN_IN, default=["ja"])
    parser.add_argument("--count", type=int, default=NUM_NEW_TOKENS, help="new tokens (default: %(default)s)")
    parser.add_argument(
        "--sample-mb", type=float, default=20.0, help="text to learn from, at most (default: %(default)s)"
    )
    parser.add_argument("--rival", type=Path, help="checkout of tokenizer-extension")
    parser.add_argument(
        "--measure", nargs=3, help=argparse.SUPPRESS
    )  # this is the process of one base, language, method
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options, Path(options.measure[0]), *options.measure[1:])))
        return
    for language in options.languages:
        results: dict[str, Values] = {}
        for base in options.bases:
            for method in METHODS if options.rival else METHODS[:-1]:
                if method == METHODS[-1] and not (base / "tokenizer.json").is_file():
                    continue
                results[f"{base.name}, {method}"] = run_worker(options, base, language, method)
        print_results(f"{options.count:,} new tokens for {language}; ratio: tokens relative to the base's", results)
        section = {"count": options.count, "sample_mb": options.sample_mb, "results": results}
        save_results(options.output, section, language)


def run_worker(options: argparse.Namespace, base: Path, language: str, method: str) -> Values:
    """Measures in a process of its own, whose largest memory is that of this way."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.extend_tokenizers",
        "--bases",
        base,
        "--corpora",
        options.corpora.resolve(),
    ]
    command += [
        "--count",
        options.count,
        "--sample-mb",
        options.sample_mb,
        "--measure",
        base.resolve(),
        language,
        method,
    ]
    done = run_process([*command, *(["--rival", options.rival.resolve()] if options.rival else [])])
    return {**json.loads(done.stdout.splitlines()[-1]), "peak_mb": round(done.peak_mb)}


def measure(options: argparse.Namespace, directory: Path, language: str, method: str) -> Values:
    """Extends one tokenizer in one way, and encodes all test texts before and after."""
    base, script = read_vocab(directory), WRITING_SYSTEMS[WRITTEN_IN[language]]
    files = {file.name.split(".")[0]: file for file in sorted(options.corpora.glob(f"{language}_*.train.*"))}
    streams = {
        name: texts(options.corpora, file.name) for name, file in files.items() if language != "ja" or name in MIX
    }
    weights = {name: MIX.get(name, 1.0) for name in streams}
    documents = [text for _, text in interleave_by_bytes(streams, weights, int(options.sample_mb * 1e6))]

    start = time.perf_counter()
    if method == "continued BPE":
        corpus = segment_corpus(base, lines_of(documents), script)
        reference = (text for other in ("zh", "en") for text in texts(options.corpora, f"{other}_*.train.*"))
        tokens = list(train_continued_bpe(corpus, options.count, script, reference if script.shared else ()))
        merged, added = merge_reachable(base, tokens)[0], len(tokens)
    elif method == "tokenizer-extension":
        merged, added = extend_by_rival(options.rival, directory, documents, options.count), options.count
    elif method == "add_tokens":
        new = train_new_bpe(base, documents, options.count)
        merged, added = AddedTokens(directory, base, [*new.values()]), len(new)
    else:
        new = train_new_bpe(base, documents, options.count)
        merged, added = append_new_bpe(base, [*new]), len(new)
    result: Values = {"added": added, "seconds": round(time.perf_counter() - start, 1)}
    result["unreachable"] = len(unreachable_tokens(base, merged)) if isinstance(merged, Vocab) else "-"
    tests = {
        file.name.split(".")[0]: list(texts(options.corpora, file.name))
        for file in sorted(options.corpora.glob(f"{language}_*.test.*"))
    }
    result["ratio"] = {
        name: round(sum(map(len, merged.encode(held_out))) / sum(map(len, base.encode(held_out))), 4)
        for name, held_out in tests.items()
    }
    for other, lines in other_lines(options.corpora).items():
        changed = [
            line for line, old, new in zip(lines, base.encode(lines), merged.encode(lines), strict=True) if old != new
        ]
        result[other] = {
            "lines": len(lines),
            "changed": len(changed),
            "beyond_quotes": sum(not quotes(script, line) for line in changed),
        }
    return result


def other_lines(corpora: Path) -> dict[str, list[str]]:
    """Lines of the languages that must not change, and of code."""
    lines = {language: list(lines_of(texts(corpora, f"{language}_*.test.*"))) for language in ("zh", "en")}
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:STDLIB_FILES]
    return lines | {"code": list(lines_of(file.read_text(encoding="utf-8", errors="ignore") for file in files))}


def quotes(script: WritingSystem, line: str) -> bool:
    """Whether a line has characters that only the added language writes, or uncommon ones of a script that it shares."""
    return bool(script.exclusive_pattern.search(line)) or bool(script.charset and script.uncommon_runs(line))


def train_new_bpe(base: Vocab, documents: list[str], count: int) -> dict[str, str]:
    """The first `count` tokens of a BPE trained from scratch that the base does not have: token -> text."""
    from tempfile import TemporaryDirectory

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if isinstance(base, SentencePieceVocab):
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / "new.model"
            train_bpe((part for text in documents for part in split_sentences(text)), file, 2 * count)
            new = new_candidates(base, read_vocab(file))
    else:
        assert isinstance(base, JsonVocab)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer, tokenizer.pre_tokenizer = base.backend.normalizer, base.backend.pre_tokenizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=NEW_BPE_SIZE * count, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(documents, trainer)
        ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        known = {*base.tokens}
        new = {token: base.text(token) or "" for token, _ in ordered if token not in known}
    return dict(itertools.islice(((token, text) for token, text in new.items() if text), count))


def append_new_bpe(base: Vocab, tokens: list[str]) -> Vocab:
    """Every token behind those of the base, whether or not its parts are ever adjacent."""
    return base.append(tokens)


class AddedTokens:
    """The base with tokens that `add_tokens` has added: they cut every text in which they occur."""

    def __init__(self, directory: Path, base: Vocab, new: list[str]) -> None:
        from tokenizers import AddedToken, Tokenizer

        if isinstance(base, JsonVocab):
            self.backend = Tokenizer.from_str(json.dumps({**base.content, "post_processor": None}))
        else:
            self.backend = build_fast_tokenizer(directory / "tokenizer.model").backend_tokenizer
        # As `PreTrainedTokenizerFast.add_tokens` does with strings.
        self.backend.add_tokens([AddedToken(text.replace(SPACE, " "), special=False) for text in new])

    def encode(self, some: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(some, add_special_tokens=False)]


def extend_by_rival(checkout: Path, directory: Path, documents: list[str], count: int) -> Vocab:
    """Trains and extends with the functions of a checkout of taidopurason/tokenizer-extension."""
    from tempfile import TemporaryDirectory

    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(checkout))
    from tokenizer_extension.extension import extend_tokenizer  # type: ignore[import-not-found]
    from tokenizer_extension.train_vocab_extension import train_vocab_extension  # type: ignore[import-not-found]

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(directory))
    new = train_vocab_extension(tokenizer, documents, count)
    with TemporaryDirectory() as scratch:
        extended = extend_tokenizer(
            tokenizer, new_vocab=new["vocab"], new_merges=new["merges"], n_tokens=count, keep_added_token_positions=True
        )
        extended.save_pretrained(scratch)
        return JsonVocab(json.loads((Path(scratch) / "tokenizer.json").read_text(encoding="utf-8")))


def tables(measured: Values, part: str) -> str:
    """The results of one language, a line for each base and way; changed lines without those that quote the language."""
    results: dict[str, Values] = measured[part]["results"]
    files = list(next(iter(results.values()))["ratio"])
    rows = [
        [
            *name.split(", ", 1),
            f"{values['added']:,}",
            *(f"{values['ratio'][file]:.3f}" for file in files),
            *(f"{values[other]['beyond_quotes']:,}" for other in OTHERS),
            str(values["unreachable"]),
            f"{values['seconds']:,.0f}",
            f"{values['peak_mb']:,}",
        ]
        for name, values in results.items()
    ]
    header = [
        "base",
        "way",
        "tokens",
        *files,
        *(f"{other} changed" for other in OTHERS),
        "unreachable",
        "seconds",
        "peak MB",
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    run_cli(main)
