"""Step 3: resize the model's input and output embeddings for the tokens that step 2 added.

    python step3_resize_model.py
    python step3_resize_model.py --init focus             initialize the new rows in another way; --help lists them
    python step3_resize_model.py --init glossary          start new words from their translations, see docs/bridges.md
    python step3_resize_model.py --norm-correction        scale new input rows to the mean norm of the old ones

Old rows stay bit-identical. New output rows are weighted means of old ones, so no new token outscores the old ones, and
greedy answers in the base's languages stay what they were. Where input and output embeddings are one matrix (tied, as in
small Qwen models), its rows are chosen as output rows. Weights are streamed from disk to disk; memory holds one embedding
matrix at a time. The result, the Zero model, loads in plain transformers without remote code. BASE_MODEL_DIR may be
ChatGLM3's original checkpoint, or any causal language model that transformers knows.
"""

import argparse
from typing import TYPE_CHECKING, Any

import constants
import pipeline
from constants import BASE_MODEL_DIR, LANGUAGES, MERGED_TOKENIZER_DIR, ZERO_DIR
from llmtuner.console import Timer, UserError, print0, print_header, progress, run_cli, verdict
from llmtuner.outputs import atomic_directory

if TYPE_CHECKING:
    import torch

    from llmtuner.weights.lazy_checkpoint import EmbeddingKind

