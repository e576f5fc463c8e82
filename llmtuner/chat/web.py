"""Chat on a web page: one question to several models side by side, on this machine or behind a password."""

import base64
import hmac
import html
import importlib.util
import ipaddress
import math
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmtuner.chat.session import ChatSession, load_generation_settings
from llmtuner.console import UserError, print0
from llmtuner.eval.generation import GENERATION_DEFAULTS
from llmtuner.eval.language import LANGUAGES, Languages
from llmtuner.tokenizer.encoding import display_ids, encode

if TYPE_CHECKING:
    import gradio as gr
    import uvicorn
    from transformers import PreTrainedModel

Models = Mapping[str, "tuple[PreTrainedModel, Any]"]  # name -> model and tokenizer

USER = "chat"
MIN_PASSWORD_LENGTH = 8
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
UPDATE_INTERVAL = 0.1  # seconds between updates of streaming answers
# Answers share one device: each further one slows all others down and holds a KV cache. The fifth question waits; stop, undo
# and clear never do.
MAX_CONCURRENT_QUESTIONS = 4
MAX_SESSIONS = 100
MAX_QUEUED_QUESTIONS = 20  # further ones are told to try again later

# After a few wrong passwords, which may be typing errors, an address waits twice as long each time.
FREE_ATTEMPTS = 3
FIRST_DELAY, MAX_DELAY = 0.5, 8.0  # seconds
RESET_AFTER = 600.0  # seconds without a failed login
# All addresses together: failed logins in so many seconds. Addresses that have logged in before are exempt.
GLOBAL_ATTEMPTS, GLOBAL_PERIOD = 20, 10.0
MAX_ADDRESSES = 1000
MAX_HEADER_BYTES = 256  # bytes of a wrong password

# What the page requests. Gradio's other routes (files, uploads, proxying) are blocked.
ALLOWED_PREFIXES = ("/assets/", "/static/", "/gradio_api/queue/", "/gradio_api/run/", "/gradio_api/heartbeat/")
ALLOWED_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/app_id")
# Lets the browser connect to no other address and embed the page nowhere. Gradio's own code needs inline scripts and eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
FONTS = ["system-ui", "Hiragino Sans", "Yu Gothic UI", "Noto Sans CJK JP", "Microsoft YaHei", "sans-serif"]
CSS = """
.dialogue { --faint: color-mix(in srgb, var(--body-text-color) 65%, transparent);
    height: max(16rem, calc(100dvh - 17rem)); overflow-y: auto; padding: 0 .9rem .9rem;
    border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--background-fill-primary) }
.dialogue h2 { position: sticky; top: 0; margin: 0; padding: .6rem 0; font-size: .8rem; font-weight: 600;
    letter-spacing: .04em; color: var(--faint); background: var(--background-fill-primary) }
.dialogue p { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.65 }
.dialogue .question { width: fit-content; max-width: 88%; margin: 1rem 0 .7rem auto; padding: .45rem .8rem;
    border-radius: 14px 14px 3px 14px; background: var(--background-fill-secondary);
    border: 1px solid var(--border-color-primary) }
.dialogue .streaming::after { content: "▍"; opacity: .5 }
.dialogue .tokens { font-size: .8rem; line-height: 1.9; color: var(--faint) }
.dialogue .tokens span { padding: .12em 0; border-radius: 3px; background: rgb(70 130 220 / .2) }
.dialogue .tokens span:nth-child(even) { background: rgb(235 150 40 / .24) }
.dialogue .cost, .dialogue .empty { font-size: .8rem; color: var(--faint) }
.examples { flex-wrap: nowrap; overflow-x: auto; gap: .5rem; scrollbar-width: thin }
.examples button { flex: none; width: auto; padding: .3rem .8rem; border-radius: 99px; font-weight: 400; white-space: nowrap }
@media (max-width: 760px) {
    .dialogue { height: 34dvh; min-height: 12rem }
    .buttons { gap: .5rem }
}
"""
# Scrolls to the end of a dialogue as it grows, unless the user has scrolled back.
FOLLOW = """
const box = element.closest(".dialogue");
let follow = true;
box.addEventListener("scroll", () => { follow = box.scrollTop + box.clientHeight > box.scrollHeight - 40; });
watch("value", () => { if (follow) box.scrollTop = box.scrollHeight; });
"""


