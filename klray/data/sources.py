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
from PIL import Image, ImageOps

from klray import registry
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
class Source:
    """Images that are yet to be decoded: ``read`` gives the one of a name. ``where``: what errors call them."""

    where: str
    names: list[str]
    read: Callable[[str], Image.Image]
    channels: int


# One whole set, of which a part is held out, or those to train on and those to hold out; uint8 [N, H, W(, 3)].
Given = Source | np.ndarray | tuple[Source, Source] | tuple[np.ndarray, np.ndarray]


def load_images(
    name: str,
    *,
    image_size: int,
    resize: str = "bilinear",
    limit: int | None = None,
    held_out: int | None = None,
    **settings: Any,
) -> ImageData:
    """Reads a data set into memory: for the same arguments the same images in the same order, whatever the seed.

    Args:
        name: ``digits``, ``mnist``, ``cifar10``, ``celeba``, ``folder``, ``zip``, or module:attribute of your own.
        image_size: height and width of the result in pixels.
        resize: ``bilinear`` scales the central square, antialiased; ``pad`` puts zeros round images that are smaller.
        limit: keeps the first so many training images. Where files lie sorted by class they are in shuffled order.
        held_out: how many are held out; of a data set's own split it keeps the first so many. By default digits' 297,
            else 5 % of a set without a split of its own, at least 1 and at most 5000.
        settings: of the source, such as ``path`` and ``download``.

    Raises:
        UserError: for an unknown name, resize or setting, a number below 1, data that are missing, empty or corrupt, an
            image of more than 8 bits a channel or too large for ``pad``, nothing left to train on. No image is skipped.
    """
    if resize not in ("bilinear", "pad"):
        nearest = difflib.get_close_matches(resize, ("bilinear", "pad"), n=1, cutoff=0.0)[0]
        raise DataError(f"data.resize must be one of bilinear, pad, got {resize!r}; the nearest is {nearest}")
    for key, value in (("image_size", image_size), ("limit", limit), ("held_out", held_out)):
        if value is not None and value < 1:
            raise DataError(f"data.{key} must be at least 1, got {value}")
    try:
        source = registry.entry("data source", name, "data.name")
    except registry.RegistryError as error:
        raise DataError(str(error)) from error
    known = registry.settings_of("data source", name).model_fields
    settings = {key: value for key, value in settings.items() if value is not None}
    for key in settings.keys() - known:
        raise DataError(f"data.name={name} takes no data.{key} (got {settings[key]}); own images are folder or zip")
    for key, field in known.items():
        if field.is_required() and key not in settings:
            raise DataError(f"data.name={name} needs data.{key}")
    given: Given = source(**settings)
    if isinstance(given, tuple):
        train, test = (_as_source(name, part) for part in given)
    else:
        whole = _as_source(name, given)
        share = min(max(1, round(0.05 * len(whole.names))), 5000)
        train, test = _split(whole, held_out or _HELD_OUT.get(name, share))
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
    arguments = settings.model_dump(include={"name", "image_size", "resize", "limit", "held_out"})
    return load_images(**arguments, **settings.settings("name"))


def _data_root() -> Path:
    return Path(os.environ.get("KLRAY_DATA") or "data").expanduser().absolute()


def _own_path(path: Path) -> Path:
    under_root = _data_root() / path
    return under_root if not path.exists() and under_root.exists() else path


def digits() -> Source:
    """scikit-learn's 8 x 8 handwritten digits, which come with it."""
    from sklearn.datasets import load_digits  # slow to import, like torchvision: only where needed

    return _array_source("digits", np.rint(load_digits().images * (255 / 16)).astype(np.uint8))


def mnist(*, download: bool = False) -> tuple[Source, Source]:
    """Under KLRAY_DATA, or fetched there; the test set is held out.

    Args:
        download: let torchvision fetch it where it is missing.
    """
    train, test = (_torchvision("MNIST", "MNIST/raw", download, train=part).data.numpy() for part in (True, False))
    return _array_source("mnist", train), _array_source("mnist", test)


def cifar10(*, download: bool = False) -> tuple[Source, Source]:
    """Under KLRAY_DATA as torchvision lays it out or as two ZIPs, or fetched there; the test set is held out.

    Args:
        download: let torchvision fetch it where it is missing.
    """
    batches = "cifar-10-batches-py"
    zips = [_data_root() / f"cifar10-{part}.zip" for part in ("train", "test")]
    if not (_data_root() / batches).exists() and any(file.exists() for file in zips):
        train, test = (_zip(file) for file in zips)
        # The members are sorted by class: unshuffled, the first few would all be aeroplanes.
        return replace(train, names=_shuffled(train.names)), replace(test, names=_shuffled(test.names))
    train, test = (_torchvision("CIFAR10", batches, download, train=part).data for part in (True, False))
    return _array_source("cifar10", train), _array_source("cifar10", test)


