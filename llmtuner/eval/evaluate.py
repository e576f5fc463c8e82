"""Evaluates one model on questions and held-out texts, and selects the generation config that suits a chat model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from llmtuner.eval.bits_per_byte import Windows, bootstrap_ci, document_bits
from llmtuner.eval.generation import GREEDY, generate_answers
from llmtuner.eval.language import LANGUAGES, Languages, language_confusion
from llmtuner.eval.questions import Question, accuracy, agreement, first_of_each_group
from llmtuner.eval.repetition import repetition_metrics
from llmtuner.files import atomic_write_json

QA_MAX_NEW_TOKENS = 64  # one sentence, even if its Japanese takes a token per byte

# Candidates for the chat model's generation_config.json. "sampled" is what ChatGLM3 ships with.
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.8}
GENERATION_CANDIDATES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "greedy, penalty 1.05": {**GREEDY, "repetition_penalty": 1.05},
    "greedy, penalty 1.1": {**GREEDY, "repetition_penalty": 1.1},
    "sampled": SAMPLED,
    "sampled, penalty 1.05": {**SAMPLED, "repetition_penalty": 1.05},
    "sampled, penalty 1.1": {**SAMPLED, "repetition_penalty": 1.1},
}
QUESTIONS_PER_CANDIDATE = 100  # in each language
NUM_SAMPLES = 4  # replies to each free-form request under sampling
MAX_ACCURACY_DROP = 0.02  # accuracy that less repetition may cost in any language, against greedy decoding


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    texts: Mapping[str, list[str]],
    context_length: int,
    max_new_tokens: int,
    on_progress: Callable[[float], Any] | None = None,
    settings: Mapping[str, Any] = GREEDY,
    languages: Languages = LANGUAGES,
) -> tuple[dict[str, Any], list[str]]:
    """Answers all questions and measures bits per byte.

    Args:
        texts: held-out documents of each language.
        context_length: tokens in one window of a document.
        max_new_tokens: length limit of a free-form reply.
        on_progress: called with the number of questions and documents processed since the last call.
        settings: transformers' generation settings for all answers.
        languages: of the questions; their groups are named after these.

    Returns:
        Metrics, and the answer to each question.
    """
    requests = [question.question for question in questions if question.group == languages.free_form]
    qa_questions = [question.question for question in questions if question.group != languages.free_form]
    free_form = generate_answers(model, tokenizer, requests, max_new_tokens, settings, on_progress=on_progress)
    qa = generate_answers(model, tokenizer, qa_questions, QA_MAX_NEW_TOKENS, settings, on_progress=on_progress)
    free_texts, qa_texts = iter(free_form.texts), iter(qa.texts)
    answers = [next(free_texts if question.group == languages.free_form else qa_texts) for question in questions]
    bits_per_byte, intervals = {}, {}
    for language, documents in texts.items():
        windows = Windows.from_texts(tokenizer, documents, context_length)
        bits = document_bits(model, windows, on_progress=on_progress)
        bits_per_byte[language] = round(float(bits.sum() / windows.num_bytes.sum()), 4)
        intervals[language] = bootstrap_ci(bits, windows.num_bytes)
    free_form_metrics = repetition_metrics(free_form)
    metrics = {
        "decoding": dict(settings),
        "accuracy": {group: accuracy(questions, answers, group) for group in languages.qa_groups},
        "language_confusion": language_confusion_by_group(questions, answers, languages),
        "bits_per_byte": bits_per_byte,
        "bits_per_byte_interval": intervals,
        "repetition": {languages.added: free_form_metrics["repeated_4gram_ratio"]},
        "free_answers": free_form_metrics,
        "tokens_per_second": qa.tokens_per_second,
    }
    return metrics, answers


def language_confusion_by_group(
    questions: Sequence[Question], answers: Sequence[str], languages: Languages = LANGUAGES
) -> dict[str, dict[str, Any]]:
    """`language_confusion` of the answers to each group of questions."""
    metrics = {}
    for group in (*languages.qa_groups, languages.free_form):
        pairs = [pair for pair in zip(answers, questions, strict=True) if pair[1].group == group]
        if pairs:
            expected = [question.language_of_answer for _, question in pairs]
            examples = [question.example_of_language for _, question in pairs]
            metrics[group] = language_confusion([answer for answer, _ in pairs], expected, examples)
    return metrics


def agreement_by_language(
    questions: Sequence[Question], answers: Sequence[str], reference: Sequence[str], languages: Languages = LANGUAGES
) -> dict[str, dict[str, float]]:
    """`agreement` of two models' answers in each language that the base model already speaks."""
    metrics = {}
    for language in languages.retained:
        indices = [index for index, question in enumerate(questions) if question.group == language]
        if indices:
            pair = ([texts[index] for index in indices] for texts in (answers, reference))
            metrics[language] = agreement(*pair)
    return metrics


