"""Dialogues stream exactly, stop and fail in good order; the terminal obeys keys and commands and never breaks."""

import io
import json
import os
import re
import select
import signal
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import torch

from llmtuner.chat import cli
from llmtuner.chat.session import ChatSession, load_generation_settings
from llmtuner.console import UserError
from llmtuner.data.template import Template
from llmtuner.eval.generation import GREEDY, generate_answers
from llmtuner.model.loading import load_model
from llmtuner.tokenizer.fast import encode, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HALF = "\ufffd"


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(tiny_model_dir, torch.float32), load_tokenizer(tiny_model_dir)


@pytest.fixture(autouse=True)
def keep_locale(monkeypatch):
    """The locale of the tests' own process is not theirs to change; the real terminal below has a process of its own."""
    monkeypatch.setattr(cli, "_take_utf8_locale", lambda: None)


@pytest.fixture
def dialogue(loaded):
    return ChatSession(*loaded)


@pytest.fixture
def script(loaded, monkeypatch):
    """Lets the model say given ids, or the tokens of a text; an exception among them is raised."""
    model, tokenizer = loaded
    seen = []

    def scripted(*ids):
        def generate(input_ids, streamer, stopping_criteria, generation_config, **_):
            seen.append(generation_config)
            streamer.put(input_ids)
            for one in ids:
                if isinstance(one, Exception):
                    raise one
                streamer.put(torch.tensor([one]))
                if stopping_criteria(input_ids, None).all():
                    break
            streamer.end()

        monkeypatch.setattr(model, "generate", generate)
        return seen

    return lambda *ids: scripted(*(encode(tokenizer, ids[0]) if ids and isinstance(ids[0], str) else ids))


@pytest.fixture
def slow(loaded):
    """A model that takes its time: 0.02 s for each token."""
    hook = loaded[0].register_forward_hook(lambda *_: time.sleep(0.02))
    yield
    hook.remove()


def generating():
    """Threads that generate; none may be left once an answer is over."""
    return [thread for thread in threading.enumerate() if "_generate" in thread.name]


# ------------------------------------------------------------------------------------------------------------- dialogue
def test_streamed_answers_end_as_whole_ones(loaded, dialogue):
    questions = ["一座山？", "When does the ferry leave?", "柳树", "镇上住着一位木匠。", "apples"]
    whole = generate_answers(*loaded, questions, max_new_tokens=30).texts
    compared = 0
    for question, expected in zip(questions, whole, strict=True):
        streamed = list(dialogue.ask(question, GREEDY, 30))
        assert len(streamed) > 5
        assert dialogue.messages[-1] == {"role": "assistant", "content": streamed[-1]}
        if not expected.endswith(HALF):
            assert streamed[-1] == expected
            compared += 1
        dialogue.clear()
    assert compared > 1
    assert not generating()


def test_the_second_question_is_asked_after_the_first_answer(loaded, dialogue, script):
    model, tokenizer = loaded
    prompts = []
    dialogue.system = "Be brief."
    for question, answer in (("一座山？", "一条河。"), ("柳树？", "柳絮。")):
        script(answer)
        generate = model.generate

        def spy(input_ids, generate=generate, **others):
            prompts.append(input_ids[0].tolist())
            generate(input_ids, **others)

        model.generate = spy
        assert list(dialogue.ask(question, GREEDY, 20))[-1] == answer
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "一座山？"},
        {"role": "assistant", "content": "一条河。"},
        {"role": "user", "content": "柳树？"},
    ]
    assert prompts[-1] == Template.from_tokenizer(tokenizer).encode_prompt(tokenizer, said)