def celeba(*, download: bool = False) -> tuple[Source, Source]:
    """The central 140 x 140 of CelebA's aligned faces, under KLRAY_DATA or fetched there; valid is held out.

    Args:
        download: let torchvision fetch it where it is missing.
    """
    where = _data_root() / "celeba" / "img_align_celeba"

    def read(name: str) -> Image.Image:
        image = Image.open(where / name)
        left, top = (image.width - 140) // 2, (image.height - 140) // 2
        return image.crop((left, top, left + 140, top + 140))

    train, valid = (_torchvision("CelebA", "celeba", download, split=part).filename for part in ("train", "valid"))
    return Source(str(where), train, read, 3), Source(str(where), valid, read, 3)


def folder(*, path: str) -> Source:
    """Images in a folder, read recursively without following links to folders; looked for in the working folder, then
    under KLRAY_DATA. Alpha is dropped. Grey if every image is, else RGB.

    Args:
        path: the folder.
    """
    where = _own_path(Path(path).expanduser())
    if not where.is_dir():
        raise DataError(f"no folder at {where}; set data.path to the folder of the images, or use data.name=zip")
    names = (file.relative_to(where).as_posix() for file in where.rglob("*") if not file.is_dir())
    return _file_source(where, names, lambda name: (where / name).read_bytes())


def zip_file(*, path: str) -> Source:
    """Images in a ZIP, read in place; otherwise as a folder.

    Args:
        path: the ZIP file.
    """
    return _zip(_own_path(Path(path).expanduser()))


def _zip(where: Path) -> Source:
    if not where.is_file():
        raise DataError(f"no ZIP file at {where}; correct data.path, or KLRAY_DATA for cifar10")
    try:
        archive = zipfile.ZipFile(where)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{where}: cannot be read as a ZIP ({_one_line(error)}); replace it") from error
    return _file_source(where, archive.namelist(), archive.read)


SOURCES: dict[str, Any] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "celeba": celeba,
    "folder": folder,
    "zip": zip_file,
}
_HELD_OUT = {"digits": 297}


def _as_source(name: str, given: Any) -> Source:
    """Also from an array, as an entry of the user's own may give it."""
    if isinstance(given, Source):
        return given
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape[3:] in ((), (3,)) and given.ndim > 2:
        return _array_source(name, given)
    what = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
    raise DataError(f"data.name={name} must give uint8 images [N, H, W] or [N, H, W, 3], got {what}")


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


def _array_source(where: str, images: np.ndarray) -> Source:
    """images: uint8 [N, H, W] or [N, H, W, 3], named by their indices."""
    names = [str(index) for index in range(len(images))]
    return Source(where, names, lambda name: Image.fromarray(images[int(name)]), 1 if images.ndim == 3 else 3)


def _file_source(where: Path, files: Iterable[str], read: Callable[[str], bytes]) -> Source:
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
    source = Source(str(where), names, lambda name: Image.open(io.BytesIO(read(name))), 3)
    return replace(source, channels=1 if all(_is_grey(source, name) for name in names) else 3)


def _is_grey(source: Source, name: str) -> bool:
    with _naming(source, name):
        return source.read(name).mode in ("L", "1")


def _shuffled(names: list[str]) -> list[str]:
    # By hash of the name, not by a generator: numpy may change its streams, and a new file does not move the others.
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def _split(source: Source, held_out: int) -> tuple[Source, Source]:
    if held_out >= len(source.names):
        rule = f"holding out {held_out} of {len(source.names)} images leaves none to train on"
        raise DataError(f"{source.where}: {rule}; add images or lower data.held_out")
    names = _shuffled(source.names)
    return replace(source, names=names[:-held_out]), replace(source, names=names[-held_out:])


def _decode(source: Source, names: list[str], size: int, resize: str) -> np.ndarray:
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
def _naming(source: Source, name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{source.where}/{name}: {error}") from None
    except Exception as error:  # damaged files make Pillow and zipfile raise anything from OSError to SyntaxError
        reason = f"cannot be read as an image ({_one_line(error)}); replace or remove it"
        raise DataError(f"{source.where}/{name}: {reason}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
