"""Tokenized datasets: the cache, validation splits, row filters, invalid rows and datasets of the hub."""

import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy
import pytest

from llmtuner.console import UserError
from llmtuner.data import tokenize as tokenize_module
from llmtuner.data.converter import to_messages
from llmtuner.data.held_out import is_validation
from llmtuner.data.readers import read_texts
from llmtuner.data.sources import get_dataset_attr
from llmtuner.data.template import Template
from llmtuner.data.token_store import TokenStore
from llmtuner.data.tokenize import load_tokenized_dataset
from llmtuner.outputs import write_marker
from llmtuner.tokenizer.chatglm3 import read_sentencepiece, to_processor
from llmtuner.tokenizer.encoding import PROCESSORS, load_tokenizer
from tests.helpers import ROOT
from tests.tiny_models import tiny_tokenizer
from tests.unit.data.datasets import ALPACA, DIALOGUES, DOCUMENTS, SHAREGPT, info, lines, settings, source, turns


def test_the_collector_leaves_old_objects_alone_only_while_tokens_are_made(corpus, tokenizer, monkeypatch):
    frozen, encode = [], Template.encode_documents
    monkeypatch.setattr(
        Template, "encode_documents", lambda *args: frozen.append(gc.get_freeze_count()) or encode(*args)
    )
    gc.unfreeze()
    load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert min(frozen) > 0
    assert gc.get_freeze_count() == 0
    gc.freeze()  # as the process of these tests has had from its start
    load_tokenized_dataset("dialogues", "sft", tokenizer, settings(corpus))
    assert gc.get_freeze_count() > 0


def test_documents_are_stored_with_their_origin(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize_module, "MAX_BATCH_ROWS", 7)
    dataset = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus, preprocessing_num_workers=2))
    texts = [json.loads(line)["text"] for line in (corpus / "documents.jsonl").read_text().splitlines()]
    store = dataset.store
    assert len(dataset) == len(store) == 30
    by_hand = [ids.tolist() for ids in Template.from_tokenizer(tokenizer).encode_documents(tokenizer, texts)]
    assert [store.ids(row).tolist() for row in range(30)] == by_hand
    assert store.lengths.tolist() == [len(ids) for ids in by_hand]
    assert store.lengths.dtype == numpy.int64
    assert all(len(store.labels(row)) == 0 for row in range(30))
    assert store.column("bytes").tolist() == [len(text.encode()) for text in texts]
    assert store.column("line").tolist() == list(range(1, 31))
    assert dataset.source_of(16) == f"{corpus / 'documents.jsonl'}, line 17"
    assert dataset.counts == {
        "read": 30,
        "filtered": 0,
        "invalid": 0,
        "empty": 0,
        "kept": 30,
        "tokens": sum(map(len, by_hand)),
        "bytes": sum(len(text.encode()) for text in texts),
        "duplicates": 1,
    }
    digest = hashlib.sha256(texts[5].encode()).digest()
    assert int(store.column("hash")[5]) == int.from_bytes(digest[:8], "big")


def test_split_keeps_the_same_text_on_one_side(corpus, tokenizer):
    dataset = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    texts = [json.loads(line)["text"] for line in (corpus / "documents.jsonl").read_text().splitlines()]
    trained, held_out = dataset.split(0.2)
    assert held_out.tolist() == [row for row, text in enumerate(texts) if is_validation(text, 0.2)]
    assert sorted([*trained, *held_out]) == list(range(30))
    assert trained.dtype == held_out.dtype == numpy.int64
    assert [len(part) for part in dataset.split(0)] == [30, 0]
    for row in (-1, 30):
        with pytest.raises(IndexError):
            dataset.store.ids(row)
    hashes = dataset.store.column("hash")
    for count in range(1, 31):
        trained, held_out = dataset.split(count)
        together = (3 in held_out) == (29 in held_out)  # these two are alike
        assert together
        assert count <= len(held_out) <= count + 1
        assert len(trained) == 0 or hashes[held_out].max() < hashes[trained].min()


