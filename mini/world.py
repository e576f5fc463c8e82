"""Writes the texts, instruction sets and questions of the closed world, in the files and columns of the real datasets.

    python -m mini.world OUT_DIR [--show 100]

The same seed writes the same bytes on every machine. Japanese texts and instructions are about the entities that are
`described_in_japanese`; Chinese and English ones are about all.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llmtuner.eval.language import LANGUAGES
from mini import code_tasks, phrases_en, phrases_ja, phrases_zh
from mini.facts import RELATIONS, Entity, build_world

SEED = 20240601
PHRASES: dict[str, ModuleType] = {"ja": phrases_ja, "zh": phrases_zh, "en": phrases_en}

# Documents per corpus. The encyclopedias are articles, stubs and lists; the literature is stories, diaries and letters.
WIKI_DOCUMENTS = {"ja": 6_500, "zh": 2_400, "en": 2_400}
STORIES = 900
TEST_RATIO = 0.04
TITLE_MARKS = {"ja": "『{}』", "zh": "《{}》", "en": "{}"}  # around a book's title in a heading
# Rows of the nine instruction sets: an eighth of the original's 226,984, in the same ratios.
ROWS = {
    "oasst2_ja": 6_428,
    "dolly_ja": 1_876,
    "hh_rlhf_ja": 6_166,
    "ichikara_ja": 237,
    "alpaca_zh": 6_102,
    "ruozhiba_zh": 187,
    "wiki_qa_en": 2_545,
    "code_alpaca": 2_502,
    "python_code": 2_326,
}
WRONG_ANSWERS_PER_QUESTION = 2  # rows of wiki_qa with label 0 for each row with label 1
QUESTIONS_PER_GROUP = 300
LADDER_FACTS = 120  # of each group of entities; the ladder asks for each of them in four ways
NUM_FREE_FORM_REQUESTS = 24  # Japanese requests for a longer reply, to see whether it repeats itself


class TextGenerator:
    """Generates sentences, documents, questions and answers about the world in one language, from one random stream."""

    def __init__(self, language: str, entities: list[Entity], seed: str) -> None:
        self.language = language
        self.phrases = PHRASES[language]
        self.entities = entities
        self.rng = random.Random(f"{seed}-{language}")
        self.join = " " if language == "en" else ""
        self.polite: bool | None = None  # the register of the current document; None if the language has none

    # ------------------------------------------------------------------------------------------------------ sentences
    def _choose(self, patterns: list[str]) -> str:
        """Chooses a pattern, in the register of the document if there is one."""
        if self.polite is not None:
            patterns = [pattern for pattern in patterns if phrases_ja.is_polite(pattern) == self.polite] or patterns
        return self.rng.choice(patterns)

    def _choose_register(self) -> None:
        """Chooses whether a Japanese document is polite or plain, throughout."""
        if self.language == "ja":
            self.polite = self.rng.random() < 0.5

    def _fill(self, pattern: str, entity: Entity, relation: str | None = None) -> str:
        facts = {key: value[self.language] for key, value in entity.facts.items()}
        value = facts[relation] if relation else ""
        return self.phrases.fill(pattern, entity.name[self.language], value, **facts)

    def _render(self, table: str, entity: Entity, relation: str) -> str:
        pattern = self._choose(getattr(self.phrases, table)[f"{entity.kind}.{relation}"])
        return self._fill(pattern, entity, relation)

    def introduction(self, entity: Entity) -> str:
        return self._fill(self._choose(self.phrases.INTRODUCTIONS[entity.kind]), entity)

    def profile(self, entity: Entity) -> str:
        return self._fill(self._choose(self.phrases.PROFILES[entity.kind]), entity)

    def statements(self, entity: Entity, count: int) -> list[str]:
        relations = self.rng.sample(list(entity.facts), min(count, len(entity.facts)))
        return [self._render("STATEMENTS", entity, relation) for relation in relations]

    def any_fact(self) -> tuple[Entity, str]:
        entity = self.rng.choice(self.entities)
        return entity, self.rng.choice(list(entity.facts))

    # ------------------------------------------------------------------------------------------------------ documents
    def article(self) -> str:
        """An encyclopedia article about one entity: sometimes a heading, then two to six sentences or more."""
        self._choose_register()
        entity = self.rng.choice(self.entities)
        sentences = [self.introduction(entity)] if self.rng.random() < 0.6 else []
        if self.rng.random() < 0.4:
            sentences.append(self.profile(entity))
        sentences += self.statements(entity, self.rng.randint(2, 5))
        if self.rng.random() < 0.15:
            sentences.append(self._choose(self.phrases.PHRASES_OF_NUMBERS))
        body = self.join.join(sentences)
        if self.rng.random() < 0.3:
            name = entity.name[self.language]
            if entity.kind == "book":
                name = TITLE_MARKS[self.language].format(name)
            body = self.phrases.fill(self.rng.choice(self.phrases.HEADINGS), name) + "\n\n" + body
        return body

    def stub(self) -> str:
        """One line."""
        self._choose_register()
        entity, relation = self.any_fact()
        return self.profile(entity) if self.rng.random() < 0.4 else self._render("STATEMENTS", entity, relation)

    def guide(self) -> str:
        """A long list of several entities of one kind, one paragraph each."""
        self._choose_register()
        kind = self.rng.choice(list(RELATIONS))
        inhabitants = [entity for entity in self.entities if entity.kind == kind]
        chosen = self.rng.sample(inhabitants, self.rng.randint(4, min(14, len(inhabitants))))
        lines = [self.rng.choice(self.phrases.LIST_INTROS[kind])]
        for entity in chosen:
            lines.append(self.join.join([self.profile(entity), *self.statements(entity, self.rng.randint(1, 2))]))
        return "\n".join(lines)

    def wiki_document(self) -> str:
        draw = self.rng.random()
        return self.article() if draw < 0.75 else self.stub() if draw < 0.93 else self.guide()

    def story(self) -> str:
        """A narrative: an opening, remarks about the world in quotation or memory, what happens between them, a closing."""
        self.polite = False if self.language == "ja" else None  # narration is plain; people speak as they like
        remarks = self.rng.choice([2, 3, 4, 5, 6, 8, 12, 20])
        sentences = [self._choose(self.phrases.OPENINGS)]
        for _ in range(remarks):
            entity, relation = self.any_fact()
            if self.rng.random() < 0.5:
                sentences.append(self._render("NARRATIVE_STATEMENTS", entity, relation))
            else:
                sentence = self._render("STATEMENTS", entity, relation)
                pattern = self._choose(self.phrases.DIALOGUE)
                sentences.append(pattern.format(speaker=self.rng.choice(self.phrases.SPEAKERS), sentence=sentence))
            if self.rng.random() < 0.6:
                sentences.append(self._choose(self.phrases.LINKS))
        sentences.append(self._choose(self.phrases.CLOSINGS))
        paragraphs, start = [], 0
        while start < len(sentences):
            length = self.rng.randint(2, 5)
            paragraphs.append(self.join.join(sentences[start : start + length]))
            start += length
        return "\n".join(paragraphs)

    # --------------------------------------------------------------------------------------------------- instructions
    def question(self, entity: Entity, relation: str, held_out: bool = False) -> str:
        self.polite = None
        return self._render("HELD_OUT_QUESTIONS" if held_out else "QUESTIONS", entity, relation)

    def answer(self, entity: Entity, relation: str) -> str:
        return self._render("ANSWERS", entity, relation)

    def question_and_answer(self) -> tuple[str, str]:
        entity, relation = self.any_fact()
        return self.question(entity, relation), self.answer(entity, relation)

    def introduce(self) -> tuple[str, str]:
        entity = self.rng.choice(self.entities)
        request = self._fill(self.rng.choice(self.phrases.INTRODUCE_REQUESTS[entity.kind]), entity)
        self._choose_register()
        reply = self.join.join([self.introduction(entity), *self.statements(entity, self.rng.randint(1, 3))])
        return request, reply

    def question_on_passage(self) -> tuple[str, str]:
        entity, relation = self.any_fact()
        relations = self.rng.sample(list(entity.facts), 2)
        self._choose_register()
        sentences = [self._render("STATEMENTS", entity, r) for r in dict.fromkeys([relation, *relations])]
        self.rng.shuffle(sentences)
        pattern = self.rng.choice(self.phrases.PASSAGE_REQUESTS)
        request = pattern.format(passage=self.join.join(sentences), question=self.question(entity, relation))
        return request, self.answer(entity, relation)

    def small_talk(self) -> tuple[str, str]:
        return self.rng.choice(self.phrases.SMALL_TALK)

    def riddle(self) -> tuple[str, str]:
        return self.rng.choice(self.phrases.RIDDLES)

    def turn(self, *weighted: tuple[float, Callable[[], tuple[str, str]]]) -> tuple[str, str]:
        """Draws one exchange, its kind by weight."""
        kinds = [kind for _, kind in weighted]
        return self.rng.choices(kinds, [weight for weight, _ in weighted])[0]()


def build_generators(seed: str) -> dict[str, TextGenerator]:
    """One generator per language; the Japanese one knows only what is described in Japanese."""
    world = build_world(SEED)
    japanese = [entity for entity in world if entity.described_in_japanese]
    return {language: TextGenerator(language, japanese if language == "ja" else world, seed) for language in LANGUAGES}


def documents(generator: TextGenerator, wiki: int, stories: int) -> tuple[list[str], list[str]]:
    """Distinct encyclopedic and narrative documents."""
    return list(_distinct(generator.wiki_document, wiki)), list(_distinct(generator.story, stories))


def _distinct(make: Callable[[], str], count: int) -> Iterator[str]:
    seen: set[str] = set()
    while len(seen) < count:
        text = make()
        if text not in seen:
            seen.add(text)
            yield text


def instruction_sets(generators: dict[str, TextGenerator]) -> dict[str, list[dict[str, Any]]]:
    """The nine sets, each in the columns of its original."""
    ja, zh, en = (generators[language] for language in LANGUAGES)
    sets: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}

    for _ in range(ROWS["oasst2_ja"]):
        turns = [
            ja.turn((0.85, ja.question_and_answer), (0.1, ja.introduce), (0.05, ja.small_talk))
            for _ in range(ja.rng.choice([1, 2, 2, 3, 4]))
        ]
        messages = [
            {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        sets["oasst2_ja"].append({"conversations": messages})
    for index in range(ROWS["dolly_ja"]):
        request, reply = ja.turn((0.4, ja.question_on_passage), (0.4, ja.question_and_answer), (0.2, ja.introduce))
        instruction, _, passage = request.partition("\n")
        sets["dolly_ja"].append({"index": str(index), "instruction": instruction, "input": passage, "output": reply})
    for index in range(ROWS["hh_rlhf_ja"]):
        request, reply = ja.turn((0.9, ja.question_and_answer), (0.05, ja.introduce), (0.05, ja.small_talk))
        sets["hh_rlhf_ja"].append({"index": str(index), "instruction": request, "input": "", "output": reply})
    for index in range(ROWS["ichikara_ja"]):
        request, reply = ja.turn((0.8, ja.introduce), (0.2, ja.riddle))
        sets["ichikara_ja"].append({"ID": f"ichikara-{index:04d}", "text": request, "output": reply})
    for _ in range(ROWS["alpaca_zh"]):
        request, reply = zh.turn(
            (0.8, zh.question_and_answer), (0.08, zh.introduce), (0.07, zh.question_on_passage), (0.05, zh.small_talk)
        )
        sets["alpaca_zh"].append({"instruction": request, "input": "", "output": reply})
    for _ in range(ROWS["ruozhiba_zh"]):
        request, reply = zh.riddle()
        sets["ruozhiba_zh"].append({"instruction": request, "output": reply})
    for index in range(ROWS["wiki_qa_en"]):
        entity, relation = en.any_fact()
        question = en.question(entity, relation)
        row = {"question_id": f"Q{index}", "question": question, "document_title": entity.name.en}
        sets["wiki_qa_en"].append({**row, "answer": en.answer(entity, relation), "label": 1})
        others = [other for other in en.entities if other.kind == entity.kind and other is not entity]
        for other in en.rng.sample(others, WRONG_ANSWERS_PER_QUESTION):
            sets["wiki_qa_en"].append({**row, "answer": en.answer(other, relation), "label": 0})
    for name in ("code_alpaca", "python_code"):
        for instruction, output in code_tasks.sample_tasks(ROWS[name], en.rng):
            sets[name].append({"instruction": instruction, "input": "", "output": output})
    return sets


def questions(generators: dict[str, TextGenerator]) -> Iterator[dict[str, Any]]:
    """Questions in phrasings that no instruction set uses, with the value that a correct answer must name."""
    world = build_world(SEED)
    for group in ("zh", "en", "ja", "ja_unseen"):
        language = group[:2]
        generator = generators[language]
        asked = [
            (entity, relation)
            for entity in world
            for relation in entity.facts
            if language != "ja" or entity.described_in_japanese == (group == "ja")
        ]
        for entity, relation in generator.rng.sample(asked, min(QUESTIONS_PER_GROUP, len(asked))):
            yield _graded(group, language, entity, relation, generator.question(entity, relation, held_out=True))
    for _ in range(NUM_FREE_FORM_REQUESTS):
        request, _ = generators["ja"].introduce()
        yield {"group": "ja_free", "language": "ja", "question": request}


def _graded(group: str, language: str, entity: Entity, relation: str, question: str) -> dict[str, Any]:
    value = entity.facts[relation]
    others = {other[language] for other in RELATIONS[entity.kind][relation] if other != value}
    return {
        "group": group,
        "language": language,
        "relation": f"{entity.kind}.{relation}",
        "question": question,
        "value": value[language],
        "wrong_values": sorted(others),
        "subject": names(entity),
    }


def ladder(japanese: str) -> Iterator[dict[str, Any]]:
    """Questions for `llmtuner.eval.ladder`: of each fact, asked in Japanese and in Chinese, with the subject's name in either.

    The phrasings are the held-out ones of `questions`, the random stream is another. Entities whose Japanese and Chinese names
    are written alike are left out: between these there is nothing to cross.

    Args:
        japanese: all Japanese texts and instruction rows that a model is trained on. An untold entity, which none of them
            describes, is "unnamed" if its Japanese name is not even a part of a word in them.
    """
    rng = random.Random(f"ladder-{SEED}")
    groups: dict[str, list[tuple[Entity, str]]] = {"told": [], "untold_named": [], "untold_unnamed": []}
    for entity in build_world(SEED):
        if entity.name.ja != entity.name.zh:
            untold = "untold_named" if entity.name.ja in japanese else "untold_unnamed"
            groups["told" if entity.described_in_japanese else untold] += [(entity, name) for name in entity.facts]
    for group, facts in groups.items():
        for entity, relation in rng.sample(facts, min(LADDER_FACTS, len(facts))):
            for language in ("ja", "zh"):
                phrases = PHRASES[language]
                pattern = rng.choice(phrases.HELD_OUT_QUESTIONS[f"{entity.kind}.{relation}"])
                for written in ("ja", "zh"):
                    question = phrases.fill(pattern, entity.name[written])
                    yield _graded(f"{group}.{language}_{written}", language, entity, relation, question)


def subjects() -> dict[str, Any]:
    """A row of a questions file with the names of everything in the world: an answer about something else is wrong."""
    return {"subjects": [names(entity) for entity in build_world(SEED)]}


def names(entity: Entity) -> list[str]:
    """What an entity is called, in any language."""
    return [entity.name[language] for language in LANGUAGES]


def write_world(directory: Path) -> None:
    """Writes all files of the world into `directory`, which appears complete or not at all."""
    from llmtuner.outputs import atomic_directory

    generators = build_generators(f"world-{SEED}")
    japanese: list[str] = []  # what is trained on
    with atomic_directory(directory, "mini/world.py", replace=True) as partial:
        for language, generator in generators.items():
            wiki, stories = documents(generator, WIKI_DOCUMENTS[language], STORIES if language == "ja" else 0)
            corpora = {"ja": {"wiki": wiki, "aozora": stories}, "zh": {"wiki": wiki}, "en": {"wiki": wiki}}[language]
            for corpus, texts in corpora.items():
                held_out = round(len(texts) * TEST_RATIO)
                for part, chosen in (("test", texts[:held_out]), ("train", texts[held_out:])):
                    _write_corpus(partial, f"{language}_{corpus}.{part}", chosen)
                    japanese += chosen if (language, part) == ("ja", "train") else []
        for name, rows in instruction_sets(generators).items():
            japanese += [json.dumps(row, ensure_ascii=False) for row in rows if name.endswith("_ja")]
            if name in ("wiki_qa_en", "python_code"):
                _write_parquet(partial / f"{name}.parquet", rows)
            elif name == "hh_rlhf_ja":
                write_json_lines(partial / f"{name}.jsonl", rows)
            else:
                _write_json(partial / f"{name}.json", rows)
        asked = questions(build_generators(f"questions-{SEED}"))
        write_json_lines(partial / "questions.jsonl", [*asked, subjects()])
        write_json_lines(partial / "ladder.jsonl", [*ladder("\n".join(japanese)), subjects()])


def _write_corpus(directory: Path, stem: str, texts: list[str]) -> None:
    """Each corpus in its original's file kind and column."""
    if stem.startswith("zh_wiki"):
        _write_json(directory / f"{stem}.json", [{"completion": text, "source": "world"} for text in texts])
    elif stem.startswith("ja_aozora"):
        write_json_lines(directory / f"{stem}.jsonl", [{"text": text} for text in texts])
    else:
        _write_parquet(directory / f"{stem}.parquet", [{"text": text} for text in texts])


def _write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="zstd")


def show(count: int) -> None:
    """Prints random sentences, documents and exchanges of each language, to be read by a person."""
    for language, generator in build_generators("show").items():
        print(f"\n════ {language}")
        for _ in range(count):
            entity, relation = generator.any_fact()
            print(
                "-", generator._render(generator.rng.choice(["STATEMENTS", "NARRATIVE_STATEMENTS"]), entity, relation)
            )
        for make in (generator.article, generator.guide, generator.story):
            print(f"\n[{make.__name__}]\n{make()}")
        for exchange in (
            generator.question_and_answer,
            generator.introduce,
            generator.question_on_passage,
            generator.small_talk,
        ):
            print(f"\n[{exchange.__name__}]", *exchange(), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, help="where to write the files")
    parser.add_argument("--show", type=int, metavar="N", help="print N random sentences of each language instead")
    arguments = parser.parse_args()
    if arguments.show:
        show(arguments.show)
    elif arguments.directory:
        write_world(arguments.directory)
        print(f"world written to {arguments.directory}")
    else:
        parser.error("give a directory, or --show N")


if __name__ == "__main__":
    main()
