"""What a step learns from, as text: exact marks and colours, the batches of both stages, and the command line."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import numpy
import pytest
import yaml

from llmtuner.__main__ import main
from llmtuner.console import run_cli
from llmtuner.data.chat_template import get_template
from llmtuner.data.loader import get_dataset
from llmtuner.data.packing import PackedDataCollator, PadToMultiple
from llmtuner.data.preview import format_batch
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.hparams import get_train_args, read_args
from llmtuner.tokenizer.encoding import load_tokenizer
from llmtuner.train.trainer import PackedTrainer
from llmtuner.train.tuner import run_exp
from tests.tiny_models import tiny_tokenizer


class Pieces:
    """A tokenizer of a few pieces; ids are places in the list."""

    pad_token_id = 0
    backend_tokenizer = SimpleNamespace(decoder=None)

    def __init__(self, pieces):
        self.pieces = pieces

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[token] for token in ids]


PIECES = ["<unk>", "[gMASK]", "sop", "</s>", "<|user|>", "▁Hello", "▁柳树", "<0x0A>", "<0xE3>", "⟦", "\u200b", "▁▁"]


def sequence(ids, labels, positions, rows):
    """A sequence of ids of which those where `labels` has a `*` are targets."""
    ids = numpy.array(ids)
    labels = numpy.where([mark == "*" for mark in labels], ids, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "position_ids": numpy.array(positions), "doc_ids": numpy.array(rows)}


@pytest.fixture
def batch():
    """Two documents, of which the first goes on from an earlier sequence; a dialogue; nothing."""
    return PackedDataCollator(0)(
        [
            sequence([6, 8, 3, 1, 2, 5, 11, 3], ".**..***", [0, 1, 2, 0, 1, 2, 3, 4], [7, 1]),
            sequence([1, 2, 4, 7, 9, 10], "....**", range(6), [30]),
            sequence([], "", [], []),
        ]
    )


PLAIN = """\
⟦target⟧, ignored; special tokens and single bytes are shown by name: </s>, <0x0A>

sequence 1 of 3: 8 tokens, 5 targets, 2 documents
-- a.jsonl, line 7
 柳树⟦<0xE3></s>⟧
-- a.jsonl, line 1
[gMASK]sop⟦ Hello  </s>⟧

sequence 2 of 3: 6 tokens, 2 targets, 1 documents
-- a.jsonl, line 30
[gMASK]sop<|user|><0x0A>⟦<U+27E6><U+200B>⟧
-- 2 tokens of padding

