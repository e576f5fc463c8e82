"""Step 7: what was gained and what was kept, over base, Zero, pretrained and chat model; then a chat.

    python step7_eval_chat.py                the before/after table; on a terminal, a chat with the chat model
    python step7_eval_chat.py --chat         the chat alone
    python step7_eval_chat.py --web          the chat in a browser, base and chat model side by side (needs gradio)
    python step7_eval_chat.py --suite ja     standard suites: ja, zh or en (needs lm_eval)
    python step7_eval_chat.py --report       makes WORK_DIR/report.html anew, as every step does

Counts right answers in Chinese, English and Japanese, in Japanese also about what was never described in Japanese, and
answers in another language than their question's; measures bits per byte, agreement with the base model, and repetition; chooses by these the chat model's own generation
settings and writes them, and a model card, into its directory. All answers go to WORK_DIR/answers.jsonl.
"""

import argparse
import json
import os
import sys
from contextlib import suppress
from getpass import getpass
from pathlib import Path
from typing import Any

import constants
import pipeline
from constants import BASE_MODEL_DIR, CHAT_MODEL_DIR, PROFILE, PT_MERGED_DIR, WORK_DIR, ZERO_DIR
from llmtuner.console import Timer, UserError, command, format_table, print0, print_header, run_cli
from llmtuner.files import atomic_write_text

MODELS = {"base": BASE_MODEL_DIR, "zero": ZERO_DIR, "pretrained": PT_MERGED_DIR, "chat": CHAT_MODEL_DIR}
LANGUAGES = ("ja", "zh", "en")
QUESTIONS_PER_GROUP = 200
SHOWN = 2
RATES = ("response_pass_rate", "line_pass_rate")
LOOPBACK = "127.0.0.1"
# What an option goes with, and its default.
BELONGS_TO: dict[str, dict[str, Any]] = {
    "suite": dict(model="chat", tasks=None, task_dir=None, limit=None, num_fewshot=None, batch_size=16),
    "web": dict(port=7860, host=LOOPBACK),
}


def main() -> None:
    options = read_options()
    if options.report:
        pipeline.make_report()
    elif options.suite:
        run_suite(options)
    elif options.web:
        chat_in_browser(options)
    elif options.chat:
        chat()
    else:
        if not pipeline.load_metrics("step7") or constants.OVERWRITE:
            pipeline.start_step("step7", ZERO_DIR, PT_MERGED_DIR, CHAT_MODEL_DIR)
            pipeline.require_base_model()
            pipeline.require_corpus()
            evaluate()
        else:
            pipeline.check_lineage("step7")
        show(pipeline.load_metrics("step7"))
        if sys.stdin.isatty():
            chat()


