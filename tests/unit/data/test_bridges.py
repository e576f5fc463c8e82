"""Bridges between languages: what becomes of translations, glossaries and code-switched documents."""

import itertools
import json
from collections import Counter

import pytest

from llmtuner.console import UserError
from llmtuner.data.bridges import (
    CodeSwitcher,
    alongside,
    glossary_documents,
    parallel_document,
    read_glossary,
    read_translations,
)
from llmtuner.data.held_out import is_validation, training_documents
from llmtuner.data.loader import load_tokenized_datasets
from llmtuner.data.readers import Row
from llmtuner.data.sources import CodeSwitch, get_dataset_attr
from llmtuner.data.tokenize import load_tokenized_dataset
from llmtuner.tokenizer.encoding import load_tokenizer
from tests.helpers import ROOT
from tests.unit.data.datasets import DOCUMENTS, info, lines, settings, source

NAMES = {"file_name": "names.*", "formatting": "glossary", "columns": {"translations": ["ja", "zh", "en"]}}
PAIRS = {"file_name": "pairs.*", "formatting": "parallel", "columns": {"translations": ["ja", "zh", "en"]}}
SWITCHED = {**DOCUMENTS, "code_switch": {"glossary": "names", "from": "zh", "to": "ja", "ratio": 1}}
MINA = {"ja": "ミナ", "zh": "米娜", "en": "Mina"}
CALL = '{"name": "find", "arguments": {"who": "米娜"}}'


@pytest.fixture
def folder(tmp_path):
    lines(tmp_path / "names.jsonl", [MINA, {"ja": "青川町", "zh": "青川", "en": "Aokawa"}])
    lines(tmp_path / "pairs.jsonl", [MINA])
    lines(tmp_path / "documents.jsonl", [{"text": "米娜住在青川。米娜很高兴。"}])
    info(tmp_path, names=NAMES, pairs=PAIRS, documents=DOCUMENTS, switched=SWITCHED)
    return tmp_path


def texts_of(folder, tokenizer, name, stage="pt"):
    """The documents of a data set, without the tokens around them."""
    dataset = load_tokenized_dataset(name, stage, tokenizer, settings(folder))
    decode = load_tokenizer(tokenizer.name_or_path).decode
    return [decode(dataset.store.ids(row), skip_special_tokens=True).strip() for row in range(len(dataset))]


# ------------------------------------------------------------------------------------------------ parallel and glossary
def test_every_order_of_translations_occurs_about_as_often():
    orders = Counter(parallel_document("abc", number) for number in range(6))
    assert orders == Counter("\n".join(order) for order in itertools.permutations("abc"))
    assert parallel_document("ab", 2**64 - 1) == "b\na"


def test_each_language_of_a_glossary_comes_first_once():
    assert glossary_documents(["ミナ", "米娜", "Mina"], 0) == [
        "ミナ（米娜、Mina）",
        "米娜（ミナ、Mina）",
        "Mina (ミナ, 米娜)",
    ]
    assert glossary_documents(["ミナ", "米娜", "Mina"], 1)[0] == "ミナ（Mina、米娜）"
    assert alongside("ราชา", ["king"]) == "ราชา (king)"


def test_rows_become_documents(folder, tokenizer):
    rows = [MINA, {"ja": "はい", "zh": None, "en": " Yes "}, {"ja": "2024", "zh": "2024"}, {"translation": MINA}]
    lines(folder / "pairs.jsonl", rows)
    lines(folder / "names.jsonl", rows)
    documents = texts_of(folder, tokenizer, "pairs")
    assert [{*text.split("\n")} for text in documents] == [{*MINA.values()}, {"はい", "Yes"}, {*MINA.values()}]
    assert documents[0] == documents[2]
    counts = load_tokenized_dataset("pairs", "pt", tokenizer, settings(folder)).counts
    assert [counts[key] for key in ("read", "kept", "empty", "invalid", "duplicates")] == [4, 3, 1, 0, 1]
    documents = texts_of(folder, tokenizer, "names")
    assert [text[:2] for text in documents] == ["ミナ", "米娜", "Mi", "はい", "Ye", "ミナ", "米娜", "Mi"]


