"""FID, KID, Inception score, precision and recall, by torch-fidelity's formulas and with its defaults."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from klray.errors import UserError
from klray.evaluation.features import DIMENSIONS
from klray.evaluation.reference import Reference
from klray.evaluation.statistics import Moments

METRICS = ("fid", "kid", "is", "pr")
NEIGHBORHOOD = 3


def metric_name(metric: str, count: int, features: str, reference: str) -> str:
    """eval/fid_50k.inception.train: what was measured, on how many images, by which features, against what.

    ``metric`` is a key of :func:`compute`; a character that MLflow refuses becomes an underscore.
    """
    number = f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", f"eval/{metric}_{number}.{features}.{reference}")


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses a name that is none of METRICS.

    Raises:
        UserError: one line with the nearest name.
    """
    for metric in metrics:
        if metric not in METRICS:
            nearest = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.0)[0]
            raise UserError(f"metric {metric!r} is not one of {', '.join(METRICS)}; the nearest is {nearest}")


def check_reference(metrics: Sequence[str], reference: Reference, features: str = "") -> None:
    """Refuses metrics that the reference cannot serve.

    Raises:
        UserError: for one that needs images, where only their moments are known, and for moments of other features
            than the named ones, where that can be told before an image is drawn.
    """
    found = len(reference.moments.mean)
    if found != DIMENSIONS.get(features, found):
        of = next((name for name, size in DIMENSIONS.items() if size == found), None)
        way_out = f"use --features {of}" if of else "give another file"
        raise UserError(
            f"--reference {reference.name} holds features of {found} dimensions, those of {features} have "
            f"{DIMENSIONS[features]}; {way_out}"
        )
    for metric in metrics:
        if metric in ("kid", "pr") and reference.features is None:
            raise UserError(f"{metric} needs images to compare with; {reference.name} holds moments only: use fid")


def compute(
    metrics: Sequence[str], sample: Mapping[str, Tensor], reference: Reference, moments: Moments | None = None
) -> dict[str, float]:
    """Scores a sample against a reference.

    Args:
        metrics: some of METRICS.
        sample: what an extractor gives for all generated images: "features" [n, d], and "logits" [n, k] for ``is``.
        reference: real images, by the same features.
        moments: of the features, where they were merged from parts; ``fid`` then needs no features.

    Returns:
        fid; kid; is; precision, recall: of the metrics asked for. How far they vary, only other images can tell: see
        ``Yardstick.repeats``.

    Raises:
        UserError: for an unknown metric, features of other dimensions than the reference's, one that the sample or
            the reference cannot give, too few images.
    """
    check_metrics(metrics)
    moments = Moments.of(sample["features"]) if moments is None else moments
    check_reference(metrics, reference)
    if "is" in metrics and "logits" not in sample:
        raise UserError("is needs features of a network that classifies; use --features inception")
    if len(moments.mean) != len(reference.moments.mean):
        found, wanted = len(moments.mean), len(reference.moments.mean)
        rule = f"the images' features have {found} dimensions, those of {reference.name} {wanted}"
        raise UserError(f"{rule}; use the same --features for both")

    scores: dict[str, float] = {}
    if "fid" in metrics:
        scores["fid"] = fid(moments, reference.moments)
    if reference.features is not None and "kid" in metrics:
        scores["kid"] = kid(sample["features"], reference.features)
    if "is" in metrics:
        scores["is"] = inception_score(sample["logits"])
    if reference.features is not None and "pr" in metrics:
        scores["precision"], scores["recall"] = precision_recall(sample["features"], reference.features)
    return scores


def fid(a: Moments, b: Moments) -> float:
    """Frechet distance (Heusel et al. 2017) between Gaussians of these moments.

    Raises:
        UserError: for fewer than 2 images.
    """
    first, second = ({"mu": moments.mean, "sigma": moments.covariance} for moments in (a, b))
    from torch_fidelity.metric_fid import fid_statistics_to_metric  # type: ignore[import-untyped]

    return float(fid_statistics_to_metric(first, second, verbose=False)["frechet_inception_distance"])


def kid(
    features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int | None = None, seed: int = 2020
) -> float:
    """Kernel distance (Binkowski et al. 2018), unbiased: the mean over random subsets.

    Their deviation says nothing of how far KID would vary with other images: subsets of 1000 of 1000 are all the same
    images, and those of more overlap.

    Args:
        features, reference: float32 [n, d] and [m, d]; the kernel is computed in their dtype, as torch-fidelity does.
        subset_size: min(1000, n, m) by default.

    Raises:
        UserError: for a subset of fewer than 2 images or more than there are.
    """
    fewest = min(len(features), len(reference))
    size = min(1000, fewest) if subset_size is None else subset_size
    if not 2 <= size <= fewest:
        raise UserError(f"kid compares subsets of 2 images at least and {fewest} (all there are) at most, got {size}")
    options = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    from torch_fidelity.metric_kid import kid_features_to_metric  # type: ignore[import-untyped]

    return float(kid_features_to_metric(features, reference, **options)["kernel_inception_distance_mean"])


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """Inception score (Salimans et al. 2016) of logits [n, k]: the mean over splits.

    Raises:
        UserError: for fewer images than splits.
    """
    if len(logits) < splits:
        raise UserError(f"is splits the images into {splits} parts, got {len(logits)} images; draw more")
    from torch_fidelity.metric_isc import isc_features_to_metric  # type: ignore[import-untyped]

    return float(isc_features_to_metric(logits, splits)["inception_score_mean"])


def precision_recall(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features [n, d] against [m, d], in 0..1.

    Distances are held for 2000 images at a time: 0.4 GB against 50,000.

    Raises:
        UserError: for too few images to have NEIGHBORHOOD neighbours.
    """
    fewest = min(len(features), len(reference))
    if fewest <= NEIGHBORHOOD:
        raise UserError(f"pr needs more than {NEIGHBORHOOD} images on both sides, got {fewest}")
    options = {"prc_neighborhood": NEIGHBORHOOD, "prc_batch_size": 2000, "save_cpu_ram": True, "verbose": False}
    from torch_fidelity.metric_prc import prc_features_to_metric  # type: ignore[import-untyped]

    found = prc_features_to_metric(features, reference, **options)
    return found["precision"], found["recall"]
