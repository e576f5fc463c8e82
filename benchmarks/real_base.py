"""Trains a small ChatGLM3 that has read real Chinese and English and no Japanese: the base that `real_text` extends.

    python -m benchmarks.real_base --corpora TEXTS --output-dir DIR    about 20 minutes on one core; writes DIR/base

Reads zh_*.train.* and en_*.train.* of TEXTS, as many tokens of one language as of the other. Started again after an
interruption, it resumes from its latest checkpoint; what is finished in DIR is not repeated.
"""

import json
from pathlib import Path

from benchmarks.common import Values, make_parser, print_results, save_results
from llmtuner.console import Timer, print0, run_cli
from llmtuner.outputs import atomic_directory
from mini import make_base

VOCAB_SIZE = 8_000
CHARACTER_COVERAGE = 0.9995  # rarer characters, kana among them, are bytes
TOKENIZER_BYTES = 8_000_000  # of each language
EVAL_BYTES = 200_000
CONTEXT_LENGTH = 256
VALIDATION_SHARE = 0.05
LANGUAGES = ("zh", "en")
ARCHITECTURE = {
    **make_base.ARCHITECTURE,
    "num_hidden_layers": 5,
}
SETTINGS = {
    **make_base.COMMON,
    **make_base.PRETRAINING,
    "dataset": list(LANGUAGES),
    "mix_strategy": "interleave_under",
    "interleave_probs": [0.5, 0.5],
    "cutoff_len": CONTEXT_LENGTH,
    "val_size": VALIDATION_SHARE,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 2,
}


def main() -> None:
    parser = make_parser(__doc__, "real_base.json", corpora=...)
    parser.add_argument("--output-dir", type=Path, required=True, help="for checkpoints and the base")
    parser.add_argument("--max_steps", type=int, default=2_000, help="optimizer steps of 2,048 tokens")
    options = parser.parse_args()
    timer, directory = Timer(), options.output_dir.resolve()
    write_dataset_info(directory)
    metrics = train(options.corpora.resolve(), directory, options.max_steps)
    results = {
        **{name: metrics[name] for name in ("tokens", "steps", "tokens_per_second", "train_loss", "eval_loss")},
        **evaluate(options.corpora.resolve(), directory),
    }
    print_results("the base", {"base": results})
    save_results(options.output, results)
    print0(f"base: {directory / 'base'}, {timer.seconds():.0f} s")


def write_dataset_info(directory: Path) -> None:
    """Names the training and test files of each language as data sets."""
    info = {
        f"{kind}{language}": {"file_name": f"{language}_*.{split}.*", "columns": {"prompt": "text"}}
        for language in LANGUAGES
        for kind, split in (("", "train"), ("test_", "test"))
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def train(corpora: Path, directory: Path, max_steps: int) -> Values:
    """Makes tokenizer, random weights and from them the base, each unless it is there; returns what training measured."""
    import torch

    from llmtuner.data.held_out import reference_documents
    from llmtuner.model.loading import load_model
    from llmtuner.tokenizer.encoding import copy_tokenizer
    from llmtuner.train.tuner import run_exp

    untrained, trained, base = (directory / name for name in ("untrained", "trained", "base"))
    if not untrained.exists():
        info = directory / "dataset_info.json"
        texts = (
            text
            for language in LANGUAGES
            for text in reference_documents([language], info, corpora, VALIDATION_SHARE, TOKENIZER_BYTES)
        )
        with atomic_directory(untrained) as partial:
            make_base.make_tokenizer(texts, partial, VOCAB_SIZE, CHARACTER_COVERAGE)
            make_base.make_untrained_model(partial, ARCHITECTURE)
    if not base.exists():
        metrics = run_exp(
            {
                **SETTINGS,
                **dict(max_steps=max_steps, use_cpu=not torch.cuda.is_available()),
                **dict(model_name_or_path=str(untrained), output_dir=str(trained)),
                **dict(dataset_dir=str(directory), corpus_dir=str(corpora), cache_dir=str(directory / "cache")),
            }
        )
        with atomic_directory(base) as partial:
            load_model(trained, torch.bfloat16).save_pretrained(str(partial))
            copy_tokenizer(untrained, partial)
            (partial / "training.json").write_text(json.dumps(metrics), encoding="utf-8")
    return json.loads((base / "training.json").read_text(encoding="utf-8"))


def evaluate(corpora: Path, directory: Path) -> Values:
    """Parameters, and bits per byte of the texts in files named for tests."""
    from llmtuner.data.held_out import held_out_texts
    from llmtuner.eval.bits_per_byte import bpb_by_language
    from llmtuner.model.loading import load_for_evaluation

    info = directory / "dataset_info.json"
    texts = {
        language: held_out_texts(f"test_{language}", [language], info, corpora, VALIDATION_SHARE, EVAL_BYTES)
        for language in LANGUAGES
    }
    model, tokenizer = load_for_evaluation(directory / "base")
    bits = bpb_by_language(model, tokenizer, texts, CONTEXT_LENGTH, "base")
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "bits_per_byte": bits}


if __name__ == "__main__":
    run_cli(main)
