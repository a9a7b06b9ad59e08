"""A copy of the training state in the host's memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from klray.runs.train_state import TrainState, ema_network


class StateCopy:
    """The state at the step at which it was taken last. Its memory, as much as the state's, serves every copy.

    Attributes:
        network: the backbone with the averaged weights.
        tensors: everything else that a checkpoint keeps, contiguous, by the names it has there.
        counters: ``progress``, ``scaler`` and what the optimiser counts, as JSON holds them.
    """

    network: Any

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.counters: dict[str, Any] = {}
        self._averages: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, state: TrainState) -> None:
        """Copies the state. On a GPU nobody waits for it: the copies into page-locked memory stand in the stream behind
        the kernels of the steps that were taken and before those of the next."""
        backbone = ema_network(state).backbone
        averages = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        first = not self._averages
        _copy_into(self._averages, averages)
        _copy_into(self.tensors, _tensors(state))
        self.counters = {
            "progress": asdict(state.progress),
            "scaler": state.scaler.state_dict(),
            "optimizer": _counts(state.optimizer),
        }
        if first:
            self.network = copy.deepcopy(
                backbone, {id(averages[n]): _like(averages[n], t) for n, t in self._averages.items()}
            )
        if state.nonfinite.device.type == "cuda":
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> None:
        """Until the copies are there; to be called, from any thread, before they are read."""
        if self._copied is not None:
            self._copied.synchronize()


def _tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"network.{name}": tensor for name, tensor in state.network.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": each for key, each in moments.items() if isinstance(each, Tensor)}
    return tensors | {"n_averaged": torch.tensor(state.ema.updates), "nonfinite": state.nonfinite}


def _counts(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimiser keeps in plain numbers: of each parameter, and the steps that its groups count."""
    kept = optimizer.state_dict()
    plain = {
        index: {key: value for key, value in moments.items() if isinstance(value, int | float)}
        for index, moments in kept["state"].items()
    }
    groups = [{"step": group["step"]} if "step" in group else {} for group in kept["param_groups"]]
    return {"state": {index: values for index, values in plain.items() if values}, "groups": groups}


@torch.no_grad()
def _copy_into(kept: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name not in kept:
            locked = tensor.device.type == "cuda"
            kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=locked)
        kept[name].copy_(tensor, non_blocking=True)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """A parameter where it is one, with the memory of ``values``."""
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
