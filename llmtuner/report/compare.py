"""compare.html: several runs over one another, the settings in which they differ, and their results with intervals."""

import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy

from llmtuner.aliases import locate, rename_keys, rename_settings
from llmtuner.console import UserError
from llmtuner.eval.intervals import paired_difference, seed_difference, unpaired_difference
from llmtuner.eval.language import Languages, languages_of
from llmtuner.files import atomic_write_text
from llmtuner.report.checks import get_nested, percent
from llmtuner.report.figures import (
    PALETTE,
    STEPS,
    Curve,
    Log,
    ReportFigure,
    Summary,
    draw_svg,
    overlay,
    read_log,
    series_of,
)
from llmtuner.report.page import RUNS, grade_answer, read_json, read_lines, template
from llmtuner.report.record import MEASURES, describe_training

STAGE_STEPS = {"pt": "step5", "sft": "step6"}
# What does not make two runs different recipes: chance, where they stand, and what is written about them.
SEEDS = ("seed", "data_seed")
PLACES = re.compile(
    r"(output|cache|corpus|dataset|logging)_dir|(model|adapter)_name_or_path|run_name|local_rank|hub_.*|overwrite_\w+|"
    "resume_from_checkpoint|log_.*|logging_.*|report_to|project|plot_loss|price_per_hour|save_(steps|minutes|total_limit)|"
    "eval_(steps|strategy|delay|on_start)|sample_.*|dry_run"
)
# Losses on held-out text compare only where these are equal.
EVAL_SETTINGS = re.compile(
    "(eval_)?dataset|val_size|max_eval_samples|cutoff_len|template|(neat_)?packing|train_on_prompt|mask_history|data set .*"
)
CURVES: dict[str, tuple[str, str, Summary]] = {  # of the log: title, name of the axis, what is said of it
    "loss": ("training loss", "loss, nats per token", "end"),
    "eval_loss": ("held-out loss", "loss, nats per token", "end"),
    "eval_bits_per_byte": ("{name} bits per byte", "bits per byte", "end"),  # of each language
    "grad_norm": ("gradient norm", "gradient norm", "median"),
    "learning_rate": ("learning rate", "learning rate", "highest"),
    "tokens_per_second": ("throughput", "tokens per second", "median"),
    "mfu": ("model FLOPs utilization (MFU)", "MFU", "median"),
}
NUM_QUESTIONS = 8  # shown, those on which the recipes differ most


@dataclass(frozen=True)
class Training:
    """A training run within a run of the steps, or one by itself."""

    log: Log
    settings: dict[str, Any]
    """Empty if the run has not saved any yet."""
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What one directory holds."""

    name: str
    directory: Path
    trainings: dict[str, Training]
    """{"step5", "step6": training}"""
    step7: dict[str, Any]
    answers: dict[tuple[str, str, int], dict[str, Any]]
    """Rows of answers.jsonl by group, question, and how often the same question came before."""
    languages: Languages


@dataclass(frozen=True)
class Recipe:
    """Runs with the same settings except for their seeds."""

    name: str
    color: str
    style: str
    runs: list[Run]


@dataclass(frozen=True)
class Cell:
    """A measured value in the table of results, and its difference to the first recipe's."""

    value: str
    spread: str = ""
    """Lowest and highest over seeds."""
    difference: str = ""
    verdict: str = ""
    """"better" or "worse" if the interval leaves out 0."""


def write_comparison(directories: Sequence[Path], output: Path) -> Path:
    """Writes one page that compares runs.

    Args:
        directories: each the WORK_DIR of the steps, or the output_dir of a training run. The first one's recipe is what the
            others are held against.

    Raises:
        UserError: if there are fewer than two runs, one cannot be read, or they have nothing in common.
    """
    if len(directories) < 2:
        raise UserError("a comparison needs two directories or more: python -m llmtuner compare DIR DIR ...")
    resolved = [directory.resolve() for directory in directories]
    for place, directory in enumerate(resolved):
        if directory in resolved[:place]:
            raise UserError(f"{directories[place]} is given twice. Name each run once.")
    runs = [read_run(*pair) for pair in zip(directories, _short_names(resolved), strict=True)]
    recipes = group_by_recipe(runs)
    steps = [step for step in RUNS if sum(step in run.trainings for run in runs) > 1]
    if not steps and sum(bool(run.step7) for run in runs) < 2:
        kinds = "; ".join(
            f"{run.directory}: {', '.join(STEPS[step].lower() for step in run.trainings) or 'evaluation'}"
            for run in runs
        )
        raise UserError(f"these runs have nothing in common ({kinds}). Compare runs of the same stage.")
    equal = [step for step in steps if _is_same(runs, step) and not differing_settings(recipes, step)]
    steps = [step for step in steps if step not in equal]
    settings = {step: differing_settings(recipes, step) for step in steps}
    page = template("compare.html").render(
        recipes=recipes,
        equal=[STEPS[step] for step in equal],
        figures=[figure for step in steps for figure in _figures(recipes, step)],
        settings={STEPS[step]: rows for step, rows in settings.items() if rows},
        notes=[note for step in steps if (note := _note_on_losses(step, settings[step]))],
        results=[
            *((STEPS[step], _training_results(recipes, step)) for step in steps),
            *_evaluation_results(recipes),
        ],
        records={STEPS[step]: _records(recipes, step) for step in steps},
        questions=_questions(recipes),
        made=datetime.now().astimezone(),
    )
    atomic_write_text(output, page, errors="replace")
    return output


