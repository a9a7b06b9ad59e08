"""Comparisons: arms are what they are called, all get the same budget, and a verdict can go against KL."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.special import stdtrit

from klray import compare as command
from klray.build import build_process
from klray.comparison.arms import caveat, read_arm, read_arms
from klray.comparison.curves import Curves, Interval, compare, cost_ratio, ratio_of_means, word_of
from klray.comparison.plan import TUNING_SEED, budget_images, matched, planned
from klray.comparison.rates import MOST, RUNGS, best_rate, ladder, longer
from klray.comparison.report import report, write_csv, write_files
from klray.comparison.results import (
    AXES,
    METRIC,
    ArmResult,
    arm_result,
    common_quality,
    curves_of,
    final_error,
    verdicts,
)
from klray.config import Config, ConfigError, load_config
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.losses import kl_loss
from klray.core.schedule import VPLinear
from klray.statistics import half_width

Array = NDArray[np.float64]
Series = dict[str, list[tuple[int, float]]]

AMOUNT = 48_000
TINY = ("network.kind=mlp", "network.width=16", "budget.unit=network_evals", f"budget.amount={AMOUNT}")
SPREAD = 0.02
NOISE = (-SPREAD, 0.0, SPREAD)  # of three seeds' log errors
POWER = 0.3


def digits(*changes: str) -> Config:
    """M = 4, joint, matched, repeated, a batch of 64, 3200 images of warm-up."""
    return load_config("digits", [*TINY, *changes])


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a command that should have stopped starts nothing there
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path / "no-data"))


# Arms

ARMS: dict[str, dict[str, Any]] = {
    "vp": {"process.num_terms": 0},
    "vp_batch8": {"process.num_terms": 0, "optimizer.batch_size": 512},
    "vp_ensemble4": {"process.kind": "vp_ensemble"},
    "vp_ensemble6": {"process.kind": "vp_ensemble", "process.num_terms": 6},
    "vp_truncated": {"process.kind": "vp_truncated"},
    "vp_truncated4": {"process.kind": "vp_truncated"},
    "vp_truncated6": {"process.kind": "vp_truncated", "process.num_terms": 6},
    "vp,ema.decay=0.5": {"process.num_terms": 0, "ema.decay": 0.5},
    "kl0": {"process.num_terms": 0},
    "kl4": {},
    "kl8": {"process.num_terms": 8},
    "kl8k2": {"process.num_terms": 8, "loss.partial_terms": 2},
    "kl8k2_separable": {"process.num_terms": 8, "loss.partial_terms": 2, "loss.coupling": "separable"},
    "kl4_wide": {"network.architecture": "wide"},
    "kl4_truncated": {"process.marginal": "truncated"},
    "kl4_paper": {"process.marginal": "paper"},
    "kl8_joint_repeated_matched": {"process.num_terms": 8},
    "kl6_truncated_wide_separable": {
        "process.num_terms": 6,
        "process.marginal": "truncated",
        "network.architecture": "wide",
        "loss.coupling": "separable",
    },
    "kl8,loss.prediction=share,optimizer.betas=[0.8,0.9]": {
        "process.num_terms": 8,
        "loss.prediction": "share",
        "optimizer.betas": [0.8, 0.9],
    },
}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_changes_what_its_name_says_and_nothing_else(name: str) -> None:
    base = digits()
    arm = read_arm(name, base)
    assert arm.name == name
    assert arm.config(base).flat() == base.flat() | ARMS[name]


@pytest.mark.parametrize(
    ("name", "kind", "terms", "partial", "coupling", "architecture", "marginal"),
    [
        ("vp", "kl", 0, None, "joint", "wide", "truncated"),
        ("vp_batch2", "kl", 0, None, "joint", "wide", "truncated"),
        ("vp_ensemble4", "vp_ensemble", 4, None, "joint", "wide", "truncated"),
        ("vp_truncated", "vp_truncated", 6, None, "joint", "wide", "truncated"),
        ("vp_truncated3", "vp_truncated", 3, None, "joint", "wide", "truncated"),
        ("kl8", "kl", 8, None, "separable", "wide", "truncated"),
        ("kl1", "kl", 1, None, "separable", "wide", "truncated"),
        ("kl8k3", "kl", 8, 3, "separable", "wide", "truncated"),
        ("kl8_joint_repeated_matched", "kl", 8, None, "joint", "repeated", "matched"),
    ],
)
def test_an_arm_of_a_base_that_is_itself_special(name: str, kind: str, terms: int, partial: int | None, coupling: str,
                                                 architecture: str, marginal: str) -> None:  # fmt: skip
    """What the name does not speak of is the base's; M, K and the process it always speaks of."""
    base = digits(
        "process.num_terms=6",
        "loss.partial_terms=2",
        "loss.coupling=separable",
        "network.architecture=wide",
        "process.marginal=truncated",
    )
    config = read_arm(name, base).config(base)
    assert (config.process.kind, config.process.num_terms, config.loss.partial_terms) == (kind, terms, partial)
    assert (config.loss.coupling, config.network.architecture) == (coupling, architecture)
    assert config.process.marginal == marginal


@pytest.mark.parametrize("kind", ["vp_ensemble", "vp_truncated"])
@pytest.mark.parametrize("name", ["vp", "kl3"])
def test_an_arm_of_a_base_that_is_a_control(name: str, kind: str) -> None:
    base = digits(f"process.kind={kind}")
    assert read_arm(name, base).config(base).process.kind == "kl"


@pytest.mark.parametrize("name", ["vp", "vp_batch2", "vp_ensemble3"])
@pytest.mark.parametrize("marginal", ["matched", "truncated", "paper"])
def test_vp_arms_have_vp_s_noise_whatever_the_base_s_marginal(name: str, marginal: str) -> None:
    """sigma^2 = 1 - exp(-int_0^t beta), beta = 0.1 + 19.9 t."""
    base = digits(f"process.marginal={marginal}")
    process = build_process(read_arm(name, base).config(base))
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    variance = 1 - torch.exp(-(0.1 * t + 19.9 * t**2 / 2))
    torch.testing.assert_close(process.sigma(t) ** 2, variance)
    torch.testing.assert_close(process.term_std(t).square().sum(-1), variance)


def test_a_batch_is_a_multiple_of_the_base_s() -> None:
    base = digits("optimizer.batch_size=48")
    sizes = [read_arm(name, base).config(base).optimizer.batch_size for name in ("vp", "vp_batch3", "kl8")]
    assert sizes == [48, 144, 48]


EVALS = {"vp": 1, "vp_batch8": 1, "vp_ensemble3": 3, "vp_ensemble4": 4, "vp_truncated6": 1}
EVALS |= {"kl4": 4, "kl8": 8, "kl8k2": 2, "kl4_truncated": 4, "kl4_separable": 4, "kl5_separable": 5}
EVALS |= {"kl4_wide": 1, "kl6_wide": 1, "kl8k2_wide": 1}


@pytest.mark.parametrize("name", EVALS)
def test_network_evaluations_of_an_image(name: str) -> None:
    assert read_arm(name, digits()).config(digits()).evals_per_image == EVALS[name]


