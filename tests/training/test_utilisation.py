"""The share of a GPU's peak: cards by their names, and the arithmetic."""

from __future__ import annotations

import pytest
import torch

from klray.training.utilisation import gpu_busy, peak_tflops, utilisation


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121.0),
        ("Another Card 3000", None),
    ],
)
def test_a_card_is_known_by_its_name(card: str, peak: float | None) -> None:
    assert peak_tflops(card) == peak


def test_three_forward_passes_count_for_a_step() -> None:
    """7,255 evaluations of 12.44 GFLOP a second, as measured on an H200."""
    found = utilisation(7255.0, 12.44e9, 1, torch.device("cpu"))
    assert found == {"perf/tflops": pytest.approx(270.8, rel=1e-3)}


def test_a_card_tells_how_busy_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "utilization", {card: 97}.__getitem__)
    assert gpu_busy(card) == {"perf/gpu_busy": 0.97}
    assert gpu_busy(torch.device("cpu")) == {}


@pytest.mark.parametrize("error", [ModuleNotFoundError("nvidia-ml-py"), RuntimeError("no driver")])
def test_nothing_is_said_where_a_card_does_not_tell(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> int:
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert gpu_busy(torch.device("cuda")) == {}
