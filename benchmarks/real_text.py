"""Recipes of continued pretraining on real text, at equal tokens and over several seeds: which one learns more, which forgets less?

    python -m benchmarks.real_base --corpora TEXTS --output-dir BASE                            makes the base
    python -m benchmarks.real_text --corpora TEXTS --base BASE/base --output-dir DIR            all recipes, three seeds
    python -m benchmarks.real_text ... --recipes default staged --seeds 42 43 --max_steps 600

The step scripts run as a user starts them, with a PROFILE file: steps 1 to 3 once for each tokenizer and initialization,
then step 5 for each recipe and seed. Runs that have finished in DIR are not repeated, and results are saved after each.
Differences are paired by seed; their intervals are Student's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from benchmarks.common import (
    ROOT,
    Values,
    make_parser,
    markdown_table,
    print_results,
    read_results,
    run_step,
    save_results,
)
from llmtuner.console import UserError, print0, run_cli
from llmtuner.eval.intervals import T_QUANTILES
from llmtuner.files import atomic_write_json

if TYPE_CHECKING:
    from llmtuner.tokenizer.vocab import SentencePieceVocab

STEPS = ("step1_train_tokenizer.py", "step2_merge_tokenizer.py", "step3_resize_model.py")
STEP5 = "step5_train_pt_single_gpu.py"
TEST_BYTES = 60_000  # per language
TOLERANCE = 0.01  # by which the tokens of two runs of equal length may differ
LEARNING_RATE = 2e-3
PROFILE: Values = dict(
    base_id="a small model of Chinese and English",
    language="ja",
    language_name="Japanese",
    retained_languages={"zh": "Chinese", "en": "English"},
    writing_system="japanese",
    tokenizer_mix={"wikipedia_ja": 0.8, "aozora_ja": 0.2},
    reference_sets=["wikipedia_zh"],
    pretraining_mix={"wikipedia_ja": 0.64, "aozora_ja": 0.12, "wikipedia_zh": 0.12, "wikitext_en": 0.12},
    eval_sets={"ja": ["wikipedia_ja"], "zh": ["wikipedia_zh"], "en": ["wikitext_en"]},
    instruction_sets=["oasst2_ja"],
    num_new_tokens=2_500,
    ja_vocab_size=4_500,  # of which about as many are new
    tokenizer_sample_bytes=10_000_000,
    reference_bytes=20_000_000,
    held_out_bytes=3_000,  # the steps measure with little, this benchmark with `TEST_BYTES`
    context_length=256,
    pt_settings=dict(
        lora_rank=32,
        learning_rate=LEARNING_RATE,
        embedding_learning_rate=LEARNING_RATE,
        warmup_ratio=0.05,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        auto_find_batch_size=False,
        eval_steps=100_000,
        save_steps=100_000,
        save_minutes=None,
        max_eval_samples=8,
        plot_loss=False,
    ),
)


@dataclass(frozen=True)
class Recipe:
    """What differs from the default recipe."""

    step5: str = ""
    """Arguments of step 5."""
    step1: str = ""
    """Arguments of step 1."""
    step3: str = ""
    """Arguments of step 3."""
    original_tokenizer: bool = False
    """Tokens trained and merged as the original project did."""
    share: float = 1.0
    """Of the steps of the other runs."""
    one_seed: bool = False
    """It only checks a learning rate, with the first of the seeds."""


def rates(factor: float, embeddings: float | None = None) -> str:
    """Arguments that multiply both learning rates, or each by a factor of its own."""
    both = (LEARNING_RATE * factor, LEARNING_RATE * (factor if embeddings is None else embeddings))
    return "--learning_rate {:g} --embedding_learning_rate {:g}".format(*both)


WSD = "--lr_scheduler_type warmup_stable_decay"  # the last fifth of the steps decays
ORIGINAL = "--lora_rank 8 --lora_alpha 16 --warmup_ratio 0 --neat_packing false"
RANDOM_OUTPUT = "--init mean --init-output random"
RECIPES = {
    "default": Recipe(),
    "original": Recipe(
        f"{ORIGINAL} --learning_rate 1e-4 --embedding_learning_rate 1e-4", step3=RANDOM_OUTPUT, original_tokenizer=True
    ),
    "original_lr": Recipe(ORIGINAL, step3=RANDOM_OUTPUT, original_tokenizer=True),
    "half": Recipe(share=1 / 2),
    "quarter": Recipe(share=1 / 4),
    "staged": Recipe("--staged"),
    "new_rows": Recipe("--train_new_tokens_only"),
    "new_rows_lr_2": Recipe(f"--train_new_tokens_only {rates(2)}"),
    "no_neat_packing": Recipe("--neat_packing false"),
    "original_tokens": Recipe(original_tokenizer=True),
    "sentencepiece_tokens": Recipe(step1="--method sentencepiece"),
    "no_warmup": Recipe("--warmup_ratio 0"),
    "random_output": Recipe(step3=RANDOM_OUTPUT),
    "random": Recipe(step3="--init random"),
    "focus": Recipe(step3="--init focus"),
    "rank_8": Recipe("--lora_rank 8"),
    "rank_128": Recipe("--lora_rank 128"),
    "rank_128_rslora": Recipe("--lora_rank 128 --use_rslora"),
    "rank_128_rslora_alpha": Recipe("--lora_rank 128 --use_rslora --lora_alpha 16"),
    "loraplus": Recipe("--loraplus_lr_ratio 4"),
    "embedding_lr_quarter": Recipe(rates(1, 1 / 4)),
    "embedding_lr_4": Recipe(rates(1, 4)),
    "ja_100": Recipe("--dataset wikipedia_ja,aozora_ja --interleave_probs 0.84,0.16"),
    "ja_50": Recipe("--interleave_probs 0.42,0.08,0.25,0.25"),
    "full": Recipe(f"--finetuning_type full {rates(1 / 4, 1)}"),
    "full_muon": Recipe(f"--finetuning_type full --use_muon {rates(1 / 4, 1)}"),
    "full_muon_lr_4": Recipe(f"--finetuning_type full --use_muon {rates(1, 1)}"),
    "adam_8bit": Recipe("--optim adamw_8bit"),
    "double": Recipe(share=2),
    "wsd": Recipe(WSD),
    "wsd_double": Recipe(WSD, share=2),
    "wsd_lr_half": Recipe(f"{WSD} {rates(1 / 2)}"),
    "lr_quarter": Recipe(rates(1 / 4), one_seed=True),
    "lr_half": Recipe(rates(1 / 2), one_seed=True),
    "lr_2": Recipe(rates(2), one_seed=True),
}


def main() -> None:
    parser = make_parser(__doc__, "real_text.json", corpora=...)
    parser.add_argument("--base", type=Path, required=True, help="what benchmarks.real_base wrote")
    parser.add_argument("--output-dir", type=Path, required=True, help="for the WORK_DIRs and finished runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--max_steps", type=int, default=96, help="of each run, 2,048 tokens each")
    options = parser.parse_args()
    if (steps := options.max_steps) < 8 or steps % 8:
        parser.error("--max_steps is a multiple of 8, since some runs take a quarter and `staged` has two halves")
    lab = Lab(options.corpora.resolve(), options.base.resolve(), options.output_dir.resolve())
    start = {"base": lab.bits_per_byte(lab.base), "before": lab.bits_per_byte(lab.prepare(Recipe()) / "step3_zero")}
    runs: list[Values] = []
    for name in options.recipes:
        for seed in options.seeds[:1] if RECIPES[name].one_seed else options.seeds:
            runs.append({"recipe": name, "seed": seed, **lab.run(name, seed, steps)})
        save_results(options.output, {"max_steps": steps, **start, **summarize(runs), "runs": runs})
    print_results("each run", {f"{run['recipe']}, seed {run['seed']}": run["bits_per_byte"] for run in runs})
    check_tokens(runs)
    print0(table(summarize(runs)))


@dataclass(frozen=True)
class Lab:
    """Where runs take place: texts, base, and a directory of WORK_DIRs, which share tokenized texts."""

    corpora: Path
    base: Path
    directory: Path

    def run(self, name: str, seed: int, max_steps: int) -> Values:
        """What step 5 measures for a recipe and a seed; it runs unless that is on the disk.

        Raises:
            UserError: if a step fails.
        """
        recipe = RECIPES[name]
        steps = round(max_steps * recipe.share)
        finished = self.directory / "finished" / f"{name}-{seed}-{steps}.json"
        if not finished.exists():
            work = self.prepare(recipe)
            arguments = f"--max_steps {steps} --seed {seed} --cache_dir {self.directory / 'cache'} {recipe.step5}"
            self._step(STEP5, work, *arguments.split(), OVERWRITE="1")
            finished.parent.mkdir(parents=True, exist_ok=True)
            bits = {"bits_per_byte": self.bits_per_byte(work / "step5_pt_merged")}
            atomic_write_json(finished, measurements(read_results(work / "metrics" / "step5.json")) | bits)
        return read_results(finished)

    def bits_per_byte(self, model: Path) -> dict[str, float]:
        """Of each language, over more test text than the steps read."""
        from llmtuner.data.held_out import held_out_texts
        from llmtuner.eval.bits_per_byte import bpb_by_language
        from llmtuner.model.loading import load_for_evaluation

        info = ROOT / "data" / "dataset_info.json"
        texts = {
            language: held_out_texts(f"test_{language}", [], info, self.corpora, 0, TEST_BYTES)
            for language in PROFILE["eval_sets"]
        }
        return bpb_by_language(*load_for_evaluation(model), texts, PROFILE["context_length"], model.name)

    def prepare(self, recipe: Recipe) -> Path:
        """A WORK_DIR with steps 1 to 3 done."""
        words = ["original" if recipe.original_tokenizer else "ours", *recipe.step1.split(), *recipe.step3.split()]
        work = self.directory / "_".join(words).replace("--", "")
        if not (work / "metrics" / "step3.json").exists():
            self._step(STEPS[0], work, *recipe.step1.split(), *(["--compare"] if recipe.original_tokenizer else []))
            self._step(STEPS[1], work)
            original = merge_original(self.base, work) if recipe.original_tokenizer else None
            self._step(STEPS[2], work, *recipe.step3.split())
            if original:
                original.save(work / "step3_zero" / "tokenizer.model")
        return work

    def _step(self, script: str, work: Path, *arguments: str, **variables: str) -> None:
        profile = self.directory / "real.yaml"
        self.directory.mkdir(parents=True, exist_ok=True)
        atomic_write_json(profile, PROFILE | {"base_model_dir": str(self.base)})  # JSON is YAML
        run_step(script, work, self.corpora, *arguments, PROFILE=str(profile), **variables)


def merge_original(base_dir: Path, work: Path) -> "SentencePieceVocab":
    """Replaces step 2's tokenizer by the original project's tokens: every candidate.

    Returns:
        the same with the original's scores, the highest for all. Only sentencepiece can encode by it, so step 3 is to read
        scores in descending order; in a model directory this one replaces `tokenizer.model`, by which all texts are encoded.
    """
    from llmtuner.tokenizer.merge_vocab import merge_as_original, new_candidates
    from llmtuner.tokenizer.vocab import SentencePieceVocab, read_vocab

    base, candidates = read_vocab(base_dir), read_vocab(work / "step1_ja_tokenizer" / "original_bpe.model")
    assert isinstance(base, SentencePieceVocab)
    base.append([*new_candidates(base, candidates)]).save_model_files(work / "step2_merged_tokenizer", base_dir)
    return merge_as_original(base, candidates)


def measurements(metrics: Values) -> Values:
    """Cost of a finished step 5; tokens are those of both stages of `staged`."""
    first = metrics.get("embeddings_only", {})
    tokens = metrics["tokens"] + first.get("tokens", 0)
    return {
        "tokens": tokens,
        "seconds": metrics["seconds"],
        "tokens_per_second": metrics["tokens_per_second"],
        "trainable_parameters": max(part["trainable_parameters"] for part in (metrics, first) if part),
    }


# ------------------------------------------------------------------------------------------------------------ comparing
def interval(values: Sequence[float]) -> list[float] | None:
    """Mean and 95 % interval by Student's t distribution; None for a single value."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    half = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1] * stdev(values) / math.sqrt(len(values))
    return [round(value, 4) for value in (mean, mean - half, mean + half)]


