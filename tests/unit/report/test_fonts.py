"""Figures never draw a box for a character."""

import dataclasses

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from llmtuner.report import figures, fonts
from tests.unit.report.svg import glyphs, glyphs_of_first_name, names_of


@pytest.fixture
def fonts_anew():
    """The search for fonts begins anew, and again after the test."""
    caches = (fonts.fonts, fonts._say_missing)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def hidden_fonts(fonts_anew, monkeypatch):
    """matplotlib's list has its own fonts alone."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])


SYSTEM_FONTS = font_manager.findSystemFonts
CJK_FILE = next(
    (path for path in sorted(SYSTEM_FONTS()) if (face := fonts._face(path)) and face.get_char_index(ord("か"))), ""
)
needs_cjk = pytest.mark.skipif(not CJK_FILE, reason="no font with Japanese characters (fonts-noto-cjk)")


@needs_cjk
def test_japanese_names_are_no_boxes():
    families = [*fonts.fonts()]
    missing = "\U000e0fff"  # no font has it: what is drawn is the box
    boxes = set()
    for family in families:
        for last_resort in (True, False):
            with matplotlib.rc_context({"font.family": [family], "font.enable_last_resort": last_resort}):
                figure = Figure()
                figure.add_subplot().set_yticks([0], [missing])
            with matplotlib.rc_context({"font.enable_last_resort": last_resort}):
                boxes.update(glyphs_of_first_name(figures._svg.__wrapped__(figure, "f", "")))
    shapes = glyphs("日本かなカナ体")
    assert boxes
    assert len(shapes) == len({*shapes}) == 7
    assert not boxes.intersection(shapes)


def test_without_a_font_characters_are_written_by_number(hidden_fonts, capsys):
    figure = figures.initial_losses({"日本_ja": 2.0, "中文": 1.0})
    assert names_of(figure) == ["U+65E5 U+672C _ja", "U+4E2D U+6587"]
    said = capsys.readouterr().out
    assert said.count("fonts-noto-cjk") == 1
    assert "U+XXXX" in said
    face = fonts.fonts()["DejaVu Sans"]
    assert all(face.get_char_index(ord(char)) for name in names_of(figure) for char in name)


def test_nothing_is_said_about_fonts_that_nothing_needs(hidden_fonts, capsys):
    assert names_of(figures.initial_losses({"wiki": 2.0})) == ["wiki"]
    assert not capsys.readouterr().out


@needs_cjk
def test_font_that_was_installed_after_matplotlib_listed_them_is_found(hidden_fonts, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", SYSTEM_FONTS)
    assert len(fonts.fonts()) == 2
    assert names_of(figures.initial_losses({"日本": 2.0})) == ["日本"]


def test_font_that_is_gone_is_passed_over(hidden_fonts, tmp_path):
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    entry = font_manager.fontManager.ttflist[0]
    font_manager.fontManager.ttflist[:0] = [
        dataclasses.replace(entry, fname=str(path), name="Noto Sans CJK JP")
        for path in (damaged, tmp_path / "gone.ttf")
    ]
    assert [*fonts.fonts()] == ["DejaVu Sans"]


@needs_cjk
def test_well_known_fonts_come_first(hidden_fonts):
    entry = font_manager.fontManager.ttflist[0]
    font_manager.fontManager.ttflist += [
        dataclasses.replace(entry, fname=CJK_FILE, name=name) for name in ("AAA", "MS Gothic", "IPAexGothic")
    ]
    assert [*fonts.fonts()] == ["DejaVu Sans", "IPAexGothic"]
