"""Which files of this project one batch passes through, from the step script to `optimizer.step`, and how long they are.

    python -m benchmarks.batch_path --work-dir runs/mini

Runs steps 5 and 6 for one step on a copy of a finished run and records every function of this project that is called: those on
the stack when the first batch is fetched, and those from there until `optimizer.step`. Before that, other files turn rows
into token ids; they are listed apart.
"""

import ast
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.common import ROOT, make_parser
from llmtuner.console import format_table, run_cli

SCRIPTS = {"pt": "step5_train_pt_single_gpu", "sft": "step6_train_sft_single_gpu"}
PREPARATION = (
    "sources",
    "readers",
    "converter",
    "template",
    "tokenize",
    "token_store",
)  # llmtuner/data: from files to ids


def main() -> None:
    finished = make_parser(__doc__, "unused", work_dir=...).parse_args().work_dir.resolve()
    for stage, script in SCRIPTS.items():
        with tempfile.TemporaryDirectory() as work:
            shutil.copytree(finished, work, dirs_exist_ok=True)
            if (pid := os.fork()) == 0:  # constants are read once per process
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

    def record(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(ROOT)) and "site-packages" not in file:  # .venv lies in ROOT, too
            seen.add(Path(file))

    original = PackedDataset.__getitem__

    def first_fetch(self: PackedDataset, number: int) -> Any:
        seen.clear()
        frame: FrameType | None = sys._getframe(1)
        while frame:
            if frame.f_code.co_name == "evaluate_loss":  # an evaluation before training
                return original(self, number)
            record(frame, "call", None)
            frame = frame.f_back
        PackedDataset.__getitem__ = original  # type: ignore[method-assign]
        sys.setprofile(record)
        return self[number]

    def stop(*_: Any, **__: Any) -> None:
        sys.setprofile(None)
        raise Done

    PackedDataset.__getitem__ = first_fetch  # type: ignore[method-assign]
    torch.optim.AdamW.step = stop  # type: ignore[method-assign, assignment]
    arguments = ["--max_steps", "1", "--eval_on_start", "false", "--eval_strategy", "no", "--save_strategy", "no"]
    sys.argv = [script, *arguments]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(Done):
        module.main()
    return {file for file in seen if file.name != Path(__file__).name}


def report(stage: str, files: set[Path]) -> None:
    before = {ROOT / "llmtuner" / "data" / f"{name}.py" for name in PREPARATION} - files
    for title, group in ((f"{stage}: the path of a batch", files), ("before it, from files to ids", before)):
        sources = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in sorted(group)}
        counts = {name: (len(source.splitlines()), code_lines(source)) for name, source in sources.items()}
        counts[f"{len(counts)} files"] = tuple(map(sum, zip(*counts.values(), strict=True)))  # type: ignore[assignment]
        rows = [[name, *(f"{count:,}" for count in lines)] for name, lines in counts.items()]
        print(f"\n{title}\n" + format_table(["file", "lines", "of code"], rows), flush=True)


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
    run_cli(main)
