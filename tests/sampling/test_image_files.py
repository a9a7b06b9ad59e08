"""Where images go: what is read back is what was written, whole or not at all."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from klray.errors import UserError
from klray.sampling import image_files
from klray.sampling.draw import image_grid
from klray.sampling.image_files import MOST_IN_GRID, check_targets, open_targets

SEEDS = [[3, 4, 5], [12], [123456789, 7]]
KINDS = ["images", "images.zip", "images.npz", "grid.png"]


def images(channels: int, count: int = 6, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def write(path: Path, channels: int = 1) -> Tensor:
    """Six images in three batches, as sampling hands them over."""
    every = images(channels)
    with open_targets([path]) as writer:
        for seeds, batch in zip(SEEDS, every.split([3, 1, 2]), strict=True):
            writer(seeds, batch)
    return every


def from_png(file: Path | io.BytesIO, mode: str) -> Tensor:
    """A PNG as uint8 [C, H, W]."""
    picture = Image.open(file)
    assert (picture.format, picture.mode) == ("PNG", mode)
    array = torch.from_numpy(np.array(picture))
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1)


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


both_modes = pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
NAMES = ["00000003.png", "00000004.png", "00000005.png", "00000012.png", "123456789.png", "00000007.png"]


@both_modes
def test_a_folder_holds_a_png_for_each_seed(channels: int, mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "images"
    written = write(folder, channels)
    assert sorted(file.name for file in folder.iterdir()) == sorted(NAMES)
    for name, image in zip(NAMES, written, strict=True):
        assert torch.equal(from_png(folder / name, mode), image)
    assert everything(tmp_path / "new") == [folder, *sorted(folder.iterdir())]


@both_modes
def test_a_zip_holds_a_png_for_each_seed(channels: int, mode: str, tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "images.zip", channels)
    with zipfile.ZipFile(tmp_path / "new" / "images.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == NAMES
        for name, image in zip(NAMES, written, strict=True):
            assert torch.equal(from_png(io.BytesIO(archive.read(name)), mode), image)
    assert everything(tmp_path / "new") == [tmp_path / "new" / "images.zip"]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_holds_images_and_seeds(channels: int, tmp_path: Path) -> None:
    """As guided-diffusion's evaluator reads them: arr_0, channels last."""
    written = write(tmp_path / "new" / "images.npz", channels)
    with np.load(tmp_path / "new" / "images.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "seeds"]
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (6, 8, 8, channels)
        assert np.array_equal(arrays["arr_0"], written.permute(0, 2, 3, 1).numpy())
        assert arrays["seeds"].dtype == np.int64
        assert arrays["seeds"].tolist() == [seed for batch in SEEDS for seed in batch]
    assert everything(tmp_path / "new") == [tmp_path / "new" / "images.npz"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_grid(channels: int, tmp_path: Path) -> None:
    written = write(tmp_path / "new" / "grid.png", channels)
    picture = from_png(tmp_path / "new" / "grid.png", "RGB").permute(1, 2, 0)
    assert np.array_equal(picture.numpy(), image_grid(written))
    assert everything(tmp_path / "new") == [tmp_path / "new" / "grid.png"]


def test_a_grid_has_its_most_images(tmp_path: Path) -> None:
    every = images(1, count=MOST_IN_GRID + 10, size=2)
    with open_targets([tmp_path / "grid.png"]) as writer:
        for i, batch in enumerate(every.split(100)):
            writer(range(100 * i, 100 * i + len(batch)), batch)
    picture = from_png(tmp_path / "grid.png", "RGB").permute(1, 2, 0)
    assert np.array_equal(picture.numpy(), image_grid(every[:MOST_IN_GRID]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_are_the_same_bytes(kind: str, tmp_path: Path) -> None:
    def contents(folder: Path) -> list[bytes]:
        return [file.read_bytes() for file in everything(folder) if file.is_file()]

    write(tmp_path / "a" / kind)
    write(tmp_path / "b" / kind)
    if kind == "images.zip":  # it holds the time of writing
        archives = [zipfile.ZipFile(tmp_path / run / kind) for run in ("a", "b")]
        assert [archives[0].read(name) for name in NAMES] == [archives[1].read(name) for name in NAMES]
    elif kind == "images.npz":
        assert np.array_equal(*(np.load(tmp_path / run / kind)["arr_0"] for run in ("a", "b")))
    else:
        assert contents(tmp_path / "a") == contents(tmp_path / "b")
        assert contents(tmp_path / "a")


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_middle_leaves_nothing(kind: str, stop: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(stop), open_targets([tmp_path / kind]) as writer:
        writer([0, 1, 2], images(1)[:3])
        assert not (tmp_path / kind).exists()
        raise stop
    assert everything(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_error_in_the_middle_leaves_the_file_that_was_there(kind: str, tmp_path: Path) -> None:
    write(tmp_path / kind)
    before = (tmp_path / kind).read_bytes()
    with pytest.raises(RuntimeError), open_targets([tmp_path / kind]) as writer:
        writer([0], images(3)[:1])
        raise RuntimeError
    assert (tmp_path / kind).read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_process_left_is_no_part_of_the_next(kind: str, tmp_path: Path) -> None:
    """A second attempt writes what one attempt would have written."""
    left = tmp_path / f".{kind}.writing"
    if kind == "images":
        left.mkdir()
        (left / "00000099.png").touch()
    else:
        left.write_bytes(b"PK" * 10_000)
    write(tmp_path / kind)
    write(tmp_path / "alone" / kind)
    names = [file.relative_to(tmp_path / "alone") for file in everything(tmp_path / "alone")]
    assert [file.relative_to(tmp_path) for file in everything(tmp_path) if "alone" not in str(file)] == names
    if kind == "images.zip":
        assert zipfile.ZipFile(tmp_path / kind).namelist() == NAMES


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_file_is_replaced_only_where_it_may_be(kind: str, tmp_path: Path) -> None:
    (tmp_path / kind).write_text("an older one")
    with pytest.raises(UserError, match=f"{kind} exists; choose another name, or replace it with --overwrite"):
        check_targets([tmp_path / kind])
    check_targets([tmp_path / kind], overwrite=True)
    write(tmp_path / kind)
    assert (tmp_path / kind).stat().st_size > 200


def write_all(paths: list[Path]) -> None:
    with open_targets(paths) as writer:
        for seeds, batch in zip(SEEDS, images(1).split([3, 1, 2]), strict=True):
            writer(seeds, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_opened_before_the_first_image(kind: str, tmp_path: Path) -> None:
    """Where one cannot be, no other is left half made."""
    (tmp_path / "file").touch()
    before = everything(tmp_path)
    with (
        pytest.raises(UserError, match="file/bad.png cannot be written: "),
        open_targets([tmp_path / kind, tmp_path / "file" / "bad.png"]),
    ):
        pytest.fail("it was opened")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("moment", ["write", "close"])
@pytest.mark.parametrize("bad", KINDS)
def test_one_that_fails_later_does_not_take_the_others_along(
    bad: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = image_files._KINDS[Path(bad).suffix]

    def full(self: object, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, moment, full)
    with pytest.raises(UserError) as caught:
        write_all([tmp_path / each for each in KINDS])
    message = f"--out {tmp_path / bad} cannot be written: No space left on device; the others are written"
    assert str(caught.value) == message
    assert {path.name for path in tmp_path.iterdir()} == set(KINDS) - {bad}
    with pytest.raises(UserError, match=r"No space left on device$"):  # none is left: nothing more is drawn
        write_all([tmp_path / "again" / bad])
    assert everything(tmp_path / "again") == []


def test_an_error_in_drawing_is_not_blamed_on_the_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the network's file"), open_targets([tmp_path / "a.png"]):
        raise OSError("the network's file")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write(tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 6


def a_folder(path: Path) -> None:
    path.mkdir()


def a_folder_with_an_image(path: Path) -> None:
    path.mkdir()
    (path / "00000000.png").touch()


@pytest.mark.parametrize(
    ("name", "before", "message"),
    [
        ("images.jpg", None, "--out must end in .png (a grid), .zip, .npz, or be a folder without a suffix, got "),
        ("images.npy", None, "--out must end in .png (a grid), .zip, .npz, or be a folder without a suffix, got "),
        ("images", a_folder_with_an_image, "images is not empty; two sets of images must not mix, so choose another"),
        ("images", Path.touch, "images is a file; choose another name"),
        ("grid.png", a_folder, "grid.png is a folder; choose another name"),
        ("images.zip", a_folder_with_an_image, "images.zip is a folder; choose another name"),
    ],
)
def test_what_cannot_be_written_is_refused_before(
    name: str, before: Callable[[Path], None] | None, message: str, tmp_path: Path
) -> None:
    if before is not None:
        before(tmp_path / name)
    there = everything(tmp_path)
    with pytest.raises(UserError) as caught:
        check_targets([tmp_path / name])
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(tmp_path) == there


@pytest.mark.parametrize("name", ["images", "a/images", "grid.png", "images.zip", "images.npz"])
def test_what_can_be_written_is_not_touched_by_the_check(name: str, tmp_path: Path) -> None:
    check_targets([tmp_path / name])
    assert everything(tmp_path) == []
