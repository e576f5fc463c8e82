"""A chat page in the browser: one question to several models side by side, on this machine or behind a password."""

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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmtuner.chat.session import ChatSession, load_generation_settings
from llmtuner.console import UserError, print0
from llmtuner.eval.generation import GENERATION_DEFAULTS
from llmtuner.tokenizer.fast import tokenize_for_display

if TYPE_CHECKING:
    import gradio as gr
    import uvicorn
    from transformers import PreTrainedModel

Models = Mapping[str, "tuple[PreTrainedModel, Any]"]  # name -> model and tokenizer

USER = "chat"
MIN_PASSWORD_LENGTH = 8
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
INTERVAL = 0.1  # seconds between two looks at answers that are being given
# Answers share one device: more at a time would make each slower and hold one more cache of keys and values in memory.
# Who comes fifth waits in line; stop, undo and clear never wait.
MAX_CONCURRENT_QUESTIONS = 4
MAX_SESSIONS = 100
# More than these in line are told to try again later.
MAX_QUEUED_QUESTIONS = 20

# Wrong passwords. After some that may be slips of the keyboard, an address waits twice as long each time.
FREE_ATTEMPTS = 3
FIRST_DELAY, MAX_DELAY = 0.5, 8.0  # seconds
RESET_AFTER = 600.0  # seconds without a wrong password
# All addresses together: so many wrong passwords in so many seconds. An address that has known the password may go on.
GLOBAL_ATTEMPTS, GLOBAL_PERIOD = 20, 10.0
MAX_ADDRESSES = 1000
MAX_HEADER_BYTES = 256  # bytes of a wrong password

# What the page fetches. Gradio's other routes (files, uploads, fetching of other addresses) are nobody's business here.
ALLOWED_PREFIXES = ("/assets/", "/static/", "/gradio_api/queue/", "/gradio_api/run/", "/gradio_api/heartbeat/")
ALLOWED_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/app_id")
# The browser itself refuses to fetch from or send to any other address, and to show the page inside another one.
# Gradio's own code needs inline scripts and eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
FONTS = ["system-ui", "Hiragino Sans", "Yu Gothic UI", "Noto Sans CJK JP", "Microsoft YaHei", "sans-serif"]
CSS = """
.dialogue { --faint: color-mix(in srgb, var(--body-text-color) 65%, transparent);
    height: max(16rem, calc(100dvh - 14rem)); overflow-y: auto; padding: 0 .9rem .9rem;
    border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--background-fill-primary) }
.dialogue h2 { position: sticky; top: 0; margin: 0; padding: .6rem 0; font-size: .8rem; font-weight: 600;
    letter-spacing: .04em; color: var(--faint); background: var(--background-fill-primary) }
.dialogue p { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.65 }
.dialogue .question { width: fit-content; max-width: 88%; margin: 1rem 0 .7rem auto; padding: .45rem .8rem;
    border-radius: 14px 14px 3px 14px; background: var(--background-fill-secondary);
    border: 1px solid var(--border-color-primary) }
.dialogue .coming::after { content: "▍"; opacity: .5 }
.dialogue .tokens { font-size: .8rem; line-height: 1.9; color: var(--faint) }
.dialogue .tokens span { padding: .12em 0; border-radius: 3px; background: rgb(70 130 220 / .2) }
.dialogue .tokens span:nth-child(even) { background: rgb(235 150 40 / .24) }
.dialogue .cost, .dialogue .empty { font-size: .8rem; color: var(--faint) }
@media (max-width: 760px) {
    .dialogue { height: 36dvh; min-height: 12rem }
    .buttons { gap: .5rem }
}
"""
# Shows what is new at the end of a dialogue, unless somebody has scrolled back.
FOLLOW = """
const box = element.closest(".dialogue");
let follow = true;
box.addEventListener("scroll", () => { follow = box.scrollTop + box.clientHeight > box.scrollHeight - 40; });
watch("value", () => { if (follow) box.scrollTop = box.scrollHeight; });
"""


