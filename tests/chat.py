"""What tests of the chat page share: a page that runs in a process of its own."""

import pytest


def need_gradio():
    pytest.importorskip("gradio", reason="gradio is not installed")


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self):
        return self.now