def serve(
    models: dict[str, Path],
    max_new_tokens: int,
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str | None = None,
    examples: Sequence[str] = (),
    languages: Languages = LANGUAGES,
) -> None:
    """Serves the chat page until Ctrl-C.

    Args:
        models: {name: directory}; the last is the chat model, whose generation settings are the page's defaults.
        max_new_tokens: default length limit of an answer.
        host: address to listen on; other machines reach the page unless it is a loopback address.
        password: required, with the user name "chat", if given. It is sent unencrypted: tunnel through untrusted networks
            (ssh -L).
        examples: questions that a click asks.
        languages: those to ask in.

    Raises:
        UserError: if gradio is missing, other machines could reach the page without a good password, the port is in use,
            or a directory contains no model.
    """
    if not is_loopback(host) and len(password or "") < MIN_PASSWORD_LENGTH:
        raise UserError(
            f"with --host {host} other machines can reach the page: it needs a password of at least "
            f"{MIN_PASSWORD_LENGTH} characters. Set one, or omit --host."
        )
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the chat page needs gradio, which is not installed. Run: pip install gradio==6.31.0")
    from llmtuner.model.loading import load_for_evaluation

    with listen(host, port) as listener:
        loaded = {name: load_for_evaluation(directory) for name, directory in models.items()}
        sessions = SessionStore(loaded)
        page = build_page(
            sessions, load_generation_settings(list(models.values())[-1]), max_new_tokens, examples, languages
        )
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        user = f"user name {USER}; " if password else ""
        print0(f"the chat page is at http://{name}:{listener.getsockname()[1]} ({user}Ctrl-C to stop)")
        with suppress(KeyboardInterrupt):
            server(page, host, password).run(sockets=[listener])
        sessions.stop()


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only; false for names other than localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 means any free port.

    Raises:
        UserError: if the address or port is unavailable.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on port {port} of {host} ({reason}). Choose another with --port, or stop what uses it."
        ) from error


def server(page: "gr.Blocks", host: str, password: str | None) -> "uvicorn.Server":
    """The web server of the page, to be run with a socket from `listen`."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="",
        theme=gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    # Connections are always open at shutdown; uvicorn would log closing them as errors.
    config = uvicorn.Config(
        AccessMiddleware(app, host, password),
        log_level="critical",
        ws="none",
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,  # clients could forge their address in them
    )
    return uvicorn.Server(config)


@dataclass
class FailedLogins:
    """Failed logins of one address."""

    count: int = 0
    last: float = -math.inf
    """Time of the last one, in seconds of the throttle's clock."""
    header: bytes = b""
    """Its Authorization header: a tab that keeps sending an old password is not guessing."""


class LoginThrottle:
    """Rate limit on passwords: a growing delay for each address, and a limit for all addresses together.

    During a delay, at most `MAX_DELAY`, passwords are not checked at all. Memory is bounded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._failed: dict[str, FailedLogins] = {}  # most recently used last, as in `_known`
        self._known: dict[str, None] = {}
        self._all: deque[float] = deque(maxlen=GLOBAL_ATTEMPTS)

    def delay(self, address: str) -> float:
        """Seconds until passwords from this address are checked again; 0 if they are."""
        now, failed = self.clock(), self._failed.get(_network(address), FailedLogins())
        excess = failed.count - FREE_ATTEMPTS
        until = failed.last + (min(FIRST_DELAY * 2.0 ** min(excess, 30), MAX_DELAY) if excess >= 0 else 0.0)
        if len(self._all) == GLOBAL_ATTEMPTS and _network(address) not in self._known:
            until = max(until, self._all[0] + GLOBAL_PERIOD)
        return max(0.0, until - now)

    def record_failure(self, address: str, header: bytes) -> None:
        """Counts a failed login, unless it repeats the address's last password."""
        now, network = self.clock(), _network(address)
        failed = self._failed.pop(network, FailedLogins())
        if now - failed.last > RESET_AFTER:
            failed = FailedLogins()
        self._failed[network] = failed
        if header[:MAX_HEADER_BYTES] != failed.header:
            self._failed[network] = FailedLogins(failed.count + 1, now, header[:MAX_HEADER_BYTES])
            self._all.append(now)
        _keep_newest(self._failed)

    def record_success(self, address: str) -> None:
        """Remembers that this address has logged in."""
        self._known.pop(_network(address), None)
        self._known[_network(address)] = None
        _keep_newest(self._known)


