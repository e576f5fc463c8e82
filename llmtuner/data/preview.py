"""A batch as text, trained tokens and masked ones told apart: what a step learns from, for a person to read."""

import itertools
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtuner.console import UserError
from llmtuner.data.packing import PackedDataCollator, PadToMultiple
from llmtuner.data.template import IGNORE_INDEX
from llmtuner.tokenizer.fast import SPACE, load_tokenizer

GREEN, RED, RESET = "\033[32m", "\033[31m", "\033[0m"
MARK_OPEN, MARK_CLOSE = "⟦", "⟧"  # around trained text where there are no colours
INVISIBLE_CATEGORIES = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # categories of what cannot be seen, or breaks a line
LEGEND = "special tokens and single bytes stand by name: </s>, <0x0A>"


def preview_batch(args: dict[str, Any] | str | Path | list[str] | None = None) -> str:
    """One batch of a run's training set as the trainer gets it, in the order before shuffling; no model is loaded.

    Args:
        args: as for `read_args`, and `batch`: the number of the batch, 0 if it is not given.

    Raises:
        UserError: for settings or data that cannot be used, or if there is no such batch.
    """
    from llmtuner.hparams import get_train_args, read_args
    from llmtuner.train.workflow import get_pt_dataset, get_sft_dataset

    settings = read_args(args)
    number = settings.pop("batch", 0)
    settings.pop("deepspeed", None)  # it would have the processes of a run find one another
    train_args = get_train_args(settings)
    tokenizer = load_tokenizer(train_args.model.model_name_or_path)
    train, *_ = (get_pt_dataset if train_args.finetuning.stage == "pt" else get_sft_dataset)(
        train_args.data, train_args.training.seed, tokenizer
    )
    size = train_args.training.per_device_train_batch_size
    sequences = PadToMultiple(train, size)
    count = len(sequences) // size
    if type(number) is not int or not 0 <= number < count:
        raise UserError(
            f"there is no batch {number!r}: the training set has {count:,}, of {size:,} sequences each, counted from 0. "
            "Give --batch another number."
        )
    collator = PackedDataCollator(tokenizer.pad_token_id)
    batch = collator([sequences[place] for place in range(number * size, (number + 1) * size)])
    return f"batch {number:,} of {count:,}\n{format_batch(batch, tokenizer, train.token_dataset.describe_document)}"


def format_batch(batch: dict[str, Any], tokenizer: Any, describe_document: Callable[[int], str]) -> str:
    """A batch as text: green is trained, red is not; without colours, trained text stands between two marks.

    At a breakpoint in `PackedTrainer.compute_loss`: `print(format_batch(inputs, tokenizer, self.describe_document))`, with the
    tokenizer from `load_tokenizer`.

    Args:
        batch: what `PackedDataCollator` makes.
        describe_document: file and line of a document, by its number in the batch's `doc_ids`.
    """
    styles = (
        {True: (GREEN, RESET), False: (RED, RESET)}
        if _use_colors()
        else {True: (MARK_OPEN, MARK_CLOSE), False: ("", "")}
    )
    lines = [_style_runs([("trained", True), (", not trained", False)], styles) + f"; {LEGEND}"]
    columns = (batch[key].tolist() for key in ("input_ids", "labels", "position_ids"))
    for place, (ids, labels, positions, rows) in enumerate(zip(*columns, batch["doc_ids"], strict=True), start=1):
        size = len(ids)
        while size and ids[size - 1] == tokenizer.pad_token_id:  # no text holds it
            size -= 1
        pieces = tokenizer.convert_ids_to_tokens(ids[:size])
        tokens = [
            (_escape_invisible(piece), label != IGNORE_INDEX)
            for piece, label in zip(pieces, labels[:size], strict=True)
        ]
        trained = sum(is_trained for _, is_trained in tokens)
        counts = f"{size:,} tokens, {trained:,} trained, {len(rows):,} documents"
        lines += ["", f"sequence {place} of {len(batch['doc_ids'])}: {counts}"]
        # Positions run on from document to document where these see one another; [gMASK] begins each but one cut before.
        starts = [at for at in range(size) if positions[at] == 0 or pieces[at] == "[gMASK]"]
        for row, start, stop in zip(rows, starts, [*starts, size][1:], strict=True):
            sees = " (sees what stands before it)" if positions[start] else ""
            lines += [f"-- {describe_document(int(row))}{sees}", _style_runs(tokens[start:stop], styles)]
        if size < len(ids):
            lines.append(f"-- {len(ids) - size:,} tokens of padding")
    return "\n".join(lines)


def _style_runs(tokens: list[tuple[str, bool]], styles: dict[bool, tuple[str, str]]) -> str:
    """Texts of tokens, each with whether it is trained, as one line in which runs of a kind share their style."""
    line = ""
    for trained, run in itertools.groupby(tokens, key=lambda token: token[1]):
        before, after = styles[trained]
        line += before + "".join(text for text, _ in run) + after
    return line


def _use_colors() -> bool:
    """Whether output is coloured: NO_COLOR forbids it, FORCE_COLOR asks for it, else a terminal has it."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def _escape_invisible(piece: str) -> str:
    """A piece of text on one line: what would not be seen, or be taken for a mark, is shown by its code."""
    return "".join(
        f"<U+{ord(char):04X}>"
        if char in (MARK_OPEN, MARK_CLOSE) or unicodedata.category(char) in INVISIBLE_CATEGORIES
        else char
        for char in piece.replace(SPACE, " ")
    )
