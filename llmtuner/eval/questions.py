"""Evaluation questions: reading them, grading answers, agreement of two models' answers."""

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from llmtuner.console import UserError
from llmtuner.eval.language import HAN, KANA, LANGUAGES, Languages, answers_in_language

NUMBER = re.compile(r"(?<![0-9A-Za-z])(?<![0-9]\.)([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.([0-9]+))?")
# 100 million and 100万 are not 100, and the 1970s are not 1970.
NOT_AFTER_NUMBER = r"(?![0-9⁄]|\.[0-9]|[十百千万萬億亿兆]|\s*(?:hundred|thousand|million|billion|trillion)\b|s\b)"
_CJK = f"(?:{KANA.pattern}|{HAN.pattern})"
SPACE_NEXT_TO_CJK = re.compile(rf"(?<={_CJK})[^\S\n]+|[^\S\n]+(?={_CJK})")


@dataclass(frozen=True)
class Question:
    """A question and what grades its answer."""

    group: str
    """What its answers are aggregated by: zh, en, ja, ja_unseen or ja_free, or other codes, see `Languages`."""
    language: str
    question: str
    value: str | None = None
    """What a correct answer names; None if answers are not graded."""
    wrong_values: tuple[str, ...] = ()
    """What a correct answer must not name."""
    relation: str = ""
    subject: tuple[str, ...] = ()
    """All names of the subject, in any language. If empty, answers about another subject are not detected."""
    all_subjects: tuple[str, ...] = ()
    """All names of all subjects of the file."""
    answer_language: str = ""
    """The language of a correct answer, as in a request for a translation; empty: that of the question."""

    @property
    def language_of_answer(self) -> str:
        return self.answer_language or self.language

    @property
    def example_of_language(self) -> str:
        """A text in the language of a correct answer: the question, unless it asks for a translation."""
        return self.question if self.language_of_answer == self.language else ""


def read_questions(path: Path, per_group: int | None = None) -> list[Question]:
    """Reads questions from plain text, or from JSON lines with at least group, language, question.

    In plain text a group starts with its name in brackets, [zh], followed by one question a line and, where it can be graded,
    "=>" and what a correct answer names. [zh > en] starts questions of the group zh that are to be answered in English. Lines
    that start with # are comments. In JSON lines, {"subjects": [[names], ...]} lists further subjects that an answer may be
    about by mistake.

    Args:
        per_group: how many questions of each group are read; all by default.

    Raises:
        UserError: if the file is missing, empty or damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may contain U+2028
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
        raise UserError(f"the questions file {path} contains no questions. Write one per line.")
    return questions if per_group is None else first_of_each_group(questions, per_group)


def first_of_each_group(questions: Iterable[Question], limit: int) -> list[Question]:
    """At most `limit` questions of each group, in order."""
    counts: Counter[str] = Counter()
    selected = []
    for question in questions:
        counts[question.group] += 1
        if counts[question.group] <= limit:
            selected.append(question)
    return selected


def example_questions(path: Path, languages: Languages = LANGUAGES) -> list[str]:
    """Returns a question to try a model with in each language: the first of each, which nobody picked.

    Only those that the questions file has; none if it cannot be read, for a chat does without.
    """
    try:
        questions = read_questions(path)
    except UserError:
        return []
    first = {question.group: question.question for question in reversed(questions)}
    return [first[language] for language in languages if language in first]


def parse_questions(rows: Iterable[dict[str, Any]]) -> list[Question]:
    """Questions from rows of a .jsonl file, as `read_questions` describes them.

    Raises:
        ValueError: if a value is not text.
    """
    questions, names = [], []
    for row in rows:
        if "subjects" in row:
            names += [name for subject in row["subjects"] for name in subject]
            continue
        value = row.get("value")
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"the value {json.dumps(value)} is not text; put it in quotes, or write null if unknown")
        questions.append(row | {key: tuple(row.get(key, ())) for key in ("wrong_values", "subject")})
        names += row.get("subject", ())
    all_subjects = tuple(dict.fromkeys(names))
    return [Question(**row, all_subjects=all_subjects) for row in questions]


def _from_text(lines: list[tuple[int, str]]) -> list[Question]:
    questions = []
    group = answer_language = ""
    for number, line in lines:
        if line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(\w+)(?: > (\w+))?\]", line):
            group, answer_language = header[1], header[2] or ""
        elif not group:
            raise ValueError(f"line {number} precedes the first group header, such as [zh]")
        else:
            question, _, value = (part.strip() for part in line.partition("=>"))
            language = group.split("_")[0]
            questions.append(Question(group, language, question, value or None, answer_language=answer_language))
    return questions


def is_correct(question: Question, answer: str) -> bool:
    """Whether an answer names the expected value and no wrong one, about the right subject, in the right language.

    Text is compared after NFKC normalization and case folding. A term that starts or ends with an ASCII letter or digit must
    not touch another one: 水的化学式是H2O。 names "H2O", "steam" does not name "tea". Numbers are compared as numbers: "1,000"
    names 1000; "1,100", "100.5" and "100万" do not name 100. Chinese and Japanese numerals are text.

    A name inside a longer one (ルカ in ナミイルカ) does not count, nor does a wrong value that the question or the expected
    value contains. An answer that names another subject but not its own is wrong; one that names no subject ("かじ屋です。"),
    or its own in another language, is not.

    Every line must be in the right language or undecided (llmtuner/eval/language.py), and at least one must be decided unless
    the answer has no letters: 富士山 alone may be Chinese, so it does not count as Japanese.
    """
    if question.value is None:
        return False
    in_language = answers_in_language(answer, question.language_of_answer, question.example_of_language)
    if in_language is False or (in_language is None and any(map(str.isalpha, answer))):
        return False
    value = _normalized(question.value)
    allowed = _normalized(question.question) + "\n" + value
    wrong = {term for term in map(_normalized, question.wrong_values) if term not in allowed}
    subject = set(map(_normalized, question.subject))
    others = set(map(_normalized, question.all_subjects)) - subject - {value} if subject else set()
    named = _named(_normalized(answer), {value} | wrong | subject | others)
    return value in named and not wrong & named and (bool(subject & named) or not others & named)


def names_subject(question: Question, answer: str, names: Iterable[str]) -> bool:
    """Whether an answer contains one of these names of the question's subject, other than inside a longer name of the file."""
    own = set(map(_normalized, names))
    return not own.isdisjoint(_named(_normalized(answer), own.union(map(_normalized, question.all_subjects))))


