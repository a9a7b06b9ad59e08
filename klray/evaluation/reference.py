"""What generated images are compared with: features of real images, computed once and cached, or an .npz of moments."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klray.evaluation.features import FeaturesError
from klray.evaluation.statistics import Moments

ROUNDING = 1e-5  # of a covariance that was summed in float32, relative to its largest entry
_FORMAT = 1  # raised whenever the same images would get other features


@dataclass(frozen=True)
class Reference:
    """``name``: which images (train, held_out, train_10k, ...). ``count``: how many; 0 where unknown.

    ``fingerprint``: of the data set they come from, or of the .npz file. ``moments``: of their features, which are
    ``features`` float32 [count, d], or None where only the moments are known.
    """

    name: str
    count: int
    fingerprint: str
    moments: Moments
    features: Tensor | None


def load_reference(
    images: np.ndarray,
    fingerprint: str,
    name: str,
    extractor_name: str,
    extract: Callable[[np.ndarray], Tensor],
    cache: Path | None = None,
) -> Reference:
    """Features of real images, from the cache or computed and stored there.

    An entry is found by all arguments but ``extract``. One that is torn or altered is computed anew, and any number of
    processes may read and write at once. A cache that cannot be written to is a warning.

    Args:
        images: uint8 [N, C, H, W].
        fingerprint: of the data set; with ``name`` it has to settle which images these are.
        name: which of its images.
        extractor_name: the extractor's ``name``.
        extract: features float32 [N, d] of images such as these.
        cache: a folder; by default KLRAY_CACHE, or ~/.cache/klray.
    """
    folder = (cache or Path(os.environ.get("KLRAY_CACHE") or "~/.cache/klray")).expanduser()
    key = {
        "format": _FORMAT,
        "data": fingerprint,
        "name": name,
        "shape": list(images.shape),
        "features": extractor_name,
    }
    stem = re.sub(
        r"[^A-Za-z0-9_x-]", "_", "-".join([fingerprint, name, "x".join(map(str, images.shape)), extractor_name])
    )
    tensors = _read_entry(folder / f"{stem}.json", key)
    if tensors is None:
        features = extract(images).float().cpu().contiguous()
        moments = Moments.of(features)
        mean, scatter = torch.from_numpy(moments.mean), torch.from_numpy(moments.scatter)
        tensors = {"features": features, "mean": mean, "scatter": scatter}
        try:
            _write_entry(folder / f"{stem}.json", key, tensors)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"reference features are not kept: {error}; set KLRAY_CACHE to a folder", stacklevel=2)
    count = len(tensors["features"])
    moments = Moments(count, tensors["mean"].numpy(), tensors["scatter"].numpy())
    return Reference(name, count, fingerprint, moments, tensors["features"])


def read_npz(path: Path) -> Reference:
    """Reads EDM's reference statistics: ``mu`` [d] and ``sigma`` [d, d] of Inception features. They serve FID only.

    Raises:
        FeaturesError: where the file is missing, is no .npz of plain arrays, lacks one, they have other shapes, or
            ``sigma`` is no covariance.
    """
    try:
        data = path.read_bytes()
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[key], dtype=np.float64) for key in ("mu", "sigma"))
    except FileNotFoundError as error:
        raise FeaturesError(f"no reference statistics at {path}; correct the path") from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise FeaturesError(f"{path} is no .npz with the arrays mu and sigma of numbers; replace it") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise FeaturesError(
            f"{path}: mu must be [d] and sigma [d, d], got {list(mean.shape)}, {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise FeaturesError(f"{path}: mu and sigma must be finite; replace it")
    largest = max(float(np.abs(covariance).max()), np.finfo(np.float64).tiny)
    if float(np.abs(covariance - covariance.T).max()) > ROUNDING * largest:
        raise FeaturesError(f"{path}: sigma must be symmetric, as a covariance is; replace it")
    try:  # of fewer images than dimensions it is singular: rounding may make it indefinite by a little
        np.linalg.cholesky(covariance + ROUNDING * largest * np.eye(len(mean)))
    except np.linalg.LinAlgError:
        raise FeaturesError(f"{path}: sigma must have no negative eigenvalue, as a covariance; replace it") from None
    fingerprint = hashlib.sha256(data).hexdigest()[:16]
    return Reference(path.stem, 0, fingerprint, Moments.from_covariance(mean, covariance), None)


def _read_entry(entry: Path, key: dict[str, Any]) -> dict[str, Tensor] | None:
    try:
        record = json.loads(entry.read_text())
        file = entry.with_name(f"{entry.stem}-{record['sha256'][:16]}.safetensors")
        if record["key"] != key or _sha256(file) != record["sha256"]:
            return None
        return load_file(file)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _write_entry(entry: Path, key: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Data named by their hash, so that the record of one process never points to the data of another."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    aside = entry.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, aside)
        sha256 = _sha256(aside)
        aside.replace(entry.with_name(f"{entry.stem}-{sha256[:16]}.safetensors"))
        aside.write_text(json.dumps({"key": key, "sha256": sha256}))
        aside.replace(entry)
    finally:
        aside.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