def summarize(runs: Sequence[Values]) -> Values:
    """Of each recipe, per language, bits per byte and the difference to the default recipe; and tokens needed.

    Returns:
        `recipes`: recipe -> language -> `mean`, `interval` over seeds and `difference`, paired by seed, with its interval;
        `tokens_needed`: see `tokens_needed`.
    """
    after: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        after.setdefault(run["recipe"], {})[run["seed"]] = run["bits_per_byte"]
    default = after.get("default", {})
    recipes: Values = {}
    for name, by_seed in after.items():
        recipes[name] = {"seeds": len(by_seed)}
        for language in runs[0]["bits_per_byte"]:
            values = [bits[language] for bits in by_seed.values()]
            paired = [bits[language] - default[seed][language] for seed, bits in by_seed.items() if seed in default]
            recipes[name][language] = {
                "mean": round(fmean(values), 4),
                "interval": interval(values),
                "difference": interval(paired) if name != "default" else None,
            }
    return {"recipes": recipes, "tokens_needed": tokens_needed(runs)}


def tokens_needed(runs: Sequence[Values]) -> Values:
    """Tokens with which the default recipe reaches the Japanese bits per byte of the original's, as shares of its tokens.

    Seed by seed, interpolated by their logarithm between the runs at a quarter, a half and all of the steps; a goal that all
    of the steps just miss is extrapolated.

    Returns:
        original recipe -> `share`, the geometric mean over seeds with its interval; `by_seed`; and `at_most`, whether a
        quarter of the steps is enough for a seed, so that its share is a bound.
    """
    found: Values = {}
    bits = {(run["recipe"], run["seed"]): run["bits_per_byte"]["ja"] for run in runs}
    tokens = {(run["recipe"], run["seed"]): run["tokens"] for run in runs}
    for (name, seed), goal in bits.items():
        ours = [
            (math.log(tokens[recipe, seed]), bits[recipe, seed])
            for recipe in ("quarter", "half", "default")
            if (recipe, seed) in bits
        ]
        if not name.startswith("original") or len(ours) < 3:
            continue
        below, above = next((pair for pair in pairwise(ours) if goal >= pair[1][1]), ours[1:])
        slope = (above[1] - below[1]) / (above[0] - below[0])
        needed = max(below[0] + (goal - below[1]) / slope, ours[0][0])
        entry = found.setdefault(name, {"by_seed": {}, "at_most": False})
        entry["by_seed"][str(seed)] = round(math.exp(needed) / tokens[name, seed], 4)
        entry["at_most"] |= goal > ours[0][1]
    for entry in found.values():
        logs = [math.log(share) for share in entry["by_seed"].values()]
        entry["share"] = [round(math.exp(value), 4) for value in interval(logs) or [fmean(logs)]]
    return found


