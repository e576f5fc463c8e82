"""What one model is asked and measured by, and which generation settings suit it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmtuner.eval.bits_per_byte import Windows, bootstrap_ci, document_bits
from llmtuner.eval.generation import GREEDY, generate_answers
from llmtuner.eval.language import language_confusion
from llmtuner.eval.questions import Question, accuracy, agreement
from llmtuner.eval.repetition import repetition_metrics
from llmtuner.files import atomic_write_json

QA_GROUPS = ("zh", "en", "ja", "ja_unseen")
FREE_FORM = "ja_free"  # requests for a longer reply
RETAINED_LANGUAGES = ("zh", "en")  # languages whose answers are compared with the base model's
QA_MAX_NEW_TOKENS = 64  # room for a sentence, also for one whose Japanese is spelled in bytes

# Among these a chat model's own settings are chosen. "sampled" is what ChatGLM3 comes with.
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.8}
GENERATION_CANDIDATES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "greedy, penalty 1.05": {**GREEDY, "repetition_penalty": 1.05},
    "greedy, penalty 1.1": {**GREEDY, "repetition_penalty": 1.1},
    "sampled": SAMPLED,
    "sampled, penalty 1.05": {**SAMPLED, "repetition_penalty": 1.05},
    "sampled, penalty 1.1": {**SAMPLED, "repetition_penalty": 1.1},
}
QUESTIONS_PER_CANDIDATE = 100  # of each language
NUM_SAMPLES = 4  # answers to each request where answers are drawn at random
MAX_ACCURACY_DROP = 0.02  # right answers, at most, that less repetition may cost


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    texts: Mapping[str, list[str]],
    context_length: int,
    max_new_tokens: int,
    name: str,
) -> tuple[dict[str, Any], list[str]]:
    """Greedy answers to all questions and bits per byte of held-out texts; returns what was measured, and the answers.

    Args:
        texts: of each language.
        context_length: tokens that are read at once.
        max_new_tokens: room for the reply to a free request.
        name: stands on the progress bars.
    """
    answers = [""] * len(questions)
    told = {}
    for kind, room in (("free", max_new_tokens), ("short", QA_MAX_NEW_TOKENS)):
        chosen = [index for index, one in enumerate(questions) if (one.group == FREE_FORM) == (kind == "free")]
        asked = [questions[index].question for index in chosen]
        told[kind] = generate_answers(model, tokenizer, asked, room, name=f"{name}, {kind}")
        for index, text in zip(chosen, told[kind].texts, strict=True):
            answers[index] = text
    windows = {language: Windows.from_texts(tokenizer, own, context_length) for language, own in texts.items()}
    bits = {language: document_bits(model, own, f"{name} {language}") for language, own in windows.items()}
    free = repetition_metrics(told["free"])
    metrics = {
        "accuracy": {group: accuracy(questions, answers, group) for group in QA_GROUPS},
        "language_confusion": language_confusion_by_group(questions, answers),
        "bits_per_byte": {one: round(float(bits[one].sum() / windows[one].num_bytes.sum()), 4) for one in texts},
        "bits_per_byte_interval": {one: bootstrap_ci(bits[one], windows[one].num_bytes) for one in texts},
        "repetition": {"ja": free["repeated_4gram_ratio"]},
        "free_answers": free,
        "tokens_per_second": told["short"].tokens_per_second,
    }
    return metrics, answers


def language_confusion_by_group(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`language_confusion` of the answers to each group of questions."""
    found = {}
    for group in (*QA_GROUPS, FREE_FORM):
        pairs = [(answer, one) for one, answer in zip(questions, answers, strict=True) if one.group == group]
        if pairs:
            found[group] = language_confusion(
                [answer for answer, _ in pairs], [question.language_of_answer for _, question in pairs]
            )
    return found


def agreement_by_language(
    questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str]
) -> dict[str, dict[str, float]]:
    """`agreement` of two models' answers in each of the languages that were to be kept."""
    found = {}
    for group in RETAINED_LANGUAGES:
        asked = [index for index, one in enumerate(questions) if one.group == group]
        if asked:
            found[group] = agreement([answers[index] for index in asked], [reference[index] for index in asked])
    return found


def select_generation_config(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int
) -> dict[str, Any]:
    """Tries `GENERATION_CANDIDATES`; chosen is the one that repeats least among those that cost at most `MAX_ACCURACY_DROP` right answers.

    Right answers are counted over all questions whose answer is known, and compared with greedy decoding's; where none is
    known, repetition alone decides.
    """
    known, taken = [], dict.fromkeys(QA_GROUPS, 0)
    for one in questions:
        if one.value is not None and one.group in ("zh", "en", "ja") and taken[one.group] < QUESTIONS_PER_CANDIDATE:
            taken[one.group] += 1
            known.append(one)
    requests = [one.question for one in questions if one.group == FREE_FORM]
    candidates: dict[str, dict[str, Any]] = {}
    for name, settings in GENERATION_CANDIDATES.items():
        num_samples = NUM_SAMPLES if settings["do_sample"] else 1
        free = generate_answers(model, tokenizer, requests * num_samples, max_new_tokens, settings, name=name)
        told = generate_answers(
            model, tokenizer, [one.question for one in known], QA_MAX_NEW_TOKENS, settings, name=name
        )
        groups = [accuracy(known, told.texts, group) for group in QA_GROUPS]
        shares = [share for share in groups if share is not None]
        right = round(sum(shares) / len(shares), 4) if shares else None
        candidates[name] = {"settings": settings, **repetition_metrics(free), "accuracy": right}
    enough = (candidates["greedy"]["accuracy"] or 0) - MAX_ACCURACY_DROP
    allowed = [name for name, one in candidates.items() if one["accuracy"] is None or one["accuracy"] >= enough]
    chosen = min(allowed, key=lambda name: candidates[name]["repeated_4gram_ratio"])
    return {"candidates": candidates, "chosen": chosen}


def save_generation_config(directory: Path, settings: Mapping[str, Any]) -> None:
    """Makes generation settings a model's own: transformers' `generate` takes them from its directory by default."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    own = {"do_sample": False, "temperature": None, "top_p": None, "repetition_penalty": None, **settings}
    for name, value in own.items():
        setattr(config, name, value)
    config.validate()
    atomic_write_json(directory / "generation_config.json", config.to_diff_dict())
