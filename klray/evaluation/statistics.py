"""Mean and covariance of features, gathered in parts and merged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from klray.errors import UserError


@dataclass(frozen=True)
class Moments:
    """``count`` feature vectors: their ``mean`` float64 [d], and ``scatter`` float64 [d, d], the sum of the outer
    products of their deviations from it.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: Tensor | np.ndarray) -> Moments:
        """features: [n, d], n 0 allowed; summed in float64."""
        rows = np.asarray(features, dtype=np.float64)
        mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
        deviations = rows - mean
        return cls(len(rows), mean, deviations.T @ deviations)

    @classmethod
    def from_covariance(cls, mean: np.ndarray, covariance: np.ndarray) -> Moments:
        """Moments of an unknown number of vectors, to compare with, not to merge: mean [d], covariance [d, d].

        Their ``count`` is 2, the number for which the scatter is the covariance, exactly.
        """
        return cls(2, np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan, Golub & LeVeque 1983); equal to rounding in any order.

        Raises:
            ValueError: for features of another dimension.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and {len(other.mean)} dimensions do not merge")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """float64 [d, d], unbiased (divided by count - 1).

        Raises:
            UserError: for fewer than 2 vectors.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)
