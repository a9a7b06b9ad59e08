"""Images: every data set becomes two uint8 arrays in memory, one to train on and one held out."""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from klray.config import Data
from klray.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
REFUSED_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".ppm", ".pgm")


class DataError(UserError):
    """Data that are missing, unreadable or asked for wrongly; one line with the rule, the value and the way out."""


@dataclass(frozen=True)
class ImageData:
    """``train`` uint8 [N, C, H, W] and ``held_out`` uint8 [n, C, H, W], never trained on; both C-contiguous, 0..255.

    ``fingerprint``: the first 16 hex digits of a sha256 over both arrays' shapes and bytes.
    """

    train: np.ndarray
    held_out: np.ndarray
    fingerprint: str


@dataclass(frozen=True)
class _Source:
    where: str
    names: list[str]
    read: Callable[[str], Image.Image]
    channels: int


def load_images(
    name: str,
    *,
    image_size: int,
    path: str | None = None,
    resize: str = "bilinear",
    download: bool = False,
    limit: int | None = None,
    held_out: int | None = None,
) -> ImageData:
    """Reads a data set into memory: for the same arguments the same images in the same order, whatever the seed.

    Args:
        name: ``digits`` (scikit-learn's; 297 held out), ``mnist``, ``cifar10`` (the test set held out), ``celeba``
            (central 140 x 140; the valid split held out), or ``folder`` or ``zip``, own images at ``path`` (5 %, at
            least 1 and at most 5000, held out). KLRAY_DATA (default ./data) is where mnist, cifar10 and celeba lie.
        image_size: height and width of the result in pixels.
        path: the folder, read recursively without following links to folders, or the ZIP, read in place; looked for
            in the working folder, then under KLRAY_DATA. Alpha is dropped. Grey if every image is, else RGB.
        resize: ``bilinear`` scales the central square, antialiased; ``pad`` puts zeros round images that are smaller.
        download: lets torchvision fetch mnist, cifar10 or celeba if missing.
        limit: keeps the first so many training images. Where files lie sorted by class they are in shuffled order.
        held_out: how many are held out; of a data set's own split it keeps the first so many.

    Raises:
        DataError: for an unknown name or resize, a number below 1, data that are missing, empty or corrupt, an image
            of more than 8 bits a channel or too large for ``pad``, nothing left to train on. No image is skipped.
    """
    _check_choice("data.name", name, ("digits", *_BENCHMARKS, *_OWN))
    _check_choice("data.resize", resize, ("bilinear", "pad"))
    for key, value in (("image_size", image_size), ("limit", limit), ("held_out", held_out)):
        if value is not None and value < 1:
            raise DataError(f"data.{key} must be at least 1, got {value}")
    if (path is not None) != (name in _OWN):
        rule = "needs data.path" if path is None else f"takes no data.path (got {path}); own images are folder or zip"
        raise DataError(f"data.name={name} {rule}")

    if name in _BENCHMARKS:
        train, test = _BENCHMARKS[name](download)
    elif name in _OWN:
        own = _OWN[name](_own_path(Path(str(path)).expanduser()))
        train, test = _split(own, held_out or min(max(1, round(0.05 * len(own.names))), 5000))
    else:
        train, test = _split(_digits(), held_out or 297)
    arrays = [
        _decode(train, train.names[:limit], image_size, resize),
        _decode(test, test.names[:held_out], image_size, resize),
    ]
    digest = hashlib.sha256(repr([array.shape for array in arrays]).encode())
    for array in arrays:
        digest.update(array.data)
    return ImageData(arrays[0], arrays[1], digest.hexdigest()[:16])


