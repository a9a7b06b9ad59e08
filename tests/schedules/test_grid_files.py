"""Time grids from files: which lists are read as which times, and what is no grid for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klray.build import build_sampler
from klray.config import Sampling
from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, Schedule, VPDiscrete, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.timesteps import TIMESTEPS
from klray.networks.mlp import MLP
from klray.networks.terms import TermNetwork
from klray.sampling.draw import sample_images
from klray.schedules.grid_files import GridError, is_grid_file, read_grid
from tests.models import far_from_saturated

GITS = [80.0, 10.9836, 3.8811, 1.584, 0.5666, 0.1698, 0.002]
TIMES = [1.0, 0.7, 0.33, 0.05, 0.001]
SHOWN = [0.98, 0.71, 0.3, 0.06, 0.001]
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SCHEDULES: dict[str, Schedule] = {
    "vp": VPLinear(),
    "kl_truncated": KarhunenLoeve(VPLinear(), 8, "truncated"),
    "discrete": VPDiscrete(torch.cumprod(1 - BETAS, 0)),
}


def read(folder: Path, content: Any, schedule: Schedule | None = None) -> SolverParameters:
    """``content``: text as it is, anything else as JSON."""
    file = folder / "grid.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_grid(file, schedule or VPLinear())


def read_pt(folder: Path, content: Any, schedule: Schedule | None = None) -> SolverParameters:
    file = folder / "best_v2.pt"
    torch.save(content, file)
    return read_grid(file, schedule or VPLinear())


def ld3(*times: float) -> dict[str, Tensor]:
    """As LD3's trainer saves it."""
    return {"params1": torch.randn(4), "params2": torch.zeros(5), "best_t_steps": torch.tensor(times)}


def lam(times: list[float], schedule: Schedule) -> Tensor:
    return schedule.lam(torch.tensor(times, dtype=torch.float64))


def in_unit(unit: str, times: list[float], schedule: Schedule) -> list[float]:
    """The same points as t, as sigma/alpha or as lam."""
    return {
        "t": times,
        "edm_sigma": torch.exp(-lam(times, schedule)).tolist(),
        "lam": lam(times, schedule).tolist(),
    }[unit]


@pytest.mark.parametrize(
    ("name", "is_file"),
    [("grid.json", True), ("a/best_v2.pt", True), ("x.pth", True), ("logsnr", False), ("json", False)],
)
def test_a_file_is_known_by_its_suffix(name: str, is_file: bool) -> None:
    assert is_grid_file(name) == is_file


def test_a_list_holds_times(tmp_path: Path) -> None:
    assert read(tmp_path, TIMES) == SolverParameters(TIMES)
    assert read(tmp_path, {"t": TIMES}) == SolverParameters(TIMES)
    assert read(tmp_path, [1, 0.5]) == SolverParameters([1.0, 0.5])


