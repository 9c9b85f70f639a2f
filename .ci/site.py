#!/usr/bin/env python3
"""Check the built documentation site: `python .ci/site.py site`.

Every link and picture leads somewhere inside the site, every anchor exists, nothing is loaded from
another server, and the search index knows each package. No page shows markup as it stands in the
source, and no line of a code block is longer than the column of a desktop. With playwright and a
Chromium on this machine the pages are also opened in it: no script fails, the search finds what is
typed, no page is wider than a phone's screen, and no code block or table is cut off on a desktop.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGES = ("diffmax", "adasplash", "dsalt", "flashdiffusion", "difflayers")


# What a source may hold and a page must not: a role of Sphinx, a prompt outside of a code block, a
# list without an empty line above, which Markdown takes for a paragraph.
RAW = re.compile(r":(?:func|class|meth|mod|attr|data):`|>>> |^- \w.*", re.M)
# Characters that fit into a code block at 1280 pixels under docs/stylesheets/site.css.
LINE = 110
DESKTOP = {"width": 1280, "height": 800}


class Page(HTMLParser):
    """The links, the loaded files, the anchors, the prose and the code blocks of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.prose = self.code = ""
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_data(self, data):
        if "pre" in self._inside:
            self.code += data
        elif not {"script", "style"} & set(self._inside):
            self.prose += data

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("pre", "script", "style"):
            self._inside.append(tag)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in ("img", "script", "source") and values.get("src"):
            self.loads.append(values["src"])
        elif tag == "link" and values.get("rel") == "stylesheet":
            self.loads.append(values["href"])

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()
            self.code += "\n"


def pages_of(site: Path) -> list[Path]:
    """The pages that mkdocs made; a file that a page links to may be HTML too."""
    every = sorted(site.rglob("*.html"))
    return [p for p in every if p.name != "404.html" and p.relative_to(site).parts[0] != "files"]


def unreadable(site: Path) -> list[str]:
    """Raw markup in the prose of a page, lines of code that a desktop would cut off."""
    found = []
    for path in pages_of(site):
        page, here = Page(path), path.relative_to(site)
        found += [f"{here}: shows {raw!r}" for raw in RAW.findall(page.prose)]
        long = [line for line in page.code.splitlines() if len(line) > LINE]
        found += [f"{here}: {len(line)} characters, at most {LINE}: {line[:60]}" for line in long]
    return found


def broken(site: Path) -> list[str]:
    """What is wrong with the links of the site, a line each."""
    pages = {path: Page(path) for path in pages_of(site)}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in page.loads + page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads:
                    found.append(f"{here}: loads {link} from another server")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                found.append(f"{here}: {link} leads nowhere")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{here}: {link} has no such anchor")
    return found


def unknown_to_search(site: Path) -> list[str]:
    """Packages that the search index does not lead to."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = [entry["location"] for entry in index["docs"]]
    return [name for name in PACKAGES if not any(p.startswith(f"{name}/api") for p in places)]


PHONE = {"width": 390, "height": 844}
CUT_OFF = """() => {
  document.querySelectorAll('details').forEach(folded => folded.open = true);
  return [...document.querySelectorAll('.md-content pre, .md-content pre > code,' +
    ' .md-content .md-typeset__scrollwrap')]
    .filter(block => block.clientWidth && block.scrollWidth > block.clientWidth + 1)
    .map(block => block.innerText.trim().slice(0, 40))}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def in_browser(site: Path) -> list[str] | None:
    """What a reader with a phone or a desktop would see go wrong; None without a browser."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return None
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    found: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport=PHONE)
        tab.on("pageerror", lambda error: found.append(f"{tab.url}: {error}"))
        tab.on("response", lambda got: found.append(got.url) if got.status >= 400 else None)
        for path in pages_of(site):
            here = path.relative_to(site).as_posix()
            tab.set_viewport_size(PHONE)
            tab.goto(f"{address}/{here}")
            width = tab.evaluate("document.documentElement.scrollWidth")
            if width > PHONE["width"]:
                found.append(f"{here}: {width} pixels wide on a phone of {PHONE['width']}")
            tab.set_viewport_size(DESKTOP)
            for block in tab.evaluate(CUT_OFF):
                found.append(f"{here}: cut off on a desktop of {DESKTOP['width']}: {block!r}")
        tab.goto(f"{address}/index.html")
        tab.click("input.md-search__input")
        tab.keyboard.type("committor", delay=20)
        try:
            tab.wait_for_selector(
                "a.md-search-result__link[href*='flashdiffusion']", state="attached", timeout=60_000
            )
        except Exception as error:  # playwright's own class of time-outs
            found.append(f"searching for `committor` finds nothing: {str(error).splitlines()[0]}")
        browser.close()
    server.shutdown()
    return found


def main(site: Path) -> int:
    if not (site / "index.html").exists():
        print(f"`site` must be a built site, got {site}; build it with: hatch run docs:build")
        return 2
    wrong = broken(site) + unreadable(site)
    wrong += [f"search does not know {name}" for name in unknown_to_search(site)]
    opened = in_browser(site)
    wrong += opened or []
    print("\n".join(wrong) or f"{len(list(site.rglob('*.html')))} pages, no broken link")
    print("not opened in a browser: none here" if opened is None else "opened in Chromium")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "site")))
