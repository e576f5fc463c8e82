"""The chat page's server: passwords, throttling, sessions and ports."""

import re
import sys

import pytest

from llmtuner.chat import web
from llmtuner.console import UserError
from tests.chat import Clock, need_gradio

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")


def test_throttle_of_one_address():
    clock = Clock()
    throttle = web.LoginThrottle(clock)
    delays = []
    for number in range(12):
        throttle.record_failure("10.0.0.1", b"%d" % number)
        delays.append(throttle.delay("10.0.0.1"))
        clock.now += 100
    assert delays == [0, 0, 0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8]
    assert throttle.delay("10.0.0.2") == 0
    clock.now += web.RESET_AFTER
    throttle.record_failure("10.0.0.1", b"again")
    assert throttle.delay("10.0.0.1") == 0


def test_throttle_takes_an_ipv6_network_for_one_address():
    throttle = web.LoginThrottle(Clock())
    for number in range(5):
        throttle.record_failure(f"2001:db8::{number:x}", b"%d" % number)
    assert throttle.delay("2001:db8::ffff") > 0
    assert throttle.delay("2001:db8:0:1::1") == 0


def test_throttle_of_all_addresses_spares_those_that_know_the_password():
    clock = Clock()
    throttle = web.LoginThrottle(clock)
    throttle.record_success("10.0.0.1")
    for number in range(web.GLOBAL_ATTEMPTS):
        throttle.record_failure(f"10.1.0.{number}", b"guess")
    assert throttle.delay("10.2.0.1") == web.GLOBAL_PERIOD
    assert throttle.delay("10.0.0.1") == 0
    clock.now += web.GLOBAL_PERIOD
    assert throttle.delay("10.2.0.1") == 0


def test_throttle_remembers_only_so_many_addresses():
    throttle = web.LoginThrottle(Clock())
    for number in range(3 * web.MAX_ADDRESSES):
        throttle.record_failure(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", b"x" * 100_000)
        throttle.record_success(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(throttle._failed) == len(throttle._known) == web.MAX_ADDRESSES
    assert len(throttle._all) == web.GLOBAL_ATTEMPTS
    assert all(len(failed.header) <= web.MAX_HEADER_BYTES for failed in throttle._failed.values())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "", "example.org", "127.0.0.1.example.org"])
@pytest.mark.parametrize("password", [None, "", "7 chars"])
def test_others_can_reach_the_page_with_a_password_only(tmp_path, host, password):
    with pytest.raises(UserError, match="password of at least 8 characters"):
        web.serve({"chat": tmp_path}, 10, host=host, password=password)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "::1"])
def test_loopback_addresses(host):
    assert web.is_loopback(host)


def test_gradio_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install gradio==6\.31\.0"):
        web.serve({"chat": tmp_path}, 10)


def test_port_is_in_use(tmp_path):
    need_gradio()
    with web.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 .*--port"):
            web.serve({"chat": tmp_path}, 10, port=port)
    with pytest.raises(UserError, match="port 70000"):
        web.listen("127.0.0.1", 70000)
    with pytest.raises(UserError, match="port 80 of no such host"):
        web.listen("no such host", 80)


def test_directory_without_a_model(tmp_path):
    need_gradio()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        web.serve({"chat": tmp_path}, 10, port=0)
