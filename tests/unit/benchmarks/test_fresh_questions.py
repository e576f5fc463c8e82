"""Fresh questions: none of step 7's, graded by group under the model's generation settings."""

import json

from benchmarks import fresh_questions


def test_fresh_questions_are_not_those_of_step_7(tmp_path):
    everything = fresh_questions.draw("a seed", None)
    asked = tmp_path / "questions.jsonl"
    rows = [{"group": "zh", "language": "zh", "question": question.question} for question in everything[:50]]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = {row["question"] for row in rows}
    assert fresh_questions.draw("a seed", asked) == [
        question for question in everything if question.question not in known
    ]
    assert all(question.value and question.subject and len(question.all_subjects) > 400 for question in everything)


def test_fresh_questions_are_graded_by_group():
    questions = [question for question in fresh_questions.draw("a seed", None) if question.group in ("en", "ja")][::100]
    answers = [f"{question.subject[-1]}: {question.value}" if question.group == "en" else "" for question in questions]
    graded = fresh_questions.grade(questions, answers)
    assert {group: counts["right"] for group, counts in graded.items()} == {"en": graded["en"]["asked"], "ja": 0}
    assert graded["en"]["response_pass_rate"] == 1
    assert graded["ja"]["undecided_responses"] == graded["ja"]["asked"] > 0


def test_own_settings_are_those_of_generation_config(tmp_path):
    config = {"do_sample": False, "repetition_penalty": 1.1, "use_cache": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    own = fresh_questions.generation_settings(tmp_path)
    assert (own["do_sample"], own["repetition_penalty"]) == (False, 1.1)
    assert "use_cache" not in own
