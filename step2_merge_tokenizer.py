"""Step 2: merge step 1's tokens into the base tokenizer, and prove that other languages are encoded as before.

    python step2_merge_tokenizer.py
    python step2_merge_tokenizer.py --candidates FILE.model    merge the tokens of another sentencepiece model
    python step2_merge_tokenizer.py --method original          add every candidate with the highest score, to compare

Reads the tokenizer of BASE_MODEL_DIR (not its weights), the model of step 1, and text that tells what the other languages
write too. Writes WORK_DIR/step2_merged_tokenizer/, which `AutoTokenizer` loads, and WORK_DIR/metrics/step2.json.
"""

import argparse
from pathlib import Path
from typing import Any

import constants
import pipeline
from constants import JA_TOKENIZER, LANGUAGES, MERGED_TOKENIZER_DIR, ORIGINAL_MERGE_DIR
from llmtuner.console import UserError, format_table, print0, print_header, progress, run_cli, verdict
from llmtuner.files import atomic_write_json
from llmtuner.outputs import atomic_directory

MAX_EXAMPLES = 5  # changed texts per language that are shown and saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=Path, default=JA_TOKENIZER, metavar="FILE")
    parser.add_argument("--method", choices=["exact", "original"], default="exact")
    options = parser.parse_args()
    exact = options.method == "exact"

    # Check: every input must exist.
    if exact:
        pipeline.start_step("step2", *([JA_TOKENIZER] if options.candidates == JA_TOKENIZER else []))
    else:
        print_header("The original project's merge, to compare with step 2")
    base_dir = pipeline.require_base_model(weights=False)
    pipeline.require_corpus()
    from llmtuner.tokenizer.comparison import compare, encoding_mismatches
    from llmtuner.tokenizer.encoding import load_tokenizer
    from llmtuner.tokenizer.merge_vocab import (
        count_scripts,
        filter_candidates,
        merge_as_original,
        merge_reachable,
        unreachable_tokens,
    )
    from llmtuner.tokenizer.sentencepiece_bpe import short_sentences
    from llmtuner.tokenizer.vocab import SentencePieceVocab, Vocab, read_vocab
    from llmtuner.tokenizer.writing_systems import WRITING_SYSTEMS

    # Load: the base, the candidates, and held-out text to measure with.
    base, candidates = read_vocab(base_dir), read_vocab(options.candidates)
    held_out = {language: pipeline.held_out_texts(language) for language in LANGUAGES}

    # Do: keep the tokens that only text of the new language can contain, rank them below the base vocabulary, drop unreachable ones.
    merged: Vocab
    if exact:
        reference = progress(pipeline.reference_texts(), "reading reference text", unit=" documents")
        filtered = filter_candidates(base, candidates, WRITING_SYSTEMS[constants.WRITING_SYSTEM], reference)
        merged, unused = merge_reachable(base, filtered.accepted)
        rejection_counts = {**filtered.rejected, "unreachable": len(unused)}
    elif isinstance(base, SentencePieceVocab):
        merged, rejection_counts = merge_as_original(base, candidates), {}
    else:
        raise UserError(f"--method original needs a tokenizer.model, which {base_dir} does not have.")
    added = merged.tokens[base.first_new_id :]
    if not added:
        raise UserError(f"none of the tokens of {options.candidates} is new to {base_dir}: there is nothing to merge.")
    by_script = count_scripts(map(base.text, added))
    rows = [[f"rejected: {reason}", f"{count:,}"] for reason, count in sorted(rejection_counts.items()) if count]
    rows += [[f"added: {script}", f"{count:,}"] for script, count in by_script.most_common()]
    print0(format_table(["candidates", "tokens"], rows))

    # Check: the tokenizer as it is saved and loaded again.
    with atomic_directory(MERGED_TOKENIZER_DIR if exact else ORIGINAL_MERGE_DIR, replace=True) as directory:
        if exact:
            merged.save_model_files(directory, base_dir)
            tokenizer = load_tokenizer(directory)
            for texts in held_out.values():
                mismatches = encoding_mismatches(tokenizer, merged, texts)
                if mismatches:
                    raise UserError(f"the saved tokenizer encodes this text differently: {mismatches[0][:200]!r}")
        else:
            merged.save(directory / merged.file_name)
    unreachable = [str(base.text(token)) for token in unreachable_tokens(base, merged)]
    special_ids_kept = merged.special_ids() == base.special_ids()
    results = {language: compare(base, merged, texts) for language, texts in held_out.items()}

    # Say what came out.
    print_header("held-out text before and after")
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
    for language in LANGUAGES.retained:
        for change in results[language].changes[:MAX_EXAMPLES]:
            print0(f"\n{LANGUAGES[language]} text encoded differently, from the first difference on:")
            print0(f"  before  {' | '.join(change.before)}\n  after   {' | '.join(change.after)}")
    segmentations = {}
    for language, name in LANGUAGES.items():
        print0(f"\n{name}")
        for sentence in short_sentences(held_out[language], count=1):
            old, new = (vocab.display(*vocab.encode([sentence])) for vocab in (base, merged))
            print0(f"  before  {' | '.join(old)}\n  after   {' | '.join(new)}")
            segmentations[language] = {"text": sentence, "before": old, "after": new}

    changed = sum(len(results[language].changes) for language in LANGUAGES.retained)
    total = sum(results[language].texts for language in LANGUAGES.retained)
    examples = f" ({' '.join(unreachable[:8])})" if unreachable else ""
    details = (
        f"{changed:,} of {total:,} held-out {LANGUAGES.listed(codes=LANGUAGES.retained)} texts encoded differently, {len(unreachable):,} unreachable "
        f"tokens{examples}, special token ids {'unchanged' if special_ids_kept else 'CHANGED'}"
    )
    print0("\n" + verdict("Merge check", not changed and not unreachable and special_ids_kept, details))

    metrics: dict[str, Any] = {
        "method": options.method,
        "base_pieces": base.base_range.stop,
        "added_pieces": len(added),
        "pieces_by_script": dict(by_script.most_common()),
        "unreachable_tokens": len(unreachable),
        "special_ids_kept": special_ids_kept,
        "token_ratio": {language: round(result.token_ratio, 4) for language, result in results.items()},
        "changed_texts": {language: len(results[language].changes) for language in LANGUAGES.retained},
        "texts": {language: result.texts for language, result in results.items()},
        "segmentations": segmentations,
        "examples_of_changes": {
            language: [vars(change) for change in results[language].changes[:MAX_EXAMPLES]]
            for language in LANGUAGES.retained
        },
    }
    if exact:
        outcome = f"{len(added):,} tokens added to {base.base_range.stop:,}; {LANGUAGES.name} takes {results[LANGUAGES.added].token_ratio:.0%} of the tokens"
        pipeline.finish_step("step2", metrics, outcome)
    else:
        atomic_write_json(ORIGINAL_MERGE_DIR / "metrics.json", metrics)
        print0(f"\nsaved {ORIGINAL_MERGE_DIR}, to compare only: tokens of equal score cannot become a tokenizer.json")


if __name__ == "__main__":
    run_cli(main)
