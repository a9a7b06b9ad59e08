"""KL losses against the definitions, the identities that follow from them, and exact gradients in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from klray.core.karhunen_loeve import MARGINALS, KarhunenLoeve
from klray.core.losses import COUPLINGS, NoisyBatch, backward_kl_loss, kl_loss
from klray.core.parametrisations import PARAMETRISATIONS, Share, noise_shares, parametrisation
from klray.core.process import Ensemble, NoiseProcess, SingleTerm
from klray.core.schedule import VPLinear
from klray.networks.mlp import MLP
from klray.networks.terms import TermNetwork
from klray.parallel.random import dropout_keys

B, M, SHAPE = 5, 4, (1, 4, 4)


def make(seed: int = 0, terms: int = M) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(B, *SHAPE, dtype=torch.float64, generator=generator)
    z = torch.randn(B, terms, *SHAPE, dtype=torch.float64, generator=generator)
    t = 0.01 + 0.98 * torch.rand(B, dtype=torch.float64, generator=generator)
    return x0, z, t


def make_network(terms: int = M, dropout: float = 0.0) -> TermNetwork:
    torch.manual_seed(1)
    backbone = MLP(image_size=4, width=16, dropout=dropout, num_classes=terms if terms > 1 else None)
    return TermNetwork(backbone.double(), terms).double()


def gradient(loss: Tensor, network: TermNetwork) -> Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss.sum(), list(network.parameters()), retain_graph=True)]
    )


def edm_image(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Karras et al.'s denoiser D(x; s) with sigma_data 0.5, for x_t/alpha at s = sigma/alpha."""
    s = sigma / alpha
    return 0.25 / (s**2 + 0.25) * x / alpha + 0.5 * s / (s**2 + 0.25).sqrt() * output


# e_hat_m from the network's output, written out: x_t, output, alpha, sigma, c_m, the term's share.
READ: dict[str, Any] = {
    "term": lambda x, f, a, s, c, share: f,
    "coefficient": lambda x, f, a, s, c, share: c * f,
    "share": lambda x, f, a, s, c, share: share * f,
    "v": lambda x, f, a, s, c, share: share * (s * x + a * f) / (a**2 + s**2),
    "x0": lambda x, f, a, s, c, share: share * (x - a * f) / s,
    "edm": lambda x, f, a, s, c, share: share * (x - a * edm_image(x, f, a, s)) / s,
}


@pytest.mark.parametrize("marginal", MARGINALS)
@pytest.mark.parametrize("prediction", PARAMETRISATIONS)
@pytest.mark.parametrize("chosen", [None, [2], [3, 0]])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_loss_is_its_definition(coupling: str, chosen: list[int] | None, prediction: str, marginal: str) -> None:
    process, network = KarhunenLoeve(VPLinear(), M, marginal), make_network()
    x0, z, t = make()
    terms = None if chosen is None else torch.tensor(chosen)
    loss = kl_loss(network, process, x0, z, t, coupling=coupling, terms=terms, prediction=prediction)
    subset = chosen if chosen is not None else range(M)
    for b in range(B):
        sigma, std = process.sigma(t[b]), process.term_std(t[b])
        c = std / sigma
        x_t = process.alpha(t[b]) * x0[b] + sum(std[m] * z[b, m] for m in range(M))
        share = c**2 / sum(c**2)
        shown, time, weight = x_t, t[b], 1.0
        if prediction == "edm":
            s = sigma / process.alpha(t[b])
            shown, time, weight = x_t / process.alpha(t[b]) / (s**2 + 0.25).sqrt(), s.log() / 4, (s**2 + 0.25) / 0.25
        elif prediction in ("v", "x0"):
            a = process.alpha(t[b])
            weight = ((a**2 + sigma**2) / a) ** 2 if prediction == "v" else (sigma / a) ** 2
        residuals = []
        for m in subset:
            output = network(shown[None], time[None], torch.tensor([m]))[0, 0]
            e_hat = READ[prediction](x_t, output, process.alpha(t[b]), sigma, c[m], share[m])
            residuals.append(c[m] * z[b, m] - e_hat)
        if coupling == "joint":
            expected = weight * M / len(residuals) * sum(residuals).square().mean()
        else:
            expected = weight * M / len(residuals) * sum(r.square().mean() for r in residuals)
        torch.testing.assert_close(loss[b], expected, rtol=1e-10, atol=1e-12)


