"""Names of earlier versions: settings, files and metrics that have them stay readable; no other module knows them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = {
    "max_rejected": "max_invalid_ratio",
    "interleave_by": "interleave_unit",
    "max_eval_sequences": "max_eval_samples",
    "embedding_rows": "train_new_tokens_only",
    "fused_layers": "fused_ops",
}
VALUES: dict[str, dict[Any, Any]] = {
    "flash_attn": {"documents": "varlen"},
    "embedding_rows": {"new": True, "all": False},
}
VARIABLES = {"SKIP_FINISHED": "SKIP_COMPLETED"}  # of the environment
DATASET_KEYS = {"keep_rows": "row_filter"}
TOKENS_FILE = "examples.arrow"  # of a tokenized dataset in the earlier format, which is recognized but not read
# Files of a run and of a checkpoint: current name -> earlier one.
FILES = {
    "trainer_log.jsonl": "log.jsonl",
    "training_args.json": "settings.json",
    "checksums.json": "whole.json",
    "throughput.json": "meter.json",
}
# Keys of metrics/step*.json and of the log.
METRIC_KEYS = {
    "padding_share": "padding_ratio",
    "trained_tokens_per_second": "target_tokens_per_second",
    "memory_gb": "peak_memory_gb",
    "seconds_left": "eta_seconds",
    "planned_share": "target_ratio",
    "share": "ratio",
    "trained_tokens": "sampled_tokens",
    "rejected": "invalid",
    "cut": "num_truncated",
    "dropped": "num_dropped",
    "dead_pieces": "unreachable_tokens",
    "asked": "total",
    "exact": "accuracy",
    "right": "accuracy",
    "repeated": "repeated_4gram_ratio",
    "ended": "finished_ratio",
    "cut_requests": "truncated_requests",
    "embeddings_alone": "embeddings_only",
}
# Keys of a checkpoint's throughput.json.
THROUGHPUT_KEYS = {
    "trained": "target_tokens",
    "all_tokens": "total_tokens",
    "all_padding": "total_padding",
    "all_seconds": "total_seconds",
}


def rename_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings under their current names and values, and one line about each that had another."""
    renamed: dict[str, Any] = {}
    notes = []
    for name, value in settings.items():
        new = SETTINGS.get(name, name)
        new_value = VALUES[name].get(value, value) if name in VALUES and isinstance(value, str) else value
        if new != name and new in settings:
            notes.append(f"{name} is ignored: it is an old name of {new}, which is given, too")
            continue
        if (new, new_value) != (name, value):
            old, now = (f"{key}: {str(content).lower()}" for key, content in ((name, value), (new, new_value)))
            notes.append(f"{old} is deprecated: write {now}")
        renamed[new] = new_value
    return renamed, notes


def rename_keys(content: Any, names: Mapping[str, str] = METRIC_KEYS) -> Any:
    """JSON content with its keys under their current names, at any depth."""
    if isinstance(content, dict):
        return {names.get(key, key): rename_keys(value, names) for key, value in content.items()}
    return [rename_keys(item, names) for item in content] if isinstance(content, list) else content


def locate(directory: Path, name: str) -> Path:
    """Where a file is: under its current name, or under the earlier one if only that exists."""
    path, old = directory / name, directory / FILES[name]
    return old if old.exists() and not path.exists() else path


def describe_old_names(directory: Path) -> str:
    """One line for the user if files of a directory have names of an earlier version; else empty."""
    old = [locate(directory, name).name for name in FILES if locate(directory, name).name != name]
    return f"{directory} was written by an earlier version: {', '.join(old)} read under deprecated names" if old else ""
