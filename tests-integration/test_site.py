"""The check of the built documentation site, on toy sites: what is broken is found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("site_check", ROOT / ".ci" / "site.py")
site_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_check)


@pytest.fixture
def site(tmp_path):
    """A site of two pages in which everything is right."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text('<a href="sub/page.html#here">x</a><img src="a.png">')
    (tmp_path / "sub" / "page.html").write_text('<h1 id="here">x</h1><a href="../index.html">y</a>')
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "search").mkdir()
    entries = [{"location": f"{name}/api.html"} for name in site_check.PACKAGES]
    (tmp_path / "search" / "search_index.json").write_text(json.dumps({"docs": entries}))
    return tmp_path


def test_a_whole_site_is_whole(site):
    assert site_check.broken(site) == [] and site_check.unknown_to_search(site) == []


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ('<a href="sub/page.html#gone">x</a>', "no such anchor"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
        ('<script src="https://example.org/x.js"></script>', "from another server"),
    ],
)
def test_what_is_broken_is_found(site, html, said):
    (site / "index.html").write_text(html)
    (found,) = site_check.broken(site)
    assert said in found and site_check.main(site) == 1


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ("<p>see :func:`diffmax_bisect`</p>", "shows ':func:`'"),
        ("<blockquote>&gt;&gt;&gt; f(1)</blockquote>", "shows '>>> '"),
        ("<p>Two:\n- one\n- two</p>", "shows '- one'"),
        (f"<pre><code>short\n{'x' * 111}</code></pre>", "111 characters, at most 110"),
    ],
)
def test_what_cannot_be_read_is_found(site, html, said):
    (site / "index.html").write_text(html)
    assert said in site_check.unreadable(site)[0] and site_check.main(site) == 1


@pytest.mark.parametrize("html", ["<pre><code>&gt;&gt;&gt; f(1)</code></pre>", "<p>a: `b`</p>"])
def test_an_example_in_a_code_block_is_readable(site, html):
    (site / "index.html").write_text(html)
    assert site_check.unreadable(site) == []


def test_an_external_link_is_no_load(site):
    (site / "index.html").write_text('<a href="https://example.org/">x</a>')
    assert site_check.broken(site) == []


def test_a_package_missing_from_the_search_is_found(site):
    (site / "search" / "search_index.json").write_text(json.dumps({"docs": []}))
    assert site_check.unknown_to_search(site) == list(site_check.PACKAGES)


def test_no_site_is_said(tmp_path, capsys):
    assert site_check.main(tmp_path) == 2 and "docs:build" in capsys.readouterr().out
