"""Reads names and glyphs out of SVG figures."""

import xml.etree.ElementTree as ElementTree

from llmtuner.report import figures

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def names_of(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def glyphs_of_first_name(svg):
    """The shapes of the characters of the first name beside the bars."""
    root = ElementTree.fromstring(svg)
    shapes = {f"#{path.get('id')}": path.get("d") for path in root.iter(f"{SVG}path")}
    (group,) = [group for group in root.iter(f"{SVG}g") if (group.get("id") or "").endswith("-ytick_1")]
    characters = [
        use for one in group.iter(f"{SVG}g") if "-text_" in (one.get("id") or "") for use in one.iter(f"{SVG}use")
    ]
    return [shapes[use.get(LINK)] for use in characters]


def glyphs(name):
    return glyphs_of_first_name(figures.draw_svg(figures.initial_losses({name: 1.0}), "f", ""))
