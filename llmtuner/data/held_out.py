"""Held-out text of each language, on which no step trains: the same documents measure tokenizers and models."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from llmtuner.console import UserError
from llmtuner.data.readers import read_texts
from llmtuner.data.sources import DatasetAttr, get_dataset_attr


def text_hash(data: bytes) -> int:
    """A number in [0, 2**64) that depends on a document's UTF-8 alone."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def never_held_out(number: int) -> int:
    """A `text_hash` moved to the end of its range, where no ratio up to 0.99 holds a text out."""
    return number | 0xFF << 56


def is_validation(text: str, ratio: float) -> bool:
    """Whether a document is held out: decided by its text alone, so that every step decides alike.

    Args:
        ratio: of the documents that are held out.
    """
    return text_hash(text.encode()) < ratio * 2**64


def held_out_texts(
    test_set: str, training_sets: list[str], dataset_info: Path, corpus_dir: Path, ratio: float, max_bytes: int
) -> list[str]:
    """Held-out texts of one language: of its test files, or else of its training sets.

    Each file, or each training set, contributes an equal part of `max_bytes`; the last document of a part is truncated.

    Args:
        test_set, training_sets: names in `dataset_info`; files are looked up in `corpus_dir`.
        ratio: of the documents of a training set that are held out.
        max_bytes: maximum UTF-8 bytes of all texts together.

    Raises:
        UserError: if there is neither a test file nor a training set, or no document in them.
    """
    parts: list[Iterable[str]] = []
    errors = []
    try:
        tests = get_dataset_attr(test_set, dataset_info, corpus_dir)
        parts = [read_texts(replace(tests, files=(file,))) for file in tests.files] or [read_texts(tests)]
    except UserError as error:
        errors.append(str(error))
        for name in training_sets:
            try:
                documents = read_texts(get_dataset_attr(name, dataset_info, corpus_dir))
                parts.append(text for text in documents if is_validation(text, ratio))
            except UserError as error:
                errors.append(str(error))
    if not parts:
        raise UserError("there is no text to measure with:\n  " + "\n  ".join(errors))
    texts = [text for part in parts for text in take_bytes(part, max_bytes // len(parts))]
    if not texts:
        raise UserError(
            f"there is no text to measure with: none of the documents of {', '.join(training_sets)} in {corpus_dir} "
            f"is in the held-out {ratio:.0%}. Put more there, or files of {test_set}."
        )
    return texts


def training_documents(dataset_attr: DatasetAttr, ratio: float) -> Iterator[str]:
    """The documents of a training set that steps may learn from: all that are not held out."""
    return (text for text in read_texts(dataset_attr) if not is_validation(text, ratio))


def reference_documents(
    names: list[str], dataset_info: Path, corpus_dir: Path, ratio: float, max_bytes: int
) -> Iterator[str]:
    """Training text from all files of some datasets in equal parts; larger files use what smaller ones leave.

    Args:
        names: datasets in `dataset_info`.
        ratio: of the documents, held out and so excluded.
        max_bytes: maximum UTF-8 bytes of all texts together.

    Raises:
        UserError: immediately, if a dataset cannot be found.
    """
    datasets = [get_dataset_attr(name, dataset_info, corpus_dir) for name in names]
    parts = [replace(dataset, files=(file,)) for dataset in datasets for file in dataset.files]
    parts.sort(key=lambda part: Path(part.files[0]).stat().st_size)
    parts += [dataset for dataset in datasets if not dataset.files]  # from the hub

    def documents() -> Iterator[str]:
        left = max_bytes
        for number, part in enumerate(parts):
            for text in take_bytes(training_documents(part, ratio), left // (len(parts) - number)):
                left -= len(text.encode())
                yield text

    return documents()


def take_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yields the first texts of a stream, at most `max_bytes` in UTF-8; the last one is truncated."""
    left = max_bytes
    for text in texts:
        if left <= 0:
            return
        data = text.encode()[:left]
        left -= len(data)
        if truncated := data.decode(errors="ignore"):  # drops a character that is cut in two
            yield truncated