def tables(measured: Values, part: str) -> str:
    """A table of docs/evidence.md: recipes, or tokens."""
    if part == "recipes":
        return table(measured)
    lines = []
    for name, entry in measured["tokens_needed"].items():
        mean, *bounds = entry["share"]
        limits = "" if entry["at_most"] or not bounds else "{:.0%} to {:.0%}".format(*bounds)
        lines.append([f"`{name}`", f"{'at most ' * entry['at_most']}{mean:.0%}", limits])
    return markdown_table(["to learn as much Japanese as", "`default` needs of its tokens", "interval"], lines)


def table(summary: Values) -> str:
    """A Markdown table: of each recipe Japanese bits per byte, and the differences to the default in each language."""
    languages = [name for name in next(iter(summary["recipes"].values())) if name != "seeds"]
    lines = []
    for name, recipe in summary["recipes"].items():
        cells = [f"{recipe[language]['mean']:.3f}" for language in languages]
        for language in languages:
            found = recipe[language]["difference"]
            cells.append(format_difference(found))
        lines.append([f"`{name}`", str(recipe["seeds"]), *cells])
    header = ["recipe", "seeds", *languages, *(f"{language}, difference" for language in languages)]
    return markdown_table(header, lines)


def format_difference(found: Sequence[float] | None) -> str:
    """A difference with its interval, or nothing."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*found) if found else ""


def check_tokens(runs: Sequence[Values]) -> None:
    """Makes sure that recipes are compared at equal tokens.

    Raises:
        UserError: if runs of equal length differ by more than `TOLERANCE`.
    """
    tokens = [run["tokens"] for run in runs if RECIPES[run["recipe"]].share == 1]
    if tokens and max(tokens) > (1 + TOLERANCE) * min(tokens):
        raise UserError(f"the runs trained on {min(tokens):,} to {max(tokens):,} tokens, not equally many.")


if __name__ == "__main__":
    run_cli(main)
