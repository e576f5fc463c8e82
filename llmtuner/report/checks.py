"""The project's promises as checks: each with the figure that shows whether a run kept it, and how far it may be off.

What a step refuses to go on from, such as rows of the base that came back changed, is no check here: no finished run shows it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmtuner.eval.intervals import paired_difference
from llmtuner.eval.language import languages_of

MAX_LOGIT_DIFFERENCE = 1e-6  # rounding in fp32
MAX_TOKEN_RATIO = (
    0.8  # of text in the added language; a merge of Japanese into ChatGLM3-6B's vocabulary gives 0.50 to 0.66
)
MAX_PADDING_RATIO = 0.05  # packing should do better
UNKNOWN = "–"
MIX_TOLERANCE = 0.01  # one percentage point: a data set ends with a complete document
MAX_RETENTION_LOSS = 0.02  # by which bits per byte of a retained language may grow in step 5
MAX_EVAL_LOSS_RISE = 0.02  # at the end, over the lowest value: more is overfitting
MAX_ACCURACY_DROP = 0.05  # in a retained language
MIN_PASS_RATE = 0.95  # questions in the added language answered without a line in another language
MAX_REPETITION = 0.2  # of 4-grams in free-form replies; those in the miniature's training sets have 0.08 to 0.09
MIN_FINISHED = 0.9  # free-form replies that come to an end

Grades = Mapping[str, Mapping[str, list[bool]]]
"""{group: {model: of each question, whether the answer is correct}}"""


@dataclass(frozen=True)
class Check:
    """A promise and whether a run kept it."""

    step: str
    """The step that measured it: "step1" to "step7"."""
    text: str
    figure: str
    """The measured value, in a few words."""
    limit: str
    """What the value is held against: "at most 5%"."""
    passed: bool


def get_nested(metrics: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of keys, or None if an unfinished or older run does not have it."""
    value: Any = metrics
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def percent(ratio: float | None) -> str:
    """0.9649 -> 96.5%, three digits at most; 0.9996 -> 99.9%, since 100% means all of them; None (not measured) -> –."""
    return UNKNOWN if ratio is None else f"{ratio * 100 if ratio >= 1 else min(ratio * 100, 99.9):.3g}%"


def points(difference: float, low: float, high: float) -> str:
    """A difference of two shares and its interval: −1.5 points (−3.2 to +0.3)."""
    signed = [f"{value * 100:+.1f}".replace("-", "−").replace("+0.0", "0.0") for value in (difference, low, high)]
    return f"{signed[0]} points ({signed[1]} to {signed[2]})"


def run_checks(
    metrics: dict[str, dict[str, Any]],
    logs: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    grades: Grades | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Check]:
    """The checks that a run's results allow, in the order of the steps.

    Args:
        metrics: {"step1" to "step7": metrics}; steps and keys may be missing.
        logs: {"step5", "step6": entries of its trainer_log.jsonl}.
        grades: of step 7's answers; without them, figures of accuracy have no interval.
        settings: {"step5", "step6": its training_args.json}.
    """
    made = [*_tokenizer(metrics), *_zero_model(metrics), *_pretraining(metrics)]
    for step in ("step5", "step6"):
        if step in metrics:
            made += _training(step, metrics[step], (logs or {}).get(step, ()), (settings or {}).get(step, {}))
    return [*made, *_chat_model(metrics, grades or {})]


def _tokenizer(metrics: dict[str, Any]) -> Iterator[Check]:
    languages, step2 = languages_of(metrics), metrics.get("step2", {})
    if (kept := step2.get("special_ids_kept")) is not None:
        yield Check("step2", "Special tokens keep their ids", "kept" if kept else "moved", "all of them", kept)
    if (unreachable := step2.get("unreachable_tokens")) is not None:
        yield Check(
            "step2", "Every token can be produced", f"{unreachable:,} unreachable tokens", "none", unreachable == 0
        )
    for language in languages.retained:
        if (changed := get_nested(step2, "changed_texts", language)) is not None:
            total = get_nested(step2, "texts", language)
            figure = f"{changed:,} changed" if total is None else f"{changed:,} of {total:,} changed"
            text = f"{languages[language]} texts are tokenized as before"
            yield Check("step2", text, figure, "none", changed == 0)
    if (ratio := get_nested(step2, "token_ratio", languages.added)) is not None:
        text, limit = f"{languages.name} takes fewer tokens", f"at most {percent(MAX_TOKEN_RATIO)}"
        yield Check("step2", text, f"{percent(ratio)} of before", limit, ratio <= MAX_TOKEN_RATIO)


def _zero_model(metrics: dict[str, Any]) -> Iterator[Check]:
    if (difference := get_nested(metrics, "step3", "old_logits_max_diff")) is not None:
        figure, limit = f"largest difference {difference:.1g}", f"at most {MAX_LOGIT_DIFFERENCE:.1g}"
        passed = difference <= MAX_LOGIT_DIFFERENCE
        yield Check("step3", "Logits of base tokens are unchanged", figure, limit, passed)
    languages = languages_of(metrics)
    for language in languages.retained:
        if answers := get_nested(metrics, "step4", language):
            identical, total = answers["identical"], answers["total"]
            text = f"The Zero model's {languages[language]} answers are the base model's"
            yield Check("step4", text, f"{identical:,} of {total:,} identical", "all", identical == total)


