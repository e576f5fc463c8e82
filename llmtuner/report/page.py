"""report.html: everything a run measured, on one self-contained page."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llmtuner.aliases import describe_old_names, locate, rename_keys, rename_settings
from llmtuner.console import UserError, print0
from llmtuner.eval.intervals import wilson_interval
from llmtuner.eval.ladder import NOTE, ladder_rows
from llmtuner.eval.language import HAN, KANA, Languages, languages_of, with_article
from llmtuner.eval.questions import Question, is_correct
from llmtuner.eval.repetition import find_loops
from llmtuner.eval.scores import is_no_better_than_chance, paired_rows, score_rows
from llmtuner.files import atomic_write_text
from llmtuner.report.checks import UNKNOWN, get_nested, percent, run_checks
from llmtuner.report.figures import STEPS as FIGURE_STEPS
from llmtuner.report.figures import build_figures, read_log
from llmtuner.report.record import MEASURES, cost_of, describe_training, duration, wall_seconds
from llmtuner.report.steps import Step

RUNS = {
    "step5": "step5_pt_adapter",
    "step6": "step6_sft_adapter",
}  # step -> directory of its log and training arguments
# The soft hyphen is for narrow columns on a phone.
MODELS = {"base": "Base", "zero": "Zero", "pretrained": "Pre\u00adtrained", "chat": "Chat"}
QUESTIONS_PER_GROUP = 3
MAX_FRAMES = 12  # samples of one prompt
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
VISIBLE = str.maketrans({" ": "␣", "\u3000": "␣", "\n": "↵", "\t": "⇥"})


def write_report(
    work_dir: Path, steps: list[Step], facts: dict[str, dict[str, str]], warnings: Sequence[str] = ()
) -> Path:
    """Writes `work_dir`/report.html from the metrics, logs and answers in `work_dir`.

    Args:
        steps: all steps of the pipeline in order, finished or not.
        facts: sections of further facts to list; `PROFILE` of the section "profile" is shown at the top.
        warnings: shown before anything else.

    Raises:
        UserError: if no step has finished, an input file is damaged, or the page cannot be written.
    """
    metrics = {path.stem: rename_keys(read_json(path)) for path in sorted((work_dir / "metrics").glob("*.json"))}
    if not any(step.name in metrics for step in steps):
        raise UserError(f"no step has finished in {work_dir}: there is nothing to report. Run {steps[0].script} first.")
    runs = {step: work_dir / name for step, name in RUNS.items()}
    for old_names in filter(None, map(describe_old_names, runs.values())):
        print0(old_names)
    # A run in progress is shown up to its last log line; its training arguments are written at the end.
    logs = {step: read_log(log) for step, run in runs.items() if (log := locate(run, "trainer_log.jsonl")).is_file()}
    settings = {
        step: rename_settings(read_json(file))[0]
        for step, run in runs.items()
        if step in metrics and (file := locate(run, "training_args.json")).is_file()
    }
    rows = read_lines(work_dir / "answers.jsonl") if "step7" in metrics else []
    grades = grade_answers(rows)
    records = {
        FIGURE_STEPS[step]: record
        for step in RUNS
        if (record := describe_training(metrics.get(step, {}), logs.get(step, []), settings.get(step, {})))
    }
    languages = languages_of(metrics)
    page = template("page.html").render(
        checks=run_checks(metrics, logs, grades, settings),
        counts={
            group: {model: _count(graded) for model, graded in by_model.items()} for group, by_model in grades.items()
        },
        records=records,
        record_names=[name for name in MEASURES if any(name in record for record in records.values())],
        took=_total(metrics),
        samples=_samples(metrics, runs),
        pipeline=_pipeline(steps, metrics),
        figures=build_figures(metrics, logs),
        answers=_answers(rows),
        ladder=ladder_rows(get_nested(metrics, "step7", "ladder") or {}),
        ladder_models=[MODELS[model] for model in get_nested(metrics, "step7", "ladder") or {}],
        ladder_note=NOTE,
        suites=_suites(metrics),
        settings=settings,
        facts=facts,
        warnings=warnings,
        made=datetime.now().astimezone(),
        languages=languages,
        base_languages="A" + with_article("-".join(languages[code] for code in languages.retained))[1:],
        rows_of=functools.partial(_rows, languages),
        at=lambda *path: get_nested(metrics, *path),
        of_models=lambda *path: [get_nested(metrics, "step7", path[0], model, *path[1:]) for model in MODELS],
    )
    destination = work_dir / "report.html"
    atomic_write_text(destination, page, errors="replace")
    return destination


@functools.cache
def template(name: str) -> Any:
    """A page of this folder, ready to be rendered."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"MODELS": MODELS}
    filters: dict[str, Callable[..., str | bool]] = {
        "percent": percent,
        "count": lambda number: UNKNOWN if number is None else f"{number:,}",
        "decimals": _decimals,
        "score": lambda score: f"{score:.3f}" if isinstance(score, float) else str(score),
        "value": _value,
        "number": lambda step: step.removeprefix("step"),
        "is_byte": lambda token: BYTE_TOKEN.fullmatch(token) is not None,
        "visible": lambda token: token.translate(VISIBLE),
        "language": _language,
        "duration": duration,
    }
    templates.filters |= filters
    return templates.get_template(name)


