"""The benchmarks' page: its tables are those of the results that are kept beside it."""

import json

import pytest

from benchmarks import fresh_questions, update_readme
from llmtuner.console import UserError


def test_the_page_says_what_the_results_say():
    text = (update_readme.HERE / "README.md").read_text(encoding="utf-8")
    assert len(update_readme.MARKER.findall(text)) >= 9
    assert update_readme.MARKER.sub(update_readme.fill, text) == text, "run python -m benchmarks.update_readme"


def test_fresh_questions_are_not_those_of_step_7(tmp_path):
    everything = fresh_questions.draw("a seed", None)
    asked = tmp_path / "questions.jsonl"
    rows = [{"group": "zh", "language": "zh", "question": one.question} for one in everything[:50]]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = {row["question"] for row in rows}
    assert fresh_questions.draw("a seed", asked) == [one for one in everything if one.question not in known]
    assert all(one.value and one.subject and len(one.all_subjects) > 500 for one in everything)


def test_fresh_questions_are_graded_by_group():
    questions = [one for one in fresh_questions.draw("a seed", None) if one.group in ("en", "ja")][::100]
    answers = [f"{one.subject[-1]}: {one.value}" if one.group == "en" else "" for one in questions]
    graded = fresh_questions.graded(questions, answers)
    assert {group: one["right"] for group, one in graded.items()} == {"en": graded["en"]["asked"], "ja": 0}
    assert graded["en"]["response_pass_rate"] == 1
    assert graded["ja"]["undecided_responses"] == graded["ja"]["asked"] > 0


def test_own_settings_are_those_of_generation_config(tmp_path):
    config = {"do_sample": False, "repetition_penalty": 1.1, "use_cache": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    own = fresh_questions.own_settings(tmp_path)
    assert (own["do_sample"], own["repetition_penalty"]) == (False, 1.1)
    assert "use_cache" not in own


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