# --------------------------------------------------------------------------------------------------------------- reading
def read_run(directory: Path, name: str) -> Run:
    """Reads what a directory holds.

    Raises:
        UserError: if it is no run, or a file in it is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist. Name the WORK_DIR of the steps, or the output_dir of a run.")
    metrics = {path.stem: rename_keys(read_json(path)) for path in (directory / "metrics").glob("step[567].json")}
    trainings = {
        step: Training(read_log(log), _read_settings(directory / inside), metrics.get(step, {}))
        for step, inside in RUNS.items()
        if (log := locate(directory / inside, "trainer_log.jsonl")).is_file()
    }
    if (log := locate(directory, "trainer_log.jsonl")).is_file():
        settings = _read_settings(directory)
        if not settings:
            raise UserError(f"{directory} has no training_args.json yet. Compare it once it has saved a checkpoint.")
        trainings[STAGE_STEPS.get(settings.get("stage", ""), "step6")] = Training(read_log(log), settings)
    if not trainings and "step7" not in metrics:
        raise UserError(
            f"{directory} holds no run: no trainer_log.jsonl, and no training or evaluation of the steps. Name the WORK_DIR "
            "of the steps, or the output_dir of a run."
        )
    rows = read_lines(directory / "answers.jsonl") if "step7" in metrics else []
    answers: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in rows:
        before = 0
        while (key := (row["group"], row["question"], before)) in answers:
            before += 1
        answers[key] = row
    return Run(name, directory, trainings, metrics.get("step7", {}), answers, languages_of(metrics))


def _read_settings(run: Path) -> dict[str, Any]:
    """A run's training_args.json, before its end that of its newest checkpoint; empty if there is none."""
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for directory in (run, *checkpoints):
        if (file := locate(directory, "training_args.json")).is_file():
            return rename_settings(read_json(file))[0]
    return {}


def _short_names(directories: Sequence[Path]) -> list[str]:
    """Names of directories where these are all different, else their paths below what they share."""
    names = [directory.name for directory in directories]
    if len({*names}) == len(names):
        return names
    common = os.path.commonpath(directories)
    return [os.path.relpath(directory, common) for directory in directories]


# --------------------------------------------------------------------------------------------------------------- recipes
def group_by_recipe(runs: Sequence[Run]) -> list[Recipe]:
    """Runs by their settings, without seeds and places, in the order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_recipe_key(run), []).append(run)
    names = [_common_name([run.name for run in group]) for group in groups.values()]
    names = [
        name if names.count(name) == 1 else group[0].name for name, group in zip(names, groups.values(), strict=True)
    ]
    styles = ("-", "--", "-.", ":")
    return [
        Recipe(name, PALETTE[place % len(PALETTE)], styles[place % 4], group)
        for place, (name, group) in enumerate(zip(names, groups.values(), strict=True))
    ]


def _languages(recipes: Sequence[Recipe]) -> Languages:
    """Those of all runs, the first run's first."""
    return Languages(pair for recipe in recipes for run in recipe.runs for pair in run.languages.items())


def _groups(languages: Languages) -> dict[str, str]:
    """Names of the groups of short questions."""
    return {**languages, languages.unseen: f"{languages.name}, unseen"}


def _recipe_key(run: Run) -> str:
    if not all(training.settings for training in run.trainings.values()) or not run.trainings:
        return str(run.directory)  # nobody knows
    return json.dumps(
        {step: _own_settings(run, step) for step in run.trainings}, sort_keys=True, ensure_ascii=False, default=str
    )


