"""What tests of several folders share: the project's directory, texts, and a page in a browser."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TEXTS = [
    "从前有一座山，山上有一座小镇，镇上住着一位木匠。",
    "小镇的东边是一条河，河边种满了柳树，春天一到，满城都是柳絮。",
    "The old harbour lies two miles south of the town, and the ferry leaves at 9:30.",
    "She said: “Bring 12 apples and a loaf of bread.” Nobody answered.",
] * 20


def opened(browser, address, width, scheme="light"):
    """A page in a tab of its own, and two lists that grow: what it complains of, and what it asks for."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)
    return tab, problems, requests
