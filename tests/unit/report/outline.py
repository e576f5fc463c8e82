"""What must hold for a page whatever is on it, and its text as a person reads it."""

import re
from html.parser import HTMLParser


class Outline(HTMLParser):
    """What must hold for a page whatever is on it."""

    VOID = ("meta", "wbr", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.ids, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_outline(text):
    outline = Outline(text)
    assert outline.headings[0] == 1
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in outline.tags
    assert outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert len(set(outline.ids)) == len(outline.ids)
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes
        assert re.match("#|$", attributes.get("href", attributes.get("xlink:href", "")))
        assert tag != "th" or attributes.get("scope") in ("col", "row", "rowgroup")
    for target in re.findall(r'<a href="#([^"]+)"', text):
        assert target in outline.ids
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert not re.search(r"@import|url\(", style)
    return outline


def words(text):
    """The page as a person reads it: without tags, on one line."""
    body = text[text.index("<body>") :]
    return re.sub(r"\s+", " ", re.sub(r"<(?!script>|/script>)[^>]*>", "", body)).replace("&nbsp;", " ")
