"""Environment variables: switches and misspelled names."""

import os

import pytest


@pytest.mark.parametrize("value", ["1", "true", "Yes", "on"])
def test_switch_that_is_on(value, monkeypatch):
    from llmtuner.env import env_flag

    monkeypatch.setenv("OVERWRITE", value)
    assert env_flag("OVERWRITE")


@pytest.mark.parametrize("value", ["", "0", "false", "No", "off"])
def test_switch_that_is_off(value, monkeypatch):
    from llmtuner.env import env_flag

    monkeypatch.setenv("OVERWRITE", value)
    assert not env_flag("OVERWRITE")


def test_misspelled_variables(monkeypatch):
    from llmtuner.env import misspelled_variables

    names = ("PROFILE", "WORK_DIR", "CORPUS_DIR", "BASE_MODEL_DIR", "OVERWRITE", "SKIP_COMPLETED")
    wrong = {
        "CORPUSDIR": "CORPUS_DIR",
        "WORKDIR": "WORK_DIR",
        "WORK-DIR": "WORK_DIR",
        "work_dir": "WORK_DIR",
        "BASE_MODEL": "BASE_MODEL_DIR",
        "OVERWRTE": "OVERWRITE",
        "SKIP_COMPLETE": "SKIP_COMPLETED",
        "PROFIL": "PROFILE",
    }
    others = ("AWS_PROFILE", "WORKSPACE", "WORK", "HOME", "MODEL", "CORPUS_NAME", "DIR", "GIT_WORK_TREE", "WORKERS")
    monkeypatch.setattr(os, "environ", {**dict.fromkeys(wrong, "x"), **dict.fromkeys(others, "x")})
    assert dict(misspelled_variables(names)) == wrong
    monkeypatch.setattr(os, "environ", {"CORPUSDIR": "x", "CORPUS_DIR": "y"})
    assert misspelled_variables(names) == []


def test_variable_of_an_earlier_name_is_read(monkeypatch):
    from llmtuner.env import deprecated_variables, env_flag

    monkeypatch.setattr(os, "environ", {"SKIP_FINISHED": "1"})
    assert env_flag("SKIP_COMPLETED")
    assert deprecated_variables() == [("SKIP_FINISHED", "SKIP_COMPLETED")]
    monkeypatch.setattr(os, "environ", {"SKIP_FINISHED": "1", "SKIP_COMPLETED": "0"})  # the present name decides
    assert not env_flag("SKIP_COMPLETED")
    assert deprecated_variables() == []