def serve(
    models: dict[str, Path], max_new_tokens: int, host: str = "127.0.0.1", port: int = 7860, password: str | None = None
) -> None:
    """Shows the chat page until Ctrl-C.

    Args:
        models: directories by name; the last one is the chat model, whose generation settings are the page's at first.
        max_new_tokens: length of an answer at first.
        host: address to listen at; others than this machine reach the page only if it is not a loopback address.
        password: asked for with the user name "chat" if given. It crosses the network unencrypted, so a network that
            is not trusted needs a tunnel (ssh -L).

    Raises:
        UserError: if gradio is missing, others could reach the page without a good password, the port is in use, or
            a directory holds no model.
    """
    if not is_loopback(host) and len(password or "") < MIN_PASSWORD_LENGTH:
        raise UserError(
            f"with --host {host} other machines can reach the page, so it needs a password of at least "
            f"{MIN_PASSWORD_LENGTH} characters. Give one, or leave --host out."
        )
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the chat page needs gradio, which is not installed. Run: pip install gradio==6.31.0")
    from llmtuner.model.loading import load_for_evaluation

    with listen(host, port) as listener:
        loaded = {name: load_for_evaluation(directory) for name, directory in models.items()}
        sessions = SessionStore(loaded)
        page = build_page(sessions, load_generation_settings(list(models.values())[-1]), max_new_tokens)
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        user = f"user name {USER}; " if password else ""
        print0(f"the chat page is at http://{name}:{listener.getsockname()[1]} ({user}Ctrl-C ends it)")
        with suppress(KeyboardInterrupt):
            server(page, host, password).run(sockets=[listener])
        sessions.stop()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; false for names, except localhost."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 is any free one.

    Raises:
        UserError: if it cannot.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at port {port} of {host} ({reason}). Name another one with --port, or end what uses it."
        ) from error


def server(page: "gr.Blocks", host: str, password: str | None) -> "uvicorn.Server":
    """The web server of a page, to be run with a socket from `listen`."""
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
    # At the end there are always open connections, and uvicorn would call it an error to close them.
    config = uvicorn.Config(
        AccessMiddleware(app, host, password),
        log_level="critical",
        ws="none",
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,  # a client could name another address than its own in them
    )
    return uvicorn.Server(config)


@dataclass
class FailedLogins:
    """Wrong passwords from one address."""

    count: int = 0
    last: float = -math.inf
    """When the last one came, in seconds of the throttle's clock."""
    header: bytes = b""
    """What it was: a tab that keeps sending an old password guesses nothing."""


class LoginThrottle:
    """Bounds how fast passwords can be tried: by each address, with a growing delay, and by all addresses together.

    During a delay passwords are not looked at, right or wrong; it is at most `MAX_DELAY`. Memory is bounded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._tries: dict[str, FailedLogins] = {}  # the address that was used last stands last, as in `_known`
        self._known: dict[str, None] = {}
        self._all: deque[float] = deque(maxlen=GLOBAL_ATTEMPTS)

    def delay(self, address: str) -> float:
        """Seconds until a password from this address is looked at again; 0 if it is now."""
        now, tries = self.clock(), self._tries.get(_network(address), FailedLogins())
        over = tries.count - FREE_ATTEMPTS
        own = min(FIRST_DELAY * 2.0 ** min(over, 30), MAX_DELAY) if over >= 0 else 0.0
        until = tries.last + own
        if len(self._all) == GLOBAL_ATTEMPTS and _network(address) not in self._known:
            until = max(until, self._all[0] + GLOBAL_PERIOD)
        return max(0.0, until - now)

    def record_failure(self, address: str, header: bytes) -> None:
        """Counts a wrong password, unless it is the one that came last from there."""
        now, network = self.clock(), _network(address)
        tries = self._tries.pop(network, FailedLogins())
        if now - tries.last > RESET_AFTER:
            tries = FailedLogins()
        self._tries[network] = tries
        if header[:MAX_HEADER_BYTES] != tries.header:
            self._tries[network] = FailedLogins(tries.count + 1, now, header[:MAX_HEADER_BYTES])
            self._all.append(now)
        _keep_newest(self._tries)

    def record_success(self, address: str) -> None:
        """Remembers that somebody at this address knows the password."""
        self._known.pop(_network(address), None)
        self._known[_network(address)] = None
        _keep_newest(self._known)


def _network(address: str) -> str:
    """What one client holds: an IPv4 address, or the 2^64 addresses of an IPv6 network."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else str(ip)


