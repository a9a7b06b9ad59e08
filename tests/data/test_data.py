"""Data sets in memory: exact pixels, fixed splits, and one-line errors that name the file and the way out."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from klray.data.encoders import Pixels
from klray.data.sources import DataError, ImageData, load_images
from klray.errors import UserError

RNG = np.random.default_rng(0)


def random_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth noise, so that lossy formats and resizing keep it recognisable."""
    coarse = RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_images(kind: str, tmp_path: Path, members: dict[str, bytes]) -> str:
    if kind == "folder":
        return str(write_folder(tmp_path / "images", members))
    return str(write_zip(tmp_path / "images.zip", members))


def rows(images: np.ndarray) -> list[bytes]:
    return [image.tobytes() for image in images]


def error_of(name: str, image_size: int = 8, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_images(name, image_size=image_size, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and isinstance(caught.value, UserError)
    return message


def by_hash(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


# digits


def test_digits_are_scaled_to_the_whole_range_and_split_without_loss() -> None:
    data = load_images("digits", image_size=8)
    assert data.train.shape == (1500, 1, 8, 8) and data.held_out.shape == (297, 1, 8, 8)
    assert data.train.dtype == data.held_out.dtype == np.uint8
    values = load_digits().images
    scaled = np.floor(values * 255 / 16 + 0.5).astype(np.uint8)  # none of the values falls on an odd half
    assert {0, 16, 32, 128, 239, 255} <= set(np.unique(scaled))
    assert sorted(rows(scaled)) == sorted(rows(data.train) + rows(data.held_out))


def test_the_digits_split_is_the_same_every_time_and_on_every_machine() -> None:
    data, again = load_images("digits", image_size=8), load_images("digits", image_size=8)
    np.testing.assert_array_equal(data.train, again.train)
    np.testing.assert_array_equal(data.held_out, again.held_out)
    order = [int(name) for name in by_hash([str(i) for i in range(1797)])]
    assert set(order[:1500]).isdisjoint(order[1500:])
    both = np.concatenate([data.train, data.held_out])[:, 0]
    np.testing.assert_array_equal(both, np.rint(load_digits().images[order] * (255 / 16)).astype(np.uint8))
    assert data.fingerprint == again.fingerprint == "6c4b89ddc6050db4"


def test_neither_limit_nor_held_out_changes_which_images_come_first() -> None:
    data = load_images("digits", image_size=8)
    small = load_images("digits", image_size=8, limit=40, held_out=10)
    np.testing.assert_array_equal(small.train, data.train[:40])
    np.testing.assert_array_equal(small.held_out, data.held_out[-10:])
    assert load_images("digits", image_size=8, limit=10**6).train.shape == (1500, 1, 8, 8)
    assert len(np.unique(load_digits().target[[int(n) for n in by_hash([str(i) for i in range(1797)])][:100]])) == 10


def test_digits_at_another_size() -> None:
    native = load_images("digits", image_size=8, limit=5)
    padded = load_images("digits", image_size=13, limit=5, resize="pad")
    np.testing.assert_array_equal(padded.train, np.pad(native.train, ((0, 0), (0, 0), (2, 3), (2, 3))))
    larger = load_images("digits", image_size=16, limit=5).train
    exact = torch.nn.functional.interpolate(torch.from_numpy(native.train).double(), size=16, mode="bilinear")
    assert np.abs(larger - exact.numpy()).max() <= 1


# MNIST


def test_mnist_padded_is_torchvisions_own_with_two_zeros_round(data_root: Callable[[str], Path]) -> None:
    root = data_root("MNIST/raw/train-images-idx3-ubyte")
    data = load_images("mnist", image_size=32, resize="pad", limit=2000, held_out=500)
    for ours, train, count in ((data.train, True, 2000), (data.held_out, False, 500)):
        theirs = datasets.MNIST(root, train=train).data[:count, None]
        np.testing.assert_array_equal(ours, torch.nn.functional.pad(theirs, (2, 2, 2, 2)).numpy())


def test_mnist_is_scaled_bilinearly_by_default(data_root: Callable[[str], Path]) -> None:
    root = data_root("MNIST/raw/train-images-idx3-ubyte")
    data = load_images("mnist", image_size=32, limit=500, held_out=500)
    small = load_images("mnist", image_size=14, limit=500, held_out=1)
    theirs = datasets.MNIST(root, train=True).data[:500, None].double()
    for ours, size in ((data.train, 32), (small.train, 14)):
        exact = torch.nn.functional.interpolate(theirs, size=size, mode="bilinear", antialias=True)
        assert np.abs(ours - exact.numpy()).max() <= 1


def test_mnist_is_untouched_at_its_own_size_and_its_test_set_whole(data_root: Callable[[str], Path]) -> None:
    root = data_root("MNIST/raw/train-images-idx3-ubyte")
    data = load_images("mnist", image_size=28, limit=100)
    np.testing.assert_array_equal(data.train, datasets.MNIST(root, train=True).data[:100, None].numpy())
    np.testing.assert_array_equal(data.held_out, datasets.MNIST(root, train=False).data[:, None].numpy())


def test_damaged_mnist_is_named(
    data_root: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(data_root("MNIST/raw/train-images-idx3-ubyte") / "MNIST" / "raw", raw)
    images = raw / "train-images-idx3-ubyte"
    images.chmod(0o644)
    os.truncate(images, 10_000)
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path))
    message = error_of("mnist")
    assert "incomplete or corrupt" in message and str(raw) in message


# CIFAR-10


def test_cifar10_zips_have_every_image_decoded_as_pillow_does(data_root: Callable[[str], Path]) -> None:
    root = data_root("cifar10-train.zip")
    data = load_images("cifar10", image_size=32, limit=300, held_out=100)
    assert data.train.shape == (300, 3, 32, 32) and data.held_out.shape == (100, 3, 32, 32)
    for ours, part, whole in ((data.train, "train", 50000), (data.held_out, "test", 10000)):
        with zipfile.ZipFile(root / f"cifar10-{part}.zip") as archive:
            names = by_hash([name for name in archive.namelist() if name.endswith(".jpg")])
            assert len(names) == whole
            for index in (0, 1, 99):
                pixels = np.asarray(Image.open(io.BytesIO(archive.read(names[index]))))
                np.testing.assert_array_equal(ours[index], pixels.transpose(2, 0, 1))
            assert len({name.split("/")[0] for name in names[: len(ours)]}) == 10, "a limited set has all classes"


def test_cifar10_test_set_is_whole(data_root: Callable[[str], Path]) -> None:
    data_root("cifar10-train.zip")
    data = load_images("cifar10", image_size=32, limit=1)
    assert data.held_out.shape == (10000, 3, 32, 32)
    assert data.held_out.any(axis=(1, 2, 3)).all(), "an image was left undecoded"


def fake_cifar_zip(path: Path, colour: int) -> None:
    write_zip(path, {f"cat/{i}.png": encoded(Image.new("RGB", (32, 32), (colour, i, 0))) for i in range(3)})


def test_cifar10_prefers_torchvisions_layout_to_the_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path))
    fake_cifar_zip(tmp_path / "cifar10-train.zip", 1)
    assert "cifar10-test.zip" in error_of("cifar10", 32)
    fake_cifar_zip(tmp_path / "cifar10-test.zip", 2)
    data = load_images("cifar10", image_size=32)
    assert (data.train[:, 0] == 1).all() and (data.held_out[:, 0] == 2).all()

    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "incomplete or corrupt" in error_of("cifar10", 32)
    pixels = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    class Batches:
        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert Path(root) == tmp_path and not download
            self.data = pixels[:4] if train else pixels[4:]

    monkeypatch.setattr(datasets, "CIFAR10", Batches)
    data = load_images("cifar10", image_size=32)
    np.testing.assert_array_equal(data.train, pixels[:4].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.held_out, pixels[4:].transpose(0, 3, 1, 2))


