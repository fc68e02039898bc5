"""The page of a run in Chromium, from a file, without a network: figures, controls, both themes."""

from __future__ import annotations

import json
import pathlib
import shutil

import chromium
import made_runs
import numpy as np
import pytest
from PIL import Image

import jaxpersona as jp

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [name for name in json.loads((ROOT / "jaxpersona/data/role_list.json").read_text())
         if name != "default"]
ODD = ["🦜 \"q\" & <img src=x onerror=alert(2)>", "x" * 200,
       "<b>bold</b><a href='https://a.b'>c</a>"]
PLOTS = ("plot-pca", "plot-cos", "plot-variance", "plot-reliability", "plot-thresholds",
         "plot-scores")

pytestmark = pytest.mark.skipif(
    chromium.executable() is None,
    reason="no Chromium (looked for " + ", ".join(chromium.NAMES) + "): apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.started(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return a function that writes the page of a run of so many roles, once."""
    folder, made = tmp_path_factory.mktemp("pages"), {}

    def page(count):
        if count not in made:
            names = [*NAMES[: count - len(ODD)], *ODD]
            run = made_runs.many(folder / f"run-{count}", names, held_out=names[3:5],
                                 questions=12 if count < 100 else 8)
            made[count] = jp.report.write_page(run, folder / f"{count}.html")
        return made[count]

    return page


def xs(browser, plot, trace=0):
    return browser.run(f"Array.from(document.getElementById('{plot}').data[{trace}].x)")


def ranked(browser):
    return browser.run("Array.from(document.querySelectorAll('#ranking-table tbody td.name'), "
                       "(cell) => cell.textContent)")


def boxes_of(browser, selector):
    """The boxes (left, top, right, bottom) and texts of the elements of a selector."""
    return browser.run(f"Array.from(document.querySelectorAll({json.dumps(selector)}), (e) => {{ "
                       "const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, "
                       "b.bottom, e.textContent]; }).filter((b) => b[2] > b[0])")


def overlapping(boxes):
    return [(a[4], b[4]) for i, a in enumerate(boxes) for b in boxes[:i]
            if a[0] + 1 < b[2] and b[0] + 1 < a[2] and a[1] + 1 < b[3] and b[1] + 1 < a[3]]


def check(browser, page, tmp_path, count, width, dark):
    """Open the page, and check what must hold at every size and in both themes."""
    browser.open(page, width, 900, dark)
    assert not browser.messages and browser.requests == [page.as_uri()], browser.requests
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    # no part is wider than the window, and every figure is drawn
    assert browser.run("document.documentElement.scrollWidth") <= width
    for plot in PLOTS:
        points = browser.run(f"document.querySelectorAll('#{plot} .point').length")
        assert points > 0, plot
        drawn = browser.run(f"document.querySelector('#{plot} svg').getBoundingClientRect().width")
        assert 0.9 * min(width, 320) - 60 < drawn <= width, plot
    names = ranked(browser)
    assert len(names) == count + 1 and "default persona" in names
    assert browser.run("document.querySelectorAll('img, a[href^=http]').length") == 0
    labels = boxes_of(browser, "#plot-pca .textpoint text")
    assert labels and not overlapping(labels), overlapping(labels)
    names = boxes_of(browser, "#plot-scores .ytick text")
    left = browser.run("document.getElementById('plot-scores').getBoundingClientRect().left")
    assert not overlapping(names) and min(box[0] for box in names) >= left
    for title in boxes_of(browser, ".xtitle"):
        assert 0 <= title[0] and title[2] <= width, title
    assert not overlapping(boxes_of(browser, "#ranking-ticks b"))
    file = tmp_path / f"{count}-{width}-{dark}.png"
    browser.picture(file)
    pixels = np.asarray(Image.open(file).convert("L"), np.float64)
    assert pixels.shape == (900, width) and pixels.std() > 8
    assert (np.median(pixels) < 60) == dark  # the background


def test_the_page_of_35_roles(browser, pages, tmp_path):
    page = pages(35)
    check(browser, page, tmp_path, 35, 1280, False)
    before, order = xs(browser, "plot-pca"), ranked(browser)
    title = browser.run("document.getElementById('plot-thresholds').layout.xaxis.title.text")
    browser.run("document.getElementById('layer').focus()")
    browser.key("ArrowRight")  # the slider is a control of the keyboard
    assert browser.run("document.getElementById('layer-text').textContent") == "5 of 0–7"
    assert xs(browser, "plot-pca") != before and ranked(browser) != order
    assert title.endswith("layer 4") and browser.run(
        "document.getElementById('plot-thresholds').layout.xaxis.title.text").endswith("layer 5")
    assert browser.run("document.getElementById('plot-cos').layout.shapes[0].x0") == 5
    data = made_runs.parse(page.read_text()).data
    inside = [role["x"][5] for role in data["roles"] if role.get("x") and role["inAxis"]]
    assert xs(browser, "plot-pca") == inside
    best = [data["roles"][i]["name"].replace("_", " ") for i in data["order"][5]]
    assert [name for name in ranked(browser) if name != "default persona"] == best
    browser.key("Home")
    assert xs(browser, "plot-pca") == [role["x"][0] for role in data["roles"]
                                       if role.get("x") and role["inAxis"]]
    place = next(i for i, role in enumerate(data["roles"]) if role["name"] == ODD[0])
    browser.run(f"(() => {{ const e = document.getElementById('role'); e.value = '{place}'; "
                "e.dispatchEvent(new Event('change')); })()")
    browser.settle()
    assert browser.run("document.getElementById('detail').innerText").startswith(ODD[0])
    assert browser.run("document.querySelectorAll('#ranking-table tr.marked').length") == 1
    assert not browser.messages


def test_the_page_follows_the_theme_and_the_width(browser, pages, tmp_path):
    page = pages(35)
    check(browser, page, tmp_path, 35, 390, True)
    ink = browser.run("document.getElementById('plot-pca').layout.font.color")
    browser.window(1000, 900, False)
    browser.run("new Promise((done) => setTimeout(done, 300))")
    browser.settle()
    assert browser.run("document.getElementById('plot-pca').layout.font.color") != ink
    assert browser.run("document.getElementById('plot-pca').layout.width") > 900


def test_the_page_of_a_run_in_progress(browser, pages, tmp_path):
    run = pages(35).with_name("run-35")
    part = shutil.copytree(run, tmp_path / "run")
    (part / "axis.safetensors").unlink()
    page = jp.report.write_page(part)
    browser.open(page, 390, 900, True)
    assert not browser.messages and browser.requests == [page.as_uri()]
    assert browser.run("document.querySelectorAll('#plot-scores .point').length") > 35
    assert not browser.run("!!document.getElementById('layer')")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("count", [35, 276])
def test_the_page_at_every_size(browser, pages, tmp_path, count, width, dark):
    check(browser, pages(count), tmp_path, count, width, dark)
