"""Readers: every file format gives the same rows; what cannot be read is an error of its own row."""

import gzip
import json
import os

import numpy
import pyarrow.parquet
import pytest

from llmtuner.console import UserError
from llmtuner.data import readers as readers_module
from llmtuner.data.readers import read_rows, read_texts
from llmtuner.data.sources import DatasetAttr
from llmtuner.data.tokenize import load_tokenized_dataset
from tests.unit.data.datasets import lines, settings, source

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
        (9, "has 1 cells where the header has 2, after an unclosed quote"),
        (10, "b"),
    ]
    (tmp_path / "b.csv").write_text('id,"text\n1,a\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"b.csv, line 1: the header opens a quote that is not closed"):
        list(read_rows(source(tmp_path / "b.csv")))


def test_an_unclosed_quote_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers_module, "MAX_CSV_ROW_CHARS", 1_000)
    (tmp_path / "a.csv").write_text('text\n"no end\n' + "words\n" * 1_000, encoding="utf-8")
    rows = list(read_rows(source(tmp_path / "a.csv")))
    assert "it would take in 166 more lines" in rows[0].error
    assert len(rows) == 1_001


def test_text_behind_a_json_array_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}]\n' + " " * (1 << 21) + "\n", encoding="utf-8")
    assert len(list(read_rows(source(path)))) == 1
    path.write_text('[{"text": "a"}]\n' + " " * (1 << 21) + '[{"text": "b"}]', encoding="utf-8")
    with pytest.raises(UserError, match=r"a.json: more text follows the array of 1 rows: .*\"b\""):
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
    dataset = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert (dataset.counts["kept"], dataset.counts["invalid"]) == (39, 1)
    [entry] = [json.loads(line) for line in (dataset.directory / "invalid_rows.jsonl").read_text().splitlines()]
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


def test_a_parquet_file_of_one_row_group_is_read_in_pieces(tmp_path):
    texts = [os.urandom(5_000).hex() for _ in range(4_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=len(texts))
    before = pyarrow.total_allocated_bytes()
    rows = read_texts(source(tmp_path / "a.parquet", columns={"prompt": "text"}))
    first = next(rows)
    assert pyarrow.total_allocated_bytes() - before < 40_000_000  # 24 MB whatever the size; all at once 63 MB
    assert [first, *rows] == texts
