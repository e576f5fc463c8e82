"""Which files of this project one batch passes through, from the step script to `optimizer.step`, and how long they are.

    python -m benchmarks.batch_path --work-dir runs/mini

Starts steps 5 and 6 for one step on a copy of a finished run, and notes every function of this project that runs: those
that lead to the first batch being asked for (the call stack), and those that run from there until `optimizer.step`. Rows
become ids before that, in other files; they are listed apart.
"""

import argparse
import ast
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"pt": "step5_train_pt_single_gpu", "sft": "step6_train_sft_single_gpu"}
PREPARATION = ("sources", "converter", "template", "tokenize")  # llmtuner/data: from files to ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="of a finished `make demo`")
    finished = parser.parse_args().work_dir.resolve()
    sys.path.insert(0, str(ROOT))
    for stage, script in SCRIPTS.items():
        with tempfile.TemporaryDirectory() as work:
            shutil.copytree(finished, work, dirs_exist_ok=True)
            if (pid := os.fork()) == 0:  # constants are read once in a process
                os.environ |= {"WORK_DIR": work, "OVERWRITE": "1", "HF_HUB_OFFLINE": "1"}
                report(stage, files_of_first_step(script))
                os._exit(0)
            os.waitpid(pid, 0)


def files_of_first_step(script: str) -> set[Path]:
    """Runs a step script until its first optimizer step; returns the files that the batch passed through."""
    import importlib

    import torch

    module = importlib.import_module(script)
    from llmtuner.data.packing import PackedDataset

    seen: set[Path] = set()

    class Done(Exception):
        pass

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            seen.add(Path(frame.f_code.co_filename))

    original = PackedDataset.__getitem__

    def first_fetch(self: PackedDataset, number: int) -> Any:
        seen.clear()
        frame: FrameType | None = sys._getframe(1)
        while frame:
            if frame.f_code.co_name == "evaluate_loss":  # an evaluation before training
                return original(self, number)
            note(frame, "call", None)
            frame = frame.f_back
        PackedDataset.__getitem__ = original  # type: ignore[method-assign]
        sys.setprofile(note)
        return self[number]

    def stop(*_: Any, **__: Any) -> None:
        sys.setprofile(None)
        raise Done

    PackedDataset.__getitem__ = first_fetch  # type: ignore[method-assign]
    torch.optim.AdamW.step = stop  # type: ignore[method-assign, assignment]
    words = ["--max_steps", "1", "--eval_on_start", "false", "--eval_strategy", "no", "--save_strategy", "no"]
    sys.argv = [script, *words]
    silence()
    with contextlib.suppress(Done):
        module.main()
    return {file for file in seen if file.name != Path(__file__).name}


def silence() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)


def report(stage: str, files: set[Path]) -> None:
    def row(file: Path) -> list[str]:
        source = file.read_text(encoding="utf-8")
        return [str(file.relative_to(ROOT)), f"{len(source.splitlines()):,}", f"{code_lines(source):,}"]

    from llmtuner.console import format_table

    on_the_way = [row(file) for file in sorted(files)]
    before = [row(ROOT / "llmtuner" / "data" / f"{name}.py") for name in PREPARATION]
    before = [one for one in before if one not in on_the_way]

    def total(rows: list[list[str]]) -> list[str]:
        return [f"{len(rows)} files", *(f"{sum(int(one[i].replace(',', '')) for one in rows):,}" for i in (1, 2))]

    print(
        f"\n{stage}: the way of a batch\n"
        + format_table(["file", "lines", "of code"], [*on_the_way, total(on_the_way)])
    )
    print(
        "\nbefore it, from files to ids\n" + format_table(["file", "lines", "of code"], [*before, total(before)]),
        flush=True,
    )


def code_lines(source: str) -> int:
    """Lines that are neither empty, nor a comment, nor part of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in enumerate(source.splitlines(), start=1)
    )


if __name__ == "__main__":
    main()
