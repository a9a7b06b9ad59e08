"""Where a result comes from: the code, the machine, the versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from klray.config import Config


def provenance_of(config: Config, name: str, run_dir: Path) -> dict[str, Any]:
    """Tags that say where a result comes from."""
    return {
        "klray.kind": "train",
        "klray.name": name,
        "klray.config": config.default_name(),
        "klray.run_dir": str(run_dir),
        "klray.git": git_commit(),
        "klray.hardware": hardware(),
        **{f"version.{package}": version(package) for package in ("klray", "torch", "diffusers")},
    }


def hardware() -> str:
    """The accelerator, or the processor and its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def git_commit() -> str:
    """The commit of the code, with + where it is changed; "unknown" outside of a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.check_output(status, cwd=here, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.strip() else "")
