"""The pages of report and comparison as a browser lays them out."""

import json

import pytest

from llmtuner.report import page
from llmtuner.report.compare import write_comparison
from llmtuner.report.page import write_report
from tests.helpers import opened
from tests.reports import ANSWERS, ATTACK, LOG, METRICS, STEPS, put, save_work_dir


@pytest.fixture
def work_dir(tmp_path):
    """A run with everything."""
    put(tmp_path, METRICS)
    for name in page.RUNS.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
        (tmp_path / name / "training_args.json").write_text(
            json.dumps({"stage": "pt", "dataset": ["日本語", ATTACK], "bf16": True})
        )
    lines = "".join(json.dumps(row, ensure_ascii=False).replace("\ud800", r"\ud800") + "\n" for row in ANSWERS)
    (tmp_path / "answers.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------- browser
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (600, "light"), (390, "light"), (390, "dark")]
)
def test_in_a_browser(browser, work_dir, width, scheme):
    long = {"unbroken": "x" * 500, "日本語": "長" * 300}
    path = write_report(work_dir, STEPS, {"facts": long, "ｆ" * 200: {"a" * 300: "b"}})
    tab, problems, requests = opened(browser, path.as_uri(), width, scheme)
    for summary in tab.locator("summary").all():
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    whole = "[...document.querySelectorAll('.models, .cards')].every(t => t.scrollWidth <= t.parentElement.clientWidth)"
    assert width == 600 or tab.evaluate(whole)
    assert tab.locator("svg[role=img]").count() == tab.locator("figure").count() >= 8
    assert all(
        box["width"] > 200 and box["height"] > 50 for box in (svg.bounding_box() for svg in tab.locator("svg").all())
    )
    if width == 390:  # the smallest text of a drawing has 11 points, of which there are 331.2 across
        assert min(svg.bounding_box()["width"] for svg in tab.locator("figure svg").all()) >= 331.2
    columns = {round(figure.bounding_box()["x"]) for figure in tab.locator("figure").all()}
    assert len(columns) == (3 if width == 1280 else 1)
    assert tab.get_by_text("Before and after", exact=True).is_visible()
    assert tab.locator(".models tbody tr:not(.group)").count() == 13
    assert tab.locator(".answers dd").count() == 16
    assert tab.get_by_role("heading", name=ATTACK).is_visible()
    assert tab.locator("script").count() == 0
    assert tab.evaluate(LEAST_CONTRAST) >= 4.5
    assert requests == [path.as_uri()]
    assert problems == []
    tab.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_comparison_in_a_browser(browser, tmp_path, width):
    directories = [tmp_path / name for name in ("a" * 60, "日本語" * 9, "c")]
    for place, directory in enumerate(directories):
        save_work_dir(directory, 30 + place, (2.0, 1.0, 0.5 + place), lora_rank=place)
    path = write_comparison(directories, tmp_path / "compare.html")
    tab, problems, requests = opened(browser, path.as_uri(), width)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    whole = "[...document.querySelectorAll('table')].every(t => t.scrollWidth <= t.parentElement.clientWidth)"
    assert tab.evaluate(whole)
    assert tab.locator("svg[role=img]").count() == 3
    assert tab.locator("script").count() == 0
    assert tab.evaluate(LEAST_CONTRAST) >= 4.5
    assert (requests, problems) == ([path.as_uri()], [])
    tab.close()


# The least contrast (WCAG 2.2, 1.4.3) of a text and the first colour behind it, outside of drawings.
LEAST_CONTRAST = """() => {
  const light = colour => colour.slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const solid = colour => colour.length >= 3 && (colour.length === 3 || colour[3] === 1);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (solid(colour)) return colour;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let least = 21;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("svg")) continue;
    const [low, high] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => a - b);
    least = Math.min(least, (high + 0.05) / (low + 0.05));
  }
  return least;
}"""
