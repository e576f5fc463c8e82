"""How many questions of the miniature a model answers rightly that neither step 7 nor any choice of settings has seen.

    python -m benchmarks.fresh_questions --work-dir runs/mini                        its chat model
    python -m benchmarks.fresh_questions --work-dir runs/mini --model mini/base --no-exclude

Questions are drawn with another seed; those that stand in the work directory's questions.jsonl are left out. They are asked
under greedy decoding and under the model's own generation settings, and graded as step 7 grades.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from llmtuner.console import Timer, UserError, format_table, print0, print_header, run_cli
from llmtuner.eval.evaluate import FREE_FORM, QA_GROUPS, QA_MAX_NEW_TOKENS, language_confusion_by_group
from llmtuner.eval.generation import GENERATION_DEFAULTS, GREEDY, generate_answers
from llmtuner.eval.questions import Question, is_correct, parse_questions
from llmtuner.files import atomic_write_json
from llmtuner.report.checks import percent
from llmtuner.report.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "fresh_questions.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="right answers to questions that nothing was chosen by")
    parser.add_argument("--work-dir", type=Path, help="a run of all steps (default: as for the steps)")
    parser.add_argument("--model", type=Path, help="another model directory than the run's chat_model")
    parser.add_argument("--seed", default="exam", help="of the questions; any text")
    parser.add_argument("--no-exclude", action="store_true", help="also ask what is in questions.jsonl")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.work_dir:
        os.environ["WORK_DIR"] = str(options.work_dir.resolve())
    import constants
    import pipeline

    if constants.PROFILE_NAME != "mini":
        raise UserError("this benchmark asks the miniature's questions. Leave PROFILE unset.")
    pipeline.require_corpus()
    directory = options.model or constants.CHAT_MODEL_DIR
    if not options.model:
        pipeline.require_artifacts(directory)
    from llmtuner.model.loading import load_for_evaluation

    watch = Timer()
    questions = draw(options.seed, None if options.no_exclude else constants.QUESTIONS)
    model, tokenizer = load_for_evaluation(directory)
    results = {}
    candidates = {"greedy": GREEDY, "own settings": own_settings(directory)}
    if {**GENERATION_DEFAULTS, **candidates["own settings"]} == {**GENERATION_DEFAULTS, **GREEDY}:
        del candidates["own settings"]
    for name, settings in candidates.items():
        told = generate_answers(model, tokenizer, [one.question for one in questions], QA_MAX_NEW_TOKENS, settings)
        results[name] = {"settings": settings, "groups": graded(questions, told.texts)}
    print_header(f"{len(questions)} fresh questions to {directory}")
    rows = [
        [name, group.replace("_", " "), str(one["asked"]), str(one["right"]), percent(one["right"] / one["asked"]),
         percent(one["response_pass_rate"] or 0)]
        for name, own in results.items() for group, one in own["groups"].items()
    ]  # fmt: skip
    print0(format_table(["settings", "group", "asked", "right", "share", "in its language"], rows))
    atomic_write_json(
        options.output, {**environment(), "seconds": watch.seconds(), "seed": options.seed, "results": results}
    )


def draw(seed: str, questions_file: Path | None) -> list[Question]:
    """Questions with a value, of all groups, in phrasings that no instruction set uses, without those of a file."""
    from llmtuner.eval.questions import read_questions
    from mini import world

    drawn = parse_questions([*world.questions(world.build_generators(seed)), world.subjects()])
    known = {one.question for one in read_questions(questions_file)} if questions_file else set()
    return [one for one in drawn if one.group != FREE_FORM and one.question not in known]


def own_settings(directory: Path) -> dict[str, Any]:
    """A model's own generation settings, as far as step 7 chooses them."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    chosen = {name: getattr(config, name, None) for name in ("do_sample", *GENERATION_DEFAULTS)}
    return {name: value for name, value in chosen.items() if value is not None}


def graded(questions: list[Question], answers: list[str]) -> dict[str, dict[str, Any]]:
    """What was asked and right in each group, with the pass rates of language confusion."""
    confusion = language_confusion_by_group(questions, answers)
    found = {}
    for group in QA_GROUPS:
        marks = [is_correct(one, answer) for one, answer in zip(questions, answers, strict=True) if one.group == group]
        if marks:
            found[group] = {"asked": len(marks), "right": sum(marks), **confusion[group]}
    return found


if __name__ == "__main__":
    run_cli(main)
