"""LD3's fit: what it learns from, what may move, what chooses, and what it costs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klray.core.analytic import MixtureDenoiser
from klray.core.finish import solve
from klray.core.learned_timesteps import LearnedTimesteps
from klray.core.schedule import VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.parallel.random import Purpose, normal
from klray.schedules import fit as fit_module
from klray.schedules import fit_loop
from klray.schedules.fit import fit_timesteps
from klray.schedules.fit_settings import FitSettings, Optimizers
from klray.schedules.forcing import TrainingNoise, project
from klray.schedules.learned_schedule import LearnedSchedule
from klray.schedules.learners import ADAM, LD3Optimizers
from klray.schedules.perceptual import DISTANCES, FeatureDistance, l2
from klray.schedules.student import Student
from klray.schedules.teacher import Teacher, TeacherError, TeacherPairs, load_pairs, save_pairs

LINEAR = VPLinear()
SHAPE = (1, 2, 2)
TEACHER = Teacher("dpm_solver_pp_2m", TIMESTEPS["logsnr"](LINEAR, 60).tolist())
QUICK = FitSettings(validation_pairs=8, rounds_theta=1, rounds_both=1, margin=0.0, recompute=False, gamma=0.05)
STARTS = {"logsnr": TIMESTEPS["logsnr"](LINEAR, 4), "time_uniform": TIMESTEPS["time_uniform"](LINEAR, 4)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Counted:
    """A mixture's denoiser that keeps what it was asked."""

    def __init__(self) -> None:
        self.exact = MixtureDenoiser(LINEAR, randn(3, 4, seed=7), torch.tensor([0.3, 0.5, 0.4]).double())
        self.calls: list[tuple[torch.Size, torch.dtype, torch.dtype, bool]] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append((x.shape, x.dtype, t.dtype, torch.is_grad_enabled()))
        return self.exact(x, t).to(x.dtype)


DENOISER = Counted().exact


@pytest.fixture(scope="module")
def pairs() -> TeacherPairs:
    return TEACHER.pairs(DENOISER, LINEAR, range(20), SHAPE, batch_size=20, dtype=torch.float64)


def fitted(pairs: TeacherPairs, settings: FitSettings = QUICK, **keywords: Any) -> LearnedSchedule:
    keywords = {"denoiser": DENOISER, "solver": "ddim", "nfe": 4, "starts": STARTS, **keywords}
    return fit_timesteps(schedule=LINEAR, pairs=pairs, settings=settings, **keywords)


def error(schedule: LearnedSchedule, pairs: TeacherPairs) -> float:
    return float(l2(schedule.sample(DENOISER, LINEAR, pairs.noise), pairs.images).mean())


# The teacher.


def test_pairs_are_the_images_that_sampling_gives_to_their_seeds(pairs: TeacherPairs) -> None:
    torch.testing.assert_close(pairs.noise, normal(0, 0, Purpose.SAMPLE, torch.arange(20), SHAPE))
    grid = TIMESTEPS["logsnr"](LINEAR, 60)
    x = solve(SOLVERS["dpm_solver_pp_2m"], DENOISER, LINEAR, pairs.noise, SolverParameters(grid))
    torch.testing.assert_close(pairs.images, x)
    seven = {"shape": SHAPE, "batch_size": 7, "dtype": torch.float64}
    whole = TEACHER.pairs(DENOISER, LINEAR, range(20), **seven)
    parts = [TEACHER.pairs(DENOISER, LINEAR, part, **seven) for part in (range(9), range(9, 20))]
    assert torch.equal(whole.images, TeacherPairs.cat(parts).images)
    with pytest.raises(ValueError, match="at least one seed"):
        TEACHER.pairs(DENOISER, LINEAR, [], **seven)


def test_a_key_is_of_everything_that_decides_the_pairs() -> None:
    key = TEACHER.key("model", [1, 2], SHAPE)
    others = [
        TEACHER.key("other", [1, 2], SHAPE),
        TEACHER.key("model", [2, 1], SHAPE),
        TEACHER.key("model", [1, 2], (1, 4, 1)),
        replace(TEACHER, solver="unipc_2").key("model", [1, 2], SHAPE),
        replace(TEACHER, options={"convert_with": "grid"}).key("model", [1, 2], SHAPE),
        replace(TEACHER, timesteps=[1.0, 0.5, 1e-3]).key("model", [1, 2], SHAPE),
    ]
    assert len({key, *others}) == 7
    assert key == TEACHER.key("model", (1, 2), list(SHAPE))