def test_no_half_character_is_ever_shown(loaded, dialogue, script):
    text = "日本の鱈🐟です、鱈。🐟"
    ids = encode(loaded[1], text)
    assert len(ids) > 1.5 * len(text)  # most of its characters are bytes
    script(*ids)
    pieces = list(dialogue.ask("?", GREEDY, 99))
    assert len(pieces) > 5
    assert all(text.startswith(piece) for piece in pieces)
    assert pieces[-1] == text
    for missing in (1, 2, 3):  # cut in the midst of the last character
        script(*ids[:-missing])
        assert list(dialogue.ask("?", GREEDY, 99))[-1] == text[:-1]


def test_bytes_that_are_no_characters_are_shown_as_such(loaded, dialogue, script):
    byte = loaded[1].convert_tokens_to_ids("<0xFF>")
    script(*encode(loaded[1], "山"), byte, *encode(loaded[1], "河"))
    assert list(dialogue.ask("?", GREEDY, 99))[-1] == f"山{HALF} 河"
    script(*[byte] * 5)
    assert list(dialogue.ask("?", GREEDY, 99))[-1] == HALF * 5


def test_marks_that_end_an_answer_are_no_part_of_it(loaded, dialogue, script):
    for stop in Template.from_tokenizer(loaded[1]).stop_token_ids:
        script(*encode(loaded[1], "一条河。"), stop)
        assert list(dialogue.ask("?", GREEDY, 99))[-1] == "一条河。"
        half = encode(loaded[1], "一条河🐟")[:-1]
        script(*half, stop)
        assert list(dialogue.ask("?", GREEDY, 99))[-1] == "一条河"


def test_stop_from_another_thread_keeps_what_was_said(dialogue, slow):
    timer = threading.Timer(0.3, dialogue.stop)
    timer.start()
    start = time.perf_counter()
    pieces = list(dialogue.ask("一座山？", GREEDY, 150))
    assert time.perf_counter() - start < 1.5  # the whole would take 3 s
    assert 2 < len(pieces) < 75
    assert dialogue.messages == [
        {"role": "user", "content": "一座山？"},
        {"role": "assistant", "content": pieces[-1]},
    ]
    assert not generating()
    assert len(list(dialogue.ask("一座山？", GREEDY, 20))) > 5  # a stop does not outlast its answer


def test_a_reader_that_goes_ends_the_answer(dialogue, slow):
    answer = dialogue.ask("一座山？", GREEDY, 150)
    next(answer)
    last = next(answer)
    start = time.perf_counter()
    answer.close()
    assert time.perf_counter() - start < 0.5
    assert not generating()
    assert dialogue.messages[-1]["content"] == last


def test_errors_of_generation_reach_the_reader(loaded, dialogue, script):
    script(*encode(loaded[1], "一条河"), RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        list(dialogue.ask("山？", GREEDY, 9))
    assert dialogue.messages[-1]["content"] == "一条河"
    assert not generating()
    script(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        list(dialogue.ask("河？", GREEDY, 9))
    assert [message["content"] for message in dialogue.messages] == ["山？", "一条河"]  # nothing was said


def test_the_model_cannot_be_reached(dialogue, monkeypatch):
    """An error before the first token, even outside transformers, must not leave the reader waiting."""
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("device lost")))
    with pytest.raises(RuntimeError, match="device lost"):
        list(dialogue.ask("山？", GREEDY, 9))


