"""Step 7: what was gained and what was kept, over base, Zero, pretrained and chat model; then a chat.

    python step7_eval_chat.py           the before/after table; on a terminal, a chat with the chat model
    python step7_eval_chat.py --chat    the chat alone

Counts right answers in Chinese, English and Japanese, in Japanese also about what was never described in Japanese, and
measures bits per byte and repetition. All answers go to WORK_DIR/answers.jsonl.
"""

import json
import sys
from typing import Any

import constants
from constants import BASE_MODEL_DIR, CHAT_MODEL_DIR, PROFILE, PT_MERGED_DIR, WORK_DIR, ZERO_DIR
from llmtuner.console import heading, run_script, say, table

MODELS = {"base": BASE_MODEL_DIR, "zero": ZERO_DIR, "pretrained": PT_MERGED_DIR, "chat": CHAT_MODEL_DIR}
GROUPS = ("zh", "en", "ja", "ja_unseen")
QUESTIONS_PER_GROUP = 200
SHOWN = 2
ANSWER_TOKENS = 64  # room for a sentence, also for one whose Japanese is spelled in bytes
FREE_TOKENS = 160  # room for a reply of several sentences


def main() -> None:
    if "--chat" not in sys.argv:
        if not constants.load_metrics("step7") or constants.OVERWRITE:
            constants.start_step("step7", ZERO_DIR, PT_MERGED_DIR, CHAT_MODEL_DIR)
            constants.require_base_model()
            constants.require_corpus()
            evaluate()
        show(constants.load_metrics("step7"))
    if "--chat" in sys.argv or sys.stdin.isatty():
        chat()


def evaluate() -> None:
    """Examines the four models and saves metrics and answers."""
    from llmtuner.eval.answers import answer_all, is_right, read_questions, repetition
    from llmtuner.eval.bits_per_byte import bits_per_language
    from llmtuner.model.loading import load_for_evaluation

    questions = read_questions(constants.QUESTIONS, QUESTIONS_PER_GROUP)
    texts = {language: constants.held_out_texts(language) for language in ("ja", "zh", "en")}
    exact: dict[str, dict[str, float | None]] = {}
    bits, repeated, answers = {}, {}, {}
    for name, directory in MODELS.items():
        model, tokenizer = load_for_evaluation(directory)
        given = answers[name] = [""] * len(questions)
        for free, room in ((False, ANSWER_TOKENS), (True, FREE_TOKENS)):
            chosen = [index for index, one in enumerate(questions) if (one.value is None) == free]
            told = answer_all(model, tokenizer, [questions[index].question for index in chosen], room, name=name)
            for index, answer in zip(chosen, told, strict=True):
                given[index] = answer
        exact[name] = {}
        for group in GROUPS:
            asked = [index for index, one in enumerate(questions) if one.group == group and one.value is not None]
            right = [is_right(questions[index], given[index]) for index in asked]
            exact[name][group] = round(sum(right) / len(right), 4) if right else None
        free = [answer for one, answer in zip(questions, given, strict=True) if one.group == "ja_free"]
        repeated[name] = {"ja": round(repetition(free), 4)}
        bits[name] = bits_per_language(model, tokenizer, texts, PROFILE.window, name)
        del model  # before the next is loaded

    with (WORK_DIR / "answers.jsonl").open("w", encoding="utf-8") as lines:
        for index, one in enumerate(questions):
            row = {"group": one.group, "question": one.question, "right": one.value}
            lines.write(
                json.dumps({**row, **{name: answers[name][index] for name in MODELS}}, ensure_ascii=False) + "\n"
            )

    heading("the same questions to all four")
    for group in (*GROUPS, "ja_free"):
        for index in [index for index, one in enumerate(questions) if one.group == group][:SHOWN]:
            say(f"{group}  {questions[index].question}")
            for name in MODELS:
                say(f"    {name:<11}{answers[name][index]}")
    constants.save_metrics("step7", {"exact": exact, "bits_per_byte": bits, "repetition": repeated})


def show(metrics: dict[str, Any]) -> None:
    """Prints the before/after table."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    heading("before and after")
    rows = [
        [
            name,
            *(share(metrics["exact"][name][group]) for group in GROUPS),
            *(f"{metrics['bits_per_byte'][name][language]:.3f}" for language in ("ja", "zh", "en")),
            share(metrics["repetition"][name]["ja"]),
        ]
        for name in MODELS
    ]
    header = ["right answers in", "zh", "en", "ja", "ja unseen", "bits/byte ja", "zh", "en", "ja repeated"]
    say(table(header, rows))
    say("ja unseen: asked in Japanese about what only Chinese and English texts describe. ja repeated: 4-grams of free")
    say("Japanese answers that occurred before in the same answer.")
    say(
        f"\nstep 7 done: everything is in {WORK_DIR} (metrics/, answers.jsonl, chat_model/). Chat: python step7_eval_chat.py --chat"
    )


def chat() -> None:
    """A dialogue on the terminal; an empty line or Ctrl-D ends it."""
    constants.require(CHAT_MODEL_DIR)

    from llmtuner.data.template import Message, Template
    from llmtuner.eval.answers import reply
    from llmtuner.model.loading import load_for_evaluation

    model, tokenizer = load_for_evaluation(CHAT_MODEL_DIR)
    template = Template.of(tokenizer)
    messages: list[Message] = []
    say("\nAsk in Japanese, Chinese or English. /clear forgets the dialogue; an empty line ends it.")
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            return
        if not question:
            return
        if question == "/clear":
            messages = []
            continue
        messages.append({"role": "user", "content": question})
        answer = reply(model, tokenizer, template.prompt(tokenizer, messages), FREE_TOKENS)
        messages.append({"role": "assistant", "content": answer})
        say(f"model> {answer}")


if __name__ == "__main__":
    run_script(main)
