"""Which initial embeddings of new tokens are best: measured on the miniature, before and after a short training.

    python -m benchmarks.embedding_init --work-dir runs/mini
    python -m benchmarks.embedding_init --work-dir DIR --make-kana-base NEW --known 300
    BASE_MODEL_DIR=NEW/base python -m benchmarks.embedding_init --work-dir NEW/work --output kana_base.json

Steps 1 and 2 must have run in the work directory. What do output rows do to Chinese and English: bits per byte, greedy
answers that change, positions of text at which a new token wins? The same for random weights in ChatGLM3's layout. And
how well does Japanese start, and stand after a short run of step 5, with which input and output rows?

`--make-kana-base` makes a base that knows kana, as ChatGLM3 does, of the miniature, which spells them in bytes: the miniature
learns the first 300 of its new tokens by the whole of step 5; they then count as base vocabulary, and the others as new. A new
token replaces 2.7 base tokens then, as in ChatGLM3 (2.8).
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import ROOT, Values, print_results
from llmtuner.console import UserError, print0, progress, run_cli
from llmtuner.data.held_out import training_documents
from llmtuner.data.sources import get_dataset_attr
from llmtuner.data.template import Template
from llmtuner.eval.bits_per_byte import bits_per_byte
from llmtuner.eval.generation import generate_answers
from llmtuner.model.loading import load_for_evaluation, load_model
from llmtuner.tokenizer import chatglm3, encoding
from llmtuner.tokenizer.vocab import Vocab, read_vocab
from llmtuner.weights.convert_chatglm import convert_chatglm
from llmtuner.weights.embedding_init import METHODS, NewTokens, find_new_tokens, init_new_embeddings
from llmtuner.weights.focus import focus_weights, static_vectors
from llmtuner.weights.merge_lora import merge_adapter
from llmtuner.weights.resize_embeddings import resize_token_embeddings

TINY = ROOT / "tests" / "fixtures" / "tiny_chatglm3"
TINY_NEW_TOKENS, TINY_PROMPTS, TINY_PROMPT_LEN, TINY_ANSWER_LEN = 300, 400, 24, 32
SEED = "initialisation"  # of questions and documents that are not those of the steps
DOCUMENTS = 600  # of each base language
BASE_LANGUAGES = ("zh", "en")
WINDOW = 256  # tokens, as in the miniature's profile
NORM = "+norm"
CHOICES = [method + norm for method in METHODS if method != "glossary" for norm in ("", NORM)]
# Methods of the rows of the input and of the output matrix, as pairs; last_weighted/first_weighted is AdaptiVocab's.
MIXED = "mean+norm/mean focus/mean focus+norm/mean mean/first_weighted mean+norm/first_weighted "
MIXED += "last_weighted/first_weighted global_mean+norm/mean"
TRAINED = "mean/mean mean+norm/mean mean+norm/mean+norm mean+norm/first_weighted last_weighted/first_weighted "
TRAINED += "focus/mean mean/focus focus/focus global_mean/global_mean random/random"
MakeRows = Callable[[torch.Tensor, str, str], torch.Tensor]
"""(matrix, "input" or "output", choice) -> new rows in fp32"""


@dataclass
class ResizableModel:
    """A model whose embedding matrices can be exchanged; new rows are rounded to the dtype of its files."""

    model: Any
    first_id: int
    stored: torch.dtype
    init_fn: MakeRows

    def __post_init__(self) -> None:
        modules = {"input": self.model.get_input_embeddings(), "output": self.model.get_output_embeddings()}
        self.matrices = {name: (module, module.weight.data) for name, module in modules.items()}

    def resize(self, which: str, choice: str) -> torch.Tensor:
        """Appends new rows to the base rows of one matrix; returns all, [rows, width]."""
        module, base = self.matrices[which]
        rows = self.init_fn(base.to(self.stored), which, choice).to(self.stored)
        module.weight = torch.nn.Parameter(torch.cat([base[: self.first_id], rows.float()]), requires_grad=False)
        return module.weight


def main() -> None:
    parser = common.make_parser(__doc__, "embedding_init.json", work_dir=None)
    parser.add_argument("--steps", type=int, default=150, help="training steps; 0: none")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each pair")
    parser.add_argument("--make-kana-base", type=Path, metavar="NEW", help="directory to create; nothing is measured")
    parser.add_argument("--known", type=int, default=300, help="tokens that count as base vocabulary in it")
    options = parser.parse_args()
    if options.make_kana_base:
        return make_kana_base(options)
    common.use_work_dir(options.work_dir, "MERGED_TOKENIZER_DIR")
    import constants
    import pipeline

    base_dir, merged_dir = pipeline.require_base_model(), constants.MERGED_TOKENIZER_DIR
    new = find_new_tokens(base_dir, merged_dir)
    tokenizer = encoding.load_tokenizer(merged_dir)
    sources = [get_dataset_attr(name, constants.DATASET_INFO, constants.CORPUS_DIR) for name in constants.TOKENIZER_MIX]
    japanese = [text for source in sources for text in training_documents(source, constants.VALIDATION_SHARE)]
    init_fn = rows_maker(new, focus_weights(static_vectors(encoding.encode_batch(tokenizer, japanese), new.end), new))
    stored = load_model(base_dir).dtype
    models = [ResizableModel(load_for_evaluation(base_dir)[0], new.first_id, stored, init_fn) for _ in range(2)]
    texts = {language: pipeline.held_out_texts(language) for language in ("ja", *BASE_LANGUAGES)}
    results: Values = {
        "base_languages": measure_base_languages(models[0], encoding.load_tokenizer(base_dir), tokenizer, texts),
        "random_weights": measure_random_weights(),
        "japanese": measure_japanese(models[1], tokenizer, texts["ja"]),
    }
    if options.steps:
        results["trained"] = measure_training(new, init_fn, texts, options.steps, options.seeds)
    return common.save_results(options.output, results)


def rows_maker(new: NewTokens, focus: torch.Tensor | None = None) -> MakeRows:
    """`init_new_embeddings` for choices such as "mean+norm"; the two matrices get different random rows."""

    def init_fn(matrix: torch.Tensor, which: str, choice: str) -> torch.Tensor:
        method, norm_correction = choice.removesuffix(NORM), choice.endswith(NORM)
        return init_new_embeddings(matrix, new, method, norm_correction, seed=int(which == "output"), weights=focus)

    return init_fn


def measure_base_languages(
    resizable: ResizableModel, base_tokenizer: Any, tokenizer: Any, texts: dict[str, list[str]]
) -> dict[str, Values]:
    """What each choice of output rows does to Chinese and English; input rows of new tokens play no part in them."""
    from mini.world import build_generators, documents, questions

    generators, model = build_generators(SEED), resizable.model
    fresh = [text for language in BASE_LANGUAGES for text in documents(generators[language], DOCUMENTS, 0)[0]]
    asked = [row["question"] for row in questions(build_generators(SEED)) if row["group"] in BASE_LANGUAGES]
    prefix = Template.from_tokenizer(tokenizer).prefix
    size = WINDOW - len(prefix)
    encoded = encoding.encode_batch(tokenizer, fresh)
    windows = (prefix + ids[start : start + size] for ids in encoded for start in range(0, len(ids), size))
    hidden = torch.cat([hidden_states(model, torch.tensor([ids])) for ids in windows])
    results: dict[str, Values] = {"base": bits_of(model, base_tokenizer, texts, BASE_LANGUAGES)}
    before = generate_answers(model, base_tokenizer, asked).texts
    for choice, changes in measure_output_rows(resizable, CHOICES, hidden):
        after = generate_answers(model, tokenizer, asked).texts
        changed = sum(old != new for old, new in zip(before, after, strict=True))
        bits = bits_of(model, tokenizer, texts, BASE_LANGUAGES)
        results[choice] = {**bits, "answers_changed": changed, "answers": len(asked), **changes}
    title = f"output rows and base languages: {len(asked)} questions, {len(hidden):,} positions of fresh text"
    print_results(title, results)
    return results


def measure_output_rows(
    resizable: ResizableModel, choices: list[str], hidden: torch.Tensor
) -> Iterator[tuple[str, Values]]:
    """Resizes the output matrix by each choice; yields at how many positions of `hidden` a new token has the top logit."""
    resizable.resize("input", "mean")
    for choice in choices:
        head = resizable.resize("output", choice)
        wins = sum(int(((part @ head.T).argmax(dim=1) >= resizable.first_id).sum()) for part in hidden.split(1024))
        yield choice, {"wins": wins, "positions": len(hidden)}


def bits_of(model: Any, tokenizer: Any, texts: dict[str, list[str]], languages: Iterable[str]) -> dict[str, float]:
    """Bits per byte of some languages' texts."""
    return {language: bits_per_byte(model, tokenizer, texts[language], WINDOW) for language in languages}