def test_the_order_varies_from_row_to_row(folder, tokenizer):
    lines(folder / "pairs.jsonl", [{"ja": f"第{number}章", "zh": f"第{number}节"} for number in range(100)])
    info(folder, pairs={**PAIRS, "columns": {"translations": ["ja", "zh"]}})
    japanese_first = [text.split("\n")[0].endswith("章") for text in texts_of(folder, tokenizer, "pairs")]
    assert 30 < sum(japanese_first) < 70


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"ja": "ミナ", "zh": "", "en": None}, "has text in ja of ja, zh, en; two languages are the minimum"),
        ({"ko": "미나"}, "has text in none of ja, zh, en"),
        ({"ja": "ミナ", "zh": 3}, "column 'zh' holds int, not text"),
    ],
)
def test_a_row_that_bridges_nothing_says_why(folder, tokenizer, row, reason):
    lines(folder / "pairs.jsonl", [MINA] * 30 + [row])
    load_tokenized_dataset("pairs", "pt", tokenizer, settings(folder))
    with pytest.raises(UserError, match=reason):
        load_tokenized_dataset("pairs", "pt", tokenizer, settings(folder, max_invalid_ratio=0))


def test_a_language_without_a_column_is_refused(folder, tokenizer):
    lines(folder / "pairs.jsonl", [{"ja": "ミナ", "zh": "米娜"}] * 3)
    with pytest.raises(UserError, match=r"has no column 'en'; it has 'ja', 'zh'\. Rename it"):
        load_tokenized_dataset("pairs", "pt", tokenizer, settings(folder))
    with pytest.raises(UserError, match=r"no row of .* has text in the column 'en'"):
        list(read_glossary(get_dataset_attr("pairs", folder / "dataset_info.json", folder)))


def test_translations_of_a_term_are_collected_from_all_entries(folder):
    rows = [MINA, {"ja": "水", "zh": "水", "en": "water"}, {"ja": "水", "zh": "开水"}, {"zh": "青川"}]
    names = get_dataset_attr("names", lines(folder / "names.jsonl", rows).parent / "dataset_info.json", folder)
    assert read_translations(names, "ja") == {"ミナ": ["米娜", "Mina"], "水": ["水", "water", "开水"]}
    with pytest.raises(UserError, match=r"names has no translations of 'ko' \(ja, zh, en\)"):
        read_translations(names, "ko")
    with pytest.raises(UserError, match=r"documents has no translations of 'ja' \(none at all\)"):
        read_translations(get_dataset_attr("documents", folder / "dataset_info.json", folder), "ja")


def test_translations_train_no_dialogues(folder, tokenizer):
    for name, formatting in (("names", "glossary"), ("pairs", "parallel")):
        with pytest.raises(UserError, match=f"dataset {name}: formatting {formatting} makes documents"):
            load_tokenized_dataset(name, "sft", tokenizer, settings(folder))


def test_a_glossary_is_never_held_out_and_a_pair_may_be(folder, tokenizer):
    lines(folder / "pairs.jsonl", rows := [{"ja": f"第{number}章", "zh": f"第{number}节"} for number in range(100)])
    lines(folder / "names.jsonl", rows)
    columns = {"columns": {"translations": ["ja", "zh"]}}
    info(folder, names={**NAMES, **columns}, pairs={**PAIRS, **columns})
    pairs, names = (load_tokenized_dataset(name, "pt", tokenizer, settings(folder)) for name in ("pairs", "names"))
    assert 30 < len(pairs.split(0.5)[1]) < 70
    assert len(names.split(0.99)[0]) == 200


# ------------------------------------------------------------------------------------------------------- code-switching
def switcher(tmp_path, rows, source_language="zh", target="ja", ratio=1.0, style="replace"):
    path = lines(tmp_path / "terms.jsonl", rows)
    glossary = source(path, formatting="glossary", columns={"translations": [source_language, target]})
    return CodeSwitcher(CodeSwitch(glossary, source_language, target, ratio, style))