def _own_settings(run: Run, step: str) -> dict[str, Any]:
    """The settings that make a recipe. The model is no setting where it is the result of a training shown as well."""
    is_result = step == "step6" and "step5" in run.trainings
    return {
        name: value
        for name, value in run.trainings[step].settings.items()
        if name not in SEEDS and not PLACES.fullmatch(name) and not (is_result and name == "model checksum")
    }


def _common_name(names: Sequence[str]) -> str:
    """lora-1-42 and lora-1-43 -> lora-1: what the names have in common."""
    if len(names) == 1:
        return names[0]
    split = [re.findall(r"[-_./ ]*[^-_./ ]+", name) for name in names]  # parts with the marks before them
    if len({len(parts) for parts in split}) == 1:
        common = [parts[0] for parts in zip(*split, strict=True) if len({*parts}) == 1]
    else:
        common = [
            parts[0] for parts in itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*split, strict=False))
        ]
    if common and common[-1].strip("-_./ ") == "seed":
        common.pop()
    return "".join(common).strip("-_./ ") or names[0]


def _is_same(runs: Sequence[Run], step: str) -> bool:
    """Whether all runs share one training, as copies of a WORK_DIR do."""
    logs = [run.trainings[step].log if step in run.trainings else None for run in runs]
    return all(log == logs[0] for log in logs)


def differing_settings(recipes: Sequence[Recipe], step: str) -> dict[str, list[str]]:
    """{setting: its value in each recipe} where these are not the same; several values of one recipe with commas."""
    with_stage = [[run for run in recipe.runs if step in run.trainings] for recipe in recipes]
    names = dict.fromkeys(name for runs in with_stage for run in runs for name in (*_own_settings(run, step), *SEEDS))
    table = {}
    for name in names:
        shown = []
        for runs in with_stage:
            values = [run.trainings[step].settings.get(name) for run in runs]
            shown.append(", ".join(dict.fromkeys("–" if value is None else _text(value) for value in values)) or "–")
        present = [cell for cell, runs in zip(shown, with_stage, strict=True) if runs]
        if len({*present}) > 1 or (name in SEEDS and any(", " in cell for cell in present)):
            table[name] = shown
    return table


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _note_on_losses(step: str, differing: dict[str, list[str]]) -> str:
    names = [name for name in differing if EVAL_SETTINGS.fullmatch(name)]
    if not names:
        return ""
    return (
        f"{STEPS[step]}: held-out losses may not compare, since the runs differ in {', '.join(names)}. Bits per byte of the "
        "same held-out texts do."
    )


# --------------------------------------------------------------------------------------------------------------- figures
def _figures(recipes: Sequence[Recipe], step: str) -> list[ReportFigure]:
    """The curves of all recipes over one another."""
    figures = []
    curves_by_key = {
        key + suffix: (title.format(name=name), unit, summary)
        for key, (title, unit, summary) in CURVES.items()
        for suffix, name in (
            ((f"_{code}", name) for code, name in _languages(recipes).items()) if "{name}" in title else [("", "")]
        )
    }
    for key, (title, unit, summary) in curves_by_key.items():
        curves = []
        for recipe in recipes:
            logs = [run.trainings[step].log for run in recipe.runs if step in run.trainings]
            found = [series for log in logs if (series := series_of(log, key, smooth=key == "loss")) is not None]
            if found:
                curves.append(Curve(recipe.name, recipe.color, recipe.style, found))
        every = [series for curve in curves for series in curve.series]
        if len(every) > 1 and not all(numpy.array_equal(series, every[0]) for series in every):
            figure, name = overlay(curves, unit, summary), f"{step}_{key}"
            heading, finding = f"{STEPS[step]}: {title}", str(figure.get_label())
            alt = f"{heading}. {finding}."
            caption = "Running mean over a twentieth of the run." if key == "loss" else ""
            if any(len(curve.series) > 1 for curve in curves):
                caption += " Line: mean over runs; band: their range."
            figures.append(ReportFigure(name, heading, finding, caption.strip(), alt, draw_svg(figure, name, alt)))
    return figures