def _network(address: str) -> str:
    """The addresses of one client: an IPv4 address, or an IPv6 network of 2^64 addresses."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else str(ip)


def _keep_newest(addresses: dict[str, Any]) -> None:
    while len(addresses) > MAX_ADDRESSES:
        del addresses[next(iter(addresses))]


class AccessMiddleware:
    """ASGI middleware that passes only requests of the page itself, and only with the password.

    Gradio's own login leaves some of its routes open, and its origin check admits foreign names that point to this machine
    (DNS rebinding) and every other server on it. Here all routes are closed to them.
    """

    def __init__(self, app: Any, host: str, password: str | None) -> None:
        self.app = app
        # A page on the network may have many names; there the browser does not send the password to a foreign one.
        self.names = (*LOCAL_NAMES, host) if is_loopback(host) else None
        self.authorization = b"Basic " + base64.b64encode(f"{USER}:{password}".encode()) if password else None
        self.throttle = LoginThrottle()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves a request, or rejects it with 401, 403, 404 or 429."""
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":  # startup and shutdown
            await self.app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        status, headers = self.refusal(scope["path"], dict(scope["headers"]), address), {}
        message = "refused"
        if status == 401:
            headers["WWW-Authenticate"] = 'Basic realm="chat", charset="UTF-8"'
        if status == 429:
            seconds = math.ceil(self.throttle.delay(address)) or 1
            headers["Retry-After"] = str(seconds)
            message = f"Too many wrong passwords. Try again in {seconds} s."
        app = PlainTextResponse(message, status, headers) if status else self.app

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await app(scope, receive, send_with_policy)

    def refusal(self, path: str, headers: Mapping[bytes, bytes], address: str = "") -> int | None:
        """The HTTP status with which a request is rejected, or None."""
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
        try:
            name, source = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
        except ValueError:
            return 403
        if (self.names and name not in self.names) or (origin and source != host):
            return 403
        if self.authorization:
            given = headers.get(b"authorization")
            if given is None:  # makes the browser ask for the password
                return 401
            if self.throttle.delay(address):
                return 429
            if not hmac.compare_digest(given, self.authorization):
                self.throttle.record_failure(address, given)
                return 401
            self.throttle.record_success(address)
        return None if path in ALLOWED_PATHS or path.startswith(ALLOWED_PREFIXES) else 404


@dataclass
class StreamedAnswer:
    """One model's answer so far."""

    text: str = ""
    tokens: list[str] | None = None
    """Its tokens as text, once it is complete."""
    seconds: float = 0.0
    stopped: bool = False

    def follow(self, stream: Iterator[str], tokenizer: Any) -> None:
        """Reads a streaming answer to its end."""
        start = time.perf_counter()
        for text in stream:
            self.text = text
        self.seconds = time.perf_counter() - start
        self.tokens = display_ids(tokenizer, encode(tokenizer, self.text))


@dataclass
class Turn:
    """A question and the answers to it."""

    question: str
    answers: dict[str, StreamedAnswer]
    before: dict[str, int]
    """Number of messages in each model's session before; a session drops a question that gets no answer."""


@dataclass
class BrowserSession:
    """The dialogues of one browser tab with all models."""

    chats: dict[str, ChatSession]
    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    """Whether an answer is streaming."""

    def ask(
        self, question: str, names: list[str], system: str, settings: Mapping[str, Any], max_new_tokens: int
    ) -> Iterator[None]:
        """Asks several models at once; yields repeatedly while their answers stream into `turns`.

        Raises:
            UserError: at once, if the dialogue with one of them is too long; then none is asked.
        """
        streams = {}
        for name in names:
            self.chats[name].system = system
            try:
                streams[name] = self.chats[name].ask(question, settings, max_new_tokens)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        before = {name: len(self.chats[name].messages) for name in names}
        turn = Turn(question, {name: StreamedAnswer() for name in names}, before)
        self.turns.append(turn)
        return self._follow(turn, streams)

    def _follow(self, turn: Turn, streams: dict[str, Iterator[str]]) -> Iterator[None]:
        with ThreadPoolExecutor(len(streams)) as pool:
            try:
                answers = [
                    pool.submit(turn.answers[name].follow, stream, self.chats[name].tokenizer)
                    for name, stream in streams.items()
                ]
                while (state := wait(answers, timeout=UPDATE_INTERVAL)).not_done:
                    if any(answer.exception() for answer in state.done):
                        self.stop()  # the turn will be undone
                    yield
            except GeneratorExit:  # the tab has been closed
                self.stop()
                raise
        try:
            for answer in answers:
                answer.result()
        except Exception:
            self.undo()
            raise

    def stop(self) -> None:
        """Stops streaming answers; what they contain stays."""
        for turn in self.turns[-1:]:
            for answer in turn.answers.values():
                answer.stopped = answer.stopped or answer.tokens is None
        for chat in self.chats.values():
            chat.stop()

    def undo(self) -> None:
        """Removes the last question and its answers."""
        if self.turns:
            for name, messages in self.turns.pop().before.items():
                del self.chats[name].messages[messages:]

    def clear(self) -> None:
        """Removes all questions and answers."""
        self.turns.clear()
        for chat in self.chats.values():
            chat.clear()


