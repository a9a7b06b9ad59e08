"""The model of a step's seconds: its terms, the measurements that it was fitted to, and what --dry-run says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from klray import train
from klray.build import build_network
from klray.config import load_config
from klray.training.cost import cost_of, step_work
from klray.training.step_time import (
    _AGAIN,
    _LINKS,
    UNET_SHARE,
    Machine,
    StepWork,
    convolution_rate,
    expected_lines,
    meshes_by_time,
    step_time,
)

WORK = StepWork(images=64, terms=8, flops_per_eval=1e9, parameters=10**6, numbers=3072, coupled=True)
MACHINE = Machine(rate=1e11, full_speed=64, fixed=0.01, latency=0.001, bandwidth=1e9)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "scaling_cpu.json"


def test_alone_there_is_only_compute() -> None:
    alone = step_time(WORK, MACHINE, 1, 1)
    assert alone.compute == pytest.approx(64 * 8 * 1e9 / 1e11 + 0.01)
    assert (alone.gradients, alone.basis) == (0, 0)


@pytest.mark.parametrize(("data", "basis"), [(4, 1), (1, 4), (2, 2)])
def test_a_mesh_shares_the_evaluations_and_pays_for_its_sums(data: int, basis: int) -> None:
    spread = step_time(WORK, MACHINE, data, basis)
    assert spread.compute == pytest.approx(64 * 8 * 1e9 / 1e11 / 4 + 0.01)
    assert spread.gradients == pytest.approx(0.001 + 2 * 3 / 4 * 4e6 / 1e9)
    images = 64 // data
    expected = 0.001 + 2 * (basis - 1) / basis * 4 * 3072 * images / 1e9 if basis > 1 else 0
    assert spread.basis == pytest.approx(expected)


def test_terms_that_do_not_split_evenly_wait_for_the_slowest() -> None:
    assert step_time(replace(WORK, terms=5), MACHINE, 1, 4).compute == pytest.approx(64 * 2 * 1e9 / 1e11 + 0.01)


def test_a_loss_without_coupling_needs_no_basis_sums() -> None:
    assert step_time(replace(WORK, coupled=False), MACHINE, 1, 4).basis == 0


def test_ranks_that_share_cores_take_longer() -> None:
    crowded = step_time(WORK, replace(MACHINE, full_speed=2), 4, 1)
    assert crowded.compute == pytest.approx(2 * step_time(WORK, MACHINE, 4, 1).compute)


def test_meshes_are_sorted_and_fit() -> None:
    found = meshes_by_time(replace(WORK, images=6), MACHINE, 4)
    assert {mesh[:2] for mesh in found} == {(2, 2), (1, 4)}  # 6 images do not split over 4 ranks
    seconds = [mesh[2].total for mesh in found]
    assert seconds == sorted(seconds)


def test_the_recorded_measurements() -> None:
    """Within 30 %: the constants that the model has are those of the recorded fit."""
    recorded = json.loads(RESULTS.read_text())
    fitted = dict(recorded["constants"])
    rate = fitted.pop("unet_share") * recorded["convolution_flops_per_s"]
    config = load_config(recorded["preset"])
    work = step_work(config, cost_of(config, build_network(config)))
    for row in recorded["rows"]:
        data, basis = (int(size) for size in row["mesh"].split(" x "))
        said = step_time(replace(work, images=row["batch"]), Machine(rate=rate, **fitted), data, basis).total
        assert said == pytest.approx(row["seconds"], rel=0.3)


def test_the_work_of_a_configuration() -> None:
    config = load_config("digits", ["optimizer.batch_size=32"])
    cost = cost_of(config, build_network(config))
    work = step_work(config, cost)
    assert (work.images, work.terms, work.coupled) == (32, config.evals_per_image, True)
    assert work.flops_per_eval * work.terms == cost["cost.train_flops_per_image"]
    vp = load_config("digits", ["process.num_terms=0"])
    assert not step_work(vp, cost_of(vp, build_network(vp))).coupled


def test_a_rate_is_measured() -> None:
    assert 1e8 < convolution_rate(torch.device("cpu"), seconds=0.05) < 1e13
    assert torch.get_num_threads() == 1


def test_advice() -> None:
    slow = Machine(rate=1e11, full_speed=64, fixed=0.0, latency=1.0, bandwidth=1e9)
    said = "\n".join(expected_lines(WORK, slow, 1, 4))
    assert "efficiency  about" in said and "faster      4 (data) x 1 (basis)" in said
    assert "cuts activations" in "\n".join(expected_lines(WORK, slow, 4, 1))


def test_a_dry_run_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "digits", "--dry-run", "--workers", "4", "--set", "mesh.basis=2"]) == 0
    said = capsys.readouterr().out
    assert "step        about " in said and "efficiency  about " in said and "of 4 workers" in said


def test_the_recorded_steps_of_a_gpu() -> None:
    """Within 8 %, from the convolution that the same card was timed with: one pass, eight, small and large batches."""
    lines = [json.loads(line) for line in (RESULTS.parent / "gpu_h200.jsonl").read_text().splitlines()]
    convolution = next(v for line in lines if (v := line.get("conv_bf16_tflops torch.channels_last"))) * 1e12
    milliseconds = {line["name"]: line["ms_a_step"] for line in lines if line.get("stage") == "speed"}
    rows = {
        "vp 128": (128, ["process.num_terms=0"]),
        "vp 16": (16, ["process.num_terms=0"]),
        "kl8 whole 128": (128, []),
        "kl8 chunk1 128": (128, ["loss.term_chunk=1"]),
        "kl8 wide 128": (128, ["network.architecture=wide"]),
        "kl8 k1 128": (128, ["loss.partial_terms=1"]),
    }
    fixed, latency, bandwidth = _LINKS["cuda"]
    machine = Machine(UNET_SHARE["cuda"] * convolution, 1, fixed, latency, bandwidth, _AGAIN["cuda"])
    for name, (batch, changes) in rows.items():
        config = load_config("cifar10", [f"optimizer.batch_size={batch}", *changes])
        work = step_work(config, cost_of(config, build_network(config)))
        assert 1e3 * step_time(work, machine, 1, 1).total == pytest.approx(milliseconds[name], rel=0.08), name
