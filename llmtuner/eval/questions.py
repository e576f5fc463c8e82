"""Questions from a file, whether an answer is right, and how far two models' answers agree."""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from llmtuner.console import UserError
from llmtuner.eval.language import HAN, KANA, answers_in_language

NUMBER = re.compile(r"(?<![0-9A-Za-z])(?<![0-9]\.)([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.([0-9]+))?")
# 100 million and 100万 are other numbers than 100, and the 1970s another time than 1970.
NOT_BEHIND_A_NUMBER = r"(?![0-9⁄]|\.[0-9]|[十百千万萬億亿兆]|\s*(?:hundred|thousand|million|billion|trillion)\b|s\b)"
_CJK = f"(?:{KANA.pattern}|{HAN.pattern})"
BLANK_BESIDE_CJK = re.compile(rf"(?<={_CJK})[^\S\n]+|[^\S\n]+(?={_CJK})")


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
    subject: tuple[str, ...] = ()
    """All names, in any language, of what is asked about. Empty: an answer about something else is not noticed."""
    all_subjects: tuple[str, ...] = ()
    """All names of everything that questions of this file are about."""
    answer_language: str = ""
    """The language of a right answer; that of the question if empty. A request for a translation names another."""

    @property
    def language_of_answer(self) -> str:
        return self.answer_language or self.language


def read_questions(path: Path, per_group: int | None = None) -> list[Question]:
    """Reads questions from plain text, or from JSON lines with at least group, language, question.

    In plain text a group opens with its name in brackets, [zh], and has one question a line, behind "=>" what a right
    answer names, where that can be said. [zh > en] opens questions of the group zh whose answers are to be English. A line
    that begins with # is a comment. In JSON lines, a line {"subjects": [[names], ...]} tells what else there is in the
    world that the questions are about.

    Args:
        per_group: how many of each group are taken, from its beginning.

    Raises:
        UserError: if the file is missing, empty or damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line ends
        numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
        if path.suffix == ".jsonl":
            questions = parse_questions(json.loads(line) for _, line in numbered)
        else:
            questions = _from_text(numbered)
    except OSError as error:
        raise UserError(f"cannot read the questions file {path}: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the questions file {path} is damaged: {error}.") from error
    if not questions:
        raise UserError(f"the questions file {path} holds no question. Write one a line.")
    counts: dict[str, int] = {}
    chosen = []
    for question in questions:
        counts[question.group] = counts.get(question.group, 0) + 1
        if per_group is None or counts[question.group] <= per_group:
            chosen.append(question)
    return chosen


def parse_questions(rows: Iterable[dict[str, Any]]) -> list[Question]:
    """Questions from the rows of a .jsonl file; a row with "subjects" alone lists the names of everything in their world."""
    asked, names = [], []
    for row in rows:
        if "subjects" in row:
            names += [name for subject in row["subjects"] for name in subject]
        else:
            value = row.get("value")
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ValueError(
                    f"the value {json.dumps(value)} is not text; write it in quotes, or null where it is not known"
                )
            asked.append(row)
            names += row.get("subject", ())
    lists = {"all_subjects": tuple(dict.fromkeys(names))}
    return [
        Question(**row | {key: tuple(row.get(key, ())) for key in ("wrong_values", "subject")} | lists) for row in asked
    ]


def _from_text(lines: list[tuple[int, str]]) -> list[Question]:
    questions = []
    group = answer_language = ""
    for number, line in lines:
        if line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)(?: > (\w+))?\]", line):
            group, answer_language = heading[1], heading[2] or ""
        elif not group:
            raise ValueError(f"line {number} stands before any group such as [zh]")
        else:
            question, _, value = (part.strip() for part in line.partition("=>"))
            language = group.split("_")[0]
            questions.append(Question(group, language, question, value or None, answer_language=answer_language))
    return questions


def is_correct(question: Question, answer: str) -> bool:
    """Whether an answer names the value that was asked for and no other one of its list, about the right subject, in the
    right language.

    Text is compared in Unicode's NFKC form and without regard to case. What begins or ends with an ASCII letter or digit
    must not touch another one: "H2O" is named by 水的化学式是H2O。, "tea" not by "steam". Numbers are compared as numbers: 1000
    is named by "1,000", 100 neither by "1,100" nor by "100.5" nor by "100万". Chinese and Japanese numerals are text.

    A name inside a longer one (ルカ in ナミイルカ) is not named. A wrong value does not count where the question itself, or the
    right value, contains it. An answer that names another subject and not its own is wrong, whatever value it names; one
    that names none at all ("かじ屋です。"), or its own in another language, is not.

    Every line must be in the right language or undecided (see llmtuner/eval/language.py), and one must be for certain,
    unless the answer has no letters at all: 富士山 alone may be Chinese, and does not count as Japanese.
    """
    if question.value is None:
        return False
    in_language = answers_in_language(answer, question.language_of_answer)
    if in_language is False or (in_language is None and any(map(str.isalpha, answer))):
        return False
    value = _normalized(question.value)
    allowed = _normalized(question.question) + "\n" + value
    wrong = {term for term in map(_normalized, question.wrong_values) if term not in allowed}
    subject = set(map(_normalized, question.subject))
    others = set(map(_normalized, question.all_subjects)) - subject - {value} if subject else set()
    named = _named(_normalized(answer), {value} | wrong | subject | others)
    return value in named and not wrong & named and (bool(subject & named) or not others & named)


@functools.lru_cache(maxsize=1 << 16)
def _normalized(text: str) -> str:
    """A text as texts are compared: NFKC, lower case, numbers in plain digits, no blanks beside Han and kana."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    return NUMBER.sub(_plain_number, BLANK_BESIDE_CJK.sub("", text))


def _plain_number(found: re.Match[str]) -> str:
    """1,000.50 -> 1000.5, 07 -> 7."""
    whole = found[1].replace(",", "").lstrip("0") or "0"
    fraction = (found[2] or "").rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole


def _named(text: str, terms: set[str]) -> set[str]:
    """Those terms that a text names, other than inside a longer one of them; all normalized."""
    found = [(*match.span(), term) for term in terms if term in text for match in _pattern(term).finditer(text)]
    return {
        term
        for start, stop, term in found
        if not any(begin <= start and stop <= end and stop - start < end - begin for begin, end, _ in found)
    }


@functools.lru_cache(maxsize=1 << 14)
def _pattern(term: str) -> re.Pattern[str]:
    """A term with what must not stand beside it."""
    before = behind = ""
    if re.match("[0-9]", term):  # not 34, 1.4, H4 or -4, but 3-4 and 3月-4月
        before = r"(?<![0-9a-z⁄])(?<![0-9]\.)(?<!(?<![0-9a-z年月日])-)"
    elif re.match("[a-z]|-[0-9]", term):
        before = "(?<![0-9a-z])"
    if re.fullmatch(r"-?[0-9.]+", term):  # a unit may follow: 100km
        behind = NOT_BEHIND_A_NUMBER
    elif re.search("[0-9a-z]$", term):
        behind = "(?![0-9a-z])"
    return re.compile(before + re.escape(term) + behind)


def accuracy(questions: Sequence[Question], answers: Sequence[str], group: str) -> float | None:
    """Share of right answers among the questions of a group that have one; None where none has."""
    right = [
        is_correct(one, answer)
        for one, answer in zip(questions, answers, strict=True)
        if one.group == group and one.value is not None
    ]
    if not right:
        return None
    return 1.0 if all(right) else min(round(sum(right) / len(right), 4), 0.9999)  # 1 is all of them


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