class SessionStore:
    """The sessions of all browser tabs, which share the models."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._all: dict[str, BrowserSession] = {}  # most recently used last
        self._lock = threading.Lock()

    def get(self, tab: str) -> BrowserSession:
        """The session of a tab, also after a lost connection; a new one if it has none."""
        with self._lock:
            session = self._all.pop(tab, None)
            if session is None:
                session = BrowserSession({name: ChatSession(*model) for name, model in self.models.items()})
            self._all[tab] = session
            while len(self._all) > MAX_SESSIONS:
                self._all.pop(next(iter(self._all))).stop()
        return session

    def stop(self) -> None:
        """Stops all streaming answers."""
        with self._lock:
            for session in self._all.values():
                session.stop()


def render_html(name: str, turns: list[Turn]) -> str:
    """A model's side of the page as HTML; questions and answers are escaped, so they are shown as plain text."""
    parts = [f"<h2>{html.escape(name)}</h2>"]
    for turn in turns:
        if answer := turn.answers.get(name):
            parts.append(f'<p class="question">{html.escape(turn.question)}</p>')
            if answer.tokens is None:
                parts.append(f'<p class="answer streaming">{html.escape(answer.text)}</p>')
                continue
            count = len(answer.tokens)
            cost = f"{count:,} tokens · {len(answer.text):,} characters · {count / max(answer.seconds, 1e-9):,.1f} tokens/s"
            parts += [
                f'<p class="answer">{html.escape(answer.text)}</p>',
                f'<p class="tokens">{"".join(f"<span>{html.escape(token)}</span>" for token in answer.tokens)}</p>',
                f'<p class="cost">{cost}{" · stopped" if answer.stopped else ""}</p>',
            ]
    return "".join(parts) if len(parts) > 1 else parts[0] + '<p class="empty">No questions yet.</p>'


