"""The line between text to train on and held-out text, by which tokenizers and models of all steps are measured."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from constants import CORPUS_DIR, DATASET_INFO, HELD_OUT, VALIDATION_SHARE
from llmtuner.console import InputError
from llmtuner.data.sources import Source, find_source, is_held_out, read_texts


def held_out_texts(language: str, max_bytes: int) -> list[str]:
    """Texts of one language that no step trains on: its test files, else the held-out documents of its training sets.

    Each file, or each training set, gives an equal part of `max_bytes`; the last document of a part is cut to fit.

    Args:
        language: "ja", "zh" or "en", a key of `constants.HELD_OUT`.
        max_bytes: UTF-8 bytes of all texts together, at most.

    Raises:
        InputError: if there is neither a test file nor a training set, or no document in them.
    """
    test_set, training_sets = HELD_OUT[language]
    found: list[Iterable[str]] = []
    problems = []
    try:
        tests = find_source(test_set, DATASET_INFO, CORPUS_DIR)
        found = [read_texts(replace(tests, files=(file,))) for file in tests.files] or [read_texts(tests)]
    except InputError as error:
        problems.append(str(error))
        for name in training_sets:
            try:
                found.append(_held_out_documents(find_source(name, DATASET_INFO, CORPUS_DIR)))
            except InputError as error:
                problems.append(str(error))
    if not found:
        raise InputError(f"there is no text to measure {language} with:\n  " + "\n  ".join(problems))
    texts = [text for part in found for text in up_to_bytes(part, max_bytes // len(found))]
    if not texts:
        raise InputError(
            f"there is no text to measure {language} with: none of the documents of {', '.join(training_sets)} in "
            f"{CORPUS_DIR} is in the held-out {VALIDATION_SHARE:.0%}. Put more there, or files of {test_set}."
        )
    return texts


def training_documents(source: Source) -> Iterator[str]:
    """The documents of a training set that steps may learn from: all but the held-out ones."""
    return (text for text in read_texts(source) if not is_held_out(text, VALIDATION_SHARE))


def up_to_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first texts of a stream, `max_bytes` in UTF-8 at most; the last one is cut to fit."""
    left = max_bytes
    for text in texts:
        if left <= 0:
            return
        data = text.encode()[:left]
        left -= len(data)
        if cut := data.decode(errors="ignore"):  # a character cut in two goes
            yield cut


def _held_out_documents(source: Source) -> Iterator[str]:
    return (text for text in read_texts(source) if is_held_out(text, VALIDATION_SHARE))
