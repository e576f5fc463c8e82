"""Packing: every token once, nothing leaks, labels and positions as drawn, ratios of the mix kept."""

from types import SimpleNamespace

import numpy
import pytest
import torch

from llmtuner.data.packing import (
    ConcatTokenDataset,
    PackedDataCollator,
    PackedDataset,
    PadToMultiple,
    best_fit_decreasing,
    concat_and_chunk,
    interleave,
    last_turns,
    next_fit,
    one_per_sequence,
    pack_best_fit,
)
from llmtuner.data.template import IGNORE_INDEX, Template
from llmtuner.model.loading import load_model


def test_a_batch_tells_its_documents_and_trained_places():
    def sequence(lengths, untrained):
        ids = numpy.arange(sum(lengths))
        labels = numpy.where(numpy.isin(ids, untrained), IGNORE_INDEX, ids)
        positions = numpy.concatenate([numpy.arange(size) for size in lengths])
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "doc_ids": ids[:0]}

    empty = {name: numpy.zeros(0, dtype=numpy.int64) for name in ("input_ids", "labels", "position_ids", "doc_ids")}
    batch = PackedDataCollator(0)([sequence([3, 2], [0, 3]), sequence([7], [0, 1, 5]), empty])
    assert batch["seq_lens"] == [3, 2, 2, 7, 7]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 7, 14, 21]
    assert batch["cu_seqlens"].dtype == torch.int32
    wanted = batch["labels"][:, 1:] != IGNORE_INDEX
    places = torch.arange(21).view(3, 7)
    assert batch["loss_indices"].tolist() == places[:, :-1][wanted].tolist() == [0, 1, 3, 8, 9, 10, 12]
    assert batch["labels"].flatten()[batch["loss_indices"] + 1].tolist() == batch["labels"][:, 1:][wanted].tolist()


def test_next_fit_closes_a_sequence_where_the_next_dialogue_does_not_fit():
    assert next_fit(numpy.array([3, 5, 1, 8, 2, 6, 1]), 8).tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert next_fit(numpy.array([], dtype=numpy.int64), 8).tolist() == []


class MemoryStore:
    """A token store in memory."""

    def __init__(self, rows):
        self.rows = [(numpy.array(ids, numpy.int32), numpy.array(labels, numpy.int32)) for ids, labels in rows]
        self.lengths = numpy.array([len(ids) for ids, _ in self.rows])

    def __len__(self):
        return len(self.rows)

    def ids(self, row):
        return self.rows[row][0]

    def labels(self, row):
        return self.rows[row][1]


def token_dataset(*datasets):
    return ConcatTokenDataset(
        [SimpleNamespace(name=str(number), store=MemoryStore(rows)) for number, rows in enumerate(datasets)]
    )


def all_ids(dataset):
    return numpy.arange(len(dataset.lengths))


def test_blocks_hold_every_token_once_and_restart_positions():
    dataset = token_dataset([([7, 8, 10, 11], [])], [([7, 8, 12, 13, 14], [])])
    blocks = PackedDataset(dataset, concat_and_chunk(all_ids(dataset), dataset.lengths, 6), prefix_len=2)
    first, second = blocks[0], blocks[1]
    assert first["input_ids"].tolist() == [7, 8, 10, 11, 7, 8]
    assert first["labels"].tolist() == [IGNORE_INDEX, IGNORE_INDEX, 10, 11, IGNORE_INDEX, IGNORE_INDEX]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert first["doc_ids"].tolist() == [0, 1]
    assert second["input_ids"].tolist() == [12, 13, 14]
    assert second["labels"].tolist() == [IGNORE_INDEX, 13, 14]  # the first has lost its context
    assert second["position_ids"].tolist() == [0, 1, 2]
    assert (len(blocks), blocks.num_tokens) == (2, 9)
    across = PackedDataset(
        dataset, concat_and_chunk(all_ids(dataset), dataset.lengths, 6), prefix_len=2, block_diagonal=False
    )
    assert across[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]


def test_prefix_cut_by_a_sequence_is_not_trained():
    dataset = token_dataset([([7, 8, 10, 11, 2], []), ([7, 8, 12, 2], [])])
    blocks = PackedDataset(dataset, concat_and_chunk(all_ids(dataset), dataset.lengths, 6), prefix_len=2)
    assert blocks[1]["input_ids"].tolist() == [8, 12, 2]
    assert blocks[1]["labels"].tolist() == [IGNORE_INDEX, 12, 2]


