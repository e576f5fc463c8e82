"""The chat page in a real browser."""

import base64
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from llmtuner.chat import web
from tests.chat import Clock, need_gradio
from tests.helpers import ROOT

QUESTION = "ホタルについて、知っていることを聞かせてください。"
EXAMPLES = [
    "フィンの趣味を知りたいのですが。",
    "你知道<b>泼水会</b>有什么必备的美食吗？",
    "What is the habitat of the bird?",
]
PASSWORD = "ホタルの宿 1999"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")


class Running:
    """A page that is being served in a thread."""

    def __init__(self, sessions, host="127.0.0.1", password=None, examples=()):
        self.sessions = sessions
        self.listener = web.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        page = web.build_page(sessions, {"do_sample": False}, 200, examples)
        self.server = web.server(page, host, password)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)
        self.thread.start()

    def status(self, path, method="GET", **headers):
        """The HTTP status of a request."""
        data = b"{}" if method == "POST" else None
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    def close(self):
        self.sessions.stop()
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()


@pytest.fixture(scope="module")
def models(tiny_model_dir):
    """A base and a chat model that talk slowly and without an end."""
    need_gradio()
    from llmtuner.data.template import Template
    from llmtuner.model.loading import load_for_evaluation

    loaded = {name: load_for_evaluation(tiny_model_dir) for name in ("base", "chat")}
    for model, tokenizer in loaded.values():
        stop_token_ids = Template.from_tokenizer(tokenizer).stop_token_ids

        def talk_slowly(module, args, output, stop_token_ids=stop_token_ids):
            time.sleep(0.03)
            output.logits[..., stop_token_ids] = -1e9

        model.register_forward_hook(talk_slowly)
    return loaded


@pytest.fixture(scope="module")
def running(models):
    page = Running(web.SessionStore(models), examples=EXAMPLES)
    yield page
    page.close()


@pytest.fixture(scope="module")
def phone(browser):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    yield context
    context.close()


@pytest.fixture
def new_tab(running, phone):
    """Opens tabs; whatever a test does there, nothing may be fetched from elsewhere, refused, or go wrong."""
    tabs, problems = [], []

    def note_response(response):
        if not response.url.startswith(f"http://127.0.0.1:{running.port}/") or response.status >= 400:
            problems.append(f"{response.status} {response.url}")

    def note_request(request):
        if not request.url.startswith((f"http://127.0.0.1:{running.port}/", "data:")):
            problems.append(request.url)

    def open_tab():
        tab = phone.new_page()
        tabs.append(tab)
        tab.set_default_timeout(15_000)
        tab.on("request", note_request)
        tab.on("response", note_response)
        tab.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        tab.goto(f"http://127.0.0.1:{running.port}/")
        for part in (box(tab), *(tab.get_by_role("button", name=name, exact=True) for name in ("Send", *EXAMPLES))):
            part.wait_for()  # the code of each kind of component is fetched apart, so that any may come last
        return tab

    yield open_tab
    for tab in tabs:
        tab.close()
    assert problems == []


def box(tab):
    return tab.get_by_placeholder("Ask in")


def press(tab, name):
    tab.get_by_role("button", name=name, exact=True).click()


def wait_until(tab, condition):
    tab.wait_for_function(condition, timeout=15_000)


def wait_for_text(tab, longer_than=0, sides=("base", "chat")):
    """Waits until all sides show an answer that is coming and longer than so many characters."""
    for side in sides:
        wait_until(tab, f"(document.querySelector('#{side} .streaming')?.textContent.length ?? 0) > {longer_than}")


def wait_for_end(tab):
    wait_until(tab, "!document.querySelector('.streaming') && document.querySelector('.cost')")
    tab.get_by_role("button", name="Stop", exact=True).and_(tab.locator(":disabled")).wait_for()
    tab.get_by_role("button", name="Send", exact=True).and_(tab.locator(":enabled")).wait_for()


def answers(tab, side):
    return tab.locator(f"#{side} .answer").all_text_contents()