def _keep_newest(addresses: dict[str, Any]) -> None:
    while len(addresses) > MAX_ADDRESSES:
        del addresses[next(iter(addresses))]


class AccessMiddleware:
    """Stands before a web application: lets through only what its own page asks for, and only with the password.

    Gradio's login leaves a part of its routes open, and its check of origins lets in a foreign name that points to this
    machine (DNS rebinding) and every other server on it. Here every route is closed to them.
    """

    def __init__(self, app: Any, host: str, password: str | None) -> None:
        self.app = app
        # Elsewhere a page may be reached by many names, and the browser keeps the password from a foreign one.
        self.names = (*LOCAL_NAMES, host) if is_loopback(host) else None
        self.authorization = b"Basic " + base64.b64encode(f"{USER}:{password}".encode()) if password else None
        self.throttle = LoginThrottle()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one request, or refuses it (401, 403, 404, 429)."""
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":  # starting and ending
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
            message = f"There were too many wrong passwords. Please try again in {seconds} s."
        app = PlainTextResponse(message, status, headers) if status else self.app

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await app(scope, receive, send_with_policy)

    def refusal(self, path: str, headers: Mapping[bytes, bytes], address: str = "") -> int | None:
        """The HTTP status with which a request from an address is refused, if it is."""
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin", b"").decode("latin-1")
        try:
            name, source = urlsplit(f"//{host}").hostname, urlsplit(origin).netloc
        except ValueError:
            return 403
        if (self.names and name not in self.names) or (origin and source != host):
            return 403
        if self.authorization:
            given = headers.get(b"authorization")
            if given is None:  # a browser asks for the password only then
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
    """What a model says to one question, as far as it has come."""

    text: str = ""
    pieces: list[str] | None = None
    """Its tokens, once it has ended."""
    seconds: float = 0.0
    stopped: bool = False

    def follow(self, stream: Iterator[str], tokenizer: Any) -> None:
        """Takes over an answer while it comes, to its end."""
        start = time.perf_counter()
        for text in stream:
            self.text = text
        self.seconds = time.perf_counter() - start
        self.pieces = tokenize_for_display(tokenizer, self.text)


@dataclass
class Turn:
    """A question and the answers of the models that were asked."""

    question: str
    answers: dict[str, StreamedAnswer]
    before: dict[str, int]
    """Messages that their dialogues held before; a dialogue forgets a question to which nothing was said."""


@dataclass
class BrowserSession:
    """What one tab of a browser and the models have said."""

    dialogues: dict[str, ChatSession]
    turns: list[Turn] = field(default_factory=list)
    busy: bool = False
    """Whether an answer is being given."""

    def ask(
        self, question: str, names: list[str], system: str, settings: Mapping[str, Any], max_new_tokens: int
    ) -> Iterator[None]:
        """Asks some models at the same time; gives control back again and again while their answers come into `turns`.

        Raises:
            UserError: at once, if the dialogue with one of them is too long; then none is asked.
        """
        streams = {}
        for name in names:
            self.dialogues[name].system = system
            try:
                streams[name] = self.dialogues[name].ask(question, settings, max_new_tokens)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        before = {name: len(self.dialogues[name].messages) for name in names}
        turn = Turn(question, {name: StreamedAnswer() for name in names}, before)
        self.turns.append(turn)
        return self._follow(turn, streams)

    def _follow(self, turn: Turn, streams: dict[str, Iterator[str]]) -> Iterator[None]:
        with ThreadPoolExecutor(len(streams)) as pool:
            try:
                coming = [
                    pool.submit(turn.answers[name].follow, stream, self.dialogues[name].tokenizer)
                    for name, stream in streams.items()
                ]
                while (state := wait(coming, timeout=INTERVAL)).not_done:
                    if any(one.exception() for one in state.done):
                        self.stop()  # the turn will be forgotten
                    yield
            except GeneratorExit:  # the tab has been closed
                self.stop()
                raise
        try:
            for one in coming:
                one.result()
        except Exception:
            self.undo()
            raise

    def stop(self) -> None:
        """Ends the answers that are being given; what was said stays."""
        for turn in self.turns[-1:]:
            for answer in turn.answers.values():
                answer.stopped = answer.stopped or answer.pieces is None
        for dialogue in self.dialogues.values():
            dialogue.stop()

    def undo(self) -> None:
        """Forgets the last question and its answers."""
        if self.turns:
            for name, messages in self.turns.pop().before.items():
                del self.dialogues[name].messages[messages:]

    def clear(self) -> None:
        """Forgets everything that was said."""
        self.turns.clear()
        for dialogue in self.dialogues.values():
            dialogue.clear()


class SessionStore:
    """The dialogues of all tabs; each has its own, the models are the same."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._all: dict[str, BrowserSession] = {}  # the one that was used last stands last
        self._lock = threading.Lock()

    def get(self, tab: str) -> BrowserSession:
        """The session of a tab, a new one if it has none; a tab whose connection was lost for a while finds its own."""
        with self._lock:
            session = self._all.pop(tab, None)
            if session is None:
                session = BrowserSession({name: ChatSession(*model) for name, model in self.models.items()})
            self._all[tab] = session
            while len(self._all) > MAX_SESSIONS:
                self._all.pop(next(iter(self._all))).stop()
        return session

    def stop(self) -> None:
        """Ends all answers that are being given."""
        with self._lock:
            for session in self._all.values():
                session.stop()