def test_the_log_says_what_a_document_of_a_text_file_is(corpus, tokenizer, capsys):
    (corpus / "documents.jsonl").unlink()
    (corpus / "documents.txt").write_text("一つ目。\n二つ目。\n\n三つ目。\n", encoding="utf-8")
    for _ in range(2):  # from the cache too
        assert len(load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))) == 3
        output = capsys.readouterr().out
        assert "documents: one document of a .txt file is a line (sample_by: line, paragraph, document)" in output
        assert output.rstrip().endswith(": 3 documents from 1 files")
    info(corpus, documents={**DOCUMENTS, "sample_by": "paragraph"})
    assert len(load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))) == 2
    assert "a block of lines between blank ones" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{}, {"mask_history": True}, {"train_on_prompt": True}])
def test_settings_of_the_labels_are_followed(corpus, tokenizer, options):
    rows = [{**turns("h", "g", "h", "g"), "n": n} for n in range(3)]
    lines(corpus / "talks.jsonl", rows)
    info(corpus, talks={"file_name": "talks.jsonl", "formatting": "sharegpt"})
    store = load_tokenized_dataset("talks", "sft", tokenizer, settings(corpus, **options)).store
    messages = to_messages(SHAREGPT, rows[0])
    [(ids, labels)] = Template.from_tokenizer(tokenizer).encode_dialogues(tokenizer, [messages], **options)
    assert store.ids(2).tolist() == ids.tolist()
    assert store.labels(2).tolist() == labels.tolist()


