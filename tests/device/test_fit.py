"""LD3 on the second device: the teacher's pairs and the fit are the CPU's, and solver steps cost no waiting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from klray.evaluation.feature_maps import efficientnet_maps
from klray.sampling.model import load_model
from klray.schedules.ask import teacher_of
from klray.schedules.fit import fit_timesteps
from klray.schedules.fit_settings import FitSettings
from klray.schedules.learned_schedule import LearnedSchedule
from klray.schedules.learners import ADAM
from klray.schedules.perceptual import FeatureDistance
from klray.schedules.teacher import TeacherPairs
from tests.device.second_device import Counting
from tests.models import klray_model

CPU = torch.device("cpu")
QUICK = FitSettings(validation_pairs=4, rounds_theta=1, rounds_both=1, margin=0.0)
FITS: dict[str, tuple[str, FitSettings]] = {
    "ld3": ("unipc_3", QUICK),
    "adam, kept activations": ("ddim", replace(ADAM, validation_pairs=4, rounds_both=2, recompute=False)),
    "in time, with a scale": ("ipndm_3", replace(QUICK, space="time", output_scale=True)),
    "l1": ("dpm_solver_pp_3m", replace(QUICK, loss="l1")),
    "deis": ("deis_tab3", QUICK),
}


@dataclass(frozen=True)
class Setting:
    """A model's folder, and pairs that a teacher made of it on the CPU."""

    folder: Path
    pairs: TeacherPairs


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = klray_model(tmp_path_factory.mktemp("model"), process__num_terms=2)
    return Setting(folder, pairs_on(CPU, folder))


def pairs_on(device: torch.device, folder: Path) -> TeacherPairs:
    model = load_model(folder, device)
    teacher = teacher_of("unipc_3", 20, "logsnr", model.schedule)
    return teacher.pairs(model.denoiser, model.schedule, range(8), model.shape, batch_size=5, device=device)


def fitted(setting: Setting, device: torch.device, solver: str, nfe: int, settings: FitSettings) -> LearnedSchedule:
    model = load_model(setting.folder, device)
    distance = FeatureDistance(efficientnet_maps(device)) if settings.loss == "efficientnet_lite0" else None
    pairs = setting.pairs.to(device)
    return fit_timesteps(model.denoiser, model.schedule, solver, nfe, pairs, settings, distance=distance)


def test_a_teachers_pairs_are_the_cpus(setting: Setting, device: torch.device) -> None:
    found = pairs_on(device, setting.folder)
    assert torch.equal(found.noise, setting.pairs.noise)
    torch.testing.assert_close(found.images, setting.pairs.images)


@pytest.mark.parametrize("case", FITS)
def test_a_fit_is_the_cpus_and_its_solver_steps_cost_no_waiting(
    case: str, setting: Setting, device: torch.device
) -> None:
    solver, settings = FITS[case]
    found = {}
    for nfe in (4, 8):
        with Counting() as found[nfe]:
            learned = fitted(setting, device, solver, nfe, settings)
    wanted = fitted(setting, CPU, solver, nfe, settings)
    assert learned.learned == wanted.learned
    assert learned.timesteps == pytest.approx(wanted.timesteps, abs=1e-4)
    assert learned.model_timesteps == pytest.approx(wanted.model_timesteps, abs=1e-4)
    # Less than once a step is what depends on how the fit turned out.
    waits = {line: each for line, each in found[8].beyond(found[4], 4, "read", "upload").items() if each >= 1}
    assert waits == {}


def test_a_learned_schedules_steps_cost_no_waiting(setting: Setting, device: torch.device) -> None:
    model, noise = load_model(setting.folder, device), setting.pairs.noise[:2].to(device)
    found = {}
    for nfe in (4, 4, 8):  # the first time, tables are moved
        learned = fitted(setting, device, "ddim", nfe, replace(QUICK, output_scale=True, rounds_both=0))
        with Counting() as found[nfe]:
            learned.sample(model.denoiser, model.schedule, noise)
    assert found[8].beyond(found[4], 4, "read", "upload") == {}


@pytest.mark.slow
def test_a_fit_by_a_feature_networks_distance_is_the_cpus(setting: Setting, device: torch.device) -> None:
    settings = replace(QUICK, loss="efficientnet_lite0", rounds_both=0)
    found, wanted = (fitted(setting, each, "unipc_3", 4, settings) for each in (device, CPU))
    assert found.timesteps == pytest.approx(wanted.timesteps, abs=1e-2)