# CelebA


def test_celeba_is_cropped_then_scaled_and_holds_out_its_valid_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "celeba"
    names = [f"{i:06d}.jpg" for i in range(1, 6)]
    members = {f"img_align_celeba/{name}": encoded(random_image(178, 218), "JPEG") for name in names}
    members["list_eval_partition.txt"] = "\n".join(f"{n} {s}" for n, s in zip(names, "00112", strict=True)).encode()
    members["identity_CelebA.txt"] = "\n".join(f"{n} 1" for n in names).encode()
    for file in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt", "list_attr_celeba.txt"):
        members[file] = "\n".join(["5", "x y", *(f"{n} 1 1" for n in names)]).encode()
    write_folder(folder, members)
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)  # it wants the real files' checksums
    data = load_images("celeba", image_size=64)
    assert data.train.shape == data.held_out.shape == (2, 3, 64, 64)
    for ours, name in zip([*data.train, *data.held_out], names, strict=False):
        face = Image.open(folder / "img_align_celeba" / name).crop((19, 39, 159, 179))
        expected = np.asarray(face.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_array_equal(ours, expected)

    (folder / "img_align_celeba" / names[0]).unlink()
    assert names[0] in error_of("celeba", 64)


# folder and zip


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_own_images_of_any_size_are_cropped_scaled_and_split(kind: str, tmp_path: Path) -> None:
    sizes = [(8, 8), (20, 8), (8, 21), (31, 17), (5, 3), (1, 1), (40, 40)]
    kinds = ["png", "JPG", "jpeg", "webp", "bmp", "PNG", "png"]
    originals = {
        f"{'deep/er/' * (i % 2)}{i}.{suffix}": random_image(*size)
        for i, (size, suffix) in enumerate(zip(sizes, kinds, strict=True))
    }
    members = {
        name: encoded(image, Path(name).suffix[1:].upper().replace("JPG", "JPEG")) for name, image in originals.items()
    }
    clutter = {"dataset.json": b'{"labels": null}', "notes.txt": b"x", "__MACOSX/1.png": b"x", "deep/._1.png": b"x"}
    data = load_images(kind, image_size=8, path=write_images(kind, tmp_path, members | clutter), held_out=2)
    assert data.train.shape == (5, 3, 8, 8) and data.held_out.shape == (2, 3, 8, 8)
    assert data.train.flags.c_contiguous and data.held_out.flags.c_contiguous
    for ours, name in zip([*data.train, *data.held_out], by_hash(list(members)), strict=True):
        image = Image.open(io.BytesIO(members[name])).convert("RGB")
        side = min(image.size)
        square = np.asarray(image).transpose(2, 0, 1)
        top, left = (image.height - side) // 2, (image.width - side) // 2
        square = square[:, top : top + side, left : left + side]
        exact = torch.nn.functional.interpolate(
            torch.from_numpy(square.copy())[None].double(), size=8, mode="bilinear", antialias=True
        )
        assert np.abs(ours - exact[0].numpy()).max() <= 1, name


def test_a_folder_and_a_zip_of_it_are_the_same_data(tmp_path: Path) -> None:
    members = {f"{i % 3}/{i}.png": encoded(random_image(9, 9)) for i in range(40)}
    data: list[ImageData] = [
        load_images(kind, image_size=8, path=write_images(kind, tmp_path, members)) for kind in ("folder", "zip")
    ]
    assert len(data[0].train) == 38 and len(data[0].held_out) == 2
    assert data[0].fingerprint == data[1].fingerprint
    assert not set(rows(data[0].train)) & set(rows(data[0].held_out))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_are_grey_only_if_all_of_them_are(kind: str, tmp_path: Path) -> None:
    members = {
        "a.png": encoded(Image.new("L", (4, 4), 77)),
        "b.png": encoded(Image.new("1", (4, 4), 1)),
        "c.png": encoded(Image.new("L", (4, 4), 9)),
    }
    data = load_images(kind, image_size=4, path=write_images(kind, tmp_path, members))
    assert data.train.shape == (2, 1, 4, 4) and data.held_out.shape == (1, 1, 4, 4)
    assert sorted(np.unique(np.concatenate([data.train, data.held_out]))) == [9, 77, 255]

    members["d.png"] = encoded(Image.new("RGB", (4, 4), (1, 2, 3)))
    for limit in (None, 1):
        data = load_images(kind, image_size=4, path=write_images(kind, tmp_path, members), limit=limit)
        assert data.train.shape[1:] == data.held_out.shape[1:] == (3, 4, 4)


def test_the_share_held_out_is_five_percent_at_least_one(tmp_path: Path) -> None:
    for count, expected in ((2, 1), (10, 1), (60, 3)):
        members = {f"{i}.png": encoded(Image.new("L", (2, 2), i)) for i in range(count)}
        data = load_images("folder", image_size=2, path=str(write_folder(tmp_path / str(count), members)))
        assert (len(data.train), len(data.held_out)) == (count - expected, expected)
        assert sorted(np.concatenate([data.train, data.held_out])[:, 0, 0, 0]) == list(range(count))


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    upright = np.repeat(np.array([[10, 200]], dtype=np.uint8), 2, axis=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(upright).copy()).save(buffer, "PNG", exif=exif)
    path = write_folder(tmp_path / "images", {"a.png": buffer.getvalue(), "b.png": buffer.getvalue()})
    np.testing.assert_array_equal(load_images("folder", image_size=2, path=str(path)).train[0, 0], upright)


def test_a_zip_member_with_a_hostile_name_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    members = {name: encoded(Image.new("L", (2, 2), 5)) for name in ("../out.png", "/abs/out.png", "in.png")}
    (tmp_path / "deep").mkdir()
    path = write_zip(tmp_path / "deep" / "x.zip", members)
    assert len(load_images("zip", image_size=2, path=str(path)).train) == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_a_pixel_more_or_less_changes_the_fingerprint(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (2, 4, 4), dtype=np.uint8)
    prints = []
    for change in (0, 1, 0):
        pixels[1, 3, 3] += change
        members = {f"{i}.png": encoded(Image.fromarray(image)) for i, image in enumerate(pixels)}
        prints.append(load_images("folder", image_size=4, path=str(write_folder(tmp_path, members))).fingerprint)
    assert prints[0] != prints[1] == prints[2]
    assert len(prints[0]) == 16 and int(prints[0], 16) >= 0


# errors


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "bmp"])
@pytest.mark.parametrize("damage", ["not an image", "cut short", "empty"])
def test_a_corrupt_image_is_named_and_never_skipped(kind: str, suffix: str, damage: str, tmp_path: Path) -> None:
    whole = encoded(random_image(40, 40), suffix)
    bad = {"not an image": b"hello", "cut short": whole[: len(whole) // 2], "empty": b""}[damage]
    members = {f"{i}.{suffix}": whole for i in range(5)} | {f"sub/bad.{suffix}": bad}
    path = write_images(kind, tmp_path, members)
    message = error_of(kind, path=path)
    assert f"{path}/sub/bad.{suffix}" in message and "cannot be read as an image" in message


def test_a_zip_damaged_inside_is_noticed(tmp_path: Path) -> None:
    image = encoded(random_image(40, 40))
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.png", image)
        archive.writestr("b.png", image)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"IDAT") + 20] ^= 255
    path.write_bytes(content)
    assert "b.png" in error_of("zip", path=str(path))
    path.write_bytes(content[:-30])
    assert f"{path}: cannot be read as a ZIP" in error_of("zip", path=str(path))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_missing_empty_and_unsuitable_places_are_named(kind: str, tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in error_of(kind, path=str(tmp_path / "nowhere"))
    empty = write_images(kind, tmp_path, {"readme.txt": b"no images here"})
    assert f"no images in {empty}" in error_of(kind, path=empty)
    single = write_images(kind, tmp_path, {"a.png": encoded(Image.new("L", (2, 2)))})
    assert "holding out 1 of 1 images leaves none to train on" in error_of(kind, path=single)
    tiff = write_images(kind, tmp_path, {"a.png": encoded(Image.new("L", (2, 2))), "b.tiff": b"x"})
    assert f"{tiff}/b.tiff" in error_of(kind, path=tiff)


def test_a_folder_is_no_zip_and_a_zip_no_folder(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"a.png": encoded(Image.new("L", (2, 2)))})
    assert "data.name=zip" in error_of("folder", path=str(path))
    assert str(tmp_path) in error_of("zip", path=str(tmp_path))


