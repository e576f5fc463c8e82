"""Writes sentences, documents, questions and answers about the closed world, in one language, from one random stream."""

import random
from collections.abc import Callable
from types import ModuleType

from mini import phrases_en, phrases_ja, phrases_zh
from mini.facts import RELATIONS, Entity
from mini.strangers import make_stranger

PHRASES: dict[str, ModuleType] = {"ja": phrases_ja, "zh": phrases_zh, "en": phrases_en}
TITLE_MARKS = {"ja": "『{}』", "zh": "《{}》", "en": "{}"}  # around a book's title in a heading
STRANGERS = 0.35  # of what documents are about; nobody and nothing of them is mentioned in another document


class TextGenerator:
    """Generates sentences, documents, questions and answers about the world in one language, from one random stream."""

    def __init__(self, language: str, entities: list[Entity], seed: str) -> None:
        self.language = language
        self.phrases = PHRASES[language]
        self.entities = entities
        self.names = {entity.name for entity in entities}
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

    def render(self, table: str, entity: Entity, relation: str) -> str:
        pattern = self._choose(getattr(self.phrases, table)[f"{entity.kind}.{relation}"])
        return self._fill(pattern, entity, relation)

    def introduction(self, entity: Entity) -> str:
        return self._fill(self._choose(self.phrases.INTRODUCTIONS[entity.kind]), entity)

    def profile(self, entity: Entity) -> str:
        return self._fill(self._choose(self.phrases.PROFILES[entity.kind]), entity)

    def statements(self, entity: Entity, count: int) -> list[str]:
        relations = self.rng.sample(list(entity.facts), min(count, len(entity.facts)))
        return [self.render("STATEMENTS", entity, relation) for relation in relations]

    def any_fact(self) -> tuple[Entity, str]:
        entity = self.rng.choice(self.entities)
        return entity, self.rng.choice(list(entity.facts))

    def subject(self) -> Entity:
        """What a document is about: something of the world, or a stranger."""
        return self.stranger() if self.rng.random() < STRANGERS else self.rng.choice(self.entities)

    # ------------------------------------------------------------------------------------------------------ documents
    def article(self) -> str:
        """An encyclopedia article about one entity: sometimes a heading, then two to six sentences or more."""
        self._choose_register()
        entity = self.subject()
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
        return self.profile(entity) if self.rng.random() < 0.4 else self.render("STATEMENTS", entity, relation)

    def guide(self) -> str:
        """A long list of several entities of one kind, one paragraph each."""
        self._choose_register()
        kind = self.rng.choice(list(RELATIONS))
        inhabitants = [entity for entity in self.entities if entity.kind == kind]
        chosen = self.rng.sample(inhabitants, self.rng.randint(4, min(14, len(inhabitants))))
        chosen = [self.stranger(kind) if self.rng.random() < STRANGERS else entity for entity in chosen]
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
            entity = self.subject()
            relation = self.rng.choice(list(entity.facts))
            if self.rng.random() < 0.5:
                sentences.append(self.render("NARRATIVE_STATEMENTS", entity, relation))
            else:
                sentence = self.render("STATEMENTS", entity, relation)
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
        return self.render("HELD_OUT_QUESTIONS" if held_out else "QUESTIONS", entity, relation)

    def answer(self, entity: Entity, relation: str) -> str:
        return self.render("ANSWERS", entity, relation)

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
        return self.talk_about([self.rng.choice(self.entities)], self, 1)[0]

    def question_about_stranger(self) -> tuple[str, str]:
        return self.talk_about([self.stranger()], self, 1)[0]

    def talk_about_strangers(
        self, writer: "TextGenerator | None" = None, namesakes: float = 0
    ) -> list[tuple[str, str]]:
        """A passage about one to three strangers of a kind, in the language of `writer`, and two to five questions about it.

        Args:
            namesakes: how many of the strangers bear a name of the world, so that what the passage says has to be read.
        """
        kind = self.rng.choice(list(RELATIONS))
        count = self.rng.choice([1, 2, 2, 3])
        strangers = [self.stranger(kind, self.rng.random() < namesakes) for _ in range(count)]
        if len({stranger.name for stranger in strangers}) < count:
            return self.talk_about_strangers(writer, namesakes)
        return self.talk_about(strangers, writer or self, self.rng.randint(2, 5))

    def talk_about(self, entities: list[Entity], writer: "TextGenerator", turns: int) -> list[tuple[str, str]]:
        """A passage in the language of `writer`, and at most so many questions about what it states, with their answers."""
        stated = [
            (entity, relation)
            for entity in entities
            for relation in self.rng.sample(list(entity.facts), self.rng.randint(1 if len(entities) > 1 else 2, 3))
        ]
        writer._choose_register()
        sentences = [writer.render("STATEMENTS", entity, relation) for entity, relation in stated]
        self.rng.shuffle(sentences)
        asked = self.rng.sample(stated, min(turns, len(stated)))
        questions = [self.question(entity, relation) for entity, relation in asked]
        pattern = self.rng.choice([*self.phrases.PASSAGE_REQUESTS, *["{passage}\n{question}"] * 4])
        questions[0] = pattern.format(passage=writer.join.join(sentences), question=questions[0])
        return list(zip(questions, (self.answer(entity, relation) for entity, relation in asked), strict=True))

    def stranger(self, kind: str | None = None, namesake: bool = False) -> Entity:
        """Something from outside the world; a namesake bears the name of an inhabitant, with facts of its own."""
        stranger = make_stranger(kind or self.rng.choice(list(RELATIONS)), self.rng, self.names)
        if namesake:
            stranger.name = self.rng.choice([entity.name for entity in self.entities if entity.kind == stranger.kind])
        return stranger

    def greeting(self) -> tuple[str, str]:
        name = self.stranger("person").name[self.language]
        greeting, reply = self.rng.choice(self.phrases.GREETINGS)
        return greeting.format(e=name), reply.format(e=name)

    def small_talk(self) -> tuple[str, str]:
        return self.rng.choice(self.phrases.SMALL_TALK)

    def riddle(self) -> tuple[str, str]:
        return self.rng.choice(self.phrases.RIDDLES)

    def turn(self, *weighted: tuple[float, Callable[[], tuple[str, str]]]) -> tuple[str, str]:
        """Draws one exchange, its kind by weight."""
        kinds = [kind for _, kind in weighted]
        return self.rng.choices(kinds, [weight for weight, _ in weighted])[0]()

    def turns(self, *weighted: tuple[float, Callable[[], tuple[str, str]]]) -> list[tuple[str, str]]:
        """Draws a dialogue of one to three exchanges."""
        return [self.turn(*weighted) for _ in range(self.rng.randint(1, 3))]