def test_stored_pairs_come_back_and_damaged_ones_do_not(tmp_path: Path, pairs: TeacherPairs) -> None:
    assert load_pairs(tmp_path, "key") is None
    stored = save_pairs(tmp_path, "key", pairs)
    loaded = load_pairs(tmp_path, "key")
    assert loaded is not None
    assert torch.equal(loaded.noise, pairs.noise)
    assert torch.equal(loaded.images, pairs.images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs_key.json", "pairs_key.safetensors"]
    content = stored.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        stored.write_bytes(damaged)
        with pytest.raises(TeacherError, match="delete it to make them again"):
            load_pairs(tmp_path, "key")
    stored.unlink()
    with pytest.raises(TeacherError):
        load_pairs(tmp_path, "key")


# Soft forcing.


def test_projection_is_onto_each_noise_s_own_ball() -> None:
    centre = randn(3, 1, 2, 2)
    offset = torch.tensor([0.01, 0.1, 5.0]).double()[:, None, None, None] * randn(3, 1, 2, 2, seed=1)
    projected = project(centre + offset, centre, 0.3)
    torch.testing.assert_close(projected[:2], (centre + offset)[:2])
    assert float((projected[2] - centre[2]).norm()) == pytest.approx(0.3)
    torch.testing.assert_close((projected - centre)[2] / 0.3, offset[2] / offset[2].norm())
    assert torch.equal(project(centre + offset, centre, 0.0), centre)


def test_each_noise_keeps_only_steps_that_lower_its_own_loss() -> None:
    noise = TrainingNoise(randn(4, 1, 2, 2), radius=1.0, step_size=0.5)
    rows, gradient = torch.tensor([2, 0, 3]), 0.1 * randn(3, 1, 2, 2, seed=1)
    proposed = noise.propose(rows, gradient)
    torch.testing.assert_close(proposed, noise.origin[rows] - 0.5 * gradient)
    noise.keep_better(rows, proposed, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.9, 1.0, math.nan]))
    assert torch.equal(noise.moved[2], proposed[0])
    assert torch.equal(noise.moved[[0, 1, 3]], noise.origin[[0, 1, 3]])
    assert noise.statistics() == {"accepted": 1 / 3, "moved": 1 / 4}
    noise.end_round()
    assert noise.step_size == 0.5
    noise.end_round()
    assert noise.step_size == 0.25


def test_a_step_is_judged_at_equal_parameters(monkeypatch: pytest.MonkeyPatch, pairs: TeacherPairs) -> None:
    students: list[Student] = []
    judged: list[bool] = []

    class Watched(Student):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            students.append(self)

    class Noise(TrainingNoise):
        def keep_better(self, rows: Tensor, proposed: Tensor, before: Tensor, after: Tensor) -> None:
            for noise, loss in ((self.moved[rows], before), (proposed, after)):
                with torch.no_grad():
                    now = l2(students[0](noise), pairs.images[rows])
                # In units of the start's loss, so the ratio is one for all.
                judged.append(bool(torch.allclose(now / now[0], loss / loss[0], rtol=1e-9)))
            assert (torch.linalg.vector_norm((proposed - self.origin[rows]).flatten(1), dim=1) <= 0.0125 + 1e-12).all()
            super().keep_better(rows, proposed, before, after)

    monkeypatch.setattr(fit_module, "Student", Watched)
    monkeypatch.setattr(fit_loop, "TrainingNoise", Noise)
    learned = fitted(pairs)
    assert len(judged) == 2 * learned.statistics["iterations"]
    assert all(judged)
    assert learned.statistics["radius"] == pytest.approx(0.05 * 4 / 16)
    assert 0 < learned.statistics["accepted"] <= 1
    assert learned.statistics["moved"] == 1.0


def test_a_noise_s_step_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch, pairs: TeacherPairs) -> None:
    found: list[Tensor] = []

    class Noise(TrainingNoise):
        def propose(self, rows: Tensor, gradient: Tensor) -> Tensor:
            found.append(gradient[rows == 3])
            return super().propose(rows, gradient)

    monkeypatch.setattr(fit_loop, "TrainingNoise", Noise)
    frozen = replace(QUICK, lr=0.0, lr_network=0.0, latent_lr=0.0)
    for batch_size in (1, 12):
        fitted(pairs, replace(frozen, batch_size=batch_size))
    gradients = torch.cat(found)
    assert len(gradients) == 4  # two rounds each
    torch.testing.assert_close(gradients, gradients[:1].expand_as(gradients))


