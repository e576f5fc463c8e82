"""What `pip install -e .` installs: the packages on disk with their data, requirements.txt, the console command."""

import importlib.metadata
import sys

import pytest
from packaging.requirements import Requirement

from llmtuner import console
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def distribution():
    """The distribution that setuptools reads from pyproject.toml."""
    from setuptools import Distribution
    from setuptools.config.pyprojecttoml import apply_configuration

    return apply_configuration(Distribution(), ROOT / "pyproject.toml")


def requirements(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return sorted(str(Requirement(text)) for line in lines if (text := line.partition("#")[0].strip()))


def test_every_package_and_data_file_is_installed(distribution):
    inside = [path for path in (ROOT / "llmtuner").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {path: ".".join(path.parent.relative_to(ROOT).parts) for path in inside}
    assert set(distribution.packages) == set(names.values())
    data = {path for path in inside if path.suffix != ".py"}
    patterns = distribution.package_data
    named = {path for path in data for pattern in patterns.get(names[path], ()) if path.match(pattern)}
    assert named == data


def test_requirements_stand_in_one_list(distribution):
    assert sorted(map(str, distribution.install_requires)) == requirements("requirements.txt")
    assert sorted(map(str, distribution.extras_require["optional"])) == requirements("requirements-optional.txt")


def test_console_command_is_that_of_the_module(distribution, monkeypatch, capsys):
    [command] = distribution.entry_points["console_scripts"]
    name, _, target = command.replace(" ", "").partition("=")
    program = importlib.metadata.EntryPoint(name, target, "console_scripts").load()
    monkeypatch.setattr(sys, "argv", [f"/opt/env/bin/{name}", "train", "--help"])
    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: llmtuner train [FILE.yaml]")


def test_hints_name_the_command_that_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", "/opt/env/bin/python")
    monkeypatch.setattr(console.shutil, "which", lambda name: "/usr/bin/python")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "llmtuner" / "__main__.py"), "train"])
    assert console.llmtuner_command() == "/opt/env/bin/python -m llmtuner"
    monkeypatch.setattr(sys, "argv", ["/opt/env/bin/llmtuner", "train"])
    assert console.llmtuner_command() == "/opt/env/bin/llmtuner"
    monkeypatch.setattr(console.shutil, "which", lambda name: f"/opt/env/bin/{name}")
    assert console.llmtuner_command() == "llmtuner"

    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as under the console command
    monkeypatch.setattr(console, "ROOT", tmp_path)
    assert console.missing_package("torch").endswith("Install it: python -m pip install torch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    hint = f"Type: PYTHONPATH={tmp_path} {console.display_path(tmp_path)}/.venv/bin/python -m llmtuner train"
    assert console.missing_package("torch").endswith(hint)
    monkeypatch.chdir(tmp_path)
    assert console.missing_package("torch").endswith("Type: .venv/bin/python -m llmtuner train")


def test_nothing_that_git_ignores_and_no_secret_gets_into_the_image():
    ignored, left_out = (
        {line.removeprefix("**/").rstrip("/") for line in (ROOT / name).read_text(encoding="utf-8").splitlines()}
        for name in (".gitignore", ".dockerignore")
    )
    assert ignored | {".git", ".env"} <= left_out
    instructions = [line.split() for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines() if line]
    users = [words[1] for words in instructions if words[0] == "USER"]
    assert users == ["$USER_ID"]  # not root; nor `$UID`, which is 0 in bash, whatever is given
