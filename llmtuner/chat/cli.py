"""A dialogue on the terminal: answers that stream and can be stopped, commands, lines edited character by character."""

import difflib
import locale
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtuner.chat.session import SAMPLING_ARGS, ChatSession, load_generation_settings
from llmtuner.console import UserError, print0
from llmtuner.eval.generation import GENERATION_DEFAULTS
from llmtuner.model.loading import load_for_evaluation
from llmtuner.tokenizer.fast import tokenize_for_display

COMMANDS = {
    "/help": "shows this",
    "/clear": "forgets the dialogue",
    "/undo": "forgets the last question and its answer",
    "/system TEXT": "tells the model TEXT before the dialogue; /system shows it, /system - takes it away",
    "/settings": "shows how answers are generated",
    "/set NAME VALUE": "changes one of these settings",
    "/tokens": "shows the tokens of the last answer",
    "/exit": "ends, as Ctrl-D does",
    "//...": "asks a question that begins with /",
    "Ctrl-C": "stops an answer; at the prompt clears the line, twice in a row ends",
}
UTF8_LOCALES = ("C.UTF-8", "UTF-8", "en_US.UTF-8")  # Linux, macOS, old systems
# What would move the cursor or turn the direction of writing; a model's answer and a pasted question may hold it.
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _number_between(kind: type, lowest: float, highest: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not lowest <= (value := kind(text)) <= highest:
            raise ValueError
        return value

    return read


# How a value is read, and what it must be. At temperatures near 0 logits overflow: that is what do_sample false is for.
SETTINGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "do_sample": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "temperature": (_number_between(float, 0.01, 100), "a number from 0.01 to 100"),
    "top_p": (_number_between(float, 0.001, 1), "a number from 0.001 to 1"),
    "top_k": (_number_between(int, 0, 2**31), "a whole number, 0 for no limit"),
    "repetition_penalty": (_number_between(float, 0.1, 10), "a number from 0.1 to 10, 1 for none"),
    "no_repeat_ngram_size": (_number_between(int, 0, 2**31), "a whole number of tokens, 0 for none"),
    "max_new_tokens": (_number_between(int, 1, 2**31), "a whole number from 1 up"),
}


def run_chat(model_dir: Path, max_new_tokens: int) -> None:
    """A dialogue with the model in `model_dir`, in its own generation settings, until the input ends.

    Raises:
        UserError: if there is no model that can be loaded.
    """
    settings = {**GENERATION_DEFAULTS, **load_generation_settings(model_dir), "max_new_tokens": max_new_tokens}
    repl = ChatREPL(ChatSession(*load_for_evaluation(model_dir)), settings)
    prepare_terminal()
    before = signal.signal(signal.SIGINT, repl.interrupt)
    try:
        repl.run()
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        signal.signal(signal.SIGINT, before)


def prepare_terminal() -> None:
    """Makes lines editable by characters, and sees to it that no byte typed or printed can end the program."""
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "")
    # Under LC_ALL=C, or a locale that is not installed, Python reads UTF-8 all the same, but readline edits bytes.
    if sys.stdin.encoding.lower() == "utf-8" and locale.nl_langinfo(locale.CODESET) != "UTF-8":
        _take_utf8_locale()
    with suppress(ImportError):
        import readline  # input() uses it from now on; its history is not saved

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question, not many
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _take_utf8_locale() -> None:
    """Sets a locale of UTF-8 in the environment too, from which readline takes it."""
    for name in UTF8_LOCALES:
        with suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, name)
            os.environ.pop("LC_ALL", None)
            os.environ["LC_CTYPE"] = name
            return