def test_a_link_to_nothing_is_not_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{i}.png": encoded(Image.new("L", (2, 2))) for i in range(3)})
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert "link.png" in error_of("folder", path=str(tmp_path))


def test_sixteen_bit_images_are_refused_instead_of_clipped(tmp_path: Path) -> None:
    deep = encoded(Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)))
    write_folder(tmp_path, {"a.png": deep, "b.png": deep})
    message = error_of("folder", path=str(tmp_path))
    assert ".png" in message and "more than 8 bits" in message


def test_padding_never_shrinks(tmp_path: Path) -> None:
    write_folder(tmp_path, {f"{i}.png": encoded(Image.new("L", (3, 9), 7)) for i in range(2)})
    message = error_of("folder", path=str(tmp_path), resize="pad")
    assert "3 x 9 is larger than data.image_size=8" in message and "data.resize=bilinear" in message
    padded = load_images("folder", image_size=10, path=str(tmp_path), resize="pad").train[0, 0]
    assert (padded[0:9, 3:6] == 7).all() and padded.sum() == 27 * 7


@pytest.mark.parametrize(
    ("name", "looked_at"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py"), ("celeba", "celeba")]
)
def test_missing_data_say_where_and_what_to_do(
    name: str, looked_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path))
    message = error_of(name)
    assert str(tmp_path / looked_at) in message and "is missing" in message
    assert "KLRAY_DATA" in message and "data.download=true" in message
    assert list(tmp_path.iterdir()) == [], "nothing is created"
    monkeypatch.delenv("KLRAY_DATA")
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "data" / looked_at) in error_of(name)


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setenv("KLRAY_DATA", str(tmp_path))
    monkeypatch.setattr(datasets.MNIST, "download", fail)
    message = error_of("mnist", download=True)
    assert "no network" in message and "KLRAY_DATA" in message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"name": "mnits"}, ["'mnits'", "digits, mnist, cifar10, celeba, folder, zip", "nearest is mnist"]),
        ({"name": "digits", "resize": "padd"}, ["'padd'", "bilinear, pad", "nearest is pad"]),
        ({"name": "digits", "image_size": 0}, ["data.image_size must be at least 1, got 0"]),
        ({"name": "digits", "limit": 0}, ["data.limit must be at least 1, got 0"]),
        ({"name": "digits", "held_out": -3}, ["data.held_out must be at least 1, got -3"]),
        ({"name": "digits", "held_out": 1797}, ["1797 of 1797", "lower data.held_out"]),
        ({"name": "digits", "path": "x"}, ["data.name=digits takes no data.path (got x)"]),
        ({"name": "folder"}, ["data.name=folder needs data.path"]),
        ({"name": "digits", "image_size": 4, "resize": "pad"}, ["8 x 8 is larger than data.image_size=4"]),
    ],
)
def test_a_bad_argument_is_answered_with_rule_value_and_way_out(options: dict, parts: list[str]) -> None:
    message = error_of(**options)
    assert all(part in message for part in parts), message


