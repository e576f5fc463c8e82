"""Step 1: train a Japanese tokenizer. Step 2 adds its pieces to the base model's own.

    python step1_train_tokenizer.py

Reads the Japanese training sets of `constants.TOKENIZER_MIX`, but not their held-out documents. Writes
WORK_DIR/step1_ja_tokenizer/ja_bpe.model and WORK_DIR/metrics/step1.json.
"""

from collections.abc import Iterator

from constants import (
    CORPUS_DIR,
    DATASET_INFO,
    JA_TOKENIZER,
    PROFILE,
    TOKENIZER_MIX,
    VALIDATION_SHARE,
    held_out_texts,
    require_corpus,
    save_metrics,
    start_step,
)
from llmtuner.console import InputError, Stopwatch, heading, progress, run_script, say, table, whole_directory


def main() -> None:
    # Check: fail now rather than after an hour of training.
    start_step("step1")
    require_corpus()
    from llmtuner.data.held_out import training_documents
    from llmtuner.data.sources import find_source
    from llmtuner.tokenizer.training import mix_by_bytes, short_sentences, split_sentences, train_bpe

    sources = {name: find_source(name, DATASET_INFO, CORPUS_DIR) for name in TOKENIZER_MIX}
    examples = short_sentences(held_out_texts("ja"), count=4)

    # Load: documents in their shares, as a stream.
    heading("Step 1: train a Japanese tokenizer")
    documents = mix_by_bytes(
        {name: training_documents(source, VALIDATION_SHARE) for name, source in sources.items()},
        TOKENIZER_MIX,
        PROFILE.tokenizer_sample_bytes,
    )
    read = {name: {"documents": 0, "bytes": 0} for name in sources}

    def sentences() -> Iterator[str]:
        for name, text in progress(documents, "reading", unit=" documents"):
            read[name]["documents"] += 1
            read[name]["bytes"] += len(text.encode())
            yield from split_sentences(text)
        say("training: sentencepiece is silent now, seconds for 20 MB of text, hours for a gigabyte")

    # Do: sentencepiece BPE under the base tokenizer's own rules, so that the pieces fit there.
    watch = Stopwatch()
    with whole_directory(JA_TOKENIZER.parent) as directory:
        trained = train_bpe(sentences(), directory / JA_TOKENIZER.name, PROFILE.ja_vocab_size)
        if trained.skipped:
            raise InputError(f"sentencepiece would leave out {trained.skipped} sentences, which must not happen.")
    seconds = watch.seconds()

    # Say what came out.
    total = sum(counts["bytes"] for counts in read.values())
    rows = [
        [name, f"{counts['documents']:,}", f"{counts['bytes'] / 1e6:.1f}", f"{counts['bytes'] / total:.0%}"]
        for name, counts in read.items()
    ]
    say(table(["text", "documents", "MB", "share"], rows))
    say(f"\n{trained.vocab_size:,} pieces from {trained.sentences:,} sentences in {seconds:.0f} s; none was skipped")
    if trained.vocab_size > PROFILE.ja_vocab_size:
        say(f"({PROFILE.ja_vocab_size:,} were asked for, which is too few to hold the characters of this text)")
    elif trained.vocab_size < PROFILE.ja_vocab_size:
        say(f"({PROFILE.ja_vocab_size:,} were asked for, which is more than this text holds)")
    heading("How it splits held-out sentences")
    for example in examples:
        say(" | ".join(segment(example)))
    save_metrics(
        "step1",
        {
            "vocab_size": trained.vocab_size,
            "input_bytes": trained.input_bytes,
            "sentences": trained.sentences,
            "skipped": trained.skipped,
            "seconds": seconds,
        },
    )
    say(f"\nsaved {JA_TOKENIZER}\nnext: python step2_merge_tokenizer.py")


def segment(text: str) -> list[str]:
    """The pieces of a text under the model just trained."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(JA_TOKENIZER)).encode(text, out_type=str)


if __name__ == "__main__":
    run_script(main)
