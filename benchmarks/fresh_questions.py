"""Accuracy on questions about the miniature that neither step 7 nor any choice of settings has seen.

    python -m benchmarks.fresh_questions --work-dir runs/mini                        its chat model
    python -m benchmarks.fresh_questions --work-dir runs/mini --model mini/base --no-exclude

Questions are drawn with another seed; those in the work directory's questions.jsonl are left out. They are asked with greedy
decoding and with the model's generation settings, and graded as step 7 grades.
"""

from pathlib import Path

from benchmarks.common import Values, make_parser, print_results, save_results, use_work_dir
from llmtuner.console import Timer, run_cli
from llmtuner.eval.evaluate import QA_MAX_NEW_TOKENS, language_confusion_by_group
from llmtuner.eval.generation import GENERATION_DEFAULTS, GREEDY, generate_answers
from llmtuner.eval.language import LANGUAGES
from llmtuner.eval.questions import Question, is_correct, parse_questions


def main() -> None:
    parser = make_parser(__doc__, "fresh_questions.json", work_dir=None)
    parser.add_argument("--model", type=Path, help="another model directory than the run's chat_model")
    parser.add_argument("--seed", default="exam", help="of the questions; any text")
    parser.add_argument("--no-exclude", action="store_true", help="also ask what is in questions.jsonl")
    options = parser.parse_args()
    use_work_dir(options.work_dir, *(() if options.model else ("CHAT_MODEL_DIR",)))
    import constants
    from llmtuner.model.loading import load_for_evaluation

    timer, directory = Timer(), options.model or constants.CHAT_MODEL_DIR
    questions = draw(options.seed, None if options.no_exclude else constants.QUESTIONS)
    model, tokenizer = load_for_evaluation(directory)
    candidates = {"greedy": GREEDY, "own settings": generation_settings(directory)}
    if {**GENERATION_DEFAULTS, **candidates["own settings"]} == {**GENERATION_DEFAULTS, **GREEDY}:
        del candidates["own settings"]
    results: dict[str, Values] = {}
    lines = {}
    for name, settings in candidates.items():
        asked = [question.question for question in questions]
        answers = generate_answers(model, tokenizer, asked, QA_MAX_NEW_TOKENS, settings).texts
        results[name] = {"settings": settings, "groups": grade(questions, answers)}
        for group, counts in results[name]["groups"].items():
            ratios = {
                "accuracy": counts["right"] / counts["asked"],
                "in_its_language": counts["response_pass_rate"] or 0,
            }
            lines[f"{name}: {group.replace('_', ' ')}"] = {**counts, **ratios}
    print_results(f"{len(questions)} fresh questions to {directory}", lines)
    save_results(options.output, {"seconds": timer.seconds(), "seed": options.seed, "results": results})


def draw(seed: str, questions_file: Path | None) -> list[Question]:
    """Questions with a value, of all groups, in phrasings that no instruction set uses, without those of a file."""
    from llmtuner.eval.questions import read_questions
    from mini import world

    drawn = parse_questions([*world.questions(world.build_generators(seed)), world.subjects()])
    known = {question.question for question in read_questions(questions_file)} if questions_file else set()
    return [question for question in drawn if question.group != LANGUAGES.free_form and question.question not in known]


def generation_settings(directory: Path) -> Values:
    """A model's generation settings, as far as step 7 chooses them."""
    from transformers import GenerationConfig

    config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    chosen = {name: getattr(config, name, None) for name in ("do_sample", *GENERATION_DEFAULTS)}
    return {name: value for name, value in chosen.items() if value is not None}


def grade(questions: list[Question], answers: list[str]) -> dict[str, Values]:
    """Numbers of questions asked and answered right in each group, with the pass rates of language confusion."""
    confusion = language_confusion_by_group(questions, answers)
    graded = {}
    for group in LANGUAGES.qa_groups:
        pairs = zip(questions, answers, strict=True)
        marks = [is_correct(question, answer) for question, answer in pairs if question.group == group]
        if marks:
            graded[group] = {"asked": len(marks), "right": sum(marks), **confusion[group]}
    return graded


if __name__ == "__main__":
    run_cli(main)
