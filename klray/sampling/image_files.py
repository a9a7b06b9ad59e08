"""Where generated images go: a PNG of a grid, a folder of PNGs, a ZIP of PNGs, or an .npz."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from klray.errors import UserError
from klray.sampling.draw import image_grid

MOST_IN_GRID = 1024


class ImageWriter(Protocol):
    """Takes images, uint8 [n, C, H, W], with their seeds."""

    def __call__(self, seeds: Sequence[int], images: Tensor) -> None: ...


def check_targets(paths: Sequence[Path]) -> None:
    """Refuses, before any work, what :func:`open_target` could not write.

    Raises:
        UserError: for an unknown suffix, the same target twice, a folder that is not empty, the working folder.
    """
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise UserError(f"--out {path} is given twice")
        _check_target(path)


def _check_target(path: Path) -> None:
    if path.resolve() == Path.cwd():
        raise UserError(f"--out {path} is the working folder itself; name a folder in it")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"--out {path} cannot be written: {above} is a file")
    if path.suffix not in ("", ".png", ".zip", ".npz"):
        raise UserError(f"--out must end in .png (a grid), .zip, .npz, or be a folder without a suffix, got {path}")
    if path.suffix == "" and path.is_dir() and next(path.iterdir(), None) is not None:
        raise UserError(f"--out {path} is not empty; two sets of images must not mix, so choose another folder")
    if (path.suffix and path.is_dir()) or (not path.suffix and path.is_file()):
        raise UserError(f"--out {path} is {'a folder' if path.is_dir() else 'a file'}; choose another name")


@contextmanager
def open_target(path: Path) -> Iterator[ImageWriter]:
    """A writer for ``path``, by its suffix; it appears whole, when all images are there.

    .png: a grid of the first 1024. .zip and folders: one PNG an image, named by its seed, 00000012.png. .npz: ``arr_0``
    uint8 [n, H, W, C] and ``seeds`` int64 [n].
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open(path, aside) as writer:
            yield writer
        if path.is_dir():
            path.rmdir()
        aside.replace(path)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from error
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


@contextmanager
def _open(path: Path, aside: Path) -> Iterator[ImageWriter]:
    if path.suffix == "":
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()

        def write(seeds: Sequence[int], images: Tensor) -> None:
            for seed, image in zip(seeds, images, strict=True):
                (aside / _name(seed)).write_bytes(_png(image))

        yield write
    elif path.suffix == ".zip":
        with zipfile.ZipFile(aside, "w") as archive:

            def add(seeds: Sequence[int], images: Tensor) -> None:
                for seed, image in zip(seeds, images, strict=True):
                    archive.writestr(zipfile.ZipInfo(_name(seed)), _png(image))  # without the time of day

            yield add
    else:
        kept: list[tuple[list[int], Tensor]] = []
        yield lambda seeds, images: kept.append((list(seeds), images))
        images = torch.cat([images for _, images in kept])
        if path.suffix == ".png":
            Image.fromarray(image_grid(images[:MOST_IN_GRID])).save(aside, format="PNG")
        else:
            with aside.open("wb") as file:
                seeds = np.array([seed for seeds, _ in kept for seed in seeds], dtype=np.int64)
                np.savez(file, arr_0=images.permute(0, 2, 3, 1).contiguous().numpy(), seeds=seeds)


def _name(seed: int) -> str:
    return f"{seed:08d}.png"


def _png(image: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] -> a PNG file, grey or RGB."""
    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()
