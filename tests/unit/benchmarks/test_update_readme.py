"""The benchmarks' page: its tables are those of the results that are kept beside it."""

import json

import pytest

from benchmarks import update_readme
from llmtuner.console import UserError


def test_the_page_says_what_the_results_say():
    text = (update_readme.HERE / "README.md").read_text(encoding="utf-8")
    assert len(update_readme.MARKER.findall(text)) >= 9
    assert update_readme.MARKER.sub(update_readme.fill, text) == text, "run python -m benchmarks.update_readme"


def test_a_table_is_written_anew_and_the_rest_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(update_readme, "HERE", tmp_path)
    results = {"results": {"8 at once": {"tokens_per_second": 1234.5, "ratio": 2.345, "changed_answers": 3}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "generate_throughput.json").write_text(json.dumps(results))
    before = "above\n\n<!-- generate_throughput -->\n| old |\n| 1 |\n\nbelow\n\n<!-- compare_trainers pt -->\n\nend\n"
    (tmp_path / "README.md").write_text(before)
    update_readme.main()
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert lines[:3] == ["above", "", "<!-- generate_throughput -->"]
    assert lines[5:] == [
        "| 8 at once | 1,234 | 2.3 | 3 |",
        "",
        "below",
        "",
        "<!-- compare_trainers pt -->",
        update_readme.MISSING,
        "",
        "end",
    ]
    (tmp_path / "README.md").write_text("<!-- compare pt -->\n")
    with pytest.raises(UserError, match="asks for the table 'compare pt'"):
        update_readme.main()
