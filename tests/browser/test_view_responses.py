"""The viewer's tabs Responses and Distributions in a browser, over the real server and the files of runs."""

import re
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from megatron_vespo.algorithms.diagnostics import effective_sample_share
from megatron_vespo.commands.view.kernel import Kernel
from megatron_vespo.data.step_records import FOLDER_NAME, read_step, record_path, write_step
from tests.support.step_records import random_step, write_steps
from tests.support.view_server import view_server

ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;"
STEPS = 6
NARROW = [
    "responses?run=tools",
    "responses?run=tools&open=5.2&token=4",
    "responses?run=tools&side=2.1",
    "distributions?run=tools&c1_positive=4",
]
REPAINT = """() => {
    const start = performance.now();
    document.querySelector("input[value=staleness]").click();
    document.body.offsetHeight;
    return performance.now() - start;
}"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """With tools and experts; without pi_old; of an earlier version; one whose texts are HTML."""
    folder = tmp_path_factory.mktemp("runs")
    write_steps(
        folder / "tools" / FOLDER_NAME, STEPS, groups=6, group_size=4, mean_length=90, with_experts=True
    )
    write_steps(folder / "taught" / FOLDER_NAME, 1, turns=False, with_advantages=True)
    write_steps(folder / "no-old" / FOLDER_NAME, 1, turns=False, with_old=False)
    (folder / "earlier").mkdir()
    (folder / "earlier" / "metrics.jsonl").write_text('{"step": 1, "time": 5.0, "policy/version": 1.0}\n')
    attack = random_step(1)
    for completion in attack.completions:
        object.__setattr__(completion.prompt, "text", ATTACK)
        completion.finish_reason = ATTACK
        completion.reward_parts = {ATTACK: 1.0}
    pieces = {token: ATTACK.encode() for token in attack.pieces}
    write_step(record_path(folder / "attack" / FOLDER_NAME, 1), replace(attack, pieces=pieces))
    grpo = random_step(1)
    settings = {**grpo.settings, "policy_loss": "grpo"}
    write_step(record_path(folder / "grpo" / FOLDER_NAME, 1), replace(grpo, settings=settings))
    return folder


@pytest.fixture(scope="module")
def server(runs, tmp_path_factory):
    with view_server(runs, cache=tmp_path_factory.mktemp("cache")) as server:
        yield server


@pytest.fixture
def page(open_tab, server):
    visit = open_tab(server.home)
    visit.page.goto(server.url)
    return visit.page


def show(page, server, tab: str, **params) -> None:
    query = "&".join(f"{name}={value}" for name, value in params.items())
    page.goto(f"{server.home}#{tab}?{query}")


def hash_of(page) -> dict[str, str]:
    query = urlsplit(page.url).fragment.partition("?")[2]
    return {name: values[0] for name, values in parse_qs(query).items()}


def until(page, condition) -> None:
    """Playwright's wait_for_function needs eval, which the page's policy forbids."""
    for _ in range(150):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not after 15 seconds: {page.url}")


def value(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def record_of(runs, run: str, step: int):
    return read_step(record_path(runs / run / FOLDER_NAME, step))


def first_column(page, column: int) -> list[str]:
    return page.locator(f"table.responses tbody td:nth-child({column})").all_inner_texts()


def sampled(record, index: int) -> slice:
    start = int(record.num_sampled[:index].sum())
    return slice(start, start + int(record.num_sampled[index]))


def test_filter_sort_and_pages_are_in_the_address(page, server, runs):
    show(page, server, "responses", run="tools")
    total = STEPS * 24
    page.get_by_text(f"{total} of {total} responses").wait_for()
    page.get_by_label("Sign of A").select_option("negative")
    page.get_by_label("Step to").fill("2")
    page.locator("[data-sort=log_w]").click()
    records = [record_of(runs, "tools", step) for step in (1, 2)]
    negative = np.concatenate([record.log_w[record.advantages < 0] for record in records])
    page.get_by_text(f"{len(negative)} of {total} responses").wait_for()
    page.locator("th[aria-sort=descending] [data-sort=log_w]").wait_for()
    shown = [value(text) for text in first_column(page, 7)]
    np.testing.assert_allclose(shown, np.sort(negative)[::-1][: len(shown)], rtol=1e-3, atol=1e-4)
    assert hash_of(page) == {"run": "tools", "sign": "negative", "step_max": "2", "sort": "-log_w"}
    page.reload()  # the address is the view
    page.get_by_text(f"{len(negative)} of {total} responses").wait_for()
    assert [value(text) for text in first_column(page, 7)] == shown
    page.get_by_role("button", name="Clear").click()
    page.get_by_text(f"{total} of {total} responses").wait_for()
    page.get_by_role("button", name="Last page").click()
    page.get_by_text("page 3 of 3").wait_for()
    assert page.locator("table.responses tbody tr").count() == total - 100


def test_search_finds_words_and_punctuation_is_no_syntax(page, server, runs):
    show(page, server, "responses", run="tools")
    search = page.get_by_label("Search in the text")
    search.fill('answer "')
    count = sum(
        bool(re.search(r"(?<![A-Za-z0-9])answer", record.text(one.token_ids), re.ASCII))
        for record in (record_of(runs, "tools", step) for step in range(1, STEPS + 1))
        for one in record.completions
    )
    status = page.locator(".responses p[role=status]")
    until(page, lambda: "144 of 144" not in status.inner_text())
    # accented letters beside a word are letters to SQLite
    assert abs(int(status.inner_text().split()[0]) - count) <= 2
    assert all("answer" in text.lower() for text in page.locator("td.preview").all_inner_texts())


def test_a_tokens_ratio_is_the_files_and_the_sum_ends_at_log_w(page, server, runs):
    record, step, index = record_of(runs, "tools", 5), 5, 2  # every third response has a tool's tokens
    completion = record.completions[index]
    assert completion.segments is not None
    show(page, server, "responses", run="tools")
    page.locator(f"[data-row='{step}.{index}'] td.preview a").click()
    assert value(page.locator("[data-fact=log-w]").inner_text()) == pytest.approx(
        record.log_w[index], rel=1e-3
    )
    assert value(page.locator("[data-fact=weight]").inner_text()) == pytest.approx(
        record.weight[index], rel=1e-3
    )
    mask, mine = completion.segments.mask(), sampled(record, index)
    pi, pi_old, mu = record.pi[mine], record.pi_old[mine], completion.log_probs
    tokens = np.flatnonzero(mask)
    for n in (0, 3, len(tokens) - 1):
        page.locator(f"[data-t='{tokens[n]}']").click()
        shown = {name: value(page.locator(f"[data-value={name}]").inner_text())
                 for name in ("ratio", "staleness", "mismatch", "log-w-so-far")}  # fmt: skip
        for name, expected in (("ratio", pi - mu), ("staleness", pi - pi_old), ("mismatch", pi_old - mu),
                               ("log-w-so-far", np.cumsum((pi - mu).astype(np.float64)))):  # fmt: skip
            assert shown[name] == pytest.approx(float(expected[n]), rel=2e-3, abs=2e-6), name
    # the sum ends at the trainer's number
    assert shown["log-w-so-far"] == pytest.approx(record.log_w[index], rel=1e-3, abs=1e-5)
    assert hash_of(page)["token"] == str(tokens[-1])


def test_colours_follow_the_ratio_and_the_chosen_part(page, server, runs):
    record, index = record_of(runs, "tools", 4), 0
    show(page, server, "responses", run="tools", open=f"4.{index}", scale="0.05")
    page.locator(".tokens").wait_for()
    for mode, values in (
        ("total", record.pi - np.concatenate([one.log_probs for one in record.completions])),
        ("staleness", record.pi - record.pi_old),
        ("experts", record.expert_differences.astype(float)),
    ):
        page.locator(f"input[name=color][value={mode}]").check()
        for n, expected in enumerate(values[sampled(record, index)][:8]):
            level = min(10, round(abs(float(expected)) / 0.05 * 10 + 1e-9))
            letter = "e" if mode == "experts" else "n" if expected < 0 else "p"
            classes = page.locator(f"[data-t='{n}']").get_attribute("class").split()
            found = [one for one in classes if re.fullmatch(r"[pne]\d+", one)]
            near = abs(abs(float(expected)) / 0.05 * 10 % 1 - 0.5) < 1e-3  # rounds either way
            assert near or found == ([f"{letter}{level}"] if level else []), (mode, n, expected)


def test_advantages_of_tokens_are_colours_and_numbers(page, server, runs):
    record, index = record_of(runs, "taught", 1), 1
    mine = record.advantages_per_token[sampled(record, index)]
    assert mine.min() < 0 < mine.max()
    show(page, server, "responses", run="taught", open=f"1.{index}", scale="2")
    page.locator("input[name=color][value=advantage]").check()
    page.get_by_text("pushed down").wait_for()
    for n in (int(mine.argmin()), int(mine.argmax())):
        token = page.locator(f"[data-t='{n}']")
        token.click()
        assert value(page.locator("[data-value=advantage]").inner_text()) == pytest.approx(mine[n], rel=2e-3)
        [letter] = re.findall(r"\b([pn])\d+\b", token.get_attribute("class"))
        assert letter == ("n" if mine[n] < 0 else "p")
    show(page, server, "responses", run="tools", open="4.0")
    missing = page.locator("input[name=color][value=advantage]")
    missing.wait_for()
    assert missing.is_disabled() and page.get_by_text("all tokens have the response's A").count() == 1


def test_given_tokens_have_no_ratio(page, server, runs):
    record = record_of(runs, "tools", 5)
    given = int(np.flatnonzero(~record.completions[2].segments.mask())[0])
    show(page, server, "responses", run="tools", open="5.2")
    token = page.locator(f"[data-t='{given}']")
    token.click()
    page.get_by_text("no log-prob, not trained").wait_for()
    assert not re.search(r"\b[pn]\d", token.get_attribute("class"))
    assert page.locator("[data-writer=tool]").count() == 1 and page.locator("[data-value=ratio]").count() == 0


def test_the_ten_decisive_tokens_jump_and_the_chart_follows(page, server, runs):
    record, index = record_of(runs, "tools", 3), 1
    mine = sampled(record, index)
    own = record.pi[mine] - record.completions[index].log_probs
    show(page, server, "responses", run="tools", open=f"3.{index}")
    buttons = page.locator("[data-jump]")
    buttons.first.wait_for()
    expected = np.argsort(-np.abs(own), kind="stable")[:10]
    assert buttons.count() == min(10, len(own))
    assert int(buttons.first.get_attribute("data-jump")) == expected[0]
    buttons.nth(3).click()
    assert page.locator(".tokens .current").get_attribute("data-t") == buttons.nth(3).get_attribute(
        "data-jump"
    )
    # the chart's legend has the sum at that token
    legend = page.locator(".running .u-legend .u-series").nth(1).locator(".u-value")
    assert value(legend.inner_text()) == pytest.approx(np.cumsum(own)[expected[3]], rel=2e-3, abs=1e-5)
    # and the other way: the pointer over the chart marks a token
    box = page.locator(".running .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + 20)
    until(page, lambda: page.locator(".tokens .current").get_attribute("data-t") == str(len(own) - 1))


def test_arrow_keys_move_from_token_to_token(page, server):
    show(page, server, "responses", run="tools", open="3.1")
    page.locator(".tokens").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".tokens .current").get_attribute("data-t") == "2"
    page.keyboard.press("Enter")
    assert hash_of(page)["token"] == "2"


def test_a_group_side_by_side(page, server, runs):
    record = record_of(runs, "tools", 2)
    show(page, server, "responses", run="tools", group="3", step_min="2", step_max="2")
    page.get_by_text("4 of 144").wait_for()
    page.locator("table.responses tbody tr").first.get_by_title("side by side").click()
    page.get_by_text("Step 2, group 3: 4 responses").wait_for()
    cards = page.locator(".card")
    assert cards.count() == 4
    for i, card in enumerate(cards.all()):
        cells = card.locator("td").all_inner_texts()
        assert value(cells[0]) == record.completions[12 + i].reward
        assert value(cells[2]) == pytest.approx(record.log_w[12 + i], rel=1e-3, abs=1e-6)
    cards.nth(1).get_by_role("link").click()
    page.locator(".tokens").wait_for()
    assert hash_of(page)["open"] == "2.13"
    page.go_back()
    page.get_by_text("Step 2, group 3: 4 responses").wait_for()


def test_text_is_never_html(page, server):
    show(page, server, "responses", run="attack")
    page.get_by_text("16 of 16").wait_for()
    assert ATTACK in page.locator("td.preview").first.text_content()
    for params in ({"open": "1.0"}, {"side": "1.0"}):
        show(page, server, "responses", run="attack", **params)
        page.locator(".prompt pre").first.wait_for()
        assert page.locator(".prompt pre").first.text_content() == ATTACK
        assert page.locator("main img, main script, main b").count() == 0
    page.wait_for_timeout(200)
    assert "owned" not in page.title()


def test_without_pi_old_the_parts_are_said_to_be_unknown(page, server, runs):
    record = record_of(runs, "no-old", 1)
    show(page, server, "responses", run="no-old", open="1.0")
    for mode in ("staleness", "mismatch", "experts"):
        assert page.locator(f"input[name=color][value={mode}]").is_disabled()
    page.locator("[data-t='0']").click()
    assert "unknown: pi_old" in page.locator("[data-value=staleness]").inner_text()
    expected = record.pi[0] - record.completions[0].log_probs[0]
    assert value(page.locator("[data-value=ratio]").inner_text()) == pytest.approx(float(expected), rel=2e-3)


def test_a_loss_without_phi_says_whose_phi_is_shown(page, server):
    show(page, server, "responses", run="grpo", open="1.0")
    page.get_by_text("The loss grpo has no φ").wait_for()
    show(page, server, "distributions", run="grpo")
    page.get_by_text("its weight is no φ").wait_for()


@pytest.mark.parametrize("tab", ["responses", "distributions"])
def test_a_run_without_records_says_how_to_record(page, server, tab):
    show(page, server, tab, run="earlier")
    page.get_by_text("--record-responses").wait_for()


def test_a_run_that_goes_on_gets_its_new_step(open_tab, tmp_path):
    run = tmp_path / "run"
    write_steps(run / FOLDER_NAME, 2)
    with view_server(run, cache=tmp_path / "cache") as server:
        visit = open_tab(server.home)
        visit.page.goto(server.url)
        show(visit.page, server, "responses")
        visit.page.get_by_text("32 of 32 responses").wait_for()
        write_step(record_path(run / FOLDER_NAME, 3), random_step(3))
        visit.page.get_by_text("48 of 48 responses").wait_for()
        assert first_column(visit.page, 1)[0] == "3"
        # a resumed run trains step 3 anew, and the last file is cut off
        write_step(record_path(run / FOLDER_NAME, 3), random_step(3, seed=5))
        record_path(run / FOLDER_NAME, 2).write_bytes(b"PK\x03\x04 cut off")
        visit.page.get_by_text("32 of 32 responses").wait_for()
        visit.page.get_by_text("1 damaged step files are left out").click()
        assert "step-000002.npz" in visit.page.locator(".damaged li").inner_text()


def test_distributions_and_what_if(page, server, runs):
    records = [record_of(runs, "tools", step) for step in range(1, STEPS + 1)]
    show(page, server, "distributions", run="tools")

    def cell(part: str, metric: str) -> str:
        return page.locator(f"[data-part={part}] [data-metric={metric}]").inner_text()

    page.locator("[data-part=all]").wait_for()
    weights = np.concatenate([record.weight for record in records])
    assert value(cell("all", "ess")) == pytest.approx(effective_sample_share(weights), abs=1e-3)
    page.get_by_label("c1, A ≥ 0").fill("5")
    page.get_by_label("N, mini-batches").fill("2")
    page.get_by_text("recorded → what if").wait_for()
    until(page, lambda: cell("all", "count").endswith("→ 96"))
    kept = [record for record in records if record.mini_batch < 2]
    log_w, advantages = (
        np.concatenate([getattr(one, name) for one in kept]) for name in ("log_w", "advantages")
    )
    phi = Kernel((5.0, 3.0), (3.0, 2.0)).phi(log_w, advantages)
    before, after = cell("all", "mean").split(" → ")
    assert value(before) == pytest.approx(weights.mean(), abs=1e-3)
    assert value(after) == pytest.approx(phi.mean(), abs=1e-3)
    assert value(cell("positive", "ess").split(" → ")[1]) == pytest.approx(
        effective_sample_share(phi[advantages > 0]), abs=1e-3
    )
    assert hash_of(page) == {"run": "tools", "c1_positive": "5", "mini_batches": "2"}
    page.get_by_role("button", name="As recorded").click()
    until(page, lambda: "→ what if" not in page.locator("table.summary").inner_text())
    assert hash_of(page) == {"run": "tools"}


@pytest.mark.parametrize("hash_", NARROW, ids=["table", "response", "group", "distributions"])
def test_a_narrow_page_does_not_scroll_sideways(open_tab, server, hash_):
    visit = open_tab(server.home, 390, 844)
    visit.page.goto(server.url)
    visit.page.goto(f"{server.home}#{hash_}")
    visit.page.locator("main table, main dl").first.wait_for()
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_response_of_16k_tokens_opens_fast(open_tab, tmp_path):
    run = tmp_path / "run"
    write_steps(
        run / FOLDER_NAME, 1, groups=1, group_size=2, mean_length=100_000, max_length=16_384, turns=False
    )
    longest = int(np.argmax(read_step(record_path(run / FOLDER_NAME, 1)).num_sampled))
    with view_server(run, cache=tmp_path / "cache") as server:
        page = open_tab(server.home).page
        page.goto(server.url)
        show(page, server, "responses", open=f"1.{longest}")
        page.locator("[data-jump]").first.wait_for()
        took = page.evaluate("performance.now()")
        tokens = page.locator(".block-text [data-t]").count()
        paint = page.evaluate(REPAINT)
    assert tokens == 16_384
    assert took < 10_000 and paint < 2_000, (took, paint)
