"""Questions from a file, whether an answer is right, and how far two models' answers agree."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from llmtuner.console import InputError

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
    """Reads questions from plain text, or from JSON lines with at least group, language, question.

    In plain text a group opens with its name in brackets, [zh], and has one question a line, behind "=>" what a right
    answer names, where that can be said; a line that begins with # is a remark.

    Args:
        per_group: how many of each group are taken, from its beginning.

    Raises:
        InputError: if the file is missing, empty or damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
        numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        questions = (_from_json if path.suffix == ".jsonl" else _from_text)(numbered)
    except OSError as error:
        raise InputError(f"cannot read the questions file {path}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"the questions file {path} is damaged: {error}.") from error
    if not questions:
        raise InputError(f"the questions file {path} holds no question. Write one a line.")
    counts: dict[str, int] = {}
    chosen = []
    for question in questions:
        counts[question.group] = counts.get(question.group, 0) + 1
        if per_group is None or counts[question.group] <= per_group:
            chosen.append(question)
    return chosen


def _from_json(lines: list[tuple[int, str]]) -> list[Question]:
    rows = [json.loads(line) for _, line in lines]
    return [Question(**{**row, "wrong_values": tuple(row.get("wrong_values", ()))}) for row in rows]


def _from_text(lines: list[tuple[int, str]]) -> list[Question]:
    questions = []
    group = ""
    for number, line in lines:
        if line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            group = heading[1]
        elif not group:
            raise ValueError(f"line {number} stands before any group such as [zh]")
        else:
            question, _, value = (part.strip() for part in line.partition("=>"))
            questions.append(Question(group, group.split("_")[0], question, value or None))
    return questions


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


def share_right(questions: Sequence[Question], answers: Sequence[str], group: str) -> float | None:
    """Share of right answers among the questions of a group that have one; None where none has."""
    right = [
        is_right(one, answer)
        for one, answer in zip(questions, answers, strict=True)
        if one.group == group and one.value is not None
    ]
    return round(sum(right) / len(right), 4) if right else None


def agreement(answers: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """How far answers agree with another model's: the share that is identical, and the mean share of characters in common.

    The latter is difflib's ratio: twice the characters in matching blocks over the characters of both.
    """
    pairs = list(zip(answers, reference, strict=True))
    similar = [SequenceMatcher(None, one, other, autojunk=False).ratio() for one, other in pairs]
    return {
        "identical": round(sum(one == other for one, other in pairs) / len(pairs), 4),
        "similar": round(sum(similar) / len(similar), 4),
    }
