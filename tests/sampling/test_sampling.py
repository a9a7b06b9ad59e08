"""From a network and a solver to images."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from klray.build import build_sampler
from klray.config import Sampling
from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.process import SingleTerm
from klray.core.schedule import Schedule, VPLinear
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.errors import RunError
from klray.networks.mlp import MLP
from klray.networks.terms import TermNetwork
from klray.sampling.draw import image_drawer, image_grid, sample_images

DATA_STD = 0.5


def gaussian_denoiser(schedule: Schedule):  # type: ignore[no-untyped-def]
    """E[x_0 | x_t] for data N(0, DATA_STD^2)."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2) * x

    return denoiser


def test_a_truncated_process_starts_from_its_own_prior() -> None:
    """From sigma_8(1) z Gaussian data come out with their std; from N(0, I) they do not."""
    process = KarhunenLoeve(VPLinear(), 8, "truncated")
    grid = TIMESTEPS["logsnr"](process, 500)
    for start, expected in ((process.prior_std, 0.5), (1.0, 0.5 / 0.740)):
        x = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        std = float(SOLVERS["ddim"].sample(gaussian_denoiser(process), process, x, grid))
        assert std == pytest.approx(expected, rel=0.01)


def test_clip_x0_bounds_the_estimate() -> None:
    network = TermNetwork(MLP(image_size=4, width=16), 1).eval()
    x = 5 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.9, dtype=torch.float64)
    process = SingleTerm(VPLinear())
    with torch.no_grad():
        free, clipped = (TermDenoiser(network, process, clip_x0=clip)(x, t) for clip in (False, True))
    assert float(free.abs().max()) > 1
    assert torch.equal(clipped, free.clamp(-1, 1))


def test_a_seed_fixes_its_image_whatever_the_batches() -> None:
    network = TermNetwork(MLP(image_size=8, width=32, num_classes=3), 3).eval()
    denoiser = TermDenoiser(network, KarhunenLoeve(VPLinear(), 3), term_chunk=2)
    sampler = build_sampler(Sampling(num_steps=5))

    def images(seeds: list[int]) -> Tensor:
        how = {"batch_size": 4, "device": torch.device("cpu")}
        return sample_images(denoiser, denoiser.process, sampler, seeds, (1, 8, 8), **how)

    together = images(list(range(10)))
    assert together.dtype == torch.uint8
    assert torch.equal(images([7, 3]), together[[7, 3]])
    assert torch.equal(images(list(range(4, 10))), together[4:])
    assert len({image.numpy().tobytes() for image in together}) == 10


def test_image_grid_puts_images_in_rows() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 32, 32) * 40
    picture = image_grid(images, columns=3)
    assert picture.shape == (2 * 33 + 1, 3 * 33 + 1, 3)
    for i in range(6):
        assert picture[i // 3 * 33 + 1 + 16, i % 3 * 33 + 1 + 16].tolist() == [40 * i] * 3


@pytest.mark.parametrize("convert_with", ["net", "grid"])
def test_whose_time_turns_noise_into_data(convert_with: str) -> None:
    """One step by hand: the network's noise is turned into x0_hat with its own time, or with the solver's."""
    schedule = VPLinear()
    t, shown = (torch.tensor(pair, dtype=torch.float64) for pair in ([0.6, 0.2], [0.65, 0.2]))
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 1, 2, 2)

    def eps_hat(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.5 + t)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return (x - schedule.sigma(t) * eps_hat(x, t)) / schedule.alpha(t)

    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    eps = eps_hat(x, shown[0])
    time = shown[0] if convert_with == "net" else t[0]
    x0_hat = (x - schedule.sigma(time) * eps) / schedule.alpha(time)
    expected = alpha[1] * x0_hat + sigma[1] * (x - alpha[0] * x0_hat) / sigma[0]
    ours = SOLVERS["ddim"].sample(denoiser, schedule, x, t, shown, convert_with=convert_with)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("marginal", ["matched", "truncated"])
