"""Step 3: grow the model's input and output embeddings for the pieces that step 2 added.

    python step3_resize_model.py
    python step3_resize_model.py --init focus             start the new rows in another way; --help lists them
    python step3_resize_model.py --norm-correction        scale new input rows to the usual length

Old rows keep every bit. New output rows are weighted means of old ones, so no new piece wins against the old ones, and
greedy answers in Chinese and English stay what they were. The weights go from disk to disk; memory holds one embedding
matrix of them. The result, the Zero model, loads in plain transformers without remote code. BASE_MODEL_DIR may be
ChatGLM3 as published.
"""

import argparse
from typing import TYPE_CHECKING, Any

import constants
import pipeline
from constants import BASE_MODEL_DIR, MERGED_TOKENIZER_DIR, ZERO_DIR
from llmtuner.console import Timer, UserError, command, print0, print_header, progress, run_cli
from llmtuner.outputs import atomic_directory

if TYPE_CHECKING:
    from typing import Literal

    import torch

# the names of `embedding_init.METHODS`, which would import torch before anything is checked
METHODS = ("mean", "focus", "first_weighted", "last_weighted", "global_mean", "random")
FOCUS_BYTES = 30_000_000  # Japanese text from which "focus" knows which pieces are used alike
SMALL_BYTES = 2e9  # of weights; a larger model is not loaded twice only to compare logits
PROBE_PROMPTS = [  # asked of base and Zero model: their logits over old ids must be equal
    "你好，请介绍一下你自己。",
    "从前有一座山，山上有一座小镇。",
    "Good morning! What can you tell me about the island?",
    "The festival begins at nine o'clock on the 3rd of May.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="grow the embeddings for the new pieces")
    parser.add_argument("--init", choices=METHODS, default="mean", help="start of new rows (default: %(default)s)")
    parser.add_argument("--init-output", choices=METHODS, help="start of new output rows, if it is another")
    parser.add_argument(
        "--norm-correction", action="store_true", help="scale new input rows to the native rows' length"
    )
    options = parser.parse_args()
    methods = {"input": options.init, "output": options.init_output or options.init}

    pipeline.start_step("step3", MERGED_TOKENIZER_DIR)
    pipeline.require_base_model(published=True)
    if "focus" in methods.values():
        pipeline.require_corpus()
    timer = Timer()

    from llmtuner.model.model_dir import is_original_chatglm, read_json
    from llmtuner.tokenizer.fast import copy_tokenizer, encode_batch, load_tokenizer
    from llmtuner.weights import embedding_init
    from llmtuner.weights.resize_embeddings import resize_token_embeddings, rows_equal

    print_header("Step 3: grow the embeddings")
    new = embedding_init.find_new_tokens(BASE_MODEL_DIR / "tokenizer.model", MERGED_TOKENIZER_DIR / "tokenizer.model")
    merged_tokenizer = load_tokenizer(MERGED_TOKENIZER_DIR)
    weights = usage_weights(merged_tokenizer, new) if "focus" in methods.values() else None

    def init_fn(matrix: "torch.Tensor", which: 'Literal["input", "output"]') -> "torch.Tensor":
        # A longer output row would win against old ones: only input rows are scaled.
        scaled = options.norm_correction and which == "input"
        return embedding_init.init_new_embeddings(
            matrix, new, methods[which], scaled, seed=int(which == "output"), weights=weights
        )

    with atomic_directory(ZERO_DIR, replace=True) as partial:
        copy_tokenizer(MERGED_TOKENIZER_DIR, partial)
        grown = resize_token_embeddings(BASE_MODEL_DIR, partial, new, constants.EMBEDDING_ROWS_MULTIPLE, init_fn)
        if not rows_equal(BASE_MODEL_DIR, partial, new.first_id):
            raise UserError(f"rows just written to {partial} came back changed. Check the disk and run step 3 again.")
    print0(
        f"{grown.old_vocab_size:,} rows -> {grown.vocab_size:,} rows, a multiple of {constants.EMBEDDING_ROWS_MULTIPLE}"
    )
    print0(f"the first {new.first_id:,} rows of both matrices are the base's, bit by bit; {grown.stats}")
    for which, method in methods.items():
        scaled = ", scaled" if options.norm_correction and which == "input" else ""
        print0(f"new {which} rows: {embedding_init.METHODS[method]}{scaled}")
    if methods["output"] not in embedding_init.CONVEX_METHODS:
        print0("such output rows can win against old ones: Chinese and English answers may change")

    print_header("some new pieces and the native pieces whose rows they replace")
    base_tokenizer = load_tokenizer(BASE_MODEL_DIR)
    for offset in range(0, len(new.base_ids), max(1, len(new.base_ids) // 8)):
        piece = merged_tokenizer.convert_ids_to_tokens(new.first_id + offset)
        print0(f"  {piece}  <-  {' '.join(base_tokenizer.convert_ids_to_tokens(new.base_ids[offset]))}")

    difference = None
    if grown.stats.nbytes < SMALL_BYTES and not is_original_chatglm(read_json(BASE_MODEL_DIR / "config.json")):
        print_header("old logits")
        difference = max_logit_difference(encode_batch(base_tokenizer, PROBE_PROMPTS), new.first_id)
        print0(f"largest difference between the base's and the Zero model's logits of old ids: {difference}")

    pipeline.finish_step(
        "step3",
        {
            "old_rows": grown.old_vocab_size,
            "new_rows": grown.vocab_size,
            "old_rows_identical": True,
            "old_logits_max_diff": difference,
            "init": methods,
            "norm_correction": options.norm_correction,
            "seconds": timer.seconds(),
        },
    )
    print0(f"\nstep 3 done: the Zero model is in {ZERO_DIR}. Next: {command('step4_test_zero.py')}")


def usage_weights(tokenizer: Any, new: Any) -> "torch.Tensor":
    """Which native pieces are used like each new one in Japanese text, for the method "focus"."""
    from llmtuner.tokenizer.fast import encode_batch
    from llmtuner.weights.focus import focus_weights, static_vectors

    documents = (text for _, text in progress(pipeline.tokenizer_corpus(FOCUS_BYTES), "reading", unit=" documents"))
    ids = (ids for text in documents for ids in encode_batch(tokenizer, [text]))
    vectors = static_vectors(ids, new.end)
    return focus_weights(vectors, new)


def max_logit_difference(prompts: list[list[int]], old_ids: int) -> float:
    """How far the Zero model's logits of the first `old_ids` ids are from the base's, over some prompts."""
    import torch

    from llmtuner.model.loading import load_model

    base, zero = load_model(BASE_MODEL_DIR), load_model(ZERO_DIR)
    difference = 0.0
    for ids in prompts:
        with torch.no_grad():
            of_base, of_zero = (
                one(input_ids=torch.tensor([ids])).logits[..., :old_ids].float() for one in (base, zero)
            )
        difference = max(difference, float((of_base - of_zero).abs().max()))
    return difference


if __name__ == "__main__":
    run_cli(main)