NO_FORM = ["", " kl8", "kl8 ", "kl-8", "vp_batch", "vp_ensemble", "vp_truncated_4", "vp_truncated4_wide", "vp_wide"]
NO_FORM += ["kl", "KL8", "vp8", "8kl", "k8", "vp_", "kl8k", "kl8_", "kl8_2", "kl8k2k3"]
BAD_ARMS: dict[str, str] = {
    **{name: f"an arm must be one of vp, .*; got {name!r}" for name in NO_FORM},
    "kl8_wider": "arm kl8_wider: _wider must be one of _joint, _separable, _wide,",
    "kl8k9": "arm kl8k9: loss.partial_terms must be <= process.num_terms = 8, got 9; try 8",
    "kl0k1": "arm kl0k1: loss.partial_terms needs process.num_terms > 0, got 1",
    "kl8k0": "arm kl8k0: loss.partial_terms must be greater than 0, got 0",
    "vp_batch0": "arm vp_batch0: optimizer.batch_size must be greater than 0, got 0",
    "vp_ensemble0": "process.kind vp_ensemble needs process.num_terms >= 1, got 0",
    "vp_truncated0": "process.kind vp_truncated needs process.num_terms >= 1, got 0",
    "vp_ensemble4,loss.coupling=separable": "loss.coupling must be joint",
    "kl4_wide,mesh.basis=2": "mesh.basis must be 1 for network.architecture wide, got 2",
    "kl8,optimizer.lr=1e-3": "arm kl8,optimizer.lr=1e-3: optimizer.lr is set by the comparison",
    "kl8,loss.prediction=share,optimizer.lr=1e-3": "optimizer.lr is set by the comparison",
    "kl8,budget.amount=10": "budget.amount is set by the comparison",
    "vp,budget.unit=images": "budget.unit is set by the comparison",
    "kl8,seed=3": "seed=3",
    "kl8,loss.predicton=share": "unknown key loss.predicton; did you mean loss.prediction?",
    "kl8,los.prediction=share": "unknown key los; did you mean loss?",
    "kl8,loss.prediction=shares": "loss.prediction must be one of term, coefficient, share, v, x0, edm, "
    "or module:attribute, got 'shares'",
    "kl8,loss.prediction": "takes key=value, got 'loss.prediction'",
    "kl8,loss.prediction=[": "is not valid YAML: '['",
}


@pytest.mark.parametrize("name", BAD_ARMS)
def test_a_wrong_arm_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arm(name, digits())
    said = str(caught.value)
    assert all(part in said for part in BAD_ARMS[name].split(".*"))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vp"], "--arms needs at least 2, the baseline first, got 1; for example vp kl8"),
        ([], "--arms needs at least 2, the baseline first, got 0"),
        (["vp", "kl8", "vp"], "arm vp is given twice; leave one out"),
        (["vp", "kl8", "kl0"], "arm kl0 is given twice"),
        (["vp", "vp_batch1"], "arm vp_batch1 is given twice"),
        (["kl8", "vp", "kl08"], "arm kl08 is given twice"),
        (["kl8", "kl8_joint"], "arm kl8_joint is given twice"),
        (["kl8,loss.prediction=share", "kl8,loss.prediction='share'"], "is given twice"),
    ],
)
def test_a_comparison_is_of_different_arms(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="^[^\n]*" + re.escape(message)):
        read_arms(names, digits())


def test_arms_keep_their_order_and_can_be_keys() -> None:
    names = ["kl8", "vp", "kl8,optimizer.betas=[0.8,0.9]", "kl8,optimizer.betas=[0.9,0.9]"]
    arms = read_arms(names, digits())
    assert [arm.name for arm in arms] == names
    assert list(dict.fromkeys(arms)) == arms
    assert {read_arm(name, digits()) for name in names} == set(arms)


# The caveat

KINDS = [
    (kind, coupling, marginal)
    for kind in ("kl", "vp_ensemble", "vp_truncated")
    for coupling in ("joint", "separable")
    for marginal in ("matched", "truncated", "paper")
    if (kind, coupling) != ("vp_ensemble", "separable")  # which a configuration refuses
]


@pytest.mark.parametrize(("kind", "coupling", "marginal"), KINDS)
def test_the_caveat_is_for_joint_and_matched_kl_alone(kind: str, coupling: str, marginal: str) -> None:
    of_terms = {"1": [None, 1], "2": [None, 2, 1], "5": [None, 5, 4, 2, 1]} | ({"0": [None]} if kind == "kl" else {})
    for terms, partials in of_terms.items():
        for partial in partials[: 2 if kind == "vp_ensemble" else None]:
            config = digits(
                f"process.kind={kind}",
                f"loss.coupling={coupling}",
                f"process.marginal={marginal}",
                f"process.num_terms={terms}",
                f"loss.partial_terms={'null' if partial is None else partial}",
            )
            said = caveat(config)
            if (kind, coupling, marginal) != ("kl", "joint", "matched") or int(terms) < 2:
                assert said is None
                continue
            assert said is not None and "\n" not in said
            whole = partial is None or partial == int(terms)
            assert (f"vp_ensemble{terms} is its control" in said, "K = M:" in said) == (whole, whole)
            assert ("K < M:" in said) == (not whole)


def test_the_caveat_is_for_wide_too() -> None:
    assert caveat(digits("network.architecture=wide")) == caveat(digits())


