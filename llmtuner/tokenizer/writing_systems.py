"""Which characters a new token may and must contain, for each language that can be added."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from llmtuner.tokenizer.fast import SPACE

USED_ELSEWHERE = "also written in the other language"  # a reason of `rejection_reason`
ALL_CHARACTERS = "\n".join(map(chr, [*range(0xD800), *range(0xE000, 0x40000)]))  # separated, so that they form no runs
KANA = r"\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = r"\u3007\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@dataclass(frozen=True)
class WritingSystem:
    """The characters of a language, as the contents of regular expression classes.

    A new token cannot occur in another language if it contains a character that is not written there. So it must contain an
    `exclusive` character, or consist of `shared` ones of which at least one is outside the other language's `charset`.
    No new token contains a digit or a letter of another script.
    """

    exclusive: str
    """Written in this language only."""
    shared: str = ""
    """Also written in another language."""
    charset: str = "ascii"
    """Python's name of the character set in which the other language writes the shared characters."""
    marks: str = ""
    """Punctuation that may occur in a token beside an exclusive character."""

    @cached_property
    def exclusive_pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.exclusive}]")

    @cached_property
    def letter_pattern(self) -> re.Pattern[str]:
        """Characters of this language, exclusive and shared."""
        return re.compile(f"[{self.exclusive}{self.shared}]")

    @cached_property
    def token_pattern(self) -> re.Pattern[str]:
        """What a token may consist of; a space only at its start."""
        return re.compile(f"{SPACE}?[{self.exclusive}{self.shared}{re.escape(self.marks)}]*")

    @cached_property
    def shared_run_pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.shared}]+" if self.shared else r"(?!)")

    @cached_property
    def common(self) -> frozenset[str]:
        """The shared characters that are in the other language's `charset`."""
        found = []
        for character in self.shared_run_pattern.findall(ALL_CHARACTERS):
            try:
                character.encode(self.charset)
                found.append(character)
            except UnicodeEncodeError:
                pass
        return frozenset(found)

    def has_uncommon(self, text: str) -> bool:
        """Whether a text of shared characters contains one that the other language does not write."""
        return not self.common.issuperset(text)

    def uncommon_runs(self, text: str) -> list[str]:
        """The runs of shared characters in a text that contain one that the other language does not write."""
        return [run for run in self.shared_run_pattern.findall(text) if self.has_uncommon(run)]

    def rejection_reason(self, token: str) -> str | None:
        """Why a token may not be added, or None; one without an exclusive character must also be absent from other texts."""
        if not self.token_pattern.fullmatch(token):
            return "digit, letter or sign"
        if self.exclusive_pattern.search(token):
            return None
        body = token.removeprefix(SPACE)
        if not self.shared_run_pattern.fullmatch(body):
            return "digit, letter or sign"
        return None if self.has_uncommon(body) else USED_ELSEWHERE


WRITING_SYSTEMS = {
    # 々 and 〆 are Japanese; GB 2312 is the character set of simplified Chinese.
    "japanese": WritingSystem(
        exclusive=KANA + "々〆",
        shared=HAN,
        charset="gb2312",
        marks="、。，．・：；「」『』（）〈〉《》【】！？…‥―～〜()",
    ),
    "korean": WritingSystem(exclusive=r"\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e", marks=".,!?"),
    "thai": WritingSystem(exclusive=r"\u0e01-\u0e3a\u0e40-\u0e4f\u0e5a\u0e5b"),
}


def find_strings(strings: set[str], texts: Iterable[str], writing_system: WritingSystem) -> set[str]:
    """Returns those strings of shared characters that occur in texts of the other language.

    A line with an exclusive character quotes the language and is ignored.

    Args:
        strings: each contains a character that the other language does not write, so only few runs need a closer look.
        texts: read as a stream.
    """
    if not strings:
        return set()
    remaining: dict[int, set[str]] = {}
    for string in strings:
        remaining.setdefault(len(string), set()).add(string)
    found: set[str] = set()
    for text in texts:
        runs = writing_system.uncommon_runs(text)
        if runs and writing_system.exclusive_pattern.search(text):
            lines = (line for line in text.split("\n") if not writing_system.exclusive_pattern.search(line))
            runs = [run for line in lines for run in writing_system.uncommon_runs(line)]
        for run in runs:
            for length, targets in remaining.items():
                matches = targets.intersection(run[start : start + length] for start in range(len(run) - length + 1))
                targets -= matches
                found |= matches
    return found