def _decimals(number: float | None, places: int = 3) -> str:
    return UNKNOWN if number is None else f"{number:,.{places}f}"


def _value(value: Any) -> str:
    """A setting as text: strings as they are, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _language(text: str) -> str:
    """The language whose glyphs a text is set in: Chinese and Japanese draw shared characters differently."""
    return "ja" if KANA.search(text) else "zh" if HAN.search(text) else "en"


def _rows(
    languages: Languages, kind: str, metric: str, groups: Iterable[str]
) -> list[tuple[str, str, tuple[str, str]]]:
    """Rows of the table of models: one metric of several groups of questions or texts."""
    extra = {languages.unseen: "unseen", languages.free_form: "free-form replies"}
    return [(languages.get(group) or f"{languages.name}, {extra[group]}", kind, (metric, group)) for group in groups]


def _pipeline(steps: list[Step], metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps in order, each with its state, external inputs, and the steps that use its output.

    A step is "aside" if no other step uses its output: the line of the drawing passes it by.
    """
    outputs = {step.output for step in steps}
    next_step = next((step for step in steps if step.name not in metrics), None)

    def state(step: Step) -> str:
        if step.name in metrics:
            return "cut" if metrics[step.name].get("cut_short") else "done"
        return "next" if step is next_step else "open"

    return [
        {
            "step": step,
            "state": state(step),
            "outside": [name for name in step.inputs if name not in outputs],
            "users": [other for other in steps if step.output in other.inputs],
            "aside": step is not steps[-1] and not any(step.output in other.inputs for other in steps),
        }
        for step in steps
    ]


def grade_answers(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[bool]]]:
    """Of each group with known answers and each model, whether each question was answered correctly.

    Args:
        rows: of answers.jsonl.
    """
    grades: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        for model in MODELS:
            if (grade := grade_answer(row, model)) is not None:
                grades.setdefault(row["group"], {}).setdefault(model, []).append(grade)
    return grades


def grade_answer(row: dict[str, Any], model: str) -> bool | None:
    """Whether a model's answer is correct, as it was counted; None if nobody knows."""
    if row.get("right") is None or row.get(model) is None:
        return None
    grades = row.get("correct") or {}  # not in runs of earlier versions
    return grades[model] if model in grades else is_correct(_question_of(row), row[model])


def _question_of(row: dict[str, Any]) -> Question:
    language = row.get("language") or row["group"][:2]
    return Question(row["group"], language, row["question"], row.get("right"), tuple(row.get("wrong_values") or ()))


def _count(graded: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(graded), len(graded))
    return {"correct": sum(graded), "total": len(graded), "low": low, "high": high}


