"""How much of a GPU's arithmetic and time training uses."""

from __future__ import annotations

import torch

# Dense bf16 or fp16 TFLOP/s on tensor cores, as the makers' data sheets have them; the longest name that fits counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "T4": 65.0,
    "V100": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_tflops(card: str) -> float | None:
    """Of a card by its name; None for one that is not in the table."""
    words = card.replace("-", " ").split()
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= set(words)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def utilisation(evals_per_s: float, flops_per_eval: float, ranks: int, device: torch.device) -> dict[str, float]:
    """``perf/tflops``, forward and backward of the network's evaluations over all ranks; ``perf/mfu``, its share of the
    peak of as many such GPUs, where the card is known. A chunked loss's second forward pass does not count."""
    tflops = 3 * flops_per_eval * evals_per_s / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {"perf/tflops": tflops} | ({} if peak is None else {"perf/mfu": tflops / (ranks * peak)})


def gpu_busy(device: torch.device) -> dict[str, float]:
    """``perf/gpu_busy``, the share of the last moments (NVML's sample, a sixth of a second to a second) in which this
    rank's card ran any kernel, whoever's; nothing on the CPU, and where NVML does not tell."""
    if device.type != "cuda":
        return {}
    try:
        return {"perf/gpu_busy": torch.cuda.utilization(device) / 100}
    except Exception:  # its errors have no base that could be named without the package, and none may end training
        return {}