def test_joint_matched_loss_knows_z_only_through_its_sum() -> None:
    """Another z of equal sum has the same loss and gradient, those of the VP loss of the summed predictor."""
    process, network = KarhunenLoeve(VPLinear(), M), make_network()
    x0, z, t = make()
    c = noise_shares(process, t)[..., None, None, None]  # [B, M, 1, 1, 1]
    change = torch.randn_like(z)
    change -= c * (c * change).sum(1, keepdim=True)  # c has norm 1, so the weighted sum of the change is 0
    other = z + change
    loss, again = (kl_loss(network, process, x0, noise, t) for noise in (z, other))
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(again, network), gradient(loss, network), rtol=1e-9, atol=1e-11)

    eps = (c * z).sum(1)
    x_t = VPLinear().alpha(t).view(-1, 1, 1, 1) * x0 + VPLinear().sigma(t).view(-1, 1, 1, 1) * eps
    vp = (eps - network(x_t, t, torch.arange(M)).sum(1)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, vp, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(loss, network), gradient(vp, network), rtol=1e-9, atol=1e-11)


def test_joint_is_at_most_m_times_separable() -> None:
    process, network = KarhunenLoeve(VPLinear(), M), make_network()
    x0, z, t = make()
    joint, separable = (kl_loss(network, process, x0, z, t, coupling=c) for c in COUPLINGS)
    assert bool((joint <= M * separable + 1e-12).all())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_expectation_over_all_subsets(count: int) -> None:
    """Partial separable is unbiased; partial joint keeps (K - 1)/(M - 1) of the cross terms."""
    process, network = KarhunenLoeve(VPLinear(), M), make_network()
    x0, z, t = make()
    joint, separable = (kl_loss(network, process, x0, z, t, coupling=c) for c in COUPLINGS)
    subsets = [torch.tensor(s) for s in itertools.combinations(range(M), count)]
    mean = {
        c: sum(kl_loss(network, process, x0, z, t, coupling=c, terms=s) for s in subsets) / len(subsets)
        for c in COUPLINGS
    }
    torch.testing.assert_close(mean["separable"], separable, rtol=1e-10, atol=1e-12)
    cross = joint - separable
    torch.testing.assert_close(mean["joint"], separable + (count - 1) / (M - 1) * cross, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("marginal", ["matched", "truncated"])
def test_the_optimum_of_a_term_is_its_share_of_the_noise(marginal: str) -> None:
    """On Gaussian data everything is linear: E[e_m | x_t] = Cov(e_m, x_t) / Var(x_t) x_t, in closed form and fitted."""
    process = KarhunenLoeve(VPLinear(), M, marginal)
    data_std, t = 0.5, torch.tensor([0.4], dtype=torch.float64)
    c, sigma, alpha = noise_shares(process, t)[0], process.sigma(t), process.alpha(t)
    variance = alpha**2 * data_std**2 + sigma**2
    optimal_eps = sigma / variance  # E[eps | x_t] = this times x_t, for eps of unit variance
    optimal_terms = sigma * c**2 / variance  # Cov(e_m, x_t) = c_m^2 sigma
    share = Share(process).scale(t)[0]
    torch.testing.assert_close(share * optimal_eps, optimal_terms, rtol=1e-12, atol=0)

    n = 400_000
    generator = torch.Generator().manual_seed(0)
    x0 = data_std * torch.randn(n, dtype=torch.float64, generator=generator)
    e = c * torch.randn(n, M, dtype=torch.float64, generator=generator)
    x_t = alpha * x0 + sigma * e.sum(1)
    fitted = (e * x_t[:, None]).mean(0) / x_t.square().mean()
    error = (e - fitted * x_t[:, None]).std(0) / (x_t.std() * n**0.5)
    assert bool(((fitted - share * optimal_eps).abs() < 5 * error).all())


def test_baseline_and_ensemble_are_vp_losses() -> None:
    x0, z, t = make(terms=M)
    eps = z.mean(1) * M**0.5
    schedule = VPLinear()
    x_t = schedule.alpha(t).view(-1, 1, 1, 1) * x0 + schedule.sigma(t).view(-1, 1, 1, 1) * eps
    one, many = make_network(1), make_network(M)
    vp = (eps - one(x_t, t, torch.tensor([0]))[:, 0]).square().flatten(1).mean(1)
    torch.testing.assert_close(kl_loss(one, SingleTerm(schedule), x0, eps[:, None], t), vp, rtol=1e-10, atol=1e-12)
    summed = (eps - many(x_t, t, torch.arange(M)).sum(1)).square().flatten(1).mean(1)
    torch.testing.assert_close(kl_loss(many, Ensemble(schedule, M), x0, z, t), summed, rtol=1e-10, atol=1e-12)


def chunked(
    network: TermNetwork, process: NoiseProcess, inputs: Any, backward: Callable[[Tensor], None], **how: Any
) -> Tensor:
    """backward_kl_loss with keyed dropout; every call must see the masks of its images and terms."""
    x0, z, t = inputs

    def predict(x: Tensor, t: Tensor, chunk: Tensor, last: bool) -> Tensor:
        return network(x, t, chunk, dropout_keys(0, 7, torch.arange(len(x)), chunk))

    read = parametrisation(how.pop("prediction", "term"), process)
    batch = NoisyBatch.of(process, read, x0, z, t, how.pop("terms"))
    same = {"sum_over_basis": lambda partial: partial, "backward": backward}
    return backward_kl_loss(predict, batch, **{**same, **how})


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [3, 1, 2], [1]])
@pytest.mark.parametrize("prediction", PARAMETRISATIONS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_chunked_gradient_is_exact_with_dropout(coupling: str, prediction: str, chosen: list[int], size: int) -> None:
    process, network = KarhunenLoeve(VPLinear(), M), make_network(dropout=0.1).train()
    inputs, terms = make(), torch.tensor(chosen)

    def predict(x: Tensor, t: Tensor, terms: Tensor) -> Tensor:
        return network(x, t, terms, dropout_keys(0, 7, torch.arange(len(x)), terms))

    direct = kl_loss(predict, process, *inputs, coupling=coupling, terms=terms, prediction=prediction)
    expected = gradient(direct, network)
    total = torch.zeros_like(expected)

    def backward(loss: Tensor) -> None:
        total.add_(gradient(loss, network))

    how = {
        "coupling": coupling,
        "prediction": prediction,
        "terms": terms,
        "chunks": torch.arange(len(terms)).split(size),
    }
    loss = chunked(network, process, inputs, backward, **how)
    torch.testing.assert_close(loss, direct.detach(), rtol=1e-10, atol=1e-12)
    assert float((total - expected).norm() / expected.norm()) <= 1e-10


def test_dropout_would_break_the_chunks_without_keys() -> None:
    """The masks matter: other keys give another gradient, so the test above sees them."""
    process, network = KarhunenLoeve(VPLinear(), M), make_network(dropout=0.1).train()
    x0, z, t = make()
    gradients = []
    for step in (7, 8):
        keys = dropout_keys(0, step, torch.arange(B), torch.arange(M))
        loss = kl_loss(lambda x, t, terms, keys=keys: network(x, t, terms, keys), process, x0, z, t)
        gradients.append(gradient(loss, network))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) > 1e-3