def stop_answer(tab):
    press(tab, "Stop")
    wait_for_end(tab)


def ask_and_stop(tab, question):
    box(tab).fill(question)
    box(tab).press("Enter")
    wait_for_text(tab)
    stop_answer(tab)


def newest(running):
    return list(running.sessions._all.values())[-1]


def test_two_models_answer_at_the_same_time_until_they_are_stopped(new_tab, running):
    tab = new_tab()
    box(tab).type(QUESTION)
    box(tab).press("Enter")
    wait_for_text(tab, 0)
    first = [len(answers(tab, side)[0]) for side in ("base", "chat")]
    wait_for_text(tab, max(first))
    assert box(tab).input_value() == ""
    box(tab).fill("次の質問")  # can be written meanwhile
    stop_answer(tab)
    assert not newest(running).busy
    for side in ("base", "chat"):
        assert "stopped" in tab.locator(f"#{side} .cost").text_content()
        assert len(answers(tab, side)[0]) > max(first)
        assert tab.locator(f"#{side} .question").all_text_contents() == [QUESTION]
    assert box(tab).input_value() == "次の質問"


def test_an_example_is_asked_by_a_click_and_leaves_what_is_being_written(new_tab):
    tab = new_tab()
    chips = tab.locator(".examples button")
    assert [text.strip() for text in chips.all_text_contents()] == EXAMPLES
    box(tab).fill("書きかけ")
    chips.nth(1).click()
    wait_for_text(tab)
    assert chips.nth(0).is_disabled()
    stop_answer(tab)
    for side in ("base", "chat"):
        assert tab.locator(f"#{side} .question").all_text_contents() == [EXAMPLES[1]]
    assert box(tab).input_value() == "書きかけ"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_tokens_of_an_answer_are_shown_below_it(new_tab, models):
    tab = new_tab()
    ask_and_stop(tab, QUESTION)
    (said,) = answers(tab, "chat")
    pieces = tab.locator("#chat .tokens span").all_text_contents()
    assert pieces == web.display_ids(models["chat"][1], web.encode(models["chat"][1], said))
    assert len(pieces) > 2
    colours = [
        tab.locator("#chat .tokens span").nth(index).evaluate("one => getComputedStyle(one).backgroundColor")
        for index in range(3)
    ]
    assert colours[0] == colours[2] != colours[1]
    cost = tab.locator("#chat .cost").text_content()
    assert re.fullmatch(rf"{len(pieces)} tokens · {len(said)} characters · [\d.]+ tokens/s · stopped", cost)


def test_undo_and_clear(new_tab):
    tab = new_tab()
    for question in ("一つ目", "二つ目", "三つ目"):
        ask_and_stop(tab, question)
    press(tab, "Undo")
    wait_until(tab, "document.querySelectorAll('#chat .question').length == 2")
    for side in ("base", "chat"):
        assert tab.locator(f"#{side} .question").all_text_contents() == ["一つ目", "二つ目"]
    press(tab, "Clear")
    wait_until(tab, "document.querySelectorAll('.question').length == 0")
    press(tab, "Undo")  # nothing to undo
    ask_and_stop(tab, "四つ目")
    assert tab.locator("#base .question").all_text_contents() == ["四つ目"]


def test_what_looks_like_html_is_text(new_tab):
    tab = new_tab()
    question = "<img src=x onerror=alert(1)><script>alert(2)</script> **b** $x$ ${alert(3)} {{value}} `何` \\ &amp;"
    ask_and_stop(tab, question)
    assert tab.locator("#chat .question").all_text_contents() == [question]
    assert tab.locator(".dialogue img, .dialogue script, .dialogue strong").count() == 0


