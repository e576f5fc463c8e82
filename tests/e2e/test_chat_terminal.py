"""The chat in a real terminal: line editing, pasting and interrupts."""

import os
import re
import select
import signal
import sys
import time
import unicodedata
from contextlib import suppress

import pytest

from tests.helpers import ROOT


def cells(char):
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


class Screen:
    """As much of a terminal as readline needs: a grid of cells, a wide character in two of them, and a cursor."""

    def __init__(self):
        self.lines, self.column = [[]], 0

    def feed(self, text):
        for code, char in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z])|(\x1b[=>]|.)", text, re.DOTALL):
            if code:
                self._obey(code[-1], int(re.sub(r"\D", "", code) or 1))
            elif char == "\r":
                self.column = 0
            elif char == "\n":
                self.lines.append([])
            elif char == "\b":
                self.column -= 1
            elif char >= " ":
                for cell in [char, ""][: cells(char)]:
                    self._put(cell)

    def _obey(self, command, number):
        line = self.lines[-1]
        if command == "K":
            del line[self.column :]
        elif command == "P":
            del line[self.column : self.column + number]
        elif command == "@":
            line[self.column : self.column] = [" "] * number
        elif command in "CD":
            self.column += number if command == "C" else -number

    def _put(self, cell):
        line = self.lines[-1]
        line += [" "] * (self.column + 1 - len(line))
        if cell and cell != line[self.column] and line[self.column] == "" and self.column:
            line[self.column - 1] = "▒"  # half of a wide character is left
        line[self.column] = cell
        self.column += 1

    @property
    def last(self):
        return "".join(self.lines[-1]).rstrip()


class Pty:
    """A program in a pseudo-terminal of its own, which it is typed to and seen in."""

    def __init__(self, words, environment):
        import fcntl
        import pty
        import struct
        import termios

        self.output, self.screen = "", Screen()
        self.process, self.file = pty.fork()
        if not self.process:
            os.execve(words[0], words, environment)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.bytes = b""

    def type(self, text):
        os.write(self.file, text.encode())

    def interrupt(self, seen):
        """Presses Ctrl-C until `seen()` is true: one that comes between Python's look at signals and its wait for a key is lost."""
        for _ in range(3):
            self.type(CTRL_C)
            with suppress(AssertionError):
                return self.wait(seen, seconds=15)
        raise AssertionError(f"Ctrl-C has no effect; the output is {self.output!r}")

    def wait(self, seen, seconds=120):
        """Reads until `seen()` is true."""
        until = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < until, f"not seen in {seconds} s; the output is {self.output!r}"
            if not select.select([self.file], [], [], 0.05)[0]:
                continue
            try:
                self.bytes += os.read(self.file, 4096)
            except OSError:  # the program has ended
                self.bytes += b"\n[end]"
            text = self.bytes.decode(errors="ignore") if self.bytes.endswith(b"[end]") else self._whole()
            self.output += text
            self.screen.feed(text)

    def _whole(self):
        """What has been read as far as it is whole characters."""
        for missing in range(4):
            end = len(self.bytes) - missing
            try:
                text = self.bytes[:end].decode()
            except UnicodeDecodeError:
                continue
            self.bytes = self.bytes[end:]
            return text
        return ""

    def line(self, text):
        self.wait(lambda: self.screen.last == text)


@pytest.fixture
def start(tiny_model_dir, tmp_path):
    """Starts a dialogue with a slow model in a pseudo-terminal, with only the given variables about languages set."""
    pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    readline = pytest.importorskip("readline", reason="this Python has no readline: the system edits lines")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("readline is libedit here; the screen of this test knows what GNU readline writes")
    (tmp_path / "driver.py").write_text(
        f"""
import signal, sys, time
from contextlib import suppress
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from llmtuner.chat import cli
load = cli.load_for_evaluation
def slow(directory):
    model, tokenizer = load(directory)
    model.register_forward_hook(lambda *_: time.sleep(0.03))
    return model, tokenizer
cli.load_for_evaluation = slow
signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt after the end is not this test's business
cli.run_chat(Path({str(tiny_model_dir)!r}), 150)
print("over")
""",
        encoding="utf-8",
    )
    started = []

    def run(**languages):
        environment = {name: value for name, value in os.environ.items() if not re.match("LC_|LANG|PYTHON", name)}
        program = Pty(
            [sys.executable, str(tmp_path / "driver.py")], {**environment, **languages, "TERM": "xterm", "INPUTRC": "/"}
        )
        started.append(program)
        program.line("you>")
        return program

    yield run
    for program in started:
        try:
            os.kill(program.process, signal.SIGKILL)
            os.waitpid(program.process, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(program.file)


BACKSPACE, LEFT, UP, CTRL_C = "\x7f", "\x1b[D", "\x1b[A", "\x03"


def test_keys(start):
    """All of it in one program, for its start takes seconds; in the locale that knows no wide characters."""
    program = start(LC_ALL="C")
    program.type("/system 日本x")
    program.line("you> /system 日本x")
    program.type(BACKSPACE + "語")
    program.line("you> /system 日本語")
    program.type(LEFT + BACKSPACE)
    program.line("you> /system 日語")
    assert program.screen.column == len("you> /system ") + 2
    program.type("\r")
    program.line("you>")
    assert "System message from the next question on: 日語\r\n" in program.output

    program.type(UP)
    program.line("you> /system 日語")
    program.interrupt(lambda: program.output.count("Ctrl-C again quits") == 1 and program.screen.last == "you>")
    program.type("山")
    program.line("you> 山")
    # Clears a line again, so it does not end.
    program.interrupt(lambda: program.output.count("Ctrl-C again quits") == 2 and program.screen.last == "you>")

    assert "\x1b[?2004h" in program.output  # asks the terminal to mark what is pasted
    program.type("\x1b[200~一座山？\r/clear\x1b[201~")  # two lines pasted
    program.type("\r")
    program.wait(lambda: re.search(r"model> .{5}", program.output))
    program.type(CTRL_C)
    program.wait(lambda: "(stopped)" in program.output and program.screen.last == "you>")
    program.type("/tokens\r")
    program.wait(lambda: re.search(r"(\d+) tokens, \d+ characters", program.output) and program.screen.last == "you>")
    assert 0 < int(re.search(r"(\d+) tokens, ", program.output)[1]) < 120
    assert "cleared" not in program.output
    program.type("/undo\r")
    program.wait(lambda: "The dialogue is empty now." in program.output and program.screen.last == "you>")

    program.type("一座山？\r")  # interrupts that fall anywhere: before, in and after an answer
    for _ in range(40):
        os.kill(program.process, signal.SIGINT)
        time.sleep(0.002)
    program.wait(lambda: program.screen.last in ("you>", "[end]"))
    if program.screen.last == "you>":
        program.type(CTRL_C)
        program.interrupt(lambda: "[end]" in program.output)
    assert os.waitstatus_to_exitcode(os.waitpid(program.process, 0)[1]) == 0
    assert "over" in program.output
    assert "Traceback" not in program.output
