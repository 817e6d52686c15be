"""The page of `moonlight report` in a browser: its content, its speed, and that it sends no requests."""

import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from moonlight.report.write import report
from tests.support.histories import Shape, write_history

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MAX_SECONDS, MAX_BYTES = 2.0, 5e6

pytestmark = pytest.mark.skipif(
    not CHROMIUM and "MOONLIGHT_NEEDS_BROWSER" not in os.environ,
    reason="needs Chromium on the path, to open the page of a report; .ci/run installs it and skips nothing",
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """Folder and page of a run of 1,500 steps with many faults."""
    folder = write_history(tmp_path_factory.mktemp("page") / "run", Shape(steps=1500, layers=4, trouble=True))
    return folder, report([folder], None)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of three runs of different lengths."""
    place = tmp_path_factory.mktemp("compared")
    shapes = {"first": Shape(steps=900), "second": Shape(steps=600, seed=3, trouble=True), "short": Shape(steps=50)}
    return report([write_history(place / name, shape) for name, shape in shapes.items()], place / "page.html")


@contextmanager
def opened(browser, path, width=1280, touch=False, **options):
    """Yield the page once all visible charts are drawn. Fail if the page logs to the console or sends a request."""
    messages, requests = [], []
    context = browser.new_context(viewport={"width": width, "height": 860}, has_touch=touch, **options)
    page = context.new_page()
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    started = time.monotonic()
    page.goto(Path(path).as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=10_000)
    page.seconds = time.monotonic() - started
    yield page
    settle(page)
    context.close()
    assert not messages
    assert [url for url in requests if not url.startswith("data:")] == [Path(path).as_uri()]


def settle(page):
    """Wait until all pending drawing is done."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def chart(page, title):
    """Return the figure with this title, scrolled into view and drawn."""
    figure = page.locator("figure", has=page.get_by_role("heading", name=title, exact=True)).first
    figure.evaluate("(element) => element.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(100)
    settle(page)
    return figure


def point(page, figure, across, down=0.5):
    """Move the mouse to a point of the plot area, given as fractions of its size. Return the coordinates."""
    box = figure.locator(".plot").bounding_box()
    x = box["x"] + 50 + across * (box["width"] - 60)
    y = box["y"] + 12 + down * (box["height"] - 34)
    page.mouse.move(x, y)
    return x, y


def steps_in(text):
    first, last = re.search(r"steps? ([\d,]+)(?:–([\d,]+))?", text).groups()
    number = int(first.replace(",", ""))
    return number, int(last.replace(",", "")) if last else number


def swipe(page, start, end):
    """Swipe with one finger over the screen."""
    session = page.context.new_cdp_session(page)
    for fraction in np.linspace(0, 1, 15):
        x, y = (float(a + fraction * (b - a)) for a, b in zip(start, end, strict=True))
        kind = "touchMove" if fraction else "touchStart"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        page.wait_for_timeout(16)
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_timeout(300)


def ranges(page):
    """Return the x ranges of the charts drawn so far."""
    labels = page.locator("canvas[aria-label]").evaluate_all("(them) => them.map((it) => it.ariaLabel)")
    return {label.split(", ", 1)[1] for label in labels}


def test_readouts_equal_the_data(browser, troubled):
    folder, path = troubled
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    with opened(browser, path) as page:
        figure = chart(page, "Loss")
        assert "last values" in figure.inner_text()
        for across in (0.3, 0.55, 0.9):
            point(page, figure, across)
            first, last = steps_in(figure.locator(".where").inner_text())
            assert 1500 * across - 30 < first < 1500 * across + 30
            losses = [rows[step - 1]["loss/train"] for step in range(first, last + 1)]
            shown = float(figure.locator(".entry b").first.inner_text())
            assert shown == pytest.approx(np.mean([loss for loss in losses if loss]), rel=6e-4)
            assert page.locator(".cross:visible").count() > 1
        point(page, chart(page, "Learning rate"), 0.5)
        assert "e−4" in chart(page, "Learning rate").locator(".entry b").inner_text()


def test_heatmap_readouts_show_layer_expert_step_and_load(browser, troubled):
    folder, path = troubled
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    dead_readouts = set()
    with opened(browser, path) as page:
        for layer, across, down in ((1, 0.1, 0.1), (2, 0.3, 0.7), (4, 0.5, 0.5), (3, 0.9, 0.19), (4, 0.8, 0.95)):
            figure = chart(page, f"Layer {layer}")
            point(page, figure, across, down)
            text = figure.locator(".where").inner_text()
            expert = int(re.search(r"expert (\d+)", text)[1])
            assert expert == int(8 * down)
            first, last = steps_in(text)
            assert 1500 * across - 30 < first < 1500 * across + 30
            loads = [
                rows[step - 1]["moe/load_by_expert"][layer - 1][expert]
                for step in range(first, last + 1)
                if "moe/load_by_expert" in rows[step - 1]
            ]
            if np.mean(loads) == 0:
                assert text.endswith("dead")
            else:
                assert float(text.split("load ")[1]) == pytest.approx(np.mean(loads), rel=0.009, abs=0.005)
            dead_readouts.add(text.endswith("dead"))
        figure = chart(page, "Spread of loads by layer")
        point(page, figure, 0.6, 0.6)
        text = figure.locator(".where").inner_text()
        first, last = steps_in(text)
        values = [rows[s - 1].get("moe/load_spread_by_layer", [None] * 4)[2] for s in range(first, last + 1)]
        assert text.startswith("layer 3 ")
        assert float(text.split("· ")[-1]) == pytest.approx(np.mean([v for v in values if v]), rel=1e-3)
    assert dead_readouts == {True, False}


def test_dragging_zooms_all_charts_and_the_y_axis(browser, troubled):
    with opened(browser, troubled[1]) as page:
        figure = chart(page, "Loss")
        assert ranges(page) == {"steps 1 to 1,500"}
        before = page.evaluate("panels[0].range()")
        point(page, figure, 0.75)
        page.mouse.down()
        point(page, figure, 0.8)
        point(page, figure, 0.95)
        page.mouse.up()
        settle(page)
        (text,) = ranges(page)
        first, last = (int(number.replace(",", "")) for number in re.findall(r"[\d,]+", text))
        assert abs(first - 1125) < 25 and abs(last - 1425) < 25
        low, high = page.evaluate("panels[0].range()")
        assert high - low < 0.6 * (before[1] - before[0])
        chart(page, "Step time")
        assert ranges(page) == {text}
        page.get_by_role("button", name="reset zoom").click()
        settle(page)
        chart(page, "Loss")
        assert "steps 1 to 1,500" in ranges(page)


def test_toggles(browser, troubled):
    with opened(browser, troubled[1]) as page:
        figure = chart(page, "Loss")
        before = page.evaluate("panels[0].range()")
        assert "leaves out the first 2%" in figure.inner_text()
        figure.get_by_role("button", name="show all").click()
        settle(page)
        assert page.evaluate("panels[0].range()")[1] > before[1] + 2
        figure.get_by_role("button", name="log").click()
        settle(page)
        assert page.evaluate("panels[0].range()")[1] == pytest.approx(np.log10(11.8), abs=0.15)
        entry = figure.get_by_role("button", name="validation")
        entry.click()
        assert entry.get_attribute("aria-pressed") == "false" and page.evaluate("panels[0].shown.length") == 1
        page.get_by_role("button", name="tokens", exact=True).click()
        settle(page)
        assert all(text.startswith("tokens") for text in ranges(page) if "Loss" in text)
        assert page.evaluate("domain()[1]") == pytest.approx(1500 * 128 * 8192, rel=0.1)


def test_charts_follow_the_window_and_the_theme(browser, troubled):
    picture = "panels[0].canvas.toDataURL()"
    with opened(browser, troubled[1], color_scheme="light") as page:
        chart(page, "Loss")
        light = page.evaluate(picture)
        page.emulate_media(color_scheme="dark")
        settle(page)
        assert page.evaluate(picture) != light
        page.set_viewport_size({"width": 700, "height": 860})
        chart(page, "Loss")
        assert page.evaluate("[panels[0].canvas.width, panels[0].plot.clientWidth]") == [658, 658]


def test_on_a_phone_nothing_overflows_and_the_page_scrolls(browser, troubled, compared):
    for path in (troubled[1], compared):
        with opened(browser, path, width=390, touch=True, is_mobile=True, device_scale_factor=2) as page:
            for details in page.locator("details").all():
                details.evaluate("(element) => { element.open = true; }")
            settle(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            figure = chart(page, "Loss")
            box = figure.locator(".plot").bounding_box()
            x, y = box["x"] + 200, box["y"] + 100
            page.touchscreen.tap(x, y)
            assert re.search(r"step", figure.locator(".where").inner_text())
            before = page.evaluate("scrollY")
            swipe(page, (x, y), (x, y - 300))
            assert page.evaluate("scrollY") > before + 200
            assert page.evaluate("view.range") is None
            box = chart(page, "Loss").locator(".plot").bounding_box()
            swipe(page, (box["x"] + 100, box["y"] + 100), (box["x"] + 250, box["y"] + 110))
            low, high = page.evaluate("view.range")
            assert high - low < 0.6 * page.evaluate("everything()[1]")


def test_compared_runs_share_charts_in_steps_and_tokens(browser, compared):
    with opened(browser, compared, color_scheme="dark") as page:
        assert page.get_by_role("heading", level=1).inner_text() == "3 runs compared"
        figure = chart(page, "Loss")
        assert [entry.inner_text().split()[0] for entry in figure.locator(".entry").all()] == [
            "first",
            "second",
            "short",
        ]
        point(page, figure, 0.8)
        assert figure.locator(".entry").last.inner_text().endswith("– · –")
        figure = chart(page, "Update RMS by group")
        figure.get_by_role("combobox").select_option("router")
        assert figure.locator(".entry").count() == 3
        page.get_by_role("button", name="tokens", exact=True).click()
        point(page, chart(page, "Loss"), 0.5)
        assert "tokens" in chart(page, "Loss").locator(".where").inner_text()
        assert page.get_by_role("heading", name="Largest load by layer: second").count() == 1
        page.locator("summary", has_text="second").last.click()
        point(page, page.locator("details[open] figure").last, 0.5)


def test_markup_in_names_is_text(browser, tmp_path):
    name = "<img src=x onerror=console.log(1)>"
    folder = write_history(tmp_path / name, Shape(steps=30, sources=("<b>bold</b>", "<script>console.log(2)")))
    with opened(browser, report([folder, folder], tmp_path / "page.html")) as page:
        assert page.get_by_role("heading", level=1).inner_text() == name
        assert "<b>bold</b>" in chart(page, "Validation loss by source").inner_text()


def test_a_run_of_one_step_with_few_metrics(browser, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss/train": 3.5, "moe/load_by_expert": [[1, null, 0]]}\n')
    with opened(browser, report([folder], None)) as page:
        figure = chart(page, "Loss")
        point(page, figure, 0.5)
        assert "3.5" in figure.inner_text()
        point(page, chart(page, "Layer 0"), 0.5)
        assert "not recorded" in chart(page, "Layer 0").inner_text()


@pytest.mark.parametrize("values", [[0.0], [-1.0, 1.0], [1e-30, 1e30], [1e300, -1e308], [None], [1e-9], [7]])
def test_any_values_can_be_drawn(values, browser, tmp_path):
    keys = ("loss/train", "optim/lr", "optim/grad_norm/norms", "moe/dead_experts", "time/step_seconds", "memory/x")
    rows = []
    for step in (*range(1, 40), *range(9000, 9050), 20_000):
        row = {"step": step, "consumed_tokens": step * 10} | dict.fromkeys(keys, values[step % len(values)])
        rows.append(row | {"moe/load_by_expert": [values * 3], "moe/max_load_by_layer": values})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with opened(browser, report([tmp_path], None)) as page:
        page.evaluate("document.querySelectorAll('.controls button:not([hidden])').forEach((it) => it.click())")
        page.get_by_role("button", name="tokens", exact=True).click()
        for figure in page.locator("figure").all():
            figure.evaluate("(element) => element.scrollIntoView({block: 'center'})")
            page.wait_for_timeout(60)
            point(page, figure, 0.4)
        assert page.locator("figure").count() or values == [None]


@pytest.mark.slow
def test_a_hundred_thousand_steps_open_within_two_seconds(browser, tmp_path):
    """The page of 300 MB of metrics (26 layers of 64 experts) is small and opens fast. The test takes about 25 s."""
    folder = write_history(tmp_path / "run", Shape(steps=100_000, layers=26, experts=64, trouble=True))
    path = report([folder], None)
    assert path.stat().st_size <= MAX_BYTES
    with opened(browser, path) as page:
        assert page.seconds <= MAX_SECONDS
        chart(page, "Layer 26")