def test_hard_forcing_makes_no_extra_calls(pairs: TeacherPairs) -> None:
    calls = {}
    for gamma in (0.0, 0.05):
        denoiser = Counted()
        learned = fitted(pairs, replace(QUICK, gamma=gamma), denoiser=denoiser)
        calls[gamma] = denoiser.calls
    iterations = 2 * 6
    assert learned.statistics["iterations"] == iterations
    validations = -(-iterations // QUICK.validate_every)
    assert len(calls[0.0]) == 4 * (len(STARTS) + iterations + validations + 1)
    assert len(calls[0.05]) - len(calls[0.0]) == 4 * iterations
    assert sum(grad for *_, grad in calls[0.0]) == 4 * iterations


# Selection.


def test_what_is_returned_is_the_best_on_pairs_that_nothing_touched(pairs: TeacherPairs) -> None:
    before = TeacherPairs(pairs.noise.clone(), pairs.images.clone())
    reports: list[tuple[int, dict[str, float]]] = []
    learned = fitted(pairs, report=lambda iteration, numbers: reports.append((iteration, numbers)))
    assert torch.equal(pairs.noise, before.noise)
    assert torch.equal(pairs.images, before.images)
    assert [iteration for iteration, _ in reports] == [5, 10, 12]
    losses = [numbers["validation_loss"] for _, numbers in reports]
    assert learned.learned
    assert learned.validation_loss == min(losses)
    assert learned.validation_loss == pytest.approx(error(learned, pairs[12:]), rel=1e-9)
    assert learned.validation_loss < learned.start_losses[learned.start]
    for name, grid in STARTS.items():
        fixed = solve(SOLVERS["ddim"], DENOISER, LINEAR, pairs.noise, SolverParameters(grid))
        assert learned.start_losses[name] == pytest.approx(float(l2(fixed, pairs.images)[12:].mean()), rel=1e-8)
    assert learned.lam == pytest.approx(LINEAR.lam(torch.tensor(learned.timesteps, dtype=torch.float64)).tolist())


def test_training_never_sees_a_validation_noise(monkeypatch: pytest.MonkeyPatch, pairs: TeacherPairs) -> None:
    others = TeacherPairs(pairs.noise.clone(), pairs.images.clone())
    others.noise[12:], others.images[12:] = 0.1, 7.0
    seen = {}
    for name, each in (("own", pairs), ("others", others)):
        steps: list[Tensor] = []
        monkeypatch.setattr(Optimizers, "step", lambda self, gradients, steps=steps: steps.append(gradients[0]))
        fitted(each, starts={"logsnr": STARTS["logsnr"]})
        seen[name] = torch.stack(steps)
    assert torch.equal(seen["own"], seen["others"])


@pytest.mark.parametrize("optimizer", ["ld3", "adam"])
def test_a_fit_that_only_harms_gives_the_start_back(pairs: TeacherPairs, optimizer: str) -> None:
    wild = replace(QUICK, optimizer=optimizer, lr=50.0, lr_network=50.0, gamma=0.0)
    learned = fitted(pairs, wild, starts={**STARTS, "shown": (STARTS["logsnr"], STARTS["time_uniform"])})
    assert not learned.learned
    assert learned.start == "time_uniform"
    assert learned.timesteps == pytest.approx(STARTS["time_uniform"].tolist(), rel=1e-9)
    assert learned.model_timesteps == pytest.approx(learned.timesteps, rel=1e-9)
    assert learned.validation_loss == learned.start_losses["time_uniform"]
    assert error(learned, pairs[12:]) == pytest.approx(learned.validation_loss, rel=1e-9)


def test_a_gain_within_chance_is_not_taken(pairs: TeacherPairs) -> None:
    sure = fitted(pairs)
    assert sure.learned
    unsure = fitted(pairs, replace(QUICK, margin=1e6))
    assert not unsure.learned
    assert unsure.validation_loss == unsure.start_losses[unsure.start] > sure.validation_loss


def test_patience_brings_parameters_back_and_forgets_momenta(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = TEACHER.pairs(DENOISER, LINEAR, range(20), SHAPE, batch_size=20, dtype=torch.float64)
    resets: list[float] = []
    reset = Optimizers.reset

    def watched(self: Optimizers) -> None:
        resets.append(self.lr)
        reset(self)

    monkeypatch.setattr(Optimizers, "reset", watched)
    # So wild that nothing is ever better: each validation is a loss of patience.
    wild = replace(QUICK, lr=50.0, validate_every=3, patience=1, reload_each_round=False)
    rates: list[float] = []
    fitted(pairs, wild, report=lambda iteration, numbers: rates.append(numbers["lr"]))
    assert rates == pytest.approx([50.0, 40.0, 32.0, 25.6])
    assert len(resets) == 1 + 4 + 1  # the beginning, each loss of patience, the network times joining

    times = LearnedTimesteps(LINEAR, 4)
    optimizers = LD3Optimizers(times, FitSettings(), 4)
    first = times.theta.detach().clone()
    optimizers.step([torch.ones(4).double()])
    moved = times.theta.detach().clone()
    optimizers.reset()
    with torch.no_grad():
        times.theta.copy_(first)
    optimizers.step([torch.ones(4).double()])
    assert torch.equal(times.theta, moved)  # as a first step: no momentum, no squares


# What is learned.


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not SOLVERS[name].random])
def test_every_solver_can_be_fitted(solver: str) -> None:
    pairs = TEACHER.pairs(DENOISER, LINEAR, range(12), SHAPE, batch_size=12)
    denoiser = Counted()
    learned = fit_timesteps(denoiser, LINEAR, solver, 4, pairs, QUICK, options={"convert_with": "grid"})
    assert learned.validation_loss <= learned.start_losses[learned.start]
    assert sorted(learned.start_losses) == sorted(TIMESTEPS)
    assert all(x == torch.float32 and t == torch.float64 for _, x, t, _ in denoiser.calls)
    with torch.no_grad():
        out = learned.sample(denoiser, LINEAR, pairs.noise)
    assert out.dtype == torch.float32
    found = float(l2(out, pairs.images)[-8:].double().mean())
    assert learned.validation_loss == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("space", ["lam", "time"])
