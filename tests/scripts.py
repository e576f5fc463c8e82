"""Starts scripts of this project as a user does, each in a process of its own, and checks how they refuse."""

import atexit
import json
import os
import re
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from functools import cache

from tests.fork_server import ForkServer
from tests.helpers import ROOT

STEPS = {
    "step1": "step1_train_tokenizer.py",
    "step2": "step2_merge_tokenizer.py",
    "step3": "step3_resize_model.py",
    "step4": "step4_test_zero.py",
    "step5": "step5_train_pt_single_gpu.py",
    "step6": "step6_train_sft_single_gpu.py",
    "step7": "step7_eval_chat.py",
}
START = ROOT / "tests" / "start"  # for PYTHONPATH of new interpreters that import DeepSpeed
CHOICES = ("PROFILE", "WORK_DIR", "CORPUS_DIR", "BASE_MODEL_DIR", "OVERWRITE", "SKIP_COMPLETED")


@cache
def fork_server(*modules):
    server = ForkServer(*modules)
    atexit.register(server.close)
    return server


def environment_with(**variables):
    """The environment of a script: of the variables that choose something only the given ones."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | {
        name: str(value) for name, value in variables.items()
    }


def start(words, cwd=ROOT, python=None, **variables):
    """Runs a script to its end: in a fork that has torch already, or under a new interpreter, `python`."""
    environment = environment_with(**variables)
    if python:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        return subprocess.run([*python, *words], cwd=cwd, env=environment, **streams)
    forked = fork_server().start(words, cwd, environment)
    output, errors = forked.communicate()
    return subprocess.CompletedProcess(forked.args, forked.returncode, output, errors)


def start_step(step, cwd, *words, **variables):
    """Runs a step from a directory, whose `work` is its WORK_DIR."""
    return start([ROOT / STEPS[step], *words], cwd, **{"WORK_DIR": cwd / "work", **variables})


def keep_few(corpus):
    """Keeps every 16th held-out text and every fourth question of each group: each step reads all that there are."""
    import pyarrow.parquet

    for file in corpus.glob("*.test.parquet"):
        table = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(table.take(list(range(0, len(table), 16))), file)
    for file in corpus.glob("*.test.json"):
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8"))[::16]), encoding="utf-8")
    for name, every in (("questions.jsonl", 4), ("ladder.jsonl", 24)):
        by_group = {}
        for line in (corpus / name).read_text(encoding="utf-8").splitlines(keepends=True):
            by_group.setdefault(json.loads(line).get("group"), []).append(line)
        kept = "".join(line for lines in by_group.values() for line in lines[::every])
        (corpus / name).write_text(kept, encoding="utf-8")


def refused(result, *parts):
    """One message, exit code 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for part in parts:
        assert part in result.stderr


def refused_at_once(result, *parts):
    """Nothing but one line of message, below a step's header, and exit code 2."""
    refused(result, *parts)
    assert result.stderr.startswith("\nerror: ")
    assert result.stderr.count("\n") == 2
    assert re.sub(r"\n── Step \d: .*\n", "", result.stdout) == ""


def in_fork(function):
    """Calls a function in a fork of this process, which has imported everything already; returns its exit code."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def locked_by_another_process(lock):
    """Another process holds a lock until the block ends, and is then killed; yields its id."""
    code = "import sys; from pathlib import Path; from llmtuner.locks import acquire_lock; "
    code += "acquire_lock(Path(sys.argv[1]), 'it'); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, **pipes) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            yield holder.pid
        finally:
            holder.kill()