def render_html(name: str, turns: list[Turn]) -> str:
    """A model's side of the page as HTML; everything that was said is text there, whatever it looks like."""
    parts = [f"<h2>{html.escape(name)}</h2>"]
    for turn in turns:
        if answer := turn.answers.get(name):
            parts.append(f'<p class="question">{html.escape(turn.question)}</p>')
            if answer.pieces is None:
                parts.append(f'<p class="answer coming">{html.escape(answer.text)}</p>')
                continue
            tokens, rate = len(answer.pieces), len(answer.pieces) / max(answer.seconds, 1e-9)
            cost = f"{tokens:,} tokens · {len(answer.text):,} characters · {rate:,.1f} tokens/s"
            parts += [
                f'<p class="answer">{html.escape(answer.text)}</p>',
                f'<p class="tokens">{"".join(f"<span>{html.escape(piece)}</span>" for piece in answer.pieces)}</p>',
                f'<p class="cost">{cost}{" · stopped" if answer.stopped else ""}</p>',
            ]
    return "".join(parts) if len(parts) > 1 else parts[0] + '<p class="empty">No question yet.</p>'


def build_page(sessions: SessionStore, settings: Mapping[str, Any], max_new_tokens: int) -> "gr.Blocks":
    """The page: a side for each model, the question below, and what can be set.

    Args:
        settings: transformers' generation settings to begin with; those that the page does not show stay as they are.
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
        question = gr.Textbox(
            "",
            show_label=False,
            placeholder="Ask in Japanese, Chinese or English",
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
                alone = gr.Checkbox(False, label=f"Ask the {chat} model alone", visible=len(names) > 1)
                sampled = gr.Checkbox(bool(start.get("do_sample")), label="Sampled (else greedy)")
            system = gr.Textbox("", label="System message", placeholder="none", max_lines=4)
            with gr.Row():
                slider: dict[str, Any] = {"step": 0.01, "min_width": 220}
                sampling: dict[str, Any] = {**slider, "interactive": bool(sampled.value)}
                temperature = gr.Slider(0.05, 2, start["temperature"], label="Temperature", **sampling)
                top_p = gr.Slider(0.05, 1, start["top_p"], label="Top p", **sampling)
                penalty = gr.Slider(1, 2, start["repetition_penalty"], label="Repetition penalty", **slider)
                length = gr.Slider(
                    1, longest, min(max_new_tokens, longest), step=1, label="Answer length", min_width=220
                )

        views = {name: view for name, (_, view) in sides.items()}
        usable = {send: False, stop: True, undo: False, clear: False}  # while an answer comes; else the other way round

        def texts(session: BrowserSession) -> dict[Any, Any]:
            return {view: render_html(name, session.turns) for name, view in views.items()}

        def everything(session: BrowserSession) -> dict[Any, Any]:
            buttons = {one: gr.Button(interactive=while_busy == session.busy) for one, while_busy in usable.items()}
            return {**texts(session), **buttons}

        def answer(
            asked: str,
            chat_alone: bool,
            told: str,
            do_sample: bool,
            heat: float,
            mass: float,
            against_repetition: float,
            tokens: int,
            request: gr.Request,
        ) -> Iterator[Any]:
            session = sessions.get(str(request.session_hash))
            if session.busy or not asked.strip():
                yield gr.skip()
                return
            numbers = {"temperature": heat, "top_p": mass, "repetition_penalty": against_repetition}
            # The browser sends 1.0 as 1, and transformers wants floats.
            chosen = {**start, "do_sample": do_sample, **{name: float(value) for name, value in numbers.items()}}
            session.busy = True
            try:
                coming = session.ask(asked.strip(), [chat] if chat_alone else names, told.strip(), chosen, int(tokens))
                yield {**everything(session), question: ""}
                for _ in coming:
                    yield texts(session)
            except Exception as error:
                if not isinstance(error, UserError):
                    traceback.print_exc()
                gr.Warning(html.escape(str(error)), duration=None)
                yield {**texts(session), question: asked}
            finally:
                session.busy = False

        def look(request: gr.Request) -> dict[Any, Any]:
            return everything(sessions.get(str(request.session_hash)))

        def stop_it(request: gr.Request) -> None:
            sessions.get(str(request.session_hash)).stop()

        def undo_it(request: gr.Request) -> dict[Any, Any]:
            session = sessions.get(str(request.session_hash))
            if not session.busy:
                session.undo()
            return everything(session)

        def clear_it(request: gr.Request) -> dict[Any, Any]:
            session = sessions.get(str(request.session_hash))
            if not session.busy:
                session.clear()
            return everything(session)

        set_here = [question, alone, system, sampled, temperature, top_p, penalty, length]
        shown = [*views.values(), *usable]
        asking = gr.on(
            [send.click, question.submit],
            answer,
            set_here,
            [*shown, question],
            concurrency_limit=MAX_CONCURRENT_QUESTIONS,
            show_progress="minimal",
            show_progress_on=question,
            api_visibility="private",
        )
        # Beside the queue: its stream of results gets lost if a question comes in the moment in which it is closed.
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        asking.then(look, outputs=shown, **at_once)  # only now does the browser take the next question
        stop.click(stop_it, **at_once)
        undo.click(undo_it, outputs=shown, **at_once)
        clear.click(clear_it, outputs=shown, **at_once)
        others = [column for name, (column, _) in sides.items() if name != chat]
        alone.change(lambda on: {one: gr.Column(visible=not on) for one in others}, alone, others, **at_once)
        sampled.change(lambda on: [gr.Slider(interactive=on)] * 2, sampled, [temperature, top_p], **at_once)
    page.queue(max_size=MAX_QUEUED_QUESTIONS)  # gradio's page says that it is busy when the line is full
    return page