def test_learning_halves_the_error_on_noises_never_seen(space: str) -> None:
    pairs = TEACHER.pairs(DENOISER, LINEAR, range(400), SHAPE, batch_size=400, dtype=torch.float64)
    settings = replace(ADAM, validation_pairs=100, rounds_both=20, recompute=False, space=space)
    learned = fitted(pairs[:300], settings, starts=None)
    before = replace(learned, timesteps=TIMESTEPS[learned.start](LINEAR, 4).tolist())
    before = replace(before, model_timesteps=before.timesteps)
    assert learned.learned
    assert error(learned, pairs[300:]) < 0.5 * error(before, pairs[300:])


def test_a_start_may_have_another_number_of_steps_and_ends(pairs: TeacherPairs) -> None:
    start = TIMESTEPS["edm"](LINEAR, 9, t_min=2e-3)
    learned = fitted(pairs, starts={"longer": start})
    assert len(learned.timesteps) == 5
    assert learned.timesteps[-1] == 2e-3


def test_the_output_scale_is_learned_when_asked(pairs: TeacherPairs) -> None:
    learned = fitted(pairs, replace(QUICK, output_scale=True))
    assert learned.learned
    assert learned.scale is not None
    assert any(value != 1 for value in learned.scale)
    assert error(learned, pairs[12:]) == pytest.approx(learned.validation_loss, rel=1e-9)
    assert fitted(pairs).scale is None


def test_the_same_fit_twice_is_bit_equal_and_steps_ignore_the_unit_of_the_loss(pairs: TeacherPairs) -> None:
    first, second = fitted(pairs), fitted(pairs)
    assert first.timesteps == second.timesteps
    assert first.model_timesteps == second.model_timesteps
    scaled = fitted(pairs, distance=lambda a, b: 1024 * l2(a, b))
    assert scaled.timesteps == pytest.approx(first.timesteps, rel=1e-6)
    assert scaled.validation_loss == pytest.approx(1024 * first.validation_loss, rel=1e-5)


def test_one_step_has_nothing_to_learn(pairs: TeacherPairs) -> None:
    learned = fitted(pairs, nfe=1)
    assert learned.timesteps == [1.0, 1e-3]
    assert learned.statistics["iterations"] == 0


# Memory.