# The names of `embedding_init.METHODS`, which would import torch before anything is checked.
METHODS = ("mean", "focus", "glossary", "first_weighted", "last_weighted", "global_mean", "random")
FOCUS_BYTES = 30_000_000  # text of the added language from which "focus" learns which tokens occur in similar contexts
MAX_BYTES_TO_COMPARE = 2e9  # a larger model is not loaded twice only to compare logits
PROBE_PROMPTS = [  # on these, base and Zero model must give equal logits for the old ids
    "你好，请介绍一下你自己。",
    "从前有一座山，山上有一座小镇。",
    "Good morning! What can you tell me about the island?",
    "The festival begins at nine o'clock on the 3rd of May.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = constants.PROFILE.init_output or "mean"
    parser.add_argument("--init", choices=METHODS, help=f"how new rows start (default: mean, output rows {output})")
    parser.add_argument("--init-output", choices=METHODS, help="how new output rows start, if differently")
    parser.add_argument(
        "--glossary",
        default=constants.PROFILE.glossary,
        metavar="NAME",
        help=f"data set of translations for --init glossary (default: the profile's, {constants.PROFILE.glossary or 'none'})",
    )
    parser.add_argument(
        "--norm-correction", action="store_true", help="scale new input rows to the old rows' mean norm"
    )
    options = parser.parse_args()
    methods = {"input": options.init or "mean", "output": options.init_output or options.init or output}

    if "glossary" in methods.values() and not options.glossary:
        raise UserError(
            f"--init glossary needs a data set of translations: name one of {constants.DATASET_INFO} with --glossary, or as "
            "glossary in the profile. docs/bridges.md says what it looks like."
        )

    pipeline.start_step("step3", MERGED_TOKENIZER_DIR)
    pipeline.require_base_model(original_chatglm=True)
    if {"focus", "glossary"} & {*methods.values()}:
        pipeline.require_corpus()
    timer = Timer()

    from llmtuner.model.model_dir import is_original_chatglm, read_json
    from llmtuner.report.checks import MAX_LOGIT_DIFFERENCE
    from llmtuner.tokenizer.encoding import copy_tokenizer, encode_batch, load_tokenizer
    from llmtuner.tokenizer.vocab import read_vocab
    from llmtuner.weights import embedding_init
    from llmtuner.weights.resize_embeddings import resize_token_embeddings, rows_equal

    new = embedding_init.find_new_tokens(BASE_MODEL_DIR, MERGED_TOKENIZER_DIR)
    usage = usage_weights(load_tokenizer(MERGED_TOKENIZER_DIR), new) if "focus" in methods.values() else None

    def init_fn(matrix: "torch.Tensor", kind: "EmbeddingKind") -> "torch.Tensor":
        if kind == "tied" and (options.norm_correction or options.init_output not in (None, methods["input"])):
            reason = "its new rows can only start in one way. Leave --init-output out."
            if options.norm_correction:
                answers = f"answers in {LANGUAGES.listed(codes=LANGUAGES.retained)}"
                reason = f"a scaled row would outscore the old ones, and {answers} change. Leave --norm-correction out."
            raise UserError(
                f"{BASE_MODEL_DIR} has one matrix for input and output embeddings (tie_word_embeddings): {reason}"
            )
        if kind == "tied":
            methods["output"] = methods["input"]  # whatever the profile says
        # A longer output row would outscore the old ones, so only input rows are scaled.
        scaled = options.norm_correction and kind == "input"
        method = methods["input" if kind == "input" else "output"]
        weights = translation_weights(options.glossary, new, kind) if method == "glossary" else usage
        return embedding_init.init_new_embeddings(
            matrix, new, method, scaled, seed=int(kind == "output"), weights=weights
        )

    with atomic_directory(ZERO_DIR, replace=True) as partial:
        copy_tokenizer(MERGED_TOKENIZER_DIR, partial)
        resized = resize_token_embeddings(BASE_MODEL_DIR, partial, new, constants.EMBEDDING_ROWS_MULTIPLE, init_fn)
        if not rows_equal(BASE_MODEL_DIR, partial, new.first_id):
            raise UserError(f"rows just written to {partial} came back changed. Check the disk and run step 3 again.")
    print0(f"wrote {resized.stats}; rows are padded to a multiple of {constants.EMBEDDING_ROWS_MULTIPLE}")
    details = f"the first {new.first_id:,} rows of all embeddings are bit-identical to the base's"
    print0(verdict("Old rows check", True, details))
    for which, method in methods.items():
        scaled = ", scaled" if options.norm_correction and which == "input" else ""
        print0(f"new {which} rows: {embedding_init.METHODS[method]}{scaled}")
    if methods["output"] not in embedding_init.CONVEX_METHODS:
        retained = LANGUAGES.listed(codes=LANGUAGES.retained)
        print0(f"note: such output rows can outscore the old ones: answers in {retained} may change")

    print_header("some new tokens and the base tokens that spell them")
    base, merged = read_vocab(BASE_MODEL_DIR), read_vocab(MERGED_TOKENIZER_DIR)
    for offset in range(0, len(new.base_ids), max(1, len(new.base_ids) // 8)):
        [token] = merged.display([new.first_id + offset])
        print0(f"  {token}  <-  {' '.join(base.display(new.base_ids[offset]))}")

    difference = None
    if resized.stats.nbytes < MAX_BYTES_TO_COMPARE and not is_original_chatglm(
        read_json(BASE_MODEL_DIR / "config.json")
    ):
        difference = max_logit_difference(encode_batch(load_tokenizer(BASE_MODEL_DIR), PROBE_PROMPTS), new.first_id)
        details = f"largest difference between base and Zero model over {len(PROBE_PROMPTS)} prompts: {difference}"
        print0("\n" + verdict("Old logits check", difference <= MAX_LOGIT_DIFFERENCE, details))

    pipeline.finish_step(
        "step3",
        {
            "old_rows": resized.old_vocab_size,
            "new_rows": resized.vocab_size,
            "old_rows_identical": True,
            "old_logits_max_diff": difference,
            "init": methods,
            "norm_correction": options.norm_correction,
            "seconds": timer.seconds(),
        },
        f"Zero model with {resized.vocab_size:,} embedding rows instead of {resized.old_vocab_size:,}, old rows unchanged",
    )


def usage_weights(tokenizer: Any, new: Any) -> "torch.Tensor":
    """Weights of base tokens for each new token by their usage in the added language, for the method "focus"."""
    from llmtuner.tokenizer.encoding import encode_batch
    from llmtuner.weights.focus import focus_weights, static_vectors

    documents = (text for _, text in progress(pipeline.tokenizer_corpus(FOCUS_BYTES), "reading", unit=" documents"))
    ids = (ids for text in documents for ids in encode_batch(tokenizer, [text]))
    vectors = static_vectors(ids, new.end)
    return focus_weights(vectors, new)


def translation_weights(name: str, new: Any, kind: "EmbeddingKind") -> "torch.Tensor":
    """Weights of base tokens for each new token by translations in a data set, for the method "glossary"."""
    from llmtuner.data.bridges import read_translations
    from llmtuner.data.sources import get_dataset_attr
    from llmtuner.tokenizer.vocab import read_vocab
    from llmtuner.weights.embedding_init import first_token_weights, glossary_weights

    glossary = get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR)
    translations = read_translations(glossary, LANGUAGES.added)
    base, merged = read_vocab(BASE_MODEL_DIR), read_vocab(MERGED_TOKENIZER_DIR)
    compute, found = (first_token_weights, "begin a word with") if kind == "output" else (glossary_weights, "have")
    weights, count = compute(base, merged, new, translations)
    print0(f"glossary: {count:,} of {len(new.base_ids):,} new tokens {found} a translation")
    return weights


def max_logit_difference(prompts: list[list[int]], old_ids: int) -> float:
    """Largest difference between base and Zero model in the logits of the first `old_ids` ids, over some prompts."""
    import torch

    from llmtuner.model.loading import load_model

    base, zero = load_model(BASE_MODEL_DIR), load_model(ZERO_DIR)
    difference = 0.0
    for ids in prompts:
        with torch.no_grad():
            base_logits, zero_logits = (
                model(input_ids=torch.tensor([ids])).logits[..., :old_ids].float() for model in (base, zero)
            )
        difference = max(difference, float((base_logits - zero_logits).abs().max()))
    return difference


if __name__ == "__main__":
    run_cli(main)
