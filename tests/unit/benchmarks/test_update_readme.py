"""The benchmarks' pages: their tables are those of the results that are kept beside them."""

import json

import pytest

from benchmarks import common, update_readme
from llmtuner.console import UserError


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        ("benchmarks/README.md", 15),
        ("benchmarks/scaling.md", 6),
        ("docs/memory.md", 4),
        ("docs/gpu.md", 7),
        ("docs/evidence.md", 2),
    ],
)
def test_tables_of_a_page_match_the_results(page, tables):
    assert page in update_readme.PAGES
    text = (common.ROOT / page).read_text(encoding="utf-8")
    assert len(update_readme.MARKER.findall(text)) >= tables
    assert update_readme.MARKER.sub(update_readme.fill, text) == text, "run python -m benchmarks.update_readme"
    assert update_readme.MISSING not in text


def test_a_table_is_rewritten_and_the_rest_is_left_alone(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    monkeypatch.setattr(update_readme, "PAGES", (str(page),))
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    results = {"results": {"8 at once": {"tokens_per_second": 1234.5, "ratio": 2.345, "changed_answers": 3}}}
    (tmp_path / "generate_throughput.json").write_text(json.dumps(results))
    page.write_text(
        "above\n\n<!-- generate_throughput -->\n| old |\n| 1 |\n\nbelow\n\n<!-- compare_trainers pt -->\n\nend\n"
    )
    update_readme.main()
    lines = page.read_text().splitlines()
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
    page.write_text("<!-- compare pt -->\n")
    with pytest.raises(UserError, match="asks for the table 'compare pt'"):
        update_readme.main()


def test_ratio_column_has_median_and_range_and_missing_values_are_empty_cells_or_no_column():
    results = {"ours": {"speedup": 1.0, "speedup_per_round": [1.0]}}
    results["theirs"] = {"speedup": 2.0, "speedup_per_round": [1.5, 2.0, 3.25], "seconds": 1234.5}
    table = update_readme.make_table(results, "- ours_/_theirs=speedup loss=loss:.1f held-out_time=seconds:,.1f")
    assert table.splitlines() == [
        "|  | ours / theirs | held-out time |",
        "| --- | ---: | ---: |",
        "| ours |  |  |",
        "| theirs | **2.00** (1.50 to 3.25) | 1,234.5 |",
    ]
