"""The ladder: how far a model carries a fact from Chinese into Japanese, one difficulty after the other."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtuner.console import UserError, format_table
from llmtuner.eval.intervals import wilson_interval
from llmtuner.eval.language import LANGUAGES
from llmtuner.eval.questions import Question, is_correct, names_subject

if TYPE_CHECKING:
    from llmtuner.eval.generation import GeneratedAnswers

# What Japanese training texts and instruction rows say of the subject.
ENTITIES = {
    "told": "told in Japanese",
    "asked_across": "asked across languages",
    "untold_named": "untold, named",
    "untold_unnamed": "untold, never named",
}
PIVOT = "pivot"
# Language of the question, and of the subject's name in it.
FORMS = {
    "ja_ja": "Japanese question, Japanese name",
    "ja_zh": "Japanese question, Chinese name",
    "zh_ja": "Chinese question, Japanese name",
    "zh_zh": "Chinese question, Chinese name",
    PIVOT: "pivot: Chinese answer, Japanese question",
}
NOTE = (
    "Told: Japanese texts state facts about it. Asked across languages: no text does, instructions across two languages do.\n"
    "Untold: neither; named: it occurs in them as somebody else's town, dish, ...; never named: its Japanese name stands in\n"
    "none of them. Pivot: the model's own answer to the Chinese question with the Chinese name, then the Japanese question\n"
    "with the Japanese name. In parentheses: 95 % intervals, in percent."
)


def climb(
    questions: Sequence[Question], generate: "Callable[[Sequence[str]], GeneratedAnswers]"
) -> list[dict[str, Any]]:
    """Asks a model the questions of a ladder file, then each of its Japanese questions again after a pivot.

    The pivot is the simplest one: a single message of the model's own answer to the Chinese question with the Chinese name,
    right or wrong, and below it the Japanese question with the Japanese name. What it says in Japanese is thus what it says
    when the Chinese fact stands before its eyes, under the other name.

    Args:
        questions: as of mini/world.py's `ladder`: groups are named "entities.form", and those of one kind of entities ask for
            the same facts in the same order.
        generate: `generate_answers` of a model.

    Returns:
        One row per answer: entities, form, prompt, answer, right (what a correct answer names), correct, names_subject.

    Raises:
        UserError: if the Chinese and the Japanese questions are not about the same facts.
    """
    prompts = [question.question for question in questions]
    answers = generate(prompts).texts
    japanese = [question for question in questions if question.group.endswith(".ja_ja")]
    stated = [(q, answer) for q, answer in zip(questions, answers, strict=True) if q.group.endswith(".zh_zh")]
    if [(q.subject, q.relation) for q in japanese] != [(q.subject, q.relation) for q, _ in stated]:
        raise UserError(
            "the ladder file's ja_ja and zh_zh questions are not about the same facts. Write the file again."
        )
    after_pivot = [f"{answer}\n{q.question}" for q, (_, answer) in zip(japanese, stated, strict=True)]
    pivoted = generate(after_pivot).texts
    renamed = [dataclasses.replace(q, group=f"{q.group.split('.')[0]}.{PIVOT}") for q in japanese]
    return [
        _grade(question, prompt, answer)
        for question, prompt, answer in zip(
            [*questions, *renamed], [*prompts, *after_pivot], [*answers, *pivoted], strict=True
        )
    ]


def num_answers(questions: Sequence[Question]) -> int:
    """How many answers `climb` generates."""
    return len(questions) + sum(question.group.endswith(".ja_ja") for question in questions)


def _grade(question: Question, prompt: str, answer: str) -> dict[str, Any]:
    """Grades an answer; its subject may be called what the prompt or what the answer's language calls it.

    A Chinese answer with the question's own Japanese name in it is a Chinese answer: for `is_correct` that name is exchanged.
    """
    entities, form = question.group.split(".")
    names = dict(zip(LANGUAGES, question.subject, strict=True))
    written = {"ja", "zh"} if form == PIVOT else {question.language, form.split("_")[1]}
    allowed = [names[language] for language in written]
    graded, own = answer, names[question.language]
    for name in allowed:
        if name != own and names_subject(question, answer, [name]):
            graded = graded.replace(name, own)
    return {
        "entities": entities,
        "form": form,
        "prompt": prompt,
        "answer": answer,
        "right": question.value,
        "correct": is_correct(question, graded),
        "names_subject": names_subject(question, answer, allowed),
    }


def count_cells(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Counts the rows of `climb` by entities and form.

    Returns:
        {entities: {form: n, and the shares accuracy and names_subject, each with its 95 % interval}}
    """
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for entities in ENTITIES:
        for form in FORMS:
            found = [row for row in rows if (row["entities"], row["form"]) == (entities, form)]
            if found:
                cell: dict[str, Any] = {"n": len(found)}
                for name, key in (("accuracy", "correct"), ("names_subject", "names_subject")):
                    count = sum(row[key] for row in found)
                    cell[name] = round(count / len(found), 4)
                    cell[f"{name}_interval"] = [round(end, 4) for end in wilson_interval(count, len(found))]
                cells.setdefault(entities, {})[form] = cell
    return cells


def ladder_rows(ladder: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The table in words: of each kind of entities its forms, n, and each model's two shares with their intervals.

    Args:
        ladder: {model: what `count_cells` returns}.
    """
    first: Mapping[str, Any] = next(iter(ladder.values()), {})
    return {
        ENTITIES[entities]: [
            {
                "form": FORMS[form],
                "n": cell["n"],
                "shares": [
                    _share(cells[entities][form], name)
                    for cells in ladder.values()
                    for name in ("accuracy", "names_subject")
                ],
            }
            for form, cell in forms.items()
        ]
        for entities, forms in first.items()
    }


def _share(cell: Mapping[str, Any], name: str) -> str:
    low, high = cell[f"{name}_interval"]
    return f"{100 * cell[name]:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def format_ladder(ladder: Mapping[str, Any]) -> str:
    """The table of `ladder_rows` as text."""
    header = ["", "n", *(f"{model}: {title}" for model in ladder for title in ("right", "names it"))]
    lines: list[list[str]] = []
    for entities, rows in ladder_rows(ladder).items():
        lines.append([entities, *[""] * (len(header) - 1)])
        lines += [[f"  {row['form']}", f"{row['n']}", *row["shares"]] for row in rows]
    return format_table(header, lines)
