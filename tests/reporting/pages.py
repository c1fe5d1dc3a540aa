"""A written page taken apart, for the tests that read it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "input", "br", "img", "wbr"}


class Page(HTMLParser):
    """A page as a tree of (tag, attributes, text, children); complains of unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(html)
        assert not self._open, f"not closed: {[e['tag'] for e in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self._open]}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1]["tag"] == tag, f"</{tag}> closes <{self._open[-1]['tag']}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def all(self, tag: str, class_: str | None = None) -> list[dict[str, Any]]:
        return [e for e in self.elements if e["tag"] == tag
                and (class_ is None or class_ in (e["attrs"].get("class") or "").split())]

    def text(self, tag: str, class_: str | None = None) -> list[str]:
        return [" ".join(e["text"].split()) for e in self.all(tag, class_)]


def table(page: Page, caption: str) -> list[list[str]]:
    """The body rows of the table whose caption starts so."""
    (inner,) = [html for html in re.findall(r"<table[^>]*>(.*?)</table>", page.html, re.S)
                if re.search(r"<caption>\s*" + re.escape(caption), html)]
    body = inner.partition("<tbody>")[2]
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.S)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S) for line in lines]
    return [[" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in row] for row in rows]