def test_the_longest_term_counts_and_terms_do_not_overlap(tmp_path):
    switch = switcher(
        tmp_path,
        [
            {"zh": "青川", "ja": "アオカワ"},
            {"zh": "青川大学", "ja": "アオカワ大学"},
            {"zh": "大学生", "ja": "学生"},
            {"zh": "青川", "ja": "later"},
            {"zh": "人", "ja": "ヒト"},
            {"zh": "同じ", "ja": "同じ"},
            {"zh": "", "ja": "なし"},
        ],
    )
    assert switch.switch("青川大学生在青川。人同じ", 7) == "アオカワ大学生在アオカワ。人同じ"
    assert switch.switch("大学生", 7) == "学生"
    assert switch.switch("青", 7) == "青"
    assert switch.switch("", 7) == ""


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_what_the_user_mentions_is_switched_in_a_dialogue(folder, tokenizer, stage, capsys):
    """In the answers too; their other terms, the system message, and what goes to tools and comes from them stay."""
    said = [
        ("human", "米娜住哪儿？"),
        ("gpt", "米娜住在青川。"),
        ("human", "好。"),
        ("function_call", CALL),
        ("observation", "米娜"),
    ]
    dialogues = [[*said, ("gpt", "米娜。")], [("system", "你是米娜。"), ("human", "你好"), ("gpt", "米娜")]]
    messages = [[{"from": role, "value": text} for role, text in dialogue] for dialogue in dialogues]
    lines(folder / "talks.jsonl", [{"conversations": one} for one in messages])
    lines(folder / "pairs.jsonl", [{"instruction": "米娜是谁？", "output": "米娜是歌手。"}])
    switch = {"code_switch": SWITCHED["code_switch"]}
    talks = {"file_name": "talks.*", "formatting": "sharegpt", **switch}
    pairs = {"file_name": "pairs.*", "columns": {"prompt": "instruction", "response": "output"}, **switch}
    info(folder, names=NAMES, talks=talks, pairs=pairs)
    read = texts_of(folder, tokenizer, "talks", stage)
    assert [read[0].count(name) for name in ("ミナ", "米娜", "青川町", "青川")] == [3, 2, 0, 1]
    assert "ミナ" not in read[1]
    assert "talks: code_switch: 1 of 2 documents or dialogues name terms of names (2) that" in capsys.readouterr().out
    assert texts_of(folder, tokenizer, "pairs", stage)[0].count("ミナ") == 2


def test_a_translation_alongside_follows_the_first_mention(tmp_path):
    switch = switcher(tmp_path, [MINA], style="alongside")
    assert switch.switch("米娜住在这里。米娜很高兴。", 7) == "米娜（ミナ）住在这里。米娜很高兴。"
    switch = switcher(tmp_path, [MINA], "en", style="alongside")
    assert switch.switch("See Mina. Mina sees.", 7) == "See Mina (ミナ). Mina sees."


def test_in_a_dialogue_a_translation_stands_beside_the_first_mention_of_each_message(tmp_path):
    said = ["米娜住在哪里？米娜老了吗？", "米娜住在青川。"]
    row = Row(line=1)
    row.set_content([{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)])
    before = row.num_bytes
    switcher(tmp_path, [MINA, {"zh": "青川", "ja": "青川町"}], style="alongside")(row)
    beside = [message["content"] for message in row.content]
    assert beside == ["米娜（ミナ）住在哪里？米娜老了吗？", "米娜（ミナ）住在青川。"]  # no user mentions the town
    assert row.num_bytes == before + 2 * len("（ミナ）".encode())


def test_the_ratio_is_of_the_terms_of_a_document_and_always_the_same(tmp_path):
    rows = [{"zh": f"甲{chr(0x4E00 + number)}", "ja": f"ア{number}"} for number in range(400)]
    switch = switcher(tmp_path, rows, ratio=0.3)
    text = "，".join(row["zh"] for row in rows * 2)
    first, second = (switch.switch(text, number).split("，") for number in (123456789123456789, 987654321987654321))
    assert first[:400] == first[400:]  # all mentions of a term alike
    shares = [sum(part.startswith("ア") for part in parts) / 800 for parts in (first, second)]
    assert shares == pytest.approx([0.3, 0.3], abs=0.07)
    both = sum(a.startswith("ア") and b.startswith("ア") for a, b in zip(first, second, strict=True)) / 800
    assert both == pytest.approx(0.09, abs=0.05)  # each document has its own choice
    assert switch.switch(text, 123456789123456789).split("，") == first
    whole = switcher(tmp_path, rows).switch(text, 5)
    assert "甲" not in whole


def test_a_glossary_without_the_two_languages_is_refused(tmp_path):
    with pytest.raises(UserError, match="no entry translates a term of 2 characters or more from 'zh' to 'ja'"):
        switcher(tmp_path, [{"zh": "人", "ja": "ひと"}])
    assert switcher(tmp_path, [MINA, {"zh": "\ud800", "ja": "ひと"}]).terms.keys() == {"米娜"}


def test_a_switched_data_set_has_its_own_cache_which_follows_the_glossary(folder, tokenizer, capsys):
    def load(name):
        return load_tokenized_dataset(name, "pt", tokenizer, settings(folder))

    assert texts_of(folder, tokenizer, "switched") == ["ミナ住在青川町。ミナ很高兴。"]
    assert texts_of(folder, tokenizer, "documents") == ["米娜住在青川。米娜很高兴。"]
    before = load("switched")
    assert before.counts["bytes"] == len("ミナ住在青川町。ミナ很高兴。".encode())
    assert (
        "switched: code_switch: 1 of 1 documents or dialogues name terms of names (2) that" in capsys.readouterr().out
    )
    assert load("switched").directory == before.directory
    lines(folder / "names.jsonl", [{**MINA, "ja": "ミーナ"}])
    assert load("switched").directory != before.directory
    assert texts_of(folder, tokenizer, "switched") == ["ミーナ住在青川。ミーナ很高兴。"]


