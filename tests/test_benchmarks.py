"""The benchmarks' page: its tables are those of the results that are kept beside it."""

import json

import pytest

from benchmarks import page
from llmtuner.console import InputError


def test_the_page_says_what_the_results_say():
    text = (page.HERE / "README.md").read_text(encoding="utf-8")
    assert len(page.PLACE.findall(text)) >= 9
    assert page.PLACE.sub(page.fill, text) == text, "run python -m benchmarks.page"


def test_a_table_is_written_anew_and_the_rest_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "HERE", tmp_path)
    results = {"results": {"8 at once": {"tokens_per_second": 1234.5, "ratio": 2.345, "other_answers": 3}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "generate_throughput.json").write_text(json.dumps(results))
    before = "above\n\n<!-- generate_throughput -->\n| old |\n| 1 |\n\nbelow\n\n<!-- peers pt -->\n\nend\n"
    (tmp_path / "README.md").write_text(before)
    page.main()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:3] == ["above", "", "<!-- generate_throughput -->"]
    assert lines[5:] == [
        "| 8 at once | 1,234 | 2.3 | 3 |",
        "",
        "below",
        "",
        "<!-- peers pt -->",
        page.MISSING,
        "",
        "end",
    ]
    (tmp_path / "README.md").write_text("<!-- peer pt -->\n")
    with pytest.raises(InputError, match="asks for the table 'peer pt'"):
        page.main()
