"""A batch as text, with target tokens and ignored tokens told apart: what a step learns from, for a person to read."""

import itertools
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtuner.console import UserError
from llmtuner.data.loader import get_dataset
from llmtuner.data.packing import PackedBatch, PackedDataCollator, PadToMultiple
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.hparams import get_train_args, read_args
from llmtuner.tokenizer.encoding import display_ids, load_tokenizer

GREEN, RED, RESET = "\033[32m", "\033[31m", "\033[0m"
MARK_OPEN, MARK_CLOSE = "⟦", "⟧"  # around targets if there are no colors
# Unicode categories that are invisible, or break a line
INVISIBLE_CATEGORIES = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
LEGEND = "special tokens and single bytes are shown by name: </s>, <0x0A>"


def preview_batch(args: dict[str, Any] | str | Path | list[str] | None = None) -> str:
    """Formats one batch of a run's training set as the trainer gets it, in the order before shuffling; loads no model.

    Args:
        args: as for `read_args`, and `batch`: the number of the batch, 0 by default.

    Raises:
        UserError: for invalid settings or data, or if there is no such batch.
    """
    settings = read_args(args)
    number = settings.pop("batch", 0)
    settings.pop("deepspeed", None)  # a batch depends on none of it, and its file need not exist here
    train_args = get_train_args(settings)
    tokenizer = load_tokenizer(train_args.model.model_name_or_path)
    train = get_dataset(train_args.finetuning.stage, train_args.data, train_args.training.seed, tokenizer).train
    size = train_args.training.per_device_train_batch_size
    sequences = PadToMultiple(train, size)
    count = len(sequences) // size
    if type(number) is not int or not 0 <= number < count:
        raise UserError(
            f"there is no batch {number!r}: the training set has {count:,}, of {size:,} sequences each, counted from 0. "
            "Give --batch another number."
        )
    collator = PackedDataCollator(tokenizer.pad_token_id or 0)
    batch = collator([sequences[i] for i in range(number * size, (number + 1) * size)])
    return f"batch {number:,} of {count:,}\n{format_batch(batch, tokenizer, train.token_dataset.describe_document)}"


def format_batch(batch: PackedBatch, tokenizer: Any, describe_document: Callable[[int], str]) -> str:
    """Formats a batch as text: targets in green, ignored tokens in red; without colors, targets are between two marks.

    At a breakpoint in `PackedTrainer.compute_loss`: `print(format_batch(inputs, tokenizer, self.describe_document))`, with
    the tokenizer from `load_tokenizer`.

    Args:
        describe_document: file and line of a document, by its id in the batch's `doc_ids`.
    """
    colored = {True: (GREEN, RESET), False: (RED, RESET)}
    styles = colored if _use_colors() else {True: (MARK_OPEN, MARK_CLOSE), False: ("", "")}
    lines = [_style_runs([("target", True), (", ignored", False)], styles) + f"; {LEGEND}"]
    columns = (batch["input_ids"].tolist(), batch["labels"].tolist(), batch["position_ids"].tolist(), batch["doc_ids"])
    pad_id = tokenizer.pad_token_id or 0
    first_tokens = {"[gMASK]", getattr(tokenizer, "bos_token", None)}
    for number, (ids, labels, positions, doc_ids) in enumerate(zip(*columns, strict=True), start=1):
        size, last_block = len(ids), len(ids) - 1 - positions[::-1].index(0)
        if {*ids[last_block:]} == {pad_id} and (last_block or not len(doc_ids)):  # no document begins with it
            size = last_block
        names = tokenizer.convert_ids_to_tokens(ids[:size])
        texts = map(_escape_invisible, display_ids(tokenizer, ids[:size]))
        tokens = [(text, label != IGNORE_INDEX) for text, label in zip(texts, labels[:size], strict=True)]
        num_targets = sum(is_target for _, is_target in tokens)
        counts = f"{size:,} tokens, {num_targets:,} targets, {len(doc_ids):,} documents"
        lines += ["", f"sequence {number} of {len(batch['doc_ids'])}: {counts}"]
        # If documents attend to one another, positions do not restart; then [gMASK] begins each but a continued one. Other
        # bases may have no such token: their documents are shown together.
        starts = [i for i in range(size) if positions[i] == 0 or names[i] in first_tokens]
        sources = [describe_document(int(doc_id)) for doc_id in doc_ids]
        if len(starts) != len(sources):
            starts, sources = [0], [", then ".join(sources)]
        for source, start, stop in zip(sources, starts, [*starts, size][1:], strict=True):
            attends = " (attends to what precedes it)" if positions[start] else ""
            lines += [f"-- {source}{attends}", _style_runs(tokens[start:stop], styles)]
        if size < len(ids):
            lines.append(f"-- {len(ids) - size:,} tokens of padding")
    return "\n".join(lines)


def _style_runs(tokens: list[tuple[str, bool]], styles: dict[bool, tuple[str, str]]) -> str:
    """Joins tokens, each with whether it is a target, into one line in which runs of a kind share their style."""
    line = ""
    for is_target, run in itertools.groupby(tokens, key=lambda token: token[1]):
        before, after = styles[is_target]
        line += before + "".join(text for text, _ in run) + after
    return line


def _use_colors() -> bool:
    """Whether output is colored: NO_COLOR forbids it, FORCE_COLOR demands it, otherwise if it is a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def _escape_invisible(token: str) -> str:
    """A token on one line: characters that are invisible, or equal to a mark, are shown by their code."""
    return "".join(
        f"<U+{ord(char):04X}>"
        if char in (MARK_OPEN, MARK_CLOSE) or unicodedata.category(char) in INVISIBLE_CATEGORIES
        else char
        for char in token
    )
