"""The page in a real browser: `pip install -e '.[browser]'` and Chromium with its driver."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from astbench.report.contents import contents
from astbench.report.page import page
from astbench.tables.documents import Book

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[browser]'")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium with chromedriver here"
)
ROOT = Path(__file__).parents[3]


def explorer():
    """Two heads, three queries, ten blocks of two tokens; head 1 keeps blocks 0 and 9 of the last query."""
    mass = np.zeros((2, 3, 10), np.uint8)
    mass[:, :, 0] = 255 * 0.5
    mass[1, 2, 9] = 255 * np.sqrt(0.75)
    kept = np.zeros((2, 3, 10), bool)
    kept[:, :, 0] = kept[1, 2, 9] = True
    coded = [base64.b64encode(x.tobytes()).decode() for x in (mass, np.packbits(kept, axis=-1))]
    layer = {"heads": 2, "blocks": 10, "block_size": 2, "mass": coded[0], "chosen": coded[1]}
    tokens = [f" t{n}" for n in range(19)] + ["<b>last</b>"]
    return {
        "schema": 1,
        "attention": "ast",
        "tokens": tokens,
        "rows": [1, 9, 18],
        "real": [True, True, True],
        "layers": {"model.layers.0": layer, "model.layers.1": layer},
    }


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = shutil.copytree(ROOT / "results" / "needle" / "ast", folder / "mine")
    (run / "explorer.json").write_text(json.dumps(explorer()))
    (run / "metrics.csv").write_text("step,train/loss\n0,3.5\n1,2.5\n")
    found = contents(Book(ROOT / "results", ROOT / "docs", ROOT / "recipes"), [run])
    (folder / "page.html").write_text(page(found, "records"))
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def go(browser, address):
    def to(place=""):
        browser.get("about:blank")
        browser.get(address + place)
        return browser

    yield to
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def all_of(browser, css):
    return browser.find_elements("css selector", css)


def test_leaderboard_sorts_and_filters_by_mouse_and_keyboard(go):
    page = go()
    everything = len(all_of(page, "#board tbody tr"))
    assert everything > 150
    value = all_of(page, "#board th button")[3]
    assert value.text == "value"
    value.click()
    shown = [float(row.text.replace(",", "")) for row in all_of(page, "#board tbody tr td:nth-child(4)")]
    assert shown == sorted(shown)
    assert all_of(page, "#board th")[3].get_attribute("aria-sort") == "ascending"
    value.send_keys("\n")
    assert all_of(page, "#board th")[3].get_attribute("aria-sort") == "descending"
    all_of(page, "input[type=search]")[0].send_keys("LONGFORMER")
    some = all_of(page, "#board tbody tr")
    assert 0 < len(some) < everything and all("longformer" in row.text for row in some)
    all_of(page, "#board tbody a")[0].click()
    assert "longformer" in all_of(page, "h2")[0].text and "#/run/" in page.current_url


def test_a_thousand_runs_load_in_seconds(browser, tmp_path):
    found = contents(Book(ROOT / "results", ROOT / "docs", ROOT / "recipes"), [])
    runs = [{**run, "id": f"{run['id']}-{n}"} for n in range(1000 // len(found["runs"]) + 1) for run in found["runs"]]
    (tmp_path / "many.html").write_text(page({**found, "runs": runs[:1000]}, "many"))
    browser.get((tmp_path / "many.html").as_uri())
    assert len(all_of(browser, "#board tbody tr")) == 1000
    timing = browser.execute_script("return performance.getEntriesByType('navigation')[0].duration")
    print(f"{(tmp_path / 'many.html').stat().st_size / 1e6:.1f} MB, loaded in {timing / 1000:.2f} s")
    assert 0 < timing < 10_000


def test_every_page_draws_something(go):
    for place, css, least in (
        ("#/frontier/smollm2", "svg a circle", 20),
        ("#/frontier/smollm2/all weights", "svg a circle", 5),
        ("#/costs", "svg polyline", 5),
        ("#/tables/needle", "tbody tr td a", 3),
        ("#/run/runs/mine", "svg polyline", 1),
        ("#/choices", "#tokens span", 10),
    ):
        page = go(place)
        assert len(all_of(page, css)) >= least, place
    assert "No run is called nothing/here" in all_of(go("#/run/nothing/here"), "main")[0].text


def test_what_was_chosen_by_keyboard_and_click(go):
    page = go("#/choices/" + "runs%2Fmine")
    said = all_of(page, "[role=status]")[0]
    assert said.text == "Layer 0, head 0, token 18: 1 block kept, 24.8% of dense attention's mass on them."
    matrix = all_of(page, ".matrix")[0]
    matrix.send_keys("\ue014")  # arrow right: the next head
    assert "head 1, token 18: 2 blocks kept, 99.2%" in said.text
    assert [span.text for span in all_of(page, "#tokens span.kept")] == [" t0 t1", " t18<b>last</b>"]
    assert all_of(page, "#tokens span.query")[0].text.strip() == "t18" and all_of(page, "#tokens b") == []
    matrix.send_keys("\ue013")  # arrow up: the query before
    assert "head 1, token 9: 1 block kept" in said.text
    canvas = all_of(page, "canvas")[0]
    left, top = canvas.size["width"] // 2, canvas.size["height"] // 2
    webdriver.ActionChains(page).move_to_element_with_offset(canvas, 5 - left, 3 - top).click().perform()
    assert "token 1:" in said.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(go, browser, scheme):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_of = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme_of})
    try:
        grounds = set()
        for place in ("", "#/frontier", "#/costs", "#/tables/smollm2", "#/run/needle/ast", "#/choices"):
            page = go(place)
            assert page.execute_script("return document.documentElement.scrollWidth") <= 390, place
            grounds.add(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert grounds == {"rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)"}
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
