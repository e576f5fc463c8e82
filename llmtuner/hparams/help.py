"""What `--help` prints of a run's settings, and the command line of a training step; torch is not imported for them."""

import argparse
from collections.abc import Mapping
from typing import Any

from llmtuner.hparams.data_args import DataArguments
from llmtuner.hparams.finetuning_args import FinetuningArguments
from llmtuner.hparams.model_args import ModelArguments
from llmtuner.hparams.setting import default_of, describe, settings_of
from llmtuner.hparams.training_args import TrainerArguments

GROUPS = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "training (the most used of transformers' TrainingArguments; all others are accepted, too)": TrainerArguments,
}


def format_settings(given: Mapping[str, Any] | None = None) -> str:
    """All settings by group, with type, value, allowed values and documentation.

    Args:
        given: the settings of a step, which replace the defaults.
    """
    given, lines = given or {}, []
    for title, cls in GROUPS.items():
        lines.append(f"\n{title}:")
        for name, field in settings_of(cls).items():
            lines += [f"  {describe(field, given.get(name, default_of(field)))}", f"        {field.metadata['help']}"]
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
        the flags, and the remaining arguments for `parse_overrides`.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags] [--SETTING VALUE ...]",
        description=doc,
        epilog=f"settings and their values in this step:\n{format_settings(settings)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    return parser.parse_known_args()