def test_the_chat_template_and_the_marks_of_documents_belong_to_the_cache(corpus):
    def directory(name, stage, change=None, **changed):
        tokenizer = tiny_tokenizer("qwen3")
        if change:
            change(tokenizer)
        return load_tokenized_dataset(name, stage, tokenizer, settings(corpus, **changed)).directory

    def edit(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("Tools, one a line", "Tools")

    dialogues, documents = directory("dialogues", "sft"), directory("documents", "pt")
    assert directory("dialogues", "sft", document_end_token="</think>") == dialogues
    assert directory("documents", "pt", edit) == documents
    assert directory("dialogues", "sft", edit) != dialogues
    assert directory("dialogues", "pt", edit) != directory("dialogues", "pt")  # of dialogues in stage pt, too
    other = directory("documents", "pt", document_end_token="</think>")
    assert other != documents
    ends = [TokenStore(folder).ids(0)[-1] for folder in (documents, other)]
    assert tiny_tokenizer("qwen3").convert_ids_to_tokens(map(int, ends)) == ["<|endoftext|>", "</think>"]


@pytest.mark.parametrize(
    ("attr", "row"),
    [(SHAREGPT, turns("h", "g", "h", "g")), (ALPACA, {"q": "一", "in": "二", "a": "三", "before": [], "rules": ""})],
)
def test_dialogues_in_the_mix_of_pretraining_keep_their_format(corpus, tokenizer, attr, row):
    """All their tokens are trained on; answers tell dialogues from documents."""
    lines(corpus / "talks.jsonl", [{**row, "n": n} for n in range(3)])
    entry = {"file_name": "talks.jsonl", "formatting": attr.formatting, "columns": attr.columns}
    info(corpus, talks={name: value for name, value in entry.items() if value})
    trained, tuned = (
        load_tokenized_dataset("talks", stage, tokenizer, settings(corpus)).store for stage in ("pt", "sft")
    )
    assert trained.ids(2).tolist() == tuned.ids(2).tolist()
    assert len(trained.labels(2)) == 0  # none is masked
    assert trained.column("hash").tolist() == tuned.column("hash").tolist()  # held out together
    assert "<|assistant|>" in tokenizer.convert_ids_to_tokens(map(int, trained.ids(2)))


def test_settings_that_change_the_ids_make_another_cache(corpus, tokenizer, tiny_tokenizer_dir):
    def directory(name="documents", stage="pt", tokenizer=tokenizer, **changed):
        return load_tokenized_dataset(name, stage, tokenizer, settings(corpus, **changed)).directory

    first = directory()
    assert directory(mask_history=True, max_invalid_ratio=0.5) == first  # nothing that documents depend on
    dialogues = directory("dialogues", "sft")
    others = [
        directory(max_samples=3),
        directory("dialogues", "sft", mask_history=True),
        directory("dialogues", "sft", train_on_prompt=True),
    ]
    changed = load_tokenizer(tiny_tokenizer_dir)
    changed.add_tokens(["木匠"])
    others.append(directory(tokenizer=changed))
    other_pieces = load_tokenizer(tiny_tokenizer_dir)
    model = read_sentencepiece(tiny_tokenizer_dir / "tokenizer.model")
    model.pieces[-1].score -= 1
    PROCESSORS[other_pieces] = to_processor(model)
    others.append(directory(tokenizer=other_pieces))
    other_ends = load_tokenizer(tiny_tokenizer_dir)
    other_ends.eos_token = "eop"
    others.append(directory(tokenizer=other_ends))
    by_backend = load_tokenizer(tiny_tokenizer_dir)
    del PROCESSORS[by_backend]
    others.append(directory(tokenizer=by_backend))
    by_backend.add_tokens(["木匠"])
    others.append(directory(tokenizer=by_backend))
    info(corpus, documents={**DOCUMENTS, "num_samples": 4}, dialogues=DIALOGUES)
    others.append(directory())
    info(corpus, documents=DOCUMENTS, dialogues=DIALOGUES)
    assert directory() == first
    with (corpus / "documents.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    others.append(directory())
    assert len({first, dialogues, *others}) == 2 + len(others)


def test_row_limits_and_row_filter(corpus, tokenizer):
    rows = [{"q": f"Q{n}", "a": f"A{n}", "label": n % 2} for n in range(40)]
    with lines(corpus / "dialogues.jsonl", rows).open("a", encoding="utf-8") as file:
        file.write("{\n")  # nobody knows its label
    entry = {"file_name": "dialogues.jsonl", "columns": {"prompt": "q", "response": "a"}, "row_filter": {"label": 1}}
    info(corpus, all=entry, some={**entry, "num_samples": 12}, none={**entry, "row_filter": {"label": 5}})
    dataset = load_tokenized_dataset("all", "sft", tokenizer, settings(corpus))
    assert [dataset.counts[key] for key in ("read", "filtered", "invalid", "kept")] == [41, 20, 1, 20]
    assert dataset.store.column("line").tolist() == list(range(2, 41, 2))
    assert len(load_tokenized_dataset("all", "sft", tokenizer, settings(corpus, max_samples=5))) == 5
    assert len(load_tokenized_dataset("some", "sft", tokenizer, settings(corpus))) == 12
    with pytest.raises(UserError, match="40 excluded by row_filter"):
        load_tokenized_dataset("none", "sft", tokenizer, settings(corpus, max_invalid_ratio=1.0))
    csv = corpus / "rows.csv"
    csv.write_text("text,label\nyes,1\nno,0\n", encoding="utf-8")
    assert list(read_texts(source(csv, columns={"prompt": "text"}, row_filter={"label": 1}))) == ["yes"]


def test_unusable_rows_are_left_out_and_listed(corpus, tokenizer, capsys):
    rows = [{"q": f"Q{n}", "a": f"A{n}"} for n in range(50)]
    rows[16]["a"] = ""
    lines(corpus / "dialogues.jsonl", rows)
    with (corpus / "dialogues.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"q": "half of a li\n')
    info(corpus, dialogues={**DIALOGUES, "columns": {"prompt": "q", "response": "a"}})
    dataset = load_tokenized_dataset("dialogues", "sft", tokenizer, settings(corpus))
    file = str(corpus / "dialogues.jsonl")
    assert f"dialogues: 51 rows, 2 of them invalid (3.92%), first: {file}, line 17: column 'a' is empty" in (
        capsys.readouterr().out
    )
    listed = [json.loads(line) for line in (dataset.directory / "invalid_rows.jsonl").read_text().splitlines()]
    assert listed[0] == {"dataset": "dialogues", "file": file, "line": 17, "reason": "column 'a' is empty"}
    assert (listed[1]["line"], "not valid JSON" in listed[1]["reason"]) == (51, True)
    assert (dataset.counts["invalid"], dataset.counts["kept"], len(listed)) == (2, 49, 2)
    assert 17 not in dataset.store.column("line")
    with pytest.raises(UserError, match=r"2 of 51 rows \(3.92%\)[^$]*line 17: column 'a' is empty") as error:
        load_tokenized_dataset(
            "dialogues", "sft", tokenizer, settings(corpus, max_invalid_ratio=0.03)
        )  # from the cache
    assert "raise max_invalid_ratio" in str(error.value)


def test_too_many_unusable_rows_leave_nothing_behind(corpus, tokenizer):
    lines(
        corpus / "documents.jsonl",
        [{"text": "a"}, {"text": 1}, {"text": "\ud800"}, {"text": "b"}, {"body": "c"}, {"text": None}],
    )
    with pytest.raises(UserError, match=r"4 of 6 rows \(66.67%\)") as error:
        load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    for part in (
        "line 2: column 'text' holds int",
        "line 3: column 'text' holds half a character",
        "line 5: has no column 'text'",
    ):
        assert part in str(error.value)
    assert "line 6" not in str(error.value)
    assert not [path for path in (corpus / "cache").iterdir() if path.is_dir()]
    assert len(load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus, max_invalid_ratio=0.7))) == 2


def test_empty_documents_are_counted_only(corpus, tokenizer):
    lines(corpus / "documents.jsonl", [{"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": "\u3000"}])
    counts = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus)).counts
    assert (counts["kept"], counts["empty"], counts["invalid"]) == (1, 3, 0)
    lines(corpus / "documents.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"no row is left of 1.*1 empty"):
        load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))


