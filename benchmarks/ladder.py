"""How far facts cross from Chinese into Japanese, by recipe and seed: which of the bridges brings what?

    python -m benchmarks.ladder --work-dir runs/mini --output-dir DIR                                 all recipes, three seeds
    python -m benchmarks.ladder --work-dir runs/mini --output-dir DIR --recipes default --seeds 42

From steps 1 to 3 of a finished `make demo`, steps 5 and 6 run as a user starts them; then the chat model climbs step 7's ladder,
with greedy decoding. Runs that have finished in DIR are not repeated, and those that the results file has from other recipes and
seeds stay in it. Intervals are over seeds, Student's.
"""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from benchmarks.common import (
    Values,
    make_parser,
    markdown_table,
    print_results,
    read_results,
    run_step,
    save_results,
    use_work_dir,
)
from benchmarks.real_text import WSD, interval
from llmtuner.console import print0, run_cli
from llmtuner.eval.ladder import ENTITIES, FORMS, PIVOT
from llmtuner.eval.language import LANGUAGES
from llmtuner.files import atomic_write_json
from llmtuner.outputs import atomic_directory

COPIED = ("corpus", "step1_ja_tokenizer", "step2_merged_tokenizer", "step3_zero", "metrics")
LATER_METRICS = shutil.ignore_patterns("step5*", "step6*", "step7*", "embeddings*")
QUESTIONS_PER_GROUP = 200  # of those that step 7 asks
GROUPS = {"told": ("told",), "untold": ("untold_named", "untold_unnamed")}
PRETRAINED, CHAT = "step5_pt_merged", "chat_model"


@dataclass(frozen=True)
class Recipe:
    """What differs from the default."""

    instead: dict[str, str] = field(default_factory=dict)
    """Data set of steps 5 and 6 -> the one that takes its place, and its share; "" is Japanese text in step 5, nothing in step 6."""
    new_tokens: int | None = None
    """Of those of step 1, in the order in which they are learned; with 0 the base keeps its tokenizer."""
    step3: str = ""
    step5: str = ""
    step6: str = ""


SWITCHED = {
    "wikipedia_zh_switched": "wikipedia_zh",
    "wikitext_en_switched": "wikitext_en",
    "alpaca_zh_switched": "alpaca_zh",
    "hh_rlhf_ja_switched": "hh_rlhf_ja",
}
ALONGSIDE, PARALLEL = {"wikipedia_ja_alongside": "wikipedia_ja"}, {"parallel_ja_zh": "wikipedia_ja"}
CROSSLINGUAL = {"crosslingual": ""}
NO_BRIDGES = {**SWITCHED, **ALONGSIDE, **PARALLEL, **CROSSLINGUAL}
ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_up_proj,down_proj"
RECIPES = {
    "default": Recipe(),
    "no_bridges": Recipe(NO_BRIDGES, step3="--init mean"),
    "no_bridges_longer": Recipe(
        NO_BRIDGES, step3="--init mean", step5="--num_train_epochs 1.75", step6="--num_train_epochs 1.8"
    ),
    "no_switched": Recipe(SWITCHED),
    "no_alongside": Recipe(ALONGSIDE),
    "no_parallel": Recipe(PARALLEL),
    "no_crosslingual": Recipe(CROSSLINGUAL),
    "init_mean": Recipe(step3="--init mean"),
    "no_tokens": Recipe(new_tokens=0),
    "tokens_300": Recipe(new_tokens=300),
    "half": Recipe(step5="--num_train_epochs 0.5", step6="--num_train_epochs 0.5"),
    "double": Recipe(step5="--num_train_epochs 2", step6="--num_train_epochs 2"),
    "rank_8": Recipe(step5="--lora_rank 8", step6="--lora_rank 8"),
    "rank_128": Recipe(step5="--lora_rank 128", step6="--lora_rank 128"),
    "attention": Recipe(step5=f"--lora_target {ATTENTION}", step6=f"--lora_target {ATTENTION}"),
    "mlp": Recipe(step5=f"--lora_target {MLP}", step6=f"--lora_target {MLP}"),
    "embedding_lr_quarter": Recipe(step5="--embedding_learning_rate 5e-4", step6="--embedding_learning_rate 5e-4"),
    "embedding_lr_4": Recipe(step5="--embedding_learning_rate 8e-3", step6="--embedding_learning_rate 8e-3"),
    "sft_layers_faster": Recipe(step6="--learning_rate 1.15e-3 --embedding_learning_rate 5e-4"),
    "wsd": Recipe(step5=WSD, step6=WSD),
    "wsd_lr_half": Recipe(
        step5=f"{WSD} --learning_rate 1e-3 --embedding_learning_rate 1e-3",
        step6=f"{WSD} --learning_rate 3e-4 --embedding_learning_rate 1e-3",
    ),
    "new_rows": Recipe(step5="--train_new_tokens_only true", step6="--train_new_tokens_only true"),
}


