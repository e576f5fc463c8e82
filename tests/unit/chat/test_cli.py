"""The chat in a terminal: commands, pipes, escapes and interrupts."""

import io
import os
import re
import signal
import sys

import pytest

from llmtuner.chat import cli
from llmtuner.chat.session import ChatSession
from llmtuner.tokenizer.encoding import encode

HALF = "\ufffd"


@pytest.fixture(autouse=True)
def keep_locale(monkeypatch):
    """The locale of the tests' own process is not theirs to change; the real terminal below has a process of its own."""
    monkeypatch.setattr(cli, "_take_utf8_locale", lambda: None)


# ------------------------------------------------------------------------------------------------------ lines from a pipe
@pytest.fixture
def converse(loaded, tiny_model_dir, monkeypatch, capsys):
    """What `run_chat` prints when it reads the given lines."""

    def run(*lines, max_new_tokens=12, examples=()):
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        monkeypatch.setattr(cli, "load_for_evaluation", lambda _: loaded)
        cli.run_chat(tiny_model_dir, max_new_tokens, examples)
        return capsys.readouterr().out.splitlines()[1:]  # without the line at the start

    return run


def test_a_piped_dialogue_reads_as_one(converse, script):
    script("一条河。")
    assert converse("", "一座山？", "  ", "// 山") == [
        "you> ",
        "you> 一座山？",
        "model> 一条河。",
        "you> ",
        "you> // 山",
        "model> 一条河。",
    ]


def test_commands_are_not_asked(converse, monkeypatch):
    asked = []
    monkeypatch.setattr(ChatSession, "ask", lambda self, question, *_: (asked.append(question), iter([]))[1])
    output = "\n".join(
        converse(
            "/", "/clera", "/clear all", "/help", "/settings now", "//etc/hosts?", "a /b", "/exit", "after the end"
        )
    )
    assert asked == ["/etc/hosts?", "a /b"]
    assert "unknown command /clera; did you mean /clear?" in output
    assert "/clear takes no argument" in output
    assert "(no answer)" in output
    assert all(usage in output for usage in cli.COMMANDS)
    assert "after" not in output


def test_examples_are_listed_and_asked_by_their_number(converse, script):
    script("一条河。")
    examples = ["川は？", "河\x1b？", "River?"]
    output = converse("/help", "/2", "/3 now", "/4", examples=examples)
    assert [line.split() for line in output[-10:-7]] == [
        ["/1", "ask:", "川は？"],
        ["/2", "ask:", "河‹1B›？"],
        ["/3", "ask:", "River?"],
    ]
    assert output[-7:-3] == ["you> /2", "you> 河‹1B›？", "model> 一条河。", "you> /3 now"]
    assert "takes no argument" in output[-3]
    assert "unknown command /4" in output[-1]


def test_undo_clear_and_tokens(converse, script):
    script("一条河🐟")
    output = converse(
        "/undo", "/tokens", "山？", "河？", "/tokens", "/undo", "/undo", "/undo", "树？", "/clear", "/undo"
    )
    assert output[1] == "There is nothing to undo."
    assert output[3] == "There is no answer yet."
    pieces = output[9].split("│")
    assert "".join(pieces[:-4]).strip() == "一条河"
    assert pieces[-4:] == ["<0xF0>", "<0x9F>", "<0x90>", "<0x9F>"]
    assert output[10] == f"{len(pieces)} tokens, 4 characters"
    assert output[12:15] == ["The last question is now:", "you> 山？", "model> 一条河🐟"]
    assert output[16] == "The dialogue is empty now."
    assert output[18] == "There is nothing to undo."
    assert output[-3:] == ["The dialogue is cleared.", "you> /undo", "There is nothing to undo."]


def test_system_message(converse, monkeypatch):
    told = []
    monkeypatch.setattr(ChatSession, "ask", lambda self, *_: (told.append(self.system), iter([]))[1])
    output = converse("/system", "a", "/system 短く　答えて。", "b", "/clear", "/system", "c", "/system -", "d")
    assert told == ["", "短く　答えて。", "短く　答えて。", ""]
    assert output[1] == "System message: none"
    assert "System message: 短く　答えて。" in output