@pytest.mark.parametrize(
    ("entry", "stage", "message"),
    [
        ({"columns": {"prompt": "text"}}, "pt", "no column 'text'; it has 'q', 'in', 'a'"),
        ({"columns": {"prompt": "q", "response": "answer"}}, "sft", "no column 'answer'; it has 'q', 'in', 'a'"),
        ({"columns": {"prompt": "q", "response": "a", "query": "inn"}}, "sft", "no column 'inn'"),
        ({"columns": {"prompt": "q"}}, "sft", "names no column for 'response'"),
        ({}, "sft", "no column 'instruction'"),
        ({"formatting": "sharegpt"}, "sft", "no column 'conversations'"),
    ],
)
def test_wrong_column_name_is_no_single_rows_fault(corpus, tokenizer, entry, stage, message):
    info(corpus, dialogues={"file_name": "dialogues.jsonl", **entry})
    with pytest.raises(UserError) as error:
        load_tokenized_dataset("dialogues", stage, tokenizer, settings(corpus, max_invalid_ratio=1.0))
    assert message in str(error.value)


@pytest.mark.parametrize("where", [0, 1_200])
def test_a_row_may_lack_a_column_that_others_have(corpus, tokenizer, where):
    rows = [{"q": f"Q{n}", "a": f"A{n}"} for n in range(1_300)]
    rows[where + 1] |= {"in": "I", "before": [["Q", "A"]], "rules": "S"}
    lines(corpus / "dialogues.jsonl", rows)
    info(corpus, dialogues={"file_name": "dialogues.jsonl", "columns": ALPACA.columns})
    dataset = load_tokenized_dataset("dialogues", "sft", tokenizer, settings(corpus))
    assert (dataset.counts["kept"], dataset.counts["invalid"]) == (1_300, 0)
    lines(corpus / "dialogues.jsonl", rows[:where] + rows[where + 2 :])
    with pytest.raises(UserError, match="no column 'in'; it has 'q', 'a'"):
        load_tokenized_dataset("dialogues", "sft", tokenizer, settings(corpus))
    few = load_tokenized_dataset(
        "dialogues", "sft", tokenizer, settings(corpus, max_samples=9)
    )  # the others may have it
    assert few.counts["kept"] == 9