def _selection_questions(questions: Sequence[Question], languages: Languages) -> tuple[list[str], list[Question]]:
    """Free-form requests, and the questions with a known answer on which `select_generation_config` measures accuracy."""
    requests = [question.question for question in questions if question.group == languages.free_form]
    known = [question for question in questions if question.value is not None and question.group in languages]
    return requests, first_of_each_group(known, QUESTIONS_PER_CANDIDATE)


def select_generation_config(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    on_progress: Callable[[float], Any] | None = None,
    languages: Languages = LANGUAGES,
) -> dict[str, Any]:
    """Selects the candidate that repeats least, among those that lose at most `MAX_ACCURACY_DROP` against greedy decoding.

    They may lose that much in each language, since a mean hides one that is lost; without questions with a known answer
    repetition alone decides.

    Returns:
        candidates {name: {settings, accuracy, metrics of repetition}} and the name of the chosen one.
    """
    requests, known = _selection_questions(questions, languages)
    qa_questions = [question.question for question in known]
    candidates: dict[str, dict[str, Any]] = {}
    losses: dict[str, float] = {}  # in the language that loses most
    for name, settings in GENERATION_CANDIDATES.items():
        samples = requests * (NUM_SAMPLES if settings["do_sample"] else 1)
        free_form = generate_answers(model, tokenizer, samples, max_new_tokens, settings, on_progress=on_progress)
        qa = generate_answers(model, tokenizer, qa_questions, QA_MAX_NEW_TOKENS, settings, on_progress=on_progress)
        by_group = {group: accuracy(known, qa.texts, group) for group in languages.qa_groups}
        measured = {group: value for group, value in by_group.items() if value is not None}
        candidates[name] = {
            "settings": settings,
            **repetition_metrics(free_form),
            "accuracy": round(sum(measured.values()) / len(measured), 4) if measured else None,
            "accuracy_by_group": measured,
        }
        greedy = candidates["greedy"]["accuracy_by_group"]
        losses[name] = max((round(greedy[group] - value, 4) for group, value in measured.items()), default=0.0)
    allowed = [name for name in candidates if losses[name] <= MAX_ACCURACY_DROP]
    chosen = min(allowed, key=lambda name: candidates[name]["repeated_4gram_ratio"])
    return {"candidates": candidates, "chosen": chosen}


def num_progress_items(
    questions: Sequence[Question],
    texts: Mapping[str, list[str]],
    num_models: int,
    languages: Languages = LANGUAGES,
) -> int:
    """What `on_progress` counts to while `num_models` models are evaluated and one generation config is selected."""
    requests, known = _selection_questions(questions, languages)
    samples = sum(NUM_SAMPLES if settings["do_sample"] else 1 for settings in GENERATION_CANDIDATES.values())
    selection = samples * len(requests) + len(GENERATION_CANDIDATES) * len(known)
    return num_models * (len(questions) + sum(map(len, texts.values()))) + selection


def save_generation_config(directory: Path, settings: Mapping[str, Any]) -> None:
    """Writes generation settings into a model directory, where `generate` of transformers, vLLM and others read them."""
    config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    unset = dict.fromkeys(("temperature", "top_p", "repetition_penalty"))
    for name, value in {"do_sample": False, **unset, **settings}.items():
        setattr(config, name, value)
    config.validate()
    atomic_write_json(directory / "generation_config.json", config.to_diff_dict())
