"""Which starting rows for new pieces are best: measured on the miniature, before and after a short training.

    python -m benchmarks.embedding_init --work-dir runs/mini --output embedding_init.json

Steps 1 and 2 must have run in the work directory. What do output rows do to Chinese and English: bits per byte, greedy
answers that change, positions of text at which a new piece wins? The same for random weights in ChatGLM3's layout. And
how well does Japanese start, and stand after a short run of step 5, with which input and output rows?
"""

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from llmtuner.console import Timer, UserError, format_table, print0, print_header, progress, run_cli
from llmtuner.data.held_out import training_documents
from llmtuner.data.sources import get_dataset_attr
from llmtuner.data.template import Template
from llmtuner.eval.bits_per_byte import bits_per_byte
from llmtuner.eval.generation import generate_answers
from llmtuner.files import atomic_write_json
from llmtuner.model.loading import load_for_evaluation, load_model
from llmtuner.tokenizer.fast import copy_tokenizer, encode_batch, load_tokenizer
from llmtuner.weights.convert_chatglm import convert_chatglm
from llmtuner.weights.embedding_init import METHODS, NewTokens, find_new_tokens, init_new_embeddings
from llmtuner.weights.focus import focus_weights, static_vectors
from llmtuner.weights.merge_lora import merge_adapter
from llmtuner.weights.resize_embeddings import resize_token_embeddings

TINY = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "tiny_chatglm3"
TINY_PIECES, TINY_PROMPTS, TINY_PROMPT, TINY_ANSWER = 300, 400, 24, 32  # numbers of pieces, prompts, tokens, tokens
FRESH = "initialisation"  # seed of questions and documents that are not those of the steps
DOCUMENTS = 600  # of each old language
OLD_LANGUAGES = ("zh", "en")
WINDOW = 256  # tokens, as the miniature's profile has it
CORRECTED = "+norm"
CHOICES = [method + norm for method in METHODS for norm in ("", CORRECTED)]
MIXED = [  # rows of the input matrix, rows of the output matrix
    ("mean+norm", "mean"),
    ("focus", "mean"),
    ("focus+norm", "mean"),
    ("mean", "first_weighted"),
    ("mean+norm", "first_weighted"),
    ("last_weighted", "first_weighted"),  # as in AdaptiVocab
    ("global_mean+norm", "mean"),
]
TRAINED = [
    ("mean", "mean"),
    ("mean+norm", "mean"),
    ("mean+norm", "mean+norm"),
    ("mean+norm", "first_weighted"),
    ("last_weighted", "first_weighted"),
    ("focus", "mean"),
    ("mean", "focus"),
    ("focus", "focus"),
    ("global_mean", "global_mean"),
    ("random", "random"),
]
MakeRows = Callable[[torch.Tensor, str, str], torch.Tensor]
"""(matrix, "input" or "output", choice) -> new rows in fp32"""


@dataclass
class Model:
    """A model whose two matrices can be exchanged; new rows are rounded to the dtype of its files."""

    model: Any
    first_id: int
    stored: torch.dtype
    init_fn: MakeRows

    def __post_init__(self) -> None:
        modules = {"input": self.model.get_input_embeddings(), "output": self.model.get_output_embeddings()}
        self.matrices = {name: (module, module.weight.data) for name, module in modules.items()}

    def grow(self, which: str, choice: str) -> torch.Tensor:
        """Puts new rows behind the native ones of one matrix; returns all, [rows, width]."""
        module, old = self.matrices[which]
        rows = self.init_fn(old.to(self.stored), which, choice).to(self.stored)
        module.weight = torch.nn.Parameter(torch.cat([old[: self.first_id], rows.float()]), requires_grad=False)
        return module.weight


