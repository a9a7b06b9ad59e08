"""A study in MLflow's pages: trials below their study, and settings against results in the plots that compare runs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.study.test_study import space_file
from tests.tracking.mlflow_server import Server

pytestmark = pytest.mark.slow
TERMS, LR, GRID, SCORE = "process.num_terms", "optimizer.lr", "process.time_grid", "val/eps_mse"
PARAMETERS = {
    TERMS: {"type": "categorical", "choices": [0, 2, 4]},
    LR: {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    GRID: {"type": "categorical", "choices": [10, 20]},
}
SIZE = (1600, 1200)
PLOT = "[role=tabpanel][data-state=active] .js-plotly-plot"


@dataclass(frozen=True)
class Study:
    """A finished study as MLflow holds it, read by its client."""

    uri: str
    experiment: str
    run_id: str
    trials: list[Any]  # MLflow's runs, in their order
    printed: str  # by klray.tune

    def numbers(self, key: str) -> list[float]:
        """Of every trial, a setting or the score."""
        return [float(run.data.metrics[key] if key == SCORE else run.data.params[key]) for run in self.trials]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        yield run_study(tmp_path_factory.mktemp("study"), server.uri)
    finally:
        server.stop(signal.SIGTERM)


def run_study(folder: Path, uri: str) -> Study:
    from mlflow import MlflowClient

    # Not the random sampler: this one tries every M once, the baseline too.
    file = space_file(folder, parameters=PARAMETERS, sampler="tpe", trials=6)
    command = [sys.executable, "-m", "klray.tune", "--space", str(file), "--name", "study"]
    command += ["--trial-runner", "inline", "--tracking-uri", uri]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "study"]
    runs = client.search_runs([experiment.experiment_id])
    (top,) = [run for run in runs if run.data.tags["klray.kind"] == "study"]
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == top.info.run_id]
    trials = sorted(trials, key=lambda run: run.info.start_time)
    return Study(uri, experiment.experiment_id, top.info.run_id, trials, result.stdout)


class Pages:
    """MLflow's pages in Chromium: what a researcher clicks, and what is then drawn."""

    def __init__(self, browser: Any) -> None:
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser = browser
        # What moves, or is covered still, is tried again.
        self.wait = WebDriverWait(browser, 120, ignored_exceptions=[WebDriverException])

    def open(self, url: str, heading: str) -> None:
        """A page whose heading is there; the panel beside it, open at first, is closed."""
        self.browser.get(url)
        self.find(f"//*[self::h1 or self::h2][normalize-space()='{heading}']")
        for button in self.browser.find_elements("css selector", "[data-component-id$='chat_panel.close']"):
            button.click()

    def visible(self, path: str) -> Any:
        return next((e for e in self.browser.find_elements("xpath", path) if e.is_displayed()), None)

    def find(self, path: str) -> Any:
        """The first visible element of an XPath, waited for."""
        return self.wait.until(lambda b: self.visible(path), path)

    def click(self, path: str) -> None:
        def clicked(browser: Any) -> bool:
            element = self.visible(path)
            if element is not None:
                element.click()
            return element is not None

        self.wait.until(clicked, path)

    def fill(self, label: str, *keys: str) -> None:
        """Chooses axes of the parallel coordinates plot, by typing their names."""
        self.click(f"//div[normalize-space()='{label}']/following-sibling::*[1]")
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)
            self.click(f"//*[contains(@class, 'select-item-option')][@title='{key}']")
        self.browser.switch_to.active_element.send_keys("\ue00c")  # Escape: closes the list

    def choose(self, selector: str, key: str) -> None:
        """Sets an axis of the scatter or the contour plot."""
        self.click(f"//*[@id='{selector}']")
        self.click(f"//*[@role='option'][normalize-space()='{key}']")

    def texts(self, *selectors: str) -> list[str]:
        """Of SVG elements of the plot."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return [text for part in selectors for text in self.browser.execute_script(script, f"{PLOT} {part}")]

    def titles_are(self, expected: list[str], *selectors: str) -> None:
        self.wait.until(lambda b: self.texts(*selectors) == expected, f"{selectors} must be {expected}")

    def plotted(self, trace: int, axis: str) -> list[float]:
        """What Plotly was given to draw along an axis."""
        data = self.browser.execute_script(f"return document.querySelector({PLOT!r}).data[{trace}].{axis}")
        return [float(value) for value in data]

    def coloured(self, left: float = 0.0, right: float = 1.0) -> float:
        """The part of the plot's pixels, between two fractions of its width, that are neither white, grey nor black."""
        script = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
        x, y, width, height = map(
            self.browser.execute_script(script, f"{PLOT} .main-svg").get, ("x", "y", "width", "height")
        )
        box = (x + left * width, y, x + right * width, y + height)
        with Image.open(io.BytesIO(self.browser.get_screenshot_as_png())) as image:
            part = image.convert("RGB").crop(tuple(map(round, box)))
        pixels = np.asarray(part).astype(int)
        return float(((pixels.max(axis=2) - pixels.min(axis=2)) > 60).mean())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # Lines and points are drawn by WebGL, here in software.
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-quic"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield Pages(browser)


