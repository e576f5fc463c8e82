"""The datasets of a run: held-out text is never trained on, and long dialogues are truncated as documented."""

import json
import math

import numpy
import pytest

from llmtuner.console import UserError
from llmtuner.data.converter import to_messages
from llmtuner.data.loader import get_dataset, load_tokenized_datasets
from llmtuner.data.template import Template
from llmtuner.hparams import DataArguments
from tests.unit.data.datasets import DIALOGUES, DOCUMENTS, SHAREGPT, info, lines, turns


# ------------------------------------------------------------------------------------------------------- what is held out
@pytest.fixture
def overlapping(corpus):
    """`documents` and `dialogues`, for each another set `more_...` that shares half of its texts, and one that shares all."""
    for kind in ("documents", "dialogues"):
        rows = [json.loads(line) for line in (corpus / f"{kind}.jsonl").read_text().splitlines()]
        key = "text" if kind == "documents" else "a"
        lines(corpus / f"more_{kind}.jsonl", [*rows[::2], *({**row, key: row[key] + "！"} for row in rows)])
    entries = {"documents": DOCUMENTS, "dialogues": DIALOGUES}
    entries |= {f"more_{kind}": {**entry, "file_name": f"more_{kind}.*"} for kind, entry in entries.items()}
    entries |= {f"same_{kind}": entries[kind] for kind in ("documents", "dialogues")}
    info(corpus, **entries)
    return corpus


def loaded(corpus, tokenizer, stage, **changed):
    """The token_dataset of a run, its rows, and as sets of hashes what is trained through each dataset and what is held out."""
    data_args = DataArguments(dataset_dir=str(corpus), cache_dir=str(corpus / "cache"), **changed)
    token_dataset, trained, held_out = load_tokenized_datasets(data_args, stage, tokenizer)
    hashes = numpy.concatenate([dataset.store.column("hash") for dataset in token_dataset.datasets])
    return (
        token_dataset,
        trained,
        held_out,
        [set(hashes[rows].tolist()) for rows in trained],
        set(hashes[numpy.concatenate(held_out)].tolist()),
    )


@pytest.mark.parametrize(("stage", "kind"), [("pt", "documents"), ("sft", "dialogues")])
def test_a_held_out_text_is_trained_through_no_data_set(overlapping, tokenizer, stage, kind):
    names = [kind, f"more_{kind}"]
    for changed in (dict(dataset=names, val_size=7), dict(dataset=names[1:], eval_dataset=names[:1])):
        token_dataset, trained, _, trained_hashes, held_out = loaded(overlapping, tokenizer, stage, **changed)
        assert held_out
        assert all(held_out.isdisjoint(hashes) for hashes in trained_hashes)
        for number, (rows, tokenized) in enumerate(zip(trained, token_dataset.datasets, strict=False)):
            hashes = tokenized.store.column("hash")
            alone = numpy.flatnonzero(~numpy.isin(hashes, list(held_out))) + token_dataset.offsets[number]
            assert rows.tolist() == alone.tolist()  # nothing else is left out, and the order stays
            only = tokenized.split(changed.get("val_size", 0))[0]
            assert token_dataset.held_out_elsewhere[number] == len(only) - len(rows)
        assert any(token_dataset.held_out_elsewhere)
    with pytest.raises(UserError, match=f"dataset {kind}: all .* rows that are left to train on are also held out"):
        loaded(overlapping, tokenizer, stage, dataset=[kind], eval_dataset=[f"more_{kind}", f"same_{kind}"])


@pytest.mark.parametrize(("stage", "kind"), [("pt", "documents"), ("sft", "dialogues")])
def test_a_share_is_held_out_by_hash_alone(overlapping, tokenizer, stage, kind):
    """Rows and their order, and so the order of training, depend on nothing but each row's own hash."""
    names = [kind, f"more_{kind}"]
    token_dataset, trained, held_out, *_ = loaded(overlapping, tokenizer, stage, dataset=names, val_size=0.3)
    for number, tokenized in enumerate(token_dataset.datasets):
        chosen = tokenized.store.column("hash") < numpy.uint64(math.ceil(0.3 * 2**64))
        assert trained[number].tolist() == (numpy.flatnonzero(~chosen) + token_dataset.offsets[number]).tolist()
        assert held_out[number].tolist() == (numpy.flatnonzero(chosen) + token_dataset.offsets[number]).tolist()
    assert token_dataset.held_out_elsewhere == [0, 0]


# ------------------------------------------------------------------------------------------------------- long dialogues
@pytest.fixture
def long_talk(corpus):
    """One dialogue of a system message and four turns."""
    row = turns("s", "h", "g", "h", "g", "h", "g", "h", "g")
    lines(corpus / "talks.jsonl", [row])
    info(corpus, talks={"file_name": "talks.jsonl", "formatting": "sharegpt"})
    return to_messages(SHAREGPT, row)


def packed(corpus, tokenizer, **changed):
    data_args = DataArguments(dataset=["talks"], dataset_dir=str(corpus), cache_dir=str(corpus / "cache"), **changed)
    return get_dataset("sft", data_args, 0, tokenizer).train


@pytest.mark.parametrize("options", [{}, {"train_on_prompt": True}])
def test_mask_history_drops_whole_turns_from_the_front(corpus, tokenizer, long_talk, options):
    """What is left of a long dialogue is what a shorter one would have been."""
    dialogues = Template.from_tokenizer(tokenizer).encode_dialogues
    for dropped in range(4):
        messages = [long_talk[0], *long_talk[1 + 2 * dropped :]]
        [(ids, labels)] = dialogues(tokenizer, [messages], mask_history=True, **options)
        [sequence] = packed(corpus, tokenizer, mask_history=True, cutoff_len=len(ids), **options)
        assert sequence["input_ids"].tolist() == ids.tolist()
        assert sequence["labels"].tolist() == labels.tolist()
    [(ids, labels)] = dialogues(tokenizer, [long_talk])
    [sequence] = packed(corpus, tokenizer, cutoff_len=40)
    assert sequence["input_ids"].tolist() == ids[:40].tolist()  # without mask_history the beginning stays
    assert sequence["labels"].tolist() == labels[:40].tolist()


def test_dialogues_that_are_all_dropped_are_refused(corpus, tokenizer, long_talk):
    message = "dataset talks: all 1 dialogues are dropped.*first 9 tokens.*Raise cutoff_len, or set mask_history: true"
    with pytest.raises(UserError, match=message):
        packed(corpus, tokenizer, cutoff_len=9)
    assert len(packed(corpus, tokenizer, cutoff_len=9, mask_history=True)) == 1
    lines(corpus / "wordy.jsonl", [{"q": "words " * 100, "in": "", "a": "no"}])
    info(corpus, dialogues=DIALOGUES, wordy={**DIALOGUES, "file_name": "wordy.jsonl"})
    data_args = DataArguments(["dialogues"], ["wordy"], str(corpus), cache_dir=str(corpus / "cache"), cutoff_len=60)
    with pytest.raises(UserError, match="held-out data: all 1 dialogues are dropped"):
        get_dataset("sft", data_args, 0, tokenizer)