def test_show_escapes_answers_and_tokens():
    bad = "<script>alert(1)</script>"
    finished, coming = web.StreamedAnswer(f"{bad}1", [f"{bad}2"]), web.StreamedAnswer(f"{bad}3")
    shown = web.render_html(
        f"{bad}4", [web.Turn(f"{bad}5", {f"{bad}4": finished}, {}), web.Turn("", {f"{bad}4": coming}, {})]
    )
    assert "<script" not in shown
    assert all(f"&lt;/script&gt;{number}" in shown for number in range(1, 6))


def test_tabs_do_not_share_a_dialogue_and_are_answered_at_the_same_time(new_tab):
    tabs = new_tab(), new_tab()
    for tab, question in zip(tabs, ("一つ目", "二つ目"), strict=True):
        box(tab).fill(question)
        press(tab, "Send")
    for tab in tabs:
        wait_for_text(tab)
    stop_answer(tabs[0])
    wait_for_text(tabs[1], len(answers(tabs[1], "chat")[0]))  # goes on
    stop_answer(tabs[1])
    assert [tab.locator("#chat .question").all_text_contents() for tab in tabs] == [["一つ目"], ["二つ目"]]


def test_a_question_that_is_too_long_is_given_back(new_tab):
    tab = new_tab()
    ask_and_stop(tab, QUESTION)
    said = answers(tab, "chat")
    box(tab).fill(QUESTION * 20)
    box(tab).press("Enter")
    tab.get_by_text("base: the dialogue with this question has").wait_for()
    wait_for_end(tab)
    assert box(tab).input_value() == QUESTION * 20
    assert answers(tab, "chat") == said
    ask_and_stop(tab, "短い質問")
    assert len(answers(tab, "chat")) == 2


def test_the_chat_model_alone_with_other_settings(new_tab, running):
    tab = new_tab()
    ask_and_stop(tab, "二人へ")
    tab.get_by_text("Settings").click()
    tab.get_by_label("Ask only the chat model").check()
    tab.locator("#base").wait_for(state="hidden")
    tab.get_by_label("Sample").check()
    tab.get_by_label("System message").fill("簡潔に。")
    for name, value in {"Temperature": "2", "Max new tokens": "5"}.items():
        tab.get_by_label(f"number input for {name}").fill(value)
        tab.get_by_label(f"number input for {name}").press("Tab")
    box(tab).fill("一人へ")
    press(tab, "Send")
    wait_until(tab, "document.querySelectorAll('#chat .cost').length == 2")
    wait_for_end(tab)
    session = newest(running)
    assert [list(turn.answers) for turn in session.turns] == [["base", "chat"], ["chat"]]
    assert session.chats["chat"].system == "簡潔に。"
    assert "stopped" not in tab.locator("#chat .cost").last.text_content()
    press(tab, "Undo")
    wait_until(tab, "document.querySelectorAll('#chat .question').length == 1")
    assert [len(session.chats[name].messages) for name in ("base", "chat")] == [2, 2]


def test_closing_the_tab_stops_its_answer(new_tab, running):
    tab = new_tab()
    box(tab).fill(QUESTION)
    box(tab).press("Enter")
    wait_for_text(tab)
    session = newest(running)
    tab.close()
    end = time.perf_counter() + 15
    while session.busy and time.perf_counter() < end:
        time.sleep(0.02)
    assert not session.busy
    assert session.turns[-1].answers["chat"].stopped


def test_a_model_that_fails_leaves_the_question_and_the_dialogue(new_tab, running, models, monkeypatch, capfd):
    tab = new_tab()
    ask_and_stop(tab, "一つ目")

    def fail(*_, **__):
        raise RuntimeError("out of <b>memory")

    monkeypatch.setattr(models["base"][0], "generate", fail)
    box(tab).fill("二つ目")
    computed = []
    hook = models["chat"][0].register_forward_hook(lambda *_: computed.append(1))
    box(tab).press("Enter")
    tab.get_by_text("out of <b>memory").wait_for()
    wait_for_end(tab)
    hook.remove()
    assert len(computed) < 150  # the other model, whose answer would be forgotten, does not go on for 200 tokens
    assert box(tab).input_value() == "二つ目"
    session = newest(running)
    assert [len(session.chats[name].messages) for name in ("base", "chat")] == [2, 2]
    assert len(session.turns) == 1
    assert "RuntimeError" in capfd.readouterr().err