def residual_losses(count: int) -> tuple[Callable[..., float], Array]:
    """(the loss of given terms and coupling of one image, each term's residual [M, pixels])."""
    generator = torch.Generator().manual_seed(count)
    shape = (1, count, 1, 3, 3)
    z, output = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x0, t = torch.zeros(1, 1, 3, 3, dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
    process = KarhunenLoeve(VPLinear(), count, "matched")

    def loss(terms: Sequence[int], coupling: str) -> float:
        chosen = torch.tensor(terms)
        return float(kl_loss(lambda x, t, m: output[:, m], process, x0, z, t, coupling=coupling, terms=chosen))

    std = process.term_std(t)[0] / process.sigma(t)
    residuals = std[:, None] * z[0].flatten(1) - output[0].flatten(1)
    return loss, residuals.numpy()


def test_what_the_caveat_says_of_all_terms() -> None:
    """Joint, matched, K = M: the VP loss || eps - sum of the outputs ||^2, and eps is VP's own noise."""
    loss, residuals = residual_losses(4)
    assert loss(range(4), "joint") == pytest.approx(np.mean(residuals.sum(0) ** 2), rel=1e-12)
    process = KarhunenLoeve(VPLinear(), 4, "matched")
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    torch.testing.assert_close(process.term_std(t).square().sum(-1), 1 - torch.exp(-(0.1 * t + 9.95 * t**2)))


@pytest.mark.parametrize(("count", "partial"), [(4, 1), (4, 2), (5, 3), (5, 4), (3, 3)])
def test_what_the_caveat_says_of_some_terms(count: int, partial: int) -> None:
    """Over all sets of K terms the joint loss is the separable one plus (K - 1)/(M - 1) of joint's cross terms."""
    loss, residuals = residual_losses(count)
    mean = statistics.fmean(loss(terms, "joint") for terms in itertools.combinations(range(count), partial))
    separable = np.mean((residuals**2).sum(0))
    cross = np.mean(residuals.sum(0) ** 2) - separable
    assert mean == pytest.approx(separable + (partial - 1) / (count - 1) * cross, rel=1e-12)


# The plan


@pytest.mark.parametrize("name", EVALS)
def test_equal_network_evaluations(name: str) -> None:
    """Warm-up takes the same share of every arm's images, and every arm is looked at 24 times."""
    base = digits("optimizer.warmup_images=600")  # of the 12 000 images that M = 4 gets: 5 %
    arm = read_arm(name, base)
    config, images = matched(arm, base), AMOUNT / EVALS[name]
    assert budget_images(config) == images
    assert (config.budget.unit, config.budget.amount) == ("network_evals", AMOUNT)
    assert config.optimizer.warmup_images == round(0.05 * images)
    assert config.validation.every_images == images // 24
    assert config.sampling.every_images == images
    changed = {"optimizer.warmup_images", "validation.every_images", "sampling.every_images"}
    other = arm.config(base).flat()
    assert {key for key, value in config.flat().items() if other[key] != value} <= changed


@pytest.mark.parametrize("name", EVALS)
def test_equal_images(name: str) -> None:
    base = digits("budget.unit=images", "optimizer.warmup_images=700")
    config = matched(read_arm(name, base), base)
    assert budget_images(config) == AMOUNT
    assert (config.optimizer.warmup_images, config.validation.every_images) == (700, 2000)
    assert config.sampling.every_images == AMOUNT


@pytest.mark.parametrize("name", EVALS)
def test_equal_seconds_leave_the_settings_of_images(name: str) -> None:
    base = digits("budget.unit=seconds", "budget.amount=60", "optimizer.warmup_images=700")
    arm = read_arm(name, base)
    assert budget_images(base) is None
    assert matched(arm, base) == arm.config(base)


def test_steps_are_no_cost() -> None:
    base = digits("budget.unit=steps")
    with pytest.raises(ConfigError, match=r"^budget.unit must be network_evals, images or seconds [^\n]*, got steps$"):
        matched(read_arm("vp", base), base)


@pytest.mark.parametrize("amount", [1, 7, 23, 25])
def test_a_budget_smaller_than_the_number_of_looks(amount: int) -> None:
    base = digits(f"budget.amount={amount}")
    config = matched(read_arm("kl8", base), base)
    assert (config.validation.every_images, config.sampling.every_images) == (1, max(1, amount // 8))


@pytest.mark.parametrize("looks", [1, 6, 48])
def test_other_numbers_of_looks(looks: int) -> None:
    base = digits()
    assert matched(read_arm("kl4", base), base, looks).validation.every_images == 12_000 // looks


@pytest.mark.parametrize("terms", [2, 3, 4, 6, 8, 12, 24])
def test_an_arm_ends_at_a_look_of_the_baseline_s(terms: int) -> None:
    base = digits(f"budget.amount={24 * 24 * 100}")
    every = matched(read_arm("vp", base), base).validation.every_images
    assert 24 * 24 * 100 / terms % every == 0


def test_a_planned_run_has_its_rate_its_seed_and_a_name_of_its_own() -> None:
    base = digits("seed=5")
    settings = [(0.002, "result", 0), (0.002, "result", 2), (0.001, "result", 0), (0.002, "tuning", TUNING_SEED)]
    names = set()
    for text in ("vp", "kl8k2_separable", "kl8,optimizer.betas=[0.8,0.9]", "kl8,loss.prediction=share"):
        arm = read_arm(text, base)
        config = matched(arm, base)
        for rate, stage, seed in settings:
            run = planned(arm, config, rate, stage, seed)
            assert (run.arm, run.stage) == (text, stage)
            assert run.config.flat() == config.flat() | {"optimizer.lr": rate, "seed": 5 + seed}
            assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name)
            names.add(run.name)
    assert len(names) == 16


# Learning rates


@pytest.mark.parametrize("centre", [1e-3, 2e-4, 3.7e-3])
@pytest.mark.parametrize(("rungs", "factor"), [(5, 2.0), (7, 3.0), (9, math.sqrt(2)), (5, 10.0)])
def test_the_ladder_is_even_in_the_logarithm_and_centred(centre: float, rungs: int, factor: float) -> None:
    rates = ladder(centre, rungs, factor)
    assert len(rates) == rungs
    assert rates[rungs // 2] == centre
    np.testing.assert_allclose(np.diff(np.log(rates)), math.log(factor), atol=1e-3)  # rates have four digits
    assert statistics.geometric_mean(rates) == pytest.approx(centre, rel=5e-4)
    assert all(float(f"{rate:.4g}") == rate for rate in rates)


def test_a_ladder_of_an_even_number_has_its_rung_more_above() -> None:
    assert ladder(1.0, 6, 2.0) == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]


INF = math.inf


@pytest.mark.parametrize(
    ("errors", "next_rate"),
    [
        ([5, 4, 3, 2, 1], 8.0),
        ([1, 2, 3, 4, 5], 0.125),
        ([3, 2, 1, 2, 3], None),
        ([3, 1, 2, 3, 4], None),
        ([4, 3, 2, 1, 2], None),
        ([3, 2, 1, INF, INF], None),
        ([4, 3, 2, 1, INF], None),
        ([INF, INF, 1, INF, INF], None),
        ([1, INF, INF, INF, INF], 0.125),
        ([INF, INF, INF, INF, 1], 8.0),
        ([INF, INF, INF, INF, INF], 0.125),  # too high, all of them
    ],
)
def test_the_ladder_grows_at_the_end_where_the_best_is(errors: list[float], next_rate: float | None) -> None:
    tried = dict(zip((0.25, 0.5, 1.0, 2.0, 4.0), errors, strict=True))
    assert longer(tried, 2.0, 5) == next_rate
    assert longer(dict(sorted(tried.items(), reverse=True)), 2.0, 5) == next_rate
    assert best_rate(tried) == min(rate for rate, error in tried.items() if error == min(errors))


def test_the_ladder_stops_growing() -> None:
    for rungs in (5, 8):
        tried = {2.0**k: -float(k) for k in range(rungs + MOST - 1)}
        rate = longer(tried, 2.0, rungs)
        assert rate == 2.0 ** (rungs + MOST - 1)
        assert longer(tried | {rate: -99.0}, 2.0, rungs) is None


def tune(error_of: Callable[[float], float], centre: float, factor: float) -> dict[float, float]:
    tried = {rate: error_of(rate) for rate in ladder(centre, RUNGS, factor)}
    while (rate := longer(tried, factor, RUNGS)) is not None:
        assert rate not in tried
        tried[rate] = error_of(rate)
    return tried


@pytest.mark.parametrize("factor", [2.0, 3.0])
@pytest.mark.parametrize("off", range(-7, 8))
@pytest.mark.parametrize("diverges", [False, True])
def test_tuning_finds_an_optimum_far_from_the_centre(off: int, factor: float, diverges: bool) -> None:
    """A parabola in log lr, which may diverge just above the optimum: one rung beyond it is tried, and no more."""
    centre = 1e-3
    optimum = centre * factor ** (off + 0.3)  # the rung below is the nearest

    def error_of(rate: float) -> float:
        return INF if diverges and rate > 1.1 * optimum else 0.1 + math.log(rate / optimum) ** 2

    tried = tune(error_of, centre, factor)
    assert best_rate(tried) == pytest.approx(centre * factor**off, rel=1e-3)
    assert len(tried) == RUNGS + max(0, abs(off) - 1)
    assert min(tried) < best_rate(tried) < max(tried)


@pytest.mark.parametrize("off", [-30, 30])
def test_tuning_gives_up_at_an_end(off: int) -> None:
    tried = tune(lambda rate: abs(math.log2(rate / 1e-3) - off), 1e-3, 2.0)
    assert len(tried) == RUNGS + MOST
    assert best_rate(tried) == (max(tried) if off > 0 else min(tried))
    assert best_rate(tried) == pytest.approx(1e-3 * 2.0 ** (math.copysign(2 + MOST, off)), rel=1e-3)


# Curves


def power_law(scales: Sequence[float], power: float = POWER, costs: Array | None = None) -> Curves:
    """Seeds with error = scale * cost^-power."""
    costs = np.geomspace(100, 1e5, 25) if costs is None else costs
    rows = np.tile(costs, (len(scales), 1))
    return Curves(rows, np.array(scales)[:, None] * rows**-power)


@pytest.mark.parametrize("cost", [100.5, 137.0, 5000.0, 99_999.0])
def test_between_looks_a_power_law_is_exact(cost: float) -> None:
    scales = np.array([1.0, 1.3, 4.0])
    np.testing.assert_allclose(power_law([1.0, 1.3, 4.0]).errors_at(cost), scales * cost**-POWER, rtol=1e-12)


def test_at_a_look_its_own_error_is_exact() -> None:
    random = np.random.default_rng(0)
    curves = Curves(np.cumsum(random.uniform(1, 9, (3, 8)), axis=1), random.uniform(0.1, 1, (3, 8)))
    for seed, look in itertools.product(range(3), range(8)):
        assert curves.errors_at(curves.costs[seed, look])[seed] == pytest.approx(curves.errors[seed, look], rel=1e-12)


def test_outside_of_a_seed_s_looks_nothing_is_known() -> None:
    curves = Curves(np.array([[1.0, 10.0], [4.0, 40.0]]), np.array([[1.0, 0.1], [1.0, 0.1]]))
    np.testing.assert_array_equal(np.isnan(curves.errors_at(2.0)), [False, True])
    np.testing.assert_array_equal(np.isnan(curves.errors_at(20.0)), [True, False])
    np.testing.assert_array_equal(np.isnan([curves.errors_at(0.5), curves.errors_at(50.0)]), True)


def test_the_end_is_where_every_seed_has_been() -> None:
    assert Curves(np.array([[1.0, 10.0], [1.0, 7.0], [1.0, 12.0]]), np.ones((3, 2))).end == 7.0


@pytest.mark.parametrize("error", [0.08, 0.1, 0.2])
def test_the_cost_of_an_error_on_power_laws(error: float) -> None:
    """The geometric mean of the seeds is a power law of the scales' geometric mean."""
    scales = [1.0, 1.2, 1.7]
    curves = power_law(scales)
    expected = (math.prod(scales) ** (1 / 3) / error) ** (1 / POWER)
    assert curves.cost_to(error) == pytest.approx(expected, rel=1e-12)
    assert curves.cost_to(error, [2, 0, 2]) == pytest.approx(
        ((1.7 * 1.0 * 1.7) ** (1 / 3) / error) ** (1 / POWER), rel=1e-12
    )
    assert curves.cost_to(error, [1]) == pytest.approx((1.2 / error) ** (1 / POWER), rel=1e-12)


def test_the_cost_of_an_error_where_each_seed_has_its_own_pace() -> None:
    pace = np.array([1.0, 1.5, 0.8])
    looks = np.geomspace(100, 1e5, 25)
    curves = Curves(pace[:, None] * looks, np.tile(2.0 * looks**-POWER, (3, 1)))
    expected = float(np.prod(pace)) ** (1 / 3) * (2.0 / 0.2) ** (1 / POWER)
    assert curves.cost_to(0.2) == pytest.approx(expected, rel=1e-12)


def test_the_first_crossing_counts() -> None:
    curves = Curves(np.array([[1.0, 10.0, 100.0, 1000.0]]), np.array([[1.0, 0.5, 2.0, 0.125]]))
    assert curves.cost_to(math.sqrt(0.5)) == pytest.approx(math.sqrt(10))
    assert curves.cost_to(0.5) == pytest.approx(10)
    assert curves.cost_to(0.25) == pytest.approx(100 * 10**0.75)  # three of the four halvings from 2 to 0.125
    assert curves.cost_to(0.125) == pytest.approx(1000)
    assert curves.cost_to(0.12) == INF
    assert curves.cost_to(1.0) == pytest.approx(1)
    assert curves.cost_to(3.0) == pytest.approx(1)  # an upper bound: the first look


def test_the_first_crossing_of_wandering_curves_by_brute_force() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        costs = np.geomspace(10, 1000, 9)
        errors = np.exp(np.cumsum(random.normal(-0.1, 0.4, (3, 9)), axis=1))
        target = float(np.exp(random.normal(-0.4, 0.3)))
        grid = np.linspace(math.log(10), math.log(1000), 50_001)
        mean = np.mean([np.interp(grid, np.log(costs), np.log(seed)) for seed in errors], axis=0)
        below = grid[mean <= math.log(target)]
        expected = math.exp(below[0]) if len(below) else INF
        assert Curves(np.tile(costs, (3, 1)), errors).cost_to(target) == pytest.approx(expected, rel=2e-4)


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """exp of (difference of the logs' means, its 95 % limits), by Welch and Satterthwaite's formulas."""
    x, y = [math.log(v) for v in a], [math.log(v) for v in b]
    u, v = statistics.variance(x) / len(x), statistics.variance(y) / len(y)
    freedom = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(u + v)
    middle = statistics.fmean(x) - statistics.fmean(y)
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


@pytest.mark.parametrize(("seeds", "of_baseline"), [(3, 3), (3, 8), (2, 2), (10, 4)])
def test_the_interval_is_welch_s(seeds: int, of_baseline: int) -> None:
    random = np.random.default_rng(seeds)
    a, b = np.exp(random.normal(0.2, 0.1, seeds)), np.exp(random.normal(0, 0.5, of_baseline))
    ratio = ratio_of_means(a, b)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(welch(a.tolist(), b.tolist()), rel=1e-9)
    turned = ratio_of_means(b, a)
    inverse = (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    assert (turned.value, turned.low, turned.high) == pytest.approx(inverse, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_an_interval_where_only_one_side_varies() -> None:
    a, b = [1.0, 1.1, 1.3], [2.0, 2.0, 2.0]
    ratio = ratio_of_means(np.array(a), np.array(b))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(welch(a, b), rel=1e-9)


def test_an_interval_needs_seeds_and_their_spread() -> None:
    one = ratio_of_means(np.array([2.0]), np.array([1.0, 1.1]))
    assert one.value == pytest.approx(2 / math.sqrt(1.1))
    assert math.isnan(one.low) and math.isnan(one.high)
    assert word_of(one) == "not separable"
    assert ratio_of_means(np.full(3, 0.5), np.full(3, 0.25)) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((0.8, 0.7, 0.9), "ahead"),
        ((1.2, 1.1, 1.3), "behind"),
        ((0.9, 0.7, 1.1), "not separable"),
        ((0.9, 0.8, 1.0), "not separable"),
        ((1.1, 1.0, 1.2), "not separable"),
        ((1.0, 1.0, 1.0), "not separable"),
        ((5.0, math.nan, math.nan), "not separable"),
        ((math.nan, math.nan, math.nan), "not separable"),
    ],
)
def test_the_word_of_an_interval(interval: tuple[float, float, float], word: str) -> None:
    assert word_of(Interval(*interval)) == word


def test_arms_are_compared_at_the_largest_cost_that_both_have_reached() -> None:
    """The arm has been to 1000 alone; beyond, the baseline is much better, which has no say."""
    arm = power_law([1.0, 1.1, 1.2], power=0.1, costs=np.geomspace(10, 1000, 9))
    baseline = power_law([2.0, 2.1, 2.2], power=0.3, costs=np.geomspace(10, 1e5, 10))
    verdict = compare(arm, baseline)
    assert verdict.cost == 1000
    middle = math.log(1.1**2 * 1.2 / 1.1 / (2.0 * 2.1 * 2.2)) / 3 + 0.2 * math.log(1000)
    assert verdict.ratio.value == pytest.approx(math.exp(middle), rel=1e-9)
    expected = welch([s * 1000**-0.1 for s in (1.0, 1.1, 1.2)], [s * 1000**-0.3 for s in (2.0, 2.1, 2.2)])
    assert (verdict.ratio.low, verdict.ratio.high) == pytest.approx(expected[1:], rel=1e-9)
    assert (verdict.word, compare(baseline, arm).word) == ("behind", "ahead")


def test_no_verdict_where_the_baseline_has_not_been_looked_at_yet() -> None:
    early = power_law([1.0, 1.1, 1.2], costs=np.geomspace(1, 10, 5))
    verdict = compare(early, power_law([9.0, 9.1, 9.2]))
    assert (verdict.cost, verdict.word) == (pytest.approx(10), "not separable")
    assert math.isnan(verdict.ratio.value)


@pytest.mark.parametrize(("deviation", "seeds", "truth"), [(0.1, 3, 1.0), (0.4, 3, 1.0), (0.2, 6, 0.5)])
def test_intervals_hold_the_truth_19_times_in_20(deviation: float, seeds: int, truth: float) -> None:
    """Without a difference, that is how often arms are not separable; the others go either way."""
    random, runs = np.random.default_rng(7), 500
    ratios = [
        ratio_of_means(truth * np.exp(random.normal(0, deviation, seeds)), np.exp(random.normal(0, 0.1, seeds)))
        for _ in range(runs)
    ]
    inside = sum(ratio.low <= truth <= ratio.high for ratio in ratios) / runs
    assert 0.92 <= inside <= 0.99
    if truth == 1.0:
        words = [word_of(ratio) for ratio in ratios]
        assert words.count("not separable") / runs == inside
        assert 0 < words.count("ahead") < 0.05 * runs
        assert 0 < words.count("behind") < 0.05 * runs


def test_a_large_difference_is_seen() -> None:
    random = np.random.default_rng(8)
    for _ in range(100):
        worse, better = np.exp(random.normal(0.5, 0.02, 3)), np.exp(random.normal(0, 0.02, 3))
        assert word_of(ratio_of_means(worse, better)) == "behind"
        assert word_of(ratio_of_means(better, worse)) == "ahead"


@pytest.mark.parametrize("error", [0.08, 0.15])
def test_what_an_arm_pays_on_power_laws(error: float) -> None:
    arm, baseline = power_law([1.0, 1.05, 1.1]), power_law([1.3, 1.2, 1.25])
    ratio = cost_ratio(arm, baseline, error)
    expected = ((1.0 * 1.05 * 1.1) / (1.3 * 1.2 * 1.25)) ** (1 / 3 / POWER)
    assert ratio.value == pytest.approx(expected, rel=1e-12)
    assert ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize(
    ("scales", "of_baseline"), [([1.0, 1.2, 1.45], [1.3, 1.31, 1.32]), ([1.0, 1.01, 1.02], [1.3, 1.1, 1.6])]
)
def test_the_bootstrap_against_all_resamples(scales: list[float], of_baseline: list[float]) -> None:
    """Of power laws every resample's cost is known: (the scales' geometric mean / error)^(1/power)."""
    error = 0.12
    costs = [
        [(math.prod(drawn) ** (1 / 3) / error) ** (1 / POWER) for drawn in itertools.product(values, repeat=3)]
        for values in (scales, of_baseline)
    ]
    ratios = np.array([a / b for a, b in itertools.product(*costs)])
    assert len(ratios) == 27**2
    interval = cost_ratio(power_law(scales), power_law(of_baseline), error)
    assert np.mean(ratios < interval.low * (1 - 1e-9)) <= 0.035
    assert np.mean(ratios <= interval.low * (1 + 1e-9)) >= 0.015
    assert np.mean(ratios > interval.high * (1 + 1e-9)) <= 0.035
    assert np.mean(ratios >= interval.high * (1 - 1e-9)) >= 0.015


def test_without_spread_a_cost_has_none() -> None:
    ratio = cost_ratio(power_law([2.0] * 3), power_law([1.0] * 3), 0.1)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2 ** (1 / POWER),) * 3, rel=1e-9)