def keep(pages: Pages, file: Path) -> None:
    """A screenshot, which must show something; KLRAY_SCREENSHOTS names a folder that keeps it."""
    pages.browser.save_screenshot(str(file))
    with Image.open(file) as image:
        assert image.size == SIZE
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 500
    if folder := os.environ.get("KLRAY_SCREENSHOTS"):
        shutil.copy(file, folder)


def test_trials_are_nested_below_their_study(study: Study, pages: Pages, tmp_path: Path) -> None:
    """Opened, a study shows its trials; ticked, they are compared."""
    trials = {run.info.run_name: run.info.run_id for run in study.trials}
    assert len(trials) == 6
    for run in study.trials:  # named by what varies
        terms, lr, grid = (run.data.params[key] for key in (TERMS, LR, GRID))
        assert run.info.run_name == f"M={terms} lr={float(lr):.3g} time_grid={grid}"
    assert set(study.numbers(TERMS)) == {0, 2, 4}
    pages.open(f"{study.uri}/#/experiments/{study.experiment}/runs", "Training runs")

    def place(name: str, run_id: str) -> dict[str, int]:
        return pages.find(f"//*[@row-id='{run_id}']//a[normalize-space()='{name}']").rect

    top = place("study", study.run_id)
    assert not pages.browser.find_elements("xpath", "//*[@role='row']//a[starts-with(normalize-space(), 'M=')]")
    pages.click(f"//*[@row-id='{study.run_id}']//button[contains(@data-component-id, 'runname')]")
    for name, run_id in trials.items():
        below = place(name, run_id)
        assert below["x"] > top["x"]  # indented
        assert below["y"] > top["y"]
    keep(pages, tmp_path / "study_runs.png")
    for run_id in trials.values():
        pages.click(f"//*[@row-id='{run_id}']//*[contains(@class, 'ag-checkbox-input-wrapper')]")
    pages.click("//button[normalize-space()='Compare']")
    pages.find("//*[normalize-space()='Comparing 6 Runs from 1 Experiment']")


@pytest.fixture
def compared(study: Study, pages: Pages) -> Pages:
    """The page that the button above leads to."""
    ids = json.dumps([run.info.run_id for run in study.trials], separators=(",", ":"))
    url = f'{study.uri}/#/compare-runs?runs={ids}&experiments=["{study.experiment}"]'
    pages.browser.get("about:blank")  # a new page, with nothing chosen yet
    pages.open(url, "Comparing 6 Runs from 1 Experiment")
    return pages


def test_parallel_coordinates_of_settings_and_score(study: Study, compared: Pages, tmp_path: Path) -> None:
    compared.click("//*[@data-testid='clear-button']")
    compared.fill("Parameters:", TERMS, LR, GRID)
    compared.fill("Metrics:", SCORE)
    axes = [TERMS, LR, GRID, SCORE]
    compared.titles_are(axes, ".axis-title")
    assert compared.texts(".axis-extent-top-text") == [f"{max(study.numbers(key)):.5f}" for key in axes]
    assert compared.texts(".axis-extent-bottom-text") == [f"{min(study.numbers(key)):.5f}" for key in axes]
    for number, key in enumerate(axes):
        assert compared.plotted(0, f"dimensions[{number}].values") == study.numbers(key)
    # The scale of colours is to the right of the last axis; what is coloured before it are the trials' lines.
    compared.wait.until(lambda b: compared.coloured(right=0.8) > 0.002, "lines must be drawn")
    keep(compared, tmp_path / "parallel_coordinates.png")


def test_a_setting_against_the_score(study: Study, compared: Pages, tmp_path: Path) -> None:
    compared.click("//*[@role='tab'][normalize-space()='Scatter Plot']")
    compared.choose("y-axis-selector", SCORE)
    for key in (TERMS, GRID, LR):
        compared.choose("x-axis-selector", key)
        compared.titles_are([key, SCORE], ".xtitle", ".ytitle")
        assert compared.plotted(0, "x") == study.numbers(key)
        assert compared.plotted(0, "y") == study.numbers(SCORE)
    compared.wait.until(lambda b: compared.coloured() > 0.0005, "points must be drawn")
    keep(compared, tmp_path / "scatter.png")