# --------------------------------------------------------------------------------------------------------------- results
def _row(
    values: Sequence[Sequence[float]],
    show: Callable[[float], str],
    lower_is_better: bool,
    difference: Callable[[int], tuple[float, float, float] | None] | None = None,
    in_points: bool = False,
) -> list[Cell]:
    """One line of the table: each recipe's mean over its runs, and the difference to the first recipe that has any.

    Args:
        values: of each recipe, one per run.
        difference: of recipe `place` to the first, with its interval; by default the interval over runs.
        in_points: writes differences as percentage points.
    """

    def signed(value: float) -> str:
        return (f"{100 * value:+.1f}" if in_points else f"{value:+.4f}").replace("-", "−")

    unit = " points" if in_points else ""
    reference = next((place for place, own in enumerate(values) if own), 0)
    cells = []
    for place, own in enumerate(values):
        if not own:
            cells.append(Cell("–"))
            continue
        mean, spread = fmean(own), f"{show(min(own))} to {show(max(own))}" if len(own) > 1 else ""
        if place == reference:
            cells.append(Cell(show(mean), spread))
            continue
        found = difference(place) if difference else seed_difference(values[reference], own)
        if found is None:
            cells.append(Cell(show(mean), spread, signed(mean - fmean(values[reference])) + unit))
            continue
        change, low, high = found
        verdict = "" if low <= 0 <= high else "better" if (high < 0) == lower_is_better else "worse"
        cells.append(Cell(show(mean), spread, f"{signed(change)}{unit} ({signed(low)} to {signed(high)})", verdict))
    return cells


def _training_results(recipes: Sequence[Recipe], step: str) -> dict[str, list[Cell]]:
    """Held-out loss and bits per byte at the end of training, and the lowest loss on the way."""

    def collect(measure: Callable[[Training], float | None]) -> list[list[float]]:
        trainings = [[run.trainings[step] for run in recipe.runs if step in run.trainings] for recipe in recipes]
        return [[value for training in own if (value := measure(training)) is not None] for own in trainings]

    def last(key: str) -> Callable[[Training], float | None]:
        return lambda training: None if (line := series_of(training.log, key)) is None else float(line[1][-1])

    def lowest(training: Training) -> float | None:
        return None if (line := series_of(training.log, "eval_loss")) is None else float(line[1].min())

    def rise(training: Training) -> float | None:
        line = series_of(training.log, "eval_loss")
        return None if line is None else float(line[1][-1] / line[1].min() - 1)

    measures: dict[str, tuple[Callable[[Training], float | None], Callable[[float], str]]] = {
        "Training loss, end": (
            lambda training: (
                None if (line := series_of(training.log, "loss", smooth=True)) is None else float(line[1][-1])
            ),
            _four_digits,
        ),
        "Held-out loss, end": (last("eval_loss"), _four_digits),
        "Held-out loss, lowest": (lowest, _four_digits),
        "Rise over the lowest": (rise, lambda value: f"{value:.2%}"),
        **{
            f"{name} bits per byte, end": (last(f"eval_bits_per_byte_{code}"), _four_digits)
            for code, name in _languages(recipes).items()
        },
    }
    table = {name: (collect(measure), show) for name, (measure, show) in measures.items()}
    return {
        name: _row(values, show, lower_is_better=True, in_points=show is not _four_digits)
        for name, (values, show) in table.items()
        if any(values)
    }


def _evaluation_results(recipes: Sequence[Recipe]) -> list[tuple[str, dict[str, list[Cell]]]]:
    """What step 7 measured of the chat models: accuracy paired by question, bits per byte, repetition."""

    def collect(*path: str) -> list[list[float]]:
        found = [[get_nested(run.step7, *path) for run in recipe.runs] for recipe in recipes]
        return [[value for value in own if isinstance(value, int | float)] for own in found]

    def interval_of_bits(code: str, values: list[list[float]]) -> Callable[[int], tuple[float, float, float] | None]:
        def difference(place: int) -> tuple[float, float, float] | None:
            reference = next(index for index, own in enumerate(values) if own)
            if len(values[reference]) > 1 and len(values[place]) > 1:
                return seed_difference(values[reference], values[place])
            path = ("bits_per_byte_interval", "chat", code)
            bounds = [get_nested(recipes[index].runs[0].step7, *path) for index in (reference, place)]
            if None in bounds:
                return None
            half = sum(((high - low) / 2) ** 2 for low, high in bounds) ** 0.5
            change = fmean(values[place]) - fmean(values[reference])
            return change, change - half, change + half

        return difference

    languages = _languages(recipes)
    accuracy = {}
    for group, name in _groups(languages).items():
        values = collect("accuracy", "chat", group)
        if any(values):
            row, note = _accuracy_row(recipes, group, values)
            accuracy[f"{name}{note}"] = row
    bits = {name: (code, collect("bits_per_byte", "chat", code)) for code, name in languages.items()}
    replies = {
        f"{languages.name} answers in {languages.name}": (
            ("language_confusion", "chat", languages.added, "response_pass_rate"),
            percent,
            False,
        ),
        "Repeated 4-grams, free-form replies": (("free_answers", "chat", "repeated_4gram_ratio"), percent, True),
        "Finished free-form replies": (("free_answers", "chat", "finished_ratio"), percent, False),
    }
    tables = [
        ("Chat model: questions answered correctly", accuracy),
        (
            "Chat model: bits per byte of held-out text",
            {
                name: _row(values, _four_digits, True, interval_of_bits(code, values))
                for name, (code, values) in bits.items()
                if any(values)
            },
        ),
        (
            "Chat model: replies",
            {
                name: _row(values, show, lower, in_points=True)
                for name, (path, show, lower) in replies.items()
                if any(values := collect(*path))
            },
        ),
    ]
    return [(title, rows) for title, rows in tables if rows]


