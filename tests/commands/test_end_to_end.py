"""The commands as a user runs them: Ray, torchrun, a real MLflow server, its pages in Chromium, Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from klray.runs.checkpoint import load_latest
from klray.runs.progress import kept
from klray.runs.records import history, read_records
from klray.tracking.state import load_state
from tests.runs.run_folders import tensors
from tests.tracking.mlflow_server import Server

pytestmark = pytest.mark.slow
QUICK = ["optimizer.batch_size=32", "validation.images=32", "sampling.images=9", "sampling.batch_size=9"]
QUICK += ["sampling.num_steps=5", "tracking.every_steps=5"]


def command(module: str, *argv: str) -> list[str]:
    return [sys.executable, "-m", f"klray.{module}", *argv]


def settings(*changes: str) -> list[str]:
    return [part for change in (*QUICK, *changes) for part in ("--set", change)]


def run(argv: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(argv, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def trained(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on Ray with two workers along the basis axis, in a server's MLflow: its folder and its MLflow run id."""
    folder = tmp_path_factory.mktemp("trained")
    changes = ["budget.amount=1600", "mesh.basis=auto", f"tracking.uri={server.uri}", "sampling.every_images=800"]
    profile = ["--profile", "2:4"]
    result = run(command("train", "--config", "digits", "--workers", "2", *profile, *settings(*changes)), folder)
    assert result.returncode == 0, result.stderr
    assert "validation  eps_mse" in result.stdout
    assert "1,600 images · 6,400 network evals" in result.stdout
    (run_dir,) = (folder / "runs").iterdir()
    state = load_state(run_dir)
    assert state is not None
    return run_dir, str(state.run_id)


def test_mlflow_holds_the_profile(trained: tuple[Path, str], server: Server) -> None:
    from mlflow import MlflowClient

    found = MlflowClient(server.uri).list_artifacts(trained[1], "profile")
    assert {artifact.path for artifact in found} == {"profile/kernels.txt", "profile/trace.json.gz"}


@pytest.mark.essential
def test_mlflow_holds_the_whole_run(trained: tuple[Path, str], server: Server) -> None:
    from mlflow import MlflowClient

    run_dir, run_id = trained
    client = MlflowClient(server.uri)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    params = found.data.params
    assert params["process.num_terms"] == "4"
    assert (params["mesh.data"], params["mesh.basis"]) == ("1", "2")
    assert params["cost.parameters"] == "164241"
    assert found.data.tags["klray.kind"] == "train"
    for key, series in history(run_dir).items():
        points = {(m.step, round(m.value, 9)) for m in client.get_metric_history(run_id, key)}
        assert points == {(step, round(value, 9)) for step, value in series}, key
    images = [a.path for a in client.list_artifacts(run_id, "images")]
    assert images == ["images/samples_000000800.png", "images/samples_000001600.png"]


def test_the_pages_show_params_curves_and_samples(trained: tuple[Path, str], server: Server, tmp_path: Path) -> None:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    from mlflow import MlflowClient
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--window-size=1500,1200"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path}/profile")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    _, run_id = trained
    experiment = MlflowClient(server.uri).get_run(run_id).info.experiment_id
    page = f"{server.uri}/#/experiments/{experiment}/runs/{run_id}"
    with webdriver.Chrome(options=options, service=service) as browser:
        wait = WebDriverWait(browser, 120)

        def text_holds(*words: str) -> None:
            # What is scrolled out of sight counts: textContent, not what is displayed.
            script = "return document.body.textContent"
            wait.until(lambda b: all(word in b.execute_script(script) for word in words))

        browser.get(page)
        text_holds("klray.kind", "train/loss", "val/eps_mse", "process.num_terms", "Finished")
        browser.save_screenshot(str(tmp_path / "overview.png"))
        browser.get(f"{page}/model-metrics")
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .scatterlayer .trace")) >= 2)
        browser.save_screenshot(str(tmp_path / "curves.png"))
        browser.get(f"{page}/artifacts/images/samples_000001600.png")
        wait.until(
            lambda b: any(
                b.execute_script("return arguments[0].naturalWidth", image) == 3 * 33 + 1
                for image in b.find_elements(By.TAG_NAME, "img")
            )
        )
        browser.save_screenshot(str(tmp_path / "samples.png"))
    kept = os.environ.get("KLRAY_SCREENSHOTS")
    if kept:
        for picture in tmp_path.glob("*.png"):
            shutil.copy(picture, kept)


def test_sampling_by_mlflow_run_id(trained: tuple[Path, str], server: Server, tmp_path: Path) -> None:
    run_dir, run_id = trained
    how = ["--nfe", "4", "--seeds", "0-3"]
    by_id = command("sample", "--checkpoint", run_id, "--tracking-uri", server.uri, "--out", "a.png", *how)
    assert run(by_id, tmp_path).returncode == 0
    assert run(command("sample", "--checkpoint", str(run_dir), "--out", "b.png", *how), tmp_path).returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    missing = run(command("sample", "--checkpoint", "0" * 32, "--tracking-uri", server.uri), tmp_path)
    assert missing.returncode == 2
    assert "no MLflow run" in missing.stderr


