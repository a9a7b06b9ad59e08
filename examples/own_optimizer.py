"""An optimiser of your own: stochastic gradient descent.

From the folder of this file: klray train --config digits --set optimizer.kind=own_optimizer:sgd --set optimizer.lr=0.01
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter


def sgd(parameters: Mapping[str, Parameter], lr: float, *, momentum: float = 0.9) -> torch.optim.Optimizer:
    """What its place gives: parameters, by name, and lr. Its setting: momentum."""
    return torch.optim.SGD(parameters.values(), lr=lr, momentum=momentum)
