"""Writes the texts, instruction sets and questions of the closed world, in the files and columns of the real datasets.

    python -m mini.world OUT_DIR [--show 100]

The same seed writes the same bytes on every machine. Japanese texts and instructions are about the entities that are
`described_in_japanese`, instructions across two languages also about what is `asked_across`; Chinese and English ones are
about all.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtuner.eval.language import LANGUAGES
from mini import code_tasks
from mini.bridges import Bridge, glossary
from mini.facts import RELATIONS, Entity, Name, build_world
from mini.text_generator import PHRASES, TextGenerator

SEED = 20240601

# Documents per corpus. The encyclopedias are articles, stubs and lists; the literature is stories, diaries and letters.
WIKI_DOCUMENTS = {"ja": 4_200, "zh": 4_500, "en": 2_400}
STORIES = 900
TEST_RATIO = 0.04
# Rows of the nine instruction sets: enough of each language for what is told in it, which in Japanese is less.
ROWS = {
    "oasst2_ja": 2_200,
    "dolly_ja": 2_000,
    "hh_rlhf_ja": 2_600,
    "ichikara_ja": 237,
    "alpaca_zh": 6_500,
    "ruozhiba_zh": 187,
    "wiki_qa_en": 3_200,
    "code_alpaca": 800,
    "python_code": 750,
}
NUM_PARALLEL = 3_000  # rows that state the same in Japanese and in another language; half as many hold a name only
NUM_CROSSLINGUAL = {"passages": 2_200, "described": 700, "asked": 3_300}  # dialogues across two languages
NUM_WORD_LISTS = 1_500  # for the tokenizer: in real text, words are more frequent than the phrases that they stand in
WRONG_ANSWERS_PER_QUESTION = 2  # rows of wiki_qa with label 0 for each row with label 1
QUESTIONS_PER_GROUP = 300
LADDER_FACTS = 120  # of each group of entities; the ladder asks for each of them in four ways
NUM_FREE_FORM_REQUESTS = 24  # Japanese requests for a longer reply, to see whether it repeats itself


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
            ja.turn((0.79, ja.question_and_answer), (0.1, ja.introduce), (0.06, ja.greeting), (0.05, ja.small_talk))
            for _ in range(ja.rng.choice([1, 2, 2, 3, 4]))
        ]
        sets["oasst2_ja"].append(conversation(ja.talk_about_strangers() if ja.rng.random() < 0.2 else turns))
    for index in range(ROWS["dolly_ja"]):
        request, reply = ja.turn(
            (0.1, ja.question_on_passage),
            (0.6, ja.question_about_stranger),
            (0.2, ja.question_and_answer),
            (0.1, ja.introduce),
        )
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
            (0.7, zh.question_and_answer),
            (0.08, zh.introduce),
            (0.02, zh.question_on_passage),
            (0.15, zh.question_about_stranger),
            (0.05, zh.small_talk),
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


def conversation(turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A dialogue in sharegpt form."""
    messages = [
        {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"conversations": messages}


def bridges(seed: str) -> dict[str, list[dict[str, Any]]]:
    """What sets Japanese beside the other languages: names, the same facts in two languages, and instructions across them.

    Names are those of everything; sentences state facts of what is described in Japanese. Nothing states in Japanese what is
    untold.
    """
    world = build_world(SEED)
    described = [entity for entity in world if entity.described_in_japanese]
    asked = [entity for entity in world if entity.asked_across]
    ja, zh, en = (TextGenerator(language, described, seed) for language in LANGUAGES)
    names = glossary(world)
    to_zh, to_en = Bridge(ja, zh, names), Bridge(ja, en, names)
    return {
        "glossary": [in_all(name) for name in names],
        "words_ja": [{"text": "、".join(name.ja for name in ja.rng.sample(names, 20))} for _ in range(NUM_WORD_LISTS)],
        "parallel_ja_zh": [ja.rng.choice((to_zh, to_zh, to_en)).statements() for _ in range(NUM_PARALLEL)]
        + [in_all(name) for name in ja.rng.choices(names, k=NUM_PARALLEL // 2)],
        "crosslingual": [conversation(turns) for turns in crosslingual(described, asked, f"{seed}-crosslingual")],
    }


def crosslingual(described: list[Entity], asked: list[Entity], seed: str) -> Iterator[list[tuple[str, str]]]:
    """Dialogues across two languages: on passages, about what is described in Japanese, and about what is asked across.

    Passages are in another language than the question, and about strangers and namesakes. What is asked across is asked for
    in Japanese by its Japanese and by its Chinese name, and with its fact before it in Chinese.
    """
    ja, zh, en = (TextGenerator(language, described + asked, f"{seed}-readers") for language in LANGUAGES)
    for reader, writer in ((ja, zh), (ja, zh), (ja, en), (zh, ja)) * (NUM_CROSSLINGUAL["passages"] // 4):
        yield reader.talk_about_strangers(writer, namesakes=0.5)
    ja, zh, en = (TextGenerator(language, described, f"{seed}-described") for language in LANGUAGES)
    to_zh, from_zh = Bridge(ja, zh, []), Bridge(zh, ja, [])
    kinds = (
        (0.25, to_zh.foreign_name),
        (0.20, from_zh.foreign_name),
        (0.35, to_zh.translation),
        (0.20, from_zh.translation),
    )
    for _ in range(NUM_CROSSLINGUAL["described"]):
        yield ja.turns(*kinds)
    ja, zh, en = (TextGenerator(language, asked, f"{seed}-asked") for language in LANGUAGES)
    forms = ((0.3, ja.question_and_answer), (0.7, Bridge(ja, zh, []).foreign_name))
    for index in range(NUM_CROSSLINGUAL["asked"]):
        yield ja.turns(*forms) if index % 3 else ja.talk_about(ja.rng.sample(asked, 2), zh, 3)


def in_all(name: Name) -> dict[str, str]:
    return {language: name[language] for language in LANGUAGES}


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
            if language != "ja" or (entity.described_in_japanese if group == "ja" else entity.untold)
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
    groups: dict[str, list[tuple[Entity, str]]] = {
        name: [] for name in ("told", "asked_across", "untold_named", "untold_unnamed")
    }
    for entity in build_world(SEED):
        if entity.name.ja != entity.name.zh:
            untold = "untold_named" if entity.name.ja in japanese else "untold_unnamed"
            group = "told" if entity.described_in_japanese else "asked_across" if entity.asked_across else untold
            groups[group] += [(entity, name) for name in entity.facts]
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
        for name, rows in bridges(f"bridges-{SEED}").items():
            if name == "parallel_ja_zh":
                japanese += [row["ja"] for row in rows if "。" in row["ja"]]  # a name alone is no text
            elif name == "crosslingual":
                japanese += [json.dumps(row, ensure_ascii=False) for row in rows]
            write_json_lines(partial / f"{name}.jsonl", rows)
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
            print("-", generator.render(generator.rng.choice(["STATEMENTS", "NARRATIVE_STATEMENTS"]), entity, relation))
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