def _pretraining(metrics: dict[str, Any]) -> Iterator[Check]:
    languages = languages_of(metrics)
    for language in languages:
        after = get_nested(metrics, "step5", "bits_per_byte", "after", language)
        base = get_nested(metrics, "step4", "bits_per_byte", "base", language)
        if base is None:  # an earlier version's run; Zero is the base with new rows
            base = get_nested(metrics, "step5", "bits_per_byte", "before", language)
        if base is None or after is None:
            continue
        figure = f"{base:.3f} → {after:.3f} bits per byte"
        if language == languages.added:
            text = f"{languages.name} is predicted better than by the base model"
            yield Check("step5", text, figure, f"less than {base:.3f}", after < base)
        else:
            text, limit = f"{languages[language]} is predicted as well", f"at most {percent(MAX_RETENTION_LOSS)} more"
            yield Check("step5", text, figure, limit, after <= base * (1 + MAX_RETENTION_LOSS))
    deviations = {
        name: round(abs(counts["ratio"] - counts["target_ratio"]), 6)
        for name, counts in (get_nested(metrics, "step5", "data") or {}).items()
        if counts.get("target_ratio") is not None and counts.get("ratio") is not None
    }
    if deviations:
        worst = max(deviations, key=lambda name: deviations[name])
        figure, limit = (
            f"{deviations[worst] * 100:.2g} points off ({worst})",
            f"at most {MIX_TOLERANCE * 100:.2g} point",
        )
        yield Check("step5", "The data mix is on target", figure, limit, deviations[worst] <= MIX_TOLERANCE)


def _training(
    step: str, measured: dict[str, Any], log: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Check]:
    losses = {entry["step"]: entry["eval_loss"] for entry in log if isinstance(entry.get("eval_loss"), int | float)}
    if len(losses) > 1:
        first, lowest = losses[min(losses)], min(losses.values())
        saved = get_nested(measured, "best", "step") if settings.get("load_best_model_at_end") else None
        kept = losses.get(saved or max(losses), math.nan)
        figure = f"{first:.3f} → {kept:.3f}, lowest {lowest:.3f}"
        limit = f"less than at first, at most {percent(MAX_EVAL_LOSS_RISE)} over the lowest"
        passed = kept < first and kept <= lowest * (1 + MAX_EVAL_LOSS_RISE)
        yield Check(step, "Held-out loss falls and stays low", figure, limit, passed)
    if (ratio := measured.get("padding_ratio")) is not None:
        text, limit = "Hardly any token is padding", f"less than {percent(MAX_PADDING_RATIO)}"
        yield Check(step, text, f"{percent(ratio)} padding", limit, ratio < MAX_PADDING_RATIO)


def _chat_model(metrics: dict[str, Any], grades: Grades) -> Iterator[Check]:
    languages, step7 = languages_of(metrics), metrics.get("step7", {})

    def base_and_chat(*path: str) -> list[float | None]:
        return [get_nested(step7, path[0], model, *path[1:]) for model in ("base", "chat")]

    for language in (*languages.retained, languages.added):
        before, after = base_and_chat("accuracy", language)
        if before is None or after is None:
            continue
        figure, low = _change(before, after, "correct"), after - before
        pair = [grades.get(language, {}).get(model, []) for model in ("base", "chat")]
        if pair[0] and len(pair[0]) == len(pair[1]):
            difference, low, high = paired_difference(*pair)
            figure += f" of {len(pair[0]):,}, {points(difference, low, high)}"
        if language == languages.added:
            yield Check(
                "step7", f"{languages.name} is learned", figure, "more than the base model, beyond chance", low > 0
            )
        else:
            kept = round(before - after, 6) <= MAX_ACCURACY_DROP
            limit = f"at least −{MAX_ACCURACY_DROP * 100:.0f} points"
            yield Check("step7", f"{languages[language]} is kept", figure, limit, kept)
    before, after = base_and_chat("language_confusion", languages.added, "response_pass_rate")
    if after is not None:
        figure, limit = _change(before, after, "of answers"), f"at least {percent(MIN_PASS_RATE)}"
        text = f"{languages.name} questions are answered in {languages.name}"
        yield Check("step7", text, figure, limit, after >= MIN_PASS_RATE)
    shipped = get_nested(step7, "generation", "candidates", get_nested(step7, "generation", "chosen") or "")
    if (repeated := get_nested(shipped or {}, "repeated_4gram_ratio")) is not None:
        figure, limit = f"{percent(repeated)} of 4-grams repeated", f"at most {percent(MAX_REPETITION)}"
        yield Check("step7", "Free-form replies seldom repeat themselves", figure, limit, repeated <= MAX_REPETITION)
    if (finished := get_nested(shipped or {}, "finished_ratio")) is not None:
        figure, limit = f"{percent(finished)} finished", f"at least {percent(MIN_FINISHED)}"
        yield Check("step7", "Free-form replies come to an end", figure, limit, finished >= MIN_FINISHED)


def _change(before: float | None, after: float, what: str) -> str:
    return ("" if before is None else f"{percent(before)} → ") + f"{percent(after)} {what}"
