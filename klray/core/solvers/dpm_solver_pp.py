"""DPM-Solver++ 2M and 3M, multistep, in x0 (Lu et al., arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers import ddim
from klray.core.solvers.trajectory import Trajectory, multistep_orders, phi_function


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    order: int,
    third_order: bool = False,
    lower_order_final: str = "auto",
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; raises as ``Trajectory``.

    With m_0 the newest x0_hat, r0 = h_{i-1}/h, r1 = h_{i-2}/h, A = (m_0 - m_1)/r0, C = (m_1 - m_2)/r1:
    2M: x' = DDIM + alpha' h phi_1(-h)/2 A
    3M: x' = DDIM + alpha' h phi_2(-h) D1 + k alpha' h phi_3(-h) D2,
        D1 = A + r0/(r0 + r1) (A - C),   D2 = (A - C)/(r0 + r1)

    Args:
        third_order: the consistent k = 2 in 3M; every public code has k = 1, which is of order 2.
        lower_order_final: never, always, or auto, which lowers the order towards the end only below 15 steps; see
            ``multistep_orders``.
    """
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    history: list[Tensor] = []  # x0_hat, the newest first
    for i, step_order in enumerate(multistep_orders(path.num_steps, order, lower_order_final)):
        history = [path.x0_hat(x, i), *history[: order - 1]]
        h = path.lam[i + 1] - path.lam[i]
        alpha = path.alpha[i + 1]
        x = ddim.step(path, x, history[0], i)
        if step_order == 1:
            continue
        r0 = (path.lam[i] - path.lam[i - 1]) / h
        newer = (history[0] - history[1]) / r0
        if step_order == 2:
            x = x + alpha * h * phi_function(1, -h) / 2 * newer
            continue
        r1 = (path.lam[i - 1] - path.lam[i - 2]) / h
        change = newer - (history[1] - history[2]) / r1
        slope, curvature = newer + r0 / (r0 + r1) * change, change / (r0 + r1)
        x = x + alpha * h * (phi_function(2, -h) * slope + (2 if third_order else 1) * phi_function(3, -h) * curvature)
    return x
