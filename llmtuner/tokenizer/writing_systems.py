"""Which characters a new token may and must contain, for Japanese and for every script of Unicode."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import regex

from llmtuner.console import UserError
from llmtuner.tokenizer.chatglm3 import SPACE

USED_ELSEWHERE = "also written in the other language"  # a reason of `rejection_reason`
MAX_SEEN_RUNS = 1_000_000  # about 100 MB
ALL_CHARACTERS = "\n".join(map(chr, [*range(0xD800), *range(0xE000, 0x40000)]))  # separated, so that they form no runs
KANA = r"\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
JOINERS = "\u200b\u200c\u200d"  # between words of Khmer, inside words of Persian and Hindi
ASCII_MARKS = ".,!?"
HAN = r"\u3007\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@dataclass(frozen=True)
class WritingSystem:
    """The characters of a language, as the contents of regular expression classes.

    A new token cannot occur in another language if it contains a character that is not written there. So it must contain an
    `exclusive` character, or consist of `shared` ones, of which at least one is not `common`, and be absent from texts of
    the other languages (`find_strings`). No new token contains a digit or a letter of another script.
    """

    exclusive: str = ""
    """Written in this language only."""
    shared: str = ""
    """Also written in another language."""
    charset: str | None = None
    """Python's name of the character set of the other language, if one set holds nearly all that it writes. What is outside is
    rare there, so that its texts need not be endless, and few of their substrings have to be looked up."""
    marks: str = ""
    """Punctuation and joiners that may occur in a token beside an exclusive character."""

    @cached_property
    def exclusive_pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.exclusive}]" if self.exclusive else r"(?!)")

    @cached_property
    def letter_pattern(self) -> re.Pattern[str]:
        """Characters of this language, exclusive and shared."""
        return re.compile(f"[{self.exclusive}{self.shared}]")

    @cached_property
    def token_pattern(self) -> re.Pattern[str]:
        """What a token may consist of; a space only at its start, as sentencepiece writes it or as it is."""
        return re.compile(f"[{SPACE} ]?[{self.exclusive}{self.shared}{re.escape(self.marks)}]*")

    @cached_property
    def shared_run_pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.shared}]+" if self.shared else r"(?!)")

    @cached_property
    def common(self) -> frozenset[str]:
        """Shared characters that do not make a string the language's own: those of `charset`, or marks without a letter."""
        return frozenset(
            character for character in self.shared_run_pattern.findall(ALL_CHARACTERS) if self._is_common(character)
        )

    def _is_common(self, character: str) -> bool:
        if not self.charset:
            return not character.isalpha()
        try:
            character.encode(self.charset)
        except UnicodeEncodeError:
            return False
        return True

    def has_uncommon(self, text: str) -> bool:
        """Whether a text of shared characters contains one that is not common."""
        return not self.common.issuperset(text)

    def uncommon_runs(self, text: str) -> list[str]:
        """The runs of shared characters in a text that contain one that is not common."""
        return [run for run in self.shared_run_pattern.findall(text) if self.has_uncommon(run)]

    def rejection_reason(self, token: str) -> str | None:
        """Why a token may not be added, or None; one without an exclusive character must also be absent from other texts."""
        if not self.token_pattern.fullmatch(token):
            return "digit, letter or sign"
        if self.exclusive_pattern.search(token):
            return None
        body = token.lstrip(SPACE + " ")
        if not self.shared_run_pattern.fullmatch(body):
            return "digit, letter or sign"
        return None if self.has_uncommon(body) else USED_ELSEWHERE


class _WritingSystems(dict[str, WritingSystem]):
    """Adds the script of Unicode that is asked for: "khmer", "tai_tham"."""

    def __missing__(self, name: str) -> WritingSystem:
        self[name] = _unicode_script("hangul" if name == "korean" else name)
        return self[name]


SHARED_SCRIPTS = "aжع中"  # a letter of each; many languages write them, so texts of the others have to decide
WRITING_SYSTEMS = _WritingSystems(
    # 々 and 〆 are Japanese; GB 2312 is the character set of simplified Chinese.
    japanese=WritingSystem(
        exclusive=KANA + "々〆",
        shared=HAN,
        charset="gb2312",
        marks="、。，．・：；「」『』（）〈〉《》【】！？…‥―～〜()",
    ),
)


