"""Which characters a new piece may and must hold, for each language that can be added."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from llmtuner.tokenizer.fast import SPACE

SHARED = "written in the other language too"  # why a piece is left out
ALPHABET = "\n".join(map(chr, [*range(0xD800), *range(0xE000, 0x40000)]))  # apart, so that they form no runs
KANA = r"\u3041-\u3096\u3099-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN = r"\u3007\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@dataclass(frozen=True)
class Script:
    """The characters of a language, as the insides of regular expression classes.

    A new piece finds nothing to join in other languages if it holds a character that they do not write. So it must hold
    one of its `own`, or consist of `shared` ones of which at least one lies outside the other language's `charset`.
    No piece holds a digit or a letter of another script.
    """

    own: str
    """Written in this language alone."""
    shared: str = ""
    """Written in another language too."""
    charset: str = "ascii"
    """Python's name of the character set in which the other language writes the shared characters."""
    marks: str = ""
    """Punctuation that may stand in a piece beside a character of its own."""

    @cached_property
    def has_own(self) -> re.Pattern[str]:
        return re.compile(f"[{self.own}]")

    @cached_property
    def letters(self) -> re.Pattern[str]:
        """Characters of this language, its own and the shared ones."""
        return re.compile(f"[{self.own}{self.shared}]")

    @cached_property
    def writable(self) -> re.Pattern[str]:
        """What a piece may consist of; a blank only at its start."""
        return re.compile(f"{SPACE}?[{self.own}{self.shared}{re.escape(self.marks)}]*")

    @cached_property
    def shared_run(self) -> re.Pattern[str]:
        return re.compile(f"[{self.shared}]+" if self.shared else r"(?!)")

    @cached_property
    def foreign(self) -> frozenset[str]:
        """The shared characters that the other language writes as well."""
        found = []
        for character in self.shared_run.findall(ALPHABET):
            try:
                character.encode(self.charset)
                found.append(character)
            except UnicodeEncodeError:
                pass
        return frozenset(found)

    def stranger(self, text: str) -> bool:
        """Whether a text holds a shared character that the other language does not write."""
        return not self.foreign.issuperset(text)

    def problem(self, piece: str) -> str | None:
        """Why a piece may not be added, or None. One without an own character must also be unseen in other languages."""
        if not self.writable.fullmatch(piece):
            return "digit, letter or sign"
        if self.has_own.search(piece):
            return None
        body = piece.removeprefix(SPACE)
        if not self.shared_run.fullmatch(body):
            return "digit, letter or sign"
        return None if self.stranger(body) else SHARED


SCRIPTS = {
    # 々 and 〆 are Japanese; GB 2312 is what simplified Chinese is written with.
    "japanese": Script(
        own=KANA + "々〆", shared=HAN, charset="gb2312", marks="、。，．・：；「」『』（）〈〉《》【】！？…‥―～〜()"
    ),
    "korean": Script(own=r"\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e", marks=".,!?"),
    "thai": Script(own=r"\u0e01-\u0e3a\u0e40-\u0e4f\u0e5a\u0e5b"),
}


def strings_seen(strings: set[str], texts: Iterable[str], script: Script) -> set[str]:
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
        strange = [run for run in script.shared_run.findall(text) if script.stranger(run)]
        if not strange:
            continue
        if script.has_own.search(text):
            lines = [line for line in text.split("\n") if not script.has_own.search(line)]
            strange = [run for line in lines for run in script.shared_run.findall(line) if script.stranger(run)]
        for run in strange:
            for length, wanted in waiting.items():
                found = wanted.intersection(run[start : start + length] for start in range(len(run) - length + 1))
                wanted -= found
                seen |= found
    return seen
