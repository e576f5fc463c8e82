"""Data sets of the harness's tasks from local files, in the columns that the tasks' definitions expect."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmtuner.console import UserError


@dataclass(frozen=True)
class PublishedData:
    """A data set as its authors publish it."""

    name: str
    """What its files are called: NAME.SPLIT.jsonl."""
    source: str
    columns: tuple[str, ...]
    """Columns that the task's definition reads."""
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    """{column: {published value: value on the hub}}."""


# By dataset_path and dataset_name of the harness's definitions. The hub's classes are numbers, JGLUE publishes their names.
PUBLISHED = {
    ("Rakuten/JGLUE", "JCommonsenseQA"): PublishedData(
        "jcommonsenseqa", "JGLUE v1.3", ("question", *(f"choice{number}" for number in range(5)), "label")
    ),
    ("Rakuten/JGLUE", "JNLI"): PublishedData(
        "jnli",
        "JGLUE v1.3",
        ("sentence1", "sentence2", "label"),
        {"label": {"entailment": 0, "contradiction": 1, "neutral": 2}},
    ),
    ("openai/gsm8k", "main"): PublishedData("gsm8k", "openai/grade-school-math", ("question", "answer")),
}
VALIDATION = ("valid", "validation", "val")  # names of one split; JGLUE's comes first


class LocalSplits(dict):
    """{split: Dataset} of the splits that have a file. Any other is empty, and noted in `missing`."""

    def __init__(self, directory: Path, name: str, splits: Mapping[str, Any]) -> None:
        super().__init__(splits)
        self.directory, self.name = directory, name
        self.missing: list[str] = []

    def __missing__(self, split: str) -> Any:
        self.missing.append(split)
        return next(iter(self.values())).select([])

    def check_fewshot(self, task: str, num_fewshot: int) -> None:
        """Checks that the split of a task's examples has a file; to be called once the task has read its splits.

        Raises:
            UserError: names the file.
        """
        if self.missing and num_fewshot:
            raise UserError(
                f"{task} takes its {num_fewshot} few-shot examples from the split {self.missing[0]}, but "
                f"{_candidates(self.directory, self.name, self.missing[0])[0]} does not exist. Add that file, or evaluate "
                "without examples: --num_fewshot 0."
            )


@contextmanager
def local_datasets(directory: Path | None) -> Iterator[None]:
    """Lets tasks read NAME.SPLIT.jsonl in `directory` instead of downloading their data set.

    NAME is that of `PUBLISHED`, for other data sets the last part of the hub's name and the configuration
    (cmmlu.agronomy.test.jsonl), with rows as on the hub. A task without a file for its questions still asks the hub.

    Raises:
        UserError: if the directory does not exist. Within the context, by tasks: if neither file nor hub has the questions;
            names the file and the line of a row that is not as published.
    """
    if directory is None:
        yield
        return
    if not directory.is_dir():
        raise UserError(
            f"the data directory {directory} does not exist. Name a directory of files such as jnli.valid.jsonl."
        )
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    def read_or_download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config = task.config
        if callable(config.custom_dataset) or (config.dataset_kwargs or {}).get("data_files"):
            return download(task, dataset_kwargs, **kwargs)
        name = _published(config).name
        questions = config.test_split or config.validation_split
        if questions and any(path.is_file() for path in _candidates(directory, name, questions)):
            task.dataset = _read_splits(directory, config)
            return None
        try:
            return download(task, dataset_kwargs, **kwargs)
        except Exception as error:  # whatever `datasets` raises without a connection
            missing = _candidates(directory, name, questions or "test")[0]
            raise UserError(f"{missing} does not exist, and the hub has not answered: {error}") from error

    with patch.object(ConfigurableTask, "download", read_or_download):
        yield


def _published(config: Any) -> PublishedData:
    path, configuration = config.dataset_path or "", config.dataset_name or ""
    generic = PublishedData(".".join(filter(None, (path.rsplit("/", 1)[-1], configuration))).lower(), "the hub", ())
    return PUBLISHED.get((path, configuration), generic)


def _candidates(directory: Path, name: str, split: str) -> list[Path]:
    return [directory / f"{name}.{alias}.jsonl" for alias in (VALIDATION if split in VALIDATION else (split,))]


def _read_splits(directory: Path, config: Any) -> LocalSplits:
    """Reads those of a task's splits that have a file."""
    from datasets import Dataset

    published = _published(config)
    fewshot_split = getattr(config.fewshot_config, "split", None) or config.fewshot_split
    splits = {}
    for split in dict.fromkeys((config.test_split, config.validation_split, config.training_split, fewshot_split)):
        path = next((path for path in _candidates(directory, published.name, split or "") if path.is_file()), None)
        if split and path:
            splits[split] = Dataset.from_list(list(_read_rows(path, published)))
    return LocalSplits(directory, published.name, splits)


def _read_rows(path: Path, published: PublishedData) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file with the hub's values.

    Raises:
        UserError: if the file cannot be read or is empty; names the line that is not as published.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may contain U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} has no rows. Fill it as {published.source} publishes it.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [column for column in published.columns if column not in row]
            if missing:
                raise ValueError(f"the column {missing[0]} is missing")
            for column, values in published.values.items():
                if row[column] not in values:
                    raise ValueError(f"{column} is {row[column]!r}, not one of {', '.join(map(str, values))}")
                row[column] = values[row[column]]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: {error}. Rows must be as {published.source} publishes them."
            ) from error
        yield row
