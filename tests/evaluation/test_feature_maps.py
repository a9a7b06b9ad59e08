"""Perceptual distances: LPIPS as in torch-fidelity, on weights made up here; EfficientNet's maps as its features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import vgg16

from klray.evaluation.feature_maps import VGG_CHANNELS, efficientnet_maps, lpips_vgg
from klray.evaluation.features import FeaturesError, efficientnet
from klray.schedules.perceptual import FeatureDistance

CPU = torch.device("cpu")


def images(count: int, seed: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = vgg16()
    linear = {f"lin{i}.model.1.weight": torch.rand(1, count, 1, 1) for i, count in enumerate(VGG_CHANNELS)}
    torch.save(network.state_dict(), folder / "vgg.pth")
    torch.save(linear, folder / "lpips.pth")
    return folder / "vgg.pth", folder / "lpips.pth"


def test_lpips_is_that_of_torch_fidelity(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import sample_similarity_lpips as peer

    network = vgg16()
    network.load_state_dict(torch.load(files[0], weights_only=True))
    monkeypatch.setattr(peer, "torchvision_load_pretrained_vgg16", lambda: network)
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: torch.load(files[1], weights_only=True))
    theirs = peer.SampleSimilarityLPIPS("lpips")
    distance = FeatureDistance(*lpips_vgg(*files, CPU))
    a, b = images(3, 0), images(3, 1)
    expected = theirs((a + 1) * 127.5, (b + 1) * 127.5)
    assert expected.min() > 1e-3
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance(a[:, :1], b[:, :1]), distance(a[:, :1].expand_as(a), b[:, :1].expand_as(b)))


def test_lpips_has_gradients(files: tuple[Path, Path]) -> None:
    distance = FeatureDistance(*lpips_vgg(*files, CPU))
    a = images(2, 0).requires_grad_()
    (gradient,) = torch.autograd.grad(distance(a, images(2, 1)).sum(), a)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    with torch.no_grad():
        closer = distance(a - 1e-3 * gradient / gradient.abs().max(), images(2, 1))
    assert bool((closer < distance(a, images(2, 1))).all())


@pytest.mark.slow
def test_other_weights_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for vgg, linear, message in (
        (files[1], files[1], "must hold VGG16's and LPIPS' weights"),
        (files[0], files[0], "must hold VGG16's and LPIPS' weights"),
        (tmp_path / "list.pth", files[1], "must hold named tensors, got list"),
        (files[0], tmp_path / "text.pth", "cannot be loaded as plain tensors"),
        (files[0], tmp_path / "missing.pth", "cannot be loaded as plain tensors"),
    ):
        with pytest.raises(FeaturesError, match=message):
            lpips_vgg(vgg, linear, CPU)


def test_maps_of_efficientnet_end_in_its_features() -> None:
    network = efficientnet(CPU)
    a = images(2, 0, channels=1, size=8)
    maps = efficientnet_maps(CPU)(a)
    assert [each.shape[-1] for each in maps] == [64, 32, 16, 8, 4]
    pixels = torch.nn.functional.interpolate((a.expand(-1, 3, -1, -1) + 1) * 127.5, (128, 128), mode="bilinear")
    head = network._swish(network._bn1(network._conv_head(maps[-1])))
    torch.testing.assert_close(head, network.extract_features((pixels - 127) / 128), rtol=1e-4, atol=1e-4)


def test_the_distance_of_efficientnet_grows_with_the_difference() -> None:
    distance = FeatureDistance(efficientnet_maps(CPU))
    a, b = images(2, 0, channels=1, size=8), images(2, 1, channels=1, size=8)
    at = [distance(torch.lerp(a, b, share), a) for share in (0.0, 0.1, 0.5, 1.0)]
    assert at[0].abs().max() < 1e-5
    assert bool((at[0] < at[1]).all() and (at[1] < at[2]).all() and (at[2] < at[3]).all())
