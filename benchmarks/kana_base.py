"""Makes a base that already knows kana, as ChatGLM3 does, out of the miniature, which spells them in bytes.

    python -m benchmarks.kana_base --work-dir DIR --directory NEW --known 300
    BASE_MODEL_DIR=NEW/base python -m benchmarks.embedding_init --work-dir NEW/work

DIR is a WORK_DIR in which step 1 has run. The miniature learns the first 300 of its pieces by the whole of step 5; they then
count as native, and the other pieces as new. A new piece replaces 2.7 native ones then, as in ChatGLM3 (2.8).
"""

import argparse
import os
from pathlib import Path

from llmtuner.console import UserError, print0, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description="make a base that knows kana")
    parser.add_argument("--work-dir", type=Path, required=True, help="where step 1 has run")
    parser.add_argument("--directory", type=Path, required=True, help="must not exist")
    parser.add_argument("--known", type=int, default=300, help="pieces that count as native")
    options = parser.parse_args()
    os.environ["WORK_DIR"] = str(options.work_dir.resolve())
    if options.directory.exists():
        raise UserError(f"{options.directory} exists. Name another directory.")
    import constants
    import pipeline

    pipeline.require_artifacts(constants.JA_TOKENIZER)
    base_dir = pipeline.require_base_model()
    corpus = pipeline.require_corpus()
    from llmtuner.model.loading import load_model
    from llmtuner.tokenizer.fast import SPECIAL_TOKENS, read_sentencepiece, save_tokenizer
    from llmtuner.tokenizer.merge_vocab import merge_vocab
    from llmtuner.train.tuner import run_exp
    from llmtuner.weights.embedding_init import find_new_tokens
    from llmtuner.weights.merge_lora import merge_adapter
    from llmtuner.weights.resize_embeddings import resize_token_embeddings
    from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS

    base = read_sentencepiece(base_dir / "tokenizer.model")
    native = len(base.pieces)
    pieces = [piece.piece for piece in read_sentencepiece(constants.JA_TOKENIZER).pieces[native:]]
    known, unknown = pieces[: options.known], pieces[options.known :]

    def save(proto, directory: Path) -> Path:  # type: ignore[no-untyped-def]
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
        save_tokenizer(directory / "tokenizer.model", directory)
        return directory

    taught = save(merge_vocab(base, known), options.directory / "taught")
    new = find_new_tokens(base_dir / "tokenizer.model", taught / "tokenizer.model")
    resize_token_embeddings(base_dir, taught, new, constants.EMBEDDING_ROWS_MULTIPLE)
    adapter, trained = options.directory / "adapter", options.directory / "trained"
    run = dict(model_name_or_path=str(taught), output_dir=str(adapter))
    run_exp(
        {**SETTINGS, **BY_PROFILE["mini"], **run, "eval_strategy": "no", "eval_on_start": False, "plot_loss": False}
    )
    merge_adapter(taught, adapter, trained)

    # Special tokens stand behind all native pieces: the known ones move before them.
    specials = list(range(native, native + len(SPECIAL_TOKENS)))
    order = [*range(native), *range(native + len(specials), native + len(specials) + len(known)), *specials]
    model = load_model(trained)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data[: len(order)] = module.weight.data[order].clone()  # type: ignore[union-attr]
    continued = merge_vocab(base, known, placeholders=False)
    result = save(continued, options.directory / "base")
    model.save_pretrained(str(result))
    merged = save(merge_vocab(continued, unknown), options.directory / "work" / "step2_merged_tokenizer")
    (options.directory / "work" / "corpus").symlink_to(corpus.resolve())
    spelled = find_new_tokens(result / "tokenizer.model", merged / "tokenizer.model").base_ids
    print0(f"a new piece replaces {sum(map(len, spelled)) / len(spelled):.2f} native ones; the base is {result}")


if __name__ == "__main__":
    run_cli(main)
