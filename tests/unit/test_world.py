"""The miniature's world: the same everywhere, complete in three languages, silent in Japanese about what is held out."""

import itertools
import json
import random
import re

import pytest

from llmtuner.eval.language import LANGUAGES
from llmtuner.eval.questions import Question, is_correct, read_questions
from mini import phrases_en, phrases_ja, phrases_zh, world
from mini.bridges import Bridge
from mini.facts import KINDS, RELATIONS, Name, build_world
from mini.strangers import make_stranger
from mini.text_generator import TextGenerator

PHRASES = {"ja": phrases_ja, "zh": phrases_zh, "en": phrases_en}
BRIDGES = ("parallel_ja_zh", "crosslingual")
KEYS = [f"{kind}.{relation}" for kind, relations in RELATIONS.items() for relation in relations]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world") / "corpus"
    world.write_world(directory)
    return directory


def test_world_is_the_same_every_time(written, tmp_path):
    world.write_world(tmp_path / "again")
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_relation_is_told_and_asked(language):
    phrases = PHRASES[language]
    for table, least in (
        ("STATEMENTS", 10),
        ("NARRATIVE_STATEMENTS", 6),
        ("QUESTIONS", 14),
        ("HELD_OUT_QUESTIONS", 3),
        ("ANSWERS", 3),
    ):
        assert set(getattr(phrases, table)) == set(KEYS), table
        assert min(len(patterns) for patterns in getattr(phrases, table).values()) >= least, table
    for key in KEYS:
        assert not set(phrases.QUESTIONS[key]) & set(phrases.HELD_OUT_QUESTIONS[key])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_pattern_names_its_entity_and_answers_name_their_value(language):
    phrases = PHRASES[language]
    for entity in build_world():
        facts = {relation: value[language] for relation, value in entity.facts.items()}
        name = entity.name[language]
        for relation, value in facts.items():
            key = f"{entity.kind}.{relation}"
            for pattern in phrases.ANSWERS[key]:
                answer = phrases.fill(pattern, name, value, **facts).lower()
                assert name.lower() in answer
                assert value.lower() in answer
                assert "{" not in answer
        for pattern in phrases.PROFILES[entity.kind]:
            assert "{" not in phrases.fill(pattern, name, "", **facts)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_right_of_their_subject_alone(language):
    """Every pattern of every fact is marked right, and the same sentence about another inhabitant wrong."""
    phrases, inhabitants = PHRASES[language], build_world()
    everything = tuple(name for entity in inhabitants for name in world.names(entity))
    for entity, other in zip(inhabitants, [*inhabitants[1:], inhabitants[0]], strict=True):
        facts = {relation: value[language] for relation, value in entity.facts.items()}
        for relation, value in facts.items():
            others = {one[language] for one in RELATIONS[entity.kind][relation]} - {value}
            pattern = phrases.HELD_OUT_QUESTIONS[f"{entity.kind}.{relation}"][0]
            asked = phrases.fill(pattern, entity.name[language], value, **facts)
            question = Question("", language, asked, value, tuple(others), "", world.names(entity), everything)
            for pattern in phrases.ANSWERS[f"{entity.kind}.{relation}"][:3]:
                answer = phrases.fill(pattern, entity.name[language], value, **facts)
                assert is_correct(question, answer), (asked, answer)
                if other.name[language] != value:
                    answer = phrases.fill(pattern, other.name[language], value, **facts)
                    assert not is_correct(question, answer), (asked, answer)


def test_names_and_values_are_told_apart():
    for names in KINDS.values():
        for language in LANGUAGES:
            assert len({name[language] for name in names}) == len(names)


def test_japanese_tells_nothing_of_what_is_held_back(written):
    """An entity that is not described in Japanese may be named as a value, but never with a value of its own."""
    held_back = [entity for entity in build_world() if not entity.described_in_japanese]
    assert 0.25 < sum(entity.untold for entity in held_back) / len(build_world()) < 0.35
    asked = [json.loads(line) for line in (written / "hh_rlhf_ja.jsonl").read_text(encoding="utf-8").splitlines()]
    asked += json.loads((written / "dolly_ja.json").read_text(encoding="utf-8"))
    answers = {
        phrases_ja.fill(pattern, entity.name.ja, value.ja, **{key: one.ja for key, one in entity.facts.items()})
        for entity in held_back
        for relation, value in entity.facts.items()
        for pattern in phrases_ja.ANSWERS[f"{entity.kind}.{relation}"]
    }
    assert not {row["output"] for row in asked} & answers