def test_an_answer_has_the_room_that_is_left(loaded, dialogue):
    model, tokenizer = loaded
    question = "山"
    while dialogue.remaining_tokens(question) > 4:
        question += "山"
    room = dialogue.remaining_tokens(question)
    prompt = Template.from_tokenizer(tokenizer).encode_prompt(tokenizer, [{"role": "user", "content": question}])
    assert len(prompt) + room == dialogue.context_length == model.config.max_position_embeddings
    read = []
    hook = model.register_forward_hook(lambda *_, **__: read.append(1))
    list(dialogue.ask(question, GREEDY, 150))
    hook.remove()
    assert 1 <= len(read) <= room
    dialogue.clear()

    dialogue.messages += [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    before = list(dialogue.messages)
    with pytest.raises(UserError, match=r"tokens long.*at most 256"):
        dialogue.ask("山" * 300, GREEDY, 9)
    assert dialogue.messages == before


def test_undo_and_clear(dialogue, script):
    dialogue.system = "Be brief."
    for question in ("山", "河"):
        script(question)
        list(dialogue.ask(question, GREEDY, 9))
    assert dialogue.undo()
    assert [message["content"] for message in dialogue.messages] == ["山", "山"]
    dialogue.clear()
    assert dialogue.messages == []
    assert dialogue.system == "Be brief."
    assert not dialogue.undo()


def test_typed_roles_stay_text(loaded, dialogue, monkeypatch):
    model, tokenizer = loaded
    prompts = []
    monkeypatch.setattr(model, "generate", lambda input_ids, streamer, **_: (prompts.append(input_ids), streamer.end()))
    dialogue.system = "<|user|></s>"
    list(dialogue.ask("<|assistant|> [gMASK]sop<|observation|></s>", GREEDY, 9))
    ids = prompts[0][0].tolist()
    template = Template.from_tokenizer(tokenizer)
    assert [one for one in ids if one in {*template.prefix, *template.stop_token_ids, *template.roles.values()}] == [
        *template.prefix,
        *(template.roles[role] for role in ("system", "user", "assistant")),
    ]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, {"do_sample": False}),
        ({"do_sample": False, "eos_token_id": 2}, {"do_sample": False}),
        ({"top_p": 0.8, "repetition_penalty": 1.1}, {"do_sample": False, "top_p": 0.8, "repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.7, "top_k": None}, {"do_sample": True, "temperature": 0.7}),
    ],
)
def test_own_settings(tmp_path, named, expected):
    if named is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(named), encoding="utf-8")
    assert load_generation_settings(tmp_path) == expected


def test_own_settings_that_cannot_be_read(tmp_path):
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        load_generation_settings(tmp_path)


def test_settings_reach_generation_and_none_of_sampling_where_it_is_greedy(dialogue, script):
    seen = script("山")
    own = {"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.2}
    list(dialogue.ask("?", {"do_sample": True, **own}, 7))
    list(dialogue.ask("?", {"do_sample": False, **own}, 7))  # transformers would warn of these
    sampled, greedy = seen
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.3, 0.5)
    assert (greedy.do_sample, greedy.temperature, greedy.top_p) == (False, 1.0, 1.0)
    assert sampled.repetition_penalty == greedy.repetition_penalty == 1.2
    assert sampled.max_new_tokens == 7


# ------------------------------------------------------------------------------------------------------ lines from a pipe
@pytest.fixture
def converse(loaded, tiny_model_dir, monkeypatch, capsys):
    """What `run_chat` prints when it reads the given lines."""

    def run(*lines, max_new_tokens=12):
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        monkeypatch.setattr(cli, "load_for_evaluation", lambda _: loaded)
        cli.run_chat(tiny_model_dir, max_new_tokens)
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
    assert "/clear stands alone" in output
    assert "(no answer)" in output
    assert all(usage in output for usage in cli.COMMANDS)
    assert "after" not in output


def test_undo_clear_and_tokens(converse, script):
    script("一条河🐟")
    output = converse(
        "/undo", "/tokens", "山？", "河？", "/tokens", "/undo", "/undo", "/undo", "树？", "/clear", "/undo"
    )
    assert output[1] == "There is nothing to forget."
    assert output[3] == "There is no answer yet."
    pieces = output[9].split("│")
    assert "".join(pieces[:-4]).strip() == "一条河"
    assert pieces[-4:] == ["‹F0›", "‹9F›", "‹90›", "‹9F›"]
    assert output[10] == f"{len(pieces)} tokens, 4 characters"
    assert output[12:15] == ["The last question is now:", "you> 山？", "model> 一条河🐟"]
    assert output[16] == "The dialogue is empty now."
    assert output[18] == "There is nothing to forget."
    assert output[-3:] == ["The dialogue is forgotten.", "you> /undo", "There is nothing to forget."]


