"""The report page in a real browser: Chromium, driven by Selenium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, write

from ssl_c2f.report import write_page
from ssl_c2f.train.pictures import png

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]
selenium = pytest.importorskip("selenium")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser that saves files into `chrome.downloads` and logs its requests."""
    from selenium import webdriver

    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    options, downloads = webdriver.ChromeOptions(), tmp_path_factory.mktemp("downloads")
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver: Any = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.downloads = downloads
    yield driver
    driver.quit()


def show(chrome: Any, page: Path, width: int = 1200, dark: bool = False) -> float:
    """Open a page; returns the seconds that it took."""
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    for log in ("browser", "performance"):
        chrome.get_log(log)  # empties it
    began = time.monotonic()
    chrome.get(page.as_uri())
    return time.monotonic() - began


def js(chrome: Any, code: str) -> Any:
    return chrome.execute_script(f"return {code}")


def download(chrome: Any, button: str, file: str) -> str:
    """Click a button and return the text of the file that it saves."""
    path = chrome.downloads / file
    path.unlink(missing_ok=True)  # the browser would choose another name for a second one
    found = chrome.find_element("css selector", button)
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    found.click()
    until = time.monotonic() + 20
    while not is_saved(path):
        assert time.monotonic() < until, f"{file} was not saved, but {list(chrome.downloads.iterdir())}"
        time.sleep(0.02)
    return path.read_text()


def is_saved(path: Path) -> bool:
    """Whether a download is complete: Chromium reserves its name with an empty file, writes another, and renames it."""
    return path.exists() and path.stat().st_size > 0 and not list(path.parent.glob("*.crdownload"))


