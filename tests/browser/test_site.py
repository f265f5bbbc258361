"""The documentation as a reader's browser shows it, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "site"
PAGES = sorted(
    str(path.relative_to(SITE))
    for path in SITE.rglob("*.html")
    if path.relative_to(SITE).parts[0] != "repository"
)


def is_narrow(visit) -> bool:
    return visit.page.viewport_size["width"] < 600


def test_a_reader_goes_from_the_first_page_to_another(visit):
    visit.open("index.html")
    if is_narrow(visit):
        visit.page.locator("label.md-header__button[for=__drawer]").click()
    visit.page.locator("nav.md-nav--primary a.md-nav__link", has_text="Quickstart").click()
    visit.page.wait_for_url("**/quickstart.html")
    assert visit.page.locator("h1").inner_text().startswith("Quickstart")
    visit.page.locator("article a", has_text="Rewards").first.click()
    visit.page.wait_for_url("**/guides/rewards.html")


def test_search_finds_a_word_and_opens_its_page(visit):
    visit.open("index.html")
    if is_narrow(visit):
        visit.page.locator("label.md-header__button[for=__search]").click()
    field = visit.page.locator("input.md-search__input")
    field.click()
    field.type("staleness")
    results = visit.page.locator("a.md-search-result__link")
    results.first.wait_for()
    found = [results.nth(i).get_attribute("href") for i in range(results.count())]
    assert any("concepts.html" in link or "asynchronous.html" in link for link in found), found
    assert not any("/repository/" in link for link in found), found
    visit.page.locator("a.md-search-result__link[href*='h=staleness']").first.click()
    visit.page.wait_for_url(re.compile(r"\?h=staleness"))
    visit.page.locator("article mark").first.wait_for()


@pytest.mark.parametrize("page", ["index.html", "guides/engine-mismatch.html", "repository/index.html"])
def test_formulas_are_drawn(visit, page):
    visit.open(page)
    drawn = visit.page.locator("div.arithmatex mjx-container svg")
    drawn.first.wait_for()
    box = drawn.first.bounding_box()
    assert box["width"] > 20 and box["height"] > 10
    formulas = visit.page.locator(".arithmatex")
    assert formulas.count() == visit.page.locator(".arithmatex mjx-container").count()
    assert visit.page.locator("mjx-merror").count() == 0
    assert "\\frac" not in visit.page.locator("article").inner_text()


@pytest.mark.parametrize(
    "page", ["index.html", "reference/flags.html", "reference/metrics.html", "concepts.html"]
)
def test_a_page_is_no_wider_than_the_window(visit, page):
    visit.open(page)
    assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_pictures_are_shown(visit):
    for page in ("concepts.html", "guides/planning.html", "repository/index.html"):
        visit.open(page)
        pictures = visit.page.locator("article img")
        assert pictures.count() > 0
        for i in range(pictures.count()):
            pictures.nth(i).scroll_into_view_if_needed()
            assert (
                pictures.nth(i).evaluate(
                    "async picture => { await picture.decode(); return picture.naturalWidth }"
                )
                > 100
            )


@pytest.mark.parametrize("visit", [(1280, 900)], indirect=True, ids=["desktop"])
def test_every_page_opens_without_a_fault(visit):
    assert len(PAGES) > 40
    for page in PAGES:
        if page != "404.html":  # whose links start at the root of the host
            visit.open(page)
            assert visit.page.locator("h1").count() == 1, page
    assert not visit.faults


@pytest.mark.parametrize("visit", [(1280, 900)], indirect=True, ids=["desktop"])
def test_a_request_to_another_host_is_noticed(visit):
    visit.open("index.html")
    visit.page.evaluate("fetch('http://another.invalid/').catch(() => 0)")
    assert any("another.invalid" in fault for fault in visit.faults)
    visit.faults.clear()
