"""Chat in the terminal: streaming answers that Ctrl-C stops, commands, line editing."""

import difflib
import locale
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtuner.chat.session import SAMPLING_ARGS, ChatSession, load_generation_settings
from llmtuner.console import UserError, print0
from llmtuner.eval.generation import GENERATION_DEFAULTS
from llmtuner.eval.language import LANGUAGES, Languages
from llmtuner.model.loading import load_for_evaluation
from llmtuner.tokenizer.encoding import display_ids, encode

COMMANDS = {
    "/help": "show this help",
    "/clear": "clear the dialogue",
    "/undo": "remove the last question and its answer",
    "/system TEXT": "set the system message; /system shows it, /system - removes it",
    "/settings": "show the generation settings",
    "/set NAME VALUE": "change a generation setting",
    "/tokens": "show the tokens of the last answer",
    "/exit": "quit, as does Ctrl-D",
    "//...": "ask a question that starts with /",
    "Ctrl-C": "stop an answer; at the prompt clear the line, twice in a row quit",
}
COMMAND_NAMES = [usage.split()[0] for usage in COMMANDS if usage[0] == "/" != usage[1]]
UTF8_LOCALES = ("C.UTF-8", "UTF-8", "en_US.UTF-8")  # Linux, macOS, old systems
# Characters that move the cursor or change the writing direction; answers and pasted questions may contain them.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _number_between(kind: type, lowest: float, highest: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not lowest <= (value := kind(text)) <= highest:
            raise ValueError
        return value

    return read


# How a value is parsed, and what it must be. Near temperature 0 logits overflow; use do_sample false instead.
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "do_sample": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "temperature": (_number_between(float, 0.01, 100), "a number from 0.01 to 100"),
    "top_p": (_number_between(float, 0.001, 1), "a number from 0.001 to 1"),
    "top_k": (_number_between(int, 0, 2**31), "an integer, 0 for no limit"),
    "repetition_penalty": (_number_between(float, 0.1, 10), "a number from 0.1 to 10, 1 for none"),
    "no_repeat_ngram_size": (_number_between(int, 0, 2**31), "an integer number of tokens, 0 for none"),
    "max_new_tokens": (_number_between(int, 1, 2**31), "an integer from 1 up"),
}


def run_chat(
    model_dir: Path, max_new_tokens: int, examples: Sequence[str] = (), languages: Languages = LANGUAGES
) -> None:
    """Chats with the model in `model_dir`, under its own generation settings, until the input ends.

    Args:
        examples: questions that /help proposes; /1 asks the first.
        languages: those to ask in.

    Raises:
        UserError: if the model cannot be loaded.
    """
    settings = {**GENERATION_DEFAULTS, **load_generation_settings(model_dir), "max_new_tokens": max_new_tokens}
    repl = ChatREPL(ChatSession(*load_for_evaluation(model_dir)), settings, examples, languages)
    prepare_terminal()
    before = signal.signal(signal.SIGINT, repl.interrupt)
    try:
        repl.run()
    except BrokenPipeError:  # the reader is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_terminal() -> None:
    """Enables line editing by characters, and makes undecodable input and output harmless."""
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    # Under LC_ALL=C, or a locale that is not installed, Python still reads UTF-8, but readline edits bytes.
    if sys.stdin.encoding.lower() == "utf-8" and locale.nl_langinfo(locale.CODESET) != "UTF-8":
        _take_utf8_locale()
    with suppress(ImportError):
        import readline  # input() uses it once imported; its history is not saved

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _take_utf8_locale() -> None:
    """Sets a UTF-8 locale, also in the environment, where readline looks for it."""
    for name in UTF8_LOCALES:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            os.environ.pop("LC_ALL", None)
            os.environ["LC_CTYPE"] = name
            return


def escape_controls(text: str) -> str:
    """Text with control characters written as ‹1B›, so that a terminal shows rather than executes them."""
    return CONTROL.sub(lambda match: f"‹{ord(match[0]):02X}›", text)


def _first_word(line: str) -> tuple[str, str]:
    first, rest = [*line.split(maxsplit=1), "", ""][:2]
    return first, rest


