"""The report as a reader sees it: in headless Chromium, on a phone and a desk, light, dark and printed.

Needs Chromium and its driver (Debian, Ubuntu: `apt-get install chromium chromium-driver`) and the
`dev` extra's selenium; skipped where one of them is absent. Screenshots and a PDF stay in pytest's
temporary folder (`--basetemp=DIR` chooses it).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from birbal_ray.report.run import report
from tests.fixtures.made_run import make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ROWS = """
return [...document.querySelectorAll(`#table-${arguments[0]} tbody tr`)].map(row => Object.fromEntries(
  [...row.cells].map(cell => [cell.dataset.column, cell.dataset.value ?? cell.textContent])));
"""
SHOWN = """
return [...document.querySelectorAll('td[data-value]')].map(cell => [cell.dataset.value, cell.textContent]);
"""
# Texts of a plot that stick out of it, and boxes that stick out of the page.
OUTSIDE = """
const found = [];
for (const drawing of document.querySelectorAll('figure svg')) {
  const frame = drawing.getBoundingClientRect();
  for (const text of drawing.querySelectorAll('text')) {
    const box = text.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1) found.push(text.textContent);
  }
}
for (const box of document.querySelectorAll('.scroll, figure, details, dl, p, h1, h2, h3')) {
  const right = box.getBoundingClientRect().right;
  if (right > document.documentElement.clientWidth + 0.5) found.push(box.outerHTML.slice(0, 80));
}
return found;
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    adapters = ("adapter", "a-merged-model-with-a-long-name")
    folder = make_run(tmp_path_factory.mktemp("made") / "run", adapters=adapters)
    report(folder)
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return tmp_path_factory.mktemp("screenshots")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'birbal_ray[dev]'")
    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver_file = shutil.which("chromedriver")
    if binary is None or driver_file is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    environment = {**os.environ, "TMPDIR": str(tmp_path_factory.mktemp("chromium"))}  # it leaves its folders behind
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_file, env=environment))
    yield driver
    driver.quit()


def opened(browser, run, width=1280, scheme="light"):
    from selenium.webdriver.support.ui import WebDriverWait

    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get(address(run))
    # On a busy machine `get` of an address that is open already may come back before the page is whole.
    WebDriverWait(browser, 60).until(lambda it: it.execute_script("return document.readyState") == "complete")


def address(run):
    return "file://" + quote(str(run / "report.html"))


def shoot(browser, file):
    content = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": content["width"], "height": content["height"], "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    file.write_bytes(base64.b64decode(shot["data"]))


def test_nothing_is_requested_reported_or_run(browser, run):
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    opened(browser, run)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith(("data:", "about:"))] == [address(run)]
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize(
    ("table", "file"),
    [
        ("scores", "score/task_scores.parquet"),
        ("mix-tasks", "mix/tasks.parquet"),
        ("comparisons", "evaluate/comparisons.parquet"),
    ],
)
def test_a_table_holds_its_file(browser, run, table, file):
    opened(browser, run)
    found = browser.execute_script(ROWS, table)
    expected = pq.read_table(run / file).to_pylist()
    assert len(found) == len(expected)
    for cells, row in zip(found, expected, strict=True):
        for column, text in cells.items():
            value = row[column]
            assert text == ("–" if value is None else value if isinstance(value, str) else repr(value))


def test_tables_of_tasks_hold_the_evaluation(browser, run):
    opened(browser, run)
    rows = pq.read_table(run / "evaluate" / "evaluation.parquet").to_pylist()
    for prompt_format in ("zero_shot", "few_shot"):
        found = {cells["task"]: cells for cells in browser.execute_script(ROWS, f"tasks-{prompt_format}")}
        mine = [row for row in rows if row["prompt_format"] == prompt_format]
        assert len(found) == len(mine) / 3
        for row in mine:
            for column in ("task_score", "task_score_low", "task_score_high", "num_errors"):
                assert found[row["task"]][f"{row['model']}:{column}"] == repr(row[column])


def test_numbers_are_shown_with_three_decimals(browser, run):
    opened(browser, run)
    cells = browser.execute_script(SHOWN)
    assert len(cells) > 200
    for value, text in cells:
        plain = text.replace("−", "-").replace(",", "").removeprefix("+")
        assert plain == (f"{float(value):.3f}" if "." in value or "e" in value else value)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(browser, run, shots, width, scheme):
    opened(browser, run, width, scheme)
    shoot(browser, shots / f"{width}-{scheme}.png")
    scroll_width, client_width = browser.execute_script(
        "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
    )
    assert client_width == width
    assert scroll_width <= width
    assert browser.execute_script(OUTSIDE) == []
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert brightness > 200 if scheme == "light" else brightness < 50


def test_it_prints(browser, run, shots):
    opened(browser, run, scheme="dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "paperWidth": 8.27})
    data = base64.b64decode(printed["data"])
    (shots / "report.pdf").write_bytes(data)
    assert data.startswith(b"%PDF")
    assert data.count(b"/Type /Page\n") >= 3