# tensors


def test_unit_range_round_trip_is_exact_for_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    unit = Pixels().encode(values)
    assert unit.dtype == torch.float32
    assert unit[0] == -1 and unit[255] == 1 and (unit.diff() > 0).all()
    torch.testing.assert_close(unit.double(), values.double() / 127.5 - 1, atol=1e-7, rtol=0)
    assert torch.equal(Pixels().decode(unit), values)


def test_to_uint8_rounds_and_clamps() -> None:
    level = 1 / 127.5
    x = torch.tensor([-9.0, -1.0, -1 + 0.4 * level, -1 + 0.6 * level, 1 - 0.6 * level, 1.0, 1.4, 9.0])
    assert Pixels().decode(x).tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert Pixels().decode(x.double()).dtype == torch.uint8


def test_only_the_images_asked_for_are_mirrored() -> None:
    images = torch.arange(3 * 2 * 2 * 3, dtype=torch.uint8).reshape(3, 2, 2, 3)
    mirrored = Pixels().flip(images, torch.tensor([True, False, True]))
    assert mirrored[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert torch.equal(mirrored[1], images[1])
    assert torch.equal(mirrored[2], images[2].flip(-1))
    assert torch.equal(Pixels().flip(mirrored, torch.tensor([True, False, True])), images)
