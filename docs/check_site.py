"""Checks the built site: `python docs/check_site.py site`. Exit code 1 and a line for each fault.

Every link and every resource of every page leads to a file of the site, every anchor to an element, and no
page loads anything from another host.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
NOT_LOADED = {"canonical", "prev", "next", "alternate", "edit"}


class Page(HTMLParser):
    """The links, resources and ids of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := values.get(name))}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and set((values.get("rel") or "").split()) & NOT_LOADED:
            return
        self.loads += [value for name, value in attrs if (tag, name) in LOADED and value]


def faults(site: Path) -> list[str]:
    """One line for each link or resource that leads nowhere, or to another host where it must not."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links start at the root of the host
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https", "mailto", "data") or parts.netloc:
                if target in page.loads and parts.scheme != "data":
                    found.append(f"{path.relative_to(site)}: loads {target}")
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not place.exists():
                found.append(f"{path.relative_to(site)}: {target} leads to no file")
                continue
            other = pages.get(site / place.relative_to(site.resolve()))
            if parts.fragment and other and unquote(parts.fragment) not in other.ids | {"__skip"}:
                found.append(f"{path.relative_to(site)}: {target} leads to no element")
    return found


if __name__ == "__main__":
    [site] = sys.argv[1:]
    lines = faults(Path(site))
    print("\n".join(lines) or f"{site}: all links lead somewhere, no page loads from another host")
    sys.exit(bool(lines))