def test_costs_of_what_is_never_reached() -> None:
    good, bad = power_law([1.0, 1.1, 1.2]), power_law([9.0, 9.1, 9.2])
    never = cost_ratio(bad, good, 0.1)
    assert (never.value, never.low, never.high) == (INF, INF, INF)
    unknown = cost_ratio(good, bad, 0.1)
    assert all(math.isnan(value) for value in (unknown.value, unknown.low, unknown.high))
    assert math.isnan(cost_ratio(bad, bad, 0.1).value)


def test_an_interval_is_open_above_where_a_seed_does_not_get_there() -> None:
    mixed = power_law([1.0, 1.1, 9.0])
    ratio = cost_ratio(mixed, power_law([1.0, 1.0, 1.0]), 0.1)
    assert math.isfinite(ratio.low) and ratio.high == INF


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.31, 0.35], [5.0, 1.0, 2.0, 2.5, 8.0]])
def test_half_of_a_t_interval(values: list[float]) -> None:
    by_hand = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    assert half_width(values) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, INF], [1.0, math.nan, 2.0]])
def test_no_interval(values: list[float]) -> None:
    assert half_width(values) is None


# Results


def test_a_look_that_was_taken_again_counts_once_with_the_later_value() -> None:
    resumed: Series = {
        METRIC: [(100, 0.9), (200, 0.8), (300, 0.7), (200, 0.75), (300, 0.65), (400, 0.5)],
        "network_evals": [(50, 200.0), (100, 400.0), (200, 800.0), (300, 1200.0), (400, 1600.0)],
        "seconds": [(100, 1.0), (200, 2.0), (200, 2.5), (250, 2.9), (300, 3.5), (400, 4.5)],
        "train/loss": [(100, 9.0)],
    }
    other: Series = {
        METRIC: [(100, 0.95), (200, 0.85), (300, 0.6), (400, 0.55)],
        "network_evals": [(look, 4.0 * look) for look in (100, 200, 300, 400)],
        "seconds": [(look, look / 50) for look in (100, 200, 300, 400)],
    }
    curves = curves_of([resumed, other], 7.0)
    assert set(curves) == set(AXES)
    for of_axis in curves.values():
        np.testing.assert_array_equal(of_axis.errors, [[0.9, 0.75, 0.65, 0.5], [0.95, 0.85, 0.6, 0.55]])
    np.testing.assert_array_equal(curves["images"].costs, [[100, 200, 300, 400]] * 2)
    np.testing.assert_array_equal(curves["network_evals"].costs, [[400, 800, 1200, 1600]] * 2)
    np.testing.assert_array_equal(curves["flops"].costs, [[700, 1400, 2100, 2800]] * 2)
    np.testing.assert_array_equal(curves["seconds"].costs, [[1, 2.5, 3.5, 4.5], [2, 4, 6, 8]])