def test_chunks_need_the_activations_of_one_chunk() -> None:
    process, network = KarhunenLoeve(VPLinear(), 8), make_network(8)
    inputs = make(terms=8)

    def saved_bytes(size: int, terms: Tensor) -> int:
        """The most bytes that autograd holds at once."""
        held = peak = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held, peak
            held += tensor.numel() * tensor.element_size()
            peak = max(peak, held)
            return tensor

        def backward(loss: Tensor) -> None:
            nonlocal held
            loss.sum().backward()
            held = 0

        how = {
            "coupling": "joint",
            "prediction": "term",
            "terms": terms,
            "chunks": torch.arange(len(terms)).split(size),
        }
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunked(network, process, inputs, backward, **how)
        return peak

    one_chunk = saved_bytes(1, torch.tensor([0]))
    everything = torch.arange(8)
    assert saved_bytes(1, everything) <= 1.3 * one_chunk
    assert saved_bytes(8, everything) > 3 * one_chunk


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"coupling": "both"}, "coupling must be one of joint, separable, got 'both'"),
        ({"prediction": "noise"}, "prediction must be one of term, coefficient, share, v, x0, edm, got 'noise'"),
    ],
)
def test_unknown_choices_are_refused(how: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kl_loss(make_network(), KarhunenLoeve(VPLinear(), M), *make(), **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "chunks"), [(1, 4), (3, 2), (4, 1)])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_calls_of_a_chunk_plan_and_which_is_the_last(coupling: str, size: int, chunks: int) -> None:
    """Joint runs every chunk but one twice. Only the call of the last backward may synchronise the ranks."""
    process, network = KarhunenLoeve(VPLinear(), M), make_network()
    x0, z, t = make()
    rows, flags = [], []
    network.backbone.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))

    def predict(x: Tensor, t: Tensor, chunk: Tensor, last: bool) -> Tensor:
        flags.append(last)
        return network(x, t, chunk)

    backward_kl_loss(
        predict,
        NoisyBatch.of(process, parametrisation("term", process), x0, z, t, torch.arange(M)),
        coupling=coupling,
        chunks=torch.arange(M).split(size),
        sum_over_basis=lambda partial: partial,
        backward=lambda loss: flags.append("backward"),  # type: ignore[arg-type]
    )
    assert len(rows) == (2 * chunks - 1 if coupling == "joint" else chunks)
    assert max(rows) == B * size
    assert flags.count("backward") == chunks
    assert flags[-2:] == [True, "backward"]
    assert flags.count(True) == 1


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [3, 1, 2], [1]])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_two_ranks_share_the_terms(coupling: str, chosen: list[int]) -> None:
    """Loss and gradient are the sums of the ranks' parts; with one term the second rank has nothing to do."""
    process, network, inputs = KarhunenLoeve(VPLinear(), M), make_network(dropout=0.1).train(), make()
    x0, z, t = inputs
    terms = torch.tensor(chosen)

    def predict(x: Tensor, t: Tensor, terms: Tensor) -> Tensor:
        return network(x, t, terms, dropout_keys(0, 7, torch.arange(len(x)), terms))

    direct = kl_loss(predict, process, x0, z, t, coupling=coupling, terms=terms)
    expected = gradient(direct, network)
    total, loss = torch.zeros_like(expected), torch.zeros_like(direct)
    halves = [terms[0::2], terms[1::2]]
    sums = [predict(process.perturb(x0, z, t), t, half).sum(1).detach() if len(half) else 0 * x0 for half in halves]
    for mine, other in ((0, 1), (1, 0)):
        how = {"coupling": coupling, "prediction": "term", "terms": terms}
        places = torch.arange(len(terms))[mine::2]
        how["chunks"] = places.split(1) if len(places) else ()
        how["sum_over_basis"] = lambda partial, other=other: partial + sums[other]
        loss += chunked(network, process, inputs, lambda part: total.add_(gradient(part, network)), **how)
    torch.testing.assert_close(loss, direct.detach(), rtol=1e-10, atol=1e-12)
    assert float((total - expected).norm() / expected.norm()) <= 1e-10
