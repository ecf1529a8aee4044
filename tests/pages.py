"""The text, tags and data of a report page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ssl_c2f.report import write_page

VOID = {"meta", "link", "input", "img"}


class Page(HTMLParser):
    """The visible text, tags and links of a page; fails if a tag is not closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.addresses: list[str | None] = []
        self.open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + " "

    @property
    def data(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id=data>(.*?)</script>', self.source, re.DOTALL)
        assert found
        return json.loads(found[1])  # type: ignore[no-any-return]


def page_of(*runs: Path) -> Page:
    """The page about these runs."""
    return Page(write_page(runs, runs[0].parent / "page.html"))
