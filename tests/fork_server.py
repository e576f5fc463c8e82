"""Runs scripts in processes that have torch and transformers from the start: forks of one that has imported them.

A new interpreter takes 5 to 8 s for these imports. Nothing of this project is imported before the fork, so a script reads
the environment variables, arguments and directory of its own call, as under a new interpreter, and ends by itself.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELOADED = (
    "torch.distributed",
    "transformers.models.glm.modeling_glm",
    "transformers.trainer",
    "transformers.generation",
    "peft",
    "accelerate",
    "datasets",
    "sentencepiece",
    "matplotlib.figure",
    "jinja2",
)


class ForkServer:
    """The process that is forked, seen from the tests.

    Args:
        modules: what it imports beside `PRELOADED`.
    """

    def __init__(self, *modules):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = str(Path(__file__).with_name("start"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-P", __file__, *modules], env=environment, **pipes)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def start(self, words, directory, environment):
        return Forked(self, [str(word) for word in words], directory, environment)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Forked:
    """A script that was started, like subprocess.Popen; both of its outputs go into files."""

    def __init__(self, server, words, directory, environment):
        self.server, self.args = server, words
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  # open until they are read
        self.returncode = None
        paths = [file.name for file in self.files]
        self.pid = server.ask(words=words, directory=str(directory), environment=dict(environment), files=paths)

    def poll(self):
        """The exit code, negative after a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout=300):
        """Waits for its end; what it wrote to standard output and standard error."""
        self.wait(timeout)
        outputs = [Path(file.name).read_text(encoding="utf-8") for file in self.files]
        for file in self.files:
            file.close()
        return outputs


def serve(requests, answers):
    """Forks for each request that is no question about a process; returns in the fork, with the request."""
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                return request
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def execute(words, directory, environment, files):
    """What `python WORDS` does, in this process."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    further = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-m":
        sys.argv, sys.path[:0] = words[1:], [directory, *further]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[:0] = ["-c", *words[2:]], ["", *further]
        exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(words[0])), *further]
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for name in (*PRELOADED, *sys.argv[1:]):
        importlib.import_module(name)
    gc.freeze()
    # Its own pipes leave the numbers 0 and 1 to the scripts; forks close them with what they execute.
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as answers:
        request = serve(requests, answers)
    if request:
        execute(**request)