def test_settings(converse, script):
    seen = script("山")
    output = converse(
        *("/set temprature 1", "/set zzz 1", "/set", "/set temperature hot", "/set temperature nan", "/set top_p 1.5"),
        *("/set max_new_tokens 2.5", "/set max_new_tokens 0", "/set do_sample maybe", "/set do_sample"),
        *("a", "/set temperature 0.7", "/set do_sample True", "/set max_new_tokens 3", "/set top_p 0.9", "b"),
        *("/settings",),
    )
    replies = [line for line in output if not line.startswith(("you> ", "model> "))]
    assert "did you mean temperature?" in replies[0]
    assert "known are do_sample, temperature" in replies[1]
    assert "unknown setting" in replies[2]
    assert all("it must be a number from 0.01 to 100" in reply for reply in replies[3:5])
    assert "0.001 to 1" in replies[5]
    assert all("an integer from 1 up" in reply for reply in replies[6:8])
    assert all("true or false" in reply for reply in replies[8:10])
    assert replies[10:14] == [
        "temperature is now 0.7 (used only if do_sample is true)",
        "do_sample is now true",
        "max_new_tokens is now 3",
        "top_p is now 0.9",
    ]
    assert [line.split() for line in replies[14:]] == [
        ["do_sample", "true"],
        ["temperature", "0.7"],
        ["top_p", "0.9"],
        ["top_k", "50"],
        ["repetition_penalty", "1.0"],
        ["no_repeat_ngram_size", "0"],
        ["max_new_tokens", "3"],
    ]
    first, second = seen
    assert (first.do_sample, first.max_new_tokens) == (False, 12)
    assert (second.do_sample, second.temperature, second.top_p, second.max_new_tokens) == (True, 0.7, 0.9, 3)


def test_bytes_and_escapes_do_no_harm(converse, script):
    script("a\x1b[2Jb\rc\n\x9bd\u202ee")
    output = "\n".join(
        converse(b"\xe6\x97 \xff \x1b[31m\x00", "/undo", "/system \x1b]0;x\x07", "/\x1bc", "/set \x1bc 1")
    )
    assert f"you> {HALF} {HALF} ‹1B›[31m‹00›" in output
    assert "model> a‹1B›[2Jb‹0D›c\n‹9B›d‹202E›e" in output
    assert not cli.CONTROL.search(output)


def test_only_what_is_new_is_printed_and_a_changed_beginning_anew(loaded, tiny_model_dir, monkeypatch, converse):
    written = []
    monkeypatch.setattr(cli, "print", lambda text, **_: written.append(text), raising=False)
    answers = iter([["山", "山河", "", "山河海"], ["山", "xy", "xyz"], []])
    monkeypatch.setattr(ChatSession, "ask", lambda *_: iter(next(answers)))
    output = converse("a", "b", "c")
    assert written == ["model> ", "山", "河", "海", "model> ", "山", "model> "]
    assert "xyz" in output


def test_errors_are_told_and_the_dialogue_goes_on(loaded, converse, script):
    script("河")
    output = converse("山？", "山" * 300, "河？", "/undo", max_new_tokens=12)
    error = next(line for line in output if "the model's context" in line)
    assert error.endswith("/clear and /undo make room.")
    assert output[-2:] == ["you> 山？", "model> 河"]
    assert "/clear" not in converse("山" * 300)[1]  # nothing could be forgotten

    script(*encode(loaded[1], "河"), RuntimeError("no memory"))
    output = converse("山？", "/undo")
    assert "the answer was interrupted: RuntimeError: no memory" in output
    assert output[-1] == "The dialogue is empty now."


def test_little_room_is_told(converse, script):
    script("河" * 60)
    output = converse("山？", "山？", "山" * 60, "/undo", max_new_tokens=99)
    assert "left" not in "".join(output[:3])
    assert any(
        re.match(r"\(\d+ of the context's 256 tokens .* /undo or /clear makes room\)", line) for line in output[3:]
    )


def test_an_interrupt_while_an_answer_comes_raises_nothing(converse, monkeypatch, dialogue):
    stopped = []
    monkeypatch.setattr(ChatSession, "stop", lambda _: stopped.append(True))

    def ask(*_):
        yield "山"
        signal.raise_signal(signal.SIGINT)
        yield "山河"

    monkeypatch.setattr(ChatSession, "ask", ask)
    before = signal.getsignal(signal.SIGINT)
    assert converse("a", "/settings")[1] == "model> 山河 (stopped)"
    assert stopped
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_goes_ends_the_program_quietly(loaded, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(cli, "load_for_evaluation", lambda _: loaded)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("山？\n".encode()), encoding="utf-8"))
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        cli.run_chat(tiny_model_dir, 9)


@pytest.mark.parametrize(
    ("encoding", "codeset", "taken"),
    [("utf-8", "ANSI_X3.4-1968", True), ("utf-8", "UTF-8", False), ("euc_jp", "EUC-JP", False)],
)
def test_a_locale_is_changed_only_where_readline_would_edit_bytes(monkeypatch, encoding, codeset, taken):
    changed = []
    monkeypatch.setattr(cli, "_take_utf8_locale", lambda: changed.append(True))
    monkeypatch.setattr(cli.locale, "nl_langinfo", lambda _: codeset)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding=encoding))
    cli.prepare_terminal()
    assert bool(changed) == taken
