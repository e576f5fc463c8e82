"""What results depend on besides settings: package versions, the machine, the commit of this code."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, dict[str, str]]:
    """Versions of Python and required packages, the machine, and the commit of this code."""
    requirements = ROOT / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    packages = [name[0] for line in lines if (name := re.match(r"[\w.-]+", line))]
    installed = {"Python": platform.python_version(), **versions(packages)}
    commit = _commit()
    return {"versions": installed, "machine": _machine(), **({"code": {"commit": commit}} if commit else {})}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the installed ones among `packages`, without importing them."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _machine() -> dict[str, str]:
    machine = {"platform": platform.platform(), "cores": str(os.cpu_count())}
    if hasattr(os, "sysconf"):  # not on Windows
        machine["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    torch = sys.modules.get("torch")  # not imported for a step that does not need it
    if torch and torch.cuda.is_available():
        machine["GPU"] = torch.cuda.get_device_name()
    return machine


def device_name() -> str:
    """Name of the GPU that this process computes on, or of the processor."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if names:
            return f"{names[0]} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def _commit() -> str | None:
    """The commit of this repository; None without git or a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None  # an export inside another repository
        return git("rev-parse", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
