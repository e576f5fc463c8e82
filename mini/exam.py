"""Examines a model of the miniature: does it know the world, and does it read what a passage says of a made-up name?"""

from typing import Any

from llmtuner.console import print0
from llmtuner.eval.generation import generate_answers
from llmtuner.eval.questions import is_correct, parse_questions
from mini import world
from mini.text_generator import TextGenerator

NUM_QUESTIONS = 300
SHOWN = 6


def knowledge(model: Any, tokenizer: Any) -> dict[str, float]:
    """Share of right answers to questions in phrasings that no dialogue used, by language; some are printed."""
    questions = parse_questions([*world.questions(world.build_generators("exam")), world.subjects()])
    accuracy = {}
    for group in ("zh", "en", "ja"):
        asked = [question for question in questions if question.group == group][:NUM_QUESTIONS]
        answers = generate_answers(model, tokenizer, [question.question for question in asked]).texts
        correct = [is_correct(question, answer) for question, answer in zip(asked, answers, strict=True)]
        accuracy[group] = sum(correct) / len(correct)
        for question, answer, passed in list(zip(asked, answers, correct, strict=True))[:SHOWN]:
            print0(f"{'correct' if passed else 'WRONG'}  {question.question}  ->  {answer}")
        print0(f"{group}: {accuracy[group]:.1%} correct")
    return accuracy


def reading(
    model: Any, tokenizer: Any, reader: TextGenerator, writer: TextGenerator, count: int = NUM_QUESTIONS
) -> float:
    """Share of right answers to questions on one sentence about a stranger, in phrasings that no dialogue used.

    Args:
        reader: writes the questions.
        writer: writes the sentences, in its own language.
    """
    facts = []
    for _ in range(count):
        stranger = reader.stranger()
        facts.append((stranger, reader.rng.choice(list(stranger.facts))))
    prompts = [f"{writer.render('STATEMENTS', *fact)}\n{reader.question(*fact, held_out=True)}" for fact in facts]
    answers = generate_answers(model, tokenizer, prompts).texts
    values = [stranger.facts[relation][reader.language] for stranger, relation in facts]
    return sum(value.lower() in answer.lower() for value, answer in zip(values, answers, strict=True)) / count