def _answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few questions of each group with every model's answer.

    First those that the chat model answers wrong, then those on which it runs into a loop, then those on which the models
    differ most.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)

    def interest(row: dict[str, Any]) -> tuple[bool, bool, int]:
        is_wrong = grade_answer(row, "chat") is False
        return is_wrong, bool(find_loops(row.get("chat") or "")), len({row.get(model) for model in MODELS})

    return [
        {
            "group": group,
            "total": len(members),
            "wrong": sum(grade is False for grade in grades) if {*grades} != {None} else None,
            "questions": [_question(row) for row in sorted(members, key=interest, reverse=True)[:QUESTIONS_PER_GROUP]],
        }
        for group, members in groups.items()
        for grades in [[grade_answer(row, "chat") for row in members]]
    ]


def _question(row: dict[str, Any]) -> dict[str, Any]:
    answers = [
        {"model": model, "text": row[model], "parts": _parts(row[model]), "correct": grade_answer(row, model)}
        for model in MODELS
        if row.get(model) is not None
    ]
    return {"question": _question_of(row), "answers": answers}


def _total(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Wall time and cost of all training; a sum of which a part is unknown is None."""
    runs = [metrics[step] for step in RUNS if step in metrics]
    seconds, costs = [wall_seconds(run) for run in runs], [cost_of(run) for run in runs]
    return {
        name: None if None in values else sum(value or 0 for value in values)
        for name, values in (("seconds", seconds), ("cost", costs))
    }


def _samples(metrics: dict[str, Any], runs: dict[str, Path]) -> list[dict[str, Any]]:
    """For each prompt that was answered during training its answers over steps, `MAX_FRAMES` at most, evenly spaced.

    Args:
        runs: {"step5", "step6": its directory}; a run that has not finished has its samples there only.
    """
    strips: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for step, run in runs.items():
        samples = get_nested(metrics, step, "samples")
        if step not in metrics and (file := run / "samples.jsonl").is_file():
            samples = read_log(file)
        for sample in samples or []:
            frame = {"step": sample["step"], "answer": sample["answer"], "parts": _parts(sample["answer"])}
            strips.setdefault((FIGURE_STEPS[step], sample["prompt"]), []).append(frame)
    return [
        {"title": title, "prompt": prompt, "frames": [frames[index] for index in _evenly(len(frames), MAX_FRAMES)]}
        for (title, prompt), frames in strips.items()
    ]


def _evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `count`, the first and the last among them."""
    return (
        list(range(count)) if count <= limit else [round(place * (count - 1) / (limit - 1)) for place in range(limit)]
    )


def _parts(text: str) -> list[tuple[str, bool]]:
    """A text split into (part, whether it is a loop)."""
    parts, end = [], 0
    for start, stop in find_loops(text):
        parts += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    return [(part, loop) for part, loop in [*parts, (text[end:], False)] if part]


def _suites(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of each standard suite that was run, one row per task and metric, with what is lost of the base's."""
    suites = []
    for name, suite in sorted(metrics.items()):
        if name.startswith("suite_"):
            base = metrics.get(f"suite_{suite.get('suite')}_base", {})
            lost = {(row["task"], row["metric"]): row for row in paired_rows(base, suite) if base is not suite}
            suites.append(
                {
                    "suite": suite.get("suite", ""),
                    "model": Path(suite.get("model", "")).name,
                    "limit": suite.get("limit"),
                    "harness": suite.get("harness"),
                    "rows": [
                        {
                            **row,
                            "no_better_than_chance": is_no_better_than_chance(row),
                            "lost": lost.get((row["task"], row["metric"])),
                        }
                        for row in score_rows(suite.get("tasks", {}))
                    ],
                }
            )
    return suites


def read_json(path: Path) -> dict[str, Any]:
    return _parse(path, json.loads)


def read_lines(path: Path) -> list[dict[str, Any]]:
    # not splitlines: an answer may contain U+2028
    return _parse(path, lambda text: [json.loads(line) for line in text.split("\n") if line]) if path.is_file() else []


def _parse(path: Path, parser: Callable[[str], Any]) -> Any:
    try:
        return parser(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}). Run the step that writes it again.") from error
