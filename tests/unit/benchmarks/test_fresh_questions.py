"""Fresh questions: none of step 7's, graded by group under the model's generation settings."""

import json

from benchmarks import fresh_questions


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
