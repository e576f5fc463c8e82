"""Greedy answers to questions, whether they are right, and whether they repeat themselves."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmtuner.console import InputError, progress
from llmtuner.data.template import Template

KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30fa\u30fc]")
HAN = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Question:
    """One line of a questions file."""

    group: str
    """What it is counted under: zh, en, ja or ja_unseen."""
    language: str
    question: str
    value: str | None = None
    """What a right answer names; None where answers are only shown."""
    wrong_values: tuple[str, ...] = ()
    """What a right answer does not name."""
    relation: str = ""


def read_questions(path: Path, per_group: int | None = None) -> list[Question]:
    """Reads JSON lines with at least `group`, `language`, `question`; at most `per_group` of each group.

    Raises:
        InputError: if the file is missing, empty or damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        questions = [Question(**{**row, "wrong_values": tuple(row.get("wrong_values", ()))}) for row in rows]
    except OSError as error:
        raise InputError(f"cannot read the questions file {path}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"the questions file {path} is damaged: {error}.") from error
    if not questions:
        raise InputError(f"the questions file {path} holds no question. Write one JSON object per line.")
    counts: dict[str, int] = {}
    chosen = []
    for question in questions:
        counts[question.group] = counts.get(question.group, 0) + 1
        if per_group is None or counts[question.group] <= per_group:
            chosen.append(question)
    return chosen


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer names the value that was asked for, no other one of its list, and speaks the question's language.

    A number must stand alone: 4 is not named by 34. Case does not matter. A wrong value does not count where the question
    itself, or the right value, contains it.
    """
    if question.value is None or not _speaks(question.language, answer) or not _names(answer, question.value):
        return False
    allowed = question.question + "\n" + question.value
    return not any(_names(answer, wrong) for wrong in question.wrong_values if wrong not in allowed)


def _names(answer: str, value: str) -> bool:
    pattern = re.escape(value)
    if value[0].isdigit():
        pattern = r"(?<!\d)" + pattern
    if value[0].isascii() and value[0].isalpha():
        pattern = r"\b" + pattern + r"\b"
    return re.search(pattern, answer, re.IGNORECASE) is not None


def _speaks(language: str, answer: str) -> bool:
    kana, han = KANA.search(answer) is not None, HAN.search(answer) is not None
    return {"ja": kana, "zh": han and not kana, "en": not han and not kana}.get(language, True)


def answer_all(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[str],
    max_new_tokens: int = 48,
    batch_size: int = 64,
    name: str = "",
) -> list[str]:
    """Greedy answers, each question in a dialogue of its own; an answer ends at an end mark or after `max_new_tokens`."""
    template = Template.of(tokenizer)
    prompts = [template.prompt(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    return continue_all(model, tokenizer, prompts, max_new_tokens, batch_size, name)


@torch.no_grad()
def continue_all(
    model: PreTrainedModel, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, batch_size: int, name: str
) -> list[str]:
    """What an assistant says after each of several prompts."""
    template = Template.of(tokenizer)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    answers = [""] * len(prompts)
    for batch in progress(batches, f"answers {name}".strip(), unit="batch"):
        longest = max(len(prompts[index]) for index in batch)
        padded = [[0] * (longest - len(prompts[index])) + prompts[index] for index in batch]
        mask = [[0] * (longest - len(prompts[index])) + [1] * len(prompts[index]) for index in batch]
        generated = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=template.stop_ids,
            pad_token_id=0,
        )
        for index, ids in zip(batch, generated[:, longest:].tolist(), strict=True):
            end = next((place for place, one in enumerate(ids) if one in template.stop_ids), len(ids))
            answers[index] = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    return answers


def reply(model: PreTrainedModel, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> str:
    """What an assistant says next in one dialogue."""
    return continue_all(model, tokenizer, [prompt], max_new_tokens, 1, "")[0]


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of character n-grams that occurred before in the same text, over all texts."""
    seen_again = total = 0
    for text in texts:
        grams = [text[start : start + n] for start in range(len(text) - n + 1)]
        total += len(grams)
        seen_again += len(grams) - len(set(grams))
    return seen_again / total if total else 0.0