def main() -> None:
    parser = argparse.ArgumentParser(description="compare starting rows for new pieces on the miniature")
    parser.add_argument("--work-dir", type=Path, help="where steps 1 and 2 have run (default: as for the steps)")
    parser.add_argument("--steps", type=int, default=150, help="steps of training; 0: none")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each pair")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.work_dir:
        os.environ["WORK_DIR"] = str(options.work_dir.resolve())
    import constants
    import pipeline

    if constants.PROFILE_NAME != "mini":
        raise UserError("this benchmark asks the miniature's questions. Leave PROFILE unset.")
    pipeline.require_artifacts(constants.MERGED_TOKENIZER_DIR)
    base_dir, merged_dir = pipeline.require_base_model(), constants.MERGED_TOKENIZER_DIR
    pipeline.require_corpus()
    watch = Timer()
    print0(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} CPU threads")

    new = find_new_tokens(base_dir / "tokenizer.model", merged_dir / "tokenizer.model")
    tokenizer = load_tokenizer(merged_dir)
    sources = [get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in constants.TOKENIZER_MIX]
    japanese = [text for one in sources for text in training_documents(one, constants.VALIDATION_SHARE)]
    focus = focus_weights(static_vectors(encode_batch(tokenizer, japanese), new.end), new)
    init_fn = rows_maker(new, focus)
    stored = load_model(base_dir).dtype

    def fresh_model() -> Model:
        return Model(load_for_evaluation(base_dir)[0], new.first_id, stored, init_fn)

    texts = {language: pipeline.held_out_texts(language) for language in ("ja", *OLD_LANGUAGES)}
    results: dict[str, Any] = {
        "old_languages": measure_old_languages(fresh_model(), load_tokenizer(base_dir), tokenizer, texts),
        "random_weights": measure_random_weights(),
        "japanese": measure_japanese(fresh_model(), tokenizer, texts["ja"]),
    }
    if options.steps:
        results["trained"] = measure_training(new, init_fn, texts, options.steps, options.seeds)
    if options.output:
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": f"CPU, {torch.get_num_threads()} threads",
            "seconds": watch.seconds(),
        }
        atomic_write_json(options.output, environment | results)
    print0(f"\n{watch.seconds():.0f} s" + (f", figures in {options.output}" if options.output else ""))


def rows_maker(new: NewTokens, focus: torch.Tensor | None = None) -> MakeRows:
    """`init_new_embeddings` for choices such as "mean+norm"; the two matrices get different random rows."""

    def init_fn(matrix: torch.Tensor, which: str, choice: str) -> torch.Tensor:
        method, norm_correction = choice.removesuffix(CORRECTED), choice.endswith(CORRECTED)
        return init_new_embeddings(matrix, new, method, norm_correction, seed=int(which == "output"), weights=focus)

    return init_fn


