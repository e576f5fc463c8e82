"""Makefile and shell scripts, in a directory whose name has spaces and without GNU's tools, as macOS has them."""

import os
import shutil
import subprocess

import pytest

from tests.helpers import ROOT

STUB = '#!/bin/sh\nprintf "%s\\n" "WORK_DIR=$WORK_DIR OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"\n'


@pytest.fixture
def clone(tmp_path):
    """A clone of what make and the wrappers read, with a Python that prints what it is given."""
    clone = tmp_path / "my models" / "a clone"
    for name in ("Makefile", "requirements.txt", "llmtuner/train/launch.sh", "step5_train_pt_multi_gpu.sh"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    (clone / ".venv" / "installed").touch()
    return clone


def run(command, cwd, **variables):
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    environment = {**kept, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_make_demo_in_a_directory_with_spaces(clone):
    ended = run(["make", "demo"], clone)
    assert (ended.returncode, ended.stderr) == (0, "")
    words = [line for line in ended.stdout.splitlines() if line.startswith(("WORK_DIR", "step"))]
    assert words[0] == f"WORK_DIR={clone}/runs/mini OMP_NUM_THREADS="
    assert [word for word in words if word.startswith("step")] == sorted(path.name for path in ROOT.glob("step*.py"))


def test_multi_gpu_wrapper_in_a_directory_with_spaces_and_without_nproc(clone, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "getconf"):
        (tools / name).symlink_to(shutil.which(name))
    command = [tools / "bash", clone / "step5_train_pt_multi_gpu.sh", "--output_dir", "a b"]
    ended = run(command, tmp_path, PATH=str(tools), NPROC_PER_NODE="1")
    assert (ended.returncode, ended.stderr) == (0, "")
    first, *words = ended.stdout.splitlines()
    assert first == f"WORK_DIR= OMP_NUM_THREADS={os.sysconf('SC_NPROCESSORS_ONLN')}"
    assert words[:2] == ["-P", f"{clone}/llmtuner/train/launch.py"]
    script, config = f"{clone}/step5_train_pt_single_gpu.py", f"{clone}/ds_config_zero2.json"
    assert words[-5:] == [script, "--deepspeed", config, "--output_dir", "a b"]