def _accuracy_row(recipes: Sequence[Recipe], group: str, values: list[list[float]]) -> tuple[list[Cell], str]:
    """Accuracy of a group, its differences paired by question where the same were asked; and the number of questions."""
    graded = [_mean_grades(recipe, group) for recipe in recipes]
    reference = next(place for place, own in enumerate(values) if own)

    def difference(place: int) -> tuple[float, float, float] | None:
        before, after = graded[reference], graded[place]
        if not before or not after:
            return None
        if shared := [key for key in before if key in after]:
            return paired_difference([before[key] for key in shared], [after[key] for key in shared])
        return unpaired_difference([*before.values()], [*after.values()])

    compared = [own for own in graded if own]
    shared = set(compared[0]).intersection(*compared[1:]) if compared else set()
    if len(compared) > 1 and not shared:
        note = ", each run its own questions"
    else:
        note = f", {len(shared):,} questions" if shared else ""
    return _row(values, percent, False, difference, in_points=True), note


def _mean_grades(recipe: Recipe, group: str) -> dict[tuple[str, str, int], float]:
    """Of each question that all runs of a recipe were asked, the share of them that answered correctly."""
    runs = [run for run in recipe.runs if run.answers]
    grades = {
        key: [grade_answer(run.answers[key], "chat") for run in runs if key in run.answers]
        for run in runs[:1]
        for key in run.answers
        if key[0] == group
    }
    return {
        key: fmean(bool(grade) for grade in found)
        for key, found in grades.items()
        if len(found) == len(runs) and None not in found
    }


def _four_digits(value: float) -> str:
    return f"{value:.4f}"


def _records(recipes: Sequence[Recipe], step: str) -> dict[str, list[str]]:
    """{wall time, cost, ...: that of each recipe}; what differs between its runs is listed."""
    table: dict[str, list[str]] = {}
    for place, recipe in enumerate(recipes):
        for run in recipe.runs:
            if training := run.trainings.get(step):
                for name, text in describe_training(training.metrics, training.log, training.settings).items():
                    row = table.setdefault(name, [""] * len(recipes))
                    if text not in row[place].split("; "):
                        row[place] += "; " * bool(row[place]) + text
    return {name: table[name] for name in MEASURES if name in table}


def _questions(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """The questions on which the recipes differ most, each with an answer of every recipe."""
    groups = _groups(_languages(recipes))
    graded = [{key: grade for group in groups for key, grade in _mean_grades(one, group).items()} for one in recipes]
    spread = {
        key: max(shares) - min(shares)
        for key in graded[0]
        if all(key in own for own in graded)
        for shares in [[own[key] for own in graded]]
    }
    widest = sorted((key for key in spread if spread[key]), key=lambda key: -spread[key])[:NUM_QUESTIONS]

    def answer(recipe: Recipe, share: float, key: tuple[str, str, int]) -> dict[str, Any]:
        runs = [run for run in recipe.runs if run.answers]
        text = runs[0].answers[key]["chat"]
        return {"recipe": recipe, "text": text, "correct": round(share * len(runs)), "total": len(runs)}

    return [
        {
            "question": key[1],
            "language": key[0][:2],
            "value": next(run.answers[key]["right"] for run in recipes[0].runs if run.answers),
            "answers": [answer(recipe, own[key], key) for recipe, own in zip(recipes, graded, strict=True)],
        }
        for key in widest
    ]