@pytest.mark.parametrize("cutoff", [5, 64, 1000])
def test_blocks_and_singles_cover_random_documents(cutoff):
    rng = numpy.random.default_rng(0)
    dataset = token_dataset([(rng.integers(0, 99, size), []) for size in rng.integers(3, 90, 70)])
    order = rng.permutation(70)
    wanted = numpy.concatenate([dataset.datasets[0].store.ids(row) for row in order])
    for make in (concat_and_chunk, one_per_sequence):
        sequences = PackedDataset(dataset, make(order, dataset.lengths, cutoff))
        got = [sequences[number]["input_ids"] for number in range(len(sequences))]
        assert numpy.array_equal(numpy.concatenate(got), wanted)
        assert max(map(len, got)) <= cutoff
        if make is concat_and_chunk:
            assert {len(sequence) for sequence in got[:-1]} <= {cutoff}


def test_bins_hold_every_dialogue_and_count_what_is_cut():
    rows = [([1] * size, [IGNORE_INDEX] + [1] * (size - 1)) for size in (5, 3, 4, 12)] + [
        ([1] * 12, [IGNORE_INDEX] * 11 + [1])
    ]
    dataset = token_dataset(rows)
    index = pack_best_fit(all_ids(dataset), dataset, 8)
    assert sorted(index.doc_ids.tolist()) == [0, 1, 2, 3]
    assert (index.num_truncated, index.num_dropped) == (2, 1)
    bins = PackedDataset(dataset, index)
    sizes = [len(bins[number]["input_ids"]) for number in range(len(bins))]
    assert sorted(sizes) == [4, 8, 8]
    assert bins.num_tokens == 20
    single = PackedDataset(dataset, pack_best_fit(all_ids(dataset), dataset, 8, packed=False))
    assert [len(single[number]["input_ids"]) for number in range(len(single))] == [5, 3, 4, 8]


TEMPLATE = Template(7, 8, 2, {"system": 3, "user": 4, "assistant": 5, "observation": 6})


def dialogue(*messages):
    """Ids and labels under mask_history of messages (role, number of tokens); contents count up from 10."""
    ids, labels = [7, 8], [IGNORE_INDEX, IGNORE_INDEX]
    for role, size in messages:
        content = list(range(10 + len(ids), 10 + len(ids) + size))
        ids += [TEMPLATE.roles[role], *content]
        labels += [IGNORE_INDEX] * (size + 1)
    labels[-size:] = ids[-size:]
    return [*ids, 2], [*labels, 2]


SYSTEM, SHORT, TOOL = [("system", 2)], [("user", 2), ("assistant", 3)], [("user", 1), ("assistant", 1)]
TOOL += [("observation", 1), ("assistant", 2)]


@pytest.mark.parametrize(
    ("messages", "cutoff", "kept"),
    [
        # [gMASK] sop, system: 5 tokens; each short turn: 7; the end mark: 1.
        (SYSTEM + SHORT * 3, 26, (5, 12, 27)),  # one token too long: the first turn goes, all of it
        (SYSTEM + SHORT * 3, 20, (5, 12, 27)),
        (SYSTEM + SHORT * 3, 19, (5, 19, 27)),
        (SYSTEM + SHORT * 3, 12, (2, 19, 27)),  # the system message goes before the last turn is cut
        (SYSTEM + SHORT * 3, 9, (2, 20, 27)),  # then the question loses its beginning
        (SHORT + TOOL, 13, (2, 9, 19)),  # a turn of several messages stays together
        (SHORT + [("user", 20), ("assistant", 30)], 40, (2, 24, 62)),  # only the question's end, all of the answer
        (
            SHORT + [("user", 20), ("assistant", 60)],
            40,
            (2, 11, 49),
        ),  # half a sequence of the question, then the answer's beginning
        (SHORT + [("user", 4), ("assistant", 60)], 40, (2, 9, 47)),
    ],
)
def test_long_dialogue_keeps_its_last_answer_under_mask_history(messages, cutoff, kept):
    ids, labels = dialogue(*messages)
    assert last_turns(numpy.array(ids), cutoff, TEMPLATE) == kept
    dataset = token_dataset([(ids, labels)], [dialogue(*TOOL[:2])])
    packed = PackedDataset(dataset, pack_best_fit(all_ids(dataset), dataset, cutoff, keep_last_answer=TEMPLATE))
    [sequence] = [item for item in (packed[number] for number in range(len(packed))) if 0 in item["doc_ids"]]
    head, start, stop = kept
    size = head + stop - start
    assert sequence["input_ids"][:size].tolist() == ids[:head] + ids[start:stop]
    assert sequence["labels"][:size].tolist() == labels[:head] + labels[start:stop]
    assert sequence["position_ids"][:size].tolist() == list(range(size))  # one document
    assert packed.num_tokens == size + 7
    assert packed.select_dataset(0)[0]["input_ids"].tolist() == ids[:head] + ids[start:stop]
    assert (packed.pack_index.num_truncated, packed.pack_index.num_dropped) == (1, 0)


