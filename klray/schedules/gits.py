"""GITS: the time grid as a shortest path along a teacher's trajectory (Chen et al., arXiv 2405.11326, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klray import registry
from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.timesteps import TIMESTEPS

METRICS = {"dev": 2, "l1": 1, "l2": 2}  # the order of the norm they are made of
TEACHERS = ("ddim", "ipndm_2", "ipndm_3", "ipndm_4")  # one evaluation a step, at the state itself


@dataclass(frozen=True)
class GitsCosts:
    """One teacher's path, from which grids of any number of steps are cut."""

    timesteps: Tensor  # [M + 1] float64, the fine grid
    cost: Tensor  # [M + 1, M + 1] float64, cost_matrix averaged over all samples


def gits_grid(
    denoiser: Denoiser,
    schedule: Schedule,
    noise: Tensor,
    num_steps: int,
    *,
    fine_steps: int = 60,
    metric: str = "dev",
    gamma: float = 1.15,
    teacher: str = "ipndm_4",
) -> Tensor:
    """A grid for this model: [num_steps + 1] float64, from t_max to t_min, both exact.

    Arguments and errors as ``gits_costs`` and ``shortest``. The path is what costs time: for several grids see
    ``gits_grid_from``.
    """
    _check(num_steps, gamma, fine_steps)
    costs = gits_costs(denoiser, schedule, noise, fine_steps=fine_steps, metric=metric, teacher=teacher)
    return gits_grid_from(costs, num_steps, gamma)


@torch.no_grad()
def gits_costs(
    denoiser: Denoiser,
    schedule: Schedule,
    noise: Tensor,
    *,
    fine_steps: int = 60,
    metric: str = "dev",
    teacher: str = "ipndm_4",
    batch_size: int = 32,
) -> GitsCosts:
    """The costs of all jumps along a teacher's path; ``fine_steps`` denoiser evaluations for each sample.

    Args:
        noise: [B, C, H, W], of unit variance; the paper takes B = 256.
        fine_steps: M, intervals of the grid ``edm`` over the schedule's own range.
        metric: as for ``cost_matrix``.
        teacher: the solver that makes the path.
        batch_size: samples handled at once, in the memory of some 5 M batch_size images in float64.

    Raises:
        ValueError: for an unknown metric or teacher, and an empty ``noise``.
    """
    _norm_of(metric)
    if teacher not in TEACHERS:
        raise ValueError(f"teacher must be one of {', '.join(TEACHERS)}, got {teacher!r}")
    if not len(noise):
        raise ValueError("noise must hold at least one sample")
    timesteps = TIMESTEPS["edm"](schedule, fine_steps)
    edm_sigma = schedule.sigma(timesteps) / schedule.alpha(timesteps)
    total = torch.zeros(fine_steps + 1, fine_steps + 1, dtype=torch.float64)
    for batch in noise.split(batch_size):
        y, eps = _path(denoiser, schedule, batch, timesteps, teacher)
        total += len(batch) / len(noise) * cost_matrix(y, eps, edm_sigma, metric).cpu()
    return GitsCosts(timesteps, total)


def gits_grid_from(costs: GitsCosts, num_steps: int, gamma: float = 1.15) -> Tensor:
    """The cheapest grid of ``num_steps`` jumps: [num_steps + 1] float64; both ends exact; raises as ``shortest``."""
    return costs.timesteps[shortest(costs.cost, num_steps, gamma)]


def cost_matrix(y: Tensor, eps: Tensor, edm_sigma: Tensor, metric: str = "dev") -> Tensor:
    """What a jump of one DDIM step from point i of a path to point j > i costs: [M + 1, M + 1] float64.

    z_ij = y_i + (edm_sigma_j - edm_sigma_i) eps_i,   y = x/alpha
    l1, l2:  E |z_ij - y_j|
    dev:     E |P (z_ij - y_0)| - |P (y_j - y_0)|,   P = projection onto what is orthogonal to the chord y_M - y_0

    ``dev`` compares how far both points are off the chord of the whole path, and may be negative. E is the mean over
    samples. Entries that are no jump forwards are infinite.

    Args:
        y: [M + 1, B, ...], the path.
        eps: [M, B, ...], the noise estimated at its points but the last.
        edm_sigma: [M + 1], sigma/alpha there.

    Raises:
        ValueError: for an unknown metric.
    """
    norm = _norm_of(metric)
    y, eps, edm_sigma = y.double().flatten(2), eps.double().flatten(2), edm_sigma.to(y.device)
    if metric == "dev":
        chord = torch.nn.functional.normalize(y[-1] - y[0], dim=-1)  # [B, d]

        def off_chord(v: Tensor) -> Tensor:
            return v - (v * chord).sum(-1, keepdim=True) * chord

        y, eps = off_chord(y - y[0]), off_chord(eps)
    cost = torch.full((len(y), len(y)), torch.inf, dtype=torch.float64, device=y.device)
    for i in range(len(y) - 1):
        end = y[i] + (edm_sigma[i + 1 :] - edm_sigma[i])[:, None, None] * eps[i]  # [M - i, B, d]
        if metric == "dev":
            size = torch.linalg.vector_norm(end, norm, -1) - torch.linalg.vector_norm(y[i + 1 :], norm, -1)
        else:
            size = torch.linalg.vector_norm(end - y[i + 1 :], norm, -1)
        cost[i, i + 1 :] = size.mean(1)
    return cost


def shortest(cost: Tensor, num_steps: int, gamma: float = 1.0) -> list[int]:
    """The indices 0 = s_0 < ... < s_N = M with the least sum_k gamma^k cost[s_k, s_{k+1}], in O(M^2 N).

    V(j, 1) = cost[j, M],   V(j, k) = min_{i > j} cost[j, i] + gamma V(i, k - 1)

    Args:
        cost: [M + 1, M + 1], of which what lies above the diagonal counts; negative costs are fine.
        num_steps: N, 1 <= N <= M.
        gamma: the weight of each jump against the one before it, > 0; the paper takes 1.15, and 1.2 for latents.

    Raises:
        ValueError: for an N or a gamma outside those ranges.
    """
    last = len(cost) - 1
    _check(num_steps, gamma, last)
    cost = torch.where(torch.ones_like(cost, dtype=torch.bool).triu(1), cost, torch.inf)
    value, choices = cost[:, last], []
    for _ in range(num_steps - 1):
        value, choice = (cost + gamma * value).min(dim=1)
        choices.append(choice)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, last]


def _norm_of(metric: str) -> int:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS[metric]


def _check(num_steps: int, gamma: float, fine_steps: int) -> None:
    if not 1 <= num_steps <= fine_steps:
        raise ValueError(f"num_steps must be 1 to {fine_steps}, the number of fine steps, got {num_steps}")
    if not gamma > 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")


def _path(
    denoiser: Denoiser, schedule: Schedule, noise: Tensor, timesteps: Tensor, teacher: str
) -> tuple[Tensor, Tensor]:
    """The teacher's y = x/alpha, [M + 1, B, C, H, W], and its noise estimates, [M, B, C, H, W]."""
    states, estimates = [], []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        x0_hat = denoiser(x, t)
        states.append(x / schedule.alpha(t))
        estimates.append((x - schedule.alpha(t) * x0_hat) / schedule.sigma(t))
        return x0_hat

    x = registry.entry("solver", teacher).sample(recorded, schedule, schedule.prior_std * noise, timesteps)
    return torch.stack([*states, x / schedule.alpha(timesteps[-1])]), torch.stack(estimates)
