"""`--help`: every setting with its type, default and documentation, read without importing torch."""

import ast
import sys


def test_help_agrees_with_the_dataclasses():
    from dataclasses import MISSING, fields

    from llmtuner import hparams
    from llmtuner.settings_help import GROUPS, MOST_USED, read_settings

    for module, class_name in GROUPS.values():
        read = {setting.name: setting for setting in read_settings(module, class_name)}
        own = {field.name: field for field in fields(getattr(hparams, class_name))}
        assert own.keys() <= read.keys()
        shown = MOST_USED if class_name == "TrainingArguments" else own
        for name in shown:
            assert read[name].help, name
            default = own[name].default if own[name].default is not MISSING else own[name].default_factory
            if default is MISSING:
                assert read[name].default == ""
            elif not callable(default) and name != "optim":
                assert ast.literal_eval(read[name].default) == default


def test_flags_of_training_steps_are_parsed(monkeypatch):
    """A flag's name as the value of a setting is not the flag."""
    from llmtuner.settings_help import parse_step_args

    monkeypatch.setattr(sys, "argv", ["step5", "--learning_rate", "1e-4", "--staged", "--bf16", "rank=3"])
    options, arguments = parse_step_args("", {}, {"--staged": ""})
    assert options.staged
    assert arguments == ["--learning_rate", "1e-4", "--bf16", "rank=3"]
    monkeypatch.setattr(sys, "argv", ["step5", "--run_name=--staged"])
    assert not parse_step_args("", {}, {"--staged": ""})[0].staged
