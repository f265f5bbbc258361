"""report.html in a browser: it asks nobody, nothing runs in it, and a narrow screen and paper hold it."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_vespo.observability.html_report import write_report
from tests.support.finished_runs import whole_run


@pytest.fixture
def report(tmp_path):
    """The address of the report of a run with a hostile response."""
    write_report(whole_run(tmp_path / "a run with a long name and <b>markup</b>"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = "a%20run%20with%20a%20long%20name%20and%20%3Cb%3Emarkup%3C/b%3E"
    yield f"http://127.0.0.1:{server.server_port}/{name}/report.html"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_is_read(open_tab, report, width, scheme):
    visit = open_tab("", width, 900)
    page, requests = visit.page, []
    page.on("request", lambda request: requests.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.goto(report, wait_until="load")
    assert requests == [report]
    assert page.title().startswith("Run ")
    assert "The run has finished. 40 of 40 optimizer steps are done." in page.inner_text("body")
    # nothing is wider than the screen
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("figure svg").count() == 8
    assert page.locator("#alarms").inner_text().count("truncated responses") == 1
    # the style is the one that the page's policy allows, and text differs from its background
    ink, back = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    assert (ink, back) == {
        "light": ("rgb(29, 36, 48)", "rgb(255, 255, 255)"),
        "dark": ("rgb(228, 232, 238)", "rgb(18, 22, 28)"),
    }[scheme]
    # a curve is a line of the page's colours, whose points have titles
    curve = page.locator("path.curve.c1").first
    assert curve.evaluate("one => getComputedStyle(one).fill") == "none"
    titles = page.locator(".hit title").all_text_contents()
    assert any("step 20" in title and "held-out: 40%" in title for title in titles)


def test_a_hostile_response_stays_text(open_tab, report):
    page = open_tab("").page
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(report, wait_until="load")
    response = page.locator(".response pre").last.inner_text()
    assert "<script>document.title='hacked'</script><img src=x onerror=alert(1)>" in response
    assert "</pre></body></html>" in response and "&lt;b&gt;" in response and "שלום" in response
    assert r"lone \ud800 nul \x00" in response
    assert page.locator("img, script, iframe").count() == 0
    assert page.title() != "hacked" and not dialogs
    # what overrides the direction of text ends with its box
    assert (
        page.locator(".response pre").last.evaluate("one => getComputedStyle(one).unicodeBidi") == "plaintext"
    )


def test_a_report_is_printed(open_tab, report):
    page = open_tab("").page
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(report, wait_until="load")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    assert page.pdf(format="A4").startswith(b"%PDF")
