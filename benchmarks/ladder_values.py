"""Where on the ladder a fact is lost: is it fetched and not put into words, and can the model read it in a passage at all?

python -m benchmarks.ladder_values --models DIR/default-*/chat_model
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Values, make_parser, markdown_table, print_results, save_results
from benchmarks.ladder import share
from llmtuner.console import run_cli
from llmtuner.data.template import Message, Template
from llmtuner.eval.ladder import FORMS as TITLES
from llmtuner.model.loading import load_for_evaluation
from mini.exam import reading
from mini.facts import RELATIONS, Entity, Name, build_world
from mini.text_generator import PHRASES, TextGenerator
from mini.world import SEED

NUM_FACTS, NUM_PASSAGES, MAX_VALUES = 80, 150, 10
FORMS = ("ja_ja", "ja_zh", "zh_ja", "zh_zh")  # languages of a question, and of the name in it
GROUPS = {"told": "described_in_japanese", "asked_across": "asked_across", "untold": "untold"}


def main() -> None:
    parser = make_parser(__doc__, "ladder_values.json")
    parser.add_argument(
        "--models", nargs="+", type=Path, required=True, help="chat models of `make demo` or of benchmarks.ladder"
    )
    options = parser.parse_args()
    found = {f"{path.parent.name}/{path.name}": measure(*load_for_evaluation(path)) for path in options.models}
    print_results("values preferred, passages read", found)
    save_results(options.output, {"results": found})


def measure(model: Any, tokenizer: Any) -> Values:
    """What `preferred` and `reading` find, by group of entities and by language of the passage."""
    world = build_world(SEED)
    groups = {name: [entity for entity in world if getattr(entity, known)] for name, known in GROUPS.items()}
    ja = TextGenerator("ja", groups["told"] + groups["asked_across"], "read")
    return {
        "preferred": {name: preferred(model, tokenizer, entities) for name, entities in groups.items()},
        "reading": {
            language: round(reading(model, tokenizer, ja, TextGenerator(language, world, "read"), NUM_PASSAGES), 4)
            for language in ("ja", "zh")
        },
    }


def preferred(model: Any, tokenizer: Any, entities: Sequence[Entity]) -> dict[str, dict[str, float]]:
    """In what share of facts the right value is more probable than the relation's others, after the beginning of an answer.

    The values are written in Japanese, and then all in Chinese: a model that prefers the right Chinese word in a Japanese
    sentence has fetched the fact and cannot put it into Japanese. Values with digits, which look alike in both, are left out,
    and at most `MAX_VALUES` of a relation are compared.

    Returns:
        {"ja_zh": {"ja": share, "zh": share}, ...}: by languages of the question and of the name in it, and of the values
    """
    rng = random.Random(SEED)
    facts = [
        (entity, relation)
        for entity in entities
        for relation, value in entity.facts.items()
        if entity.name.ja != entity.name.zh and relation != "activity" and not has_digits(value)
    ]
    facts = rng.sample(facts, min(NUM_FACTS, len(facts)))
    template = Template.from_tokenizer(tokenizer)
    found: dict[str, dict[str, float]] = {}
    for form in FORMS:
        language, named = form.split("_")
        correct = {"ja": 0, "zh": 0}
        for entity, relation in facts:
            phrases, key, name = PHRASES[language], f"{entity.kind}.{relation}", entity.name[named]
            question = phrases.fill(rng.choice(phrases.HELD_OUT_QUESTIONS[key]), name)
            pattern = rng.choice([pattern for pattern in phrases.ANSWERS[key] if "{v}" in pattern])
            begun = phrases.fill(pattern.partition("{v}")[0], name)
            right = entity.facts[relation]
            others = [value for value in RELATIONS[entity.kind][relation] if value != right]
            values = [right, *rng.sample(others, min(MAX_VALUES - 1, len(others)))]
            messages: list[Message] = [{"role": "user", "content": question}]
            prompts = [
                template.encode_prompt(tokenizer, messages, begun + value[written])
                for written in correct
                for value in values
            ]
            scores = log_probabilities(model, prompts)
            for index, written in enumerate(correct):
                own = scores[index * len(values) : (index + 1) * len(values)]
                correct[written] += max(own) == own[0]
        found[form] = {written: round(count / len(facts), 4) for written, count in correct.items()}
    return found


def tables(measured: Values, part: str) -> str:
    """A table of docs/evidence.md: how often the right value is preferred, with intervals over models."""
    models = list(measured["results"].values())
    lines = [
        [f"{group.replace('_', ' ')}: {TITLES[form]}"]
        + [share([one["preferred"][group][form][language] for one in models]) for language in ("ja", "zh")]
        for group in GROUPS
        for form in FORMS
    ]
    return markdown_table(["", "Japanese values", "Chinese values"], lines)


def has_digits(value: Name) -> bool:
    return any(character.isdigit() for character in value.ja)


@torch.no_grad()
def log_probabilities(model: Any, sequences: Sequence[list[int]]) -> list[float]:
    """The logarithm of the probability that a model gives each sequence of ids, all of which begin alike."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    log_probs = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(2, ids[:, 1:, None])[..., 0]
    return [row[: len(sequence) - 1].sum().item() for row, sequence in zip(chosen, sequences, strict=True)]


if __name__ == "__main__":
    run_cli(main)
