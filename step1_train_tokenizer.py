"""Step 1: train tokens of the new language, which step 2 adds to the base model's tokenizer.

    python step1_train_tokenizer.py                           continued BPE, on top of the base tokenizer
    python step1_train_tokenizer.py --method sentencepiece    BPE from single characters, with the base's normalization
    python step1_train_tokenizer.py --compare                 also train as the original project did, for the report
    python step1_train_tokenizer.py --start FILE.model        begin with the tokens of another sentencepiece model
    python step1_train_tokenizer.py --sample-mb 20            read less text

Reads the training sets of `constants.TOKENIZER_MIX` without their held-out documents, the tokenizer of BASE_MODEL_DIR
(sentencepiece or a BPE tokenizer.json), and text that tells what the other languages write too. Writes
WORK_DIR/step1_ja_tokenizer/ja_bpe.model, or ja_bpe.json, and WORK_DIR/metrics/step1.json.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import constants
import pipeline
from constants import CORPUS_DIR, JA_TOKENIZER, LANGUAGES, PROFILE, TOKENIZER_MIX
from llmtuner.console import Timer, UserError, format_table, print0, print_header, progress, run_cli
from llmtuner.outputs import atomic_directory

if TYPE_CHECKING:
    from llmtuner.tokenizer.vocab import Vocab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["continued", "sentencepiece"], default="continued")
    parser.add_argument("--compare", action="store_true", help="also train as the original project did")
    parser.add_argument("--sample-mb", type=float, default=PROFILE.tokenizer_sample_bytes / 1e6, metavar="MB")
    parser.add_argument("--start", type=Path, metavar="FILE", help="begin with the tokens of another model")
    options = parser.parse_args()
    if not 0 < options.sample_mb < float("inf"):
        parser.error(f"--sample-mb is {options.sample_mb}; it must be greater than 0")
    if options.start and options.method != "continued":
        parser.error("--start goes with --method continued")

    # Check: fail now rather than after an hour of training.
    pipeline.start_step("step1")
    base_dir = pipeline.require_base_model(weights=False)
    pipeline.require_corpus()
    from llmtuner.tokenizer.merge_vocab import count_scripts, merge_as_original, new_candidates
    from llmtuner.tokenizer.sentencepiece_bpe import short_sentences, split_sentences, train_bpe
    from llmtuner.tokenizer.vocab import SentencePieceVocab, Vocab, read_vocab

    held_out = pipeline.held_out_texts(LANGUAGES.added)
    next(pipeline.tokenizer_corpus(1))
    next(pipeline.reference_texts(), None)
    base = read_vocab(base_dir)
    if (options.method == "sentencepiece" or options.compare) and not isinstance(base, SentencePieceVocab):
        raise UserError(f"--method sentencepiece and --compare need a tokenizer.model, which {base_dir} does not have.")

    # Load: a stream of documents in the proportions of the mix.
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
        print0("sentencepiece is training without output: seconds for 20 MB of text, minutes for more")

    # Do: train tokens that fit the base tokenizer.
    timer = Timer()
    skipped = 0
    with atomic_directory(JA_TOKENIZER.parent, replace=True) as directory:
        model_file = directory / JA_TOKENIZER.name
        if options.method == "continued":
            tokens = continue_bpe(base, documents(), read_vocab(options.start) if options.start else None)
            base.append(tokens, after_special=False).save(model_file)
        else:
            trained = train_bpe(sentences(), model_file, PROFILE.ja_vocab_size)
            skipped = trained.skipped
            if skipped:
                raise UserError(f"sentencepiece would skip {skipped} sentences, which must not happen.")
            tokens = [*new_candidates(base, read_vocab(model_file))]
        seconds = timer.seconds()
        if options.compare:
            original_file = directory / "original_bpe.model"
            train_bpe(sentences(), original_file, PROFILE.ja_vocab_size, chatglm3_spec=False)

    # Say what came out.
    model = read_vocab(JA_TOKENIZER)
    total = sum(counts["bytes"] for counts in read.values())
    rows = [
        [name, f"{counts['documents']:,}", f"{counts['bytes'] / 1e6:.1f}", f"{counts['bytes'] / total:.0%}"]
        for name, counts in read.items()
    ]
    print0(format_table(["data set", "documents", "MB", "ratio"], rows))
    by_script = count_scripts(map(base.text, tokens))
    rows = [[script, f"{count:,}"] for script, count in by_script.most_common(12)]
    print0("\n" + format_table(["written in", "new tokens"], rows))

    print_header(f"held-out {LANGUAGES.name} text")
    splits: dict[str, tuple[Vocab, int]] = {"base": (base, 0)}
    splits[options.method] = (model, len(tokens))
    if options.compare:
        as_original = merge_as_original(base, read_vocab(JA_TOKENIZER.parent / "original_bpe.model"))
        splits["original project"] = (as_original, len(as_original.tokens) - base.first_new_id)
    per_character = {name: tokens_per_character(split, held_out) for name, (split, _) in splits.items()}
    rows = [[name, f"{added:,}", f"{per_character[name]:.3f}"] for name, (_, added) in splits.items()]
    print0(format_table(["tokenizer", "new tokens", "tokens per character"], rows))
    for example in short_sentences(held_out, count=3):
        lines = (" | ".join(split.display(*split.encode([example]))) for split, _ in splits.values())
        print0("\n" + "\n".join(lines))

    if options.method == "continued" and len(tokens) < PROFILE.num_new_tokens:
        print0(f"note: this text yields {len(tokens):,} of the {PROFILE.num_new_tokens:,} tokens asked for")
    pipeline.finish_step(
        "step1",
        {
            "method": options.method,
            "vocab_size": len(model.tokens),
            "new_pieces": len(tokens),
            "input_bytes": total,
            "skipped": skipped,
            "seconds": seconds,
            "pieces_by_script": dict(by_script.most_common()),
            "tokens_per_character": {name: round(value, 4) for name, value in per_character.items()},
        },
        f"{len(tokens):,} new tokens from {total / 1e6:.1f} MB in {seconds:.0f} s; tokens per {LANGUAGES.name} character "
        f"{per_character['base']:.2f} -> {per_character[options.method]:.2f}",
    )


def continue_bpe(base: "Vocab", documents: Iterable[str], start: "Vocab | None") -> list[str]:
    """Trains tokens on top of the base tokenizer's own; each line is a text of its own, as a message is.

    Args:
        start: another tokenizer, whose tokens come first, as far as they may be added.
    """
    from llmtuner.tokenizer.continued_bpe import segment_corpus, train_continued_bpe
    from llmtuner.tokenizer.merge_vocab import filter_candidates, merge_reachable
    from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

    writing_system = WRITING_SYSTEMS[constants.WRITING_SYSTEM]
    tokens: list[str] = []
    if start:
        chosen = filter_candidates(base, start, writing_system, pipeline.reference_texts()).accepted
        unreachable = set(merge_reachable(base, chosen)[1])
        tokens = [token for token in chosen if token not in unreachable][: PROFILE.num_new_tokens]
        base = base.append(tokens, after_special=False)
    missing = PROFILE.num_new_tokens - len(tokens)
    lines = segment_corpus(
        base, (line for text in documents for line in text.splitlines() if line.strip()), writing_system
    )
    learned = train_continued_bpe(lines, missing, writing_system, pipeline.reference_texts())
    tokens += progress(learned, "training", total=missing, unit=" tokens")
    if not tokens:
        raise UserError(f"there is no text to train a tokenizer on in {CORPUS_DIR}. Put {LANGUAGES.name} text there.")
    return tokens


def tokens_per_character(vocab: "Vocab", texts: list[str]) -> float:
    """Average number of tokens per character."""
    return sum(map(len, vocab.encode(texts))) / sum(map(len, texts))


if __name__ == "__main__":
    run_cli(main)