@pytest.mark.parametrize("val_size", [0.3, 20])
def test_no_version_of_a_held_out_document_is_trained_on(folder, tokenizer, val_size):
    """Three versions of the same documents in one mix; what is held out of one is held out of all."""
    texts = [f"米娜住在青川的第{number}条街。" for number in range(60)]
    lines(folder / "documents.jsonl", [{"text": text} for text in texts])
    beside = {**SWITCHED, "code_switch": {**SWITCHED["code_switch"], "style": "alongside", "ratio": 0.5}}
    info(folder, names=NAMES, documents=DOCUMENTS, switched=SWITCHED, beside=beside)
    names = ["documents", "switched", "beside"]
    args = settings(folder, dataset=names, eval_dataset=[], val_size=val_size)
    data, train, evaluated = load_tokenized_datasets(args, "pt", tokenizer)
    trained = [{*data.column("line")[ids].tolist()} for ids in train]
    held_out = [{*data.column("line")[ids].tolist()} for ids in evaluated]
    assert trained[0] == trained[1] == trained[2]
    assert held_out[0] == held_out[1] == held_out[2]
    assert trained[0] | held_out[0] == set(range(1, 61))
    assert not trained[0] & held_out[0]
    if val_size < 1:  # and these are the documents by which steps 4 and 7 measure
        assert held_out[0] == {line for line, text in enumerate(texts, start=1) if is_validation(text, val_size)}
        switched = get_dataset_attr("switched", folder / "dataset_info.json", folder)
        assert len(list(training_documents(switched, val_size))) == len(trained[0])


# ---------------------------------------------------------------------------------------------------- dataset_info.json
@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({**NAMES, "columns": {}}, "formatting glossary needs the names of two columns or more"),
        ({**PAIRS, "columns": {"translations": "ja"}}, "formatting parallel needs the names of two columns"),
        ({**PAIRS, "columns": {"translations": ["ja", "ja"]}}, "formatting parallel needs the names of two"),
        ({**DOCUMENTS, "columns": {"translations": ["ja", "zh"]}}, "needs formatting parallel or glossary"),
        ({**PAIRS, "code_switch": SWITCHED["code_switch"]}, "code_switch does not go with the formatting parallel"),
        ({**DOCUMENTS, "code_switch": "names"}, "code_switch is 'names'; it must be an object"),
        ({**DOCUMENTS, "code_switch": {"glosary": "names"}}, "'glosary' under `code_switch`.* Known: from, glossary"),
        ({**DOCUMENTS, "code_switch": {"from": "zh", "to": "ja"}}, "glossary '' is no dataset"),
        ({**DOCUMENTS, "code_switch": {"glossary": "here"}}, "glossary 'here' is no dataset there of the formatting"),
        ({**DOCUMENTS, "code_switch": {"glossary": "names", "from": "zh", "to": "ko"}}, "to is 'ko'.* are ja, zh, en"),
        ({**DOCUMENTS, "code_switch": {**SWITCHED["code_switch"], "ratio": 2}}, "ratio of code_switch is 2"),
        ({**DOCUMENTS, "code_switch": {**SWITCHED["code_switch"], "ratio": "1"}}, "ratio of code_switch is '1'"),
        ({**DOCUMENTS, "code_switch": {**SWITCHED["code_switch"], "style": "beside"}}, "use replace or alongside"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(folder, entry, error):
    path = info(folder, here={**entry, "file_name": "documents.*"}, names=NAMES)
    with pytest.raises(UserError, match=error):
        get_dataset_attr("here", path, folder)


def test_the_entries_of_this_project_are_bridges(folder):
    entries = json.loads((DATASET_INFO := ROOT / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    for file in ("glossary.jsonl", "parallel_ja_zh.jsonl", "zh_wiki.train.jsonl"):
        lines(folder / file, [MINA])
    found = {name: get_dataset_attr(name, DATASET_INFO, folder) for name in entries if "glossary" in str(entries[name])}
    assert found["glossary"].column_names["translations"] == ["ja", "zh", "en"]
    assert found["wikipedia_zh_switched"].code_switch.glossary == found["glossary"]
