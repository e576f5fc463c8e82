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
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

LANGUAGES = {"ja": "Japanese", "zh": "Chinese", "en": "English"}
RETAINED_LANGUAGES = ("zh", "en")  # what the base model speaks and must not lose

KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30fa\u30fc]")
HAN = re.compile(r"[\u3400-\u9fff]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
ENGLISH_WORD = re.compile(r"[A-Za-z][a-z]{2,}")  # not H2O, NaCl, DNA: symbols in every language
CHINESE_FUNCTION_WORD = re.compile(
    "[我你您她它们是很于吗呢吧啊这哪谁]"
)  # Japanese lines with one of these have kana, too
CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
MAX_NAME_LENGTH = 8  # Han characters; a longer Japanese line has a particle or an inflection in kana


def in_language(text: str, language: str) -> bool | None:
    """Whether a line is in "ja", "zh" or "en"; None if its characters do not decide. Other languages always pass."""
    text = unicodedata.normalize("NFKC", text)
    kana, han, latin = (pattern.search(text) is not None for pattern in (KANA, HAN, LATIN))
    other = any(char.isalpha() and not any(script.match(char) for script in (KANA, HAN, LATIN)) for char in text)
    if not (kana or han or latin or other):
        return None
    if language == "en":
        return latin and not (kana or han or other)
    if language not in ("ja", "zh"):
        return True
    english_words, characters = len(ENGLISH_WORD.findall(text)), HAN.findall(text)
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


def answers_in_language(text: str, language: str) -> bool | None:
    """Whether an answer is in a language: False if any line is not, None if no line decides."""
    verdicts = [verdict for verdict in _line_verdicts(text, language) if verdict is not None]
    return all(verdicts) if verdicts else None


def language_confusion(answers: Sequence[str], languages: Sequence[str]) -> dict[str, Any]:
    """Pass rates of answers, each against the language it should be in.

    Returns:
        line_pass_rate: share of lines in the right language.
        response_pass_rate: share of answers without a line in another one (the paper's "line-level pass rate").
        lines, responses: their denominators, which leave out undecided_lines and undecided_responses.
        A rate is None if its denominator is 0.
    """
    pairs = list(zip(answers, languages, strict=True))
    verdicts = {
        "line": [verdict for answer, language in pairs for verdict in _line_verdicts(answer, language)],
        "response": [answers_in_language(answer, language) for answer, language in pairs],
    }
    metrics: dict[str, Any] = {}
    for unit, values in verdicts.items():
        decided = [value for value in values if value is not None]
        metrics[f"{unit}_pass_rate"] = round(sum(decided) / len(decided), 4) if decided else None
        metrics |= {f"{unit}s": len(decided), f"undecided_{unit}s": len(values) - len(decided)}
    return metrics


def _line_verdicts(text: str, language: str) -> list[bool | None]:
    """`in_language` of each line, empty ones and code blocks left out."""
    return [in_language(line, language) for line in CODE_BLOCK.sub("\n", text).splitlines() if line.strip()]


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
