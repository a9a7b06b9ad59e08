"""A tiny study's space file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY = {
    "network.kind": "mlp",
    "network.width": 16,
    "optimizer.batch_size": 16,
    "optimizer.warmup_images": 0,
    "validation.images": 16,
    "validation.every_images": 64,
    "sampling.images": 4,
    "sampling.num_steps": 2,
    "data.limit": 200,
}


def space_file(folder: Path, **changes: Any) -> Path:
    tree = {
        "question": "Does it work?",
        "config": "digits",
        "set": TINY,
        "parameters": {"process.num_terms": {"type": "categorical", "choices": [0, 2]}},
        "budget": {"unit": "network_evals", "amount": 640},
        "sampler": "grid",
        "trials": 2,
        **changes,
    }
    file = folder / "space.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file