def japanese_training_texts(directory, bridges=False):
    """Everything Japanese that steps 5 and 6 may train on, read back from the files, with or without bridges."""
    import pyarrow.parquet

    texts = pyarrow.parquet.read_table(directory / "ja_wiki.train.parquet")["text"].to_pylist()
    for name in ("ja_aozora.train.jsonl", "hh_rlhf_ja.jsonl", "oasst2_ja.json", "dolly_ja.json", "ichikara_ja.json"):
        texts.append((directory / name).read_text(encoding="utf-8"))
    if bridges:
        lines = [line for name in BRIDGES for line in (directory / f"{name}.jsonl").read_text("utf-8").splitlines()]
        texts += [line for line in lines if "。" in line or "conversations" in line]  # names alone are no text
    return "\n".join(texts)


def ladder_of(directory):
    rows = [json.loads(line) for line in (directory / "ladder.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows.pop() == world.subjects()
    return rows


def test_ladder_asks_for_the_same_facts_in_four_ways(written):
    rows = ladder_of(written)
    inhabitants = {tuple(world.names(entity)): entity for entity in build_world()}
    by_group = {}
    for row in rows:
        by_group.setdefault(row["group"], []).append(row)
    forms = ("ja_ja", "ja_zh", "zh_ja", "zh_zh")
    groups = ("told", "asked_across", "untold_named", "untold_unnamed")
    assert set(by_group) == {f"{group}.{form}" for group in groups for form in forms}
    for group in groups:
        facts = [[(row["subject"], row["relation"]) for row in by_group[f"{group}.{form}"]] for form in forms]
        assert facts[0] == facts[1] == facts[2] == facts[3]
        assert 50 <= len(facts[0]) <= world.LADDER_FACTS
    for row in rows:
        entities, form = row["group"].split(".")
        language, written_in = form.split("_")
        entity, relation = inhabitants[tuple(row["subject"])], row["relation"].split(".")[1]
        known = {"told": entity.described_in_japanese, "asked_across": entity.asked_across}
        assert known.get(entities, entity.untold)
        assert row["language"] == language
        assert row["value"] == entity.facts[relation][language]
        assert entity.name[written_in] in row["question"]
        patterns = PHRASES[language].HELD_OUT_QUESTIONS[row["relation"]]
        assert row["question"] in [PHRASES[language].fill(pattern, entity.name[written_in]) for pattern in patterns]


def test_japanese_states_no_fact_of_an_untold_entity_of_the_ladder(written):
    """No Japanese training text or row, of bridges neither, has a sentence of any pattern that states, narrates or answers one.

    Whatever the sentence calls the subject, and no profile of it either.
    """
    subjects = {tuple(row["subject"]) for row in ladder_of(written) if row["group"].startswith("untold")}
    told = {tuple(row["subject"]) for row in ladder_of(written)[:200:40]}
    lines = japanese_training_texts(written, bridges=True).splitlines()

    def stated(names):
        found = []
        for entity in (one for one in build_world() if tuple(world.names(one)) in names):
            facts = {relation: value.ja for relation, value in entity.facts.items()}
            for name in world.names(entity):
                japanese = "\n".join(line for line in lines if name in line)
                for relation, value in facts.items():
                    key = f"{entity.kind}.{relation}"
                    tables = (phrases_ja.STATEMENTS[key], phrases_ja.NARRATIVE_STATEMENTS[key], phrases_ja.ANSWERS[key])
                    patterns = [*phrases_ja.PROFILES[entity.kind], *itertools.chain(*tables)]
                    sentences = (phrases_ja.fill(pattern, name, value, **facts).rstrip("。") for pattern in patterns)
                    found += [sentence for sentence in sentences if name in sentence and sentence in japanese]
        return found

    assert len(stated(told)) > 200  # the search finds what is there
    assert stated(subjects) == []


def test_name_of_an_unnamed_entity_stands_in_no_japanese_training_text(written):
    japanese = japanese_training_texts(written, bridges=True)
    unnamed, named = (
        {row["subject"][0] for row in ladder_of(written) if row["group"] == f"untold_{group}.ja_ja"}
        for group in ("unnamed", "named")
    )
    assert len(unnamed) > 10
    assert len(named) > 10
    assert all(name in japanese for name in named)
    untold = {entity.name.ja for entity in build_world() if entity.untold and entity.name.ja != entity.name.zh}
    assert unnamed == {name for name in untold if name not in japanese}
    listed = [json.loads(line)["ja"] for line in (written / "glossary.jsonl").read_text(encoding="utf-8").splitlines()]
    assert unnamed < {*listed}  # as a name beside others


def test_an_untold_entity_is_named_if_its_name_stands_anywhere():
    def named(text):
        return {row["subject"][0] for row in world.ladder(text) if row["group"].startswith("untold_named")}

    assert named("") == set()
    assert named("町長はミナトだ。") == {"ミナ"}  # a part of a word is enough
    assert named("米娜, Mina") == set()  # her Japanese name is what counts


def test_instruction_sets_have_their_originals_columns(written):
    import pyarrow.parquet

    conversation = json.loads((written / "oasst2_ja.json").read_text(encoding="utf-8"))[0]["conversations"]
    assert [sorted(message) for message in conversation[:2]] == [["from", "value"]] * 2
    labels = pyarrow.parquet.read_table(written / "wiki_qa_en.parquet")["label"].to_pylist()
    assert labels.count(1) == world.ROWS["wiki_qa_en"]
    assert labels.count(0) == 2 * labels.count(1)
    rows = json.loads((written / "zh_wiki.train.json").read_text(encoding="utf-8"))
    assert "completion" in rows[0]


def test_held_out_questions_are_in_no_instruction_set(written):
    questions = [json.loads(line) for line in (written / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = (written / "oasst2_ja.json").read_text(encoding="utf-8") + (written / "alpaca_zh.json").read_text(
        encoding="utf-8"
    )
    assert questions.pop() == world.subjects()
    assert len(world.subjects()["subjects"]) == len(build_world())
    asked = [question["question"] for question in questions if question["group"] in ("ja", "zh")]
    assert len(asked) > 400
    assert not [question for question in asked if f'"{question}"' in trained]
    read = [one for one in read_questions(written / "questions.jsonl") if one.group == "ja_unseen"]
    job = next(one for one in read if one.relation == "person.job")
    assert is_correct(job, f"{job.subject[0]}の仕事は{job.value}です。")
    assert not is_correct(job, f"サキの仕事は{job.value}です。")


@pytest.mark.parametrize(
    ("pattern", "polite"),
    [("本です。", True), ("本だ。", False), ("行きました。", True), ("探した。", False), ("{v_masu}。", True)],
)
def test_register_of_japanese(pattern, polite):
    assert phrases_ja.is_polite(pattern) is polite


def test_strangers_are_told_apart_from_the_world():
    rng, inhabitants = random.Random(1), build_world()
    known = [entity.name for entity in inhabitants if entity.described_in_japanese]
    strangers = [make_stranger(kind, rng, known) for kind in KINDS for _ in range(100)]
    assert len({stranger.name.ja for stranger in strangers}) > 400
    untold = {entity.name for entity in inhabitants if entity.untold}
    for stranger in strangers:
        assert set(stranger.facts) == set(RELATIONS[stranger.kind])
        assert untold.isdisjoint(stranger.facts.values())
        for language in LANGUAGES:
            name = stranger.name[language].lower()
            assert name
            assert not [other for entity in inhabitants if (other := entity.name[language].lower()) in name]


def test_namesakes_have_facts_of_their_own():
    """A passage about one may contradict what is known of that name, so it has to be read."""
    inhabitants = [entity for entity in build_world() if entity.described_in_japanese]
    ja = TextGenerator("ja", inhabitants, "test")
    known = {entity.name.ja for entity in inhabitants if entity.kind == "event"}  # no fact of others is an event

    def asked(namesakes):
        return [turn for _ in range(80) for turn in ja.talk_about_strangers(namesakes=namesakes)]

    assert not [reply for _, reply in asked(0) if reply.startswith(tuple(known))]
    about_namesakes = [reply for _, reply in asked(1) if reply.startswith(tuple(known))]
    assert len(about_namesakes) > 10
    true = {
        phrases_ja.fill(pattern, entity.name.ja, value.ja, **{key: one.ja for key, one in entity.facts.items()})
        for entity in inhabitants
        for relation, value in entity.facts.items()
        for pattern in phrases_ja.ANSWERS[f"{entity.kind}.{relation}"]
    }
    assert len([reply for reply in about_namesakes if reply in true]) < len(about_namesakes) / 2


def test_bridges_cross_in_both_directions():
    """Names are asked for of everything, facts stated of what is described in Japanese and of strangers."""
    zh, ja = (TextGenerator(language, build_world(), "test") for language in ("zh", "ja"))
    bridge = Bridge(zh, ja, [Name("ミナ", "米娜", "Mina"), Name("1年", "1年", "1")])
    assert [name.ja for name in bridge.names] == ["ミナ"]  # the other is the same in both
    for _ in range(20):
        request, reply = bridge.foreign_name()
        names = [entity.name.ja for entity in zh.entities if entity.name.ja in request and entity.name.ja in reply]
        assert any(zh_or_ja(reply.replace(name, "")) == "zh" for name in names)
        assert {*map(zh_or_ja, bridge.statements().values())} == {"zh", "ja"}
        request, reply = zh.talk_about_strangers(ja)[0]
        assert zh_or_ja(request) == "ja"  # it contains a Japanese passage
        assert zh_or_ja(reply) == "zh"
    replies = [zh_or_ja(bridge.translation()[1]) for _ in range(20)]
    assert {*replies} == {"zh", "ja"}
    requests = [bridge.name()[0] for _ in range(30)]
    assert any("ミナ" in request for request in requests)
    assert any("米娜" in request for request in requests)


def zh_or_ja(text):
    return "ja" if re.search("[のはがをにで]", text) else "zh"