def test_only_so_many_sessions_are_kept(models, monkeypatch):
    monkeypatch.setattr(web, "MAX_SESSIONS", 2)
    sessions = web.SessionStore(models)
    first, second = sessions.get("1"), sessions.get("2")
    assert sessions.get("1") is first
    sessions.get("3")
    assert sessions.get("1") is first
    assert sessions.get("2") is not second


@pytest.fixture(scope="module")
def locked(models):
    page = Running(web.SessionStore(models), host="0.0.0.0", password=PASSWORD)
    yield page
    page.close()


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_every_route_needs_the_password(locked):
    def paths(routes):
        for route in routes:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            yield from paths(inner) if inner else [route.path]

    found = {re.sub(r"\{[^}]*\}", "x", path) for path in paths(locked.server.config.app.app.routes)}
    assert {"/config", "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/cancel", "/login"} <= found
    found |= {"/", "/assets/x.js", "/theme.css", "/gradio_api/file=/etc/passwd", "/docs", "/openapi.json"}
    statuses = {(path, method): locked.status(path, method) for path in sorted(found) for method in ("GET", "POST")}
    assert {path for path, status in statuses.items() if status != 401} == set()


def test_only_the_right_password_is_right(locked, monkeypatch):
    monkeypatch.setattr(locked.server.config.app, "throttle", web.LoginThrottle(itertools.count(step=1000).__next__))
    assert locked.status("/config", Authorization=basic("chat", PASSWORD)) == 200
    assert locked.status("/", Authorization=basic("chat", PASSWORD), Host="any.example") == 200
    wrong = [("chat", PASSWORD[:-1]), ("chat", PASSWORD + "0"), ("chat", ""), ("", PASSWORD), ("admin", PASSWORD)]
    for user, password in wrong:
        assert locked.status("/config", Authorization=basic(user, password)) == 401
    for header in ("", "Basic", "Basic ****", "Bearer x", basic("chat", PASSWORD).lower()):
        assert locked.status("/config", Authorization=header) == 401


def test_wrong_passwords_are_slowed_down_and_the_right_one_is_not_locked_out_for_long(locked, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(locked.server.config.app, "throttle", web.LoginThrottle(clock))
    right = basic("chat", PASSWORD)

    def guess(number):
        return locked.status("/config", Authorization=basic("chat", f"guess {number}"))

    assert [guess(number) for number in range(web.FREE_ATTEMPTS)] == [401] * web.FREE_ATTEMPTS
    assert guess("x") == 429  # not looked at, and neither is the right one
    assert locked.status("/config", Authorization=right) == 429
    assert locked.status("/config") == 401  # no password is no wrong password
    looked_at = 0
    for clock.now in range(1, 3601):
        looked_at += guess(f"{clock.now}") == 401
    assert looked_at <= 3600 / web.MAX_DELAY + 4
    clock.now += web.MAX_DELAY
    assert locked.status("/config", Authorization=right) == 200
    assert locked.status("/config", Authorization=right) == 200


def test_refusal_after_wrong_passwords_says_when_to_try_again(locked, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(locked.server.config.app, "throttle", web.LoginThrottle(clock))
    for number in range(20):
        locked.status("/config", Authorization=f"Basic {number}")
        clock.now += 7.0
    locked.status("/config", Authorization="Basic last")
    url = f"http://127.0.0.1:{locked.port}/config"
    request = urllib.request.Request(url, headers={"Authorization": basic("chat", PASSWORD)})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.headers["Retry-After"].isdigit()
    assert "Too many wrong passwords" in refused.value.read().decode()


def test_tab_that_keeps_an_old_password_is_no_guesser():
    throttle = web.LoginThrottle(Clock())
    for _ in range(50):
        throttle.record_failure("10.0.0.1", b"old password")
    assert throttle.delay("10.0.0.1") == 0


def test_address_in_a_header_is_not_believed(locked, monkeypatch):
    monkeypatch.setattr(locked.server.config.app, "throttle", web.LoginThrottle(Clock()))
    for number in range(web.FREE_ATTEMPTS):
        locked.status("/config", Authorization=f"Basic {number}", X_Forwarded_For=f"10.0.0.{number}")
    assert locked.status("/config", Authorization="Basic x", X_Forwarded_For="10.0.0.9") == 429


def test_line_of_questions_is_bounded(models, monkeypatch):
    """Who comes when it is full is told so at once, and is not kept waiting."""
    monkeypatch.setattr(web, "MAX_QUEUED_QUESTIONS", 3)
    page = Running(web.SessionStore(models))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page.port}/config", timeout=10) as response:
            [asking] = [one for one in json.load(response)["dependencies"] if one["queue"]]

        def ask(number):
            body = {"data": [QUESTION, False, "", False, 1, 1, 1, 200], "fn_index": asking["id"]}
            body = json.dumps({**body, "session_hash": f"tab{number}"}).encode()
            url, kind = f"http://127.0.0.1:{page.port}/gradio_api/queue/join", {"Content-Type": "application/json"}
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=10) as response:
                    return response.status
            except urllib.error.HTTPError as error:
                return error.code

        statuses = [ask(number) for number in range(web.MAX_CONCURRENT_QUESTIONS + 12)]
        assert statuses[0] == 200
        assert statuses[-1] == 503
        assert statuses.count(200) <= web.MAX_CONCURRENT_QUESTIONS + web.MAX_QUEUED_QUESTIONS
    finally:
        page.close()


