"""dataset_info.json: looks up a dataset's entry and the local files, or the hub dataset, that hold its rows."""

import difflib
import glob
import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llmtuner.aliases import DATASET_KEYS
from llmtuner.console import UserError, print0
from llmtuner.files import checksum

FILE_TYPES = (".parquet", ".jsonl", ".json", ".csv", ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of all types but parquet, which compresses by itself
SUPPORTED_FILES = f"{', '.join(FILE_TYPES)}; all but parquet also with {' or '.join(COMPRESSIONS)}"
TRANSLATIONS = ("parallel", "glossary")  # formattings whose rows hold the same in several languages
FORMATTINGS = ("alpaca", "sharegpt", *TRANSLATIONS)
# What one document of a .txt file is; names and default are those of Hugging Face's text loader.
SAMPLE_BY = {"line": "a line", "paragraph": "a block of lines between blank ones", "document": "a whole file"}
# LLaMA-Factory's defaults, for entries that do not say otherwise.
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
DEFAULT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
KNOWN_COLUMNS = (*DEFAULT_COLUMNS, "history", "system", "tools", "translations")
CODE_SWITCH_STYLES = ("replace", "alongside")
CODE_SWITCH_DEFAULTS = {"glossary": "", "from": "", "to": "", "ratio": 0.5, "style": CODE_SWITCH_STYLES[0]}
VALUE_TYPES: dict[type, str] = {int: "a whole number above 0", dict: "an object of the form {KEY: VALUE}", str: "text"}
# Other hubs, and a checksum that LLaMA-Factory does not enforce: ignored beside a file name or a hub id.
IGNORED_KEYS = ("ms_hub_url", "om_hub_url", "file_sha1")


@dataclass(frozen=True)
class DatasetAttr:
    """An entry of `dataset_info.json`, with LLaMA-Factory's keys, and where its rows were found."""

    name: str
    files: tuple[str, ...]
    """Local files; empty if the rows are read from the hub."""
    search_path: str = ""
    """Where local files would be: directory and pattern."""
    hf_hub_url: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    """Directory within the hub dataset."""
    num_samples: int | None = None
    """Maximum number of rows."""
    formatting: str = "alpaca"
    """`alpaca` (columns prompt, query, response, history) or `sharegpt` (a list of messages), both: system, tools; for stage pt
    `parallel` (translations, a line each) or `glossary` (translations in parentheses)."""
    columns: dict[str, Any] = field(default_factory=dict)
    """role of a column -> its name in the files, or a list of names, of which the first that exists is used. All names of
    `translations` are used: they are language codes."""
    tags: dict[str, str] = field(default_factory=dict)
    """Names used inside sharegpt messages, where they differ from `DEFAULT_TAGS`."""
    row_filter: dict[str, Any] = field(default_factory=dict)
    """Only rows with these column values are used."""
    sample_by: str = "line"
    """What one document of a .txt file is: `line`, `paragraph` (lines between blank lines) or `document` (the file)."""
    code_switch: "CodeSwitch | None" = None
    """Terms that are translated in its documents or dialogues."""

    @cached_property
    def column_names(self) -> dict[str, list[str]]:
        """role -> names that its column may have; none if the rows have no such column."""
        names: dict[str, list[str]] = {}
        for role in KNOWN_COLUMNS:
            configured = self.columns.get(role)
            if not configured and (not self.columns or role == "messages"):
                configured = DEFAULT_COLUMNS.get(role)
            names[role] = configured if isinstance(configured, list) else [configured] if configured else []
        return names

    def resolve_column(self, role: str, available: Any) -> str:
        """The name of the column for `role` among the available ones.

        Raises:
            UserError: if none of its possible names is available.
        """
        names = self.column_names[role]
        for name in names:
            if name in available:
                return name
        if not names:
            raise UserError(
                f"dataset {self.name}: `columns` in dataset_info.json names no column for {role!r}; "
                f"{self.describe_locations()} has {', '.join(map(repr, available))}."
            )
        raise UserError(
            f"dataset {self.name}: {self.describe_locations()} has no column {' or '.join(map(repr, names))}; "
            f"it has {', '.join(map(repr, available))}. Rename it, or name it under `columns` in dataset_info.json."
        )

    @property
    def locations(self) -> tuple[str, ...]:
        """What `Row.file` refers to."""
        return self.files or (f"hub dataset {self.hf_hub_url}",)

    def describe_locations(self) -> str:
        return ", ".join(self.locations)

    def describe_sample_by(self) -> str:
        """Says what one document of the .txt files is; empty if there are none."""
        if not any(file_type(file) == ".txt" for file in self.files):
            return ""
        return f"one document of a .txt file is {SAMPLE_BY[self.sample_by]} (sample_by: {', '.join(SAMPLE_BY)})"

    def matches_filter(self, values: dict[str, Any]) -> bool:
        """Whether a row has the values of `row_filter`; CSV has only text, so numbers also match their text."""
        return all(
            values.get(column) == value or str(values.get(column)) == str(value)
            for column, value in self.row_filter.items()
        )

    def fingerprint(self) -> str:
        """Changes with a file's path, size, date or content (of files above 16 MiB a sample), or with the entry."""
        files = [Path(file) for file in self.files]
        if not files and self.hf_hub_url and Path(self.hf_hub_url).is_dir():
            files = sorted(path for path in Path(self.hf_hub_url).rglob("*") if path.is_file())
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns, checksum(file)) for file in files]
        glossary = self.code_switch.glossary.fingerprint() if self.code_switch else ""
        return hashlib.sha256(json.dumps([stats, repr(self), glossary], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CodeSwitch:
    """`code_switch` of an entry: which terms of its documents or dialogues are translated, and how."""

    glossary: DatasetAttr
    """Its columns are language codes."""
    source: str
    """`from`: the language of the texts."""
    target: str
    """`to`: the language of the translations."""
    ratio: float
    """Of the terms in a document or dialogue, those that are translated."""
    style: str
    """`replace`: a translation takes the place of each occurrence; `alongside`: it follows the first one in parentheses."""


def get_dataset_attr(name: str, dataset_info: Path, corpus_dir: Path) -> DatasetAttr:
    """Looks up a dataset: files in `corpus_dir` first, then the hub.

    `REMOTE:ORG/NAME`, or `ORG/NAME` if the directory of `dataset_info` is called ONLINE, is a hub dataset with
    LLaMA-Factory's default columns; it needs no entry.

    Raises:
        UserError: if the name is unknown, its entry is invalid, there is neither a file nor a hub id, or `corpus_dir`
            holds no file of any entry: then the directory is wrong, and the hub is not asked.
    """
    if name.startswith("REMOTE:") or str(dataset_info.parent) == "ONLINE":
        return DatasetAttr(name=name, files=(), hf_hub_url=name.removeprefix("REMOTE:"))
    entries = _read_dataset_info(dataset_info)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(entries)}."
        raise UserError(f"dataset {name!r} is not described in {dataset_info}.{hint}")
    entry = _validate_entry(entries[name], f"{dataset_info}: entry {name!r}")
    pattern = entry.pop("file_name", None)
    files, skipped = _local_files(corpus_dir, pattern) if pattern else ((), "")
    search_path, setting = f"{corpus_dir}/{pattern}", "corpus_dir (in the steps: CORPUS_DIR)"
    if not files and not entry.get("hf_hub_url"):
        raise UserError(
            f"dataset {name}: no file {search_path} (of type {SUPPORTED_FILES}).{skipped} "
            f"Put it there, or change {setting} or {dataset_info}."
        )
    if not files and pattern and not _contains_any_dataset(corpus_dir, entries, dataset_info):
        raise UserError(
            f"dataset {name}: no file {search_path}, nor one of any other dataset in {dataset_info}.{skipped} Put files "
            f"there, or set {setting} to another directory. The hub is read if no directory is set, and for datasets that "
            "are missing beside others."
        )
    if skipped:
        print_once(f"dataset {name}: {search_path}:{skipped} Supported types: {SUPPORTED_FILES}.")
    if pattern and not files:
        print_once(f"dataset {name}: no file {search_path}; reading {entry['hf_hub_url']} from the hub")
    if "code_switch" in entry:
        entry["code_switch"] = _find_code_switch(entry["code_switch"], name, entries, dataset_info, corpus_dir)
    return DatasetAttr(name=name, files=files, search_path=search_path if pattern else "", **entry)


def _find_code_switch(
    given: dict[str, Any], name: str, entries: dict[str, Any], dataset_info: Path, corpus_dir: Path
) -> CodeSwitch:
    """Looks up the glossary that a valid `code_switch` of the dataset `name` refers to.

    Raises:
        UserError: as `get_dataset_attr`; if it is no dataset of translations, or lacks one of the two languages.
    """
    given, place = {**CODE_SWITCH_DEFAULTS, **given}, f"{dataset_info}: code_switch of {name!r}"
    entry = entries.get(given["glossary"])
    if not isinstance(entry, dict) or entry.get("formatting") not in TRANSLATIONS:
        which = " or ".join(TRANSLATIONS)
        raise UserError(f"{place}: glossary {given['glossary']!r} is no dataset there of the formatting {which}.")
    glossary = get_dataset_attr(given["glossary"], dataset_info, corpus_dir)
    languages = glossary.column_names["translations"]
    for key in ("from", "to"):
        if given[key] not in languages:
            raise UserError(
                f"{place}: {key} is {given[key]!r}; the languages of {glossary.name} are {', '.join(languages)}."
            )
    return CodeSwitch(glossary, given["from"], given["to"], given["ratio"], given["style"])


@cache
def print_once(message: str) -> None:
    """Prints a message about a dataset once, however often the dataset is looked up or read."""
    print0(message)


def _contains_any_dataset(corpus_dir: Path, entries: dict[str, Any], dataset_info: Path) -> bool:
    """False if a directory was set, other than that of `dataset_info`, and holds no file of any entry."""
    if not corpus_dir.is_dir() or corpus_dir.resolve() == dataset_info.parent.resolve():
        return True
    names = [entry.get("file_name") for entry in entries.values() if isinstance(entry, dict)]
    return any(_local_files(corpus_dir, name)[0] for name in names if isinstance(name, str))


def _read_dataset_info(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if str(path).startswith("REMOTE:"):
            raise UserError(
                f"dataset_dir {path.parent}: a dataset_info.json on the hub is not read. Download it and set dataset_dir "
                "to its directory, or set dataset to REMOTE:ORG/NAME for a single dataset of the hub."
            ) from error
        raise UserError(
            f"{path} does not exist. It describes the datasets; set dataset_dir to its directory."
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} is not a JSON object of the form {{NAME: {{KEY: VALUE}}}}.")
    return entries


def _validate_entry(entry: Any, place: str) -> dict[str, Any]:
    """A copy of an entry with current names, without empty and ignored keys.

    Raises:
        UserError: names the entry and the key that is not supported.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{place} is not a JSON object of the form {{KEY: VALUE}}.")
    entry = {key: value for key, value in entry.items() if value not in (None, False, "")}
    for old, new in DATASET_KEYS.items():
        if old in entry:
            print_once(f"{place}: the key {old!r} is now called {new!r}")
            entry.setdefault(new, entry.pop(old))
    has_location = "hf_hub_url" in entry or "file_name" in entry
    for key in IGNORED_KEYS if has_location else ():
        entry.pop(key, None)
    known = {"file_name", *DatasetAttr.__dataclass_fields__} - {"name", "files", "search_path"}
    groups = {"": known, "columns": {*KNOWN_COLUMNS}, "tags": {*DEFAULT_TAGS}, "code_switch": {*CODE_SWITCH_DEFAULTS}}
    for inside, keys in groups.items():
        given = entry.get(inside, {}) if inside else entry
        for key in given if isinstance(given, dict) else ():
            if key not in keys and given[key]:
                which = f"key {key!r}" + (f" under `{inside}`" if inside else "")
                raise UserError(f"{place} has the {which}, which is not supported. Known: {', '.join(sorted(keys))}.")
    if not has_location:
        raise UserError(f"{place} names neither file_name nor hf_hub_url: there is nothing to read.")
    for key, value in entry.items():
        objects = ("columns", "tags", "row_filter", "code_switch")
        expected: type = int if key == "num_samples" else dict if key in objects else str
        if type(value) is not expected or (isinstance(value, int) and value < 1):
            raise UserError(f"{place}: {key} is {value!r}; it must be {VALUE_TYPES[expected]}.")
    for key, known_values in (("formatting", FORMATTINGS), ("sample_by", tuple(SAMPLE_BY))):
        if entry.get(key, known_values[0]) not in known_values:
            raise UserError(f"{place}: {key} {entry[key]!r} is unknown; use {' or '.join(known_values)}.")
    _validate_bridges(entry, place)
    return entry


def _validate_bridges(entry: dict[str, Any], place: str) -> None:
    """Checks what an entry says about translations.

    Raises:
        UserError: names the entry and the key.
    """
    formatting, languages = entry.get("formatting"), entry.get("columns", {}).get("translations")
    if formatting in TRANSLATIONS:
        is_list = isinstance(languages, list) and all(isinstance(language, str) for language in languages)
        if not is_list or len({*languages}) < 2:
            raise UserError(
                f"{place}: formatting {formatting} needs the names of two columns or more, which are language codes: "
                '"columns": {"translations": ["ja", "en"]}.'
            )
    elif languages:
        raise UserError(f"{place}: `translations` under `columns` needs formatting {' or '.join(TRANSLATIONS)}.")
    if "code_switch" not in entry:
        return
    if formatting in TRANSLATIONS:
        raise UserError(f"{place}: code_switch does not go with the formatting {formatting}. Leave one out.")
    ratio, style = ({**CODE_SWITCH_DEFAULTS, **entry["code_switch"]}[key] for key in ("ratio", "style"))
    if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise UserError(f"{place}: ratio of code_switch is {ratio!r}; it must be a number above 0, at most 1.")
    if style not in CODE_SWITCH_STYLES:
        raise UserError(f"{place}: style of code_switch {style!r} is unknown; use {' or '.join(CODE_SWITCH_STYLES)}.")


def _local_files(corpus_dir: Path, file_name: str) -> tuple[tuple[str, ...], str]:
    """Files that a file name, directory or pattern matches, sorted by name; and a sentence on those of other types."""
    path = corpus_dir / file_name
    if path.is_dir():
        found = [str(file) for file in path.iterdir() if not file.name.startswith(".")]
    elif path.is_file():
        found = [str(path)]
    else:
        found = glob.glob(os.path.join(glob.escape(str(corpus_dir)), file_name), recursive=True)
    found.sort()
    files = tuple(file for file in found if file_type(file) in FILE_TYPES)
    others = [os.path.basename(file) for file in found if file_type(file) not in FILE_TYPES and os.path.isfile(file)]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5:,} more" if others[5:] else "")
    return files, f" Skipped, being of another type: {listed}." if others else ""


def file_type(path: str | Path) -> str:
    """The suffix of a file in lower case, without that of a compression: `.jsonl` for `A.JSONL.gz`."""
    name, last = os.path.splitext(str(path).lower())
    suffix = os.path.splitext(name)[1]
    return suffix if last in COMPRESSIONS and suffix != ".parquet" else last