class Wide(nn.Module):
    """A network with activations far larger than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 200), nn.SiLU(), nn.Linear(200, 200), nn.SiLU(), nn.Linear(200, 4))
        self.double().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        flat = x.flatten(1)
        return self.layers(torch.cat([flat, t.expand(len(x), 1)], 1)).view_as(x)


def test_recomputing_gives_equal_gradients_and_keeps_no_activations() -> None:
    torch.manual_seed(0)
    network, noise = Wide(), randn(16, 1, 2, 2)

    def run(nfe: int, recompute: bool) -> tuple[int, list[Tensor]]:
        times = LearnedTimesteps(LINEAR, nfe)
        with torch.no_grad():
            times.xi.copy_(randn(nfe - 1, seed=2))
        student = Student(network, LINEAR, SOLVERS["unipc_3"], {}, times, recompute)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        z = noise.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = student(z)
        size = sum(kept.values())
        return size, list(torch.autograd.grad(out.square().sum(), [times.theta, times.xi, z]))

    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}
    plain, recomputed = {}, {}
    for nfe in (4, 12):
        plain[nfe], expected = run(nfe, recompute=False)
        recomputed[nfe], found = run(nfe, recompute=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    one_call = 16 * 200 * 8 * 2  # the activations of one evaluation, those that SiLU keeps
    assert plain[12] - plain[4] > 8 * one_call
    assert recomputed[12] - recomputed[4] < 8 * one_call * 0.2  # states of the solver, of the size of x
    assert recomputed[12] < plain[12] / 4


# Losses, JSON, errors.


def test_distances_are_per_image() -> None:
    a, b = randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
    torch.testing.assert_close(DISTANCES["l1"](a, b), torch.stack([(x - y).abs().mean() for x, y in zip(a, b)]))  # noqa: B905
    torch.testing.assert_close(DISTANCES["l2"](a, b), torch.stack([(x - y).pow(2).mean() for x, y in zip(a, b)]))  # noqa: B905


def test_feature_distances(pairs: TeacherPairs) -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 3, 2).double(), nn.Conv2d(3, 5, 1).double()

    def feature_maps(images: Tensor) -> list[Tensor]:
        maps = torch.tanh(first(images))
        return [maps, second(maps)]

    distance = FeatureDistance(feature_maps)
    a, b = randn(3, 1, 2, 2).requires_grad_(), randn(3, 1, 2, 2, seed=1)
    found = distance(a, b)
    assert found.shape == (3,)
    expected = 0.0
    for x, y in zip(feature_maps(a), feature_maps(b), strict=True):
        expected = expected + 2 - 2 * torch.nn.functional.cosine_similarity(x, y, dim=1).flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(distance(b, b), torch.zeros(3).double())
    assert torch.autograd.gradcheck(lambda a: distance(a, b), (a,))
    learned = fitted(pairs, replace(QUICK, loss="features"), distance=distance)
    assert learned.settings["loss"] == "features"
    assert learned.validation_loss <= learned.start_losses[learned.start]


def test_a_schedule_goes_through_json_without_losing_a_bit(pairs: TeacherPairs) -> None:
    learned = fitted(pairs, replace(QUICK, output_scale=True), options={"convert_with": "grid"})
    text = learned.to_json()
    again = LearnedSchedule.from_json(text)
    assert again == learned
    assert json.loads(text)["options"] == {"convert_with": "grid"}
    assert torch.equal(again.sample(DENOISER, LINEAR, pairs.noise), learned.sample(DENOISER, LINEAR, pairs.noise))
    for wrong in ("[]", "{}", text.replace('"nfe"', '"steps"')):
        with pytest.raises(ValueError, match="a JSON object with the keys"):
            LearnedSchedule.from_json(wrong)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"solver": "euler"}, "solver must be one of ddim, .*, got 'euler'; the nearest is"),
        ({"solver": "heun", "nfe": 3}, "must be even, got 3; try 4"),
        ({"settings": replace(QUICK, loss="lpips")}, "loss must be one of l1, l2, got 'lpips'"),
        ({"settings": replace(QUICK, validation_pairs=20)}, "20 validation pairs leave none of 20 to train on"),
        ({"starts": {"none": torch.tensor([1.0, 1.0])}}, "timesteps must fall strictly"),
        ({"distance": lambda a, b: l2(a, b) * math.nan}, "the loss of every start is not finite: logsnr, time_uniform"),
    ],
)
def test_wrong_arguments_are_named(pairs: TeacherPairs, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(pairs, **keywords)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of ld3, adam, or module:attribute, got 'sgd'"):
        FitSettings(optimizer="sgd")
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        FitSettings(batch_size=0)
    with pytest.raises(ValueError, match="gamma must be >= 0 and finite, got -1"):
        FitSettings(gamma=-1)
