"""Images of your own making: grey rings on black.

From the folder of this file: klray train --config digits --set data.name=own_data:rings --set data.count=400
"""

from __future__ import annotations

import numpy as np


def rings(*, count: int = 1000, seed: int = 0) -> np.ndarray:
    """uint8 [count, 32, 32] (or [..., 3]); klray scales them to data.image_size and holds 5 % out. A pair of arrays
    would be the images to train on and those held out."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    radius = np.hypot(x - generator.uniform(-0.3, 0.3, (count, 1, 1)), y - generator.uniform(-0.3, 0.3, (count, 1, 1)))
    ring = np.exp(-(((radius - generator.uniform(0.3, 0.7, (count, 1, 1))) / 0.12) ** 2))
    return np.round(255 * ring).astype(np.uint8)