def test_images_of_gaussian_data_have_the_datas_std(marginal: str) -> None:
    """The optimal network for N(0, 1/16): starting a truncated process from N(0, I) would give 0.34."""
    process, variance = KarhunenLoeve(VPLinear(), 8, marginal), 1 / 16

    def optimum(x: Tensor, t: Tensor, terms: Tensor) -> Tensor:
        alpha, sigma = process.alpha(t), process.sigma(t)
        eps_hat = (sigma / (alpha**2 * variance + sigma**2)).float().view(-1, 1, 1, 1) * x
        return eps_hat[:, None].expand(-1, len(terms), *x.shape[1:])

    denoiser = TermDenoiser(optimum, process, "share")
    sampler = build_sampler(Sampling(num_steps=200))
    how = {"batch_size": 128, "device": torch.device("cpu")}
    images = sample_images(denoiser, denoiser.process, sampler, range(256), (1, 8, 8), **how)
    assert float((images.double() / 127.5 - 1).std()) == pytest.approx(0.25, rel=0.02)


def test_chunks_of_terms_give_the_same_estimate_in_smaller_calls() -> None:
    network = TermNetwork(MLP(image_size=4, width=16, num_classes=5).double(), 5).eval()
    process = KarhunenLoeve(VPLinear(), 5)
    rows: list[int] = []
    network.backbone.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((3,), 0.4, dtype=torch.float64)
    whole = TermDenoiser(network, process, "coefficient").eps_hat(x, t)
    chunked = TermDenoiser(network, process, "coefficient", term_chunk=2).eps_hat(x, t)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    assert rows == [15, 6, 6, 3]


def test_the_network_always_sees_the_full_batch_size() -> None:
    """Another batch size may sum in another order: the last batch is padded, the padding thrown away."""
    network = TermNetwork(MLP(image_size=8, width=16), 1).eval()
    rows: list[int] = []
    network.backbone.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    denoiser = TermDenoiser(network, SingleTerm(VPLinear()))
    sampler = build_sampler(Sampling(num_steps=3))
    how = {"batch_size": 4, "device": torch.device("cpu")}
    images = sample_images(denoiser, denoiser.process, sampler, [5, 2**40, 1, 0, 9, 7], (1, 8, 8), **how)
    assert images.shape == (6, 1, 8, 8)
    assert rows == [4] * 6
    assert sample_images(denoiser, denoiser.process, sampler, [], (1, 8, 8), **how).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_named(wrong: float) -> None:
    """Of five seeds two in the first batch and one in the second, whose padding does not count; previews go on."""
    bad = iter([[0, 3], [0]])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        x0_hat = torch.zeros_like(x)
        x0_hat[next(bad)] = wrong
        return x0_hat

    sampler, device = build_sampler(Sampling(num_steps=1)), torch.device("cpu")
    draw = image_drawer(denoiser, VPLinear(), sampler, (1, 8, 8), batch_size=4, device=device)
    with pytest.raises(RunError, match="2 of the 4 images of seeds 5 to 8 are not finite, the first of seed 5"):
        draw(range(5, 10))
    with pytest.raises(RunError, match="1 of the 1 images of seeds 9 to 9 are not finite, the first of seed 9"):
        draw([9])
    bad = iter([[0, 3], [0]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = sample_images(denoiser, VPLinear(), sampler, range(5, 10), (1, 8, 8), batch_size=4, device=device)
    assert images.shape == (5, 1, 8, 8)
    assert [str(each.message).partition(",")[0] for each in caught] == [
        "2 of the 4 images of seeds 5 to 8 are not finite",
        "1 of the 1 images of seeds 9 to 9 are not finite",
    ]


def test_image_grid_enlarges_small_images_and_is_about_square() -> None:
    images = torch.randint(0, 256, (7, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = torch.from_numpy(image_grid(images))
    assert picture.shape == (3 * 33 + 1, 3 * 33 + 1, 3)
    for i in range(7):
        y, x = i // 3 * 33 + 1, i % 3 * 33 + 1
        tile = picture[y : y + 32, x : x + 32].permute(2, 0, 1)
        assert torch.equal(tile, images[i].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert not picture[0].any()
    assert not picture[:, 33].any()
