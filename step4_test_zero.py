"""Step 4: the zero test proves that the base's languages are untouched; the added one means nothing to the model yet.

    python step4_test_zero.py

Asks base and Zero model the same questions, compares their answers character by character, and measures bits per byte
and tokens per character. Runs on a GPU if there is one; one model is in memory at a time.
"""

import argparse

import constants
import pipeline
from constants import BASE_MODEL_DIR, LANGUAGES, PROFILE, ZERO_DIR
from llmtuner.console import format_table, print0, print_header, run_cli, verdict

QUESTIONS_PER_GROUP = 60
NUM_EXAMPLES = 3


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pipeline.start_step("step4", ZERO_DIR)
    pipeline.require_base_model()
    pipeline.require_corpus()

    from llmtuner.eval.bits_per_byte import bpb_by_language, format_bpb_table
    from llmtuner.eval.generation import generate_answers
    from llmtuner.eval.questions import is_correct, read_questions
    from llmtuner.model.loading import choose_placement, load_for_evaluation
    from llmtuner.tokenizer.encoding import encode_batch

    questions = [
        question for question in read_questions(constants.QUESTIONS, QUESTIONS_PER_GROUP) if question.group in LANGUAGES
    ]
    texts = {language: pipeline.held_out_texts(language) for language in LANGUAGES}
    answers, bits, tokens_per_character = {}, {}, {}
    for name, directory in (("base", BASE_MODEL_DIR), ("zero", ZERO_DIR)):
        print0(f"{name}: needs {choose_placement(directory)}")
        model, tokenizer = load_for_evaluation(directory)
        tokens_per_character[name] = {
            language: round(sum(map(len, encode_batch(tokenizer, documents))) / sum(map(len, documents)), 4)
            for language, documents in texts.items()
        }
        answers[name] = generate_answers(model, tokenizer, [question.question for question in questions]).texts
        bits[name] = bpb_by_language(model, tokenizer, texts, PROFILE.context_length, name)
        del model  # before the other is loaded

    print_header("the same questions, base and Zero model")
    metrics: dict[str, dict] = {}
    for group in (*LANGUAGES.retained, LANGUAGES.added):
        if metrics:
            print0()
        indices = [index for index, question in enumerate(questions) if question.group == group]
        identical = sum(answers["base"][index] == answers["zero"][index] for index in indices)
        correct = sum(is_correct(questions[index], answers["zero"][index]) for index in indices)
        metrics[group] = {
            "total": len(indices),
            **({"correct": correct} if group == LANGUAGES.added else {"identical": identical}),
        }
        for index in indices[:NUM_EXAMPLES]:
            print0(f"{group}  Q     {questions[index].question}")
            print0(f"    base  {answers['base'][index]}\n    zero  {answers['zero'][index]}")
        print0(f"{group}: {identical} of {len(indices)} answers identical, {correct} correct")
    print_header("held-out text (lower is better)")
    print0(format_bpb_table(bits))
    rows = [
        [name, *(f"{values[language]:.3f}" for language in LANGUAGES)] for name, values in tokens_per_character.items()
    ]
    print0("\n" + format_table(["tokens per character", *LANGUAGES], rows))

    passed = all(metrics[group]["identical"] == metrics[group]["total"] for group in LANGUAGES.retained)
    counts = (
        f"{metrics[group]['identical']} of {metrics[group]['total']} {LANGUAGES[group]}" for group in LANGUAGES.retained
    )
    outcome = verdict("Zero test", passed, f"{' and '.join(counts)} answers identical")
    metrics |= {"bits_per_byte": bits, "tokens_per_character": tokens_per_character}
    pipeline.finish_step("step4", metrics, outcome)


if __name__ == "__main__":
    run_cli(main)