def build_page(
    sessions: SessionStore,
    settings: Mapping[str, Any],
    max_new_tokens: int,
    examples: Sequence[str] = (),
    languages: Languages = LANGUAGES,
) -> "gr.Blocks":
    """The page: one side per model, the question box below, and the settings.

    Args:
        settings: default generation settings; those without a control on the page stay as they are.
        examples: questions on buttons that ask them.
        languages: those to ask in.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, too
    import gradio as gr

    names = list(sessions.models)
    chat = names[-1]
    start = {**GENERATION_DEFAULTS, **settings}
    longest = int(sessions.models[chat][0].config.max_position_embeddings)

    with gr.Blocks(title="Chat", analytics_enabled=False, fill_width=True) as page:
        with gr.Row():
            sides = {}
            for name in names:
                with gr.Column(min_width=300, elem_classes="dialogue") as column:
                    sides[name] = column, gr.HTML(render_html(name, []), elem_id=name, js_on_load=FOLLOW)
        with gr.Row(elem_classes="examples", visible=bool(examples)):
            chips: dict[Any, str] = {gr.Button(example, size="sm", min_width=0): example for example in examples}
        question = gr.Textbox(
            "",
            show_label=False,
            placeholder=f"Ask in {languages.listed('or')}",
            max_lines=8,
            autofocus=True,
            container=False,
        )
        with gr.Row(elem_classes="buttons"):
            send = gr.Button("Send", variant="primary", min_width=60)
            stop = gr.Button("Stop", variant="stop", min_width=60, interactive=False)
            undo = gr.Button("Undo", min_width=60)
            clear = gr.Button("Clear", min_width=60)
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                chat_only = gr.Checkbox(False, label=f"Ask only the {chat} model", visible=len(names) > 1)
                do_sample = gr.Checkbox(bool(start.get("do_sample")), label="Sample (otherwise greedy)")
            system = gr.Textbox("", label="System message", placeholder="none", max_lines=4)
            with gr.Row():
                bounds = {"temperature": (0.05, 2), "top_p": (0.05, 1), "repetition_penalty": (1, 2)}
                sliders = {
                    name: gr.Slider(
                        *limits, start[name], step=0.01, label=name.replace("_", " ").capitalize(), min_width=220
                    )
                    for name, limits in bounds.items()
                }
                length = gr.Slider(
                    1, longest, min(max_new_tokens, longest), step=1, label="Max new tokens", min_width=220
                )

        views = {name: view for name, (_, view) in sides.items()}
        # and the other way round
        enabled_while_busy = {send: False, stop: True, undo: False, clear: False, **dict.fromkeys(chips, False)}

        def dialogues(session: BrowserSession) -> dict[Any, Any]:
            return {view: render_html(name, session.turns) for name, view in views.items()}

        def page_state(session: BrowserSession) -> dict[Any, Any]:
            buttons = {
                button: gr.Button(interactive=enabled == session.busy) for button, enabled in enabled_while_busy.items()
            }
            return {**dialogues(session), **buttons}

        def ask(values: dict[Any, Any], request: gr.Request, event: gr.EventData) -> Iterator[Any]:
            session, example = sessions.get(str(request.session_hash)), chips.get(event.target)
            text = example or values[question].strip()
            if session.busy or not text:
                yield gr.skip()
                return
            # The browser sends 1.0 as 1, and transformers requires floats.
            generation = {name: float(values[slider]) for name, slider in sliders.items()}
            chosen = {**start, "do_sample": values[do_sample], **generation}
            models = [chat] if values[chat_only] else names
            session.busy = True
            try:
                updates = session.ask(text, models, values[system].strip(), chosen, int(values[length]))
                yield {**page_state(session), **({} if example else {question: ""})}  # what is being written stays
                for _ in updates:
                    yield dialogues(session)
            except Exception as error:
                if not isinstance(error, UserError):
                    traceback.print_exc()
                gr.Warning(html.escape(str(error)), duration=None)
                yield {**dialogues(session), **({} if example else {question: values[question]})}
            finally:
                session.busy = False

        def current_state(request: gr.Request) -> dict[Any, Any]:
            return page_state(sessions.get(str(request.session_hash)))

        def stop_answers(request: gr.Request) -> None:
            sessions.get(str(request.session_hash)).stop()

        def unless_busy(change: Callable[[BrowserSession], None]) -> Callable[[gr.Request], dict[Any, Any]]:
            def handle(request: gr.Request) -> dict[Any, Any]:
                session = sessions.get(str(request.session_hash))
                if not session.busy:
                    change(session)
                return page_state(session)

            return handle

        inputs = {question, chat_only, system, do_sample, *sliders.values(), length}
        shown = [*views.values(), *enabled_while_busy]
        asking = gr.on(
            [send.click, question.submit, *(chip.click for chip in chips)],
            ask,
            inputs,
            [*shown, question],
            concurrency_limit=MAX_CONCURRENT_QUESTIONS,
            show_progress="minimal",
            show_progress_on=question,
            api_visibility="private",
        )
        # Not queued: the queue loses results of a question that arrives at the moment in which its stream is closed.
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asking.then(current_state, outputs=shown, **at_once)  # only now does the browser accept the next question
        stop.click(stop_answers, **at_once)
        undo.click(unless_busy(BrowserSession.undo), outputs=shown, **at_once)
        clear.click(unless_busy(BrowserSession.clear), outputs=shown, **at_once)
        others = [column for name, (column, _) in sides.items() if name != chat]
        chat_only.change(
            lambda on: {column: gr.Column(visible=not on) for column in others}, chat_only, others, **at_once
        )
        sampling = [sliders["temperature"], sliders["top_p"]]
        do_sample.change(lambda on: [gr.Slider(interactive=on)] * 2, do_sample, sampling, **at_once)
    page.queue(max_size=MAX_QUEUED_QUESTIONS)  # beyond it gradio's page says that it is busy
    return page
