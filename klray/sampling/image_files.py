"""Where generated images go: a PNG of a grid, a folder of PNGs, a ZIP of PNGs, or an .npz."""

from __future__ import annotations

import io
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from klray.errors import UserError
from klray.sampling.draw import image_grid

MOST_IN_GRID = 1024


ImageWriter = Callable[[Sequence[int], Tensor], None]  # seeds, their images uint8 [n, C, H, W]


def check_targets(paths: Sequence[Path], *, overwrite: bool = False) -> None:
    """Refuses, before any work, what :func:`open_targets` could not write.

    Raises:
        UserError: for an unknown suffix, the same target twice or inside another, a folder that is not empty, the
            working folder, and a file that is there already unless it may be overwritten.
    """
    for index, path in enumerate(paths):
        for other in paths[:index]:
            if path.resolve() == other.resolve():
                raise UserError(f"--out {path} is given twice")
            for inner, outer in ((path, other), (other, path)):
                if outer.resolve() in inner.resolve().parents:
                    raise UserError(f"--out {inner} lies inside --out {outer}; choose another place")
        _check_target(path, overwrite)


def _check_target(path: Path, overwrite: bool) -> None:
    if path.resolve() == Path.cwd():
        raise UserError(f"--out {path} is the working folder itself; name a folder in it")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--out {path} cannot be written: {above} is a file")
    if path.suffix not in _KINDS:
        raise UserError(f"--out must end in .png (a grid), .zip, .npz, or be a folder without a suffix, got {path}")
    if path.suffix == "" and path.is_dir() and next(path.iterdir(), None) is not None:
        raise UserError(f"--out {path} is not empty; two sets of images must not mix, so choose another folder")
    if (path.suffix and path.is_dir()) or (not path.suffix and path.is_file()):
        raise UserError(f"--out {path} is {'a folder' if path.is_dir() else 'a file'}; choose another name")
    if path.is_file() and not overwrite:
        raise UserError(f"--out {path} exists; choose another name, or replace it with --overwrite")


@contextmanager
def open_targets(paths: Sequence[Path]) -> Iterator[ImageWriter]:
    """One writer for all ``paths``, each by its suffix; they appear whole, when all images are there.

    .png: a grid of the first 1024. .zip and folders: one PNG an image, named by its seed, 00000012.png. .npz: ``arr_0``
    uint8 [n, H, W, C] and ``seeds`` int64 [n]. All are opened before the first image is asked for; where one fails
    later, the others are still written.

    Raises:
        UserError: where one cannot be opened, where one of them failed, and at once where none is left.
    """
    targets: list[_Target] = []
    lost: list[str] = []

    def attempt(target: _Target, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            lost.append(f"--out {target.path} cannot be written: {error.strerror or error}")
            target.discard()
            targets.remove(target)
            if not targets:
                raise UserError("; ".join(lost)) from error

    def write(seeds: Sequence[int], images: Tensor) -> None:
        for target in list(targets):
            attempt(target, lambda target=target: target.write(seeds, images))  # type: ignore[misc]

    try:
        for path in paths:
            targets.append(_KINDS[path.suffix](path))
            attempt(targets[-1], targets[-1].open)
            if lost:
                raise UserError(lost[0])
        yield write
        for target in list(targets):
            attempt(target, target.finish)
    finally:
        for target in targets:
            target.discard()
    if lost:
        raise UserError(f"{'; '.join(lost)}; the others are written")


class _Target(ABC):
    """A place for images, written beside itself and then renamed."""

    def __init__(self, path: Path) -> None:
        self.path, self.aside = path, path.with_name(f".{path.name}.writing")

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.begin()

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def write(self, seeds: Sequence[int], images: Tensor) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    def finish(self) -> None:
        self.close()
        if self.path.is_dir():
            self.path.rmdir()
        self.aside.replace(self.path)

    def discard(self) -> None:
        """Removes what is not finished."""
        with suppress(OSError):
            if self.aside.is_dir():
                shutil.rmtree(self.aside)
            else:
                self.aside.unlink(missing_ok=True)


class _Folder(_Target):
    def begin(self) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir()

    def write(self, seeds: Sequence[int], images: Tensor) -> None:
        for seed, image in zip(seeds, images, strict=True):
            (self.aside / _name(seed)).write_bytes(_png(image))

    def close(self) -> None:
        pass


class _Zip(_Target):
    def begin(self) -> None:
        self.archive = zipfile.ZipFile(self.aside, "w")

    def write(self, seeds: Sequence[int], images: Tensor) -> None:
        for seed, image in zip(seeds, images, strict=True):
            self.archive.writestr(zipfile.ZipInfo(_name(seed)), _png(image))  # without the time of day

    def close(self) -> None:
        self.archive.close()

    def discard(self) -> None:
        with suppress(OSError, AttributeError):
            self.archive.close()
        super().discard()


class _Grid(_Target):
    def begin(self) -> None:
        self.aside.write_bytes(b"")
        self.images: list[Tensor] = []

    def write(self, seeds: Sequence[int], images: Tensor) -> None:
        if sum(map(len, self.images)) < MOST_IN_GRID:
            self.images.append(images)

    def close(self) -> None:
        Image.fromarray(image_grid(torch.cat(self.images)[:MOST_IN_GRID])).save(self.aside, format="PNG")


class _Arrays(_Target):
    def begin(self) -> None:
        self.aside.write_bytes(b"")
        self.seeds: list[int] = []
        self.images: list[Tensor] = []

    def write(self, seeds: Sequence[int], images: Tensor) -> None:
        self.seeds += seeds
        self.images.append(images)

    def close(self) -> None:
        images = torch.cat(self.images).permute(0, 2, 3, 1).contiguous().numpy()
        with self.aside.open("wb") as file:
            np.savez(file, arr_0=images, seeds=np.array(self.seeds, dtype=np.int64))


_KINDS: dict[str, Callable[[Path], _Target]] = {"": _Folder, ".zip": _Zip, ".png": _Grid, ".npz": _Arrays}


def _name(seed: int) -> str:
    return f"{seed:08d}.png"


def _png(image: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] -> a PNG file, grey or RGB."""
    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()
