"""Held-out text of each language: what no step trains on, for measuring tokenizers and models by the same documents."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from llmtuner.console import UserError
from llmtuner.data.sources import DatasetAttr, get_dataset_attr, is_validation, read_texts


def held_out_texts(
    test_set: str, training_sets: list[str], dataset_info: Path, corpus_dir: Path, share: float, max_bytes: int
) -> list[str]:
    """Texts of one language that no step trains on: its test files, else the held-out documents of its training sets.

    Each file, or each training set, gives an equal part of `max_bytes`; the last document of a part is cut to fit.

    Args:
        test_set, training_sets: names in `dataset_info`; files are looked up in `corpus_dir`.
        share: share of a training set's documents that is held out.
        max_bytes: UTF-8 bytes of all texts together, at most.

    Raises:
        UserError: if there is neither a test file nor a training set, or no document in them.
    """
    found: list[Iterable[str]] = []
    problems = []
    try:
        tests = get_dataset_attr(test_set, dataset_info, corpus_dir)
        found = [read_texts(replace(tests, files=(file,))) for file in tests.files] or [read_texts(tests)]
    except UserError as error:
        problems.append(str(error))
        for name in training_sets:
            try:
                found.append(_held_out_documents(get_dataset_attr(name, dataset_info, corpus_dir), share))
            except UserError as error:
                problems.append(str(error))
    if not found:
        raise UserError("there is no text to measure with:\n  " + "\n  ".join(problems))
    texts = [text for part in found for text in take_bytes(part, max_bytes // len(found))]
    if not texts:
        raise UserError(
            f"there is no text to measure with: none of the documents of {', '.join(training_sets)} in {corpus_dir} "
            f"is in the held-out {share:.0%}. Put more there, or files of {test_set}."
        )
    return texts


def training_documents(source: DatasetAttr, share: float) -> Iterator[str]:
    """The documents of a training set that steps may learn from: all but the held-out share."""
    return (text for text in read_texts(source) if not is_validation(text, share))


def reference_documents(
    names: list[str], dataset_info: Path, corpus_dir: Path, share: float, max_bytes: int
) -> Iterator[str]:
    """Training text of all files of some data sets alike: what small files leave of their part, larger ones may use.

    Args:
        names: data sets in `dataset_info`.
        share: the held-out share, which is left out.
        max_bytes: UTF-8 bytes of all texts together, at most.

    Raises:
        UserError: at once, if a data set is nowhere to be found.
    """
    sources = [get_dataset_attr(name, dataset_info, corpus_dir) for name in names]
    parts = [replace(source, files=(file,)) for source in sources for file in source.files]
    parts.sort(key=lambda source: Path(source.files[0]).stat().st_size)
    parts += [source for source in sources if not source.files]  # from the hub

    def documents() -> Iterator[str]:
        left = max_bytes
        for number, part in enumerate(parts):
            for text in take_bytes(training_documents(part, share), left // (len(parts) - number)):
                left -= len(text.encode())
                yield text

    return documents()


def _held_out_documents(source: DatasetAttr, share: float) -> Iterator[str]:
    return (text for text in read_texts(source) if is_validation(text, share))


def take_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first texts of a stream, `max_bytes` in UTF-8 at most; the last one is cut to fit."""
    left = max_bytes
    for text in texts:
        if left <= 0:
            return
        data = text.encode()[:left]
        left -= len(data)
        if cut := data.decode(errors="ignore"):  # a character cut in two goes
            yield cut
