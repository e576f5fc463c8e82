"""What --help prints of a run's settings: read from the source of their dataclasses, so that nothing heavy is imported."""

import argparse
import ast
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUPS = {
    "model": ("llmtuner.hparams", "ModelArguments"),
    "data": ("llmtuner.hparams", "DataArguments"),
    "finetuning": ("llmtuner.hparams", "FinetuningArguments"),
    "training (the most used of transformers' TrainingArguments; all others are taken, too)": (
        "transformers.training_args",
        "TrainingArguments",
    ),
}
MOST_USED = (
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16", "fp16"),
    *("gradient_checkpointing", "do_eval", "eval_strategy", "eval_steps", "eval_on_start", "logging_steps"),
    *("report_to", "save_strategy", "save_steps", "save_total_limit", "seed", "deepspeed", "resume_from_checkpoint"),
)


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass as its source documents it."""

    name: str
    type: str
    default: str
    """As it is written in the source; empty if there is none."""
    help: str
    """The first sentence of its documentation."""


def read_settings(module: str, class_name: str) -> Iterator[Setting]:
    """Reads the fields of a dataclass, each with its docstring or `metadata["help"]`, from source without importing it."""
    directory = importlib.util.find_spec(module.partition(".")[0])
    if directory is None or directory.origin is None:
        return
    file = Path(directory.origin).parent / f"{module.partition('.')[2].replace('.', '/')}.py"
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == class_name)
    for node, behind in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        default, text = node.value, ""
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
            keywords = {one.arg: one.value for one in default.keywords}
            factory = keywords.get("default_factory")
            default = keywords.get("default", factory.body if isinstance(factory, ast.Lambda) else factory)
            for key, value in zip(*_items(keywords.get("metadata")), strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    text = _text(value)
        if isinstance(default, ast.Name):  # a name that the class gives a value: default_optim
            default = next((one.value for one in body if isinstance(one, ast.Assign) and _names(one, default)), default)
        if isinstance(behind, ast.Expr):
            text = _text(behind.value)
        sentence = re.split(r"(?<=[^.]\.)\s(?=[A-Z])", " ".join(text.split()))[0]
        written = (
            "" if default is None else {"list": "[]", "dict": "{}"}.get(unparsed := ast.unparse(default), unparsed)
        )
        yield Setting(node.target.id, ast.unparse(node.annotation), written, sentence)


def _names(assignment: ast.Assign, name: ast.Name) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name.id for one in assignment.targets)


def _items(node: ast.expr | None) -> tuple[list[Any], list[Any]]:
    return (node.keys, node.values) if isinstance(node, ast.Dict) else ([], [])


def _text(node: ast.expr) -> str:
    """A string, also one that is put together, in which only what is constant is shown."""
    return "".join(one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str))


def format_settings(given: Mapping[str, Any] | None = None) -> str:
    """All settings by group, with type, default and documentation.

    Args:
        given: the settings of a step, which take the place of the defaults.
    """
    given = given or {}
    lines = []
    for title, (module, class_name) in GROUPS.items():
        lines.append(f"\n{title}:")
        for setting in read_settings(module, class_name):
            if class_name == "TrainingArguments" and setting.name not in {*MOST_USED, *given}:
                continue
            value = repr(given[setting.name]) if setting.name in given else setting.default or "required"
            lines.append(f"  --{setting.name}  {setting.type} = {value}")
            lines += textwrap.wrap(setting.help, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def parse_step_args(
    doc: str, settings: Mapping[str, Any], flags: Mapping[str, str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line of a training step: its own flags, and arguments that are settings.

    --help prints the step's docstring, its flags and all settings, and ends the program.

    Args:
        settings: the step's own settings.
        flags: flag -> what it does.

    Returns:
        the flags, and the remaining arguments for `hparams.parse_overrides`.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags] [--SETTING VALUE ...]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        parser.epilog = f"settings and the values that they have in this step:\n{format_settings(settings)}"
    return parser.parse_known_args()