class ChatREPL:
    """Reads questions and commands, prints answers."""

    def __init__(
        self,
        session: ChatSession,
        settings: dict[str, Any],
        examples: Sequence[str] = (),
        languages: Languages = LANGUAGES,
    ) -> None:
        self.session, self.settings, self.languages = session, settings, languages
        self.examples = {f"/{number}": question for number, question in enumerate(examples, start=1)}
        self.at_prompt = self.line_is_empty = self.stopped = False

    def run(self) -> None:
        """Reads and handles lines until the input ends."""
        listed = "the commands and questions to try" if self.examples else "the commands"
        print0(f"Ask in {self.languages.listed('or')}. /help lists {listed}, Ctrl-D quits.")
        while (line := self._read()) not in (None, "/exit"):
            if line.startswith("/") and not line.startswith("//"):
                self._run_command(*_first_word(line))
            elif line:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)

    def interrupt(self, *_: Any) -> None:
        """Handles Ctrl-C. It raises only while `_read` waits for input, so it is safe anywhere."""
        if not self.at_prompt:
            self.stopped = True
            self.session.stop()
            return
        self.at_prompt = False
        readline = sys.modules.get("readline")
        self.line_is_empty = not (readline and readline.get_line_buffer())
        raise KeyboardInterrupt

    def _read(self) -> str | None:
        """The next line, stripped; None at the end of the input or after Ctrl-C twice in a row."""
        interactive, warned = sys.stdin.isatty(), False
        while True:
            line = None
            try:
                self.at_prompt = True
                with suppress(EOFError):
                    line = input("you> " if interactive else "")
                self.at_prompt = False
            except KeyboardInterrupt:
                if warned and self.line_is_empty:
                    break
                print0("\n(Ctrl-C again quits, as does Ctrl-D)")
                warned = True
                continue
            if line is None:
                break
            if not interactive:
                print0(f"you> {escape_controls(line.strip())}")  # so that the output reads as a dialogue
            return line.strip()
        if interactive:
            print0()
        return None

    def _ask(self, question: str) -> None:
        """Prints an answer as it streams: only new text, since a terminal cannot take back what has scrolled away."""
        generation = {name: value for name, value in self.settings.items() if name != "max_new_tokens"}
        self.stopped, shown, text = False, "", ""
        try:
            answer = self.session.ask(question, generation, self.settings["max_new_tokens"])
            print("model> ", end="", flush=True)
            for text in map(escape_controls, answer):
                if text.startswith(shown):
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        except UserError as error:
            return print0(str(error) + (" /clear and /undo make room." if self.session.messages else ""))
        except Exception as error:  # in the generating thread, such as out of memory; the dialogue can continue
            return print0(f"\nthe answer was interrupted: {type(error).__name__}: {error}")
        if text != shown:  # its beginning changed: some bytes were not UTF-8
            print0(f"\n{text}")
        print0(" (stopped)" if self.stopped else "" if text else "(no answer)")
        self._warn_if_context_is_short()

    def _warn_if_context_is_short(self) -> None:
        remaining, context_length = self.session.remaining_tokens(), self.session.context_length
        if remaining < min(self.settings["max_new_tokens"], context_length // 2):
            print0(
                f"({max(remaining, 0):,} of the context's {context_length:,} tokens are left for the next question and its "
                "answer; /undo or /clear makes room)"
            )

    def _run_command(self, command: str, text: str) -> None:
        names = [*COMMAND_NAMES, *self.examples]
        if command not in names:
            near = difflib.get_close_matches(command, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            command = escape_controls(command)
            print0(f"unknown command {command}{hint} /help lists all; // starts a question that starts with /.")
        elif text and command not in ("/system", "/set"):
            print0(f"{command} takes no argument; nothing was done.")
        elif question := self.examples.get(command):
            print0(f"you> {escape_controls(question)}")
            self._ask(question)
        else:
            getattr(self, f"_{command[1:]}")(text)

    def _help(self, _: str) -> None:
        for usage, meaning in COMMANDS.items():
            print0(f"  {usage:<17}{meaning}")
        for command, question in self.examples.items():
            print0(f"  {command:<17}ask: {escape_controls(question)}")

    def _clear(self, _: str) -> None:
        self.session.clear()
        print0("The dialogue is cleared." + (" The system message stays." if self.session.system else ""))

    def _undo(self, _: str) -> None:
        if not self.session.undo():
            return print0("There is nothing to undo.")
        if not self.session.messages:
            return print0("The dialogue is empty now.")
        question, answer = (escape_controls(message["content"]) for message in self.session.messages[-2:])
        print0(f"The last question is now:\nyou> {question}\nmodel> {answer}")

    def _system(self, text: str) -> None:
        if text:
            self.session.system = "" if text == "-" else text
        message = escape_controls(self.session.system) or "none"
        print0(f"System message{' from the next question on' if text else ''}: {message}")

    def _settings(self, _: str) -> None:
        for name in SETTINGS:
            print0(f"  {name:<22}{self._value(name)}")

    def _value(self, name: str) -> str:
        ignored = name in SAMPLING_ARGS and not self.settings["do_sample"]
        return str(self.settings[name]).lower() + (" (used only if do_sample is true)" if ignored else "")

    def _set(self, text: str) -> None:
        name, value = _first_word(text)
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(SETTINGS)}."
            return print0(f"unknown setting {escape_controls(name)!r}; {hint} Write /set NAME VALUE.")
        read, meaning = SETTINGS[name]
        try:
            self.settings[name] = read(value)
        except (ValueError, KeyError):
            return print0(f"{name} cannot be {escape_controls(value)!r}; it must be {meaning}.")
        print0(f"{name} is now {self._value(name)}")

    def _tokens(self, _: str) -> None:
        if not self.session.messages:
            return print0("There is no answer yet.")
        answer = self.session.messages[-1]["content"]
        tokens = display_ids(self.session.tokenizer, encode(self.session.tokenizer, answer))
        print0("│".join(map(escape_controls, tokens)))
        print0(f"{len(tokens)} tokens, {len(answer)} characters")