def test_a_column_that_no_row_has_is_noticed_early(corpus, tokenizer, monkeypatch):
    lines(corpus / "documents.jsonl", [{"body": "a"}] * 3_000)
    monkeypatch.setattr(tokenize_module, "convert_row", watched := Mock(side_effect=tokenize_module.convert_row))
    with pytest.raises(UserError, match="no column 'text'; it has 'body'"):
        load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus, max_invalid_ratio=1.0))
    assert watched.call_count == 999


def test_a_set_whose_first_row_lacks_a_column_is_judged_by_row(corpus, tokenizer):
    lines(corpus / "documents.jsonl", [{"title": "t"}, *({"text": f"第{n}条河"} for n in range(30))])
    dataset = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert (dataset.counts["kept"], dataset.counts["invalid"]) == (30, 1)


def test_the_cache_notices_other_content_of_equal_size_and_date(corpus, tokenizer):
    path = corpus / "documents.jsonl"
    date = path.stat().st_mtime_ns
    first = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    path.write_bytes(path.read_bytes().replace(b"ferry", b"train"))
    os.utime(path, ns=(date, date))
    second = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert first.store.ids(0).tolist() != second.store.ids(0).tolist()
    path.write_bytes(bytes(3_000_000))  # of a large file, blocks of it are looked at
    os.utime(path, ns=(date, date))
    fingerprints = {source(path).fingerprint()}
    for place in (0, 600_000, 1_500_000, 2_999_999):
        data = bytearray(3_000_000)
        data[place : place + 200_000] = b"x" * len(data[place : place + 200_000])
        path.write_bytes(data)
        os.utime(path, ns=(date, date))
        fingerprints.add(source(path).fingerprint())
    assert len(fingerprints) == 5


def test_what_was_tokenized_is_not_tokenized_again(corpus, tokenizer, monkeypatch):
    made = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus)).directory
    before = (made / "input_ids.bin").stat().st_mtime_ns
    monkeypatch.setattr(tokenize_module, "_tokenize_dataset", None)
    again = load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    assert (again.directory / "input_ids.bin").stat().st_mtime_ns == before
    assert (
        load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus, overwrite_cache=True)).directory == made
    )
    about = made / "metadata.json"
    os.utime(about, (time.time() - 3600, time.time() - 3600))  # as if an earlier run had made it
    with pytest.raises(TypeError):
        load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus, overwrite_cache=True))
    assert load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus)).directory == made
    for name in ("input_ids.bin", "index.bin", "metadata.json"):
        content = (made / name).read_bytes()
        for damaged in (b"", content[:-2], content[: len(content) // 2]):
            (made / name).write_bytes(damaged)
            with pytest.raises(UserError, match="is damaged"):
                load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
        (made / name).write_bytes(content)
    assert load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus)).directory == made


def test_what_an_earlier_version_tokenized_is_refused_or_replaced(corpus, tokenizer):
    kept = settings(corpus, tokenized_path=str(corpus / "kept"))
    made = load_tokenized_dataset("documents", "pt", tokenizer, kept).directory
    (made / "metadata.json").rename(made / "about.json")
    (made / "input_ids.bin").rename(made / "examples.arrow")
    write_marker(made, "an earlier version")
    with pytest.raises(UserError, match=r"kept/documents-pt was made by an earlier version.* overwrite_cache: true"):
        load_tokenized_dataset("documents", "pt", tokenizer, kept)
    kept.overwrite_cache = True
    assert len(load_tokenized_dataset("documents", "pt", tokenizer, kept)) == 30
    assert not (made / "examples.arrow").exists()


