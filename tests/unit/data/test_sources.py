"""dataset_info.json: entries are validated, and files or hub datasets are found."""

import json
import os
from pathlib import Path

import pytest

from llmtuner.console import UserError
from llmtuner.data.converter import to_messages
from llmtuner.data.readers import read_texts
from llmtuner.data.sources import DatasetAttr, get_dataset_attr
from tests.helpers import ROOT
from tests.unit.data.datasets import info, source


def test_first_existing_column_is_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "甲"}\n', encoding="utf-8")
    assert list(read_texts(source(path, columns={"prompt": ["completion", "text"]}))) == ["甲"]


def test_unknown_data_set_names_the_nearest(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"wikipedia_ja": {"file_name": "ja_wiki.*"}}', encoding="utf-8")
    with pytest.raises(UserError, match="Did you mean wikipedia_ja"):
        get_dataset_attr("wikipedia_jp", tmp_path / "dataset_info.json", tmp_path)
    with pytest.raises(UserError, match=r"no file .*ja_wiki"):
        get_dataset_attr("wikipedia_ja", tmp_path / "dataset_info.json", tmp_path)


def test_files_of_other_kinds_are_named_once(tmp_path, capsys):
    for name in ("p1.jsonl", "p2.jsonl.gz", "p3.jsonl.zst", "p4.JSONL", "p5.xlsx", "p6.parquet.gz", "p7.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "p8").mkdir()
    path = info(tmp_path, all={"file_name": "p*"}, table={"file_name": "*.xlsx"})
    for _ in range(2):
        found = [Path(file).name for file in get_dataset_attr("all", path, tmp_path).files]
        assert found == ["p1.jsonl", "p2.jsonl.gz", "p3.jsonl.zst", "p4.JSONL"]
    output = capsys.readouterr().out
    assert "Skipped, being of another type: p5.xlsx, p6.parquet.gz, p7.gz." in output
    assert output.count("\n") == 1
    with pytest.raises(UserError, match=r"no file .*/\*.xlsx.* Skipped, being of another type: p5.xlsx"):
        get_dataset_attr("table", path, tmp_path)


def test_a_file_a_pattern_and_a_directory_are_found(tmp_path):
    for name in ("b.jsonl", "a.txt", "notes.md", "deep/c.csv"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("text\na", encoding="utf-8")
    path = info(
        tmp_path,
        file={"file_name": "texts/b.jsonl"},
        pattern={"file_name": "texts/*"},
        directory={"file_name": "texts"},
        absolute={"file_name": str(tmp_path / "texts" / "*.txt")},
        deep={"file_name": "texts/**/*.csv"},
    )

    def found(name, corpus_dir=tmp_path):
        return [os.path.relpath(file, tmp_path / "texts") for file in get_dataset_attr(name, path, corpus_dir).files]

    assert found("file") == ["b.jsonl"]
    assert found("pattern") == found("directory") == ["a.txt", "b.jsonl"]
    assert found("absolute", tmp_path / "elsewhere") == ["a.txt"]
    assert found("deep") == ["deep/c.csv"]


def test_columns_and_tags_default_to_those_of_llama_factory():
    alpaca = {"instruction": "訳して", "input": "山", "output": "mountain"}
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    messages = [{"role": "user", "content": "訳して\n山"}, {"role": "assistant", "content": "mountain"}]
    assert to_messages(DatasetAttr("a", ()), alpaca) == messages
    only_named = DatasetAttr("a", (), columns={"prompt": "instruction", "response": "output"})
    assert to_messages(only_named, alpaca)[0]["content"] == "訳して"
    assert [
        message["content"]
        for message in to_messages(DatasetAttr("s", (), formatting="sharegpt"), {"conversations": turns})
    ] == [
        "Q",
        "A",
    ]
    named = DatasetAttr("s", (), formatting="sharegpt", columns={"system": "rules"})
    assert [message["role"] for message in to_messages(named, {"conversations": turns, "rules": "S"})] == [
        "system",
        "user",
        "assistant",
    ]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tagged = DatasetAttr("s", (), formatting="sharegpt", columns={"messages": "messages"}, tags=tags)
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert len(to_messages(tagged, row)) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "a.txt", "ranking": True}, "entry 'one' has the key 'ranking'"),
        ({"file_name": "a.txt", "columns": {"images": "images"}}, "key 'images' under `columns`"),
        ({"file_name": "a.txt", "columns": {"chosen": "good"}}, "key 'chosen' under `columns`"),
        ({"file_name": "a.txt", "sample_by": "page"}, "sample_by 'page' is unknown; use line or paragraph or document"),
        ({"script_url": "load.py"}, "key 'script_url'"),
        ({"cloud_file_name": "s3://x"}, "key 'cloud_file_name'"),
        ({"ms_hub_url": "x/y"}, "key 'ms_hub_url'"),
        ({"columns": {"prompt": "text"}}, "neither file_name nor hf_hub_url"),
        ({"file_name": "a.txt", "formatting": "openai"}, "formatting 'openai' is unknown"),
        ({"file_name": "a.txt", "num_samples": "ten"}, "num_samples is 'ten'; it must be a whole number"),
        ({"file_name": "a.txt", "num_samples": -1}, "num_samples is -1; it must be a whole number above 0"),
        ({"file_name": "a.txt", "columns": ["text"]}, "must be an object"),
        ({"file_name": ["a.txt"]}, "must be text"),
        ("a.txt", "not a JSON object"),
    ],
)
def test_entry_that_cannot_be_followed_is_named(tmp_path, entry, message):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(UserError, match="'one'") as error:
        get_dataset_attr("one", info(tmp_path, one=entry), tmp_path)
    assert message in str(error.value)


