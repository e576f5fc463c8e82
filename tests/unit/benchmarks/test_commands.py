"""Every benchmark starts and lists its options; so do the parts of those that have several."""

import re
import subprocess
import sys

import pytest

from benchmarks import common

SCRIPTS = sorted(
    file.stem
    for file in (common.ROOT / "benchmarks").glob("*.py")
    if file.stem not in ("common", "trainer_job", "update_readme")
) + ["gpu"]
PARTS = {"training": 7, "tokenizer": 4}


@pytest.mark.parametrize("script", SCRIPTS)
def test_page_names_the_benchmark(script):
    page = (common.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"`{script}" in page


@pytest.mark.slow
@pytest.mark.parametrize("script", PARTS)
def test_page_names_every_part(script):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--help"]
    printed = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True).stdout
    parts = re.findall(r"(?m)^    (\w+)(?:  |$)", printed)
    assert len(parts) == PARTS[script]
    page = (common.ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [part for part in parts if f"`{script} {part} " not in page] == []
