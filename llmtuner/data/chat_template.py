"""Any base's own chat template, rendered with and without each turn: special tokens by id, never from a text."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from llmtuner.console import UserError
from llmtuner.data.converter import TOOL_SYSTEM_PROMPT
from llmtuner.data.template import Ids, Message, Template, encode_arrays, to_ids, with_labels, wrap_documents

# What separates documents in pretraining; the eos_token of a chat model often ends a turn instead.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
# In a message, ESCAPE breaks the names of added tokens and stands around the text, STUFFED stands for the noncharacter
# itself, and ANSWER_END follows an answer. ESCAPE is the one that ChatGLM3's own template inserts (tokenizer/chatglm3.py).
ESCAPE, ANSWER_END, STUFFED = "\ufdd0\ufdd1", "\ufdd0\ufdd2", "\ufdd0\ufdd4"
SPACE_AROUND = r"\s*"
MARKS = re.compile("\ufdd0(.)", re.DOTALL)
# How a template may take a tool's call: under `tool_calls`, its arguments an object or text; ChatGLM3's name under `metadata`.
CALL_FORMS = ("object", "text", "metadata")
CALL_ID = "call00001"  # of nine characters, which Mistral's templates want
QUESTION, ANSWER, NEXT, CALLED, ARGUMENT, OFFERED = (
    f"probe{word}" for word in ["one", "two", "three", "four", "five", "six"]
)

Piece = int | tuple[str, str]  # a token's id; or a text, and what it follows (`encode_fast`)


def get_template(
    tokenizer: Any, name: str = "auto", document_end_token: str | None = None
) -> "Template | ChatTemplate":
    """The chat format of a tokenizer: ChatGLM3's by its ids, any other by the chat template that comes with the tokenizer.

    Args:
        name: the setting `template`: `auto` or `chatglm3`.
        document_end_token: what ends a document; `ChatTemplate.document_end` finds it by default.

    Raises:
        UserError: if the tokenizer does not support `chatglm3`, or has no such token.
    """
    try:
        template = Template.from_tokenizer(tokenizer)
    except UserError:
        if name == "chatglm3":
            raise
        return ChatTemplate(tokenizer, document_end_token)
    if document_end_token and tokenizer.convert_tokens_to_ids(document_end_token) != template.eos:
        raise UserError(
            f"document_end_token is {document_end_token!r}, but ChatGLM3's documents end with its eos_token. Leave it out."
        )
    return template


@dataclass(frozen=True)
class MessageForm:
    """How messages are handed to a template."""

    names: re.Pattern[str]
    """Matches the names of all added tokens."""
    answer_names: re.Pattern[str]
    """The same without `kept`."""
    kept: tuple[str, ...] = ()
    """Names of markup that an answer may contain, since the template looks for them: <think>."""
    has_system: bool = True
    """Whether there is a system role; otherwise its text precedes that of the first user's message."""
    has_tools: bool = True
    """Whether tools that are offered are shown; otherwise they are part of the system message."""
    call: str | None = None
    """One of `CALL_FORMS`; None if none is supported."""

    def escape(self, text: str, is_answer: bool = False) -> str:
        """A message's text in which no token is recognised."""
        names = self.answer_names if is_answer else self.names
        text = text.replace(ESCAPE[0], STUFFED)
        position = 0
        while match := names.search(text, position):  # not `sub`: names may overlap
            position = match.start() + 1
            text = text[:position] + ESCAPE + text[position:]
        core = text.strip()  # many templates remove the space around it
        if not core:
            return text
        before, after = text.split(core, 1)
        opening = "" if is_answer and core.startswith(self.kept) and self.kept else ESCAPE
        return f"{before}{opening}{core}{ANSWER_END if is_answer else ESCAPE}{after}"

    def escape_all(self, value: Any) -> Any:
        """`escape` for all texts in JSON."""
        if isinstance(value, dict):
            return {self.escape(key): self.escape_all(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.escape_all(part) for part in value]
        return self.escape(value) if isinstance(value, str) else value

    def convert(self, messages: list[Message]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as `apply_chat_template` takes them, escaped."""
        converted: list[dict[str, Any]] = []
        tools, system, called = None, "", ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system":
                if message.get("tools") and self.has_tools:
                    functions = self.escape_all(json.loads(message["tools"]))
                    tools = [{"type": "function", "function": function} for function in functions]
                elif message.get("tools"):
                    content = "\n".join([*([content] if content else []), TOOL_SYSTEM_PROMPT, message["tools"]])
                if self.has_system and (content or "tools" not in message):
                    converted.append({"role": role, "content": self.escape(content)})
                else:
                    system = f"{content}\n\n" if content else ""
            elif role == "user":
                converted.append({"role": role, "content": self.escape(system + content)})
                system = ""
            elif role == "assistant" and "metadata" not in message:
                converted.append({"role": role, "content": self.escape(content, is_answer=True)})
            else:
                called = message.get("metadata", called)
                converted.append(self._convert_tool_turn(role, self.escape(called), content))
        return converted, tools

    def _convert_tool_turn(self, role: str, name: str, content: str) -> dict[str, Any]:
        if self.call == "metadata":
            return {
                "role": role,
                "content": self.escape(content),
                **({"metadata": name} if role == "assistant" else {}),
            }
        if role == "observation":
            return {"role": "tool", "name": name, "tool_call_id": CALL_ID, "content": self.escape(content)}
        arguments = self.escape_all(json.loads(content))
        arguments = json.dumps(arguments, ensure_ascii=False) if self.call == "text" else arguments
        call = {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"role": role, "content": "", "tool_calls": [call]}


@dataclass(frozen=True)
class TurnFormat:
    """What a template puts around the turns of a dialogue, found by rendering short ones."""

    form: MessageForm
    answer_head: str
    """Between the prompt and a last answer, such as an empty block of thoughts."""
    end: str
    """The token that ends the last answer."""
    is_end_added: bool
    """Whether the template has nothing there, and `end` is the eos_token."""
    inner_end: str
    """The token that ends an earlier answer: the next role's, if that comes first."""
    call_end: str | None
    """The token that ends a tool's call."""
    user_frame: str
    """From the end of an answer to the user's text."""
    result_frame: str
    """From the end of a call to what the tool returned."""
    prompt_frame: str
    """From the end of the user's text to where the assistant speaks."""
    head: tuple[str, ...]
    """Tokens at the beginning of a dialogue that do not occur again."""


class ChatTemplate:
    """The ids around a document or a dialogue, for any tokenizer that has a chat template in Jinja.

    The template is rendered as text, in which the names of added tokens are broken wherever a message contains them. Those
    that are left become ids, and each stretch between them is encoded as plain text. A dialogue is rendered once: each answer
    begins where the rendering of the messages before it ends, with the assistant to speak, and ends with its end-of-turn
    token. So an earlier answer has the form that the template gives it in the history, for example without thoughts.
    """

    calls_as_json = True
    """Dialogues hold tools and their calls as JSON (`to_messages`), and the template puts them into its own form."""

    def __init__(self, tokenizer: Any, document_end_token: str | None = None) -> None:
        self.tokenizer, self.document_end_token = tokenizer, document_end_token
        self.where = f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        if document_end_token and document_end_token not in self.vocabulary:
            raise UserError(
                f"{self.where} has no token {document_end_token!r} (document_end_token). Name the one that ends a document in "
                "the base's pretraining."
            )
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        self.tokens = {token.content: token for token in added if len(token.content.strip()) > 1}  # others are text

    @property
    def fingerprint(self) -> str:
        """Changes if the template would give other text."""
        settings = repr((self.tokenizer.chat_template, sorted(self.tokenizer.special_tokens_map.items())))
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    # ---------------------------------------------------------------------------------------------------- documents
    @cached_property
    def prefix(self) -> list[int]:
        """What a document begins with: what the tokenizer's post-processor or its `add_bos_token` adds; often nothing."""
        backend = self.tokenizer.backend_tokenizer
        ids, plain = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        if added := [start for start in range(1, len(ids)) if ids[start : start + len(plain)] == plain]:
            return ids[: added[0]]
        file = Path(self.tokenizer.name_or_path or "-") / "tokenizer_config.json"  # transformers forgets this setting
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        bos = self.tokenizer.bos_token_id
        return [bos] if settings.get("add_bos_token") and bos is not None else []

    @cached_property
    def document_end(self) -> int:
        """The id that ends a document: of the setting, of a token with a usual name, or the eos_token.

        Raises:
            UserError: if there is only an eos_token that ends the turns of a user, too, or none.
        """
        for name in [self.document_end_token] if self.document_end_token else END_OF_TEXT:
            if name in self.vocabulary:
                return self.vocabulary[name]
        eos = self.tokenizer.eos_token
        question: list[Message] = [{"role": "user", "content": QUESTION}]
        if eos is None or (self.tokenizer.chat_template and eos in self._render(question, self._plain_form, True)):
            raise UserError(
                f"{self.where} does not say what ends a document: its eos_token is {eos}"
                f"{', which ends a turn' if eos else ''}. Set document_end_token to the one of the base's pretraining."
            )
        return self.tokenizer.eos_token_id

    @property
    def eval_prefix(self) -> list[int]:
        """What stands before a text that is scored, so that its first token has a context."""
        return self.prefix or self._known_end or [self.pad_token_id]

    @cached_property
    def _known_end(self) -> list[int]:
        try:
            return [self.document_end]
        except UserError:
            return []

    @property
    def pad_token_id(self) -> int:
        """The id that pads a batch; nothing attends to it."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(index for index in ids if index is not None)

    def encode_documents(self, tokenizer: Any, texts: list[str] | list[bytes], threads: int = 1) -> list[Ids]:
        """Encodes documents as the base's pretraining has them: with `prefix` and `document_end`."""
        return wrap_documents(encode_arrays(tokenizer, texts, threads), self.prefix, self.document_end)

    # ---------------------------------------------------------------------------------------------------- dialogues
    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an assistant's turn, and a document."""
        turns = self.turns
        names = dict.fromkeys(name for name in (turns.end, turns.inner_end, turns.call_end) if name)
        return list(dict.fromkeys([*map(self.vocabulary.__getitem__, names), *self._known_end]))

    @cached_property
    def dialogue_prefix(self) -> list[int]:
        """What a dialogue begins with, before its first message."""
        return [self.vocabulary[name] for name in self.turns.head]

    @property
    def answer_start(self) -> str | None:
        """What `encode_prompt` takes as `begun` for an answer at once, from templates that leave room for thoughts."""
        return "" if self.turns.answer_head.strip() else None

    def answer_ids(self, ids: list[int]) -> list[int]:
        """The ids of an answer that are meant for its reader: without an empty block of thoughts."""
        head = self._answer_head
        return ids[len(head) :] if head and ids[: len(head)] == head else ids

    @cached_property
    def _answer_head(self) -> list[int]:
        return self._encode_frame(self.turns.answer_head) if self.answer_start is not None else []

    def find_turns(self, ids: Ids) -> tuple[Ids, int]:
        """Where the user's turns begin in a dialogue, and where its last answer does."""
        user, result, prompt = self._frames
        turns, prompts = _find(ids, user), _find(ids, prompt)
        if len(result) > len(user) and result[: len(user)] == user:  # what tools return comes as a user's turn
            turns = numpy.setdiff1d(turns, _find(ids, result))
        return turns, int(prompts[-1]) if len(prompts) else len(self.dialogue_prefix)

    @cached_property
    def _frames(self) -> tuple[list[int], list[int], list[int]]:
        user, result, prompt = map(
            self._encode_frame, (self.turns.user_frame, self.turns.result_frame, self.turns.prompt_frame)
        )
        return user, result, prompt

    def encode_prompt(self, tokenizer: Any, messages: list[Message], begun: str | None = None) -> list[int]:
        """Encodes a dialogue up to where the assistant speaks next.

        Args:
            begun: the beginning of what the assistant says; "" ends the prompt right before its first word.
        """
        form = self.turns.form
        prompt = self._render(messages, form, prompt=True)
        parts = [(prompt, False)]
        if begun is not None:
            answer = self.turns.answer_head + form.escape(begun, is_answer=True)
            parts.append((answer if begun else answer.rstrip(" "), False))
        [pieces], _ = self._encode([self._split(parts)])
        return numpy.concatenate(pieces).tolist()

    def encode_dialogues(
        self,
        tokenizer: Any,
        dialogues: list[list[Message]],
        mask_history: bool = False,
        train_on_prompt: bool = False,
        threads: int = 1,
    ) -> list[tuple[Ids, Ids]]:
        """Encodes complete dialogues. Loss is computed only on assistant tokens and on the token that ends each answer.

        Args:
            mask_history: compute loss only on the last turn.
            train_on_prompt: compute loss on everything but what a dialogue begins with.

        Returns:
            Ids and labels of each dialogue, aligned, int32.

        Raises:
            UserError: if the template cannot render a dialogue, or does not leave earlier turns as they are.
        """
        split = [self._split(self._spans(messages, mask_history, train_on_prompt)) for messages in dialogues]
        arrays, targets = self._encode(split)
        ends = list(itertools.accumulate(map(len, arrays), initial=0))
        return with_labels([*itertools.chain(*arrays)], [*itertools.chain(*targets)], ends)

    def _spans(self, messages: list[Message], mask_history: bool, train_on_prompt: bool) -> list[tuple[str, bool]]:
        """A rendered dialogue in parts with and without loss."""
        turns, form = self.turns, self.turns.form
        whole = self._render(messages, form)
        speaks = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        starts = []
        for number in speaks:
            prompt = self._render(messages[:number], form, prompt=True)
            if not whole.startswith(prompt):
                raise self._not_splittable(f"the prompt of message {number + 1} is not how the dialogue begins")
            starts.append(len(prompt))
        ends, inner_end = [], 0
        for number, start, limit in zip(speaks, starts, [*starts[1:], len(whole)], strict=True):
            is_call = "metadata" in messages[number]
            text_end = start if is_call else whole.find(ANSWER_END, start, limit)
            if text_end < 0:
                raise self._not_splittable(f"it does not show the answer in message {number + 1}")
            found = self._end_pattern.search(whole, text_end, limit)
            if found:
                ends.append(found.end())
            elif number < len(messages) - 1:
                raise self._not_splittable(f"no token ends the answer in message {number + 1}")
            else:
                whole += turns.call_end if is_call and turns.call_end else turns.end
                ends.append(len(whole))
            if found and number < speaks[-1]:
                inner_end = found.start() if turns.is_end_added else found.end()
        first = len(starts) - 1 if mask_history else 0
        if train_on_prompt:
            begin = sum(map(len, turns.head))
            if mask_history:
                begin = inner_end or max(begin, self._system_length(messages[:-2], whole))
            return [(whole[:begin], False), (whole[begin : starts[-1]], True), (whole[starts[-1] : ends[-1]], True)]
        cuts = [0, *(cut for span in zip(starts[first:], ends[first:], strict=True) for cut in span)]
        return [(whole[a:b], number % 2 == 1) for number, (a, b) in enumerate(itertools.pairwise(cuts))]

    def _system_length(self, messages: list[Message], whole: str) -> int:
        """The length of what a dialogue begins with in the rendering of all of it; 0 where the template does not show it."""
        try:
            rendered = self._render(messages, self.turns.form) if messages else ""
        except UserError:  # no question follows
            return 0
        return len(rendered) if whole.startswith(rendered) else 0

    # -------------------------------------------------------------------------------------------- from text to ids
    @cached_property
    def _token_pattern(self) -> re.Pattern[str]:
        return self._pattern(self.tokens)

    @cached_property
    def _end_pattern(self) -> re.Pattern[str]:
        turns = self.turns
        return self._pattern([name for name in (turns.end, turns.inner_end, turns.call_end) if name])

    def _pattern(self, names: Iterable[str]) -> re.Pattern[str]:
        """Finds tokens in rendered text, with the space around them that belongs to them by their flags."""
        by_flags: dict[tuple[bool, bool, bool], list[str]] = {}
        for name in names:
            token = self.tokens[name]
            by_flags.setdefault((token.lstrip, token.rstrip, token.single_word), []).append(name)
        alternatives = []
        for (lstrip, rstrip, single_word), same in by_flags.items():
            pattern = rf"(?<!\w)({_any_of(same)})(?!\w)" if single_word else f"({_any_of(same)})"
            alternatives.append(SPACE_AROUND * lstrip + pattern + SPACE_AROUND * rstrip)
        return re.compile("|".join(alternatives) or "(?!)")

    def _split(self, parts: list[tuple[str, bool]]) -> list[tuple[Piece, bool]]:
        """Rendered text as tokens and plain text, each with whether it has loss."""
        pieces: list[tuple[Piece, bool]] = []
        after = ""
        for text, is_target in parts:
            position = 0
            for match in [*self._token_pattern.finditer(text), None]:
                stretch = text[position : match.start() if match else len(text)]
                plain = MARKS.sub(lambda mark: ESCAPE[0] if mark[0] == STUFFED else "", stretch)
                if plain:
                    pieces.append(((plain, after), is_target))
                    after = "text"
                if match:
                    pieces.append((self.vocabulary[match[match.lastindex or 0]], is_target))
                    after, position = "token", match.end()
        return pieces

    def _encode(self, dialogues: list[list[tuple[Piece, bool]]]) -> tuple[list[list[Ids]], list[list[bool]]]:
        """Ids and targets of pieces; every text is encoded once, and all in few calls."""
        texts = dict.fromkeys(piece for pieces in dialogues for piece, _ in pieces if isinstance(piece, tuple))
        encoded: dict[Piece, Ids] = {}
        for after in ("", "token", "text"):
            same = [piece for piece in texts if piece[1] == after]
            if same:
                ids = encode_arrays(self.tokenizer, [text for text, _ in same], 1, after)
                encoded |= dict(zip(same, ids, strict=True))
        encoded |= {piece: to_ids([piece]) for pieces in dialogues for piece, _ in pieces if isinstance(piece, int)}
        return (
            [[encoded[piece] for piece, _ in pieces] for pieces in dialogues],
            [[is_target for _, is_target in pieces] for pieces in dialogues],
        )

    def _encode_frame(self, text: str) -> list[int]:
        """Ids of text that a template puts between messages, which begins after a token."""
        [pieces], _ = self._encode([self._split([(text, False)])])
        return numpy.concatenate([to_ids([]), *pieces]).tolist()

    # ---------------------------------------------------------------------------------------------------- rendering
    def _render(self, messages: list[Message], form: MessageForm, prompt: bool = False) -> str:
        """A dialogue as text, up to where the assistant speaks next if `prompt`.

        Raises:
            UserError: if there is no template, or it refuses the dialogue.
        """
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.where} has no chat template, so it has no form for dialogues. Put the chat_template.jinja of the "
                "base's chat model beside its tokenizer.json."
            )
        if form.call is None and any("metadata" in message or message["role"] == "observation" for message in messages):
            raise UserError(
                f"the chat template of {self.where} has no form for the calls of tools. Leave such dialogues out (row_filter)."
            )
        converted, tools = form.convert(messages)
        try:
            return self.tokenizer.apply_chat_template(
                converted, tools=tools, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # a template raises almost anything
            raise UserError(
                f"the chat template of {self.where} refuses a dialogue of {', '.join(message['role'] for message in messages)}"
                f" ({type(error).__name__}: {error}). Leave such dialogues out (row_filter)."
            ) from error

    def _not_splittable(self, reason: str) -> UserError:
        return UserError(
            f"the chat template of {self.where} cannot be split into turns: {reason}. Give the base a chat template that only "
            "adds to what it has rendered; if earlier answers are the reason, dialogues of one question each need none."
        )

    @cached_property
    def _plain_form(self) -> MessageForm:
        names = re.compile(_any_of(self.tokens))
        return MessageForm(names, names)

    @cached_property
    def turns(self) -> TurnFormat:
        """How the template forms turns.

        Raises:
            UserError: if it cannot be split into turns.
        """
        question, answer, follow_up = (
            Message(role=role, content=text)
            for role, text in (("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))
        )
        form = self._plain_form
        prompt = self._render([question], form, prompt=True)
        last, inner = self._render([question, answer], form), self._render([question, answer, follow_up], form)
        if not last.startswith(prompt) or any(part not in inner for part in (QUESTION, ANSWER + ANSWER_END, NEXT)):
            raise self._not_splittable(
                "the prompt of an answer is not how a dialogue begins, or a message is not shown"
            )
        between = inner[inner.index(ANSWER_END) : inner.index(NEXT)]
        ends, inner_ends = self._names_in(last[last.index(ANSWER_END) :]), self._names_in(between)
        eos = self.tokenizer.eos_token
        if not inner_ends or not (ends or eos):
            raise self._not_splittable("no special token follows an answer")
        end, inner_end = (ends or [eos])[0], inner_ends[0]

        spoken = [*self._names_in(prompt), *self._names_in(between), end]
        try:
            with_system = self._render([Message(role="system", content=ANSWER), question], form)
            form = replace(form, has_system=ANSWER in with_system)
        except UserError:
            form, with_system = replace(form, has_system=False), ""
        source = str(self.tokenizer.chat_template)
        turn_names = {*spoken, *self._names_in(with_system)}
        kept = [
            name
            for name, token in self.tokens.items()
            if not token.special and name in source and name not in turn_names
        ]
        form = replace(form, answer_names=re.compile(_any_of(self.tokens.keys() - {*kept})), kept=tuple(kept))
        form, call_end, result_frame = self._probe_tools(form, question, {end, inner_end, eos})
        return TurnFormat(
            form,
            answer_head=last[len(prompt) : last.index(ESCAPE + ANSWER)],
            end=end,
            is_end_added=not ends,
            inner_end=inner_end,
            call_end=call_end,
            user_frame=_strip(between if not ends else between[between.index(inner_end) + len(inner_end) :]),
            result_frame=result_frame,
            prompt_frame=_strip(prompt[prompt.index(QUESTION) + len(QUESTION) :]),
            head=tuple(
                itertools.takewhile(lambda name: self._names_in(inner).count(name) == 1, self._names_in(prompt))
            ),
        )

    def _probe_tools(self, form: MessageForm, question: Message, ends: set[str]) -> tuple[MessageForm, str | None, str]:
        """The form of tools' calls, the token that ends one, and what stands between it and the result."""
        offered = json.dumps(
            [{"name": OFFERED, "description": "-", "parameters": {"type": "object", "properties": {}}}]
        )
        call = Message(role="assistant", metadata=CALLED, content=json.dumps({"a": ARGUMENT}))
        result = Message(role="observation", content=NEXT)
        for call_form in CALL_FORMS:
            form = replace(form, call=call_form)
            try:
                inner = self._render([question, call, result], form, prompt=True)
                last = self._render([question, call], form)
            except UserError:
                continue
            if any(part not in inner for part in (CALLED, ARGUMENT, NEXT)):
                continue
            try:
                shown = self._render([Message(role="system", content="", tools=offered), question], form)
            except UserError:
                shown = ""
            form = replace(form, has_tools=OFFERED in shown)
            between = inner[inner.rindex(ARGUMENT, 0, inner.index(NEXT)) : inner.index(NEXT)]
            names, last_names = self._names_in(between), self._names_in(last[last.rindex(ARGUMENT) :])
            found = [name for name in names if name in ends] or last_names[-1:] or names[:1]
            if not found:
                continue
            is_shared = not last_names
            frame = between[between.find(found[0]) + (0 if is_shared else len(found[0])) :]
            return form, found[0], _strip(frame)
        return replace(form, call=None, has_tools=False), None, ""

    def _names_in(self, text: str) -> list[str]:
        return [match[match.lastindex or 0] for match in self._token_pattern.finditer(text)]


def _any_of(names: Iterable[str]) -> str:
    """A regular expression for any of the names, the longest that fits; for none of no names."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


def _strip(frame: str) -> str:
    """Text that a template puts before a message, without what may be encoded together with its text."""
    return MARKS.sub("", frame).strip()


def _find(ids: Ids, sequence: list[int]) -> Ids:
    """Where a sequence begins in `ids`."""
    if not sequence or len(ids) < len(sequence):
        return numpy.zeros(0, dtype=numpy.int64)
    windows = numpy.lib.stride_tricks.sliding_window_view(ids, len(sequence))
    return numpy.flatnonzero((windows == numpy.array(sequence)).all(axis=1))