@torch.no_grad()
def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the output matrix is applied to at every position of ids [texts, tokens]: [texts * tokens, width]."""
    return model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


def measure_random_weights() -> dict[str, Values]:
    """Greedy continuations and winning tokens of the random model in ChatGLM3's layout, stored in half precision."""
    if not TINY.is_dir():
        print0(f"{TINY} is missing: nothing is measured on random weights.")
        return {}
    with tempfile.TemporaryDirectory() as directory:
        convert_chatglm(TINY, Path(directory) / "glm")
        model = load_model(Path(directory) / "glm").half().float()
    first_id = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(3, first_id, (TINY_NEW_TOKENS, 2), generator=generator).tolist()
    prompts = torch.randint(3, first_id, (TINY_PROMPTS, TINY_PROMPT_LEN), generator=generator)
    init_fn = rows_maker(NewTokens(first_id, pairs, 0, range(3, first_id - 9)))
    resizable = ResizableModel(model, first_id, torch.float16, init_fn)
    before = continuations(model, prompts)
    hidden = hidden_states(model, before)
    results = {}
    # Random ids are no text from which the vectors of focus could be learned.
    choices = [choice for choice in CHOICES if not choice.startswith("focus")]
    for choice, changes in measure_output_rows(resizable, choices, hidden):
        changed = int((continuations(model, prompts) != before).any(dim=1).sum())
        results[choice] = {"changed": changed, "continuations": len(prompts), **changes}
    title = f"random weights: {len(prompts)} continuations of {TINY_ANSWER_LEN} tokens, {len(hidden):,} positions"
    print_results(title, results)
    return results