def images_of(settings: Data) -> ImageData:
    """The images of a configuration's ``data`` section; raises as ``load_images``."""
    arguments = settings.model_dump(include={"name", "image_size", "path", "resize", "download", "limit", "held_out"})
    return load_images(**arguments)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """The inverse of :func:`to_unit_range`: floats of any shape -> uint8, rounded, values outside [-1, 1] clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def horizontal_flip(images: Tensor, flip: Tensor) -> Tensor:
    """Mirrors left and right those images [B, C, H, W] whose entry in ``flip`` (bool [B], same device) is true."""
    return torch.where(flip[:, None, None, None], images.flip(-1), images)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
        raise DataError(f"{key}={value!r} is not one of {', '.join(choices)}; the nearest is {nearest}")


def _data_root() -> Path:
    return Path(os.environ.get("KLRAY_DATA") or "data").expanduser().absolute()


def _own_path(path: Path) -> Path:
    under_root = _data_root() / path
    return under_root if not path.exists() and under_root.exists() else path


def _digits() -> _Source:
    from sklearn.datasets import load_digits  # slow to import, like torchvision: only where needed

    return _array_source("digits", np.rint(load_digits().images * (255 / 16)).astype(np.uint8))


def _mnist(download: bool) -> tuple[_Source, _Source]:
    train, test = (_torchvision("MNIST", "MNIST/raw", download, train=part).data.numpy() for part in (True, False))
    return _array_source("mnist", train), _array_source("mnist", test)


def _cifar10(download: bool) -> tuple[_Source, _Source]:
    batches = "cifar-10-batches-py"
    zips = [_data_root() / f"cifar10-{part}.zip" for part in ("train", "test")]
    if not (_data_root() / batches).exists() and any(file.exists() for file in zips):
        train, test = (_zip(file) for file in zips)
        # The members are sorted by class: unshuffled, the first few would all be aeroplanes.
        return replace(train, names=_shuffled(train.names)), replace(test, names=_shuffled(test.names))
    train, test = (_torchvision("CIFAR10", batches, download, train=part).data for part in (True, False))
    return _array_source("cifar10", train), _array_source("cifar10", test)


def _celeba(download: bool) -> tuple[_Source, _Source]:
    where = _data_root() / "celeba" / "img_align_celeba"

    def read(name: str) -> Image.Image:
        image = Image.open(where / name)
        left, top = (image.width - 140) // 2, (image.height - 140) // 2
        return image.crop((left, top, left + 140, top + 140))

    train, valid = (_torchvision("CelebA", "celeba", download, split=part).filename for part in ("train", "valid"))
    return _Source(str(where), train, read, 3), _Source(str(where), valid, read, 3)


def _folder(where: Path) -> _Source:
    if not where.is_dir():
        raise DataError(f"no folder at {where}; set data.path to the folder of the images, or use data.name=zip")
    names = (file.relative_to(where).as_posix() for file in where.rglob("*") if not file.is_dir())
    return _file_source(where, names, lambda name: (where / name).read_bytes())


def _zip(where: Path) -> _Source:
    if not where.is_file():
        raise DataError(f"no ZIP file at {where}; correct data.path, or KLRAY_DATA for cifar10")
    try:
        archive = zipfile.ZipFile(where)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{where}: cannot be read as a ZIP ({_one_line(error)}); replace it") from error
    return _file_source(where, archive.namelist(), archive.read)


_BENCHMARKS = {"mnist": _mnist, "cifar10": _cifar10, "celeba": _celeba}
_OWN = {"folder": _folder, "zip": _zip}


def _torchvision(dataset: str, folder: str, download: bool, **split: Any) -> Any:
    from torchvision import datasets

    try:
        return getattr(datasets, dataset)(_data_root(), download=download, **split)
    except Exception as error:  # anything from RuntimeError to AssertionError, by the kind of damage
        where = _data_root() / folder
        state = "incomplete or corrupt" if where.exists() else "missing"
        way_out = f"set KLRAY_DATA to the folder that holds {folder}"
        if download:
            way_out += f"; the download failed: {_one_line(error)}"
        else:
            way_out += ", or let torchvision download it with data.download=true"
        raise DataError(f"{dataset} is {state} at {where}: {way_out}") from error


def _array_source(where: str, images: np.ndarray) -> _Source:
    """images: uint8 [N, H, W] or [N, H, W, 3], named by their indices."""
    names = [str(index) for index in range(len(images))]
    return _Source(where, names, lambda name: Image.fromarray(images[int(name)]), 1 if images.ndim == 3 else 3)


def _file_source(where: Path, files: Iterable[str], read: Callable[[str], bytes]) -> _Source:
    names = []
    for name in sorted(files):
        file = PurePosixPath(name)
        if name.endswith("/") or "__MACOSX" in file.parts or file.name.startswith("._"):
            continue
        if file.suffix.lower() in REFUSED_SUFFIXES:
            raise DataError(f"{where}/{name}: images must be {' '.join(SUFFIXES)}; convert or remove it")
        if file.suffix.lower() in SUFFIXES:
            names.append(name)
    if not names:
        raise DataError(f"no images in {where}: it must hold {' '.join(SUFFIXES)} files")
    source = _Source(str(where), names, lambda name: Image.open(io.BytesIO(read(name))), 3)
    return replace(source, channels=1 if all(_is_grey(source, name) for name in names) else 3)


def _is_grey(source: _Source, name: str) -> bool:
    with _naming(source, name):
        return source.read(name).mode in ("L", "1")


def _shuffled(names: list[str]) -> list[str]:
    # By hash of the name, not by a generator: numpy may change its streams, and a new file does not move the others.
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def _split(source: _Source, held_out: int) -> tuple[_Source, _Source]:
    if held_out >= len(source.names):
        rule = f"holding out {held_out} of {len(source.names)} images leaves none to train on"
        raise DataError(f"{source.where}: {rule}; add images or lower data.held_out")
    names = _shuffled(source.names)
    return replace(source, names=names[:-held_out]), replace(source, names=names[-held_out:])


def _decode(source: _Source, names: list[str], size: int, resize: str) -> np.ndarray:
    images = np.empty((len(names), source.channels, size, size), np.uint8)

    def decode(start: int, stop: int) -> None:
        for index in range(start, min(stop, len(names))):
            with _naming(source, names[index]):
                image = source.read(names[index])
                if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255 without a word
                    raise DataError(f"has more than 8 bits a channel (Pillow's mode {image.mode}); convert it to 8")
                ImageOps.exif_transpose(image, in_place=True)
                fitted = _fit(image.convert("L" if source.channels == 1 else "RGB"), size, resize)
                images[index] = np.asarray(fitted).reshape(size, size, -1).transpose(2, 0, 1)

    # For images as small as CIFAR's one task each, or many threads, would cost more than the decoding.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda start: decode(start, start + 64), range(0, len(names), 64)))
    return images


def _fit(image: Image.Image, size: int, resize: str) -> Image.Image:
    width, height = image.size
    if resize == "pad":
        if max(width, height) > size:
            raise DataError(f"{width} x {height} is larger than data.image_size={size}; use data.resize=bilinear")
        padded = Image.new(image.mode, (size, size))
        padded.paste(image, ((size - width) // 2, (size - height) // 2))
        return padded
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)


@contextmanager
def _naming(source: _Source, name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{source.where}/{name}: {error}") from None
    except Exception as error:  # damaged files make Pillow and zipfile raise anything from OSError to SyntaxError
        reason = f"cannot be read as an image ({_one_line(error)}); replace or remove it"
        raise DataError(f"{source.where}/{name}: {reason}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
