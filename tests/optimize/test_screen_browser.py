"""The Optimize screen in a real browser: Chromium and its driver (Debian: apt-get install chromium chromium-driver).

Driven by plain WebDriver calls over HTTP, so that no package is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.analysis import analyze_model, loss_profile
from sparsify.optimize.allocation import pruning_profile
from sparsify.optimize.pruning_profiles import PruningProfile, PruningSettings
from sparsify.optimize.recipe_creation import create_recipe
from sparsify.optimize.screen import Report
from sparsify.optimize.stages import OriginalTraining
from sparsify.recipe.recipe import Recipe
from tests.screens import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="needs Chromium: apt-get install chromium chromium-driver"
    ),
    pytest.mark.skipif("CI" in os.environ, reason="browsers are not started in CI"),
]


class Browser:
    """One session of WebDriver."""

    def __init__(self, address: str) -> None:
        self.address = address
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from error

    def do(self, method: str, path: str, body: Any = None) -> Any:
        return self.call(method, f"/session/{self.session}{path}", body)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, path: Path, width: int = 1280, height: int = 850, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[theme])
        self.do("POST", "/url", {"url": path.as_uri()})
        self.settle()

    def settle(self) -> None:
        """Until what was asked for is shown: it follows within two frames."""
        script = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done(true)))"
        self.do("POST", "/execute/async", {"script": script, "args": []})

    def give(self, selector: str, value: str, event: str = "input") -> None:
        self.run(
            "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
            "node.dispatchEvent(new Event(arguments[2], {bubbles: true}))",
            selector,
            value,
            event,
        )
        self.settle()

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)
        self.settle()

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def complaints(self) -> list[str]:
        return [one["message"] for one in self.do("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("driver") / "log"
    with log.open("wb") as out, subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=out, stderr=out) as driver:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            found = Browser(f"http://127.0.0.1:{port}")
            yield found
            found.call("DELETE", f"/session/{found.session}")
        finally:
            driver.terminate()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report().to_html(tmp_path_factory.mktemp("page") / "report.html")


def expected(**changed: Any) -> PruningProfile:
    made = report()
    return pruning_profile(made.curves, replace(made.settings, **changed))


def metrics(browser: Browser) -> dict[str, str]:
    found: dict[str, str] = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('#panel dl > div')].map("
        "(row) => [row.querySelector('dt').textContent, row.querySelector('dd').firstChild.textContent]))"
    )
    return found


def test_the_page_opens_with_the_figures_of_python_and_no_complaints(browser: Browser, page: Path) -> None:
    browser.open(page)
    wanted = expected()
    assert metrics(browser)["Estimated speed-up"] == f"{wanted.speedup:.2f}\N{MULTIPLICATION SIGN}"
    assert metrics(browser)["Recovery confidence"] == f"{wanted.recovery:.3f}"
    before, after = metrics(browser)["Expected loss"].split(" \N{RIGHTWARDS ARROW} ")
    assert float(before) == 0.25 and float(after) == pytest.approx(0.25 + wanted.loss, rel=5e-3)
    assert browser.complaints() == []


def test_sliders_change_the_figures_to_those_of_python(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.give("#set-sparsity", "0.7")
    browser.give("#set-balance", "0.1")
    wanted = expected(sparsity=0.7, balance=0.1)
    assert metrics(browser)["Estimated speed-up"] == f"{wanted.speedup:.2f}\N{MULTIPLICATION SIGN}"
    assert metrics(browser)["Recovery confidence"] == f"{wanted.recovery:.3f}"
    assert metrics(browser)["Recovery confidence"] != "1.000"
    shares = browser.run("return profile.layers.map((layer) => layer.sparsity)")
    assert shares == pytest.approx([choice.sparsity for choice in wanted.layers], abs=1e-12)
    assert browser.complaints() == []


def test_a_layer_is_set_by_hand_and_given_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click("#editor > summary")
    browser.give("#layers tr:nth-of-type(5) input", "33", "change")
    wanted = expected(overrides={"layer2": 0.33})
    shares = browser.run("return profile.layers.map((layer) => layer.sparsity)")
    assert shares == pytest.approx([choice.sparsity for choice in wanted.layers], abs=1e-12)
    assert browser.text("#layers tr:nth-of-type(5) .mark") == "by hand"
    assert browser.run("return document.querySelectorAll('.bar.hand').length") == 1
    assert "set by hand" in browser.text("#recipe")
    # What cannot be is marked, and changes nothing.
    browser.give("#layers tr:nth-of-type(5) input", "120", "change")
    assert browser.run("return state.settings.overrides") == {"layer2": 0.33}
    browser.click("#clear-overrides")
    assert browser.run("return state.settings.overrides") == {}
    assert browser.complaints() == []


def test_the_exported_text_is_a_recipe_with_what_is_shown(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.give("#set-sparsity", "0.6")
    browser.give("#epoch-start", "2")
    browser.give("#epoch-frequency", "0.5")
    recipe = Recipe.from_yaml(browser.text("#recipe"))
    pruned = [one for one in recipe.modifiers if type(one).__name__ == "GMPruningModifier"]
    found = {name: one.final_sparsity for one in pruned for name in one.params}  # type: ignore[attr-defined]
    wanted = {f"{one.name}.weight": round(one.sparsity, 4) for one in expected(sparsity=0.6).layers if one.sparsity > 0}
    assert found == pytest.approx(wanted)
    assert {(one.start_epoch, one.end_epoch, one.update_frequency) for one in pruned} == {(2.0, 31.0, 0.5)}
    # An epoch that cannot be is marked, and the last good one stays.
    browser.give("#epoch-start", "40")
    assert browser.run("return document.querySelector('#epoch-start').getAttribute('aria-invalid')") == "true"
    assert Recipe.from_yaml(browser.text("#recipe")) == recipe


def test_the_recipe_of_the_page_is_the_one_that_create_recipe_makes(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(64, 10)).eval()
    inputs, settings = torch.randn(1, 3, 8, 8), PruningSettings(sparsity=0.7, balance=0.6)
    training = OriginalTraining(90, 0.1, 0.001)
    loss = loss_profile(model, progress=False)
    made = create_recipe(model, inputs, settings=settings, loss=loss, training=training, quantize=True)
    page = Report.of(analyze_model(model, inputs), loss, settings=settings, training=training, quantize=True)
    browser.open(page.to_html(tmp_path / "same.html"))
    shown = Recipe.from_yaml(browser.text("#recipe"))
    assert sorted(map(str, shown.modifiers)) == sorted(map(str, made.modifiers))


def test_int8_moves_with_the_end_of_fine_tuning(browser: Browser, tmp_path: Path) -> None:
    browser.open(replace(report(), quantize=True).to_html(tmp_path / "int8.html"))
    assert "Quantization to int8" in browser.text("#timeline")
    browser.give("#epoch-tuned", "60")
    recipe = Recipe.from_yaml(browser.text("#recipe"))
    (found,) = [one for one in recipe.modifiers if type(one).__name__ == "QuantizationModifier"]
    epochs = found.model_dump()
    assert epochs["start_epoch"] == 60.0 and epochs["disable_quantization_observer_epoch"] == 64.5
    assert recipe.max_epochs == 69.0
    assert browser.complaints() == []


def test_schedules_are_added_edited_removed_and_saved(browser: Browser, page: Path) -> None:
    browser.open(page)
    count = "return document.querySelectorAll('#schedule-rows fieldset').length"
    before = browser.run(count)
    browser.click("#schedule-add")
    assert browser.run(count) == before + 1
    browser.give("#schedule-rows fieldset:last-child select", "cosine", "change")
    recipe = Recipe.from_yaml(browser.text("#recipe"))
    kinds = [type(one).__name__ for one in recipe.modifiers]
    assert kinds.count("LearningRateFunctionModifier") == 1
    browser.give("#schedule-name", "mine")
    browser.click("#schedule-save")
    browser.click("#schedule-reset")
    assert browser.run(count) == before
    browser.give("#schedules", "saved:mine", "change")
    browser.click("#schedule-load")
    assert browser.run(count) == before + 1
    browser.click("#schedule-rows fieldset:last-child button")
    assert browser.run(count) == before
    browser.give("#schedules", "saved:mine", "change")
    browser.click("#schedule-forget")
    assert browser.complaints() == []


def test_the_graph_is_read_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    press = "document.querySelector('#bars').dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))"
    browser.run(press, "ArrowRight")
    browser.run(press, "ArrowRight")
    assert browser.text("#tooltip b") == "layer1" and "layer1" in browser.text("#live")
    browser.run(press, "Enter")
    assert browser.run("return document.activeElement.textContent") == "layer1"
    assert browser.run("return document.querySelector('#detail1 svg path') !== null")


def test_everything_that_is_set_has_a_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    nameless = browser.run(
        "return [...document.querySelectorAll('input, select, button')].filter((node) => !(node.textContent.trim()"
        " || node.getAttribute('aria-label') || [...(node.labels ?? [])].some((one) => one.textContent.trim())))"
        ".map((node) => node.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("width", [400, 1024, 1280])
def test_nothing_hangs_over_the_side(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true; toggle(rows[1], true)")
    browser.settle()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    over = browser.run(
        "return [...document.querySelectorAll('main *:not(pre *):not(svg *):not(.visually-hidden)')].filter((node) =>"
        " node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 120))"
    )
    assert over == []


CONTRAST = """
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const found = channels(getComputedStyle(node).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found;
  }
  return [255, 255, 255];
};
const found = [];
for (const node of document.querySelectorAll('body *')) {
  if (!node.checkVisibility() || node.closest('.visually-hidden, .skip, script, :disabled')) continue;
  const words = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!words && !node.matches('input:not([type=range], [type=checkbox]), select')) continue;
  const style = getComputedStyle(node);
  const [a, b] = [light(channels(node instanceof SVGElement ? style.fill : style.color)), light(behind(node))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${node.outerHTML.slice(0, 100)}`);
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    browser.settle()
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(16, 20, 27)") == dark
    assert browser.run(CONTRAST) == []


def test_names_are_never_markup(browser: Browser, tmp_path: Path) -> None:
    nasty = "</script><img src=x onerror=\"document.title='broken'\">"
    made = report()
    first = replace(made.curves[1], name=nasty)
    odd = replace(made, curves=(made.curves[0], first, *made.curves[2:]))
    path = odd.to_html(tmp_path / "odd.html")
    browser.open(path)
    assert browser.run("return document.title") == made.analysis.model
    assert browser.run("return rows[1].button.textContent") == nasty
    assert browser.complaints() == []