def steady(looks: Sequence[int], errors: Sequence[float]) -> Series:
    """A run's history at one network evaluation an image and 100 images a second."""
    return {
        METRIC: list(zip(looks, errors, strict=True)),
        "network_evals": [(look, float(look)) for look in looks],
        "seconds": [(look, look / 100) for look in looks],
    }


def test_only_looks_that_all_runs_have_count() -> None:
    runs = [steady([100, 200, 300], [3.0, 2.0, 1.0]), steady([100, 150, 300, 400], [4.0, 3.5, 2.0, 1.5])]
    curves = curves_of(runs, 1.0)
    np.testing.assert_array_equal(curves["images"].costs, [[100, 300]] * 2)
    np.testing.assert_array_equal(curves["seconds"].costs, [[1, 3]] * 2)
    np.testing.assert_array_equal(curves["seconds"].errors, [[3, 1], [4, 2]])


@pytest.mark.parametrize(
    ("errors", "expected"), [([0.5, 0.7], 0.7), ([0.5, math.nan], INF), ([0.5, INF], INF), (None, INF)]
)
def test_a_run_s_final_error(errors: list[float] | None, expected: float) -> None:
    assert final_error(None if errors is None else steady([100, 200], errors)) == expected


@pytest.mark.parametrize(("name", "evals", "labels"), [("vp", 1, 0), ("kl4", 4, 4), ("vp_ensemble6", 6, 6)])
def test_what_an_arm_s_network_costs(name: str, evals: int, labels: int) -> None:
    """The mlp: 64 -> 16, times 16 -> 16, 16 -> 16, 16 -> 64, labels of 16; forward and twice as much backward."""
    base = digits()
    arm = read_arm(name, base)
    result = arm_result(arm, matched(arm, base), {1e-3: 0.1}, [], 3)
    layers = [(64, 16), (16, 16), (16, 16), (16, 64)]
    assert result.parameters == sum(inputs * outputs + outputs for inputs, outputs in layers) + 16 * labels
    assert result.flops == 3 * evals * 2 * sum(inputs * outputs for inputs, outputs in layers)
    assert (result.curves, result.lost) == ({}, 3)


