"""Whether an answer is in the language of its question, line by line (language confusion; Marchisio et al., 2024).

The measure is that of arXiv 2406.20052, section 3; its language identifier, a fastText model, is replaced by the characters
themselves, which tell Japanese, Chinese and English apart on short lines too:

- English is Latin letters without any Han or kana. Another language in Latin script is not told from English.
- Chinese is Han characters without kana and without a character that only Japanese writes (気, 駅).
- Japanese holds kana. Neither of the two has more English words than characters. A line of Han characters alone is Chinese if it holds a character that only Chinese writes (们, 这),
  a Chinese grammatical word, or more Han characters than a name; it is Japanese if it holds one that only Japanese writes.
  Otherwise (富士山, 青川) nobody can say: the line is undecided, and counted apart.
- A line without letters (1,931), or of Latin symbols in a Japanese or Chinese answer (H2O), is undecided as well.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30fa\u30fc]")
HAN = re.compile(r"[\u3400-\u9fff]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
ENGLISH_WORD = re.compile(r"[A-Za-z][a-z]{2,}")  # H2O, NaCl and DNA are symbols in every language
CHINESE_GRAMMAR = re.compile("[我你您她它们是很于吗呢吧啊这哪谁]")  # a Japanese line with one of these has kana too
CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
LONGEST_NAME = 8  # Han characters; a longer Japanese line has a particle or an ending in kana


def in_language(text: str, language: str) -> bool | None:
    """Whether one line is in "ja", "zh" or "en"; None where its characters do not tell. Other languages always pass."""
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
        return not kana and not any(map(_only_japanese, text))
    if kana:
        return True
    if CHINESE_GRAMMAR.search(text) or any(map(_only_chinese, characters)):
        return False
    if any(map(_only_japanese, characters)):
        return True
    return None if len(characters) <= LONGEST_NAME else False


def answers_in_language(text: str, language: str) -> bool | None:
    """Whether an answer is in a language: False if one of its lines is not; None if none of them tells."""
    verdicts = [verdict for verdict in _line_verdicts(text, language) if verdict is not None]
    return all(verdicts) if verdicts else None


def language_confusion(answers: Sequence[str], languages: Sequence[str]) -> dict[str, Any]:
    """Pass rates of answers, each in the language it should be in.

    Returns:
        line_pass_rate, the share of lines in the right language; response_pass_rate, the share of answers without a line
        in another (the paper's "line-level pass rate"); and what they are shares of: lines and responses. What the
        characters do not tell counts in neither, but as undecided_lines and undecided_responses. Rates of nothing are None.
    """
    lines = [one for text, own in zip(answers, languages, strict=True) for one in _line_verdicts(text, own)]
    responses = [answers_in_language(text, own) for text, own in zip(answers, languages, strict=True)]
    found: dict[str, Any] = {}
    for name, verdicts in (("line", lines), ("response", responses)):
        decided = [verdict for verdict in verdicts if verdict is not None]
        found[f"{name}_pass_rate"] = round(sum(decided) / len(decided), 4) if decided else None
        found |= {f"{name}s": len(decided), f"undecided_{name}s": len(verdicts) - len(decided)}
    return found


def _line_verdicts(text: str, language: str) -> list[bool | None]:
    """`in_language` of each line that is neither empty nor code."""
    return [in_language(line, language) for line in CODE_BLOCK.sub("\n", text).splitlines() if line.strip()]


@functools.cache
def _only_chinese(character: str) -> bool:
    """Whether a Han character is missing in JIS X 0208, by which Japanese is written."""
    return not _is_in(character, "shift_jis")


@functools.cache
def _only_japanese(character: str) -> bool:
    """Whether a Han character is missing in GB 2312 and Big5, by which simplified and traditional Chinese are written."""
    return (
        HAN.match(character) is not None
        and _is_in(character, "shift_jis")
        and not (_is_in(character, "gb2312") or _is_in(character, "big5"))
    )


def _is_in(character: str, charset: str) -> bool:
    try:
        character.encode(charset)
    except UnicodeEncodeError:
        return False
    return True
