"""Fonts that have the characters of the languages at hand, so that no label shows boxes, and labels as they can be drawn."""

import functools
import unicodedata
from contextlib import suppress
from typing import Any

from matplotlib import font_manager

from llmtuner.console import print0

COLUMNS = 24  # of a name; a longer one loses its middle
CJK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "Source Han Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "TakaoGothic",
    "TakaoPGothic",
    "VL Gothic",
    "Hiragino Sans",
    "Hiragino Kaku Gothic ProN",
    "Yu Gothic",
    "Meiryo",
    "MS Gothic",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
)
CJK_PROBE = "日本漢字かなカナ"


@functools.cache
def fonts() -> dict[str, Any]:
    """DejaVu Sans, which matplotlib brings along, and a font with Japanese and Chinese characters if there is one."""
    found = {"DejaVu Sans": font_manager.get_font(font_manager.findfont("DejaVu Sans"))}
    for listed in (_known_fonts, _new_fonts):  # matplotlib's list is older than a font that was installed since
        for entry in sorted(listed(), key=_preference):
            face = _face(entry.fname)
            if face and all(face.get_char_index(ord(char)) for char in CJK_PROBE):
                return {**found, entry.name: face}
    return found


def _known_fonts() -> list[Any]:
    # The last resort, which matplotlib brings along too, draws a box for every character.
    return [entry for entry in font_manager.fontManager.ttflist if "Last Resort" not in entry.name]


def _new_fonts() -> list[Any]:
    manager = font_manager.fontManager
    known = len(manager.ttflist)
    for path in sorted({*font_manager.findSystemFonts()} - {entry.fname for entry in manager.ttflist}):
        with suppress(OSError, RuntimeError):  # not a font that can be drawn
            manager.addfont(path)
    return manager.ttflist[known:]


def _preference(entry: Any) -> tuple[int, str, str]:
    return CJK_FONTS.index(entry.name) if entry.name in CJK_FONTS else len(CJK_FONTS), entry.name, entry.fname


def _face(path: str) -> Any:
    with suppress(OSError, RuntimeError):  # gone or damaged since the list was written
        return font_manager.get_font(path)
    return None


def label(name: str) -> str:
    """A name that can be drawn: a character that no font has is written as U+XXXX; a long name loses its middle."""
    faces = fonts().values()
    drawn = [char if any(face.get_char_index(ord(char)) for face in faces) else f"U+{ord(char):04X} " for char in name]
    if max(map(len, drawn), default=0) > 1:
        _say_missing()
    text, keep = "".join(drawn), len(drawn)
    while _width(text) > COLUMNS:
        keep -= 1
        text = "".join([*drawn[: keep - keep // 2], "…", *drawn[len(drawn) - keep // 2 :]])
    return text.strip()


@functools.cache
def _say_missing() -> None:
    print0(
        "The figures write some characters of names as U+XXXX: no font of this machine has them. For Japanese "
        "and Chinese install one, such as Debian's package fonts-noto-cjk."
    )


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