def test_keys_that_change_nothing_are_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    entry = {"file_name": "a.txt", "ms_hub_url": "x/y", "ranking": False, "subset": None, "columns": {"images": None}}
    entry["num_samples"] = 0  # all
    assert get_dataset_attr("one", info(tmp_path, one={**entry, "file_sha1": "e655"}), tmp_path).files


def test_keys_of_earlier_versions_are_read_with_a_warning(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    path = info(tmp_path, one={"file_name": "a.txt", "keep_rows": {"label": 1}})
    assert get_dataset_attr("one", path, tmp_path).row_filter == {"label": 1}
    assert "entry 'one': the key 'keep_rows' is now called 'row_filter'" in capsys.readouterr().out


def test_data_sets_of_the_hub_need_no_entry(tmp_path):
    for name, dataset_info in (("REMOTE:org/set", info(tmp_path)), ("org/set", Path("ONLINE/dataset_info.json"))):
        assert get_dataset_attr(name, dataset_info, tmp_path).hf_hub_url == "org/set"
    with pytest.raises(UserError, match=r"dataset_dir REMOTE:org/sets: .* Download it"):
        get_dataset_attr("one", Path("REMOTE:org/sets") / "dataset_info.json", tmp_path)


def test_a_corpus_directory_without_any_file_does_not_go_to_the_hub(tmp_path, capsys):
    path = info(tmp_path, one={"file_name": "one.*", "hf_hub_url": "org/one"}, two={"file_name": "two.*"})
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.docx").write_bytes(b"")
    with pytest.raises(UserError, match=r"no file .*texts/one.\*, nor .*another type: one.docx.*CORPUS_DIR"):
        get_dataset_attr("one", path, texts)
    assert capsys.readouterr().out == ""
    (texts / "two.txt").write_bytes(b"")
    assert get_dataset_attr("one", path, texts).hf_hub_url == "org/one"  # missing beside others
    assert f"no file {texts}/one.*; reading org/one from the hub" in capsys.readouterr().out
    for directory in (tmp_path, tmp_path / "none"):  # no directory was set, or the default one is not there
        assert get_dataset_attr("one", path, directory).hf_hub_url == "org/one"


def test_every_entry_of_this_project_can_be_followed(tmp_path):
    entries = ROOT / "data" / "dataset_info.json"
    for name, entry in json.loads(entries.read_text(encoding="utf-8")).items():
        if "hf_hub_url" in entry and "code_switch" not in entry:  # the glossary is a file
            assert get_dataset_attr(name, entries, tmp_path / "none").hf_hub_url == entry["hf_hub_url"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not valid JSON"), (b"[]", "not a JSON object"), (b"\xff", "JSON")]
)
def test_broken_dataset_info_is_named(tmp_path, content, message):
    (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        get_dataset_attr("one", tmp_path / "dataset_info.json", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        get_dataset_attr("one", tmp_path / "nowhere.json", tmp_path)