# ------------------------------------------------------------------------------------------------------- old languages
def measure_old_languages(
    grown: Model, base_tokenizer: Any, tokenizer: Any, texts: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """What each choice of output rows does to Chinese and English; input rows of new pieces play no part in them."""
    from mini.world import build_generators, documents, questions

    generators = build_generators(FRESH)
    fresh = [text for language in OLD_LANGUAGES for text in documents(generators[language], DOCUMENTS, 0)[0]]
    asked = [one["question"] for one in questions(build_generators(FRESH)) if one["group"] in OLD_LANGUAGES]
    windows = token_windows(tokenizer, fresh)
    hidden = torch.cat([hidden_states(grown.model, torch.tensor([ids])) for ids in windows])
    before = generate_answers(grown.model, base_tokenizer, asked).texts
    results = {"base": bits_of(grown.model, base_tokenizer, texts, OLD_LANGUAGES)}
    grown.grow("input", "mean")
    for choice in CHOICES:
        head = grown.grow("output", choice)
        after = generate_answers(grown.model, tokenizer, asked).texts
        results[choice] = {
            **bits_of(grown.model, tokenizer, texts, OLD_LANGUAGES),
            "answers_changed": sum(one != other for one, other in zip(before, after, strict=True)),
            "answers": len(asked),
            "wins": count_wins(hidden, head, grown.first_id),
            "positions": len(hidden),
        }
    print_header(f"output rows and old languages: {len(asked)} questions, {len(hidden):,} positions of fresh text")
    print0(
        format_table(
            ["output rows", "zh bits/byte", "en bits/byte", "answers changed", "positions won"],
            [
                [
                    name,
                    f"{row['zh']:.4f}",
                    f"{row['en']:.4f}",
                    *(str(row.get(key, "")) for key in ("answers_changed", "wins")),
                ]
                for name, row in results.items()
            ],
        )
    )
    return results


def bits_of(model: Any, tokenizer: Any, texts: dict[str, list[str]], languages: Iterable[str]) -> dict[str, float]:
    """Bits per byte of some languages' texts."""
    return {language: bits_per_byte(model, tokenizer, texts[language], WINDOW) for language in languages}


def token_windows(tokenizer: Any, texts: list[str]) -> Iterator[list[int]]:
    """Ids of the texts in windows, each behind the prefix of a document."""
    prefix = Template.from_tokenizer(tokenizer).prefix
    step = WINDOW - len(prefix)
    for ids in encode_batch(tokenizer, texts):
        for start in range(0, len(ids), step):
            yield prefix + ids[start : start + step]


@torch.no_grad()
def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the output matrix is applied to at every position of ids [texts, tokens]: [texts * tokens, width]."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


def count_wins(hidden: torch.Tensor, head: torch.Tensor, first_id: int) -> int:
    """Positions at which the greatest logit is that of a new piece."""
    return sum(int(((part @ head.T).argmax(dim=1) >= first_id).sum()) for part in hidden.split(1024))


# ------------------------------------------------------------------------------------------------------ random weights
def measure_random_weights() -> dict[str, dict[str, int]]:
    """Greedy continuations and winning pieces of the random model in ChatGLM3's layout, stored in half precision."""
    if not TINY.is_dir():
        print0(f"{TINY} is missing: nothing is measured on random weights.")
        return {}
    with tempfile.TemporaryDirectory() as directory:
        convert_chatglm(TINY, Path(directory) / "glm")
        model = load_model(Path(directory) / "glm").half().float()
    first_id = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(3, first_id, (TINY_PIECES, 2), generator=generator).tolist()
    prompts = torch.randint(3, first_id, (TINY_PROMPTS, TINY_PROMPT), generator=generator)
    grown = Model(model, first_id, torch.float16, rows_maker(NewTokens(first_id, pairs, unk_id=0)))
    before = continuations(model, prompts)
    hidden = hidden_states(model, before)
    grown.grow("input", "mean")
    results = {}
    for choice in CHOICES:
        if choice.startswith("focus"):  # random ids are no text from which vectors could be learnt
            continue
        head = grown.grow("output", choice)
        changed = int((continuations(model, prompts) != before).any(dim=1).sum())
        results[choice] = {
            "changed": changed,
            "continuations": len(prompts),
            "wins": count_wins(hidden, head, first_id),
            "positions": len(hidden),
        }
    print_header(f"random weights: {len(prompts)} continuations of {TINY_ANSWER} tokens, {len(hidden):,} positions")
    rows = [[name, str(row["changed"]), str(row["wins"])] for name, row in results.items()]
    print0(format_table(["output rows", "continuations changed", "positions won"], rows))
    return results


def continuations(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts [prompts, tokens] and what follows greedily."""
    return model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=TINY_ANSWER,
        min_new_tokens=TINY_ANSWER,
        do_sample=False,
        pad_token_id=0,
    )


# ------------------------------------------------------------------------------------------------------------ Japanese
def measure_japanese(grown: Model, tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
    """Japanese bits per byte of pairs of choices before any training."""
    results: list[dict[str, Any]] = []
    for pair in progress([*((choice, choice) for choice in CHOICES), *MIXED], "Japanese", unit="pair"):
        for which, choice in zip(("input", "output"), pair, strict=True):
            grown.grow(which, choice)
        bits = bits_per_byte(grown.model, tokenizer, texts, WINDOW)
        results.append({"input": pair[0], "output": pair[1], "ja": bits})
    print_header("Japanese before training (bits per byte of held-out text)")
    print0(
        format_table(
            ["input rows", "output rows", "ja"], [[row["input"], row["output"], f"{row['ja']:.4f}"] for row in results]
        )
    )
    return results


def measure_training(
    new: NewTokens, init_fn: MakeRows, texts: dict[str, list[str]], steps: int, seeds: int
) -> list[dict[str, Any]]:
    """Bits per byte of every language after some steps of step 5, from several pairs of choices."""
    import constants
    from llmtuner.train.tuner import run_exp
    from step5_train_pt_single_gpu import BY_PROFILE, SETTINGS

    results: list[dict[str, Any]] = []
    for pair in TRAINED:
        choices = dict(zip(("input", "output"), pair, strict=True))
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as directory:
                zero, adapter, merged = (Path(directory) / name for name in ("zero", "adapter", "merged"))
                zero.mkdir()
                resize_token_embeddings(
                    constants.BASE_MODEL_DIR,
                    zero,
                    new,
                    constants.EMBEDDING_ROWS_MULTIPLE,
                    lambda matrix, which, choices=choices: init_fn(matrix, which, choices[which]),  # type: ignore[misc]
                )
                copy_tokenizer(constants.MERGED_TOKENIZER_DIR, zero)
                run = dict(model_name_or_path=str(zero), output_dir=str(adapter), max_steps=steps, seed=42 + seed)
                quiet = dict(eval_strategy="no", eval_on_start=False, plot_loss=False)
                run_exp({**SETTINGS, **BY_PROFILE["mini"], **run, **quiet})
                merge_adapter(zero, adapter, merged)
                model, tokenizer = load_for_evaluation(merged)
            bits = bits_of(model, tokenizer, texts, texts)
            results.append({**choices, "seed": seed, "steps": steps, **bits})
    print_header(f"after {steps} steps of training (bits per byte of held-out text)")
    print0(
        format_table(
            ["input rows", "output rows", "seed", *texts],
            [
                [row["input"], row["output"], str(row["seed"]), *(f"{row[language]:.4f}" for language in texts)]
                for row in results
            ],
        )
    )
    return results


if __name__ == "__main__":
    run_cli(main)
