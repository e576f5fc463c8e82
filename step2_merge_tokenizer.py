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
from llmtuner.console import UserError, command, format_table, print0, print_header, progress, run_cli
from llmtuner.eval.language import LANGUAGES
from llmtuner.files import atomic_write_json
from llmtuner.outputs import atomic_directory

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
    from llmtuner.tokenizer.comparison import compare, encoding_mismatches
    from llmtuner.tokenizer.fast import (
        SPECIAL_TOKENS,
        check_sentencepiece_spec,
        display_tokens,
        load_tokenizer,
        read_sentencepiece,
        save_tokenizer,
        special_token_ids,
        to_processor,
    )
    from llmtuner.tokenizer.merge_vocab import (
        count_scripts,
        filter_candidates,
        merge_as_original,
        merge_reachable,
        unreachable_tokens,
    )
    from llmtuner.tokenizer.sentencepiece_bpe import short_sentences
    from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

    # Load: the base, the candidates, and held-out text to measure with.
    base, candidates = read_sentencepiece(base_model), read_sentencepiece(options.candidates)
    check_sentencepiece_spec(base, base_model)
    held_out = {language: pipeline.held_out_texts(language) for language in LANGUAGES}

    # Do: choose the pieces that only Japanese can hold, rank them below all native ones, leave out what is never used.
    print_header("Step 2: merge the Japanese pieces into the base tokenizer")
    if exact:
        reference = progress(pipeline.reference_texts(), "reading Chinese text", unit=" documents")
        choice = filter_candidates(base, candidates, WRITING_SYSTEMS[constants.WRITING_SYSTEM], reference)
        merged, never_used = merge_reachable(base, choice.accepted)
        rejection_counts = {**choice.rejected, "never used": len(never_used)}
    else:
        merged, rejection_counts = merge_as_original(base, candidates), {}
    added = [piece.piece for piece in merged.pieces[len(base.pieces) + len(SPECIAL_TOKENS) :]]
    if not added:
        raise UserError(
            f"none of the pieces of {options.candidates} is new to {base_model}: there is nothing to merge."
        )
    by_script = count_scripts(added)
    rows = [[f"left out: {reason}", f"{count:,}"] for reason, count in sorted(rejection_counts.items()) if count]
    rows += [[f"added: {kind}", f"{count:,}"] for kind, count in by_script.most_common()]
    print0(format_table(["candidates", "pieces"], rows))

    # Check: on the tokenizer as it is saved and loaded again.
    before, after = to_processor(base), to_processor(merged)
    with atomic_directory(MERGED_TOKENIZER_DIR if exact else ORIGINAL_MERGE_DIR, replace=True) as directory:
        model_file = directory / "tokenizer.model"
        model_file.write_bytes(merged.SerializeToString())
        if exact:
            save_tokenizer(model_file, directory)
            tokenizer = load_tokenizer(directory)
            for texts in held_out.values():
                wrong = encoding_mismatches(tokenizer, after, texts)
                if wrong:
                    raise UserError(
                        f"tokenizer.json and tokenizer.model split this text differently: {wrong[0][:200]!r}"
                    )
    dead = unreachable_tokens(base, merged)
    special_ids_kept = special_token_ids(merged) == special_token_ids(base)
    results = {language: compare(before, after, texts) for language, texts in held_out.items()}

    # Say what came out.
    print_header("Held-out text before and after")
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
    print0(format_table(["language", "texts", "tokens before", "after", "ratio", "changed texts"], rows))
    for language in ("zh", "en"):
        for change in results[language].changes[:EXAMPLES]:
            print0(f"\na {LANGUAGES[language]} text that changed, from the first difference on:")
            print0(f"  before  {' | '.join(change.before)}\n  after   {' | '.join(change.after)}")
    segmentations = {}
    for language, name in LANGUAGES.items():
        print0(f"\n{name}")
        for sentence in short_sentences(held_out[language], count=1):
            was, now = (display_tokens(split.encode(sentence, out_type=str)) for split in (before, after))
            print0(f"  before  {' | '.join(was)}\n  after   {' | '.join(now)}")
            segmentations[language] = {"text": sentence, "before": was, "after": now}
    print0(f"\n{len(base.pieces):,} native pieces, {len(SPECIAL_TOKENS)} special tokens, {len(added):,} new pieces;")
    named = f" ({' '.join(dead[:8])})" if dead else ""
    print0(f"{len(dead)} dead{named}, special ids {'kept' if special_ids_kept else 'MOVED'}")

    metrics: dict[str, Any] = {
        "method": options.method,
        "base_pieces": len(base.pieces),
        "added_pieces": len(added),
        "pieces_by_script": dict(by_script.most_common()),
        "unreachable_tokens": len(dead),
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
        pipeline.finish_step("step2", metrics)
        print0(f"\nsaved {MERGED_TOKENIZER_DIR}\nnext: {command('step3_resize_model.py')}")
    else:
        atomic_write_json(ORIGINAL_MERGE_DIR / "metrics.json", metrics)
        print0(
            f"\nsaved {ORIGINAL_MERGE_DIR}: for comparison only, since pieces of equal score cannot be a tokenizer.json"
        )


if __name__ == "__main__":
    run_cli(main)
