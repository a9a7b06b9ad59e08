"""Learned schedules on the disk: found for exactly what they were learned for, refused for anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from klray.build import build_sampler
from klray.config import Sampling
from klray.core.schedule import Schedule, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import SOLVERS
from klray.schedules.grid_files import GridError, grid_of, read_grid
from klray.schedules.store import StoredSchedule, StoreError, check, file_of, find, home_of, keep, read, stored
from klray.schedules.table import rows_of, text_of

TIMES = [1.0, 0.7, 0.33, 0.05, 0.001]
SHOWN = [1.0, 0.69, 0.34, 0.06, 0.001]
RECORD = StoredSchedule(
    model="a" * 16,
    process={"num_terms": 0},
    solver="unipc_3",
    options={},
    nfe=4,
    timesteps=TIMES,
    model_timesteps=SHOWN,
    lam=VPLinear().lam(torch.tensor(TIMES, dtype=torch.float64)).tolist(),
    scale=None,
    training={"fit": {"lr": 0.005, "seed": 0}, "pairs": 100, "start": "edm", "learned": True},
    validation_loss=0.1 + 1e-17,
    baselines={"edm": {"loss": 0.4, "timesteps": TIMES}, "gits": {"loss": 0.2, "timesteps": TIMES}},
    metrics={"seconds": 1.5},
)
ASKED = Sampling(solver="unipc_3", nfe=4)


@dataclass(frozen=True)
class Sampled:
    folder: Path
    fingerprint: str = "a" * 16
    schedule: Schedule = field(default_factory=VPLinear)


def found(home: Path, **changes: object) -> Path:
    use: dict[str, object] = {"model": "a" * 16, "solver": "unipc_3", "options": {}, "nfe": 4} | changes
    return find(home, **use)  # type: ignore[arg-type]


def test_what_is_kept_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    file = keep(tmp_path, RECORD)
    assert read(file) == RECORD
    assert json.loads(file.read_text())["format"] == 1
    assert stored(tmp_path) == [(file, RECORD)]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    keep(tmp_path, replace(RECORD, validation_loss=0.05))
    assert read(file).validation_loss == 0.05


def test_it_is_found_for_exactly_this_use(tmp_path: Path) -> None:
    file = keep(tmp_path, RECORD)
    assert found(tmp_path) == file
    assert found(tmp_path, options={"variant": "bh1"}) == file  # the default
    for changes in ({"solver": "unipc_2"}, {"nfe": 6}, {"options": {"variant": "bh2"}}):
        with pytest.raises(StoreError, match=r"\(there: unipc_3 at 4\); learn it with python -m klray\.ld3"):
            found(tmp_path, **changes)
    bh2 = keep(tmp_path, replace(RECORD, options={"variant": "bh2"}))
    assert found(tmp_path, options={"variant": "bh2"}) == bh2 != found(tmp_path)
    with pytest.raises(StoreError, match=r"\(there: none\)"):
        found(tmp_path / "elsewhere")


def test_one_of_other_weights_is_taken_only_by_force(tmp_path: Path) -> None:
    file = keep(tmp_path, RECORD)
    with pytest.raises(StoreError, match="is of other weights, aaaaaaaaaaaaaaaa, this model is bbbbbbbbbbbbbbbb"):
        found(tmp_path, model="b" * 16)
    assert found(tmp_path, model="b" * 16, force=True) == file
    with pytest.raises(StoreError, match="no schedule is learned for unipc_3 at 6 NFE"):
        found(tmp_path, model="b" * 16, nfe=6, force=True)
    file.rename(file_of(tmp_path, "b" * 16, "unipc_3", {}, 4))  # a name is no proof
    with pytest.raises(StoreError, match="was learned for other weights"):
        found(tmp_path, model="b" * 16)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "model": "a"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    file = keep(tmp_path, RECORD)
    file.write_text(text)
    with pytest.raises(StoreError, match="is no whole learned schedule"):
        found(tmp_path)


def test_timesteps_learned_is_the_grid_of_the_solver_and_nfe(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    model = Sampled(tmp_path / "checkpoints" / "checkpoint_1")
    assert home_of(model.folder) == tmp_path
    file = keep(tmp_path, RECORD)
    grid = grid_of("learned", model, ASKED)
    assert grid == SolverParameters(TIMES, SHOWN) == read_grid(file, model.schedule)
    assert grid_of("learned", model, ASKED.model_copy(update={"nfe": None, "num_steps": 4})) == grid
    assert grid_of("logsnr", model, ASKED) is None
    assert build_sampler(ASKED, grid).nfe == 4
    with pytest.raises(ValueError, match="sampling.nfe: heun takes two"):
        grid_of("learned", model, Sampling(solver="heun", nfe=5))


def test_timesteps_gits_is_the_grid_that_the_schedule_was_held_against(tmp_path: Path) -> None:
    other = [1.0, 0.6, 0.3, 0.04, 0.001]
    keep(tmp_path, replace(RECORD, baselines={"gits": {"loss": 0.2, "timesteps": other}}))
    assert grid_of("gits", Sampled(tmp_path), ASKED) == SolverParameters(other)
    with pytest.raises(GridError, match="has no dmn grid: it was measured against gits"):
        grid_of("dmn", Sampled(tmp_path), ASKED)
    with pytest.raises(StoreError, match="no schedule is learned for unipc_3 at 5 NFE"):
        grid_of("gits", Sampled(tmp_path), ASKED.model_copy(update={"nfe": 5}))


def test_a_learned_schedules_file_is_refused_for_another_use(tmp_path: Path) -> None:
    file, model = keep(tmp_path, RECORD), Sampled(tmp_path)
    assert grid_of(str(file), model, ASKED) == SolverParameters(TIMES, SHOWN)
    assert grid_of(str(file), model, Sampling(solver="unipc_3", num_steps=20)) == SolverParameters(TIMES, SHOWN)
    ddim = Sampling(solver="ddim", nfe=4)
    for other, asked in ((model, ddim), (Sampled(tmp_path, "b" * 16), ASKED)):
        with pytest.raises(StoreError, match="--force takes it anyway"):
            grid_of(str(file), other, asked)
        assert grid_of(str(file), other, asked, force=True) == SolverParameters(TIMES, SHOWN)
    check(file, RECORD.model, "unipc_3", {}, 4)


def test_a_learned_scale_is_used(tmp_path: Path) -> None:
    factors = [1.1, 0.9, 1.05, 0.97]
    keep(tmp_path, replace(RECORD, scale=factors))
    schedule, grid = VPLinear(), grid_of("learned", Sampled(tmp_path), ASKED)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times, shown = torch.tensor(TIMES, dtype=torch.float64), torch.tensor(SHOWN, dtype=torch.float64)

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * schedule.alpha(t)

    factored = SolverParameters(times, shown, factors).factored(denoiser, schedule)
    x = schedule.sigma(times[0]) * noise
    expected = SOLVERS["unipc_3"].sample(factored, schedule, x, times, shown)
    asked = ASKED.model_copy(update={"final": "keep"})
    drawn = build_sampler(asked, grid).sample(denoiser, schedule, noise)
    assert torch.equal(drawn, expected)
    assert not torch.equal(
        drawn, build_sampler(asked, SolverParameters(TIMES, SHOWN)).sample(denoiser, schedule, noise)
    )


def test_what_differs_in_training_is_told() -> None:
    asked = {"fit": {"lr": 0.005, "seed": 0}, "pairs": 100}
    assert RECORD.same_training(asked) == []
    assert RECORD.same_training({**asked, "pairs": 200}) == ["pairs: 100 -> 200"]
    assert RECORD.same_training({"fit": {"lr": 0.01, "seed": 0}}) == ["fit.lr: 0.005 -> 0.01"]


def test_the_table_compares_with_the_best_fixed_grid() -> None:
    (row,) = rows_of([RECORD])
    assert (row["best_fixed"], row["ld3_over_best"]) == ("edm", pytest.approx(0.25))
    six = replace(RECORD, nfe=6, baselines={"edm": {"loss": 0.4, "timesteps": TIMES}})
    header, four, line = text_of(rows_of([six, RECORD])).splitlines()
    assert header.split() == ["solver", "nfe", "edm", "gits", "ld3", "best_fixed", "ld3_over_best"]
    assert four.split() == ["unipc_3", "4", "0.4", "0.2", "0.1", "edm", "0.25"]
    assert line.split() == ["unipc_3", "6", "0.4", "-", "0.1", "edm", "0.25"]
