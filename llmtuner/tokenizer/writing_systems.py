"""Which characters a new piece may and must hold, for each language that can be added."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from llmtuner.tokenizer.fast import SPACE

USED_ELSEWHERE = "written in the other language too"  # why a piece is left out
ALL_CHARACTERS = "\n".join(map(chr, [*range(0xD800), *range(0xE000, 0x40000)]))  # apart, so that they form no runs
KANA = r"\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = r"\u3007\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@dataclass(frozen=True)
class WritingSystem:
    """The characters of a language, as the insides of regular expression classes.

    A new piece finds nothing to join in other languages if it holds a character that they do not write. So it must hold
    one of its `own`, or consist of `shared` ones of which at least one lies outside the other language's `charset`.
    No piece holds a digit or a letter of another script.
    """

    exclusive: str
    """Written in this language alone."""
    shared: str = ""
    """Written in another language too."""
    charset: str = "ascii"
    """Python's name of the character set in which the other language writes the shared characters."""
    marks: str = ""
    """Punctuation that may stand in a piece beside a character of its own."""

    @cached_property
    def exclusive_pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.exclusive}]")

    @cached_property
    def letter_pattern(self) -> re.Pattern[str]:
        """Characters of this language, its own and the shared ones."""
        return re.compile(f"[{self.exclusive}{self.shared}]")

    @cached_property
    def token_pattern(self) -> re.Pattern[str]:
        """What a piece may consist of; a blank only at its start."""
        return re.compile(f"{SPACE}?[{self.exclusive}{self.shared}{re.escape(self.marks)}]*")

    @cached_property
    def shared_run_pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{self.shared}]+" if self.shared else r"(?!)")

    @cached_property
    def common(self) -> frozenset[str]:
        """The shared characters that the other language writes as well."""
        found = []
        for character in self.shared_run_pattern.findall(ALL_CHARACTERS):
            try:
                character.encode(self.charset)
                found.append(character)
            except UnicodeEncodeError:
                pass
        return frozenset(found)

    def has_uncommon(self, text: str) -> bool:
        """Whether a text holds a shared character that the other language does not write."""
        return not self.common.issuperset(text)

    def rejection_reason(self, piece: str) -> str | None:
        """Why a piece may not be added, or None. One without an own character must also be unseen in other languages."""
        if not self.token_pattern.fullmatch(piece):
            return "digit, letter or sign"
        if self.exclusive_pattern.search(piece):
            return None
        body = piece.removeprefix(SPACE)
        if not self.shared_run_pattern.fullmatch(body):
            return "digit, letter or sign"
        return None if self.has_uncommon(body) else USED_ELSEWHERE


WRITING_SYSTEMS = {
    # 々 and 〆 are Japanese; GB 2312 is what simplified Chinese is written with.
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
    """Those of some strings of shared characters that occur in texts of the other language; read as a stream.

    A line that holds a character of the script's own quotes the language, and does not count.

    Args:
        strings: each holds a character that the other language does not write; so few places need a closer look.
    """
    if not strings:
        return set()
    waiting: dict[int, set[str]] = {}
    for string in strings:
        waiting.setdefault(len(string), set()).add(string)
    seen: set[str] = set()
    for text in texts:
        strange = [run for run in writing_system.shared_run_pattern.findall(text) if writing_system.has_uncommon(run)]
        if not strange:
            continue
        if writing_system.exclusive_pattern.search(text):
            lines = [line for line in text.split("\n") if not writing_system.exclusive_pattern.search(line)]
            strange = [
                run
                for line in lines
                for run in writing_system.shared_run_pattern.findall(line)
                if writing_system.has_uncommon(run)
            ]
        for run in strange:
            for length, wanted in waiting.items():
                found = wanted.intersection(run[start : start + length] for start in range(len(run) - length + 1))
                wanted -= found
                seen |= found
    return seen
