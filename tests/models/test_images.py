"""Source images are read as a viewer shows them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flowgrpo_fast.models.images import as_seen


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_data_say(orientation: int, tmp_path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(as_seen(image)), turned)


def test_sixteen_bits_are_scaled(tmp_path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(as_seen(image))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_what_is_transparent_lies_over_white(tmp_path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 127]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        seen = np.asarray(as_seen(image))[0]
    assert seen.tolist() == [[200, 0, 0], [255, 255, 255], [128, 128, 128]]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_modes(mode: str, tmp_path) -> None:
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        seen = as_seen(image)
    assert seen.mode == "RGB"
    assert np.asarray(seen).min() >= 254