@pytest.mark.parametrize("shown_unit", ["t", "edm_sigma", "lam"])
@pytest.mark.parametrize("unit", ["t", "edm_sigma", "lam"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_unit_names_the_same_points(schedule: str, unit: str, shown_unit: str, tmp_path: Path) -> None:
    process = SCHEDULES[schedule]
    times, shown = in_unit(unit, TIMES, process), in_unit(shown_unit, SHOWN, process)
    grid = read(tmp_path, {unit: times, f"model_{shown_unit}": shown}, process)
    assert grid.model_timesteps is not None
    # As levels: near t = 1 the truncated process' lam is flat, so a time is less sharp there than its level.
    torch.testing.assert_close(lam(grid.timesteps, process), lam(TIMES, process), rtol=0, atol=1e-9)
    torch.testing.assert_close(lam(grid.model_timesteps, process), lam(SHOWN, process), rtol=0, atol=1e-9)


def test_a_list_of_gits_is_the_time_of_an_edm_model(tmp_path: Path) -> None:
    assert read(tmp_path, GITS, EDM()) == SolverParameters(GITS)
    in_sigma = read(tmp_path, {"edm_sigma": GITS}, EDM())
    assert in_sigma.timesteps == pytest.approx(GITS, rel=1e-12)


def test_a_list_of_gits_keeps_its_noise_levels_on_a_vp_model(tmp_path: Path) -> None:
    grid = read(tmp_path, {"edm_sigma": GITS})
    assert torch.exp(-lam(grid.timesteps, VPLinear())).tolist() == pytest.approx(GITS, rel=1e-9)
    assert all(0 < t < 1 for t in grid.timesteps)


def test_an_end_that_was_rounded_is_the_models_own(tmp_path: Path) -> None:
    assert read(tmp_path, [1.0009, 0.5]).timesteps.tolist() == [1.0, 0.5]
    assert read(tmp_path, {"t": [1.0, 0.5], "model_t": [1.0009, 0.5]}).model_timesteps.tolist() == [1.0, 0.5]
    assert read(tmp_path, [80.05, 1.0], EDM()).timesteps.tolist() == [80.0, 1.0]
    with pytest.raises(GridError, match="this model's times are 0 < t <= 1, the list has 0.5 to 1.0011"):
        read(tmp_path, [1.0011, 0.5])


def test_the_networks_times_need_not_fall(tmp_path: Path) -> None:
    shown = [0.9, 0.95, 0.2]
    assert read(tmp_path, {"t": [1.0, 0.5, 0.1], "model_t": shown}).model_timesteps.tolist() == shown


def test_a_checkpoint_of_ld3_holds_both_lists(tmp_path: Path) -> None:
    grid = read_pt(tmp_path, ld3(*TIMES, *SHOWN))
    assert grid.timesteps == pytest.approx(TIMES, rel=1e-7)  # they are float32
    assert grid.model_timesteps == pytest.approx(SHOWN, rel=1e-7)
    sigmas = read_pt(tmp_path, ld3(80.0, 2.0, 0.002, 79.0, 2.5, 0.002), EDM())
    assert sigmas.timesteps == pytest.approx([80.0, 2.0, 0.002])
    assert sigmas.model_timesteps == pytest.approx([79.0, 2.5, 0.002])


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.target,)


def test_reading_a_checkpoint_runs_nothing_of_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with pytest.raises(GridError) as caught:
        read_pt(tmp_path, {**ld3(*TIMES, *SHOWN), "extra": Touch(trace)})
    assert "best_v2.pt cannot be loaded as plain tensors: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(tmp_path / "best_v2.pt", weights_only=False)
    assert trace.exists()  # so the file was a trap


WRONG: dict[str, tuple[Any, str]] = {
    "rising": ([0.1, 0.5, 1.0], "times must fall strictly, from noise to data; edm_sigma falls too, lam rises"),
    "level": ([1.0, 0.5, 0.5, 0.1], "times must fall strictly"),
    "rising edm_sigma": ({"edm_sigma": [0.1, 1.0]}, "times must fall strictly"),
    "falling lam": ({"lam": [1.0, -1.0]}, "times must fall strictly"),
    "no point": ([], "t must be a list of at least 2 finite numbers"),
    "one point": ([1.0], "t must be a list of at least 2 finite numbers"),
    "one network point": ({"t": [1.0, 0.5], "model_lam": [0.0]}, "lam must be a list of at least 2 finite numbers"),
    "NaN": ("[1.0, NaN, 0.1]", "t must be a list of at least 2 finite numbers"),
    "infinite": ('{"edm_sigma": [Infinity, 1.0]}', "edm_sigma must be a list of at least 2 finite numbers"),
    "beyond every float": (f"[1{'0' * 400}, 0.5]", "t must be a list of at least 2 finite numbers"),
    "strings": (["1.0", "0.5"], "t must be a list of at least 2 finite numbers"),
    "bools": ([True, 0.5, 0.1], "t must be a list of at least 2 finite numbers"),
    "null": ([None, 0.5], "t must be a list of at least 2 finite numbers"),
    "nested": ([[1.0], [0.5]], "t must be a list of at least 2 finite numbers"),
    "a number": ({"t": 0.5}, "t must be a list of at least 2 finite numbers"),
    "unknown key": ({"t": TIMES, "sigmas": TIMES}, "a list must be one of t, edm_sigma, lam, got 'sigmas'"),
    "unknown network key": ({"t": TIMES, "model_s": TIMES}, "a list must be one of t, edm_sigma, lam, got 's'"),
    "two units": ({"t": TIMES, "lam": TIMES}, "give one of the lists t, lam"),
    "two network units": ({"t": TIMES, "model_t": TIMES, "model_lam": TIMES}, "give one of the lists t, lam"),
    "network alone": ({"model_t": TIMES}, "one of the lists t, edm_sigma, lam is needed"),
    "empty object": ({}, "one of the lists t, edm_sigma, lam is needed"),
    "network list of another length": (
        {"t": [1.0, 0.5, 0.1], "model_t": [1.0, 0.1]},
        "the network needs a time for each of the 3 points, got 2",
    ),
    "beyond the schedule": ([1.5, 0.5], "this model's times are 0 < t <= 1, the list has 0.5 to 1.5"),
    "t 0": ([1.0, 0.5, 0.0], "this model's times are 0 < t <= 1, the list has 0 to 1"),
    "network beyond": (
        {"t": [1.0, 0.5], "model_t": [1.5, 0.5]},
        "this model's times are 0 < t <= 1, the list has 0.5 to 1.5",
    ),
    "sigma 0": ({"edm_sigma": [80.0, 1.0, 0.0]}, "edm_sigma must be > 0, got 0; leave a final 0 out"),
    "more noise than VP has": (
        {"edm_sigma": [1000.0, 1.0]},
        "this model's noise ends at edm_sigma = 152.2, the list starts at 1000",
    ),
    "no JSON": ("1.0, 0.5", "cannot be read as JSON: Extra data"),
    "empty file": ("", "cannot be read as JSON: Expecting value"),
    "endless nesting": ("[" * 100_000, "cannot be read as JSON"),
    "no list": ("3", "must hold a list of times, or an object with one of t, edm_sigma, lam"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_grid_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, rule = WRONG[case]
    with pytest.raises(GridError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "grid.json"))
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_noise_than_a_truncated_process_has_is_refused(tmp_path: Path) -> None:
    """Its t_of_lam gives t = 1 for every level beyond, which must not pass for a time of the list."""
    process = SCHEDULES["kl_truncated"]
    most = float(torch.exp(-lam([1.0], process)))
    assert read(tmp_path, {"edm_sigma": [most, 0.1]}, process).timesteps[0] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(GridError, match="this model's"):
        read(tmp_path, {"edm_sigma": [10 * most, 0.1]}, process)


@pytest.mark.parametrize("name", ["grid.json", "best_v2.pt"])
def test_a_missing_file_or_a_folder_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=f"{name} cannot be .*No such file or directory"):
        read_grid(tmp_path / name, VPLinear())
    (tmp_path / name).mkdir()
    with pytest.raises(GridError, match=f"{name} cannot be .*Is a directory"):
        read_grid(tmp_path / name, VPLinear())


WRONG_PT: dict[str, tuple[Any, str]] = {
    "another checkpoint": ({"model": torch.ones(4)}, "is no LD3 checkpoint: best_t_steps must hold N + 1 solver"),
    "a tensor": (torch.tensor([1.0, 0.5, 1.0, 0.5]), "is no LD3 checkpoint"),
    "odd": (ld3(1.0, 0.5, 0.1, 1.0, 0.5), "is no LD3 checkpoint"),
    "one point": (ld3(1.0, 1.0), "is no LD3 checkpoint"),
    "a number": ({"best_t_steps": 4}, "is no LD3 checkpoint"),
    "0-dim": ({"best_t_steps": torch.tensor(4.0)}, "is no LD3 checkpoint"),
    "2-dim": ({"best_t_steps": torch.ones(4, 2)}, "is no LD3 checkpoint"),
    "strings": ({"best_t_steps": ["1", "x", "1", "x"]}, "is no LD3 checkpoint"),
    "NaN": (ld3(1.0, float("nan"), 1.0, 0.5), "t must be a list of at least 2 finite numbers"),
    "rising": (ld3(0.1, 0.5, 0.1, 0.5), "times must fall strictly"),
    "of an EDM model": (ld3(80.0, 0.002, 80.0, 0.002), "this model's times are 0 < t <= 1, the list has 0.002 to 80"),
}


@pytest.mark.parametrize("case", WRONG_PT)
def test_what_is_no_ld3_checkpoint_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, rule = WRONG_PT[case]
    with pytest.raises(GridError) as caught:
        read_pt(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "best_v2.pt"))
    assert rule in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_checkpoint_is_refused_in_one_line(zipped: bool, tmp_path: Path) -> None:
    """Cut anywhere, torch.load raises whatever its parts raise."""
    file = tmp_path / "best_v2.pt"
    torch.save(ld3(*TIMES, *SHOWN), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    damaged = [whole[: len(whole) * part // 40] for part in range(39)] + [b"hello world", b"1.0 0.5\n" * 20]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(GridError) as caught:
            read_grid(file, VPLinear())
        assert "best_v2.pt cannot be loaded as plain tensors: " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["t", "lam", "edm_sigma"])
@pytest.mark.parametrize("solver", ["unipc_3", "dpm_solver_2"])
def test_a_grid_from_a_file_gives_the_images_of_its_points(solver: str, unit: str, tmp_path: Path) -> None:
    """Those of the named grid with these points: bit for bit as times, to rounding in other units."""
    network = TermNetwork(MLP(image_size=8, width=32, num_classes=3), 3).eval()
    process = KarhunenLoeve(VPLinear(beta_max=1.0), 3)
    denoiser = TermDenoiser(network, process)
    settings = Sampling(solver=solver, num_steps=6, timesteps="edm")

    def images(grid: SolverParameters | None) -> Tensor:
        sampler = build_sampler(settings, grid)
        how = {"batch_size": 4, "device": torch.device("cpu")}
        return sample_images(denoiser, process, sampler, range(4), (1, 8, 8), **how)

    points = TIMESTEPS["edm"](process, 6).tolist()
    named = images(None)
    assert far_from_saturated(named)
    values = in_unit(unit, points, process)
    for content in ({unit: values}, {unit: values, f"model_{unit}": values}):
        from_file = images(read(tmp_path, content, process))
        assert int((from_file.int() - named.int()).abs().max()) <= (0 if unit == "t" else 1)
    assert not torch.equal(images(read(tmp_path, [*points[:3], *points[4:]], process)), named)
    shown = read(tmp_path, {"t": points, "model_t": [0.9 * t for t in points]}, process)
    assert not torch.equal(images(shown), named)
