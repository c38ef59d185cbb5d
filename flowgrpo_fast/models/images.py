"""Source images as a viewer shows them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def as_seen(image: Image.Image) -> Image.Image:
    """An opened image in RGB: turned as its EXIF data say, 16 bits scaled to 8, what is transparent over white."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16 bits, which a plain conversion would cut off at 255
        values = np.asarray(turned, dtype=np.float64) / 257.0
        turned = Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
    if turned.has_transparency_data:
        over = turned.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        turned = Image.alpha_composite(white, over)
    return turned.convert("RGB")