@functools.lru_cache(maxsize=1 << 16)
def _normalized(text: str) -> str:
    """Text as it is compared: NFKC, case-folded, plain digits, no spaces next to Han and kana."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    return NUMBER.sub(_plain_number, SPACE_NEXT_TO_CJK.sub("", text))


def _plain_number(number: re.Match[str]) -> str:
    """1,000.50 -> 1000.5, 07 -> 7."""
    whole = number[1].replace(",", "").lstrip("0") or "0"
    fraction = (number[2] or "").rstrip("0")
    return f"{whole}.{fraction}" if fraction else whole


def _named(text: str, terms: set[str]) -> set[str]:
    """The terms that a text names, except inside a longer one of them; everything is normalized."""
    spans = [(*match.span(), term) for term in terms if term in text for match in _pattern(term).finditer(text)]
    return {
        term
        for start, stop, term in spans
        if not any(begin <= start and stop <= end and stop - start < end - begin for begin, end, _ in spans)
    }


@functools.lru_cache(maxsize=1 << 14)
def _pattern(term: str) -> re.Pattern[str]:
    """A term, and what must not be next to it."""
    before = after = ""
    if re.match("[0-9]", term):  # not 34, 1.4, H4 or -4, but 3-4 and 3月-4月
        before = r"(?<![0-9a-z⁄])(?<![0-9]\.)(?<!(?<![0-9a-z年月日])-)"
    elif re.match("[a-z]|-[0-9]", term):
        before = "(?<![0-9a-z])"
    if re.fullmatch(r"-?[0-9.]+", term):  # a unit may follow: 100km
        after = NOT_AFTER_NUMBER
    elif re.search("[0-9a-z]$", term):
        after = "(?![0-9a-z])"
    return re.compile(before + re.escape(term) + after)


def accuracy(questions: Sequence[Question], answers: Sequence[str], group: str) -> float | None:
    """Share of correct answers among the graded questions of a group; None if there are none."""
    correct = [
        is_correct(question, answer)
        for question, answer in zip(questions, answers, strict=True)
        if question.group == group and question.value is not None
    ]
    if not correct:
        return None
    return 1.0 if all(correct) else min(round(sum(correct) / len(correct), 4), 0.9999)  # 1 means all of them


def agreement(answers: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """Agreement of answers with another model's.

    Returns:
        identical: share of answers that are equal.
        similar: mean of difflib's ratio, twice the characters in matching blocks over the characters of both.
    """
    pairs = list(zip(answers, reference, strict=True))
    ratios = [SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs]
    return {
        "identical": round(sum(answer == other for answer, other in pairs) / len(pairs), 4),
        "similar": round(sum(ratios) / len(ratios), 4),
    }
