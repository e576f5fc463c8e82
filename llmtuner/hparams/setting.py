"""A setting is a dataclass field that carries its type, default, allowed values, limit and documentation."""

import dataclasses
import math
from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

REQUIRED = dataclasses.MISSING
Limit = tuple[Callable[[Any], bool], str]  # whether a value is accepted, and what completes "it must be ..."
AT_LEAST_1: Limit = (lambda value: value >= 1, "at least 1")
AT_LEAST_8: Limit = (lambda value: value >= 8, "at least 8 tokens")
ABOVE_0: Limit = (lambda value: 0 < value < math.inf, "greater than 0")
NOT_NEGATIVE: Limit = (lambda value: 0 <= value < math.inf, "a number from 0 up")
BELOW_1: Limit = (lambda value: 0 <= value < 1, "from 0 to below 1")
RATIO: Limit = (lambda value: 0 <= value <= 1, "a ratio, from 0 to 1")
RATIO_OR_ROWS: Limit = (
    lambda value: _is_ratio_or_count(value),
    "a ratio, from 0 to below 1, or a whole number of rows",
)
RATIO_OR_STEPS: Limit = (lambda value: _is_ratio_or_count(value), "a whole number of steps, from 0 up")
UINT32: Limit = (lambda value: 0 <= value < 2**32, "a whole number from 0 to below 2^32")
TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "names with commas, or a list of them",
    list[float]: "numbers with commas, or a list of them",
    dict[str, str]: "lines of the form `name: text`",
    dict[str, float]: "lines of the form `name: number`",
    dict[str, list[str]]: "lines of the form `name: [names]`",
    dict[str, Any]: "lines of the form `name: value`",
}


def _is_ratio_or_count(value: float) -> bool:
    return 0 <= value < 1 or (value >= 1 and float(value).is_integer())


def setting(
    default: Any, help: str, limit: Limit | None = None, unsupported: str = "", resume_safe: bool = False
) -> Any:
    """A dataclass field with everything that there is to know of a setting; its annotation is its type.

    Args:
        default: `REQUIRED` for none.
        help: what `--help` prints.
        limit: which values of its type are accepted.
        unsupported: why no other value than the default is.
        resume_safe: whether a run may be resumed with another value, because it does not change what is learned.
    """
    metadata = {"help": help, "limit": limit, "unsupported": unsupported, "resume_safe": resume_safe}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type) -> dict[str, dataclasses.Field]:
    """The settings of a dataclass by name, in its order."""
    return {field.name: field for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a setting; `REQUIRED` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def types_of(field: dataclasses.Field) -> tuple[Any, ...]:
    """The types that a setting may have, `str` for a `Literal`; with `NoneType` it may be null."""
    return tuple(str if get_origin(kind) is Literal else kind for kind in _alternatives(field))


def choices_of(field: dataclasses.Field) -> tuple[str, ...]:
    """The allowed values of a setting that is a `Literal`."""
    return tuple(value for kind in _alternatives(field) if get_origin(kind) is Literal for value in get_args(kind))


def _alternatives(field: dataclasses.Field) -> tuple[Any, ...]:
    return get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,)


def find_problem(field: dataclasses.Field, value: Any) -> str:
    """What is wrong with a value; empty if it is accepted. Types that `TYPE_NAMES` lacks are left to transformers."""
    if value is None and type(None) in types_of(field):
        return ""
    name, types, choices = field.name, [kind for kind in types_of(field) if kind is not type(None)], choices_of(field)
    limit, unsupported = field.metadata.get("limit"), field.metadata.get("unsupported")
    if all(kind in TYPE_NAMES for kind in types) and not any(matches_type(value, kind) for kind in types):
        return f"{name} is {value!r}; it must be {' or '.join(TYPE_NAMES[kind] for kind in types)}"
    if choices and value not in choices:
        return f"{name} is {value!r}; it can be {' or '.join(choices)}"
    if unsupported and value != field.default:
        return f"{name}: {str(value).lower()} is not supported: {unsupported}"
    return f"{name} is {value}; it must be {limit[1]}" if limit and not limit[0](value) else ""


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a value has a type, where true is no number, but a whole number is one."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(matches_type(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            matches_type(name, str) and matches_type(item, get_args(kind)[1]) for name, item in value.items()
        )
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and not math.isnan(value)
    return isinstance(value, kind)


def describe(field: dataclasses.Field, value: Any) -> str:
    """Name, type or allowed values, value and limit on one line: `--lora_rank  int = 8, at least 1`."""
    names = [
        kind.__name__ if isinstance(kind, type) else str(kind) for kind in types_of(field) if kind is not type(None)
    ]
    limit, unsupported = field.metadata["limit"], field.metadata["unsupported"]
    rest = f", no other: {unsupported}" if unsupported else f", {limit[1]}" if limit else ""
    shown = "required" if value is REQUIRED else repr(value)
    return f"--{field.name}  {' | '.join(choices_of(field) or names)} = {shown}{rest}"
