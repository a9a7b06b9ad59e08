"""A learned schedule in diffusers' own pipelines draws what klray draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from torch import Tensor

from klray.core.denoiser import TermDenoiser
from klray.core.process import SingleTerm
from klray.core.schedule import VPLinear
from klray.core.solvers import SOLVERS
from klray.networks.terms import TermNetwork
from klray.networks.unet import build_unet
from klray.schedules.learned_schedule import LearnedSchedule

GRID = [1.0, 0.62, 0.3, 0.11, 0.02, 1e-3]


def learned(solver: str, nfe: int, scale: list[float] | None = None) -> LearnedSchedule:
    steps = SOLVERS[solver].plan(nfe)[0]
    times = [GRID[0], *GRID[6 - steps : 5], GRID[-1]] if steps < 5 else GRID
    shown = [times[0], *(0.97 * t for t in times[1:-1]), times[-1]]
    lam = VPLinear().lam(torch.tensor(times, dtype=torch.float64)).tolist()
    return LearnedSchedule(solver, nfe, {}, times, shown, lam, scale, "logsnr", True, 0.0, {}, {}, {"final": "denoise"})


@pytest.mark.parametrize(
    ("solver", "nfe"), [("ddim", 5), ("unipc_3", 5), ("ipndm_3", 4), ("heun", 6), ("dpm_solver_3", 7)]
)
def test_the_pipeline_draws_what_klray_draws(solver: str, nfe: int) -> None:
    torch.manual_seed(0)
    unet = build_unet(
        image_size=8, in_channels=1, out_channels=1, channels=[8, 8], attention=[False, False], norm_groups=4
    ).eval()
    steps = SOLVERS[solver].plan(nfe)[0]
    schedule = learned(solver, nfe, scale=[1.0 + 0.02 * i for i in range(steps)])
    scheduler = schedule.to_diffusers()
    assert len(scheduler.timesteps) == nfe
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    # DDPMPipeline draws the first state itself, of unit deviation.
    drawn = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=nfe, output_type="np").images
    denoiser = TermDenoiser(TermNetwork(unet, 1), SingleTerm(VPLinear()))
    with torch.no_grad():
        expected: Tensor = schedule.sample(denoiser, VPLinear(), noise / scheduler.init_noise_sigma)
    pixels = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(drawn - pixels).max() < 2e-4
    again = pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=nfe, output_type="np").images
    assert (again == drawn).all()


def test_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    scheduler = learned("ddim", 5).to_diffusers()
    with pytest.raises(ValueError, match="num_inference_steps must be 5, what was learned, got 1000"):
        scheduler.set_timesteps(1000)