def _unicode_script(name: str) -> WritingSystem:
    """The characters of a script: "khmer"; "shared devanagari" for Marathi beside Hindi, where texts have to decide.

    A script's characters are its own by Unicode's property Script, and its marks those that Script_Extensions add, such as
    the danda of Indian scripts. Numerals are left out.

    Raises:
        UserError: for a name that is neither this project's nor Unicode's; lists near ones.
    """
    script = name.removeprefix("shared ")
    if not _is_script(script):
        known = sorted({"japanese", "korean", *_script_names()})
        near = difflib.get_close_matches(script.lower(), known, 5) or ["japanese", "korean", "khmer", "latin"]
        raise UserError(
            f"the writing system {name!r} is unknown: it is japanese, korean or a script's name in Unicode, not a language's. "
            f"Set `writing_system` to another name, such as {', '.join(near)}."
        )
    if script != name or regex.search(rf"\p{{Script={script}}}", SHARED_SCRIPTS):
        marks = rf"[\p{{M}}&&[\p{{scx={script}}}\u0300-\u036f]]|[{JOINERS}]"
        return WritingSystem(shared=_ranges(rf"[\p{{sc={script}}}&&[\p{{L}}\p{{M}}〇]]|{marks}"))
    marks = "".join(_find_all(rf"[\p{{scx={script}}}--\p{{sc={script}}}--[\p{{N}}\s]]"))
    return WritingSystem(exclusive=_ranges(rf"[\p{{sc={script}}}--\p{{N}}]"), marks=marks + ASCII_MARKS + JOINERS)


def _is_script(name: str) -> bool:
    """Whether Unicode has letters of this script; "common" and "unknown" are names, too."""
    try:
        pattern = regex.compile(rf"[\p{{Script={name}}}&&\p{{L}}--\p{{Script=common}}]", regex.VERSION1)
    except regex.error:
        return False
    return "}" not in name and pattern.search(ALL_CHARACTERS) is not None


def _script_names() -> Iterator[str]:
    """Names of scripts, which are the first one or two words of their letters' names."""
    words = (unicodedata.name(letter, "").lower().split() for letter in ALL_CHARACTERS if letter.isalpha())
    names = {"_".join(name[:count]) for name in words for count in (1, 2)}
    return filter(_is_script, names)


def _find_all(pattern: str) -> list[str]:
    """All characters that match a pattern, set operations included."""
    return regex.findall(pattern, ALL_CHARACTERS, regex.VERSION1)


def _ranges(pattern: str) -> str:
    """The characters that match a pattern, as the contents of a class of Python's `re`, which knows no scripts."""
    found = [*map(ord, _find_all(pattern))]
    starts = [code for code, before in zip(found, [-1, *found], strict=False) if code != before + 1]
    ends = [code for code, after in zip(found, [*found[1:], -1], strict=True) if code + 1 != after]
    return "".join(f"\\U{start:08x}-\\U{end:08x}" for start, end in zip(starts, ends, strict=True))


def partial_bytes(writing_system: WritingSystem) -> set[bytes]:
    """The incomplete UTF-8 sequences of at least two bytes that begin no characters but exclusive ones.

    Where a base spells a character byte by byte, tokens of such bytes are as harmless as the character: E1 9E begins Khmer
    letters only. E3 83 is not among those of Japanese, for it also begins ・, which Chinese writes. Code points that are not
    assigned do not count, nor do a script's numerals, which stand in no other text either.
    """
    exclusive: set[bytes] = set()
    other: set[bytes] = set()
    for character in _find_all(r"[\P{Cn}--[\p{N}--\p{sc=Common}]]"):
        encoded = character.encode()
        prefixes = (encoded[:length] for length in range(2, len(encoded)))
        (exclusive if writing_system.exclusive_pattern.match(character) else other).update(prefixes)
    return exclusive - other


def find_strings(strings: set[str], texts: Iterable[str], writing_system: WritingSystem) -> set[str]:
    """Returns those strings of shared characters that occur in texts of the other language.

    A line with an exclusive character quotes the language and is ignored.

    Args:
        strings: each contains a character that is not common.
        texts: read as a stream.
    """
    if not strings:
        return set()
    remaining: dict[int, set[str]] = {}
    for string in strings:
        remaining.setdefault(len(string), set()).add(string)
    found: set[str] = set()
    seen: set[str] = set()  # words recur, and a text's unique ones are few
    for text in texts:
        runs = set(writing_system.uncommon_runs(text))
        if runs and writing_system.exclusive_pattern.search(text):
            lines = (line for line in text.split("\n") if not writing_system.exclusive_pattern.search(line))
            runs = {run for line in lines for run in writing_system.uncommon_runs(line)}
        for run in runs - seen:
            for length, targets in remaining.items():
                matches = targets.intersection(run[start : start + length] for start in range(len(run) - length + 1))
                targets -= matches
                found |= matches
        seen |= runs
        if len(seen) > MAX_SEEN_RUNS:
            seen.clear()
    return found