# Whole comparisons, whose answers are known: errors are scale * images^-POWER, seconds go with network evaluations.

RATES = {5e-4: 0.3, 1e-3: 0.2, 2e-3: 0.1, 4e-3: 0.2, 8e-3: INF}


@functools.cache
def found(name: str, scale: float, whole: int = 3, at_end: bool = False) -> ArmResult:
    """An arm of three seeds, of which ``whole`` were trained to the end."""
    base = digits()
    arm = read_arm(name, base)
    evals = EVALS[name]
    looks = [AMOUNT // evals * k // 24 for k in range(1, 25)]
    runs: list[Series] = [
        {
            METRIC: [(look, scale * look**-POWER * math.exp(noise)) for look in looks],
            "network_evals": [(look, float(look * evals)) for look in looks],
            "seconds": [(look, look * evals / 1000) for look in looks],
        }
        for noise in NOISE[:whole]
    ]
    config = arm.config(matched(arm, base), **{"optimizer.lr": 8e-3 if at_end else 2e-3})
    tried = {rate: 0.1 * (1 if rate == config.optimizer.lr else 2) for rate in RATES} if at_end else RATES
    return arm_result(arm, config, tried, runs, 3 - whole)


def versus(scale: float) -> list[ArmResult]:
    return [found("vp", 1.0), found("kl4", scale)]


@functools.cache
def told(scale: float) -> str:
    return report(versus(scale))


def tables(text: str) -> list[dict[str, list[str]]]:
    """The report's tables: first cell -> the other cells."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block] for block in blocks]
    return [{line[0]: line[1:] for line in lines if set(line[0]) != {"-"}} for lines in cells]


def notes(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(f"- {name}: ")]


def rows_of(folder: Path) -> dict[tuple[str, str], Mapping[str, str]]:
    with (folder / "verdicts.csv").open(newline="") as file:
        return {(row["arm"], row["axis"]): row for row in csv.DictReader(file)}


# an arm's scale over vp's -> the words for images and for the axes that count every network evaluation
KL4 = {1.5: ("behind", "behind"), 1.0: ("not separable", "behind"), 0.75: ("ahead", "behind"), 0.5: ("ahead", "ahead")}


@pytest.mark.parametrize("scale", KL4)
def test_a_comparison_finds_what_is_so(scale: float, tmp_path: Path) -> None:
    """KL can lose on every axis, win on every axis, or tie at equal images and lose where network calls count.

    At equal images the ratio is the scales'; elsewhere kl4 has had a fourth of vp's images and pays 4^POWER for it.
    """
    results = versus(scale)
    half = float(stdtrit(4, 0.975)) * SPREAD * math.sqrt(2 / 3)  # equal variances s^2 of 3 and 3 seeds: 4 degrees
    _, at_equal_cost, _ = tables(told(scale))
    assert at_equal_cost["arm"] == [f"at equal {label}" for label in AXES.values()]
    write_csv(results, tmp_path / "verdicts.csv")
    rows = rows_of(tmp_path)
    assert set(rows) == {("kl4", axis) for axis in AXES}
    ends = {
        "images": AMOUNT / 4,
        "network_evals": AMOUNT,
        "flops": AMOUNT * 6 * (2 * 64 * 16 + 2 * 16 * 16),
        "seconds": AMOUNT / 1000,
    }
    for axis, cell in zip(AXES, at_equal_cost["kl4"], strict=True):
        row, verdict = rows["kl4", axis], verdicts(results)["kl4"][axis]
        ratio = scale * (1 if axis == "images" else 4**POWER)
        word = KL4[scale][axis != "images"]
        assert row["verdict"] == verdict.word == word
        assert (float(row["ratio"]), float(row["cost"])) == pytest.approx((ratio, ends[axis]), rel=1e-9)
        limits = ratio * math.exp(-half), ratio * math.exp(half)
        assert (float(row["low"]), float(row["high"])) == pytest.approx(limits, rel=1e-9)
        assert cell == f"{word} {ratio:.3g} [{limits[0]:.3g}, {limits[1]:.3g}]"


def test_what_quality_costs() -> None:
    """error = scale * images^-POWER: for the same error kl4 needs scale^(1/POWER) times the images, each 4 evals."""
    text = report(versus(1.3), quality=0.08)
    assert f"Cost to reach {METRIC} 0.08, over that of vp:" in text
    _, _, paid = tables(text)
    assert paid["arm"] == list(AXES.values())
    for axis, cell in zip(AXES, paid["kl4"], strict=True):
        expected = 1.3 ** (1 / POWER) * (1 if axis == "images" else 4)
        value, low, high = (float(number.strip("[],")) for number in cell.split())
        assert value == pytest.approx(expected, rel=5e-3)  # three digits
        assert low < value < high


def test_the_quality_told_is_a_little_more_than_the_worst_arm_ends_with() -> None:
    finals = [1.0 * AMOUNT**-POWER, 1.5 * (AMOUNT / 4) ** -POWER, 0.9 * (AMOUNT / 8) ** -POWER]
    assert common_quality([*versus(1.5), found("kl8", 0.9)]) == pytest.approx(1.05 * max(finals), rel=1e-12)
    assert f"Cost to reach {METRIC} {1.05 * max(finals):.4g}, over that of vp:" in told(1.5)


def test_whoever_comes_first_is_the_baseline_and_what_is_not_reached_is_said() -> None:
    """vp ends at an error of 0.0394, kl4 at 0.0896."""
    assert set(tables(report(versus(1.5), quality=0.05))[2]["kl4"]) == {"not reached"}
    _, at_equal_cost, paid = tables(report(versus(1.5)[::-1], quality=0.05))
    assert set(at_equal_cost) == set(paid) == {"arm", "vp"}
    assert all(cell.startswith("ahead 0.") for cell in at_equal_cost["vp"])
    assert set(paid["vp"]) == {"baseline does not reach it"}


def test_the_table_of_arms() -> None:
    arms, *_ = tables(told(1.5))
    errors = [1.5 * (AMOUNT / 4) ** -POWER * math.exp(noise) for noise in NOISE]
    half = float(stdtrit(2, 0.975)) * statistics.stdev(errors) / math.sqrt(3)
    assert arms["arm"][-1] == METRIC
    assert arms["vp"][:7] == ["0.002 (of 5)", "2,672", "1", "48,000", "48,000", "1", "48"]  # 48 000 x 15 360 FLOPs
    assert arms["kl4"][:7] == ["0.002 (of 5)", "2,736", "4", "12,000", "48,000", "1", "48"]
    assert arms["kl4"][7] == f"{statistics.fmean(errors):.4g} ± {half:.1g} (3 seeds)"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("kl4", "vp_ensemble4 is its control"),
        ("kl6_wide", "vp_ensemble6 is its control"),
        ("kl8k2", "K < M"),
        ("kl4_separable", None),
        ("kl4_truncated", None),
        ("vp_ensemble4", None),
    ],
)
def test_the_caveat_stands_beside_the_result(name: str, part: str | None) -> None:
    text = report([found("vp", 1.0, whole=0), found(name, 1.0)])
    said = [part in line and "joint and matched" in line for line in notes(text, name) if part is not None]
    assert said == ([] if part is None else [True])
    assert not any("joint and matched" in line for line in notes(text, "vp"))
    assert ("joint and matched" in text) == (part is not None)


def test_a_rate_at_an_end_is_said_of_that_arm_alone() -> None:
    results = [found("vp", 1.0, whole=0), found("kl4_separable", 1.0, at_end=True)]
    assert [result.rate_at_end for result in results] == [False, True]
    text = report(results)
    (note,) = notes(text, "kl4_separable")
    assert "learning rate, 0.008, is at an end of those tried" in note
    assert not any("at an end" in line for line in notes(text, "vp"))


def test_lost_runs_are_said() -> None:
    text = report([found("vp", 1.0), found("kl4_separable", 1.5, whole=2)], quality=0.1)
    (note,) = notes(text, "kl4_separable")
    assert "1 of its seeds" in note and "diverged or failed" in note
    assert notes(text, "vp") == []
    assert tables(text)[0]["kl4_separable"][-1].endswith("(2 seeds)")


def test_one_seed_alone_decides_nothing() -> None:
    results = [found("vp", 1.0), found("kl4", 1.5, whole=1)]
    assert {verdict.word for verdict in verdicts(results)["kl4"].values()} == {"not separable"}


def test_an_arm_without_a_whole_run_is_told_and_not_compared() -> None:
    results = [found("vp", 1.0), found("kl4", 1.0, whole=0), found("kl8", 1.5)]
    text = report(results)
    arms, at_equal_cost, paid = tables(text)
    assert arms["kl4"][-1] == "no run reached the end"
    assert set(at_equal_cost) == set(paid) == {"arm", "kl8"}
    assert any("3 of its seeds diverged or failed" in line for line in notes(text, "kl4"))
    assert set(verdicts(results)) == {"kl8"}
    assert common_quality(results) == pytest.approx(1.05 * 1.5 * (AMOUNT / 8) ** -POWER, rel=1e-12)


def test_without_a_baseline_nothing_is_compared(tmp_path: Path) -> None:
    results = [found("vp", 1.0, whole=0), found("kl4", 1.0)]
    text = report(results)
    (arms,) = tables(text)
    assert arms["vp"][-1] == "no run reached the end"
    write_csv(results, tmp_path / "verdicts.csv")
    assert rows_of(tmp_path) == {}
    assert math.isnan(common_quality(results[:1]))


def test_the_files(tmp_path: Path) -> None:
    results = [found("vp", 1.0), found("kl4", 1.5), found("kl8", 1.0, whole=0)]
    text = report(results)
    paths = write_files(results, text, tmp_path)
    assert {path.name for path in paths} == {"report.md", "verdicts.csv", "curves.png", "rates.png"}
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(path.stat().st_size > 0 for path in paths)
    assert paths[0].read_text(encoding="utf-8") == text + "\n"
    for path in paths[2:]:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            width, height = picture.size
            assert width > height > 300
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 3  # not an empty panel


# The command line


def run(*argv: str) -> int:
    try:
        return command.main(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)


def ray_runs() -> bool:
    """Whether this process is connected to Ray (other tests of the session may have connected it)."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong command line gets, with exit 2 and nothing of Ray."""
    before = ray_runs()
    assert run(*argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("klray.compare: ")
    assert said.err.count("\n") == 1 and said.err.endswith("\n")
    assert ray_runs() == before
    return said.err


ON_DIGITS = ("--config", "digits", "--arms", "vp", "kl4", "--tracking-uri", "off")
WRONG: list[tuple[tuple[str, ...], str]] = [
    ((), "the following arguments are required: --config, --arms"),
    (("--config", "digits"), "the following arguments are required: --arms"),
    (("--config", "digits", "--arms"), "--arms: expected at least one argument"),
    ((*ON_DIGITS, "--wide"), "unrecognized arguments: --wide"),
    ((*ON_DIGITS, "--seeds", "many"), "--seeds: invalid int value: 'many'"),
    ((*ON_DIGITS, "--seeds", "2"), "--seeds must be >= 3, got 2"),
    ((*ON_DIGITS, "--rates", "4"), "--rates must be >= 5, got 4"),
    ((*ON_DIGITS, "--workers", "0"), "--workers must be >= 1, got 0"),
    ((*ON_DIGITS, "--rate-factor", "1"), "--rate-factor must be from 1.1 to 100, got 1"),
    ((*ON_DIGITS, "--rate-factor", "0.5"), "--rate-factor must be from 1.1 to 100, got 0.5"),
    ((*ON_DIGITS, "--rate-factor", "nan"), "--rate-factor must be from 1.1 to 100, got nan"),
    ((*ON_DIGITS, "--quality", "0"), "--quality must be > 0, got 0"),
    ((*ON_DIGITS, "--quality", "nan"), "--quality must be > 0, got nan"),
    (("--config", "digit", "--arms", "vp", "kl8"), "unknown preset 'digit'; did you mean digits?"),
    (("--config", "none.yaml", "--arms", "vp", "kl8"), "cannot read the configuration none.yaml: No such file"),
    (("--config", "digits", "--arms", "vp"), "--arms needs at least 2, the baseline first, got 1; for example vp kl8"),
    (("--config", "digits", "--arms", "kl8", "kl8"), "arm kl8 is given twice; leave one out"),
    (("--config", "digits", "--arms", "vp", "kl"), "an arm must be one of vp,"),
    (("--config", "digits", "--arms", "vp", "kl8_wider"), "_wider must be one of _joint,"),
    (("--config", "digits", "--arms", "vp", "kl8k9"), "arm kl8k9: loss.partial_terms must be <= process.num_terms = 8"),
    (("--config", "digits", "--arms", "vp", "kl8,optimizer.lr=1"), "optimizer.lr is set by the comparison"),
    (("--config", "digits", "--arms", "vp", "kl8,los.a=1"), "unknown key los; did you mean loss?"),
    ((*ON_DIGITS, "--set", "budget.unit=steps"), "budget.unit must be network_evals, images or seconds"),
    ((*ON_DIGITS, "--set", "budget.unit=epochs"), "budget.unit must be 'images', 'network_evals', 'seconds' or"),
    ((*ON_DIGITS, "--set", "budget.amount=0"), "budget.amount must be greater than 0, got 0"),
    ((*ON_DIGITS, "--set", "optimizer.rl=1"), "unknown key optimizer.rl; did you mean optimizer.lr?"),
    ((*ON_DIGITS, "--set", "optimizer.lr"), "--set takes key=value, got 'optimizer.lr'"),
    ((*ON_DIGITS, "--set", "sampling.solver=dddim"), "arm vp: sampling.solver must be one of"),
    ((*ON_DIGITS, "--set", "mesh.basis=3"), "arm vp: mesh.basis must divide the number of workers, 1, got 3"),
    ((*ON_DIGITS, "--workers", "3"), "arm vp: optimizer.batch_size must be a multiple of mesh.data = 3, got 64"),
    (("--config", "digits", "--arms", "vp_batch3", "vp", "--workers", "3"), "arm vp: optimizer.batch_size must be"),
    (("--config", "mnist", "--arms", "vp", "kl4"), "set KLRAY_DATA"),
    ((*ON_DIGITS, "--name", "../up"), "--name must be letters, digits, '.', '_' or '-', got '../up'"),
    ((*ON_DIGITS, "--tracking-uri", "nonsense://here"), "the tracking URI 'nonsense://here' is none that MLflow"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(argv) for argv, _ in WRONG])
def test_a_wrong_command_line_is_one_line_and_exit_2(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in refusal(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refusal(capsys, *ON_DIGITS, "--comparisons", "file")
    assert "cannot write to" in said and "choose another folder" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "ema.decay=0.5"], "one stands for something else (base.ema.decay: 0.999 -> 0.5)"),
        (["--set", "budget.amount=7"], "base.budget.amount: 128000.0 -> 7.0"),
        (["--rates", "6"], "one stands for something else (rates: 5 -> 6); choose another --name"),
        (["--rate-factor", "3"], "rate_factor: 2.0 -> 3.0"),
        (["--arms", "vp", "kl8"], "-> absent); choose another --name"),
        (["--arms", "kl4", "vp"], 'one stands for something else (baseline: "vp" -> "kl4")'),
        (["--seeds", "4"], "one has 5 seeds; give at least as many, got 4"),
    ],
)
def test_one_name_means_one_comparison(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = load_config("digits", ["budget.unit=network_evals"])
    kept = {
        "base": base.defining() | {"budget": base.budget.model_dump()},
        "baseline": "vp",
        "arms": {name: dict(read_arm(name, base).changes) for name in ("vp", "kl4")},
        "rates": 5,
        "rate_factor": 2.0,
        "seeds": 5,
    }
    file = tmp_path / "comparisons" / "one" / "study.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(kept))
    assert message in refusal(capsys, *ON_DIGITS, "--name", "one", "--seeds", "5", *argv)
    assert json.loads(file.read_text()) == kept


def dry(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert run(*argv, "--dry-run") == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out.splitlines()


def test_a_dry_run_tells_what_each_arm_gets_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The budget is one of network evaluations, whatever the preset's unit."""
    before = ray_runs()
    argv = ("--config", "digits", "--arms", "vp", "vp_batch2", "vp_ensemble3", "kl8", "kl8k5", "kl4_wide")
    first, *lines = dry(capsys, *argv, "--name", "mine", "--set", "budget.amount=96000")
    assert first.split() == ["comparison", "mine"]
    assert lines == [
        "vp: 96,000 images, batch 64, 1 network evaluations a training image",
        "vp_batch2: 96,000 images, batch 128, 1 network evaluations a training image",
        "vp_ensemble3: 32,000 images, batch 64, 3 network evaluations a training image",
        "kl8: 12,000 images, batch 64, 8 network evaluations a training image",
        "kl8k5: 19,200 images, batch 64, 5 network evaluations a training image",
        "kl4_wide: 96,000 images, batch 64, 1 network evaluations a training image",
    ]
    assert ray_runs() == before
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_under_other_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    _, *lines = dry(capsys, *ON_DIGITS, "--set", "budget.unit=images")
    assert [line.split(" images")[0] for line in lines] == ["vp: 128,000", "kl4: 128,000"]
    _, *lines = dry(capsys, *ON_DIGITS, "--set", "budget.unit=seconds")
    assert not any("images" in line for line in lines)


def test_a_comparison_is_called_after_what_it_compares(capsys: pytest.CaptureFixture[str]) -> None:
    def name(*argv: str) -> str:
        return dry(capsys, *ON_DIGITS, *argv)[0].split()[1]

    own = name()
    assert re.fullmatch(r"digits-[0-9a-f]{8}", own)
    same = (["--seeds", "7"], ["--quality", "0.1"], ["--set", "tracking.every_steps=7"], ["--set", "ema.decay=0.999"])
    assert {name(*argv) for argv in same} == {own}
    others: list[list[str]] = [
        ["--rates", "6"],
        ["--rate-factor", "3"],
        ["--arms", "kl4", "vp"],
        ["--arms", "vp", "kl8"],
        ["--set", "budget.amount=7"],
        ["--set", "budget.unit=images"],
        ["--set", "optimizer.lr=0.001"],
        ["--set", "seed=1"],
    ]
    names = [name(*argv) for argv in others]
    assert len({own, *names}) == 1 + len(others)
