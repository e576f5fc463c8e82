"""Step 1: learn Japanese pieces. Step 2 adds them to the base model's tokenizer.

    python step1_train_tokenizer.py                           continued BPE, on top of the base tokenizer
    python step1_train_tokenizer.py --method sentencepiece    from characters, under the base tokenizer's rules
    python step1_train_tokenizer.py --compare                 also train as the original did, for the report
    python step1_train_tokenizer.py --start FILE.model        take the pieces of another model first, then learn on
    python step1_train_tokenizer.py --sample-mb 20            read less text

Reads the Japanese training sets of `constants.TOKENIZER_MIX`, but not their held-out documents, the tokenizer of
BASE_MODEL_DIR, and Chinese text that tells which Han strings are Chinese too. Writes
WORK_DIR/step1_ja_tokenizer/ja_bpe.model and WORK_DIR/metrics/step1.json.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import constants
import pipeline
from constants import CORPUS_DIR, JA_TOKENIZER, PROFILE, TOKENIZER_MIX
from llmtuner.console import Timer, UserError, command, format_table, print0, print_header, progress, run_cli
from llmtuner.outputs import atomic_directory


def main() -> None:
    parser = argparse.ArgumentParser(description="learn Japanese pieces")
    parser.add_argument("--method", choices=["continued", "sentencepiece"], default="continued")
    parser.add_argument("--compare", action="store_true", help="also train as the original did, for the report")
    parser.add_argument("--sample-mb", type=float, default=PROFILE.tokenizer_sample_bytes / 1e6, metavar="MB")
    parser.add_argument(
        "--start", type=Path, metavar="FILE", help="take the pieces of another sentencepiece model first"
    )
    options = parser.parse_args()
    if not 0 < options.sample_mb < float("inf"):
        parser.error(f"--sample-mb is {options.sample_mb}; it must be greater than 0")
    if options.start and options.method != "continued":
        parser.error("--start goes with --method continued")

    # Check: fail now rather than after an hour of training.
    pipeline.start_step("step1")
    base_model = pipeline.require_base_model(weights=False) / "tokenizer.model"
    pipeline.require_corpus()
    from llmtuner.tokenizer.fast import SPECIAL_TOKENS, check_sentencepiece_spec, read_sentencepiece, to_processor
    from llmtuner.tokenizer.merge_vocab import count_scripts, merge_as_original, merge_vocab, new_candidates
    from llmtuner.tokenizer.sentencepiece_bpe import short_sentences, split_sentences, train_bpe

    held_out = pipeline.held_out_texts("ja")
    next(pipeline.tokenizer_corpus(1))
    next(pipeline.reference_texts(), None)
    base = read_sentencepiece(base_model)
    check_sentencepiece_spec(base, base_model)

    # Load: documents in their shares, as a stream.
    print_header("Step 1: learn Japanese pieces")
    read: dict[str, dict[str, int]] = {}

    def documents() -> Iterator[str]:
        read.update({name: {"documents": 0, "bytes": 0} for name in TOKENIZER_MIX})
        mixed = pipeline.tokenizer_corpus(int(options.sample_mb * 1e6))
        for name, text in progress(mixed, "reading", unit=" documents"):
            read[name]["documents"] += 1
            read[name]["bytes"] += len(text.encode())
            yield text

    def sentences() -> Iterator[str]:
        for text in documents():
            yield from split_sentences(text)
        print0("training: sentencepiece is silent now, seconds for 20 MB of text, minutes for more")

    # Do: learn pieces that fit the base tokenizer.
    timer = Timer()
    skipped = 0
    with atomic_directory(JA_TOKENIZER.parent, replace=True) as directory:
        model_file = directory / JA_TOKENIZER.name
        if options.method == "continued":
            pieces = continue_bpe(base, documents(), read_sentencepiece(options.start) if options.start else None)
            model_file.write_bytes(merge_vocab(base, pieces, placeholders=False).SerializeToString())
        else:
            trained = train_bpe(sentences(), model_file, PROFILE.ja_vocab_size)
            skipped = trained.skipped
            if skipped:
                raise UserError(f"sentencepiece would leave out {skipped} sentences, which must not happen.")
            pieces = new_candidates(base, read_sentencepiece(model_file))
        seconds = timer.seconds()
        if options.compare:
            original_file = directory / "original_bpe.model"
            train_bpe(sentences(), original_file, PROFILE.ja_vocab_size, chatglm3_spec=False)

    # Say what came out.
    model = read_sentencepiece(JA_TOKENIZER)
    total = sum(counts["bytes"] for counts in read.values())
    rows = [
        [name, f"{counts['documents']:,}", f"{counts['bytes'] / 1e6:.1f}", f"{counts['bytes'] / total:.0%}"]
        for name, counts in read.items()
    ]
    print0(format_table(["text", "documents", "MB", "share"], rows))
    written = count_scripts(pieces)
    print0(
        "\n"
        + format_table(
            ["new pieces, written with", "pieces"], [[kind, f"{n:,}"] for kind, n in written.most_common(12)]
        )
    )

    print_header("Held-out Japanese text")
    splits: dict[str, tuple[Any, int]] = {"base tokenizer": (to_processor(base), 0)}
    splits[options.method] = (to_processor(model), len(pieces))
    if options.compare:
        as_original = merge_as_original(base, read_sentencepiece(JA_TOKENIZER.parent / "original_bpe.model"))
        added = len(as_original.pieces) - len(base.pieces) - len(SPECIAL_TOKENS)
        splits["as the original"] = (to_processor(as_original), added)
    per_character = {name: tokens_per_character(split, held_out) for name, (split, _) in splits.items()}
    rows = [[name, f"{added:,}", f"{per_character[name]:.3f}"] for name, (_, added) in splits.items()]
    print0(format_table(["split by", "new pieces", "tokens per character"], rows))
    for example in short_sentences(held_out, count=3):
        print0("\n" + "\n".join(f"{' | '.join(split.encode(example, out_type=str))}" for split, _ in splits.values()))

    wanted = PROFILE.num_new_tokens
    print0(f"\n{len(pieces):,} new pieces from {total / 1e6:.1f} MB of text in {seconds:.0f} s; no text was skipped")
    if options.method == "continued" and len(pieces) < wanted:
        print0(f"({wanted:,} were asked for, which is more than this text holds)")
    pipeline.finish_step(
        "step1",
        {
            "method": options.method,
            "vocab_size": len(model.pieces),
            "new_pieces": len(pieces),
            "input_bytes": total,
            "skipped": skipped,
            "seconds": seconds,
            "pieces_by_script": dict(written.most_common()),
            "tokens_per_character": {name: round(value, 4) for name, value in per_character.items()},
        },
    )
    print0(f"\nsaved {JA_TOKENIZER}\nnext: {command('step2_merge_tokenizer.py')}")


def continue_bpe(base: Any, documents: Iterable[str], start: Any | None) -> list[str]:
    """Pieces learned on top of the base tokenizer's own; lines are read as texts of their own, as messages are.

    Args:
        start: a sentencepiece model whose pieces come first, as far as they may be added.
    """
    from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
    from llmtuner.tokenizer.merge_vocab import filter_candidates, merge_reachable, merge_vocab
    from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

    writing_system = WRITING_SYSTEMS[constants.WRITING_SYSTEM]
    pieces: list[str] = []
    if start:
        chosen = filter_candidates(base, start, writing_system, pipeline.reference_texts()).accepted
        dead = set(merge_reachable(base, chosen)[1])
        pieces = [piece for piece in chosen if piece not in dead][: PROFILE.num_new_tokens]
        base = merge_vocab(base, pieces, placeholders=False)
    wanted = PROFILE.num_new_tokens - len(pieces)
    lines = segment_corpus(
        base, (line for text in documents for line in text.splitlines() if line.strip()), writing_system
    )
    learned = train_continued_bpe(lines, wanted, writing_system, pipeline.reference_texts())
    pieces += progress(learned, "learning", total=wanted, unit=" pieces")
    if not pieces:
        raise UserError(f"there is no text to learn pieces from in {CORPUS_DIR}. Put Japanese text there.")
    return pieces


def tokens_per_character(processor: Any, texts: list[str]) -> float:
    """Tokens that a text costs for each of its characters."""
    return sum(map(len, processor.encode(texts))) / sum(map(len, texts))


if __name__ == "__main__":
    run_cli(main)