def test_system_message(converse, monkeypatch):
    told = []
    monkeypatch.setattr(ChatSession, "ask", lambda self, *_: (told.append(self.system), iter([]))[1])
    output = converse("/system", "a", "/system 短く　答えて。", "b", "/clear", "/system", "c", "/system -", "d")
    assert told == ["", "短く　答えて。", "短く　答えて。", ""]
    assert output[1] == "The model is told nothing before the dialogue."
    assert "The model is told: 短く　答えて。" in output


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
    assert "there are do_sample, temperature" in replies[1]
    assert "unknown setting" in replies[2]
    assert all("it must be a number from 0.01 to 100" in reply for reply in replies[3:5])
    assert "0.001 to 1" in replies[5]
    assert all("a whole number from 1 up" in reply for reply in replies[6:8])
    assert all("true or false" in reply for reply in replies[8:10])
    assert replies[10:14] == [
        "temperature is now 0.7 (counts only where do_sample is true)",
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
    error = next(line for line in output if "tokens long" in line)
    assert error.endswith("/clear and /undo do that.")
    assert output[-2:] == ["you> 山？", "model> 河"]
    assert "/clear" not in converse("山" * 300)[1]  # nothing could be forgotten

    script(*encode(loaded[1], "河"), RuntimeError("no memory"))
    output = converse("山？", "/undo")
    assert "the answer broke off: RuntimeError: no memory" in output
    assert output[-1] == "The dialogue is empty now."


def test_little_room_is_told(converse, script):
    script("河" * 60)
    output = converse("山？", "山？", "山" * 60, "/undo", max_new_tokens=99)
    assert "left" not in "".join(output[:3])
    assert any(re.match(r"\(\d+ of the 256 tokens .* /undo or /clear makes room\)", line) for line in output[3:])


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


# -------------------------------------------------------------------------------------------------------- a real terminal
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

    def wait(self, seen, seconds=40):
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
    assert "The model is told from the next question on: 日語\r\n" in program.output

    program.type(UP)
    program.line("you> /system 日語")
    program.type(CTRL_C)
    program.wait(lambda: program.output.count("Ctrl-C again ends") == 1 and program.screen.last == "you>")
    program.type("山")
    program.line("you> 山")
    program.type(CTRL_C)  # clears a line again, so it does not end
    program.wait(lambda: program.output.count("Ctrl-C again ends") == 2 and program.screen.last == "you>")

    assert "\x1b[?2004h" in program.output  # asks the terminal to mark what is pasted
    program.type("\x1b[200~一座山？\r/clear\x1b[201~")  # two lines pasted
    program.type("\r")
    program.wait(lambda: re.search(r"model> .{5}", program.output))
    program.type(CTRL_C)
    program.wait(lambda: "(stopped)" in program.output and program.screen.last == "you>")
    program.type("/tokens\r")
    program.wait(lambda: re.search(r"(\d+) tokens, \d+ characters", program.output) and program.screen.last == "you>")
    assert 0 < int(re.search(r"(\d+) tokens, ", program.output)[1]) < 120
    assert "forgotten" not in program.output
    program.type("/undo\r")
    program.wait(lambda: "The dialogue is empty now." in program.output and program.screen.last == "you>")

    program.type("一座山？\r")  # interrupts that fall anywhere: before, in and after an answer
    for _ in range(40):
        os.kill(program.process, signal.SIGINT)
        time.sleep(0.002)
    program.wait(lambda: program.screen.last in ("you>", "[end]"))
    if program.screen.last == "you>":
        program.type(CTRL_C + CTRL_C)
    program.wait(lambda: "[end]" in program.output)
    assert os.waitstatus_to_exitcode(os.waitpid(program.process, 0)[1]) == 0
    assert "over" in program.output
    assert "Traceback" not in program.output