sequence 3 of 3: 0 tokens, 0 targets, 0 documents
-- 8 tokens of padding"""


def origin(row):
    return f"a.jsonl, line {row}"


@pytest.fixture(autouse=True)
def no_wish_for_colours(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_exact_text_without_colours(batch):
    assert format_batch(batch, Pieces(PIECES), origin) == PLAIN


def test_exact_text_in_colours(batch, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = format_batch(batch, Pieces(PIECES), origin).splitlines()
    green, red, end = "\033[32m", "\033[31m", "\033[0m"
    assert shown[0].startswith(f"{green}target{end}{red}, ignored{end}; special tokens")
    assert shown[2:7] == [
        "sequence 1 of 3: 8 tokens, 5 targets, 2 documents",
        "-- a.jsonl, line 7",
        f"{red} 柳树{end}{green}<0xE3></s>{end}",
        "-- a.jsonl, line 1",
        f"{red}[gMASK]sop{end}{green} Hello  </s>{end}",
    ]
    assert shown[10] == f"{red}[gMASK]sop<|user|><0x0A>{end}{green}<U+27E6><U+200B>{end}"
    assert len(shown) == len(PLAIN.splitlines())


@pytest.mark.parametrize(
    ("terminal", "wishes", "coloured"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    ],
)
def test_colours_where_they_are_wanted(batch, monkeypatch, terminal, wishes, coloured):
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    shown = format_batch(batch, Pieces(PIECES), origin)
    assert ("\033" in shown, "⟦" in shown) == (coloured, not coloured)


def test_documents_that_see_one_another_are_told_apart():
    batch = PackedDataCollator(0)([sequence([6, 3, 1, 2, 5, 3], ".*..**", range(6), [7, 1])])
    assert format_batch(batch, Pieces(PIECES), origin).splitlines()[2:] == [
        "sequence 1 of 1: 6 tokens, 3 targets, 2 documents",
        "-- a.jsonl, line 7",
        " 柳树⟦</s>⟧",
        "-- a.jsonl, line 1 (attends to what precedes it)",
        "[gMASK]sop⟦ Hello</s>⟧",
    ]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_documents_of_other_bases_are_shown_as_text(kind):
    """The token that pads ends their documents, too; where they attend to one another, a beginning mark tells them apart."""
    tokenizer = tiny_tokenizer(kind)
    template = get_template(tokenizer)
    documents = [ids.tolist() for ids in template.encode_documents(tokenizer, ["山の <think>\n", "桜"])]
    ids = [token for document in documents for token in document]
    longer = sequence([*ids, *ids], "." + "*" * (2 * len(ids) - 1), range(2 * len(ids)), [7, 1, 7, 1])
    alone = [position for document in documents for position in range(len(document))]
    shorter = sequence(ids, "." + "*" * (len(ids) - 1), alone, [7, 1])
    batch = PackedDataCollator(tokenizer.pad_token_id or 0)([longer, shorter, sequence([], "", [], [])])
    shown = format_batch(batch, tokenizer, origin).split("\n\n")
    begin, end = {"qwen3": ("", "<|endoftext|>"), "llama": ("<|begin_of_text|>", "<|end_of_text|>")}[kind]
    texts = [f"{begin}山の <think><U+000A>{end}", f"{begin}<0xE6><0xA1><0x9C>{end}"]
    plain = [re.sub("[⟦⟧]", "", part) for part in shown]
    assert texts[0] in plain[1]
    assert plain[1].count("\n-- ") == {"qwen3": 1, "llama": 4}[kind]
    assert plain[2].splitlines()[1:5:2] == ["-- a.jsonl, line 7", "-- a.jsonl, line 1"]
    assert plain[2].splitlines()[2] == texts[0]
    assert plain[2].splitlines()[-1] == f"-- {len(ids)} tokens of padding"
    assert plain[3].splitlines()[-1] == f"-- {2 * len(ids)} tokens of padding"


# ----------------------------------------------------------------------------------------------------------- both stages
@pytest.fixture
def settings(tiny_tokenizer_dir, tmp_path):
    """Settings of a run whose model directory holds a tokenizer and nothing else."""
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "model")
    rows = {
        "documents": [{"text": f"小镇的第{number}条河。\nThe ferry: <|user|> {'河' * number}"} for number in range(30)],
        "dialogues": [{"instruction": f"第{number}条河？", "output": "⟦柳树⟧" * (number + 1)} for number in range(30)],
    }
    for name, entries in rows.items():
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    info = {
        "documents": {"file_name": "documents.jsonl", "columns": {"prompt": "text"}},
        "dialogues": {"file_name": "dialogues.jsonl", "columns": {"prompt": "instruction", "response": "output"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return dict(
        model_name_or_path=str(tmp_path / "model"),
        output_dir=str(tmp_path / "not" / "there"),
        dataset_dir=str(tmp_path),
        cache_dir=str(tmp_path / "cache"),
        cutoff_len=96,
        val_size=0.2,
        per_device_train_batch_size=3,
        deepspeed="missing.json",
    )


STAGES = [("pt", "documents"), ("sft", "dialogues")]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Calls the command line; returns exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmtuner", *map(str, arguments)])
        code = 0
        try:
            run_cli(main)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


def batches(settings, stage, dataset):
    """All batches of a run, by the parts that the trainer is given."""
    settings = {name: value for name, value in settings.items() if name != "deepspeed"}
    args = get_train_args({**settings, "stage": stage, "dataset": dataset})
    tokenizer = load_tokenizer(settings["model_name_or_path"])
    train = get_dataset(stage, args.data, args.training.seed, tokenizer).train
    padded = PadToMultiple(train, 3)
    collator = PackedDataCollator(tokenizer.pad_token_id)
    return train, tokenizer, [collator([padded[i + k] for k in range(3)]) for i in range(0, len(padded), 3)]


@pytest.mark.parametrize(("stage", "dataset"), STAGES)
def test_command_shows_each_batch_and_loads_no_model(settings, call, tmp_path, stage, dataset):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "stage": stage, "dataset": dataset}), encoding="utf-8")
    train, tokenizer, wanted = batches(settings, stage, dataset)
    assert len(wanted) > 2
    for number, batch in enumerate(wanted):
        text = format_batch(batch, tokenizer, train.token_dataset.describe_document)
        code, out, err = call("show", file, *(("--batch", number) if number else ()))
        assert (code, out) == (0, f"batch {number} of {len(wanted)}\n{text}\n"), err
    assert "tokens of padding" in out
    assert f"-- {dataset}: {tmp_path}/{dataset}.jsonl, line " in out
    assert not (tmp_path / "not").exists()
    # Another setting, on a command line without a file: one document in a sequence.
    arguments = [f"{name}={value}" for name, value in settings.items()]
    code, out, _ = call("show", *arguments, "--stage", stage, "--dataset", dataset, "--packing", "false")
    assert code == 0
    assert re.findall(r"(\d+) documents", out) == ["1", "1", "1"]


@pytest.mark.parametrize(("stage", "dataset"), STAGES)
@pytest.mark.parametrize("colour", ["NO_COLOR", "FORCE_COLOR"])
def test_ids_shown_as_trained_are_those_with_a_label(settings, monkeypatch, stage, dataset, colour):
    """Ids are printed in the place of their pieces, and read again out of what is printed."""
    monkeypatch.setenv(colour, "1")
    span = r"\033\[32m(.*?)\033\[0m" if colour == "FORCE_COLOR" else "⟦(.*?)⟧"
    train, tokenizer, all_batches = batches(settings, stage, dataset)
    pieces = [f"({number})" for number in range(len(tokenizer))]
    seen = 0
    for batch in all_batches:
        shown = format_batch(batch, Pieces(pieces), train.token_dataset.describe_document).split("\n\n")[1:]
        for block, ids, labels in zip(shown, batch["input_ids"], batch["labels"], strict=True):
            texts = "".join(line for line in block.splitlines()[1:] if not line.startswith("-- "))
            trained = [int(token) for part in re.findall(span, texts) for token in re.findall(r"\((\d+)\)", part)]
            assert trained == ids[labels != IGNORE_INDEX].tolist()
            assert re.findall(r"\((\d+)\)", texts) == [str(token) for token in ids.tolist() if token != 0]
            seen += len(trained)
    assert seen > 100


def test_at_a_breakpoint_in_compute_loss(settings, tiny_model_dir, tmp_path, monkeypatch):
    shown = []
    original = PackedTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        shown.append(format_batch(inputs, tokenizer, self.describe_document))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "compute_loss", spy)
    tokenizer = load_tokenizer(tiny_model_dir)
    del settings["deepspeed"]
    run = dict(model_name_or_path=str(tiny_model_dir), stage="sft", dataset="dialogues", max_steps=1, use_cpu=True)
    run_exp({**settings, **run, "save_strategy": "no", "report_to": "none"})
    [text] = shown
    assert f"-- dialogues: {tmp_path}/dialogues.jsonl, line " in text
    assert "<|assistant|>⟦ <0x0A> " in text


# ---------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("number", [-1, 40, "x", 0.5, True])
def test_batch_that_is_not_there(settings, call, number):
    arguments = [f"{name}={value}" for name, value in settings.items()]
    code, _, err = call("show", *arguments, "stage=pt", "dataset=documents", "--batch", str(number))
    assert (code, err.count("error:")) == (2, 1)
    assert re.search(rf"no batch '?{number}'?: the training set has \d+, of 3 sequences each, counted from 0", err)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("shew", "run.yaml"), "invalid choice: 'shew' (choose from "),
        (("convert", "one"), "the following arguments are required: OUT_DIR"),
        (("show",), "no settings are given"),
        (("train",), "no settings are given"),
        (("export",), "no settings are given"),
        (("show", "missing.yaml"), "cannot read the settings file missing.yaml"),
        (("show", "--batch", "1"), "dataset is not given"),
    ],
)
def test_bad_words_are_one_message(call, arguments, part):
    code, out, err = call(*arguments)
    assert (code, out, err.count("error:")) == (2, "", 1)
    assert part in err


@pytest.mark.parametrize(("command", "door"), [("train", "run_exp"), ("export", "export_model")])
def test_words_of_the_command_line_are_settings(call, tmp_path, monkeypatch, command, door):
    monkeypatch.setattr(f"llmtuner.train.tuner.{door}", lambda arguments: sorted(read_args(arguments).items()))
    (tmp_path / "run.yaml").write_text("stage: pt\nlora_rank: 4\n", encoding="utf-8")
    settings = [("lora_rank", 8), ("plot_loss", True), ("stage", "pt")]
    assert call(command, tmp_path / "run.yaml", "--lora_rank", "8", "--plot_loss") == (0, f"{settings}\n", "")
    assert call(command, "stage=pt", "--lora-rank=8", "--plot_loss") == (0, f"{settings}\n", "")
