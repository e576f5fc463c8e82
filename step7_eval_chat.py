"""Step 7: evaluates base, Zero, pretrained and chat model, then chats.

    python step7_eval_chat.py                the before/after table; on a terminal, a chat with the chat model
    python step7_eval_chat.py --chat         only the chat
    python step7_eval_chat.py --web          the chat in a browser, base and chat model side by side (needs gradio)
    python step7_eval_chat.py --suite ja     standard benchmarks: ja, zh or en (needs lm_eval)
    python step7_eval_chat.py --report       writes WORK_DIR/report.html again, as every step does

Measures accuracy in Chinese, English and Japanese, in Japanese also on facts that no Japanese text states; answers in another
language than the question's; bits per byte; agreement with the base model; and repetition. Where there is a ladder.jsonl, as in the miniature, also how
far the pretrained and the chat model carry a fact from Chinese into Japanese. Selects the chat model's
generation settings by these, answers under them, and writes them and a model card into its directory. All answers go to
WORK_DIR/answers.jsonl and ladder_answers.jsonl.
"""

import argparse
import json
import os
import sys
from contextlib import suppress
from functools import partial
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import constants
import pipeline
from constants import BASE_MODEL_DIR, CHAT_MODEL_DIR, LANGUAGES, PROFILE, PT_MERGED_DIR, WORK_DIR, ZERO_DIR
from llmtuner.console import Timer, UserError, display_path, format_table, print0, print_header, progress_bar, run_cli
from llmtuner.eval.ladder import NOTE, climb, count_cells, format_ladder, num_answers
from llmtuner.files import atomic_write_json, atomic_write_text, check_writable
from llmtuner.report.checks import percent

if TYPE_CHECKING:
    from llmtuner.eval.questions import Question

MODELS = {"base": BASE_MODEL_DIR, "zero": ZERO_DIR, "pretrained": PT_MERGED_DIR, "chat": CHAT_MODEL_DIR}
QUESTIONS_PER_GROUP = 200
LADDER_MODELS = ("pretrained", "chat")
NUM_EXAMPLES = 2  # answers of each group that are printed
PASS_RATES = ("response_pass_rate", "line_pass_rate")
LOOPBACK = "127.0.0.1"
# The options of each mode, and their defaults.
MODE_OPTIONS: dict[str, dict[str, Any]] = {
    "suite": dict(model="chat", tasks=None, task_dir=None, data_dir=None, limit=None, num_fewshot=None, batch_size=16),
    "web": dict(port=7860, host=LOOPBACK),
}


def main() -> None:
    options = read_options()
    if options.report:
        pipeline.write_report()
        print0(f"wrote {display_path(pipeline.REPORT)}")
    elif options.suite:
        evaluate_suite(options)
    elif options.web:
        chat_in_browser(options)
    elif options.chat:
        chat()
    else:
        if not pipeline.load_metrics("step7") or constants.OVERWRITE:
            pipeline.start_step("step7", ZERO_DIR, PT_MERGED_DIR, CHAT_MODEL_DIR)
            pipeline.require_base_model()
            pipeline.require_corpus()
            metrics = evaluate()
            print_results(metrics)
            before, after = (percent(metrics["accuracy"][name][LANGUAGES.added]) for name in ("base", "chat"))
            outcome = f"{LANGUAGES.name} questions answered correctly: {before} -> {after}"
            pipeline.finish_step("step7", metrics, outcome)
        else:
            pipeline.check_lineage("step7")
            print_results(pipeline.load_metrics("step7"))
        if sys.stdin.isatty():
            chat()


def read_options() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="chat in the terminal")
    mode.add_argument("--web", action="store_true", help="chat in a browser on this machine")
    mode.add_argument("--suite", metavar="LANGUAGE", help="standard benchmarks: ja, zh or en")
    mode.add_argument("--report", action="store_true", help="write report.html again")
    parser.add_argument("--model", choices=MODELS, help="with --suite: which model (default: chat)")
    parser.add_argument("--tasks", help="with --suite: other tasks of the harness, comma-separated")
    parser.add_argument("--task_dir", type=Path, help="with --suite: a directory of additional task files")
    parser.add_argument(
        "--data_dir", type=Path, help="with --suite: a directory of the tasks' data, such as jnli.valid.jsonl"
    )
    parser.add_argument("--limit", type=int, help="with --suite: questions per task (default: all)")
    parser.add_argument(
        "--num_fewshot", type=int, help="with --suite: examples before each question (default: the task's own)"
    )
    parser.add_argument("--batch_size", type=int, help="with --suite: requests in one forward pass (default: 16)")
    parser.add_argument("--port", type=int, help="with --web: the port (default: 7860)")
    parser.add_argument("--host", help="with --web: an address of this machine, to admit other machines; "
                        "prompts for a password unless CHAT_PASSWORD is set")  # fmt: skip
    options = parser.parse_args()
    for mode_name, defaults in MODE_OPTIONS.items():
        for name, default in defaults.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
            elif getattr(options, mode_name) in (None, False):
                parser.error(f"--{name} requires --{mode_name}")
    for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    return options