def test_the_browser_asks_for_the_password_and_the_page_works_with_it(locked, browser):
    context = browser.new_context(http_credentials={"username": "chat", "password": PASSWORD})
    tab = context.new_page()
    tab.set_default_timeout(15_000)
    tab.goto(f"http://127.0.0.1:{locked.port}/")
    ask_and_stop(tab, QUESTION)
    assert tab.locator("#chat .question").all_text_contents() == [QUESTION]
    context.close()


def test_other_sites_cannot_use_the_page(running):
    host = f"127.0.0.1:{running.port}"
    assert running.status("/config") == 200
    assert running.status("/config", Host=f"localhost:{running.port}") == 200
    assert running.status("/config", Host="[::1]:8888") == 200  # as through a tunnel
    assert running.status("/config", Origin=f"http://{host}") == 200
    for name in ("evil.example", f"evil.example:{running.port}", "127.0.0.1.evil.example", "0.0.0.0", "[", ""):
        assert running.status("/config", Host=name) == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{running.port}", "http://["):
        assert running.status("/config", Origin=origin) == 403
        assert running.status("/gradio_api/queue/join", "POST", Origin=origin) == 403


def test_files_and_other_routes_of_gradio_are_closed(running):
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/proxy=http://x/"):
        assert running.status(path) == 404
    for path in ("/gradio_api/upload", "/gradio_api/cancel", "/gradio_api/call/answer", "/login"):
        assert running.status(path, "POST") == 404


def test_the_page_cannot_be_framed_or_fetch_from_elsewhere(running):
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/", timeout=10) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy


def test_ctrl_c_ends_the_page_quietly(tiny_model_dir):
    need_gradio()
    code = (
        "import sys; from pathlib import Path; from llmtuner.chat.web import serve; from llmtuner.console import run_cli;"
        "run_cli(lambda: serve({'chat': Path(sys.argv[1])}, 10, port=0))"
    )
    command = [sys.executable, "-c", code, str(tiny_model_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"the chat page is at (http://127\.0\.0\.1:\d+) \(Ctrl-C to stop\)\n", line)[1]
            with urllib.request.urlopen(address, timeout=20) as response:
                assert b"gradio" in response.read()
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out, error) == (0, "", "")
