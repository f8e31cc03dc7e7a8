import io

import numpy as np
import pytest
from PIL import Image

from star_dist.data.pictures import UnreadablePicture, crop_and_resize, decode_picture, normalize, to_pil, to_tensor


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


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


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture lies on its side
    assert decode_picture(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


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
