"""Step 2: merge the pieces of step 1 into the base tokenizer, and prove that Chinese and English stay as they were.

    python step2_merge_tokenizer.py
    python step2_merge_tokenizer.py --candidates FILE.model    take the pieces from another sentencepiece model
    python step2_merge_tokenizer.py --method original          add every candidate with the highest score, to compare

Reads the tokenizer of BASE_MODEL_DIR (not its weights), the model of step 1, and Chinese text that tells which Han strings
are Chinese too. Writes WORK_DIR/step2_merged_tokenizer/, which `AutoTokenizer` loads, and WORK_DIR/metrics/step2.json.
"""

import argparse
from pathlib import Path
from typing import Any

import constants
import pipeline
from constants import JA_TOKENIZER, MERGED_TOKENIZER_DIR, ORIGINAL_MERGE_DIR
from llmtuner.console import InputError, command, heading, progress, run_script, say, table, write_json
from llmtuner.outputs import atomic_directory

LANGUAGES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}
EXAMPLES = 5  # changed texts that are shown and saved for each language


def main() -> None:
    parser = argparse.ArgumentParser(description="merge Japanese pieces into the base tokenizer")
    parser.add_argument("--candidates", type=Path, default=JA_TOKENIZER, metavar="FILE")
    parser.add_argument("--method", choices=["exact", "original"], default="exact")
    options = parser.parse_args()
    exact = options.method == "exact"

    # Check: everything that is read must be there.
    if exact:
        pipeline.start_step("step2", *([JA_TOKENIZER] if options.candidates == JA_TOKENIZER else []))
    base_model = pipeline.require_base_model(weights=False) / "tokenizer.model"
    pipeline.require_corpus()
    from llmtuner.tokenizer.fast import (
        SPECIAL_TOKENS,
        as_seen,
        check_rules,
        load_tokenizer,
        read_model,
        save_tokenizer,
        special_ids,
    )
    from llmtuner.tokenizer.merging import (
        choose_pieces,
        compare,
        dead_pieces,
        disagreements,
        kinds,
        merge_as_original,
        merge_living,
        processor_of,
    )
    from llmtuner.tokenizer.scripts import SCRIPTS
    from llmtuner.tokenizer.training import short_sentences

    # Load: the base, the candidates, and held-out text to measure with.
    base, candidates = read_model(base_model), read_model(options.candidates)
    check_rules(base, base_model)
    held_out = {language: pipeline.held_out_texts(language) for language in LANGUAGES}

    # Do: choose the pieces that only Japanese can hold, rank them below all native ones, leave out what is never used.
    heading("Step 2: merge the Japanese pieces into the base tokenizer")
    if exact:
        reference = progress(pipeline.reference_texts(), "reading Chinese text", unit=" documents")
        choice = choose_pieces(base, candidates, SCRIPTS[constants.NEW_SCRIPT], reference)
        merged, never_used = merge_living(base, choice.pieces)
        fates = {**choice.left_out, "never used": len(never_used)}
    else:
        merged, fates = merge_as_original(base, candidates), {}
    added = [piece.piece for piece in merged.pieces[len(base.pieces) + len(SPECIAL_TOKENS) :]]
    if not added:
        raise InputError(
            f"none of the pieces of {options.candidates} is new to {base_model}: there is nothing to merge."
        )
    by_script = kinds(added)
    rows = [[f"left out: {fate}", f"{count:,}"] for fate, count in sorted(fates.items()) if count]
    rows += [[f"added: {kind}", f"{count:,}"] for kind, count in by_script.most_common()]
    say(table(["candidates", "pieces"], rows))

    # Check: on the tokenizer as it is saved and loaded again.
    before, after = processor_of(base), processor_of(merged)
    with atomic_directory(MERGED_TOKENIZER_DIR if exact else ORIGINAL_MERGE_DIR, replace=True) as directory:
        model_file = directory / "tokenizer.model"
        model_file.write_bytes(merged.SerializeToString())
        if exact:
            save_tokenizer(model_file, directory)
            tokenizer = load_tokenizer(directory)
            for texts in held_out.values():
                wrong = disagreements(tokenizer, after, texts)
                if wrong:
                    raise InputError(
                        f"tokenizer.json and tokenizer.model split this text differently: {wrong[0][:200]!r}"
                    )
    dead = dead_pieces(base, merged)
    special_ids_kept = special_ids(merged) == special_ids(base)
    results = {language: compare(before, after, texts) for language, texts in held_out.items()}

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
        for change in results[language].changes[:EXAMPLES]:
            say(f"\na {LANGUAGES[language]} text that changed, from the first difference on:")
            say(f"  before  {' | '.join(change.before)}\n  after   {' | '.join(change.after)}")
    segmentations = {}
    for language, name in LANGUAGES.items():
        say(f"\n{name}")
        for sentence in short_sentences(held_out[language], count=1):
            was, now = (as_seen(split.encode(sentence, out_type=str)) for split in (before, after))
            say(f"  before  {' | '.join(was)}\n  after   {' | '.join(now)}")
            segmentations[language] = {"text": sentence, "before": was, "after": now}
    say(f"\n{len(base.pieces):,} native pieces, {len(SPECIAL_TOKENS)} special tokens, {len(added):,} new pieces;")
    named = f" ({' '.join(dead[:8])})" if dead else ""
    say(f"{len(dead)} dead{named}, special ids {'kept' if special_ids_kept else 'MOVED'}")

    evidence: dict[str, Any] = {
        "method": options.method,
        "base_pieces": len(base.pieces),
        "added_pieces": len(added),
        "pieces_by_script": dict(by_script.most_common()),
        "dead_pieces": len(dead),
        "special_ids_kept": special_ids_kept,
        "token_ratio": {language: round(result.token_ratio, 4) for language, result in results.items()},
        "changed_texts": {language: len(results[language].changes) for language in ("zh", "en")},
        "texts": {language: result.texts for language, result in results.items()},
        "segmentations": segmentations,
        "examples_of_changes": {
            language: [vars(change) for change in results[language].changes[:EXAMPLES]] for language in ("zh", "en")
        },
    }
    if exact:
        pipeline.finish_step("step2", evidence)
        say(f"\nsaved {MERGED_TOKENIZER_DIR}\nnext: {command('step3_resize_model.py')}")
    else:
        write_json(ORIGINAL_MERGE_DIR / "evidence.json", evidence)
        say(
            f"\nsaved {ORIGINAL_MERGE_DIR}: for comparison only, since pieces of equal score cannot be a tokenizer.json"
        )


if __name__ == "__main__":
    run_script(main)
