"""Samples as pictures: each in full size as a file of its own, and many of them as a grid with captions."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import torch
from diffusers.utils import export_to_video
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowgrpo_fast.json_files import write_whole

_SMALLEST, _LARGEST = 96, 256  # pixels of a grid cell's longer side
_GAP, _FRAME = 8, 3  # pixels between cells, of a frame
_WIDTH, _HEIGHT = 1600, 1800  # pixels of a grid, about
_FONT, _LINE, _LINES = 11, 14, 3  # pixels of a letter and of a line; lines of a prompt at most
_RED, _INK, _GREY = (220, 38, 38), (31, 41, 51), (97, 110, 124)
_FRAMES_A_SECOND = 16


def sample_grid(
    images: Tensor,
    prompts: Sequence[str],
    rewards: Tensor | None = None,
    correct: Tensor | None = None,
) -> Image.Image:
    """A grid of samples with prompt and reward under each; samples of a prompt stand side by side.

    Small images are enlarged by whole factors, so that their pixels show; large ones are made smaller. How many fit
    depends on their size.

    Args:
        images: `[N, C, H, W]` in [0, 1], C = 1 or 3; of videos `[N, F, C, H, W]` the middle frame is shown.
        prompts: N.
        rewards: `[N]`, or None for none.
        correct: `[N]` bool, a red frame where it is false; None for no frames.
    """
    width, height = _cell(images.shape[-1], images.shape[-2])
    below = _LINE * (_LINES + (rewards is not None)) + _GAP // 2
    columns = max(1, min(12, (_WIDTH - _GAP) // (width + _GAP)))
    rows = max(1, min(10, (_HEIGHT - _GAP) // (height + below + _GAP)))
    shown = list(_laid_out(prompts, rows, columns))
    wide, high = 1 + max(place[1] for place, _ in shown), 1 + max(place[0] for place, _ in shown)
    canvas = Image.new("RGB", (wide * (width + _GAP) + _GAP, high * (height + below + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for (row, column), index in shown:
        x, y = column * (width + _GAP) + _GAP, row * (height + below + _GAP) + _GAP
        if correct is not None and not bool(correct[index]):
            frame = (x - _FRAME, y - _FRAME, x + width + _FRAME, y + height + _FRAME)
            canvas.paste(_RED, frame)
        picture = picture_of(still(images[index]))
        enlarged = width >= picture.width
        kind = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
        canvas.paste(picture.resize((width, height), kind), (x, y))
        y += height + _GAP // 2
        for line in _wrapped(prompts[index], width):
            draw.text((x, y), line, fill=_GREY, font=_font())
            y += _LINE
        if rewards is not None:
            draw.text((x, y), f"{float(rewards[index]):+.3f}", fill=_INK, font=_font())
    return canvas


def save_samples(
    images: Tensor, prompts: Sequence[str], folder: Path, rewards: Tensor | None = None
) -> list[Path]:
    """Writes each sample in full size: a PNG that holds its prompt and reward, or an MP4 of a video.

    Where `imageio-ffmpeg` is not installed, a video is an animated WebP. Files that are there are replaced.

    Args:
        images: `[N, C, H, W]`, or videos `[N, F, C, H, W]`, in [0, 1].
        prompts: N.
        folder: made where it is not there.
        rewards: `[N]`, or None for none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        words = re.sub(r"[^A-Za-z0-9]+", "_", prompt)[:40].strip("_")
        stem = "_".join([f"{index:03d}", *([words] if words else [])])
        if image.ndim == 4:
            written.append(_save_video(image, folder / stem))
            continue
        info = PngInfo()
        info.add_itxt("prompt", prompt.encode(errors="replace").decode())
        if rewards is not None:
            info.add_text("reward", f"{float(rewards[index]):g}")
        buffer = io.BytesIO()
        picture_of(image).save(buffer, "PNG", pnginfo=info)
        write_whole(folder / f"{stem}.png", buffer.getvalue())
        written.append(folder / f"{stem}.png")
    return written


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG in one piece."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def picture_of(image: Tensor) -> Image.Image:
    """`[C, H, W]` in [0, 1], C = 1 or 3, in its own size."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def still(sample: Tensor) -> Tensor:
    """The image itself, or the middle frame of a video `[F, C, H, W]`."""
    return sample[len(sample) // 2] if sample.ndim == 4 else sample


def _save_video(frames: Tensor, stem: Path) -> Path:
    pictures = [picture_of(frame) for frame in frames]
    if find_spec("imageio") and find_spec("imageio_ffmpeg"):
        path = stem.with_name(f"{stem.name}.mp4")
        path.unlink(missing_ok=True)  # a link there is not written through
        # Sizes are even; at the default, one that is no multiple of 16 would be scaled.
        export_to_video(pictures, str(path), fps=_FRAMES_A_SECOND, quality=9, macro_block_size=2)
        return path
    path, buffer = stem.with_name(f"{stem.name}.webp"), io.BytesIO()
    pictures[0].save(
        buffer,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=1000 // _FRAMES_A_SECOND,
        loop=0,
        quality=90,
    )
    write_whole(path, buffer.getvalue())
    return path


def _cell(width: int, height: int) -> tuple[int, int]:
    """The size in which an image is shown."""
    longer = max(width, height)
    if longer < _SMALLEST:
        factor = -(-_SMALLEST // longer)
        return width * factor, height * factor
    scale = min(1.0, _LARGEST / longer)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _laid_out(prompts: Sequence[str], rows: int, columns: int) -> Iterator[tuple[tuple[int, int], int]]:
    """((row, column), sample): the first prompts, of each as many samples as fit; several a row where there are few."""
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    each = min(columns, max(map(len, members.values())))
    a_row = columns // each
    for place, indices in enumerate(list(members.values())[: rows * a_row]):
        for column, index in enumerate(indices[:each]):
            yield (place // a_row, place % a_row * each + column), index


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib brings it; its letters go beyond Latin, those of Pillow's own do not."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", _FONT)


def _wrapped(text: str, width: int) -> list[str]:
    """A prompt as lines of at most so many pixels, the last one cut where it is longer."""
    lines, line = [], ""
    for word in " ".join(text.split()).split(" "):
        longer = f"{line} {word}".strip()
        if line and _font().getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines = [*lines, line]
    whole = len(lines) <= _LINES
    return [_cut(one, width, whole or place < _LINES - 1) for place, one in enumerate(lines[:_LINES])]


def _cut(line: str, width: int, whole: bool) -> str:
    """A line that fits; dots say that something is missing."""
    if whole and _font().getlength(line) <= width:
        return line
    while line and _font().getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line.rstrip()}..."
