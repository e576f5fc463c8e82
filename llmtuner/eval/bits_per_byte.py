"""Bits per byte: how well a model predicts text, comparable across tokenizers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llmtuner.console import format_table, progress_bar
from llmtuner.data.chat_template import get_template
from llmtuner.tokenizer.encoding import encode_batch

NUM_RESAMPLES = 2000


@torch.no_grad()
def padded_logits(model: Any, sequences: Sequence[Sequence[int]], first: int = 0) -> torch.Tensor:
    """Logits of one right-padded batch.

    Padding on the right is invisible to a causal model, so no attention mask is needed.

    Args:
        sequences: token ids.
        first: the first position whose logits are needed.

    Returns:
        [len(sequences), longest - first, vocab_size]
    """
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences], device=model.device)
    positions = torch.arange(longest, device=model.device).expand_as(ids)
    partial = {"logits_to_keep": longest - first} if first else {}
    return model(input_ids=ids, position_ids=positions, use_cache=False, **partial).logits


@dataclass(frozen=True)
class Windows:
    """Documents, tokenized and cut into independent windows; every token is predicted once."""

    input_ids: list[list[int]]
    """Of each window: the prefix, then tokens of one document. Sorted by length."""
    doc_ids: list[int]
    """The document of each window."""
    prefix_length: int
    """Tokens at the start of a window that are not predicted."""
    num_bytes: numpy.ndarray
    """UTF-8 bytes of each document."""

    @classmethod
    def from_texts(cls, tokenizer: Any, texts: Sequence[str], context_length: int) -> "Windows":
        """Cuts `texts` into windows of at most `context_length` tokens, prefix included."""
        prefix = get_template(tokenizer).eval_prefix
        step = context_length - len(prefix)
        windows = [
            (prefix + ids[start : start + step], document)
            for document, ids in enumerate(encode_batch(tokenizer, texts))
            for start in range(0, len(ids), step)
        ]
        windows.sort(key=lambda window: len(window[0]))  # little padding in each batch
        return cls(
            [ids for ids, _ in windows],
            [document for _, document in windows],
            len(prefix),
            numpy.array([len(text.encode("utf-8")) for text in texts], dtype=numpy.int64),
        )


def document_bits(
    model: Any,
    windows: Windows,
    tokens_per_batch: int = 4096,
    on_progress: Callable[[float], Any] | None = None,
) -> numpy.ndarray:
    """Information content of each document in bits, without the end mark, which has no bytes.

    Args:
        tokens_per_batch: tokens in one forward pass, padding included.
        on_progress: called with the number of documents scored since the last call, a fraction for parts of one.
    """
    batches: list[list[int]] = []
    for index, ids in enumerate(windows.input_ids):
        if not batches or (len(batches[-1]) + 1) * len(ids) > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    bits = numpy.zeros(len(windows.num_bytes))
    for batch in batches:
        logits = padded_logits(model, [windows.input_ids[index] for index in batch])
        nats = []
        for row, index in enumerate(batch):
            targets = torch.tensor(windows.input_ids[index][windows.prefix_length :], device=logits.device)
            predictions = logits[row, windows.prefix_length - 1 :][: len(targets)].float()
            nats.append(cross_entropy(predictions, targets, reduction="sum"))
        for index, value in zip(batch, torch.stack(nats).tolist(), strict=True):
            bits[windows.doc_ids[index]] += value / math.log(2)
        if on_progress:
            on_progress(len(batch) / len(windows.input_ids) * len(bits))
    return bits


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    context_length: int,
    tokens_per_batch: int = 4096,
    on_progress: Callable[[float], Any] | None = None,
) -> float:
    """Bits per UTF-8 byte of `texts`, see `Windows` and `document_bits`."""
    windows = Windows.from_texts(tokenizer, texts, context_length)
    return float(document_bits(model, windows, tokens_per_batch, on_progress).sum() / windows.num_bytes.sum())


def bootstrap_ci(
    bits: numpy.ndarray, num_bytes: numpy.ndarray, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of bits per byte: percentile bootstrap over documents (Efron 1979), `NUM_RESAMPLES` resamples.

    Args:
        bits, num_bytes: of each document.
    """
    resamples = numpy.random.default_rng(seed).integers(0, len(bits), (NUM_RESAMPLES, len(bits)))
    values = bits[resamples].sum(axis=1) / num_bytes[resamples].sum(axis=1)
    low, high = numpy.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return round(float(low), 4), round(float(high), 4)


def bpb_by_language(
    model: PreTrainedModel, tokenizer: Any, texts: dict[str, list[str]], context_length: int, name: str
) -> dict[str, float]:
    """`bits_per_byte` of each language, under one progress bar called `name`."""
    with progress_bar(sum(map(len, texts.values())), f"bits per byte, {name}") as bar:
        return {
            language: round(bits_per_byte(model, tokenizer, documents, context_length, on_progress=bar.update), 4)
            for language, documents in texts.items()
        }


def format_bpb_table(bits: dict[str, dict[str, float]]) -> str:
    """A table of bits per byte: {model: {language: value}}, one model a line."""
    languages = next(iter(bits.values()))
    rows = [[name, *(f"{values[language]:.3f}" for language in languages)] for name, values in bits.items()]
    return format_table(["bits per byte", *languages], rows)