def main() -> None:
    parser = make_parser(__doc__, "ladder.json", work_dir=...)
    parser.add_argument("--output-dir", type=Path, required=True, help="for the WORK_DIRs of the runs")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--section", default="recipes", help="of the results file (default: %(default)s)")
    options = parser.parse_args()
    use_work_dir(options.work_dir, "ZERO_DIR")
    runs: list[Values] = []
    for recipe in options.recipes:
        for seed in options.seeds:
            work = options.output_dir.resolve() / f"{recipe}-{seed}"
            runs.append({"recipe": recipe, "seed": seed, **run(options.work_dir.resolve(), work, recipe, seed)})
    runs = merge(read_results(options.output).get(options.section, {}).get("runs", []), runs)
    print_results("each run", {f"{one['recipe']}, seed {one['seed']}": one["accuracy"] for one in runs})
    print0(f"{table(runs)}\n\n{brief(runs)}")
    save_results(options.output, {"runs": runs}, options.section)


def merge(earlier: list[Values], runs: list[Values]) -> list[Values]:
    """Runs in the order of `RECIPES` and of their seeds, a new one instead of an earlier one of the same recipe and seed."""
    by_key = {(one["recipe"], one["seed"]): one for one in [*earlier, *runs]}
    order = list(RECIPES)
    return [by_key[key] for key in sorted(by_key, key=lambda key: (order.index(key[0]), key[1]))]


