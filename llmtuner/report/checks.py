"""The project's promises as checks: each with the figure that shows whether a run kept it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtuner.eval.language import LANGUAGES, RETAINED_LANGUAGES

MAX_LOGIT_DIFFERENCE = 1e-6  # rounding in fp32
MAX_PADDING_RATIO = 0.05  # packing should do better
UNKNOWN = "–"
MIX_TOLERANCE = 0.01  # one percentage point: a data set ends with a complete document
MAX_ACCURACY_DROP = 0.05  # in Chinese and English
MIN_JAPANESE_ACCURACY = 0.5  # far above chance: a question has a dozen possible answers or more, and none is offered
MIN_PASS_RATE = 0.95  # Japanese questions answered without a line in another language


@dataclass(frozen=True)
class Check:
    """A promise and whether a run kept it."""

    step: str
    """The step that measured it: "step1" to "step7"."""
    text: str
    figure: str
    """The measured value, in a few words."""
    passed: bool


def get_nested(metrics: dict[str, Any], *path: str) -> Any:
    """The value at a path of keys, or None if an unfinished or older run does not have it."""
    value: Any = metrics
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def percent(ratio: float | None) -> str:
    """0.9649 -> 96.5%, three digits at most; 0.9996 -> 99.9%, since 100% means all of them; None (not measured) -> –."""
    return UNKNOWN if ratio is None else f"{ratio * 100 if ratio >= 1 else min(ratio * 100, 99.9):.3g}%"


def run_checks(metrics: dict[str, dict[str, Any]]) -> list[Check]:
    """The checks that these metrics allow, in the order of the steps.

    Args:
        metrics: {"step1" to "step7": metrics}; steps and keys may be missing.
    """
    groups = (_tokenizer, _zero_model, _pretraining, _instruction_tuning, _chat_model)
    return [check for group in groups for check in group(metrics)]


def _tokenizer(metrics: dict[str, Any]) -> Iterator[Check]:
    if (skipped := get_nested(metrics, "step1", "skipped")) is not None:
        yield Check("step1", "No text was skipped", f"{skipped:,} skipped", skipped == 0)
    step2 = metrics.get("step2", {})
    if (kept := step2.get("special_ids_kept")) is not None:
        yield Check("step2", "Special tokens keep their ids", "kept" if kept else "moved", kept)
    if (unreachable := step2.get("unreachable_tokens")) is not None:
        yield Check("step2", "Every token can be produced", f"{unreachable:,} unreachable tokens", unreachable == 0)
    for language in RETAINED_LANGUAGES:
        if (changed := get_nested(step2, "changed_texts", language)) is not None:
            total = get_nested(step2, "texts", language)
            figure = f"{changed:,} changed" if total is None else f"{changed:,} of {total:,} changed"
            yield Check("step2", f"{LANGUAGES[language]} texts are tokenized as before", figure, changed == 0)
    if (ratio := get_nested(step2, "token_ratio", "ja")) is not None:
        yield Check("step2", "Japanese takes fewer tokens", f"{percent(ratio)} of before", ratio < 1)


def _zero_model(metrics: dict[str, Any]) -> Iterator[Check]:
    if (identical := get_nested(metrics, "step3", "old_rows_identical")) is not None:
        yield Check("step3", "Base embeddings keep every bit", "identical" if identical else "changed", identical)
    if (difference := get_nested(metrics, "step3", "old_logits_max_diff")) is not None:
        figure = f"largest difference {difference:.1g}"
        yield Check("step3", "Logits of base tokens are unchanged", figure, difference <= MAX_LOGIT_DIFFERENCE)
    for language in RETAINED_LANGUAGES:
        if answers := get_nested(metrics, "step4", language):
            identical, total = answers["identical"], answers["total"]
            text = f"The Zero model's {LANGUAGES[language]} answers are the base model's"
            yield Check("step4", text, f"{identical:,} of {total:,} identical", identical == total)


def _pretraining(metrics: dict[str, Any]) -> Iterator[Check]:
    before, after = (get_nested(metrics, "step5", "bits_per_byte", when, "ja") for when in ("before", "after"))
    if before is not None and after is not None:
        figure = f"{before:.3f} → {after:.3f} bits per byte"
        yield Check("step5", "Japanese is predicted better", figure, after < before)
    deviations = {
        name: round(abs(counts["ratio"] - counts["target_ratio"]), 6)
        for name, counts in (get_nested(metrics, "step5", "data") or {}).items()
        if counts.get("target_ratio") is not None and counts.get("ratio") is not None
    }
    if deviations:
        worst = max(deviations, key=lambda name: deviations[name])
        figure = f"at most {deviations[worst] * 100:.2g} points off ({worst})"
        yield Check("step5", "The data mix is on target", figure, deviations[worst] <= MIX_TOLERANCE)
    yield from _padding("step5", metrics)


def _instruction_tuning(metrics: dict[str, Any]) -> Iterator[Check]:
    yield from _padding("step6", metrics)
    for key, name in (("eval_loss", "held-out"), ("train_loss", "training")):
        first, last = (get_nested(metrics, "step6", key, when) for when in ("first", "last"))
        if first is not None and last is not None:
            figure = f"{name} loss {first:.3f} → {last:.3f}"
            yield Check("step6", "Instructions are learned", figure, last < first)
            return


def _padding(step: str, metrics: dict[str, Any]) -> Iterator[Check]:
    if (ratio := get_nested(metrics, step, "padding_ratio")) is not None:
        yield Check(step, "Hardly any token is padding", f"{percent(ratio)} padding", ratio < MAX_PADDING_RATIO)


def _chat_model(metrics: dict[str, Any]) -> Iterator[Check]:
    step7 = metrics.get("step7", {})

    def base_and_chat(*path: str) -> list[float | None]:
        return [get_nested(step7, path[0], model, *path[1:]) for model in ("base", "chat")]

    for language in RETAINED_LANGUAGES:
        before, after = base_and_chat("accuracy", language)
        if before is not None and after is not None:
            kept = round(before - after, 6) <= MAX_ACCURACY_DROP
            yield Check("step7", f"{LANGUAGES[language]} is kept", _change(before, after, "correct"), kept)
    before, after = base_and_chat("accuracy", "ja")
    if after is not None:
        figure = _change(before, after, "correct")
        yield Check("step7", "Japanese is learned", figure, after > MIN_JAPANESE_ACCURACY)
    before, after = base_and_chat("language_confusion", "ja", "response_pass_rate")
    if after is not None:
        figure = _change(before, after, "of answers")
        yield Check("step7", "Japanese questions are answered in Japanese", figure, after >= MIN_PASS_RATE)
    name, candidates = (get_nested(step7, "generation", key) for key in ("chosen", "candidates"))
    chosen = get_nested(candidates, name, "repeated_4gram_ratio")
    greedy = get_nested(candidates, "greedy", "repeated_4gram_ratio")
    if greedy is None:
        greedy = get_nested(step7, "free_answers", "chat", "repeated_4gram_ratio")
    if greedy is not None and chosen is not None:
        figure = f"{percent(chosen)} repeated, greedy {percent(greedy)}"
        yield Check("step7", "The selected generation settings repeat no more than greedy", figure, chosen <= greedy)


def _change(before: float | None, after: float, what: str) -> str:
    return ("" if before is None else f"{percent(before)} → ") + f"{percent(after)} {what}"
