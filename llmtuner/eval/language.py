"""Language confusion: whether an answer is in the language of its question, line by line (Marchisio et al., 2024).

The metric is that of arXiv 2406.20052, section 3. Its language identifier, a fastText model, is replaced by the characters
themselves, which tell Japanese, Chinese and English apart even on short lines:

- English: Latin letters, no Han and no kana. Other languages in Latin script are not told from English.
- Chinese: Han characters, no kana and no character that only Japanese uses (気, 駅).
- Japanese: kana. A line of Han characters alone is Japanese if one of them is used in Japanese only. It is Chinese if one is
  used in Chinese only (们, 这), if it has a Chinese function word, or if it is longer than a name.
  Otherwise (富士山, 青川) it is undecided, and counted separately.
- In Chinese and Japanese, English words must not outnumber characters.
- A line without letters (1,931), or of Latin symbols in a Japanese or Chinese answer (H2O), is undecided.
- Any other language is known by the scripts of a text in it, such as the question: a line needs letters of them, and English
  words must not outnumber these. Languages in Latin script are not told from English.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Languages(dict[str, str]):
    """English names by code: of the language that is added to a base model, then of those that it speaks and must not lose.

    Questions are grouped by these codes; two more groups are in the added language.
    """

    @property
    def added(self) -> str:
        """The code of the added language."""
        return next(iter(self))

    @property
    def name(self) -> str:
        """The name of the added language."""
        return self[self.added]

    @property
    def retained(self) -> tuple[str, ...]:
        """Codes of the languages that the base model speaks."""
        return tuple(self)[1:]

    @property
    def unseen(self) -> str:
        """The group of questions about facts that only texts in the other languages state."""
        return f"{self.added}_unseen"

    @property
    def free_form(self) -> str:
        """The group of requests for a reply of several sentences."""
        return f"{self.added}_free"

    @property
    def qa_groups(self) -> tuple[str, ...]:
        """The groups of short questions."""
        return (*self.retained, self.added, self.unseen)

    def listed(self, conjunction: str = "and", codes: Iterable[str] | None = None) -> str:
        """Names in one phrase: "Japanese, Chinese and English"."""
        *names, last = (self[code] for code in (self if codes is None else codes))
        return f"{', '.join(names)} {conjunction} {last}" if names else last


def with_article(name: str) -> str:
    """A language's name as an adjective: "a Japanese", "an Urdu"."""
    return f"{'an' if name.startswith(('A', 'E', 'I', 'O', 'Ur', 'Uz')) else 'a'} {name}"


LANGUAGES = Languages(ja="Japanese", zh="Chinese", en="English")


def languages_of(metrics: Mapping[str, Mapping[str, Any]]) -> Languages:
    """The languages of a run, from the metrics of its steps; runs of earlier versions added Japanese."""
    return next((Languages(found["languages"]) for found in metrics.values() if "languages" in found), LANGUAGES)


KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30fa\u30fc]")
HAN = re.compile(r"[\u3400-\u9fff]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
ENGLISH_WORD = re.compile(r"[A-Za-z][a-z]{2,}")  # not H2O, NaCl, DNA: symbols in every language
CHINESE_FUNCTION_WORD = re.compile(
    "[我你您她它们是很于吗呢吧啊这哪谁]"
)  # Japanese lines with one of these have kana, too
CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
MAX_NAME_LENGTH = 8  # Han characters; a longer Japanese line has a particle or an inflection in kana


def in_language(text: str, language: str, example: str = "") -> bool | None:
    """Whether a line is in a language; None if its characters do not decide.

    Args:
        example: a text in the language. Without one, any language but "ja", "zh" and "en" always passes.
    """
    text = unicodedata.normalize("NFKC", text)
    kana, han, latin = (pattern.search(text) is not None for pattern in (KANA, HAN, LATIN))
    other = any(char.isalpha() and not any(script.match(char) for script in (KANA, HAN, LATIN)) for char in text)
    if not (kana or han or latin or other):
        return None
    if language == "en":
        return latin and not (kana or han or other)
    english_words, characters = len(ENGLISH_WORD.findall(text)), HAN.findall(text)
    if language not in ("ja", "zh"):
        scripts, found = {*_scripts(example)}, _scripts(text)
        if not scripts - {"LATIN"}:
            return scripts.issuperset(found) if scripts else True
        return 0 < sum(script in scripts - {"LATIN"} for script in found) >= english_words
    if (other and not (kana or han)) or english_words > len(characters) + len(KANA.findall(text)):
        return False
    if not (kana or han):
        return None
    if language == "zh":
        return not kana and not any(map(_is_japanese_only, text))
    if kana:
        return True
    if CHINESE_FUNCTION_WORD.search(text) or any(map(_is_chinese_only, characters)):
        return False
    if any(map(_is_japanese_only, characters)):
        return True
    return None if len(characters) <= MAX_NAME_LENGTH else False


def _scripts(text: str) -> list[str]:
    """The script of each letter, which is the first word of its name."""
    return [unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha()]


def answers_in_language(text: str, language: str, example: str = "") -> bool | None:
    """Whether an answer is in a language: False if any line is not, None if no line decides."""
    verdicts = [verdict for verdict in _line_verdicts(text, language, example) if verdict is not None]
    return all(verdicts) if verdicts else None


def language_confusion(
    answers: Sequence[str], languages: Sequence[str], examples: Sequence[str] | None = None
) -> dict[str, Any]:
    """Pass rates of answers, each against the language it should be in.

    Args:
        examples: a text in the language of each, as `in_language` takes it.

    Returns:
        line_pass_rate: share of lines in the right language.
        response_pass_rate: share of answers without a line in another one (the paper's "line-level pass rate").
        lines, responses: their denominators, which leave out undecided_lines and undecided_responses.
        A rate is None if its denominator is 0.
    """
    rows = list(zip(answers, languages, examples or [""] * len(answers), strict=True))
    verdicts = {
        "line": [verdict for row in rows for verdict in _line_verdicts(*row)],
        "response": [answers_in_language(*row) for row in rows],
    }
    metrics: dict[str, Any] = {}
    for unit, values in verdicts.items():
        decided = [value for value in values if value is not None]
        metrics[f"{unit}_pass_rate"] = round(sum(decided) / len(decided), 4) if decided else None
        metrics |= {f"{unit}s": len(decided), f"undecided_{unit}s": len(values) - len(decided)}
    return metrics


def _line_verdicts(text: str, language: str, example: str) -> list[bool | None]:
    """`in_language` of each line, empty ones and code blocks left out."""
    return [in_language(line, language, example) for line in CODE_BLOCK.sub("\n", text).splitlines() if line.strip()]


@functools.cache
def _is_chinese_only(character: str) -> bool:
    """Whether a Han character is absent from JIS X 0208, the character set of Japanese."""
    return not _is_encodable(character, "shift_jis")


@functools.cache
def _is_japanese_only(character: str) -> bool:
    """Whether a Han character is absent from GB 2312 and Big5, the character sets of simplified and traditional Chinese."""
    return (
        HAN.match(character) is not None
        and _is_encodable(character, "shift_jis")
        and not (_is_encodable(character, "gb2312") or _is_encodable(character, "big5"))
    )


def _is_encodable(character: str, charset: str) -> bool:
    try:
        character.encode(charset)
    except UnicodeEncodeError:
        return False
    return True
