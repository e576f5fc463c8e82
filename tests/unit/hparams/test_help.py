"""`--help`: every setting with its type, value, allowed values and documentation; flags of the training steps."""

import sys

import pytest
from transformers import TrainingArguments

from llmtuner.hparams.help import GROUPS, format_settings, parse_step_args
from llmtuner.hparams.setting import default_of, settings_of, types_of
from llmtuner.hparams.training_args import TrainerArguments


@pytest.mark.parametrize("cls", GROUPS.values())
def test_every_setting_has_a_line_of_documentation(cls):
    text = format_settings()
    for name, field in settings_of(cls).items():
        documentation = field.metadata["help"]
        assert documentation.endswith((".", "..."))
        assert len(documentation) < 120
        assert f"  --{name}  " in text
        assert f"\n        {documentation}\n" in f"{text}\n"


def test_a_line_names_type_choices_default_and_limit():
    lines = format_settings({"lora_rank": 32}).splitlines()
    for line in (
        "  --lora_rank  int = 32, at least 1",
        "  --stage  pt | sft = 'pt'",
        "  --model_name_or_path  str = required",
        "  --lora_target  list[str] = ['all']",
        "  --early_stopping_steps  int = None, at least 1",
        "  --do_predict  bool = False, no other: a run trains, or measures the eval loss (do_eval)",
    ):
        assert line in lines


def test_settings_of_transformers_have_its_types_and_defaults():
    theirs = settings_of(TrainingArguments)
    own = settings_of(TrainerArguments)
    assert own.keys() - theirs.keys() == {"warmup_ratio"}  # of older versions
    for name in own.keys() & theirs.keys():
        assert default_of(own[name]) == default_of(theirs[name]), name
        enums = [
            kind
            for kind in types_of(theirs[name])
            if isinstance(kind, type) and issubclass(kind, str) and kind is not str
        ]
        assert {*types_of(own[name])} == {*types_of(theirs[name])} - {*enums}, name


def test_flags_of_training_steps_are_parsed(monkeypatch):
    """A flag's name as the value of a setting is not the flag."""
    monkeypatch.setattr(sys, "argv", ["step5", "--learning_rate", "1e-4", "--staged", "--bf16", "rank=3"])
    options, arguments = parse_step_args("", {}, {"--staged": ""})
    assert options.staged
    assert arguments == ["--learning_rate", "1e-4", "--bf16", "rank=3"]
    monkeypatch.setattr(sys, "argv", ["step5", "--run_name=--staged"])
    assert not parse_step_args("", {}, {"--staged": ""})[0].staged
