"""Picture files to tensors: decoding with all its traps, centre crop and proportional resize (STAR section 4.1)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from star_dist.errors import UserError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


class UnreadablePicture(ValueError):
    """A picture that cannot be decoded; the message is the reason, short enough to count by."""


def decode_picture(data: bytes) -> Image.Image:
    """Decodes picture bytes to RGB: EXIF rotation applied, transparency laid on white, first frame of an animation.

    Raises:
        UnreadablePicture: empty, truncated, no picture at all, or dangerously large.
    """
    if not data:
        raise UnreadablePicture("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadablePicture("too many pixels") from None
    except Image.UnidentifiedImageError:
        raise UnreadablePicture("not a picture") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, TypeError, IndexError, KeyError) as error:
        # Pillow's decoders raise all of these for damaged files.
        kind = "truncated" if "truncat" in str(error) else "damaged"
        raise UnreadablePicture(f"{kind} picture") from None


def read_picture(path: Path) -> Image.Image:
    """A picture that a command was given.

    Raises:
        UserError: no such file, or none that can be decoded.
    """
    try:
        return decode_picture(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnreadablePicture as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def crop_and_resize(image: Image.Image, side: int) -> Image.Image:
    """The largest centred square, resized to (side, side)."""
    return ImageOps.fit(image, (side, side), method=Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> (3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(pictures: Tensor) -> Tensor:
    """uint8 pictures -> float32 in [-1, 1], what the tokenizer takes."""
    return pictures.float() / 127.5 - 1


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """(B, 3, height, width) in [-1, 1] -> RGB pictures."""
    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return [Image.fromarray(pixel) for pixel in pixels.permute(0, 2, 3, 1).cpu().numpy()]


class PictureFiles(torch.utils.data.Dataset):
    """Decoded squares of picture files, for the tokenizer's training; (3, side, side) uint8 each.

    Raises:
        UnreadablePicture: from `__getitem__`, with the file's name.
    """

    def __init__(self, paths: Sequence[Path], side: int) -> None:
        self.paths = list(paths)
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            return to_tensor(crop_and_resize(decode_picture(path.read_bytes()), self.side))
        except UnreadablePicture as error:
            raise UnreadablePicture(f"{path}: {error}") from None