def evaluate() -> dict[str, Any]:
    """Evaluates the four models, completes the chat model's directory, and saves metrics and answers."""
    from llmtuner.eval import evaluate
    from llmtuner.eval.generation import GREEDY, generate_answers
    from llmtuner.eval.questions import read_questions
    from llmtuner.model.loading import choose_placement, load_for_evaluation
    from llmtuner.weights.lazy_checkpoint import open_checkpoint

    timer = Timer()
    questions = read_questions(constants.QUESTIONS, QUESTIONS_PER_GROUP)
    if not any(question.group == LANGUAGES.free_form for question in questions):
        raise UserError(f"{constants.QUESTIONS} has no group {LANGUAGES.free_form}, on which repetition is measured.")
    if constants.QUESTIONS.suffix == ".jsonl" and not any(question.subject for question in questions):
        print0(f"{constants.QUESTIONS} names no subjects: answers about another subject are not detected.")
    rungs = read_questions(constants.LADDER) if constants.LADDER.is_file() else []
    ladder_rows: dict[str, list[dict[str, Any]]] = {}
    for directory in MODELS.values():  # before time is spent on the first
        choose_placement(directory)
        open_checkpoint(directory)
    texts = {language: pipeline.held_out_texts(language) for language in LANGUAGES}
    answers: dict[str, list[str]] = {}
    by_model: dict[str, dict[str, Any]] = {}
    total = evaluate.num_progress_items(questions, texts, len(MODELS), LANGUAGES)
    with progress_bar(total + len(LADDER_MODELS) * num_answers(rungs), "evaluating") as bar:
        for name, directory in MODELS.items():
            bar.set_description_str(f"evaluating {name}")
            model, tokenizer = load_for_evaluation(directory)
            settings = GREEDY
            if name == "chat":  # its answers are those that people will get
                bar.set_description_str("selecting generation settings")
                generation = evaluate.select_generation_config(
                    model, tokenizer, questions, PROFILE.max_new_tokens, bar.update, LANGUAGES
                )
                settings = generation["candidates"][generation["chosen"]]["settings"]
                bar.set_description_str(f"evaluating {name}")
            by_model[name], answers[name] = evaluate.evaluate_model(
                model,
                tokenizer,
                questions,
                texts,
                PROFILE.context_length,
                PROFILE.max_new_tokens,
                bar.update,
                settings,
                LANGUAGES,
            )
            by_model[name]["agreement"] = evaluate.agreement_by_language(
                questions, answers[name], answers["base"], LANGUAGES
            )
            if rungs and name in LADDER_MODELS:
                bar.set_description_str(f"asking {name} across languages")
                limits = dict(max_new_tokens=evaluate.QA_MAX_NEW_TOKENS, settings=settings, on_progress=bar.update)
                ladder_rows[name] = climb(rungs, partial(generate_answers, model, tokenizer, **limits))
            del model  # before the next one is loaded
    evaluate.save_generation_config(CHAT_MODEL_DIR, by_model["chat"]["decoding"])
    write_answers(questions, answers)
    print_examples(questions, answers)
    # {model: {metric: value}} becomes {metric: {model: value}}
    metrics: dict[str, Any] = {
        metric: {name: values[metric] for name, values in by_model.items()} for metric in by_model["base"]
    }
    metrics["lost"] = {
        name: lost_of_base(questions, answers["base"], answers[name]) for name in MODELS if name != "base"
    }
    metrics |= {"generation": generation, "seconds": timer.seconds()}
    if rungs:
        metrics["ladder"] = {name: count_cells(rows) for name, rows in ladder_rows.items()}
        lines = [
            json.dumps({"model": name, **row}, ensure_ascii=False) + "\n"
            for name, rows in ladder_rows.items()
            for row in rows
        ]
        atomic_write_text(WORK_DIR / "ladder_answers.jsonl", "".join(lines))
    pipeline.write_model_card(CHAT_MODEL_DIR, metrics)
    return metrics


