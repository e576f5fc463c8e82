"""Bits per byte: how well a model predicts a text, comparable across vocabularies."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llmtuner.console import format_table, progress
from llmtuner.data.template import Template
from llmtuner.tokenizer.fast import encode_batch

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Windows:
    """Documents, tokenized and cut into windows that know nothing of one another; every token is predicted."""

    ids: list[list[int]]
    """Of each context_length: the prefix, then at most `context_length` minus the prefix's length tokens of one document."""
    doc_ids: list[int]
    """The document of each window."""
    prefix_length: int
    """Ids at the start of a window that are not predicted."""
    num_bytes: numpy.ndarray
    """UTF-8 bytes of each document."""

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str], context_length: int) -> "Windows":
        """Cuts `texts` for a model that reads `context_length` tokens at once."""
        prefix = Template.from_tokenizer(tokenizer).prefix
        step = context_length - len(prefix)
        pieces = [
            (prefix + ids[start : start + step], number)
            for number, ids in enumerate(encode_batch(tokenizer, texts))
            for start in range(0, len(ids), step)
        ]
        pieces.sort(key=lambda piece: len(piece[0]))  # a batch shall be as long as its last
        return cls(
            [ids for ids, _ in pieces],
            [number for _, number in pieces],
            len(prefix),
            numpy.array([len(text.encode("utf-8")) for text in texts], dtype=numpy.int64),
        )


@torch.no_grad()
def document_bits(model: Any, windows: Windows, name: str | None = "", tokens_per_batch: int = 4096) -> numpy.ndarray:
    """Bits that the model needs for each document, the end mark not counted: it has no bytes.

    Args:
        name: stands on the progress bar; None for no bar.
    """
    batches: list[list[int]] = []
    for number, own in enumerate(windows.ids):
        if not batches or (len(batches[-1]) + 1) * len(own) > tokens_per_batch:
            batches.append([])
        batches[-1].append(number)
    bits = numpy.zeros(len(windows.num_bytes))
    shown: Iterable[list[int]] = batches
    if name is not None:
        shown = progress(batches, f"bits per byte {name}".strip(), unit="batch")
    for batch in shown:
        rows = [windows.ids[number] for number in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        # Padding stands on the right, where a causal model cannot see it from inside a text: no mask is needed.
        positions = torch.arange(longest, device=model.device).expand_as(ids)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        sums = [
            cross_entropy(
                logits[place, windows.prefix_length - 1 : len(row) - 1].float(),
                ids[place, windows.prefix_length : len(row)],
                reduction="sum",
            )
            for place, row in enumerate(rows)
        ]
        for number, nats in zip(batch, torch.stack(sums).tolist(), strict=True):
            bits[windows.doc_ids[number]] += nats / math.log(2)
    return bits


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: list[str],
    context_length: int,
    name: str = "",
    tokens_per_batch: int = 4096,
) -> float:
    """Bits that the model needs per UTF-8 byte of `texts`.

    Every token of a text is predicted, the first one from the prefix alone. A text longer than `context_length` tokens is read
    in windows that know nothing of one another.
    """
    windows = Windows.from_texts(tokenizer, texts, context_length)
    return float(document_bits(model, windows, name, tokens_per_batch).sum() / windows.num_bytes.sum())


def bootstrap_ci(
    bits: numpy.ndarray, num_bytes: numpy.ndarray, share: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bounds of bits per byte: the percentile bootstrap over documents (Efron 1979), drawn `NUM_RESAMPLES` times.

    Args:
        bits, num_bytes: of each document.
        share: how much of the resampled figures lies between the bounds.
    """
    drawn = numpy.random.default_rng(seed).integers(0, len(bits), (NUM_RESAMPLES, len(bits)))
    figures = bits[drawn].sum(axis=1) / num_bytes[drawn].sum(axis=1)
    low, high = numpy.quantile(figures, [(1 - share) / 2, (1 + share) / 2])
    return round(float(low), 4), round(float(high), 4)


def bpb_by_language(
    model: PreTrainedModel, tokenizer: Any, texts: dict[str, list[str]], context_length: int, name: str
) -> dict[str, float]:
    """`bits_per_byte` of each language's texts."""
    return {
        language: round(bits_per_byte(model, tokenizer, own, context_length, f"{name} {language}"), 4)
        for language, own in texts.items()
    }


def format_bpb_table(bits: dict[str, dict[str, float]]) -> str:
    """Lays out bits per byte, one model a line."""
    languages = ("ja", "zh", "en")
    return format_table(
        ["bits per byte", *languages], [[name, *(f"{own[one]:.3f}" for one in languages)] for name, own in bits.items()]
    )