def test_two_settings_and_the_score_as_contours(study: Study, compared: Pages, tmp_path: Path) -> None:
    compared.click("//*[@role='tab'][normalize-space()='Contour Plot']")
    compared.choose("yaxis-selector", LR)
    compared.choose("zaxis-selector", SCORE)
    for key in (GRID, TERMS):
        compared.choose("xaxis-selector", key)
        compared.titles_are([key, LR], ".xtitle", ".ytitle")
        assert compared.texts(".contourlayer path")
        for axis, shown in (("x", key), ("y", LR), ("z", SCORE)):
            assert compared.plotted(0, axis) == study.numbers(shown)
    compared.wait.until(lambda b: compared.coloured() > 0.1, "contours must be filled")
    keep(compared, tmp_path / "contour.png")


SHOWN = [f"params.`{key}`" for key in (TERMS, LR, GRID)]
SHOWN += [f"metrics.`{SCORE}`", "metrics.`budget_used`", "tags.`klray.state`"]


def attributes(pages: Pages, selector: str, name: str, axis: str) -> list[str]:
    """Of the elements, as they lie along an axis."""
    script = "return [...document.querySelectorAll(arguments[0])]"
    script += ".map(e => [e.getBoundingClientRect()[arguments[2]], e.getAttribute(arguments[1])])"
    return [value for _, value in sorted(pages.browser.execute_script(script, selector, name, axis))]


def test_the_printed_link_opens_the_trials_by_what_varies(study: Study, pages: Pages, tmp_path: Path) -> None:
    """Told when the study starts and when it ends; of fifty settings those that vary, and the best trial first."""
    links = re.findall(rf"^MLflow +({re.escape(study.uri)}/#\S+)$", study.printed, re.MULTILINE)
    assert len(links) == 2
    assert study.printed.index(links[0]) < study.printed.index("trial 0 starts")
    assert links[0] == links[1]
    pages.browser.get("about:blank")
    pages.open(links[0], "Training runs")
    best = sorted(study.trials, key=lambda run: run.data.metrics[SCORE])
    for run in best:
        pages.find(f"//*[@row-id='{run.info.run_id}']")
    rows = attributes(pages, ".ag-pinned-left-cols-container [role=row]", "row-id", "y")
    assert rows == [run.info.run_id for run in best]
    columns = attributes(pages, ".ag-header-viewport .ag-header-cell[col-id]", "col-id", "x")
    assert columns == [*SHOWN, "duration"]  # which MLflow always shows
    assert len(best[0].data.params) > 50
    keep(pages, tmp_path / "trials.png")


def test_the_study_s_note_leads_to_a_chart_of_its_trials(study: Study, pages: Pages, tmp_path: Path) -> None:
    pages.open(f"{study.uri}/#/experiments/{study.experiment}/runs/{study.run_id}", "study")
    pages.find("//*[normalize-space()='Does it work?']")
    table, chart = (
        pages.find(f"//a[.='{name}']").get_attribute("href") for name in ("The runs, the best first", "Chart")
    )
    assert table in study.printed
    pages.browser.get("about:blank")
    pages.open(chart, "Training runs")
    axes = "return [...document.querySelectorAll('.parcoords .dimension text.label')].map(e => e.textContent)"
    shown = [TERMS, LR, GRID, SCORE]
    pages.wait.until(lambda b: b.execute_script(axes) == shown, f"the axes must be {shown}")
    keep(pages, tmp_path / "trials_chart.png")


def test_a_trial_s_page_begins_with_its_score_and_settings(study: Study, pages: Pages, tmp_path: Path) -> None:
    run = study.trials[0]
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", run.data.tags["mlflow.note.content"], re.MULTILINE))
    assert rows[SCORE] == f"{run.data.metrics[SCORE]:.5g}"
    assert rows["budget"] == f"{run.data.metrics['budget_used']:.0%} of 640 network_evals"
    assert rows["varied"] == run.info.run_name
    assert {key: rows[key] for key in (TERMS, LR)} == {key: run.data.params[key] for key in (TERMS, LR)}
    assert len(rows) < 20
    pages.open(f"{study.uri}/#/experiments/{study.experiment}/runs/{run.info.run_id}", run.info.run_name)
    pages.find(f"//th[normalize-space()='{SCORE}']/following-sibling::th[normalize-space()='{rows[SCORE]}']")
    keep(pages, tmp_path / "trial.png")