def test_tokenized_path_outlives_the_texts(corpus, tokenizer, tiny_tokenizer_dir):
    kept = settings(corpus, tokenized_path=str(corpus / "kept"))
    ids = load_tokenized_dataset("dialogues", "sft", tokenizer, kept).store.ids(3).tolist()
    (corpus / "dialogues.jsonl").unlink()
    (corpus / "dataset_info.json").unlink()
    again = load_tokenized_dataset("dialogues", "sft", tokenizer, kept)
    assert again.directory == corpus / "kept" / "dialogues-sft"
    assert again.store.ids(3).tolist() == ids
    changed = settings(corpus, tokenized_path=kept.tokenized_path, mask_history=True)
    with pytest.raises(UserError, match=r"mask_history was False, now True.*overwrite_cache: true"):
        load_tokenized_dataset("dialogues", "sft", tokenizer, changed)
    other = load_tokenizer(tiny_tokenizer_dir)
    other.add_tokens(["木匠"])
    with pytest.raises(UserError, match="tokenizer was"):
        load_tokenized_dataset("dialogues", "sft", other, kept)


def test_name_of_a_data_set_is_made_safe(corpus, tokenizer):
    info(corpus, **{"../Wiki ja/1": DOCUMENTS})
    dataset = load_tokenized_dataset(
        "../Wiki ja/1", "pt", tokenizer, settings(corpus, tokenized_path=str(corpus / "kept"))
    )
    assert dataset.directory == corpus / "kept" / ".._Wiki_ja_1-pt"


def test_cache_that_cannot_be_written_is_named(corpus, tokenizer):
    (corpus / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot write to .*file/cache"):
        load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus, cache_dir=str(corpus / "file" / "cache")))


def test_full_disk_leaves_nothing_behind(corpus, tokenizer):
    lines(corpus / "documents.jsonl", [{"text": f"第{number}条河，河边种满了柳树。"} for number in range(2_000)])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(UserError, match="the disk filled up"):
            load_tokenized_dataset("documents", "pt", tokenizer, settings(corpus))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [path for path in (corpus / "cache").iterdir() if path.is_dir()]


