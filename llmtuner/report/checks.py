"""What this project promises, each promise with the figure that shows whether a run kept it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_LOGIT_DIFFERENCE = 1e-6  # more than this is more than rounding in fp32
MAX_PADDING_RATIO = 0.05  # share of the tokens; above it, packing has not done its work
MIX_TOLERANCE = 0.01  # one percentage point: a data set ends with a whole document
MAX_ACCURACY_DROP = 0.05  # right answers that Chinese or English may lose
MIN_JAPANESE_ACCURACY = (
    0.5  # far above a guess: a question has a dozen possible answers or more, and none of them is offered
)
MIN_PASS_RATE = 0.95  # answers to Japanese questions without a line in another language
LANGUAGES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}
RETAINED_LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class Check:
    """A promise and whether it was kept."""

    step: str
    """The step whose metrics show it: "step1" to "step7"."""
    text: str
    figure: str
    """What was measured, in a few words."""
    passed: bool


def get_nested(metrics: dict[str, Any], *path: str) -> Any:
    """What lies at a path of names, or None where an old or unfinished run does not have it."""
    value: Any = metrics
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def percent(share: float) -> str:
    """0.9649 -> 96.5%, three digits at most; 100% is all of them, so 0.9996 -> 99.9%."""
    return f"{share * 100 if share >= 1 else min(share * 100, 99.9):.3g}%"


def run_checks(metrics: dict[str, dict[str, Any]]) -> list[Check]:
    """The promises that these metrics can prove or disprove, in the order of the steps.

    Args:
        metrics: "step1" to "step7" -> what the step measured; steps and fields may be missing.
    """
    tests = (_tokenizer, _zero_model, _pretraining, _instruction_tuning, _chat_model)
    return [check for test in tests for check in test(metrics)]


def _tokenizer(metrics: dict[str, Any]) -> Iterator[Check]:
    if (skipped := get_nested(metrics, "step1", "skipped")) is not None:
        yield Check("step1", "No text was skipped", f"{skipped:,} skipped", skipped == 0)
    step2 = metrics.get("step2", {})
    if (kept := step2.get("special_ids_kept")) is not None:
        yield Check("step2", "Special tokens keep their ids", "kept" if kept else "moved", kept)
    if (dead := step2.get("unreachable_tokens")) is not None:
        yield Check("step2", "Every piece can be produced", f"{dead:,} dead pieces", dead == 0)
    for language in RETAINED_LANGUAGES:
        if (changed := get_nested(step2, "changed_texts", language)) is not None:
            asked = get_nested(step2, "texts", language)
            figure = f"{changed:,} changed" if asked is None else f"{changed:,} of {asked:,} changed"
            yield Check("step2", f"{LANGUAGES[language]} texts are split as before", figure, changed == 0)
    if (ratio := get_nested(step2, "token_ratio", "ja")) is not None:
        yield Check("step2", "Japanese takes fewer tokens", f"{percent(ratio)} of before", ratio < 1)


def _zero_model(metrics: dict[str, Any]) -> Iterator[Check]:
    if (identical := get_nested(metrics, "step3", "old_rows_identical")) is not None:
        yield Check("step3", "Old rows keep every bit", "identical" if identical else "changed", identical)
    if (difference := get_nested(metrics, "step3", "old_logits_max_diff")) is not None:
        figure = f"largest difference {difference:.1g}"
        yield Check("step3", "Old logits are unchanged", figure, difference <= MAX_LOGIT_DIFFERENCE)
    for language in RETAINED_LANGUAGES:
        if answers := get_nested(metrics, "step4", language):
            same, asked = answers["identical"], answers["total"]
            text = f"{LANGUAGES[language]} answers of the Zero model are the base model's"
            yield Check("step4", text, f"{same:,} of {asked:,} identical", same == asked)


def _pretraining(metrics: dict[str, Any]) -> Iterator[Check]:
    before, after = (get_nested(metrics, "step5", "bits_per_byte", when, "ja") for when in ("before", "after"))
    if before is not None and after is not None:
        figure = f"{before:.3f} → {after:.3f} bits per byte"
        yield Check("step5", "Japanese is predicted better", figure, after < before)
    off = {
        name: round(abs(counts["ratio"] - counts["target_ratio"]), 6)
        for name, counts in (get_nested(metrics, "step5", "data") or {}).items()
        if counts.get("target_ratio") is not None and counts.get("ratio") is not None
    }
    if off:
        worst = max(off, key=lambda name: off[name])
        figure = f"at most {off[worst] * 100:.2g} points off ({worst})"
        yield Check("step5", "The mix is as planned", figure, off[worst] <= MIX_TOLERANCE)
    yield from _padding("step5", metrics)


def _instruction_tuning(metrics: dict[str, Any]) -> Iterator[Check]:
    yield from _padding("step6", metrics)
    for name, what in (("eval_loss", "held-out"), ("train_loss", "training")):
        first, last = (get_nested(metrics, "step6", name, when) for when in ("first", "last"))
        if first is not None and last is not None:
            figure = f"{what} loss {first:.3f} → {last:.3f}"
            yield Check("step6", "Instructions are learned", figure, last < first)
            return


def _padding(step: str, metrics: dict[str, Any]) -> Iterator[Check]:
    if (share := get_nested(metrics, step, "padding_ratio")) is not None:
        yield Check(step, "Hardly a token is padding", f"{percent(share)} padding", share < MAX_PADDING_RATIO)


def _chat_model(metrics: dict[str, Any]) -> Iterator[Check]:
    step7 = metrics.get("step7", {})
    right = {
        language: [get_nested(step7, "accuracy", one, language) for one in ("base", "chat")] for language in LANGUAGES
    }
    for language in RETAINED_LANGUAGES:
        before, after = right[language]
        if before is not None and after is not None:
            figure = f"{percent(before)} → {percent(after)} right"
            yield Check(
                "step7", f"{LANGUAGES[language]} is kept", figure, round(before - after, 6) <= MAX_ACCURACY_DROP
            )
    before, after = right["ja"]
    if after is not None:
        figure = f"{percent(after)} right" if before is None else f"{percent(before)} → {percent(after)} right"
        yield Check("step7", "Japanese is learned", figure, after > MIN_JAPANESE_ACCURACY)
    before, after = (
        get_nested(step7, "language_confusion", one, "ja", "response_pass_rate") for one in ("base", "chat")
    )
    if after is not None:
        figure = (
            f"{percent(after)} of answers" if before is None else f"{percent(before)} → {percent(after)} of answers"
        )
        yield Check("step7", "Japanese questions are answered in Japanese", figure, after >= MIN_PASS_RATE)
    greedy = get_nested(step7, "generation", "candidates", "greedy", "repeated_4gram_ratio")
    if greedy is None:
        greedy = get_nested(step7, "free_answers", "chat", "repeated_4gram_ratio")
    chosen = get_nested(
        step7, "generation", "candidates", get_nested(step7, "generation", "chosen"), "repeated_4gram_ratio"
    )
    if greedy is not None and chosen is not None:
        figure = f"{percent(chosen)} repeated, greedy {percent(greedy)}"
        yield Check("step7", "The chosen generation settings repeat no more than greedy", figure, chosen <= greedy)
