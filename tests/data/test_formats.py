"""Files are decoded by what they hold, whatever their ending, to the same pixels under every loader."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali  # noqa: F401  # `make install` installs it: without it these tests fail rather than skip
import pytest
import torch
from PIL import Image

from camkd_fast.data import BadImageError, ImageFiles, LoaderConfig, choose
from camkd_fast.data.augment import Augmentation
from camkd_fast.data.decode import open_rgb, read_header
from tests.support.loader_data import CROP, MEAN, RESIZED, STD, by_sample, image_files, levels, opened, picture

SIDE = 41

Save = Callable[[Image.Image, Path], None]


def saved(format: str, mode: str = "RGB", **options: Any) -> Save:
    return lambda image, path: image.convert(mode).save(path, format, **options)


def transparent(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep(image: Image.Image) -> Image.Image:
    """16 bits of grey."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 251 + 7)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


# Name of the kind, and how a file of it is written. All are named .jpg below.
KINDS: dict[str, Save] = {
    "gif": saved("GIF"),
    "png": saved("PNG"),
    "png-palette": lambda image, path: image.quantize(17).save(path, "PNG", transparency=3),
    "png-transparent": lambda image, path: transparent(image).save(path, "PNG"),
    "png-16-bit": lambda image, path: deep(image).save(path, "PNG"),
    "png-animated": saved("PNG", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
    "webp": saved("WEBP"),
    "webp-transparent": lambda image, path: transparent(image).save(path, "WEBP"),
    "webp-animated": saved("WEBP", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
    "bmp": saved("BMP"),
    "bmp-palette": lambda image, path: image.quantize(9).save(path, "BMP"),
    "ppm": saved("PPM"),
    "pgm": saved("PPM", "L"),
    "pgm-16-bit": lambda image, path: deep(image).save(path, "PPM"),
    "tiff": saved("TIFF"),
    "tiff-lzw": saved("TIFF", compression="tiff_lzw"),
    "tiff-rotated": saved("TIFF", exif=rotated()),
    "tiff-float": saved("TIFF", "F"),
    "jpeg-cmyk": saved("JPEG", "CMYK"),
    "jpeg-rotated": saved("JPEG", exif=rotated()),
    "jpeg-2000": saved("JPEG2000"),
    "mpo": saved("MPO", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))]),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """One file of every kind between JPEGs, as in scraped sets."""
    folder = tmp_path_factory.mktemp("kinds")
    generator = np.random.default_rng(0)
    paths = []
    for name, save in KINDS.items():
        paths += [folder / f"{name}.jpg", folder / f"{name}-neighbour.jpg"]
        save(picture(generator, SIDE, SIDE), paths[-2])
        picture(generator, SIDE, 2 * SIDE).save(paths[-1], "JPEG")
    return ImageFiles(tuple(paths), torch.arange(len(paths)) % 2, 2, ("a", "b"), MEAN, STD, SIDE)


def test_every_kind_is_decoded_to_the_same_pixels(files: ImageFiles) -> None:
    found = {}
    for kind in ("torch", "dali"):
        with opened(files, kind, 8) as loader:
            found[kind] = by_sample(loader)[1]
    mean, factor = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    for n, path in enumerate(files.paths):
        assert torch.equal(found["torch"][n], found["dali"][n]), path.name
        if "neighbour" not in path.name:  # neither cropped nor resized
            image = torch.from_numpy(np.array(open_rgb(path))).permute(2, 0, 1)
            assert torch.equal(found["torch"][n], (image.float() - mean) * (1 / factor)), path.name


@pytest.mark.parametrize("augmentation", [CROP, RESIZED], ids=["crop", "resized-crop"])
def test_augmented_files_of_every_kind_agree(files: ImageFiles, augmentation: Augmentation) -> None:
    with ExitStack() as stack:
        loaders = [stack.enter_context(opened(files, kind, 8, augmentation=augmentation)) for kind in ("torch", "dali")]
        for ours, dali in zip(*loaders, strict=True):
            assert torch.equal(ours.index, dali.index)
            assert (levels(ours, files) - levels(dali, files)).abs().max() <= 1.01  # one level of rounding


def test_pillow_decodes_what_dali_would_read_differently(files: ImageFiles) -> None:
    exact = dict(zip((path.stem for path in files.paths), files.headers().exact.tolist(), strict=True))
    assert all(exact[f"{name}-neighbour"] for name in KINDS)
    assert {name for name in KINDS if not exact[name]} == {
        *("gif", "webp-animated", "pgm-16-bit", "jpeg-cmyk", "jpeg-2000"),
        *(name for name in KINDS if name.startswith("tiff")),
    }


def test_auto_decodes_by_pillow_where_it_would_decode_most_files(files: ImageFiles, tmp_path: Path) -> None:
    few, config = image_files(tmp_path, 30), LoaderConfig(8)
    gif = tmp_path / "x.jpg"
    Image.new("RGB", (9, 9)).save(gif, "GIF")
    with_gif = ImageFiles((*few.paths, gif), torch.zeros(31, dtype=torch.int64), 4, few.class_names, MEAN, STD, 32)
    assert choose.explain(with_gif, config) == "dali: 31 image files to decode"
    gifs = ImageFiles((gif,) * 4, torch.zeros(4, dtype=torch.int64), 4, few.class_names, MEAN, STD, 32)
    assert choose.pick(gifs, config) == ("torch", f"4 of 4 files are not of a kind that DALI reads, the first is {gif}")
    with opened(gifs, "dali", 4) as loader:  # by name it decodes them with Pillow
        (batch,) = loader
    assert (levels(batch, gifs).abs() < 1e-4).all()


def broken_gif(folder: Path) -> Path:
    path = folder / "cut.jpg"
    picture(np.random.default_rng(0), SIDE, SIDE).save(path, "GIF")
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_damaged_file_of_another_kind_is_named_and_skipped(kind: str, tmp_path: Path) -> None:
    good = image_files(tmp_path, 6)
    data = ImageFiles((*good.paths, broken_gif(tmp_path)), torch.arange(7) % 4, 4, good.class_names, MEAN, STD, 32)
    with (
        opened(data, kind, 4) as loader,
        pytest.raises(BadImageError, match=r"cut\.jpg cannot be read as an image: \w"),
    ):
        list(loader)
    with opened(data, kind, 4, skip_bad=1) as loader:
        assert by_sample(loader)[0].tolist() == list(range(6))


def test_a_program_for_ghostscript_is_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_header, open_rgb):
        with pytest.raises(ValueError, match="EPS files are not read"):
            read(path)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    for format in ("PNG", "TIFF", "PPM"):
        path = tmp_path / f"x.{format}"
        Image.fromarray(np.array([[0, 257, 25700, 65535]], np.uint16)).save(path, format)
        assert np.asarray(open_rgb(path))[0, :, 0].tolist() == [0, 1, 100, 255], format
