"""Pictures as the web has them at its worst: a folder of any number of them, the same in every run."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tif", "BMP": ".bmp"}
MODES = {
    "1": "PNG",
    "L": "PNG",
    "LA": "PNG",
    "P": "GIF",
    "RGB": "PNG",
    "RGBA": "WEBP",
    "CMYK": "JPEG",
    "YCbCr": "JPEG",
    "LAB": "TIFF",
    "I;16": "TIFF",
}
Make = Callable[[random.Random], bytes]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photograph(draw: random.Random, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    width, height = size or (draw.randint(20, 60), draw.randint(20, 60))
    pixels = np.frombuffer(draw.randbytes(width * height * 3), np.uint8).reshape(height, width, 3)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    if mode == "LAB":
        return Image.fromarray(pixels, "LAB")
    return Image.fromarray(pixels).convert(mode)


def whole(draw: random.Random) -> bytes:
    return encoded(photograph(draw), draw.choice(list(FORMATS)))


def odd_mode(draw: random.Random) -> bytes:
    mode = draw.choice(list(MODES))
    return encoded(photograph(draw, mode), MODES[mode])


def rotated(draw: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = draw.randint(0, 12)  # 1 to 8 are orientations, the others mean nothing
    return encoded(photograph(draw), "JPEG", exif=exif)


def animated(draw: random.Random) -> bytes:
    size = (24, 24)
    frames = [photograph(draw, size=size) for _ in range(3)]
    return encoded(frames[0], draw.choice(["GIF", "WEBP", "PNG"]), save_all=True, append_images=frames[1:])


def truncated(draw: random.Random) -> bytes:
    data = encoded(photograph(draw, size=(60, 60)), draw.choice(["PNG", "JPEG", "WEBP", "BMP"]))
    return data[: draw.randint(1, len(data) // 2)]


def flipped(draw: random.Random) -> bytes:
    """A few bits changed anywhere: some decoders mind, some do not."""
    data = bytearray(whole(draw) if draw.random() < 0.5 else rotated(draw))
    for _ in range(draw.randint(1, 30)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def no_picture(draw: random.Random) -> bytes:
    return draw.choice(
        [
            b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
            b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
            b"\xff\xd8",
            draw.randbytes(draw.randint(1, 3000)),
        ]
    )


def png(width: int, height: int, rows: bytes) -> bytes:
    """A grey PNG of one bit a pixel whose data may be anything."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(rows, 9)) + part(b"IEND", b"")


@cache
def zeros(side: int) -> bytes:
    return png(side, side, bytes(side * (1 + side // 8)))


def bomb(draw: random.Random) -> bytes:
    """900 million pixels in 100 KB, or a header that promises more than any memory holds."""
    if draw.random() < 0.2:
        return zeros(30_000)
    side = draw.choice([50_000, 2**31 - 1])
    return png(side, side, b"")


def too_thin(draw: random.Random) -> bytes:
    return png(draw.randint(5_000, 60_000), 1, bytes(10_000))


# What is made, how often in a hundred, and the reasons that it may be rejected for; None: it may be kept.
KINDS: dict[str, tuple[Make, int, set[str | None]]] = {
    "whole": (whole, 10, {None}),
    "odd_mode": (odd_mode, 14, {None}),
    "rotated": (rotated, 8, {None}),
    "animated": (animated, 6, {None}),
    "truncated": (truncated, 16, {"truncated picture", "damaged picture", "not a picture"}),
    "flipped": (
        flipped,
        22,
        {
            None,
            "truncated picture",
            "damaged picture",
            "not a picture",
            "too many pixels",
            "too small",
            "aspect too extreme",
        },
    ),
    "empty": (lambda draw: b"", 4, {"empty file"}),
    "no_picture": (no_picture, 8, {"not a picture", "damaged picture", "truncated picture"}),
    "bomb": (bomb, 6, {"too many pixels"}),
    "too_thin": (too_thin, 6, {"too small"}),
}
MISSING = {"unreadable file: No such file or directory"}
FOLDER = {"unreadable file: Is a directory"}
NO_TEXT = {"caption is not Unicode text"}
NO_NAME = {"name is not Unicode text"}
NO_SCORE = {"no score score"}
LOOP = {"unreadable file: Too many levels of symbolic links"}


def make_hostile_folder(folder: Path, count: int) -> dict[str, set[str | None]]:
    """Writes `count` pictures with their listing; returns what may become of each by key (see KINDS)."""
    draw = random.Random(0)
    expected: dict[str, set[str | None]] = {}
    lines = []
    names = [name for name, (_, share, _) in KINDS.items() for _ in range(share)]
    for i in range(count):
        kind = names[i % len(names)]
        suffix = draw.choice(list(FORMATS.values()))  # that of another format as often as not
        key = f"{i:05}-{kind}{suffix}"
        line: dict[str, object] = {"file": key, "caption": f"{kind} {i}", "score": 1}
        if i % 100 in (9, 19, 29):  # whatever the picture, its line cannot be used
            (folder / key).write_bytes(KINDS[kind][0](draw))
            if i % 100 == 9:
                line["caption"], expected[key] = "a cat \ud83d", NO_TEXT
            elif i % 100 == 19:
                line["score"], expected[key] = 10**400, NO_SCORE
            else:
                os.rename(folder / key, folder / f"caf\udce9-{key}")
                key = line["file"] = f"caf\udce9-{key}"
                expected[key] = NO_NAME
        elif i % 100 == 99:
            expected[key] = draw.choice([MISSING, FOLDER, LOOP])
            if expected[key] is FOLDER:
                (folder / key).mkdir()
            elif expected[key] is LOOP:
                os.symlink(key, folder / key)
        else:
            make, _, expected[key] = KINDS[kind]
            (folder / key).write_bytes(make(draw))
        lines.append(json.dumps(line))
    draw.shuffle(lines)
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return expected