def continuations(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts [prompts, tokens] and what follows greedily."""
    mask, lengths = torch.ones_like(prompts), dict(max_new_tokens=TINY_ANSWER_LEN, min_new_tokens=TINY_ANSWER_LEN)
    return model.generate(input_ids=prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)


def measure_japanese(resizable: ResizableModel, tokenizer: Any, texts: list[str]) -> list[Values]:
    """Japanese bits per byte of pairs of choices before any training."""
    results: list[Values] = []
    for pair in progress([*(f"{choice}/{choice}" for choice in CHOICES), *MIXED.split()], "Japanese", unit="pair"):
        choices = dict(zip(("input", "output"), pair.split("/"), strict=True))
        for which, choice in choices.items():
            resizable.resize(which, choice)
        results.append({**choices, "ja": bits_per_byte(resizable.model, tokenizer, texts, WINDOW)})
    by_pair = {f"{result['input']} / {result['output']}": result for result in results}
    print_results("input / output rows before training: bits per byte of held-out text", by_pair)
    return results


def measure_training(
    new: NewTokens, init_fn: MakeRows, texts: dict[str, list[str]], steps: int, seeds: int
) -> list[Values]:
    """Bits per byte of every language after some steps of step 5, from several pairs of choices."""
    import constants

    results: list[Values] = []
    for pair, seed in itertools.product(TRAINED.split(), range(seeds)):
        choices = dict(zip(("input", "output"), pair.split("/"), strict=True))

        def rows(matrix: torch.Tensor, which: str, choices: dict[str, str] = choices) -> torch.Tensor:
            return init_fn(matrix, which, choices[which])

        with tempfile.TemporaryDirectory() as directory:
            zero, merged = Path(directory) / "zero", Path(directory) / "merged"
            zero.mkdir()
            resize_token_embeddings(constants.BASE_MODEL_DIR, zero, new, constants.EMBEDDING_ROWS_MULTIPLE, rows)
            encoding.copy_tokenizer(constants.MERGED_TOKENIZER_DIR, zero)
            pretrain(zero, merged, max_steps=steps, seed=42 + seed)
            model, tokenizer = load_for_evaluation(merged)
        results.append({**choices, "seed": seed, "steps": steps, **bits_of(model, tokenizer, texts, texts)})
    by_pair = {f"{result['input']} / {result['output']}, seed {result['seed']}": result for result in results}
    title = f"input / output rows after {steps} steps of training: bits per byte of held-out text"
    print_results(title, by_pair)
    return results


def pretrain(model: Path, merged: Path, **settings: Any) -> None:
    """Runs step 5 on a model and merges the adapter, which lies beside it."""
    from llmtuner.train.tuner import run_exp

    adapter = model.with_name("adapter")
    run = dict(model_name_or_path=str(model), output_dir=str(adapter), **settings)
    run_exp({**common.step_settings("pt"), **common.TRAIN_ONLY, **run})
    merge_adapter(model, adapter, merged)


def make_kana_base(options: argparse.Namespace) -> None:
    """Writes a base model that knows some of the new tokens, and a work directory in which the others are new."""
    target = options.make_kana_base
    if target.exists():
        raise UserError(f"{target} exists. Name another directory.")
    common.use_work_dir(options.work_dir, "JA_TOKENIZER")
    import constants
    import pipeline

    base_dir = pipeline.require_base_model()
    base = read_vocab(base_dir)
    num_base = len(base.tokens)
    pieces = read_vocab(constants.JA_TOKENIZER).tokens[num_base:]
    known, unknown = pieces[: options.known], pieces[options.known :]

    def save(vocab: Vocab, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        vocab.save_model_files(directory, base_dir)
        return directory

    taught = save(base.append(known), target / "taught")
    new = find_new_tokens(base_dir, taught)
    resize_token_embeddings(base_dir, taught, new, constants.EMBEDDING_ROWS_MULTIPLE)
    pretrain(taught, target / "trained")

    # Special tokens follow the base vocabulary: the known tokens move before them.
    specials = list(range(num_base, num_base + len(chatglm3.SPECIAL_TOKENS)))
    order = [*range(num_base), *range(num_base + len(specials), num_base + len(specials) + len(known)), *specials]
    model = load_model(target / "trained")
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data[: len(order)] = module.weight.data[order].clone()  # type: ignore[union-attr]
    continued = base.append(known, after_special=False)
    result = save(continued, target / "base")
    model.save_pretrained(str(result))
    merged = save(continued.append(unknown), target / "work" / "step2_merged_tokenizer")
    (target / "work" / "corpus").symlink_to(constants.CORPUS_DIR.resolve())
    spelled = find_new_tokens(result, merged).base_ids
    print0(f"a new token replaces {sum(map(len, spelled)) / len(spelled):.2f} base tokens; the base is {result}")


if __name__ == "__main__":
    run_cli(main)
