"""Reports in a real browser: they draw, fit, say nothing on the console, and run nothing that a run wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import MISSING, chromium, console, resize
from reports import falling, make_run

from llm_local.bench.figures import page_of
from llm_local.report.notes import add_sample
from llm_local.report.page import write_report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.processes, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
WIDTHS = (1280, 390)
MARKUP = '</script><script>document.title="owned"</script><img src=x onerror="document.title=1">&amp;\u2028'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def show(browser: Chrome, *runs: Path, width: int = 1280, dark: bool = False) -> None:
    page = runs[0].parent / "report.html"
    write_report(runs, page)
    look(browser, page, width, dark)


def look(browser: Chrome, page: Path, width: int, dark: bool = False) -> None:
    resize(browser, width, 900, dark)
    browser.get(page.as_uri())
    assert console(browser) == []
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width, "the body scrolls sideways"


def charts(browser: Chrome) -> list[str]:
    """Titles of those in which something is drawn."""
    return browser.execute_script("""
        return [...document.querySelectorAll("[data-chart]")].filter((chart) => {
          const canvas = chart.querySelector("canvas");
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return pixels.some((value) => value);
        }).map((chart) => chart.querySelector("b").textContent)""")


def text(browser: Chrome, selector: str) -> str:
    return browser.execute_script(f"return document.querySelector({json.dumps(selector)}).innerText")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_a_normal_run(browser: Chrome, tmp_path: Path, width: int, dark: bool):
    show(browser, make_run(tmp_path / "run"), width=width, dark=dark)
    assert charts(browser)[:3] == ["Loss", "Loss on code", "Throughput"]
    legend = text(browser, "[data-chart=loss] .u-legend")
    assert f"{falling(200, 1) + 0.1:.4f}"[:5] in legend, "the last values are there without a mouse"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_diverged_run(browser: Chrome, tmp_path: Path, width: int):
    run = make_run(tmp_path / "run", loss=lambda step, stage: math.nan if step > 90 else falling(step, stage))
    show(browser, run, width=width)
    assert "is not finite (nan) at step 91" in text(browser, "#head")
    assert "Loss" in charts(browser)


@pytest.mark.parametrize("width", WIDTHS)
def test_eight_stages(browser: Chrome, tmp_path: Path, width: int):
    show(browser, make_run(tmp_path / "run", stages=8), width=width)
    assert "stage 7" in text(browser, "[data-chart=loss] .u-legend")


def test_200_000_records(browser: Chrome, tmp_path: Path):
    show(browser, make_run(tmp_path / "run", steps=100_000))
    assert (tmp_path / "report.html").stat().st_size < 400_000
    seconds = browser.execute_script("return performance.now() / 1000")
    print(f"200,000 records: drawn {seconds:.2f} s after the page was opened")
    assert "Loss" in charts(browser)


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_of_benchmarks(browser: Chrome, tmp_path: Path, width: int):
    """Each figure of a column of figures has a bar, the column's largest over the whole of its cell."""
    pages = sorted((Path(__file__).parents[1] / "docs/bench").glob("*.md"))
    assert pages
    for markdown in pages:
        page = tmp_path / f"{markdown.stem}.html"
        page.write_text(page_of(markdown))
        look(browser, page, width)
    browser.get((tmp_path / "throughput.html").as_uri())
    assert text(browser, "h1") == "Throughput"
    shares = browser.execute_script("""
        return [...document.querySelectorAll(".bar")].map((bar) => bar.firstChild.offsetWidth / bar.offsetWidth)""")
    assert max(shares) == 1
    assert min(shares) < 0.5


def test_two_runs_beside_each_other(browser: Chrome, tmp_path: Path):
    show(browser, make_run(tmp_path / "a"), make_run(tmp_path / "b", learning_rate=0.1), width=390)
    assert "b, stage 1" in text(browser, "[data-chart=loss] .u-legend")
    assert "learning_rate" in text(browser, "#flags")


def test_what_a_run_names_is_text_and_no_markup(browser: Chrome, tmp_path: Path):
    run = make_run(tmp_path / "<b onclick=x>&lt;", set_name=MARKUP, run_name=MARKUP, dataset_name=MARKUP)
    facts = json.loads((run / "metrics" / "run.json").read_text())
    facts["sources"][0]["name"], facts["warnings"], facts["versions"] = MARKUP, [MARKUP], {MARKUP: MARKUP}
    (run / "metrics" / "run.json").write_text(json.dumps(facts))
    add_sample(run, 200, MARKUP, MARKUP + MARKUP)
    show(browser, run)
    assert browser.title == "<b onclick=x>&lt; · llm_local"
    shown = text(browser, "main")
    for place in (f"Loss on {MARKUP}", f"dataset_name\t{MARKUP}"):
        assert place.replace("\u2028", "") in shown.replace("\u2028", "")
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0


def test_curves_are_switched_by_keyboard_and_the_axis_changes(browser: Chrome, tmp_path: Path):
    from selenium.webdriver.common.keys import Keys

    show(browser, make_run(tmp_path / "run"))
    name = browser.find_element("css selector", "[data-chart=loss] .u-series:nth-child(3) th")
    assert (name.text, name.get_attribute("aria-pressed")) == ("stage 0", "true")
    name.send_keys(Keys.ENTER)
    assert name.get_attribute("aria-pressed") == "false"
    name.send_keys(Keys.SPACE)
    assert name.get_attribute("aria-pressed") == "true"
    browser.find_element("css selector", "input[value=tokens]").send_keys(Keys.SPACE)
    assert text(browser, "[data-chart=loss] .u-legend").startswith("tokens204,800")
    assert console(browser) == []
