"""Step 3: grow the model's input and output embeddings for the pieces that step 2 added.

    python step3_resize_model.py

Every new row starts as the mean of the rows of the native pieces that spelled the new piece until now, in both
matrices. Old rows keep every bit. The result, the Zero model, loads in plain transformers without remote code.
"""

import constants
from constants import BASE_MODEL_DIR, MERGED_TOKENIZER_DIR, ZERO_DIR
from llmtuner.console import Stopwatch, heading, run_script, say, whole_directory

PROBES = [  # asked of base and Zero model: their logits over old ids must be equal
    "你好，请介绍一下你自己。",
    "从前有一座山，山上有一座小镇。",
    "Good morning! What can you tell me about the island?",
    "The festival begins at nine o'clock on the 3rd of May.",
]


def main() -> None:
    constants.start_step("step3", MERGED_TOKENIZER_DIR)
    constants.require_base_model()
    watch = Stopwatch()

    import torch

    from llmtuner.model.adapters import copy_tokenizer
    from llmtuner.model.growing import find_new_pieces, grow_embeddings
    from llmtuner.model.loading import load_model, load_tokenizer
    from llmtuner.tokenizer.fast import encode_batch

    heading("grow the embeddings")
    new = find_new_pieces(BASE_MODEL_DIR / "tokenizer.model", MERGED_TOKENIZER_DIR / "tokenizer.model")
    model = load_model(BASE_MODEL_DIR)
    old_rows = model.get_input_embeddings().weight.shape[0]
    grow_embeddings(model, new, constants.EMBEDDING_ROWS_MULTIPLE)
    new_rows = model.get_input_embeddings().weight.shape[0]
    with whole_directory(ZERO_DIR) as partial:
        model.save_pretrained(str(partial), max_shard_size="2GB")
        copy_tokenizer(MERGED_TOKENIZER_DIR, partial)
    say(f"{old_rows:,} rows -> {new_rows:,} rows, a multiple of {constants.EMBEDDING_ROWS_MULTIPLE}")

    heading("some new pieces and the native pieces whose rows they start from")
    base_tokenizer, zero_tokenizer = load_tokenizer(BASE_MODEL_DIR), load_tokenizer(ZERO_DIR)
    for offset in range(0, len(new.spellings), max(1, len(new.spellings) // 8)):
        piece = zero_tokenizer.convert_ids_to_tokens(new.first_id + offset)
        say(f"  {piece}  <-  {' '.join(base_tokenizer.convert_ids_to_tokens(new.spellings[offset]))}")

    heading("old logits")
    base, zero = load_model(BASE_MODEL_DIR), load_model(ZERO_DIR)
    difference = 0.0
    for ids in encode_batch(base_tokenizer, PROBES):
        with torch.no_grad():
            of_base, of_zero = (one(input_ids=torch.tensor([ids])).logits[0, :, : new.first_id] for one in (base, zero))
        difference = max(difference, float((of_base.float() - of_zero.float()).abs().max()))
    say(f"largest difference between the base's and the Zero model's logits of old ids: {difference}")

    constants.save_metrics(
        "step3",
        {
            "old_rows": old_rows,
            "new_rows": new_rows,
            "old_logits_max_diff": difference,
            "init": "mean of the native pieces' rows, input and output",
            "seconds": watch.seconds(),
        },
    )
    say(f"\nstep 3 done: the Zero model is in {ZERO_DIR}. Next: python step4_test_zero.py")


if __name__ == "__main__":
    run_script(main)