def lost_of_base(questions: "list[Question]", before: list[str], after: list[str]) -> dict[str, Any]:
    """What a model lost of the base's right answers in each retained language, see `scores.lost_percent`."""
    from llmtuner.eval.questions import is_correct
    from llmtuner.eval.scores import lost_percent

    lost = {}
    for language in LANGUAGES.retained:
        graded = [index for index, question in enumerate(questions) if question.group == language and question.value]
        marks = [
            "".join("1" if is_correct(questions[index], answers[index]) else "0" for index in graded)
            for answers in (before, after)
        ]
        if graded:
            lost[language] = lost_percent(*marks)
    return lost


def write_answers(questions: "list[Question]", answers: dict[str, list[str]]) -> None:
    """Writes WORK_DIR/answers.jsonl: each question with all models' answers, and which of them are correct."""
    from llmtuner.eval.questions import is_correct

    lines = []
    for index, question in enumerate(questions):
        by_model = {name: answers[name][index] for name in MODELS}
        row: dict[str, Any] = {
            "group": question.group,
            "language": question.language,
            "question": question.question,
            "right": question.value,
            "wrong_values": question.wrong_values,
            "subject": question.subject,
            **by_model,
        }
        if question.value is not None:
            row["correct"] = {name: is_correct(question, answer) for name, answer in by_model.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    atomic_write_text(WORK_DIR / "answers.jsonl", "".join(lines))


def print_examples(questions: "list[Question]", answers: dict[str, list[str]]) -> None:
    """Prints the first questions of each group with all models' answers."""
    print_header("the same questions to all four models")
    for group in dict.fromkeys(question.group for question in questions):
        for index in [index for index, question in enumerate(questions) if question.group == group][:NUM_EXAMPLES]:
            print0(f"{group}  {questions[index].question}")
            for name in MODELS:
                print0(f"    {name:<11}{answers[name][index]}")


def print_results(metrics: dict[str, Any]) -> None:
    """Prints the before/after table, language confusion and the generation settings that were tried."""
    print_header("before and after")
    groups = list(metrics["accuracy"]["base"])
    rows = [
        [
            name,
            *(percent(metrics["accuracy"][name][group]) for group in groups),
            *(f"{metrics['bits_per_byte'][name][language]:.3f}" for language in LANGUAGES),
            percent(metrics["repetition"][name][LANGUAGES.added]),
        ]
        for name in MODELS
    ]
    columns, added = [group.replace("_", " ") for group in groups], LANGUAGES.added
    print0(
        format_table(
            ["right answers in", *columns, f"bits/byte {added}", *LANGUAGES.retained, f"{added} repeated"], rows
        )
    )
    others = LANGUAGES.listed("and", LANGUAGES.retained)
    print0(
        f"{added} unseen: asked in {LANGUAGES.name} about facts that only {others} texts state. {added} repeated: share of"
    )
    print0(f"4-grams of free-form {LANGUAGES.name} replies that occurred before in the same reply.")
    if "decoding" in metrics:  # earlier versions decoded greedily throughout
        print0(
            f"The chat model answers under its selected settings ({metrics['generation']['chosen']}), the others greedily."
        )

    lost = metrics.get("lost")  # not measured by earlier versions
    if lost:
        print_header("right answers lost of the base's, percent")
        rows = [[name, *(lost_cell(losses.get(code)) for code in LANGUAGES.retained)] for name, losses in lost.items()]
        print0(format_table(["lost in", *LANGUAGES.retained], rows))
        print0("The same questions before and after; 95 % bootstrap intervals over questions. Negative: gained.")

    confusion = metrics.get("language_confusion")  # not measured by earlier versions
    if confusion:
        print_header("answers in the language of the question")
        groups = list(confusion["base"])
        rows = [
            [name, *(percent(confusion[name][group][rate]) for rate in PASS_RATES for group in groups)]
            for name in MODELS
        ]
        columns = [group.replace("_", " ") for group in groups]
        print0(format_table(["share of answers in", *columns, "of lines in " + columns[0], *columns[1:]], rows))
        print0("Answers without a line in another language, and lines in the language; undecided ones are left out.")

    if metrics.get("ladder"):  # the miniature's alone
        print_header("the ladder from Chinese into Japanese: right answers, and answers that name their subject")
        print0(format_ladder(metrics["ladder"]))
        print0(NOTE)

    print_header(f"free-form {LANGUAGES.name} replies of the chat model")
    rows = [
        [
            name,
            percent(candidate["repeated_4gram_ratio"]),
            f"{candidate['longest_loop']} characters",
            percent(candidate["finished_ratio"]),
            percent(candidate["accuracy"]),
            f"{candidate['tokens_per_second']:,.0f}",
        ]
        for name, candidate in metrics["generation"]["candidates"].items()
    ]
    print0(format_table(["settings", "repeated", "longest loop", "finished", "right", "tokens/s"], rows))
    chosen = metrics["generation"]["chosen"]
    print0(f"Selected: {chosen} (least repetition at a cost of at most 2 points of accuracy in any language).")


def lost_cell(lost: "dict[str, Any] | None") -> str:
    if lost is None or lost["lost"] is None:
        return "–"
    interval = "" if lost["interval"] is None else " ({:.1f} to {:.1f})".format(*lost["interval"])
    return f"{lost['lost']:.1f} %{interval} of {lost['n']:,}"


def chat() -> None:
    """Chats with the chat model in the terminal."""
    pipeline.require_artifacts(CHAT_MODEL_DIR)
    from llmtuner.chat.cli import run_chat
    from llmtuner.eval.questions import example_questions

    run_chat(CHAT_MODEL_DIR, PROFILE.max_new_tokens, example_questions(constants.QUESTIONS, LANGUAGES), LANGUAGES)


def chat_in_browser(options: argparse.Namespace) -> None:
    """Serves a chat page with base and chat model side by side."""
    pipeline.require_artifacts(CHAT_MODEL_DIR)
    pipeline.require_base_model()
    from llmtuner.chat.web import serve
    from llmtuner.eval.questions import example_questions

    password = os.environ.get("CHAT_PASSWORD")
    if options.host != LOOPBACK and not password and sys.stdin.isatty():
        with suppress(EOFError):  # Ctrl-D: no password
            password = getpass("password for the page: ")
    models, examples = (
        {"base": BASE_MODEL_DIR, "chat": CHAT_MODEL_DIR},
        example_questions(constants.QUESTIONS, LANGUAGES),
    )
    serve(models, PROFILE.max_new_tokens, options.host, options.port, password, examples, LANGUAGES)


def evaluate_suite(options: argparse.Namespace) -> None:
    """Evaluates one model on standard benchmarks, for WORK_DIR/metrics and the report."""
    directory = MODELS[options.model]
    if options.model == "base":
        pipeline.require_base_model()
    else:
        pipeline.require_artifacts(directory)
    check_writable(constants.METRICS_DIR)
    from llmtuner.eval.lm_eval_adapter import USES_CHAT_TEMPLATE, run_suite
    from llmtuner.eval.scores import format_paired, format_scores, paired_rows

    result = run_suite(
        options.suite,
        directory,
        tasks=options.tasks.split(",") if options.tasks else None,
        include_path=options.task_dir,
        limit=options.limit,
        chat=USES_CHAT_TEMPLATE[options.model],
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
        data_dir=options.data_dir,
        trained_length=PROFILE.context_length,
    )
    print0(format_scores(result["tasks"]))
    if result["truncated_requests"]:
        print0(f"{result['truncated_requests']:,} requests exceeded the model's context of {result['context_length']:,} tokens "
               "and lost their beginning.")  # fmt: skip
    if result["longer_questions"]:
        print0(f"{result['longer_questions']:,} questions are longer than the {PROFILE.context_length:,} tokens of a sequence "
               "in training.")  # fmt: skip
    if options.model != "base":
        kept = paired_rows(pipeline.load_metrics(f"suite_{options.suite}_base"), result)
        if kept:
            print_header("lost of the base model's scores, question by question")
            print0(format_paired(kept, "base", options.model))
    atomic_write_json(constants.METRICS_DIR / f"suite_{options.suite}_{options.model}.json", result)
    if pipeline.load_metrics("step1"):
        pipeline.write_report()


if __name__ == "__main__":
    run_cli(main)
