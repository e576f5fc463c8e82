"""Messages: errors of users and of the system are one line, mistakes of ours a traceback."""

import ast
import sys

import pytest

from tests.helpers import ROOT
from tests.scripts import refused_at_once, start


def test_command_for_a_python_without_the_packages(monkeypatch, tmp_path):
    from llmtuner import console

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").touch()
    monkeypatch.setattr(sys, "argv", ["step7_eval_chat.py", "--suite", "ja", "--tasks", "a b"])
    monkeypatch.setattr(console, "_script", lambda: sys.argv[:1])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.12")
    assert "/usr/bin/python3.12 -m pip install -r requirements.txt" in console.missing_package("torch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    assert "Type: .venv/bin/python step7_eval_chat.py --suite ja --tasks 'a b'" in console.missing_package("torch")


def test_commands_name_the_interpreter_that_runs(monkeypatch):
    from llmtuner import console

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv" / "bin" / "python"))
    monkeypatch.setattr(console.shutil, "which", lambda name: "/usr/bin/python")
    assert console.command("step4_test_zero.py") == ".venv/bin/python step4_test_zero.py"
    monkeypatch.setattr(console.shutil, "which", lambda name: sys.executable)  # .venv is activated
    assert console.command("step4_test_zero.py") == "python step4_test_zero.py"
    monkeypatch.chdir(ROOT / "tests")
    assert console.command("step4_test_zero.py") == "python ../step4_test_zero.py"


def test_scripts_tell_commands_through_that_function_only():
    """A literal `python step...` in a message names the wrong Python outside an activated environment."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("llmtuner/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
                assert "python step" not in node.value, f"{path}:{node.lineno}"


# ---------------------------------------------------------------------------------- errors of the system and the user
def explained(error):
    code = f"from llmtuner.console import run_cli\ndef main(): {error}\nrun_cli(main)"
    return start(["-c", code])


@pytest.mark.slow
def test_error_of_the_system_is_a_message(tmp_path):
    refused_at_once(
        explained("import os; raise PermissionError(13, os.strerror(13), '/a/b')"), "/a/b: Permission denied"
    )
    refused_at_once(explained("open('/tmp/' + 300 * 'x')"), "File name too long")
    refused_at_once(explained("import os; raise OSError(28, os.strerror(28))"), "No space left on device")
    refused_at_once(
        explained("import torch; raise torch.OutOfMemoryError('want 2 GB\\nmore')"), "out of memory: want 2 GB. "
    )


def test_mistake_of_our_own_is_a_traceback():
    for error in ("open('/nowhere/x')", "raise ValueError('x')"):
        result = explained(error)
        assert result.returncode == 1
        assert "Traceback" in result.stderr