def test_training_goes_on_without_mlflow_and_upload_sends_it_later(tmp_path: Path) -> None:
    changes = ["budget.amount=320", "tracking.uri=http://127.0.0.1:9"]
    result = run(
        command("train", "--config", "digits", "--runner", "local", "--name", "alone", *settings(*changes)), tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "training goes on" in result.stdout
    assert "finished alone" in result.stdout
    assert "python -m klray.upload" in result.stderr
    later = run(command("upload", "runs/alone", "--tracking-uri", "sqlite:///later.db"), tmp_path)
    assert later.returncode == 0, later.stderr
    from mlflow import MlflowClient

    state = load_state(tmp_path / "runs" / "alone")
    assert state is not None
    metrics = MlflowClient(f"sqlite:///{tmp_path}/later.db").get_run(str(state.run_id)).data.metrics
    assert metrics["images_seen"] == 320


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_ctrl_c_stops_cleanly_and_the_command_resumes(runner: str, tmp_path: Path) -> None:
    changes = ["budget.amount=6400", "checkpoint.every_images=320", "tracking.uri=off"]
    argv = command("train", "--config", "digits", "--runner", runner, "--name", "stopped", *settings(*changes))
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "runs" / "stopped"
    while len(history(run_dir).get("step", [])) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "The same command again goes on from the last checkpoint." in errors
    assert "Traceback" not in errors
    assert [r["status"] for r, _ in read_records(run_dir) if r["kind"] == "status"] == ["RUNNING", "KILLED"]
    again = run(argv, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "6,400 images" in again.stdout
    steps = [step for step, _ in history(run_dir)["train/loss"]]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_sigterm_stops_after_a_checkpoint_and_no_step_is_lost(runner: str, tmp_path: Path) -> None:
    changes = ["budget.amount=6400", "checkpoint.every_images=3200", "tracking.uri=off"]
    argv = command("train", "--config", "digits", "--runner", runner, "--name", "stopped", *settings(*changes))
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "runs" / "stopped"
    while len(history(run_dir).get("step", [])) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "klray.train: stopped by SIGTERM. The same command again goes on from the last checkpoint." in errors
    assert "Traceback" not in errors
    assert [r["status"] for r, _ in read_records(run_dir) if r["kind"] == "status"] == ["RUNNING", "KILLED"]
    there, seen = kept(run_dir, pytest.fail), history(run_dir)["images_seen"][-1][1]
    assert there is not None and seen <= there.images_seen < 6400
    again = run(argv, tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"goes on from {there.images_seen:,} images" in again.stdout
    assert "6,400 images" in again.stdout


def test_sigterm_to_one_of_torchruns_processes_stops_all(tmp_path: Path) -> None:
    """They agree on the step: what goes on from there ends with the bits of a run that was never stopped."""
    more = settings("network.kind=mlp", "tracking.uri=off", "budget.amount=6400", "checkpoint.every_images=3200")
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29534"]
    argv += ["-m", "klray.train", "--config", "digits", "--runner", "torchrun", "--set", "mesh.basis=2", *more]
    process = subprocess.Popen([*argv, "--name", "stopped"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "runs" / "stopped"
    while len(history(run_dir).get("step", [])) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "klray.train" in child.cmdline()
    ]
    other = next(child for child in ranks if child.environ().get("RANK") == "1")
    other.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert (
        errors.count("klray.train: stopped by SIGTERM. The same command again goes on from the last checkpoint.") == 2
    )
    assert [r["status"] for r, _ in read_records(run_dir) if r["kind"] == "status"] == ["RUNNING", "KILLED"]
    there = kept(run_dir, pytest.fail)
    assert there is not None and 0 < there.images_seen < 6400
    for name, also in (("stopped", []), ("whole", ["--profile", "3:5"])):
        assert run([*argv, "--name", name, *also], tmp_path).returncode == 0
    assert (tmp_path / "runs" / "whole" / "profile" / "kernels.txt").read_text().startswith("steps 3 to 5 on the CPU")
    found, wanted = tensors(run_dir), tensors(tmp_path / "runs" / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert history(run_dir)["train/loss"] == history(tmp_path / "runs" / "whole")["train/loss"]


def test_torchrun_continues_what_a_plain_process_began(tmp_path: Path) -> None:
    """Another runner and another mesh: equal to rounding, as one run of a single process."""
    mlp = ["network.kind=mlp", "tracking.uri=off", "precision.amp=off", "checkpoint.every_images=160"]

    def train(name: str, amount: int, launcher: list[str], *extra: str) -> str:
        more = settings(*mlp, f"budget.amount={amount}")
        argv = ["-m", "klray.train", "--config", "digits", "--name", name, *more, *extra]
        result = run([*launcher, *argv], tmp_path, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        return result.stdout

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533"]
    train("mixed", 320, [sys.executable], "--runner", "local")
    train("mixed", 640, torchrun, "--runner", "torchrun", "--set", "mesh.basis=2")
    # A finished run ends at once on every rank, none waiting for another.
    assert "has finished" in train("mixed", 640, torchrun, "--runner", "torchrun", "--set", "mesh.basis=2")
    train("single", 640, [sys.executable], "--runner", "local")
    ends = []
    for name in ("mixed", "single"):
        latest = load_latest(tmp_path / "runs" / name, pytest.fail)
        assert latest is not None
        tensors = load_file(latest / "training.safetensors")
        ends.append(torch.cat([t.flatten() for key, t in sorted(tensors.items()) if key.startswith("network.")]))
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 1e-4


def test_a_second_driver_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    changes = settings("budget.amount=64000", "tracking.uri=off")
    argv = command("train", "--config", "digits", "--runner", "local", "--name", "one", *changes)
    first = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "runs" / "one" / "records.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = run(argv, tmp_path)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "run one is being trained by another process" in second.stderr
