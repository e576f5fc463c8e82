"""Bits per byte: how well a model predicts a text, comparable across vocabularies."""

import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from llmtuner.console import progress, table
from llmtuner.data.template import IGNORE, Template
from llmtuner.tokenizer.fast import encode_batch


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel, tokenizer: Any, texts: list[str], window: int, name: str = "", tokens_per_batch: int = 4096
) -> float:
    """Bits that the model needs per UTF-8 byte of `texts`.

    Every token of a text is predicted, the first one from the prefix alone. A text longer than `window` tokens is read
    in windows that know nothing of one another. The end of document is not counted: it has no bytes.
    """
    prefix = Template.of(tokenizer).prefix
    step = window - len(prefix)
    pieces = [
        prefix + ids[start : start + step]
        for ids in encode_batch(tokenizer, texts)
        for start in range(0, len(ids), step)
    ]
    pieces.sort(key=len)
    batches: list[list[list[int]]] = []
    for ids in pieces:  # rising lengths, so a batch is as long as its last
        if not batches or (len(batches[-1]) + 1) * len(ids) > tokens_per_batch:
            batches.append([])
        batches[-1].append(ids)
    nats = 0.0
    for rows in progress(batches, f"bits per byte {name}".strip(), unit="batch"):
        longest = max(map(len, rows))
        batch = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        inside = torch.arange(longest, device=model.device) < lengths[:, None]
        targets = torch.where(inside, batch, IGNORE)
        targets[:, : len(prefix)] = IGNORE
        # Padding stands on the right, where a causal model cannot see it from inside a text: no mask is needed.
        positions = torch.arange(longest, device=model.device).expand_as(batch)
        logits = model(input_ids=batch, position_ids=positions, use_cache=False).logits
        nats += float(
            cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
            )
        )
    return nats / math.log(2) / sum(len(text.encode("utf-8")) for text in texts)


def bits_per_language(
    model: PreTrainedModel, tokenizer: Any, texts: dict[str, list[str]], window: int, name: str
) -> dict[str, float]:
    """`bits_per_byte` of each language's texts."""
    return {
        language: round(bits_per_byte(model, tokenizer, own, window, f"{name} {language}"), 4)
        for language, own in texts.items()
    }


def bits_table(bits: dict[str, dict[str, float]]) -> str:
    """Lays out bits per byte, one model a line."""
    languages = ("ja", "zh", "en")
    return table(
        ["bits per byte", *languages], [[name, *(f"{own[one]:.3f}" for one in languages)] for name, own in bits.items()]
    )
