"""Texts and instructions that set two languages side by side: translations, and names in several languages."""

from collections.abc import Sequence

from mini.facts import RELATIONS, Entity, Name
from mini.text_generator import TextGenerator

Exchange = tuple[str, str]


class Bridge:
    """Generates exchanges between two languages, from the random stream of the first one's generator.

    The user writes in the language of `near`, which is also that of the answer, except of a translation.
    """

    def __init__(self, near: TextGenerator, far: TextGenerator, names: Sequence[Name]) -> None:
        """`names` are those that are asked for; facts are those of the entities that `near` knows."""
        self.near, self.far, self.rng = near, far, near.rng
        self.names = [name for name in names if name[near.language] != name[far.language]]

    def foreign_name(self) -> Exchange:
        """A question about an entity by its name in the far language, which the answer repeats."""
        entity = self.rng.choice(self.near.entities)
        relation = self.rng.choice(list(entity.facts))
        renamed = Entity(entity.kind, _in_all(entity.name[self.far.language]), True, facts=entity.facts)
        return self.near.question(renamed, relation), self.near.answer(renamed, relation)

    def translation(self) -> Exchange:
        """Sentences in one language, to be translated into the other."""
        entity = self.near.stranger() if self.rng.random() < 0.6 else self.rng.choice(self.near.entities)
        relations = self.rng.sample(list(entity.facts), self.rng.randint(1, 2))
        source, target = self.rng.choice([(self.near, self.far), (self.far, self.near)])
        texts = [
            generator.join.join(generator.answer(entity, name) for name in relations) for generator in (source, target)
        ]
        request = self.rng.choice(self.near.phrases.TRANSLATION_REQUESTS)
        return request.format(text=texts[0], language=self.near.phrases.LANGUAGE_NAMES[target.language]), texts[1]

    def name(self) -> Exchange:
        """A name in one language, asked for in the other."""
        name = self.near.stranger().name if self.rng.random() < 0.4 else self.rng.choice(self.names)
        source, target = self.rng.choice([(self.near, self.far), (self.far, self.near)])
        request, reply = self.rng.choice(self.near.phrases.NAME_REQUESTS)
        values = dict(
            name=name[source.language],
            translation=name[target.language],
            language=self.near.phrases.LANGUAGE_NAMES[target.language],
        )
        return request.format(**values), reply.format(**values)

    def statements(self) -> dict[str, str]:
        """Language code -> what states the same facts, each text in its own words."""
        entity = self.near.stranger() if self.rng.random() < 0.3 else self.rng.choice(self.near.entities)
        relations = self.rng.sample(list(entity.facts), self.rng.randint(1, 3))
        return {
            generator.language: generator.join.join(generator.render("STATEMENTS", entity, name) for name in relations)
            for generator in (self.near, self.far)
        }


def _in_all(text: str) -> Name:
    return Name(text, text, text)


def glossary(entities: Sequence[Entity]) -> list[Name]:
    """All names of entities and of what their relations name, once each."""
    values = [value for relations in RELATIONS.values() for values in relations.values() for value in values]
    return list(dict.fromkeys([*(entity.name for entity in entities), *values]))