def test_no_last_answer_is_lost_under_mask_history():
    rng = numpy.random.default_rng(0)
    for _ in range(300):
        sizes = iter(rng.integers(1, 30, 20))
        messages = SYSTEM * int(rng.integers(2))
        messages += [(role, int(next(sizes))) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")]
        ids, labels = dialogue(*messages)
        cutoff = int(rng.integers(8, max(9, len(ids))))
        dataset = token_dataset([(ids, labels)])
        index = pack_best_fit(all_ids(dataset), dataset, cutoff, keep_last_answer=TEMPLATE)
        [sequence] = [PackedDataset(dataset, index)[0]]
        assert len(sequence["input_ids"]) == index.lengths[0] <= cutoff
        targets = [label for label in labels if label != IGNORE_INDEX]
        got = sequence["labels"][sequence["labels"] != IGNORE_INDEX].tolist()
        assert got == targets[: len(got)]  # from its first token on
        assert got == targets or len(targets) > cutoff - 3
        assert got


def test_best_fit_decreasing_chooses_the_fullest_bin_with_room():
    assert best_fit_decreasing(numpy.array([6, 5, 4, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]
    rng = numpy.random.default_rng(0)
    sizes = rng.integers(10, 200, size=2_000)
    bins = best_fit_decreasing(sizes, 256)
    padded = numpy.bincount(bins, weights=sizes)
    assert padded.max() <= 256
    assert padded.mean() / 256 > 0.98


def test_mix_keeps_shares():
    rng = numpy.random.default_rng(0)
    lengths = numpy.concatenate([rng.integers(5, 50, 4_000), rng.integers(200, 400, 300), rng.integers(20, 90, 900)])
    rows = [numpy.arange(4_000), numpy.arange(4_000, 4_300), numpy.arange(4_300, 5_200)]
    shares = [0.76, 0.12, 0.12]

    def tokens(order):
        return numpy.array([lengths[order[numpy.isin(order, doc_ids)]].sum() for doc_ids in rows])

    under = interleave(rows, lengths, shares, "interleave_under", seed=1)
    assert len(set(under.tolist())) == len(under)
    assert any(numpy.isin(doc_ids, under).all() for doc_ids in rows)  # it ends when one is used up
    for upto in (500, 2_000, len(under)):  # at every moment, to within one document
        taken = tokens(under[:upto])
        assert (abs(taken - taken.sum() * numpy.array(shares)) <= 2 * lengths.max()).all()
    assert (abs(tokens(under) / tokens(under).sum() - shares) < 0.01).all()
    over = interleave(rows, lengths, shares, "interleave_over", seed=1)
    assert len(set(over.tolist())) == 5_200
    assert (abs(tokens(over) / tokens(over).sum() - shares) < 0.01).all()
    assert sorted(interleave(rows, lengths, [], "concat", seed=1).tolist()) == list(range(5_200))
    assert not numpy.array_equal(under, interleave(rows, lengths, shares, "interleave_under", seed=2))


def test_collator_pads_without_training_the_padding():
    longer = {
        "input_ids": numpy.array([5, 6, 7]),
        "labels": numpy.array([IGNORE_INDEX, 6, 7]),
        "position_ids": numpy.arange(3),
    }
    longer["doc_ids"] = numpy.array([4])
    shorter = {key: value[:2] for key, value in longer.items()}
    padded = PadToMultiple([longer, shorter, longer], 4)
    assert len(padded) == 4
    batch = PackedDataCollator(pad_id=0)([longer, shorter, padded[3]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 6, 0], [0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [IGNORE_INDEX, 6, IGNORE_INDEX], [IGNORE_INDEX] * 3]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0], [0, 1, 2]]
    assert batch["num_padding"] == 4
    assert [rows.tolist() for rows in batch["doc_ids"]] == [[4], [4], []]


def test_filled_up_ends_where_its_size_says():
    """A loop over a dataset without an iterator, as in samplers, ends at an IndexError."""
    padded = PadToMultiple([{"input_ids": numpy.arange(3)}] * 3, 4)
    assert [len(sequence["input_ids"]) for sequence in padded] == [3, 3, 3, 0]
    assert len(padded[-1]["input_ids"]) == 0
    assert len(padded[-4]["input_ids"]) == 3
    for number in (4, -5, 400):
        with pytest.raises(IndexError):
            padded[number]


# ------------------------------------------------------------------------------------------------------ nothing leaks
def packed_and_alone(stage, model, block_diagonal=True):
    """A packed batch of five examples of random ids, and each example's place in it."""
    rng = numpy.random.default_rng(3)
    rows = []
    for size in (9, 30, 14, 22, 17):
        ids = rng.integers(10, 300, size)
        rows.append((ids, [] if stage == "pt" else numpy.where(numpy.arange(size) > size // 2, ids, IGNORE_INDEX)))
    dataset = token_dataset(rows)
    if stage == "pt":
        packed = PackedDataset(dataset, concat_and_chunk(all_ids(dataset), dataset.lengths, 128), 2, block_diagonal)
        single = PackedDataset(dataset, one_per_sequence(all_ids(dataset), dataset.lengths, 128), 2)
    else:
        packed = PackedDataset(dataset, pack_best_fit(all_ids(dataset), dataset, 128), block_diagonal=block_diagonal)
        single = PackedDataset(dataset, pack_best_fit(all_ids(dataset), dataset, 128, packed=False))
    assert len(packed) == 1
    return packed[0], [single[number] for number in range(5)], dataset


def logits_of(model, sequence):
    batch = PackedDataCollator(0)([sequence])
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_changing_one_document_leaves_all_others_bit_identical(tiny_model_dir, stage, attention):
    model = load_model(tiny_model_dir, torch.float32, attention)
    for block_diagonal in (True, False):
        sequence, _, dataset = packed_and_alone(stage, model, block_diagonal)
        before = logits_of(model, sequence)
        ends = numpy.cumsum(dataset.lengths[sequence["doc_ids"]])
        leaked = []
        for place, end in enumerate(ends):
            start = end - dataset.lengths[sequence["doc_ids"][place]]
            changed = {**sequence, "input_ids": sequence["input_ids"].copy()}
            changed["input_ids"][start:end] = numpy.random.default_rng(place).integers(10, 300, end - start)
            after = logits_of(model, changed)
            outside = torch.ones(len(before), dtype=torch.bool)
            outside[start:end] = False
            assert not torch.equal(before[~outside], after[~outside])
            leaked.append(not torch.equal(before[outside], after[outside]))
        assert any(leaked) != block_diagonal  # across documents, the comparison does see a change


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_packed_loss_is_that_of_each_alone(tiny_model_dir, stage):
    model = load_model(tiny_model_dir, torch.float32, "eager")

    def summed(sequence):
        targets = torch.from_numpy(sequence["labels"][1:])
        return torch.nn.functional.cross_entropy(logits_of(model, sequence)[:-1], targets, reduction="sum")

    for block_diagonal in (True, False):
        packed, alone, _ = packed_and_alone(stage, model, block_diagonal)
        count = (packed["labels"] != IGNORE_INDEX).sum()
        assert count == sum((single["labels"] != IGNORE_INDEX).sum() for single in alone)
        difference = abs(float(summed(packed)) - sum(float(summed(single)) for single in alone)) / count
        assert (difference < 1e-5) == block_diagonal
