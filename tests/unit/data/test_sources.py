"""Data sources: every file format is read row by row, and dataset_info.json is followed as LLaMA-Factory does."""

import gzip
import json
import os
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest

from llmtuner.console import UserError
from llmtuner.data import sources as sources_module
from llmtuner.data.converter import to_messages
from llmtuner.data.sources import DatasetAttr, get_dataset_attr, is_validation, read_rows, read_texts
from llmtuner.data.tokenize import load_tokenized_dataset
from tests.helpers import ROOT
from tests.unit.data.datasets import DOCUMENTS, info, lines, settings, source

ROWS = [{"text": "一つ目。"}, {"text": "二つ目。"}, {"text": "三つ目。"}]


def write(directory, kind):
    path = directory / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "txt":
        path.write_text("\n".join(row["text"] for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        path.write_text("text\n" + "\n".join(row["text"] for row in ROWS), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    else:
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv", "txt"])
def test_every_file_kind_gives_the_same_texts(tmp_path, kind):
    assert list(read_texts(source(write(tmp_path, kind), columns={"prompt": "text"}))) == [row["text"] for row in ROWS]


def test_long_json_array_is_read_in_pieces(tmp_path):
    rows = [{"text": "長い" * 20_000, "number": number} for number in range(40)]  # several times the read buffer
    path = tmp_path / "long.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row.values["number"] for row in read_rows(source(path))] == list(range(40))


def test_first_existing_column_is_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "甲"}\n', encoding="utf-8")
    assert list(read_texts(source(path, columns={"prompt": ["completion", "text"]}))) == ["甲"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        ('{"text": "日本"}'.encode("shift_jis"), "not UTF-8"),
        (b'{"body": "x"}\n', "no column 'text'; it has 'body'"),
        (b'{"text": "a"}\n{"text": \n', "line 2, is not valid JSON"),
        (b'{"text": 3}\n', "line 1, holds no text"),
        (b'{"text": "a"}\n\n{"body": "b"}\n', "no column 'text'; it has 'body'"),
        (b'{"text": "a"}\n["a"]\n', "line 2, is not a JSON object but list"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2, holds half a character"),
    ],
)
def test_bad_file_is_named_with_its_problem(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(read_texts(source(path, columns={"prompt": "text"})))
    assert "bad.jsonl" in str(error.value)


def test_damaged_parquet_and_json_are_named(tmp_path):
    parquet = write(tmp_path, "parquet").read_bytes()
    for name, content in (
        ("bad.parquet", b"PAR1 nonsense"),
        ("half.parquet", parquet[: len(parquet) // 2]),
        ("bad.json", b'[{"text": "a"}, {"te'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            list(read_texts(source(tmp_path / name, columns={"prompt": "text"})))


def test_unknown_data_set_names_the_nearest(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"wikipedia_ja": {"file_name": "ja_wiki.*"}}', encoding="utf-8")
    with pytest.raises(UserError, match="Did you mean wikipedia_ja"):
        get_dataset_attr("wikipedia_jp", tmp_path / "dataset_info.json", tmp_path)
    with pytest.raises(UserError, match=r"no file .*ja_wiki"):
        get_dataset_attr("wikipedia_ja", tmp_path / "dataset_info.json", tmp_path)


def test_held_out_share_is_about_what_was_asked_for():
    held_out = sum(is_validation(f"document {number}", 0.05) for number in range(20_000))
    assert 0.045 < held_out / 20_000 < 0.055
    assert not any(is_validation(f"document {number}", 0.0) for number in range(100))


def test_rows_know_their_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_text("\n一行目\n二行目\n\n\n三行目", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n', encoding="utf-8")
    (tmp_path / "c.csv").write_text('text,n\n"two\nlines",1\n\na,2,3\nb\n', encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps([{"text": "a"}, 7, {"text": "b"}]), encoding="utf-8")
    rows = list(
        read_rows(DatasetAttr("all", tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv", "d.json"))))
    )
    assert [(row.file, row.line, row.values.get("text"), bool(row.error)) for row in rows] == [
        (0, 2, "一行目", False),
        (0, 3, "二行目", False),
        (0, 6, "三行目", False),
        (1, 1, "a", False),
        (1, 3, None, True),
        (1, 4, "b", False),
        (2, 2, "two\nlines", False),
        (2, 5, None, True),
        (2, 6, "b", False),
        (3, 1, "a", False),
        (3, 2, None, True),
        (3, 3, "b", False),
    ]
    assert "3 cells where the header has 2" in rows[7].error
    assert rows[8].values == {"text": "b", "n": None}
    assert "not a JSON object but int" in rows[10].error


def test_unusual_json_is_a_problem_of_its_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + '\n{"n": ' + "1" * 5_000 + '}\n{"text": "a"}\n', encoding="utf-8")
    assert [bool(row.error) for row in read_rows(source(path))] == [True, True, False]


def test_long_cell_of_csv_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "長" * 200_000 + "\n", encoding="utf-8")
    assert [len(text) for text in read_texts(source(path, columns={"prompt": "text"}))] == [200_000]


@pytest.mark.parametrize(
    ("sample_by", "documents"),
    [
        ("line", [(2, "一行目"), (3, " 二行目"), (6, "三行目"), (8, "四行目")]),
        ("paragraph", [(2, "一行目\n 二行目"), (6, "三行目"), (8, "四行目")]),
        ("document", [(2, "一行目\n 二行目\n\n \n三行目\n\n四行目")]),
    ],
)
def test_a_text_file_is_lines_or_what_its_entry_says(tmp_path, sample_by, documents):
    (tmp_path / "a.txt").write_text("\n一行目\r\n 二行目\n\n \n三行目\n\n四行目\n\n", encoding="utf-8")
    rows = read_rows(source(tmp_path / "a.txt", sample_by=sample_by))
    assert [(row.line, row.values["text"]) for row in rows] == documents


def test_the_log_says_what_a_document_of_a_text_file_is(corpus, tokenizer, capsys):
    (corpus / "documents.jsonl").unlink()
    (corpus / "documents.txt").write_text("一つ目。\n二つ目。\n\n三つ目。\n", encoding="utf-8")
    for _ in range(2):  # from the cache too
        assert len(load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))) == 3
        said = capsys.readouterr().out
        assert "documents: one document of a .txt file is a line (sample_by: line, paragraph, document)" in said
        assert said.rstrip().endswith(": 3 documents from 1 files")
    info(corpus, documents={**DOCUMENTS, "sample_by": "paragraph"})
    assert len(load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))) == 2
    assert "a block of lines between blank ones" in capsys.readouterr().out


@pytest.mark.parametrize("unclosed", [11, 1_001])
@pytest.mark.parametrize("quoted", [True, False])
def test_an_unclosed_quote_costs_its_own_row_only(tmp_path, unclosed, quoted):
    lines = ["id,text", *(f'{n},"words, {n}"' if quoted and n % 3 else f"{n},words {n}" for n in range(2, 1_002))]
    lines[unclosed - 1] = f'{unclosed},"no end'
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="utf-8")
    rows = list(read_rows(source(tmp_path / "a.csv")))
    assert len(rows) == 1_000
    assert [row.line for row in rows if row.error] == [unclosed]
    assert "opens a quote that is not closed" in rows[unclosed - 2].error
    assert [row.values["id"] for row in rows if not row.error] == [str(n) for n in range(2, 1_002) if n != unclosed]


def test_quotes_of_csv(tmp_path):
    (tmp_path / "a.csv").write_text(
        'id,text\n1,"two\r\n\r\nlines, ""quoted"""\n2,"slack" text\n3,"slack" x,"open\n4,5" pipe\n5,"no end\nof it\n6,"b"\n',
        encoding="utf-8",
    )
    assert [(row.line, row.values.get("text") or row.error) for row in read_rows(source(tmp_path / "a.csv"))] == [
        (2, 'two\r\n\r\nlines, "quoted"'),
        (5, "slack text"),
        (6, "opens a quote that is not closed"),
        (7, '5" pipe'),
        (8, "opens a quote that is not closed (it would take in 2 more lines)"),
        (9, "has 1 cells where the header has 2, behind an unclosed quote"),
        (10, "b"),
    ]
    (tmp_path / "b.csv").write_text('id,"text\n1,a\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"b.csv, line 1: the header opens a quote that is not closed"):
        list(read_rows(source(tmp_path / "b.csv")))


def test_an_unclosed_quote_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "MAX_CSV_ROW_CHARS", 1_000)
    (tmp_path / "a.csv").write_text('text\n"no end\n' + "words\n" * 1_000, encoding="utf-8")
    rows = list(read_rows(source(tmp_path / "a.csv")))
    assert "it would take in 166 more lines" in rows[0].error
    assert len(rows) == 1_001


def test_text_behind_a_json_array_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}]\n' + " " * (1 << 21) + "\n", encoding="utf-8")
    assert len(list(read_rows(source(path)))) == 1
    path.write_text('[{"text": "a"}]\n' + " " * (1 << 21) + '[{"text": "b"}]', encoding="utf-8")
    with pytest.raises(UserError, match=r"a.json: more text stands behind the array of 1 rows: .*\"b\""):
        list(read_rows(source(path)))


COMPRESS = {"gz": gzip.compress, "zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files_give_the_same_texts(tmp_path, kind, compression):
    compress = COMPRESS[compression]
    data = write(tmp_path, kind).read_bytes()
    path = tmp_path / f"ROWS.{kind.upper()}.{compression}"
    path.write_bytes(compress(data))
    texts = source(path, columns={"prompt": "text"})
    assert list(read_texts(texts)) == [row["text"] for row in ROWS]
    if kind == "jsonl":
        path.write_bytes(compress(data + b"\n") + compress(data))  # as `cat a.gz b.gz` makes it
        assert len(list(read_texts(texts))) == 2 * len(ROWS)
        path.write_bytes(compress(data * 100)[:-6])
        with pytest.raises(UserError, match=r"cannot read .*ROWS.JSONL"):
            list(read_texts(texts))


def test_files_of_other_kinds_are_named_once(tmp_path, capsys):
    for name in ("p1.jsonl", "p2.jsonl.gz", "p3.jsonl.zst", "p4.JSONL", "p5.xlsx", "p6.parquet.gz", "p7.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "p8").mkdir()
    path = info(tmp_path, all={"file_name": "p*"}, table={"file_name": "*.xlsx"})
    for _ in range(2):
        found = [Path(file).name for file in get_dataset_attr("all", path, tmp_path).files]
        assert found == ["p1.jsonl", "p2.jsonl.gz", "p3.jsonl.zst", "p4.JSONL"]
    said = capsys.readouterr().out
    assert "Not read, being of another kind: p5.xlsx, p6.parquet.gz, p7.gz." in said
    assert said.count("\n") == 1
    with pytest.raises(UserError, match=r"no file .*/\*.xlsx.* Not read, being of another kind: p5.xlsx"):
        get_dataset_attr("table", path, tmp_path)


BAD = "日本".encode("shift_jis")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "parquet"])
def test_a_bad_byte_costs_its_own_row_only(corpus, tokenizer, kind):
    texts = [f"第{number}条河".encode() for number in range(40)]
    texts[16] += BAD
    path = corpus / f"documents.{kind}"
    (corpus / "documents.jsonl").unlink()
    if kind == "parquet":
        offsets = numpy.cumsum([0, *map(len, texts)], dtype=numpy.int32)
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(texts))]
        column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), buffers)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    elif kind == "csv":
        path.write_bytes(b"text\n" + b"\n".join(texts))
    elif kind == "txt":
        path.write_bytes(b"\n".join(texts))
    else:
        rows = [b'{"text": "' + text + b'"}' for text in texts]
        path.write_bytes(b"\n".join(rows) if kind == "jsonl" else b"[" + b",".join(rows) + b"]")
    examples = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert (examples.counts["kept"], examples.counts["invalid"]) == (39, 1)
    [entry] = [json.loads(line) for line in (examples.directory / "invalid_rows.jsonl").read_text().splitlines()]
    assert (entry["file"], entry["line"]) == (str(path), 18 if kind == "csv" else 17)
    assert "is not UTF-8 text" in entry["reason"]
    assert "0x93" in entry["reason"]