CALLER = """
import json, pathlib, sys, time
from types import SimpleNamespace
from sentencepiece import SentencePieceProcessor
from llmtuner.data import tokenize
from llmtuner.outputs import write_marker
from llmtuner.tokenizer.chatglm3 import SPECIAL_TOKENS
from llmtuner.tokenizer.encoding import PROCESSORS
directory, model_file, settings, number = sys.argv[1:]
directory = pathlib.Path(directory)
make = tokenize._tokenize_dataset
def slow(*args):
    (directory / f"making-{number}").touch()
    time.sleep(0.5)  # the other one is at the lock by then
    make(*args)
tokenize._tokenize_dataset = slow
class Tokenizer:  # a real one takes seconds to import
    backend_tokenizer = SimpleNamespace(get_added_tokens_decoder=dict)
    convert_tokens_to_ids = SPECIAL_TOKENS.index
    convert_ids_to_tokens = SPECIAL_TOKENS.__getitem__
    all_special_ids = range(len(SPECIAL_TOKENS))
    eos_token_id = 100
tokenizer = Tokenizer()
PROCESSORS[tokenizer] = SentencePieceProcessor(model_file)
(directory / f"ready-{number}").touch()
while not (directory / "ready-0").exists() or not (directory / "ready-1").exists():
    time.sleep(0.01)
made = tokenize.load_tokenized_dataset("documents", "pt", tokenizer, SimpleNamespace(**json.loads(settings)))
print(json.dumps([made.store.ids(row).tolist() for row in range(len(made))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_one_of_two_processes_tokenizes_and_the_other_waits(corpus, tokenizer, tiny_tokenizer_dir, overwrite):
    if overwrite:
        lines(corpus / "old.jsonl", [{"text": "old"}])
        kept = settings(corpus, tokenized_path=str(corpus / "kept"))
        info(corpus, documents={**DOCUMENTS, "file_name": "old.jsonl"})
        about = load_tokenized_dataset("documents", "pt", tokenizer, kept).directory / "metadata.json"
        os.utime(about, (time.time() - 3600, time.time() - 3600))
        info(corpus, documents=DOCUMENTS)
    given = settings(corpus, tokenized_path=str(corpus / "kept") if overwrite else None, overwrite_cache=overwrite)
    model_file = str(tiny_tokenizer_dir / "tokenizer.model")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    calls = [
        subprocess.Popen(
            [sys.executable, "-c", CALLER, str(corpus), model_file, json.dumps(vars(given)), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    one, other = (json.loads(call.communicate(timeout=60)[0]) for call in calls)
    assert one == other
    assert len(one) == 30
    assert len(list(corpus.glob("making-*"))) == 1


# ----------------------------------------------------------------------------------------------------------------- hub
def test_hub_data_sets_are_streamed(tmp_path, tokenizer):
    """A directory stands for a repository on the hub: load_dataset reads both alike."""
    import pyarrow
    import pyarrow.parquet

    texts = tmp_path / "hub" / "texts"
    asked = tmp_path / "hub" / "asked" / "v2"
    talks = tmp_path / "hub" / "talks"
    for directory in (texts, asked, talks):
        directory.mkdir(parents=True)
    rows = [{"text": f"第{n}条河"} for n in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), texts / "train-00000.parquet")
    lines(asked / "train.jsonl", [{"instruction": f"Q{n}", "input": "", "output": f"A{n}"} for n in range(5)])
    (asked.parent / "v1").mkdir()
    lines(asked.parent / "v1" / "train.jsonl", [{"instruction": "old", "input": "", "output": "old"}])
    lines(talks / "train.jsonl", [turns("s", "h", "g"), turns("h", "g", "h", "g")])
    lines(talks / "test.jsonl", [turns("h", "g")])
    info(
        tmp_path,
        texts={"hf_hub_url": str(texts), "file_name": "nowhere.*", "columns": {"prompt": "text"}},
        asked={"hf_hub_url": str(asked.parent), "folder": "v2"},
        talks={"hf_hub_url": str(talks), "formatting": "sharegpt", "subset": "default"},
        test={"hf_hub_url": str(talks), "formatting": "sharegpt", "split": "test"},
        wrong={"hf_hub_url": str(talks), "formatting": "sharegpt", "subset": "mars"},
        missing={"hf_hub_url": "nobody/nothing"},
    )
    given = settings(tmp_path)
    documents = load_tokenized_dataset("texts", "pt", tokenizer, given)
    assert len(documents) == 5
    assert documents.source_of(4) == f"hub dataset {texts}, line 5"
    assert list(read_texts(get_dataset_attr("texts", tmp_path / "dataset_info.json", tmp_path)))[4] == "第4条河"
    sizes = {name: len(load_tokenized_dataset(name, "sft", tokenizer, given)) for name in ("asked", "talks", "test")}
    assert sizes == {"asked": 5, "talks": 2, "test": 1}
    for name in ("wrong", "missing"):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_tokenized_dataset(name, "sft", tokenizer, given)
    lines(talks / "train.jsonl", [turns("h", "g")])  # the fingerprint of a directory knows its files
    assert len(load_tokenized_dataset("talks", "sft", tokenizer, given)) == 1


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, tokenizer, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def unreachable(_, name, timeout):
        asked.append(name)
        assert timeout <= 10
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", None)  # it would try again and again
    with pytest.raises(UserError, match=r"org/set cannot be loaded \(ConnectionError: no route to host\)\. Check"):
        load_tokenized_dataset("REMOTE:org/set", "sft", tokenizer, settings(tmp_path))
    assert asked == ["org/set"]
