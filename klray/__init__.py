"""klray: Karhunen-Loève diffusion experiments on Ray. ``train``, ``load``, ``evaluate``, ``learn_schedule``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klray.api import Model, Run, evaluate, learn_schedule, load, train

__version__ = "0.2.0"
__all__ = ["Model", "Run", "__version__", "evaluate", "learn_schedule", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in ("train", "evaluate"):  # the commands' modules, which can be called
        return importlib.import_module(f"klray.{name}")
    if name in __all__:
        return getattr(importlib.import_module("klray.api"), name)
    raise AttributeError(f"module 'klray' has no attribute {name!r}")
