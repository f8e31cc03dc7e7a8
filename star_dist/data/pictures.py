"""Picture files to tensors: decoding with all its traps, centre crop and proportional resize (STAR section 4.1)."""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from star_dist.errors import Unavailable, UserError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"})
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
# What is wrong with one file's name or rights; anything else is the storage's fault, and no reason to drop a picture.
FILE_FAULTS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
)
READ_ATTEMPTS = 5
FIRST_PAUSE_S = 1.0  # between attempts; each next one is twice as long
UPRIGHT = {  # what undoes each orientation of EXIF but 1
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadablePicture(ValueError):
    """A picture that cannot be decoded; the message is the reason, short enough to count by."""


def decode_picture(data: bytes, check_size: Callable[[int, int], None] | None = None) -> Image.Image:
    """Decodes picture bytes to RGB: EXIF rotation applied, transparency laid on white, first frame of an animation.

    check_size: called with width and height before the pixels are decoded; what it raises passes through.

    Raises:
        UnreadablePicture: empty, truncated, no picture at all, or dangerously large.
    """
    if not data:
        raise UnreadablePicture("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:  # of twice the limit
        raise UnreadablePicture("too many pixels") from None
    except Image.UnidentifiedImageError:
        raise UnreadablePicture("not a picture") from None
    except Exception as error:  # Pillow's plugins raise anything for damaged headers
        raise UnreadablePicture(_damage(error)) from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns, which threads cannot catch safely
        raise UnreadablePicture("too many pixels")
    if check_size is not None:
        check_size(*image.size)
    try:
        image.load()
        if (turn := UPRIGHT.get(_orientation(image))) is not None:
            image = image.transpose(turn)
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UnreadablePicture:
        raise
    except Exception as error:  # Pillow's decoders raise anything for damaged files
        raise UnreadablePicture(_damage(error)) from None


def _orientation(image: Image.Image) -> int:
    """The orientation in EXIF, or in XMP where EXIF has none; 1, which is upright, where neither can be read.

    `ImageOps.exif_transpose` would also write all other tags anew, and fails at one that is odd.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises anything for a block that is no EXIF; the picture itself is whole
        return 1


def _damage(error: Exception) -> str:
    return "truncated picture" if "truncat" in str(error) else "damaged picture"


@cache
def _formats() -> tuple[str, ...]:
    """Formats that are decoded, as far as this Pillow has them. Others start programs (EPS) or are no photographs."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of more than 8 bits: floats count from 0 to 1, integers as 16 bits, also where 32 hold them."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UnreadablePicture("float pixels outside of 0 to 1")
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if values.min() < 0 or values.max() >= 2**16:
        raise UnreadablePicture("integer pixels beyond 16 bits")
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


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
        Unavailable: from `__getitem__`, where the storage fails, so that nothing is known of the picture.
    """

    def __init__(self, paths: Sequence[Path], side: int) -> None:
        self.paths = list(paths)
        self.side = side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            return to_tensor(crop_and_resize(decode_picture(_read_file(path)), self.side))
        except UnreadablePicture as error:
            raise UnreadablePicture(f"{path}: {error}") from None


def _read_file(path: Path) -> bytes:
    for attempt in range(READ_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno in FILE_FAULTS:
                raise UnreadablePicture(f"unreadable file: {error.strerror}") from None
            reason = error.strerror
    raise Unavailable(f"cannot read {path}: {reason}, {READ_ATTEMPTS} times; try again when the storage answers")