def test_a_download_is_not_read_too_early(tmp_path: Path) -> None:
    path, part = tmp_path / "a.csv", tmp_path / "Unconfirmed 1.crdownload"
    assert not is_saved(path)
    path.touch()
    assert not is_saved(path)
    part.write_text("half")
    path.write_text("half")
    assert not is_saved(path)
    part.replace(path)
    assert is_saved(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import io

    import soundfile
    import torch

    folder = tmp_path_factory.mktemp("runs")
    sound = io.BytesIO()
    soundfile.write(sound, torch.randn(16000).numpy() / 10, 16000, format="MP3", subtype="MPEG_LAYER_III")
    found = [make_run(folder / name, steps=60, loss=loss) for name, loss in (("<b>a", 1.0), ("b", 1.5), ("c", 2.0))]
    for picture in found[0].glob("phases/*/pictures/0-input.png"):
        write(picture, png(torch.rand(40, 16), 0, 1))
        write(picture.with_name("0.mp3"), sound.getvalue())
    return found


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    return write_page(runs, runs[0].parent / "page.html")


def test_it_opens_without_an_error_or_a_request(chrome: Any, page: Path) -> None:
    show(chrome, page)
    assert chrome.get_log("browser") == []
    messages = [entry["message"] for entry in chrome.get_log("performance")]
    urls = [message for message in messages if 'Network.requestWillBeSent"' in message]
    assert urls and all(page.name in url or '"url":"data:' in url or '"url":"blob:' in url for url in urls)
    assert js(chrome, "document.querySelectorAll('.plot svg').length") == 6 + 2 * 3
    assert js(chrome, "document.querySelectorAll('b').length") == 0
    assert "<b>a" in js(chrome, "document.querySelector('h1').textContent")


def test_the_axis_is_switched_with_the_keyboard(chrome: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    show(chrome, page)
    title = "document.querySelector('[data-name=loss] svg').textContent"
    assert js(chrome, title).endswith("compute, TFLOPs")
    chrome.find_element("css selector", "[name=axis]").send_keys(Keys.ARROW_RIGHT)
    assert js(chrome, title).endswith("clips seen")
    plot = chrome.find_element("css selector", "[data-name=loss] .plot")
    plot.send_keys(Keys.END)
    readout = "document.querySelector('[data-name=loss] output').textContent"
    assert js(chrome, readout).startswith("240, fine: <b>a ")
    plot.send_keys(Keys.HOME)
    assert js(chrome, readout).startswith("4, coarse: ")
    assert js(chrome, readout).count(" · ") == 2


def test_runs_are_switched_off_and_on(chrome: Any, page: Path) -> None:
    show(chrome, page)
    lines = "document.querySelectorAll('[data-name=loss] .line').length"
    assert js(chrome, lines) == 3
    for box in chrome.find_elements("css selector", "[name=run]"):
        box.click()
    assert js(chrome, lines) == 0
    assert "no run to show" in js(chrome, "document.querySelector('[data-name=loss]').textContent")
    chrome.find_element("css selector", "[name=run][value='1']").click()
    assert js(chrome, lines) == 1
    assert chrome.get_log("browser") == []


def test_tables_are_sorted(chrome: Any, page: Path) -> None:
    show(chrome, page)
    heads = chrome.find_elements("css selector", "#overview thead button")
    column = [head.text for head in heads].index("validation loss")
    cells = f"[...document.querySelectorAll('#overview tbody tr')].map((r) => +r.cells[{column}].dataset.value)"
    before = js(chrome, cells)
    heads[column].click()
    assert js(chrome, cells) == sorted(before)
    heads[column].click()
    assert js(chrome, cells) == sorted(before, reverse=True)
    assert js(chrome, "document.querySelectorAll('[aria-sort=descending]').length") == 1


def test_figures_and_tables_are_saved(chrome: Any, page: Path) -> None:
    show(chrome, page)
    name = "-b-a-b-c-training-loss"
    rows = download(chrome, "[data-name=loss] [data-save=csv]", f"{name}.csv").splitlines()
    assert rows[0] == "run,flops,samples,train_seconds,value,low,high" and len(rows) == 1 + 3 * 60
    assert rows[1].startswith("<b>a,1000000000000,4,0.1,")
    svg = download(chrome, "[data-name=loss] [data-save=svg]", f"{name}.svg")
    assert svg.startswith("<svg") and "--c0:#0067a8" in svg
    show(chrome, chrome.downloads / f"{name}.svg")
    assert js(chrome, "document.querySelectorAll('.line').length") == 3
    assert js(chrome, "getComputedStyle(document.querySelector('.line')).stroke") == "rgb(0, 103, 168)"


def test_matrix_and_bars_show_each_class(chrome: Any, page: Path) -> None:
    show(chrome, page)
    place = "[data-name='b/default']"
    bars = f"[...document.querySelectorAll(\"[data-kind=bars]{place} text\")].map((t) => t.textContent)"
    assert js(chrome, bars) == ["cat", "75 %", "dog", "100 %"]
    name = "-b-a-b-c-{}-b-default.csv"
    matrix = download(chrome, f"[data-kind=matrix]{place} [data-save=csv]", name.format("confusion-matrix"))
    assert matrix.splitlines() == [r"label \ predicted,cat,dog", "cat,3,1", "dog,0,4"]
    titles = f"[...document.querySelectorAll(\"[data-kind=matrix]{place} title\")].map((t) => t.textContent)"
    assert js(chrome, titles) == ["cat as cat: 3", "cat as dog: 1", "dog as cat: 0", "dog as dog: 4"]
    recall = download(chrome, f"[data-kind=bars]{place} [data-save=csv]", name.format("recall-per-class"))
    assert recall.splitlines() == ["class,recall", "cat,0.75", "dog,1"]


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows_and_contrast_is_sufficient(chrome: Any, page: Path, width: int, dark: bool) -> None:
    show(chrome, page, width, dark)
    assert js(chrome, "document.documentElement.scrollWidth") <= width
    paper, ink = (
        [int(v) for v in js(chrome, f"getComputedStyle(document.body).{name}").strip("rgb()").split(", ")[:3]]
        for name in ("backgroundColor", "color")
    )
    assert (sum(paper) < sum(ink)) == dark and abs(sum(paper) - sum(ink)) > 450
    assert js(chrome, "Math.min(...[...document.querySelectorAll('.plot svg')].map((s) => s.clientWidth))") > 240


def test_sounds_play(chrome: Any, page: Path) -> None:
    show(chrome, page)
    chrome.execute_async_script(
        "const audio = document.querySelector('audio'), done = arguments[0];"
        "audio.ontimeupdate = () => audio.currentTime > 0.05 && done(); audio.onerror = () => done(); audio.play();"
    )
    assert js(chrome, "document.querySelector('audio').currentTime") > 0.05
    assert js(chrome, "document.querySelector('audio').error") is None


def test_a_long_run_opens_fast(chrome: Any, tmp_path: Path) -> None:
    page = write_page([make_run(tmp_path / "long", steps=99_999)], tmp_path / "page.html")
    assert page.stat().st_size < 10e6
    assert show(chrome, page) < 2.0
    assert js(chrome, "document.querySelectorAll('[data-name=loss] .spread').length") == 1
    assert chrome.get_log("browser") == []


@pytest.mark.parametrize("count", [60, 309])
def test_many_classes_stay_readable(chrome: Any, tmp_path: Path, count: int) -> None:
    run, classes = make_run(tmp_path / "many"), [f"class number {i}" for i in range(count)]
    counts = [[20 if i == j else int((i + j) % 7 == 0) for j in range(count)] for i in range(count)]
    counts[3][4], counts[5][2] = 9, 12
    recall = {name: i / count for i, name in enumerate(classes)} | {classes[9]: None}
    scores = {"accuracy": 0.5, "classes": classes, "confusion": counts, "recall": recall}
    write(run / "finetune" / "default" / "scores.json", scores)
    assert show(chrome, write_page([run], tmp_path / "page.html"), 390) < 2.0
    assert chrome.get_log("browser") == []
    assert js(chrome, "document.documentElement.scrollWidth") <= 390
    widths = "[...document.querySelectorAll('.plot rect')].map((r) => r.width.baseVal.value)"
    assert js(chrome, f"Math.min(...{widths})") >= 0
    assert js(chrome, "document.querySelectorAll('.plot *').length") < 12_000
    bars = js(chrome, "[...document.querySelectorAll('[data-kind=bars] text')].map((t) => t.textContent)")
    if count == 60:
        assert len(bars) == 2 * count and bars[18:20] == [classes[9], "-"]
        return
    assert bars[:4] == [classes[308], "100 %", classes[307], "99 %"] and bars[-2:] == [classes[0], "0 %"]
    assert len(bars) == 2 * 40 + 1
    pairs = js(chrome, "[...document.querySelectorAll('[data-kind=pairs] text')].map((t) => t.textContent)")
    assert pairs[0::2][:2] == ["class number 5 as class number 2", "class number 3 as class number 4"]
    assert pairs[1] == f"12 of {sum(counts[5])}" and len(pairs) == 2 * 30
    assert "20 lowest of 309" in js(chrome, "document.body.textContent")
    rows = download(chrome, "[data-kind=pairs] [data-save=csv]", "many-confused-most-often-default.csv").splitlines()
    assert len(rows) == 310 and rows[6].split(",")[:4] == [classes[5], "0", "0", "12"]
    rows = download(chrome, "[data-kind=bars] [data-save=csv]", "many-recall-per-class-default.csv").splitlines()
    assert len(rows) == 310 and rows[10] == f"{classes[9]},"


def test_an_empty_run_opens(chrome: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    show(chrome, write_page([tmp_path / "empty"], tmp_path / "page.html"))
    assert "no run was started here" in js(chrome, "document.body.textContent")
    assert chrome.get_log("browser") == []


def test_it_prints(chrome: Any, page: Path) -> None:
    show(chrome, page, dark=True)
    assert len(chrome.print_page()) > 10_000
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert js(chrome, "getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert js(chrome, "getComputedStyle(document.querySelector('.save')).display") == "none"
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