def run(base: Path, work: Path, name: str, seed: int) -> Values:
    """What the models of a recipe and a seed answer; they are trained unless that is on the disk.

    Raises:
        UserError: if a step fails.
    """
    finished = work / "ladder.json"
    if not finished.exists():
        if not work.exists():
            with atomic_directory(work, replace=True) as partial:
                for part in COPIED:
                    shutil.copytree(base / part, partial / part, ignore=LATER_METRICS)
        recipe, texts = RECIPES[name], work / "corpus"
        if recipe.new_tokens is not None:
            limit_tokens(work, recipe.new_tokens)
        if recipe.step3:
            run_step("step3_resize_model.py", work, texts, *recipe.step3.split(), OVERWRITE="1")
        for script, given in zip(
            ("step5_train_pt_single_gpu.py", "step6_train_sft_single_gpu.py"), arguments(recipe), strict=True
        ):
            run_step(script, work, texts, "--seed", str(seed), *given)
        atomic_write_json(finished, {model: measure(work, model) for model in (PRETRAINED, CHAT)})
    measured = read_results(finished)
    steps = [read_results(work / "metrics" / f"step{step}.json") for step in (5, 6)]
    return {
        "steps": [step["steps"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "accuracy": measured[CHAT]["accuracy"],
        "accuracy_pretrained": measured[PRETRAINED]["accuracy"],
        "ladder": measured[CHAT]["ladder"],
    }


def limit_tokens(work: Path, count: int) -> None:
    """Makes the Zero model with the first `count` tokens that step 1 learned; with none it is the base."""
    from constants import BASE_MODEL_DIR, PROFILE
    from llmtuner.tokenizer.chatglm3 import read_sentencepiece

    if not count:
        with atomic_directory(work / "step3_zero", replace=True) as zero:
            shutil.copytree(BASE_MODEL_DIR, zero, dirs_exist_ok=True)
        return
    candidates = read_sentencepiece(work / "step1_ja_tokenizer" / "ja_bpe.model")
    del candidates.pieces[len(candidates.pieces) - PROFILE.num_new_tokens + count :]
    (work / "fewer_tokens.model").write_bytes(candidates.SerializeToString())
    run_step(
        "step2_merge_tokenizer.py",
        work,
        work / "corpus",
        "--candidates",
        str(work / "fewer_tokens.model"),
        OVERWRITE="1",
    )
    run_step("step3_resize_model.py", work, work / "corpus", OVERWRITE="1")


def arguments(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Of step 5 and of step 6."""
    from constants import PROFILE

    mix: dict[str, float] = defaultdict(float)
    for name, share in PROFILE.pretraining_mix.items():
        mix[recipe.instead.get(name, name) or "wikipedia_ja"] += share
    sets = [recipe.instead.get(name, name) for name in PROFILE.instruction_sets]
    probabilities = ",".join(f"{share:.4f}" for share in mix.values())
    step5 = ["--dataset", ",".join(mix), "--interleave_probs", probabilities, *recipe.step5.split()]
    return step5, ["--dataset", ",".join(filter(None, sets)), *recipe.step6.split()]


def measure(work: Path, name: str) -> Values:
    """Shares of right answers by group of questions, and the ladder's."""
    from llmtuner.eval.generation import generate_answers
    from llmtuner.eval.ladder import climb, count_cells
    from llmtuner.eval.questions import accuracy, read_questions
    from llmtuner.model.loading import load_for_evaluation

    model, tokenizer = load_for_evaluation(work / name)
    questions = [one for one in read_questions(work / "corpus" / "questions.jsonl", QUESTIONS_PER_GROUP) if one.value]
    answers = generate_answers(model, tokenizer, [question.question for question in questions]).texts
    groups = dict.fromkeys(question.group for question in questions)
    rows = climb(
        read_questions(work / "corpus" / "ladder.jsonl"), lambda prompts: generate_answers(model, tokenizer, prompts)
    )
    return {
        "accuracy": {group: round(accuracy(questions, answers, group), 4) for group in groups},
        "ladder": {
            entities: {
                form: {key: cell[key] for key in ("n", "accuracy", "names_subject")} for form, cell in forms.items()
            }
            for entities, forms in count_cells(rows).items()
        },
    }


# ------------------------------------------------------------------------------------------------------------- tables
def tables(measured: Values, part: str) -> str:
    """A table of docs/evidence.md: "ladder" is that of the default recipe beside the one before, "recipes" all recipes in brief."""
    if part == "ladder":
        before = [{**one, "recipe": "before"} for one in measured["before"]["runs"]]
        return table(before + [one for one in measured["recipes"]["runs"] if one["recipe"] == "default"])
    return brief(measured[part]["runs"])


def by_recipe(runs: Sequence[Values]) -> dict[str, list[Values]]:
    found: dict[str, list[Values]] = {}
    for one in runs:
        found.setdefault(one["recipe"], []).append(one)
    return found


def table(runs: Sequence[Values]) -> str:
    """A Markdown table: of each recipe the shares of right answers on each rung, and of those that name their subject."""
    recipes = by_recipe(runs)
    lines = []
    for group, title in ENTITIES.items():
        for form, words in FORMS.items():
            cells = [
                share([one["ladder"][group][form][key] for one in found if form in one["ladder"].get(group, {})])
                for found in recipes.values()
                for key in ("accuracy", "names_subject")
            ]
            lines.append([f"{title}: {words}", *cells])
    for key, title in (("accuracy", "chat model"), ("accuracy_pretrained", "pretrained model")):
        for group in runs[0][key]:
            cells = [cell for found in recipes.values() for cell in (share([one[key][group] for one in found]), "")]
            lines.append([f"{title}, questions {group}", *cells])
    titles = [f"`{name}`: {what}" for name in recipes for what in ("right", "names it")]
    return markdown_table(["", *titles], lines)


def brief(runs: Sequence[Values]) -> str:
    """A Markdown table with a line per recipe: right answers of the chat model by group, and on the ladder's rungs."""
    lines = []
    for name, found in by_recipe(runs).items():
        answers = [share([one["accuracy"][group] for one in found]) for group in LANGUAGES]
        rungs = [
            share([pooled(one["ladder"], groups, form) for one in found])
            for groups in GROUPS.values()
            for form in ("ja_ja", "ja_zh", "zh_ja", PIVOT)
        ]
        lines.append(
            [f"`{name}`", f"{len(found)}", f"{fmean(sum(one['tokens']) for one in found) / 1e6:.1f}", *answers, *rungs]
        )
    rungs = [f"{group}: {words}" for group in GROUPS for words in ("both ja", "name zh", "question zh", "pivot")]
    return markdown_table(["recipe", "seeds", "million tokens", *LANGUAGES, *rungs], lines)


def pooled(ladder: Values, groups: Sequence[str], form: str) -> float:
    """The share of right answers in one form over several kinds of entities."""
    cells = [ladder[group][form] for group in groups if form in ladder.get(group, {})]
    return sum(cell["n"] * cell["accuracy"] for cell in cells) / sum(cell["n"] for cell in cells)


def share(values: Sequence[float]) -> str:
    """A mean in percent, with its interval over seeds."""
    if not values:
        return ""
    found = interval(values)
    limits = f" ({max(0, 100 * found[1]):.0f} to {min(100, 100 * found[2]):.0f})" if found else ""
    return f"{100 * fmean(values):.0f}{limits}"


if __name__ == "__main__":
    run_cli(main)
