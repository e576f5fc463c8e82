"""How scripts start: an old Python, a Python without the packages, misspelled variables, --help."""

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.scripts import refused_at_once, start

SCRIPTS = sorted(path.name for path in ROOT.glob("step*.py"))
STARTED_BY_OLD_PYTHON = ["llmtuner/__init__.py", "constants.py", *SCRIPTS]
NEW = [sys.executable]  # a new interpreter, where what it imports and in which order is the matter
COMMANDS = [*([name] for name in SCRIPTS), ["-m", "llmtuner", "train"]]


# ------------------------------------------------------------------------------------------------------- the interpreter
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_old_python_is_named_before_anything_else(words, tmp_path):
    """As Python 3.10: sys.version_info says so from the first moment on."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.version_info = (3, 10, 9, 'final', 0)\n")
    refused_at_once(start(words, python=NEW, PYTHONPATH=tmp_path), "Python 3.10", "too old", "3.11 or newer")


@pytest.mark.parametrize("name", STARTED_BY_OLD_PYTHON)
def test_old_python_can_parse_what_it_reads_before_the_message(name):
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.parametrize("python", sorted(Path.home().glob(".pyenv/versions/3.[6789].*/bin/python")), ids=str)
def test_old_pythons_of_this_machine(python):
    for words in COMMANDS:
        refused_at_once(start(words, python=[str(python)]), "too old")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_python_without_the_packages_names_the_one_that_has_them(words):
    """-S leaves out site-packages, as an interpreter beside .venv does."""
    result = start(words, python=[*NEW, "-S"])
    refused_at_once(result, "sentencepiece is not installed for this Python", sys.executable)
    there = (ROOT / ".venv" / "bin" / "python").exists()  # with -S it does not count as the one that runs
    assert (
        f"Type: .venv/bin/python {' '.join(words)}" if there else "pip install -r requirements.txt"
    ) in result.stderr


def test_a_missing_package_is_a_message_and_a_missing_module_of_ours_a_traceback():
    def run(module):
        return start(["-c", f"from llmtuner.console import run_cli\nrun_cli(lambda: __import__('{module}'))"])

    refused_at_once(run("absent_package.part"), "absent_package")
    assert "Traceback" in run("llmtuner.absent").stderr


@pytest.mark.parametrize("name", ["OVERWRITE", "SKIP_COMPLETED"])
def test_switch_that_is_neither(name):
    refused_at_once(start(["step1_train_tokenizer.py"], **{name: "ture"}), f"{name}=ture", f"{name}=1")


def test_overwrite_true_is_not_ignored(tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "step1.json").write_text("{}")
    (tmp_path / "step1_ja_tokenizer").mkdir()
    (tmp_path / "step1_ja_tokenizer" / "ja_bpe.model").write_bytes(b"")
    further = dict(WORK_DIR=tmp_path, BASE_MODEL_DIR=tmp_path / "nowhere")
    refused_at_once(start(["step1_train_tokenizer.py"], **further), "finished already")
    assert "finished already" not in start(["step1_train_tokenizer.py"], **further, OVERWRITE="true").stderr


def test_misspelled_variable_is_reported_by_a_step(tmp_path):
    result = start(["step4_test_zero.py"], WORK_DIR=tmp_path, CORPUSDIR="texts")
    assert "CORPUSDIR" in result.stdout
    assert "did you mean CORPUS_DIR" in result.stdout
    assert start(["step4_test_zero.py"], WORK_DIR=tmp_path).stdout.startswith("\n── Step 4: ")


def test_directory_of_nobody():
    refused_at_once(start(["step1_train_tokenizer.py"], WORK_DIR="~nobody-of-that-name/x"), "WORK_DIR=~nobody")


# ------------------------------------------------------------------------------------------------------------- --help
@pytest.mark.parametrize(
    "words",
    [["step5_train_pt_single_gpu.py"], ["step6_train_sft_single_gpu.py"], ["-m", "llmtuner", "train"]],
    ids=" ".join,
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_all_settings_and_loads_nothing(words, flag, tmp_path):
    """torch and transformers are not imported; and nothing has been made that a step needs."""
    for package in ("torch", "transformers"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('imported')")
    result = start([*words, flag], python=NEW, WORK_DIR=tmp_path / "work", PYTHONPATH=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for group in ("model", "data", "finetuning", "training"):
        assert f"\n{group}" in result.stdout
    rank = "8" if "-m" in words else "32"  # a step shows its own value
    assert f"  --lora_rank  int = {rank}, at least 1\n        Rank of the adapters' matrices.\n" in result.stdout
    assert "  --learning_rate  float = " in result.stdout
    assert "        The peak learning rate." in result.stdout
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name.endswith(".py")])
def test_every_step_has_help_and_refuses_what_it_does_not_know(script, tmp_path):
    assert start([script, "--help"]).returncode == 0
    result = start([script, "--nonsens", "1"], WORK_DIR=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    if script[4] in "12347":  # steps 5 and 6 take settings, and need step 3 before they read them
        assert "unrecognized arguments: --nonsens" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "5"], "--limit requires --suite"),
        (["--chat", "--tasks", "x"], "--tasks requires --suite"),
        (["--model", "base"], "--model requires --suite"),
        (["--web", "--batch_size", "16"], "--batch_size requires --suite"),
        (["--num_fewshot", "0"], "--num_fewshot requires --suite"),
        (["--task_dir", "."], "--task_dir requires --suite"),
        (["--data_dir", "."], "--data_dir requires --suite"),
        (["--port", "7860"], "--port requires --web"),
        (["--suite", "ja", "--host", "0.0.0.0"], "--host requires --web"),
        (["--suite", "ja", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--suite", "ja", "--batch_size", "-1"], "--batch_size is -1; it must be at least 1"),
        (["--web", "--port", "x"], "--port: invalid int value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_of_step_7_that_do_not_go_together(words, message, tmp_path):
    result = start(["step7_eval_chat.py", *words], WORK_DIR=tmp_path / "work")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "work").exists()


# --------------------------------------------------------------------------------------- what nobody can act on
def test_bitsandbytes_warns_of_everything_but_its_4_bit_kernel():
    code = """
import logging
from llmtuner.console import run_cli
def main():
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "no kernels")
    logger.warning("another warning")
run_cli(main)
"""
    assert start(["-c", code], python=NEW).stderr == "another warning\n"


def test_start_with_bitsandbytes_is_silent():
    pytest.importorskip("bitsandbytes", reason="pip install -r requirements-optional.txt")
    assert (
        "gemm_4bit_forward"
        not in start(
            ["-c", "from llmtuner.console import run_cli; run_cli(lambda: __import__('bitsandbytes'))"], python=NEW
        ).stderr
    )


@pytest.mark.parametrize(
    "words",
    [
        ["step1_train_tokenizer.py"],
        ["step7_eval_chat.py"],
        ["step7_eval_chat.py", "--report"],
        ["step7_eval_chat.py", "--chat"],
    ],
    ids=" ".join,
)
def test_directory_without_permission_is_a_message(words, tmp_path):
    """Also as root, which may go everywhere, if util-linux can take that away."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    setpriv = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if setpriv and not shutil.which("setpriv"):
        pytest.skip("running as root, and setpriv is not installed")
    refused_at_once(start(words, python=[*setpriv, *NEW], WORK_DIR=closed / "work"), str(closed), "Permission denied")


@pytest.mark.parametrize("value", ["nan", "0", "-1", "inf"])
def test_sample_of_step_1_is_a_size(value):
    result = start(["step1_train_tokenizer.py", "--sample-mb", value])
    assert result.returncode == 2
    assert "greater than 0" in result.stderr