def read_options() -> argparse.Namespace:
    """What this command was asked for."""
    parser = argparse.ArgumentParser(description="Evaluates and chats.", allow_abbrev=False)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--chat", action="store_true", help="a chat on the terminal")
    task.add_argument("--web", action="store_true", help="a chat in the browser, on this machine only")
    task.add_argument("--suite", metavar="LANGUAGE", help="standard suites: ja, zh or en")
    task.add_argument("--report", action="store_true", help="makes report.html anew")
    parser.add_argument("--model", choices=MODELS, help="with --suite: which model (default: chat)")
    parser.add_argument("--tasks", help="with --suite: these tasks of the harness instead, with commas between")
    parser.add_argument("--task_dir", type=Path, help="with --suite: a directory with task files of your own")
    parser.add_argument("--limit", type=int, help="with --suite: so many questions of each task")
    parser.add_argument("--num_fewshot", type=int, help="with --suite: examples before each question")
    parser.add_argument("--batch_size", type=int, help="with --suite: requests read at once (default: 16)")
    parser.add_argument("--port", type=int, help="with --web: the port (default: 7860)")
    parser.add_argument("--host", help="with --web: an address of this machine, to let others in; "
                        "asks for a password, or takes it from CHAT_PASSWORD")  # fmt: skip
    options = parser.parse_args()
    for task, defaults in BELONGS_TO.items():
        for name, default in defaults.items():
            if getattr(options, name) is None:
                setattr(options, name, default)
            elif getattr(options, task) in (None, False):
                parser.error(f"--{name} goes with --{task}")
    for name, least in (("limit", 1), ("batch_size", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    return options


def evaluate() -> None:
    """Examines the four models, gives the chat model its settings and its card, and saves metrics and answers."""
    from llmtuner.eval.evaluate import (
        FREE_FORM,
        agreement_by_language,
        evaluate_model,
        save_generation_config,
        select_generation_config,
    )
    from llmtuner.eval.questions import is_correct, read_questions
    from llmtuner.model.loading import choose_placement, load_for_evaluation
    from llmtuner.weights.lazy_checkpoint import open_checkpoint

    timer = Timer()
    questions = read_questions(constants.QUESTIONS, QUESTIONS_PER_GROUP)
    if not any(one.group == FREE_FORM for one in questions):
        raise UserError(
            f"{constants.QUESTIONS} has no request of the group {FREE_FORM}, by which repetition is measured."
        )
    if constants.QUESTIONS.suffix == ".jsonl" and not any(one.subject for one in questions):
        print0(
            f"{constants.QUESTIONS} names no subjects: an answer about something else than its question is not noticed."
        )
    for directory in MODELS.values():  # before time is spent on the first
        choose_placement(directory)
        open_checkpoint(directory)
    texts = {language: pipeline.held_out_texts(language) for language in LANGUAGES}
    answers: dict[str, list[str]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, directory in MODELS.items():
        model, tokenizer = load_for_evaluation(directory)
        found[name], answers[name] = evaluate_model(
            model, tokenizer, questions, texts, PROFILE.context_length, PROFILE.max_new_tokens, name
        )
        found[name]["agreement"] = agreement_by_language(questions, answers[name], answers["base"])
        if name == "chat":
            generation = select_generation_config(model, tokenizer, questions, PROFILE.max_new_tokens)
        del model  # before the next is loaded
    save_generation_config(CHAT_MODEL_DIR, generation["candidates"][generation["chosen"]]["settings"])

    lines = []
    for index, one in enumerate(questions):
        row: dict[str, Any] = {
            "group": one.group,
            "language": one.language,
            "question": one.question,
            "right": one.value,
        }
        row |= {"wrong_values": one.wrong_values, "subject": one.subject}
        row |= {name: answers[name][index] for name in MODELS}
        if one.value is not None:
            row["correct"] = {name: is_correct(one, answers[name][index]) for name in MODELS}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    atomic_write_text(WORK_DIR / "answers.jsonl", "".join(lines))

    print_header("the same questions to all four")
    for group in dict.fromkeys(one.group for one in questions):
        for index in [index for index, one in enumerate(questions) if one.group == group][:SHOWN]:
            print0(f"{group}  {questions[index].question}")
            for name in MODELS:
                print0(f"    {name:<11}{answers[name][index]}")
    # model -> figure becomes figure -> model
    metrics = {figure: {name: own[figure] for name, own in found.items()} for figure in found["base"]}
    metrics |= {"generation": generation, "seconds": timer.seconds()}
    pipeline.write_card(CHAT_MODEL_DIR, metrics)
    pipeline.finish_step("step7", metrics)


def show(metrics: dict[str, Any]) -> None:
    """Prints the before/after table, the language of the answers and the settings that were tried."""
    from llmtuner.report.checks import percent

    def share(value: float | None) -> str:
        return "-" if value is None else percent(value)

    print_header("before and after")
    groups = list(metrics["accuracy"]["base"])
    rows = [
        [
            name,
            *(share(metrics["accuracy"][name][group]) for group in groups),
            *(f"{metrics['bits_per_byte'][name][language]:.3f}" for language in LANGUAGES),
            share(metrics["repetition"][name]["ja"]),
        ]
        for name in MODELS
    ]
    named = [group.replace("_", " ") for group in groups]
    header = ["right answers in", *named, "bits/byte ja", "zh", "en", "ja repeated"]
    print0(format_table(header, rows))
    print0(
        "ja unseen: asked in Japanese about what only Chinese and English texts describe. ja repeated: 4-grams of free"
    )
    print0("Japanese answers that occurred before in the same answer.")

    confusion = metrics.get("language_confusion")
    if confusion:  # runs of earlier versions have not measured it
        print_header("answers in the language of their question")
        groups = list(confusion["base"])
        rows = [[name, *(share(confusion[name][group][rate]) for rate in RATES for group in groups)] for name in MODELS]
        named = [group.replace("_", " ") for group in groups]
        print0(format_table(["share of answers in", *named, "of lines in " + named[0], *named[1:]], rows))
        print0(
            "Answers without a line in another language, and lines; those whose characters do not tell are left out."
        )

    print_header("free Japanese answers of the chat model")
    tried = metrics["generation"]["candidates"]
    rows = [
        [
            name,
            share(one["repeated_4gram_ratio"]),
            f"{one['longest_loop']} characters",
            share(one["finished_ratio"]),
            share(one["accuracy"]),
            f"{one['tokens_per_second']:,.0f}",
        ]
        for name, one in tried.items()
    ]
    print0(format_table(["settings", "repeated", "longest loop", "ended", "right", "tokens/s"], rows))
    chosen = metrics["generation"]["chosen"]
    print0(f"The chat model's own settings are now: {chosen} (least repetition for at most 2 points of right answers).")
    print0(
        f"\nstep 7 done: everything is in {WORK_DIR} (report.html, metrics/, answers.jsonl, chat_model/). "
        f"Chat: {command('step7_eval_chat.py')} --chat, or --web"
    )


def chat() -> None:
    """A dialogue on the terminal with the chat model."""
    pipeline.require_artifacts(CHAT_MODEL_DIR)
    from llmtuner.chat.cli import run_chat

    run_chat(CHAT_MODEL_DIR, PROFILE.max_new_tokens)


def chat_in_browser(options: argparse.Namespace) -> None:
    """A page with base and chat model side by side, for this machine unless --host says otherwise."""
    pipeline.require_artifacts(CHAT_MODEL_DIR)
    pipeline.require_base_model()
    from llmtuner.chat.web import serve

    password = os.environ.get("CHAT_PASSWORD")
    if options.host != LOOPBACK and not password and sys.stdin.isatty():
        with suppress(EOFError):  # Ctrl-D: none
            password = getpass("password for the page: ")
    serve(
        {"base": BASE_MODEL_DIR, "chat": CHAT_MODEL_DIR}, PROFILE.max_new_tokens, options.host, options.port, password
    )


def run_suite(options: argparse.Namespace) -> None:
    """Scores of one model in standard suites, to WORK_DIR/metrics and the report."""
    directory = MODELS[options.model]
    if options.model == "base":
        pipeline.require_base_model()
    else:
        pipeline.require_artifacts(directory)
    from llmtuner.eval.lm_eval_adapter import USES_CHAT_TEMPLATE, run_suite

    run_suite(
        options.suite,
        directory,
        constants.METRICS_DIR / f"suite_{options.suite}_{options.model}.json",
        tasks=options.tasks.split(",") if options.tasks else None,
        include_path=options.task_dir,
        limit=options.limit,
        chat=USES_CHAT_TEMPLATE[options.model],
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
    )
    if pipeline.load_metrics("step1"):
        pipeline.make_report()


if __name__ == "__main__":
    run_cli(main)