def escape_controls(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters are written like ‹1B›."""
    return CONTROL.sub(lambda found: f"‹{ord(found[0]):02X}›", text)


def _first_word(line: str) -> tuple[str, str]:
    first, rest = [*line.split(maxsplit=1), "", ""][:2]
    return first, rest


class ChatREPL:
    """A dialogue as it is typed and shown."""

    def __init__(self, dialogue: ChatSession, settings: dict[str, Any]) -> None:
        self.dialogue, self.settings = dialogue, settings
        self.at_prompt = self.line_is_empty = self.stopped = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/undo": self._undo,
            "/system": self._system,
            "/settings": self._show_settings,
            "/set": self._set,
            "/tokens": self._tokens,
        }

    def run(self) -> None:
        """Takes line after line."""
        print0("Ask in Japanese, Chinese or English. /help shows what else can be typed, Ctrl-D ends.")
        while (line := self._read()) not in (None, "/exit"):
            if line.startswith("/") and not line.startswith("//"):
                self._run_command(*_first_word(line))
            elif line:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)

    def interrupt(self, *_: Any) -> None:
        """What Ctrl-C does. It raises nothing but where `_read` waits for it, so it can fall anywhere."""
        if not self.at_prompt:
            self.stopped = True
            self.dialogue.stop()
            return
        self.at_prompt = False
        readline = sys.modules.get("readline")
        self.line_is_empty = not (readline and readline.get_line_buffer())
        raise KeyboardInterrupt

    def _read(self) -> str | None:
        """The next line without spaces around it; None at the end of the input, or after Ctrl-C twice in a row."""
        typed, told = sys.stdin.isatty(), False
        while True:
            line = None
            try:
                self.at_prompt = True
                with suppress(EOFError):
                    line = input("you> " if typed else "")
                self.at_prompt = False
            except KeyboardInterrupt:
                if told and self.line_is_empty:
                    break
                print0("\n(Ctrl-C again ends, as Ctrl-D does)")
                told = True
                continue
            if line is None:
                break
            if not typed:
                print0(f"you> {escape_controls(line.strip())}")  # so that what comes out reads as a dialogue
            return line.strip()
        if typed:
            print0()
        return None

    def _ask(self, question: str) -> None:
        """Shows an answer while it comes: only what is new, for a terminal cannot take back what has scrolled away."""
        generation = {name: value for name, value in self.settings.items() if name != "max_new_tokens"}
        self.stopped, shown, text = False, "", ""
        try:
            answer = self.dialogue.ask(question, generation, self.settings["max_new_tokens"])
            print("model> ", end="", flush=True)
            for text in map(escape_controls, answer):
                if text.startswith(shown):
                    print(text[len(shown) :], end="", flush=True)
                    shown = text
        except UserError as error:
            return print0(str(error) + (" /clear and /undo do that." if self.dialogue.messages else ""))
        except Exception as error:  # of the model's thread, such as no memory; the dialogue can go on
            return print0(f"\nthe answer broke off: {type(error).__name__}: {error}")
        if text != shown:  # its beginning changed: bytes turned out to be no characters
            print0(f"\n{text}")
        print0(" (stopped)" if self.stopped else "" if text else "(no answer)")
        self._warn_if_context_is_short()

    def _warn_if_context_is_short(self) -> None:
        room, context = self.dialogue.remaining_tokens(), self.dialogue.context_length
        if room < min(self.settings["max_new_tokens"], context // 2):
            print0(
                f"({max(room, 0):,} of the {context:,} tokens that the model can read are left for the next question and "
                "its answer: /undo or /clear makes room)"
            )

    def _run_command(self, command: str, text: str) -> None:
        if command not in self.commands:
            near = difflib.get_close_matches(command, [*self.commands, "/exit"], n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            print0(
                f"unknown command {escape_controls(command)}{hint} /help shows all; // begins a question that begins with /."
            )
        elif text and command not in ("/system", "/set"):
            print0(f"{command} stands alone; nothing was done.")
        else:
            self.commands[command](text)

    def _help(self, _: str) -> None:
        for usage, meaning in COMMANDS.items():
            print0(f"  {usage:<17}{meaning}")

    def _clear(self, _: str) -> None:
        self.dialogue.clear()
        print0(
            "The dialogue is forgotten." + (" What the model is told before it stays." if self.dialogue.system else "")
        )

    def _undo(self, _: str) -> None:
        if not self.dialogue.undo():
            return print0("There is nothing to forget.")
        if not self.dialogue.messages:
            return print0("The dialogue is empty now.")
        question, answer = (escape_controls(message["content"]) for message in self.dialogue.messages[-2:])
        print0(f"The last question is now:\nyou> {question}\nmodel> {answer}")

    def _system(self, text: str) -> None:
        if text:
            self.dialogue.system = "" if text == "-" else text
        told = escape_controls(self.dialogue.system)
        when = " from the next question on" if text else ""
        print0(f"The model is told{when}: {told}" if told else f"The model is told nothing before the dialogue{when}.")

    def _show_settings(self, _: str) -> None:
        for name in SETTINGS:
            print0(f"  {name:<22}{self._value(name)}")

    def _value(self, name: str) -> str:
        idle = name in SAMPLING_ARGS and not self.settings["do_sample"]
        return str(self.settings[name]).lower() + (" (counts only where do_sample is true)" if idle else "")

    def _set(self, text: str) -> None:
        name, value = _first_word(text)
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(SETTINGS)}."
            return print0(f"unknown setting {escape_controls(name)!r}; {hint} Write /set NAME VALUE.")
        read, meaning = SETTINGS[name]
        try:
            self.settings[name] = read(value)
        except (ValueError, KeyError):
            return print0(f"{name} cannot be {escape_controls(value)!r}; it must be {meaning}.")
        print0(f"{name} is now {self._value(name)}")

    def _tokens(self, _: str) -> None:
        if not self.dialogue.messages:
            return print0("There is no answer yet.")
        answer = self.dialogue.messages[-1]["content"]
        pieces = tokenize_for_display(self.dialogue.tokenizer, answer)
        print0("│".join(map(escape_controls, pieces)))
        print0(f"{len(pieces)} tokens, {len(answer)} characters")
