"""Optimisers and rate schedules of the registries, in runs of a few steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import klray
from klray.config import ConfigError, load_config, override
from klray.training.rates import constant, cosine, wsd
from klray.training.step import rate_of

TINY = {
    "network.channels": [8, 8],
    "process.num_terms": 2,
    "optimizer.batch_size": 8,
    "optimizer.warmup_images": 0,
    "budget.unit": "steps",
    "budget.amount": 6,
    "validation.images": 4,
    "validation.time_bins": 1,
    "sampling.images": 1,
    "sampling.num_steps": 1,
    "tracking.uri": "off",
    "tracking.every_steps": 1,
}
MUON = {"optimizer.kind": "muon", "optimizer.lr": 0.02}


def test_rates_are_what_they_say() -> None:
    shares = [0.0, 0.25, 0.5, 0.8, 0.9, 1.0]
    assert [constant(share) for share in shares] == [1.0] * 6
    assert [cosine(share) for share in shares] == pytest.approx([(1 + math.cos(math.pi * s)) / 2 for s in shares])
    assert cosine(1.0, final_share=0.1) == pytest.approx(0.1)
    assert [wsd(share) for share in shares] == pytest.approx([1, 1, 1, 1, 0.5, 0])
    assert wsd(0.95, decay_share=0.1, final_share=0.2) == pytest.approx(0.6)


def test_the_rate_of_a_step_is_warm_up_times_schedule() -> None:
    changes = {"optimizer.rate": "cosine", "optimizer.warmup_images": 16, "optimizer.lr": 1.0}
    config = override(load_config("digits").model_dump(mode="json"), (TINY | changes).items())
    rate = rate_of(config)
    expected = [min(1.0, (8 * i + 8) / 16) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert [rate(8 * i) for i in range(6)] == pytest.approx(expected)


def test_another_budget_is_another_run_where_the_rate_is_laid_out_over_it() -> None:
    for name, same in (("constant", True), ("wsd", False)):
        names = {
            load_config("digits", [f"optimizer.rate={name}", f"budget.amount={amount}"]).default_name()
            for amount in (1000, 2000)
        }
        assert (len(names) == 1) is same
    with pytest.raises(ConfigError, match="optimizer.rate cosine needs a budget that is the same each time"):
        load_config("digits", ["optimizer.rate=cosine", "budget.unit=seconds", "budget.amount=5"])


@pytest.mark.parametrize("settings", [MUON, {"optimizer.rate": "wsd"}], ids=["muon", "wsd"])
def test_a_run_goes_on_bit_for_bit(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an optimiser counts its steps in its groups, and where a rate depends on the budget."""
    monkeypatch.chdir(tmp_path)
    every = {"checkpoint.every_images": 24, "checkpoint.keep": 10}
    whole = klray.train("digits", TINY | settings | every, runner="local", name="whole")
    middle = sorted(whole.path.glob("checkpoints/*"))
    assert len(middle) == 2
    part = tmp_path / "runs" / "part"
    klray.train("digits", TINY | settings | every, runner="local", name="part")
    (newest,) = sorted(part.glob("checkpoints/*"))[1:]
    kept = load_file(newest / "training.safetensors")
    for file in newest.rglob("*"):
        if file.is_file():
            file.unlink()
    for folder in sorted(newest.rglob("*"), reverse=True):
        folder.rmdir()
    newest.rmdir()  # as if the run had been killed before it
    klray.train("digits", TINY | settings | every, runner="local", name="part")
    again = load_file(newest / "training.safetensors")
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_muon_moves_hidden_kernels_along_orthogonal_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step: a kernel's move, as a matrix, has singular values near its rate; biases move as AdamW's, by theirs."""
    monkeypatch.chdir(tmp_path)
    few = TINY | MUON | {"budget.amount": 1, "optimizer.clip_norm": None}
    moved = klray.train("digits", few, runner="local", name="moved")
    still = klray.train("digits", few | {"optimizer.lr": 1e-30}, runner="local", name="still")
    tensors = [load_file(next(run.path.glob("checkpoints/*/training.safetensors"))) for run in (moved, still)]
    name = "network.backbone.mid_block.resnets.0.conv1.weight"
    move = (tensors[0][name] - tensors[1][name]).flatten(1)
    values = torch.linalg.svdvals(move) / 0.02
    assert float(values.min()) > 0.5 and float(values.max()) < 1.6
    bias = (tensors[0]["network.backbone.conv_in.bias"] - tensors[1]["network.backbone.conv_in.bias"]).abs()
    assert float(bias.max()) == pytest.approx(0.02 * 0.015, rel=0.05)


def test_edm_trains_on_its_own_noise_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    edm = {"process.num_terms": 0, "process.schedule": "edm", "loss.prediction": "edm", "budget.amount": 40}
    run = klray.train("digits", TINY | edm | {"optimizer.lr": 3e-3}, runner="local", name="edm")
    losses = run.metrics()["train/loss"].dropna()
    assert losses.tail(8).mean() < 0.8 * losses.head(4).mean()
    images = run.model().sample(range(4), solver="heun", nfe=8, timesteps="edm", batch_size=4)
    assert images.shape == (4, 1, 8, 8) and float(images.float().std()) > 1
    with pytest.raises(ConfigError, match="process.schedule edm is not variance preserving"):
        load_config("digits", ["process.schedule=edm"])
