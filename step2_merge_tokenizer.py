"""Step 2: merge the Japanese pieces of step 1 into the base tokenizer, and prove that Chinese and English stay as they were.

    python step2_merge_tokenizer.py

Reads the tokenizer of BASE_MODEL_DIR (not its weights), the model of step 1, and Chinese text that tells which Han strings
are Chinese too. Writes WORK_DIR/step2_merged_tokenizer/, which `AutoTokenizer` loads, and WORK_DIR/metrics/step2.json.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from constants import (
    CHINESE_REFERENCE,
    CORPUS_DIR,
    DATASET_INFO,
    JA_TOKENIZER,
    MERGED_TOKENIZER_DIR,
    PROFILE,
    VALIDATION_SHARE,
    held_out_texts,
    require_base_model,
    require_corpus,
    save_metrics,
    start_step,
)
from llmtuner.console import InputError, heading, progress, run_script, say, table, whole_directory

LANGUAGES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}


def main() -> None:
    # Check: everything that is read must be there.
    start_step("step2", JA_TOKENIZER)
    base_model = require_base_model(weights=False) / "tokenizer.model"
    require_corpus()
    from transformers import AutoTokenizer

    from llmtuner.tokenizer.fast import SPECIAL_TOKENS, build_fast_tokenizer, read_model, save_tokenizer
    from llmtuner.tokenizer.merging import choose_pieces, compare, dead_pieces, disagreements, kinds, merge_living
    from llmtuner.tokenizer.training import short_sentences

    # Load: the base, the candidates, and held-out text to measure with.
    base, candidates = read_model(base_model), read_model(JA_TOKENIZER)
    base_tokenizer = build_fast_tokenizer(base_model)
    held_out = {language: held_out_texts(language) for language in LANGUAGES}

    # Do: choose the pieces that only Japanese can hold, rank them below all native ones, leave out what is never used.
    heading("Step 2: merge the Japanese pieces into the base tokenizer")
    reference = progress(chinese_reference(), "reading Chinese text", unit=" documents")
    choice = choose_pieces(base, candidates, reference)
    merged, never_used = merge_living(base, choice.pieces)
    added = [piece.piece for piece in merged.pieces[len(base.pieces) + len(SPECIAL_TOKENS) :]]
    if not added:
        raise InputError(f"none of the pieces of {JA_TOKENIZER} is new to {base_model}: there is nothing to merge.")
    fates = [*sorted(choice.left_out.items()), ("never used", len(never_used))]
    fates += [(f"added: {kind}", count) for kind, count in kinds(added).most_common()]
    say(table(["candidates", "pieces"], [[fate, f"{count:,}"] for fate, count in fates]))

    # Check: on the tokenizer as it is saved and loaded again.
    with whole_directory(MERGED_TOKENIZER_DIR) as directory:
        model_file = directory / "tokenizer.model"
        model_file.write_bytes(merged.SerializeToString())
        save_tokenizer(model_file, directory)
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        for texts in held_out.values():
            if wrong := disagreements(tokenizer, model_file, texts):
                raise InputError(f"tokenizer.json and tokenizer.model split this text differently: {wrong[0][:200]!r}")
    dead = dead_pieces(base, merged)
    special_ids_kept = all(
        tokenizer.convert_tokens_to_ids(token) == base_tokenizer.convert_tokens_to_ids(token)
        for token in SPECIAL_TOKENS
    )
    results = {language: compare(base_tokenizer, tokenizer, texts) for language, texts in held_out.items()}

    # Say what came out.
    heading("Held-out text before and after")
    rows = [
        [
            LANGUAGES[language],
            f"{result.texts:,}",
            f"{result.tokens_before:,}",
            f"{result.tokens_after:,}",
            f"{result.token_ratio:.3f}",
            f"{len(result.changes):,}",
        ]
        for language, result in results.items()
    ]
    say(table(["language", "texts", "tokens before", "after", "ratio", "changed texts"], rows))
    for language in ("zh", "en"):
        for change in results[language].changes[:1]:
            say(f"\na {LANGUAGES[language]} text that changed, from the first difference on:")
            say(f"  before  {' | '.join(change.before)}\n  after   {' | '.join(change.after)}")
    for language, name in LANGUAGES.items():
        say(f"\n{name}")
        for sentence in short_sentences(held_out[language], count=1):
            say(f"  before  {' | '.join(base_tokenizer.tokenize(sentence))}")
            say(f"  after   {' | '.join(tokenizer.tokenize(sentence))}")
    say(f"\n{len(base.pieces):,} native pieces, {len(SPECIAL_TOKENS)} special tokens, {len(added):,} new pieces;")
    say(f"{len(dead)} dead, special ids {'kept' if special_ids_kept else 'MOVED'}")

    save_metrics(
        "step2",
        {
            "base_pieces": len(base.pieces),
            "added_pieces": len(added),
            "dead_pieces": len(dead),
            "special_ids_kept": special_ids_kept,
            "token_ratio": {language: round(result.token_ratio, 4) for language, result in results.items()},
            "changed_texts": {language: len(results[language].changes) for language in ("zh", "en")},
            "texts": {language: result.texts for language, result in results.items()},
        },
    )
    say(f"\nsaved {MERGED_TOKENIZER_DIR}\nnext: python step3_resize_model.py")


def chinese_reference() -> Iterator[str]:
    """Chinese training text of all files alike: what small files leave of their share, larger ones may use."""
    from llmtuner.data.held_out import training_documents, up_to_bytes
    from llmtuner.data.sources import find_source

    sources = [find_source(name, DATASET_INFO, CORPUS_DIR) for name in CHINESE_REFERENCE]
    parts = [replace(source, files=(file,)) for source in sources for file in source.files]
    parts.sort(key=lambda source: Path(source.files[0]).stat().st_size)
    parts += [source for source in sources if not source.files]  # from the hub
    left = PROFILE.reference_bytes
    for number, part in enumerate(parts):
        for text in up_to_bytes(training_documents(part, VALIDATION_SHARE), left // (len(parts) - number)):
            left -= len(text.encode())
            yield text


if __name__ == "__main__":
    run_script(main)
