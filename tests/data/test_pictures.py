import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from star_dist.data.pictures import UnreadablePicture, crop_and_resize, decode_picture, normalize, to_pil, to_tensor
from tests.data_prep.hostile import encoded


def test_transparency_lies_on_white() -> None:
    image = decode_picture(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGB", "RGBA", "I;16"])
def test_all_modes_become_rgb(mode: str) -> None:
    format = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    image = decode_picture(encoded(Image.new(mode, (5, 3)), format))
    assert image.mode == "RGB" and image.size == (5, 3)


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert decode_picture(encoded(grey, "TIFF")).getpixel((0, 0)) == (128, 128, 128)


def test_wider_values_are_taken_by_their_range() -> None:
    floats = Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32))
    assert decode_picture(encoded(floats, "TIFF")).getpixel((0, 0)) == (128, 128, 128)
    integers = Image.fromarray(np.full((2, 2), 0x4000, dtype=np.int32))
    assert decode_picture(encoded(integers, "TIFF")).getpixel((0, 0)) == (64, 64, 64)
    for beyond in (np.full((2, 2), 7.5, dtype=np.float32), np.full((2, 2), -1, dtype=np.int32)):
        with pytest.raises(UnreadablePicture, match="outside of 0 to 1|beyond 16 bits"):
            decode_picture(encoded(Image.fromarray(beyond), "TIFF"))


def test_formats_that_start_programs_are_no_pictures() -> None:
    with pytest.raises(UnreadablePicture, match="not a picture"):
        decode_picture(encoded(Image.new("RGB", (4, 4)), "EPS"))


def test_the_size_is_checked_before_the_pixels_are_decoded() -> None:
    def refuse(width: int, height: int) -> None:
        raise ValueError(f"{width} x {height}")

    data = encoded(Image.new("RGB", (40, 30)))
    for cut in (data, data[:60]):
        with pytest.raises(ValueError, match="40 x 30"):
            decode_picture(cut, refuse)


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture lies on its side
    assert decode_picture(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_every_orientation_is_turned_as_pillow_does(orientation: int, format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 5, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(pixels), format, exif=exif, lossless=True)
    assert np.array_equal(decode_picture(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def test_rotation_in_xmp_is_applied() -> None:
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    assert decode_picture(encoded(Image.new("RGB", (8, 4)), "JPEG", xmp=xmp)).size == (4, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_is_no_reason_to_reject_a_picture(format: str) -> None:
    rotated = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd_width = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")  # text where a number should be
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + odd_width + rotated + bytes(4)
    picture = Image.new("RGB", (8, 4))
    assert decode_picture(encoded(picture, format, exif=tags)).size == (4, 8)
    assert decode_picture(encoded(picture, format, exif=b"this is no TIFF")).size == (8, 4)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not a picture"),
        (
            encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))[:2000],
            "truncated",
        ),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "truncated picture|damaged picture"),
    ],
)
def test_unreadable_pictures_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadablePicture, match=reason):
        decode_picture(data)


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadablePicture, match="too many pixels"):
        decode_picture(encoded(Image.new("RGB", (11, 11))))


def test_crop_is_centred_and_proportional() -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste(Image.new("RGB", (10, 10), "blue"), (10, 0))
    square = crop_and_resize(wide, 10)
    assert square.size == (10, 10) and square.getpixel((1, 1)) == (0, 0, 255)


def test_tensors_and_pictures_are_inverse() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 6, 5)
    (back,) = to_pil(normalize(tensor[None]))
    assert np.array_equal(np.asarray(back), pixels)