def test_corpora_leave_out_a_few_rows_that_cannot_be_read(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", [{"text": f"{number}"} for number in range(99)])
    path.write_bytes(BAD + b"\n" + path.read_bytes())
    texts = source(path, columns={"prompt": "text"})
    assert list(read_texts(texts)) == [str(number) for number in range(99)]
    assert (
        f"1 of 100 rows cannot be read, first: {path}, line 1, is not UTF-8 text (byte 0x93" in capsys.readouterr().out
    )
    path.write_bytes(b"{\n" * 60 + path.read_bytes() * 12)
    with pytest.raises(UserError, match="71 of 1,061 rows cannot be read") as error:  # before the end of it
        list(read_texts(texts))
    assert "line 3, is not valid JSON" in str(error.value)


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
    asked = [{"role": "user", "content": "訳して\n山"}, {"role": "assistant", "content": "mountain"}]
    assert to_messages(DatasetAttr("a", ()), alpaca) == asked
    only_named = DatasetAttr("a", (), columns={"prompt": "instruction", "response": "output"})
    assert to_messages(only_named, alpaca)[0]["content"] == "訳して"
    assert [
        one["content"] for one in to_messages(DatasetAttr("s", (), formatting="sharegpt"), {"conversations": turns})
    ] == [
        "Q",
        "A",
    ]
    named = DatasetAttr("s", (), formatting="sharegpt", columns={"system": "rules"})
    assert [one["role"] for one in to_messages(named, {"conversations": turns, "rules": "S"})] == [
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
    with pytest.raises(UserError, match=r"no file .*texts/one.\*, nor .*another kind: one.docx.*CORPUS_DIR"):
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
        if "hf_hub_url" in entry:
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


def test_a_parquet_file_of_one_row_group_is_read_in_pieces(tmp_path):
    texts = [os.urandom(5_000).hex() for _ in range(4_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=len(texts))
    before = pyarrow.total_allocated_bytes()
    rows = read_texts(source(tmp_path / "a.parquet", columns={"prompt": "text"}))
    first = next(rows)
    assert pyarrow.total_allocated_bytes() - before < 40_000_000  # 24 MB whatever the size; all at once 63 MB
    assert [first, *rows] == texts
